use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::RefusalCode;

const MINUTE: Duration = Duration::from_secs(60);

/// A peer that can be switched off, and counts who looks at it.
#[derive(Clone, Default)]
struct Peer {
    there: Arc<AtomicBool>,
    looks: Arc<AtomicUsize>,
}

impl Peer {
    fn peers(&self) -> Peers {
        let peer = self.clone();
        Peers::looked_at(Arc::new(move |_| {
            peer.looks.fetch_add(1, Ordering::SeqCst);
            let there = peer.there.load(Ordering::SeqCst);
            Box::pin(async move { there })
        }))
    }

    fn set(&self, there: bool) {
        self.there.store(there, Ordering::SeqCst);
    }
}

fn away() -> WireError {
    let source = Arc::new(io::Error::from(io::ErrorKind::ConnectionRefused));
    WireError::Connect { addr: "peer:1".into(), source }
}

fn refusal(code: RefusalCode) -> WireError {
    WireError::Refused { code, message: "no".into(), retry: code.is_retryable() }
}

fn retry(peer: &Peer) -> Retry {
    Retry::new(&RetryPolicy::default(), &peer.peers(), "peer:1", 7)
}

/// Nothing moves but the clock, which tokio turns by itself from one timer to the next.
#[tokio::test(start_paused = true)]
async fn quick_with_jitter_then_the_known_intervals_for_ever() {
    let peer = Peer::default();
    let mut retry = retry(&peer);
    let begin = Instant::now();
    let (mut quick, mut minutes) = (Vec::new(), Vec::new());
    while minutes.len() < 9 {
        let pause = retry.failed(&away());
        let before = Instant::now();
        assert_eq!(retry.pause(pause, pending()).await, Woken::Due);
        let waited = before.elapsed();
        assert!(waited.abs_diff(pause.wait) <= Duration::from_millis(2), "{waited:?} for {:?}", pause.wait);
        if pause.wait <= QUICK_WAIT.1 {
            assert!(minutes.is_empty(), "quick again after {minutes:?}");
            quick.push(pause.wait);
        } else {
            assert!(begin.elapsed() >= Duration::from_secs(30));
            minutes.push(waited.as_secs_f64() / 60.0);
        }
    }
    assert!((30..=300).contains(&quick.len()), "{} quick attempts", quick.len());
    quick.dedup();
    assert!(quick.len() > 20, "no jitter: {quick:?}");
    for (got, wanted) in minutes.iter().zip([1.0, 2.0, 4.0, 8.0, 10.0, 30.0, 30.0, 30.0, 30.0]) {
        assert!(*got <= wanted + 1e-3 && *got >= wanted * 0.9, "{got} for {wanted}: {minutes:?}");
    }
    // Success begins it all anew.
    retry.succeeded();
    assert!(retry.failed(&away()).wait <= QUICK_WAIT.1);
}

async fn until_slow(retry: &mut Retry, error: &WireError) -> Pause {
    loop {
        let pause = retry.failed(error);
        if pause.wait > 20 * MINUTE {
            return pause;
        }
        retry.pause(pause, pending()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_back_is_tried_at_once() {
    let peer = Peer::default();
    let mut retry = retry(&peer);
    let pause = until_slow(&mut retry, &away()).await;
    let begin = Instant::now();
    let came = peer.clone();
    tokio::spawn(async move {
        tokio::time::sleep(5 * MINUTE).await;
        came.set(true);
    });
    assert_eq!(retry.pause(pause, pending()).await, Woken::Returned);
    let waited = begin.elapsed();
    assert!(waited >= 5 * MINUTE && waited <= 5 * MINUTE + Duration::from_secs(15), "{waited:?}");
}

/// It is there all the time: that is no reason to try earlier. Only when it has been away in between.
#[tokio::test(start_paused = true)]
async fn a_peer_that_refuses_is_not_back() {
    let peer = Peer::default();
    peer.set(true);
    let mut retry = retry(&peer);
    let pause = until_slow(&mut retry, &refusal(RefusalCode::Full)).await;
    assert_eq!(pause.class, FailureClass::Recoverable);
    assert_eq!(retry.pause(pause, pending()).await, Woken::Due);

    let pause = retry.failed(&refusal(RefusalCode::Full));
    let restarted = peer.clone();
    tokio::spawn(async move {
        tokio::time::sleep(2 * MINUTE).await;
        restarted.set(false);
        tokio::time::sleep(MINUTE).await;
        restarted.set(true);
    });
    let begin = Instant::now();
    assert_eq!(retry.pause(pause, pending()).await, Woken::Returned);
    assert!(begin.elapsed() >= 3 * MINUTE && begin.elapsed() < 4 * MINUTE, "{:?}", begin.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_a_person_must_mend_does_not_follow_the_schedule() {
    let peer = Peer::default();
    peer.set(true);
    let mut retry = retry(&peer);
    for error in [
        refusal(RefusalCode::Unauthorised),
        refusal(RefusalCode::WrongGroup),
        refusal(RefusalCode::Generation),
        WireError::Tls { peer: "peer".into(), reason: "expired".into() },
        WireError::Identity { peer: "peer".into(), reason: "somebody else".into() },
    ] {
        for _ in 0..3 {
            let pause = retry.failed(&error);
            assert_eq!((pause.class, pause.wait), (FailureClass::NonRecoverable, 30 * MINUTE), "{error}");
            let left = pause.next_try().0.saturating_sub(UnixNanos::now().0);
            assert!(left <= 1_800_000_000_000 && left > 1_700_000_000_000, "{left}");
        }
    }
    // Mended here: at once.
    let pause = retry.failed(&refusal(RefusalCode::Unauthorised));
    let begin = Instant::now();
    let mended = tokio::time::sleep(3 * MINUTE);
    assert_eq!(retry.pause(pause, mended).await, Woken::Mended);
    assert!(begin.elapsed() < 4 * MINUTE);
    // And then the quick phase is still to come.
    assert!(retry.failed(&away()).wait <= QUICK_WAIT.1);
}

/// Two hundred groups whose target is away look at it once in a while, not two hundred times; and when one has reached it,
/// all others come.
#[tokio::test(start_paused = true)]
async fn many_that_wait_for_one_peer_look_once() {
    let peer = Peer::default();
    let peers = peer.peers();
    let mut waiting = tokio::task::JoinSet::new();
    for group in 0..200 {
        let mut retry = Retry::new(&RetryPolicy::default(), &peers, "peer:1", group * 977 + 3);
        waiting.spawn(async move {
            let pause = until_slow(&mut retry, &away()).await;
            retry.pause(pause, pending()).await
        });
    }
    // Past the quick phase and 1 + 2 + 4 + 8 + 10 minutes; none of the half hours is over.
    tokio::time::sleep(26 * MINUTE).await;
    let looks = peer.looks.load(Ordering::SeqCst);
    assert!(looks > 26 * 4 && looks <= 26 * 12, "{looks} looks in 26 minutes");
    let mut first = Retry::new(&RetryPolicy::default(), &peers, "peer:1", 1);
    first.succeeded();
    let begin = Instant::now();
    while let Some(woken) = waiting.join_next().await {
        assert_eq!(woken.unwrap(), Woken::Returned);
    }
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    // Nobody waits any more: nobody looks.
    tokio::time::sleep(MINUTE).await;
    let looks = peer.looks.load(Ordering::SeqCst);
    tokio::time::sleep(60 * MINUTE).await;
    assert_eq!(peer.looks.load(Ordering::SeqCst), looks);
}

#[test]
fn a_policy_out_of_range_is_refused_by_name() {
    let good = RetryPolicy::default();
    assert_eq!(good.check(), Ok(()));
    for (bad, named) in [
        (RetryPolicy { quick_s: 3601, ..good.clone() }, "quick_s = 3601"),
        (RetryPolicy { minutes: vec![], ..good.clone() }, "minutes has 0 waits"),
        (RetryPolicy { minutes: vec![1, 0], ..good.clone() }, "minutes has 0"),
        (RetryPolicy { minutes: vec![1441], ..good.clone() }, "minutes has 1441"),
        (RetryPolicy { look_s: 0, ..good.clone() }, "look_s = 0"),
    ] {
        assert!(bad.check().unwrap_err().to_string().contains(named), "{bad:?}");
    }
    // Configured, it is followed.
    let policy = RetryPolicy { minutes: vec![3, 5], ..good };
    let minutes: Vec<u64> = (0..4).map(|index| policy.slow_wait(index).as_secs() / 60).collect();
    assert_eq!(minutes, [3, 5, 5, 5]);
}
