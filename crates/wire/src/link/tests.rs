use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};

use super::*;

const PATIENT: Duration = Duration::from_secs(3600);

fn timing(ping_every: Duration, silence_max: Duration) -> Timing {
    Timing { ping_every, silence_max, linger_max: Duration::from_secs(1) }
}

/// A link whose peer is a bare stream of bytes.
fn link() -> (Link, DuplexStream) {
    let (near, far) = duplex(64 * 1024);
    (Link::start(near, "test peer".into(), timing(PATIENT, PATIENT)), far)
}

fn bytes(kind: FrameKind, argument: u64, payload: &[u8]) -> Vec<u8> {
    let frame = Outgoing::new(kind, argument, vec![Bytes::copy_from_slice(payload)]);
    [&frame.header[..], payload].concat()
}

/// What the peer was told before the connection was closed.
async fn last_words(far: &mut DuplexStream) -> Vec<Frame> {
    let mut reader = FrameReader::new(far);
    let mut frames = Vec::new();
    while let Some(frame) = reader.next(PATIENT).await.unwrap() {
        frames.push(frame);
    }
    frames
}

fn refusal(frames: &[Frame]) -> WireError {
    let frame = frames.last().unwrap();
    assert_eq!(frame.kind, FrameKind::Refuse);
    frame.message::<Refuse>().unwrap().into_error()
}

#[tokio::test]
async fn an_oversized_frame_is_refused_by_its_header() {
    let (mut link, mut far) = link();
    let mut header = bytes(FrameKind::Report, 0, b"");
    header[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    far.write_all(&header).await.unwrap();
    let error = link.next().await.unwrap_err();
    assert!(error.to_string().contains("4294967295 bytes is more than 1048576"), "{error}");
    let told = refusal(&last_words(&mut far).await);
    assert_eq!(told.refusal(), Some(RefusalCode::Corrupt));
    assert!(told.to_string().contains("4294967295"), "{told}");
}

#[tokio::test]
async fn unknown_kinds_and_flags_are_refused() {
    for (at, byte, expected) in [(4, 99, "unknown frame kind 99"), (6, 1, "unknown frame flags 0001")] {
        let (mut link, mut far) = link();
        let mut header = bytes(FrameKind::Ping, 0, b"");
        header[at] = byte;
        far.write_all(&header).await.unwrap();
        let error = link.next().await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_connection_cut_within_a_frame_is_an_error() {
    let (mut link, mut far) = link();
    let frame = bytes(FrameKind::Report, 0, b"0123456789");
    far.write_all(&frame).await.unwrap();
    far.write_all(&frame[..20]).await.unwrap();
    drop(far);
    assert_eq!(link.next().await.unwrap().payload, b"0123456789"[..]);
    let error = link.next().await.unwrap_err();
    assert!(
        matches!(error, WireError::Frame { source: FrameError::Truncated { missing: 6 }, .. }),
        "{error}"
    );
    assert!(error.is_retryable());
}

#[tokio::test]
async fn more_bytes_than_granted_are_refused_by_name() {
    let (mut link, mut far) = link();
    link.shared.grant(ByteCount(10));
    far.write_all(&bytes(FrameKind::Data, 0, b"0123456789")).await.unwrap();
    assert_eq!(link.next().await.unwrap().payload.len(), 10);
    far.write_all(&bytes(FrameKind::Data, 10, b"x")).await.unwrap();
    let error = link.next().await.unwrap_err();
    assert_eq!(error.refusal(), Some(RefusalCode::Credit));
    let told = refusal(&last_words(&mut far).await);
    assert_eq!(told.refusal(), Some(RefusalCode::Credit));
    assert!(told.to_string().contains("11 bytes arrived, only 10 were granted"), "{told}");
}

#[tokio::test]
async fn a_refusal_ends_the_link_at_once_whatever_is_queued() {
    let (mut link, mut far) = link();
    far.write_all(&bytes(FrameKind::Report, 0, b"1")).await.unwrap();
    far.write_all(&bytes(FrameKind::Report, 0, b"2")).await.unwrap();
    link.next().await.unwrap();
    link.shared.refuse(RefusalCode::Busy, true, "first");
    link.shared.refuse(RefusalCode::Internal, true, "second");
    assert_eq!(link.next().await.unwrap_err().refusal(), Some(RefusalCode::Busy));
    let frames = last_words(&mut far).await;
    assert_eq!(frames.len(), 1);
    assert!(refusal(&frames).to_string().contains("first"));
}

#[tokio::test]
async fn what_was_queued_leaves_before_the_end() {
    let (link, mut far) = link();
    for index in 0..FRAMES_LEAVING_MAX as u64 {
        link.send(Outgoing::new(FrameKind::Begin, index, Vec::new())).await.unwrap();
    }
    link.shared.grant(ByteCount(5));
    drop(link);
    let frames = last_words(&mut far).await;
    let begins = frames.iter().filter(|frame| frame.kind == FrameKind::Begin).map(|frame| frame.argument);
    assert_eq!(begins.collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(frames.iter().any(|frame| frame.kind == FrameKind::Grant && frame.argument == 5));
}

/// The refusal waits in this side's kernel because the peer does not read yet, and what the peer goes on sending
/// finds nobody: if this side just closed its socket, the kernel would answer with a reset and drop the refusal.
#[tokio::test]
async fn a_refusal_outlives_what_the_peer_sends_after_it() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let (far, near) = tokio::join!(socket.connect(listener.local_addr().unwrap()), listener.accept());
    let (mut far, near) = (far.unwrap(), near.unwrap().0);
    let link = Link::start(near, "peer".into(), timing(PATIENT, PATIENT));
    link.send(Outgoing::new(FrameKind::View, 0, vec![vec![0; 128 * 1024].into()])).await.unwrap();
    // It is on its way; a refusal would overtake it in the queue.
    far.readable().await.unwrap();
    link.shared.refuse(RefusalCode::Full, true, "no space");
    // Long enough for a side that does not linger to be gone; one that does is not hurried by it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    far.write_all(&bytes(FrameKind::Report, 0, b"still here")).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut reader = FrameReader::new(&mut far);
    let mut frames = Vec::new();
    while let Ok(Some(frame)) = reader.next(PATIENT).await {
        frames.push(frame);
    }
    assert_eq!(refusal(&frames).refusal(), Some(RefusalCode::Full));
    drop(link);
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_lost_and_a_living_one_is_not() {
    let every = Duration::from_secs(10);
    let (near, far) = duplex(1024);
    let living = Link::start(near, "living".into(), timing(every, every * 3));
    let _other = Link::start(far, "other".into(), timing(every, every * 3));
    let (near, _mute) = duplex(1024);
    let lonely = Link::start(near, "mute".into(), timing(every, every * 3));
    let error = lonely.shared.failed().await;
    assert!(matches!(error, WireError::TimedOut { .. }), "{error}");
    assert!(error.is_retryable());
    tokio::time::sleep(every * 60).await;
    assert!(living.shared.failure().is_none());
}

#[tokio::test]
async fn unread_frames_are_bounded() {
    let (link, mut far) = link();
    let frame = bytes(FrameKind::Report, 0, b"");
    let whole = FRAMES_QUEUED_MAX * 4;
    let flood = async {
        for _ in 0..whole {
            far.write_all(&frame).await.unwrap();
        }
    };
    // The writer can get no further than the queue, one frame in hand, and the buffers between.
    let mut flood = pin!(flood);
    for _ in 0..whole * 4 {
        tokio::select! {
            biased;
            () = &mut flood => panic!("the flood went through"),
            () = tokio::task::yield_now() => {}
        }
    }
    assert!(link.incoming.len() <= FRAMES_QUEUED_MAX);
}

fn any_frame() -> impl Strategy<Value = (u64, Vec<u8>)> {
    (any::<u64>(), prop_oneof![proptest::collection::vec(any::<u8>(), 0..200), Just(vec![7; 40_000])])
}

proptest! {
    #[test]
    fn frames_survive_any_cut(frames in proptest::collection::vec(any_frame(), 0..12), cut in 1..5000_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let stream: Vec<u8> =
                frames.iter().flat_map(|(argument, payload)| bytes(FrameKind::Report, *argument, payload)).collect();
            let (mut near, far) = duplex(cut);
            let write = tokio::spawn(async move {
                for part in stream.chunks(cut) {
                    near.write_all(part).await.unwrap();
                }
            });
            let mut reader = FrameReader::new(far);
            for (argument, payload) in &frames {
                let frame = reader.next(PATIENT).await.unwrap().unwrap();
                assert_eq!((frame.argument, &frame.payload[..]), (*argument, &payload[..]));
            }
            assert!(reader.next(PATIENT).await.unwrap().is_none());
            write.await.unwrap();
        });
    }

    #[test]
    fn no_bytes_panic(stream: Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut reader = FrameReader::new(&stream[..]);
            while let Ok(Some(_)) = reader.next(PATIENT).await {}
            assert!(reader.buffer.capacity() <= READ_BYTES * 2);
        });
    }
}
