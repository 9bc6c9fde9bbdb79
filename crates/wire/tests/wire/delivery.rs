//! Changesets from one side to the other.

use std::sync::Arc;

use block::{ByteCount, Epoch, Generation};
use bytes::Bytes;
use wire::{
    Connection, Held, Incoming, Opening, Receipts, Receiver, RefusalCode, Role, Sender, WireError, connect,
};

use super::{GROUP, Site, open};

const GENERATION: Generation = Generation(3);

/// A delivery that was accepted.
async fn delivery(held: Held, credit: u64) -> (Sender, Receipts, Receiver) {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let agent = site.agent();
    let client = async {
        let connection = connect(&addr, Role::TargetServer, &agent).await.unwrap();
        Sender::open(connection, GROUP, GENERATION).await.unwrap()
    };
    let server = async {
        let Opening::Deliver(receiver) = open(&listener).await.unwrap() else {
            panic!("expected a delivery")
        };
        receiver.accept(held, ByteCount(credit));
        receiver
    };
    let ((sender, receipts), receiver) = tokio::join!(client, server);
    assert_eq!((receiver.group(), receiver.generation()), (GROUP, GENERATION));
    assert_eq!(receiver.peer().role, Role::Agent);
    (sender, receipts, receiver)
}

/// Bytes that tell their own place.
fn pattern(length: usize) -> Bytes {
    (0..length).map(|index| (index * 31 + index / 251) as u8).collect()
}

/// Takes one changeset, granting as much as was taken, and gives its bytes.
async fn take(receiver: &mut Receiver) -> (Epoch, Vec<u8>) {
    let answerer = receiver.answerer();
    let Some(Incoming::Begin { epoch, total }) = receiver.next().await.unwrap() else {
        panic!("expected Begin")
    };
    let mut bytes = Vec::new();
    loop {
        match receiver.next().await.unwrap().unwrap() {
            Incoming::Data(data) => {
                answerer.grant(ByteCount(data.len() as u64));
                bytes.extend_from_slice(&data);
            }
            Incoming::End => break,
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(bytes.len() as u64, total.get());
    (epoch, bytes)
}

#[tokio::test]
async fn changesets_arrive_as_they_were_sent_whatever_the_credit() {
    let whole = pattern(300_000);
    for credit in [1_000, 65_537, 1 << 30] {
        let (mut sender, _receipts, mut receiver) = delivery(Held::default(), credit).await;
        for piece in [1, 777, 100_000, 300_000] {
            let pieces: Vec<Bytes> =
                whole.chunks(piece).map(|chunk| whole.slice_ref(chunk)).filter(|_| piece > 1).collect();
            let total = ByteCount(pieces.iter().map(|piece| piece.len() as u64).sum());
            let sent = sender.deliver(Epoch(5), total, pieces);
            let (sent, (epoch, bytes)) = tokio::join!(sent, take(&mut receiver));
            sent.unwrap();
            assert_eq!(epoch, Epoch(5));
            assert!(bytes.is_empty() || bytes == whole, "credit {credit}, pieces of {piece}");
        }
    }
}

#[tokio::test]
async fn one_byte_of_credit_is_enough_to_go_on() {
    let (mut sender, _receipts, mut receiver) = delivery(Held::default(), 1).await;
    let whole = pattern(500);
    let (sent, (_, bytes)) =
        tokio::join!(sender.deliver(Epoch(1), ByteCount(500), [whole.clone()]), take(&mut receiver));
    sent.unwrap();
    assert_eq!(bytes, whole);
}

/// The receiver takes nothing: no more than the credit may be outstanding, so its memory is bounded.
#[tokio::test]
async fn a_slow_receiver_is_sent_no_more_than_it_granted() {
    let credit = 100_000;
    let (mut sender, _receipts, mut receiver) = delivery(Held::default(), credit).await;
    let whole = pattern(1_000_000);
    let expected = whole.clone();
    let task = tokio::spawn(async move {
        sender.deliver(Epoch(1), ByteCount(1_000_000), [whole]).await.unwrap();
        sender
    });
    assert!(matches!(receiver.next().await.unwrap(), Some(Incoming::Begin { .. })));
    let mut taken = Vec::new();
    while (taken.len() as u64) < credit {
        let Some(Incoming::Data(data)) = receiver.next().await.unwrap() else { panic!("expected data") };
        taken.extend_from_slice(&data);
    }
    // All that was granted has come, and nothing more does until more is granted.
    assert_eq!(taken.len() as u64, credit);
    let more = tokio::time::timeout(std::time::Duration::from_millis(200), receiver.next()).await;
    assert!(more.is_err(), "came without credit: {more:?}");
    assert!(!task.is_finished());
    receiver.answerer().grant(ByteCount(900_000));
    while !matches!(receiver.next().await.unwrap().unwrap(), Incoming::Data(data) if {
        taken.extend_from_slice(&data);
        taken.len() == 1_000_000
    }) {}
    assert_eq!(taken, expected);
    task.await.unwrap();
}

#[tokio::test]
async fn what_is_held_is_told_at_the_opening_and_later() {
    let opening = Held { held: Epoch(41), applied: Epoch(40) };
    let (mut sender, mut receipts, mut receiver) = delivery(opening, 1 << 20).await;
    assert_eq!(sender.held(), opening);
    let answerer = receiver.answerer();
    let receive = async {
        take(&mut receiver).await;
        answerer.hold(Held { held: Epoch(42), applied: Epoch(40) });
    };
    let (sent, ()) =
        tokio::join!(sender.deliver(Epoch(42), ByteCount(3), [Bytes::from_static(b"abc")]), receive);
    sent.unwrap();
    assert_eq!(receipts.next().await.unwrap(), Held { held: Epoch(42), applied: Epoch(40) });
    // News in quick succession are told as the last one; none is told twice.
    for applied in 41..=1000 {
        answerer.hold(Held { held: Epoch(1000), applied: Epoch(applied) });
    }
    loop {
        let held = receipts.next().await.unwrap();
        if held.applied == Epoch(1000) {
            break;
        }
    }
    drop(receiver);
    assert!(matches!(receipts.next().await, Err(WireError::Closed { .. })));
}

#[tokio::test]
async fn reports_pass_without_credit_and_between_the_data() {
    let (mut sender, _receipts, mut receiver) = delivery(Held::default(), 0).await;
    sender.begin(Epoch(1), ByteCount(3)).await.unwrap();
    sender.report(r#"{"a":1}"#).await.unwrap();
    assert!(matches!(receiver.next().await.unwrap(), Some(Incoming::Begin { .. })));
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::Report(r#"{"a":1}"#.into())));
    receiver.answerer().grant(ByteCount(3));
    sender.data(Bytes::from_static(b"abc")).await.unwrap();
    sender.end().await.unwrap();
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::Data(Bytes::from_static(b"abc"))));
    assert_eq!(receiver.next().await.unwrap(), Some(Incoming::End));
    let long = "x".repeat(wire::REPORT_BYTES_MAX.get() as usize + 1);
    assert!(matches!(sender.report(&long).await, Err(WireError::TooLarge { .. })));
}

#[tokio::test]
async fn a_refusal_reaches_every_half() {
    let (mut sender, mut receipts, mut receiver) = delivery(Held::default(), 10).await;
    let waiting = tokio::spawn(async move {
        let error = sender.deliver(Epoch(9), ByteCount(100), [pattern(100)]).await.unwrap_err();
        (sender, error)
    });
    assert!(matches!(receiver.next().await.unwrap(), Some(Incoming::Begin { epoch: Epoch(9), .. })));
    receiver.answerer().refuse(RefusalCode::Gap, "epoch 9 does not follow 7; deliver 8 first");
    assert_eq!(receiver.next().await.unwrap_err().refusal(), Some(RefusalCode::Gap));
    // The words arrive even though the receiver is gone at once.
    drop(receiver);
    let (mut sender, error) = waiting.await.unwrap();
    for error in [error, receipts.next().await.unwrap_err(), sender.report("{}").await.unwrap_err()] {
        assert_eq!(error.refusal(), Some(RefusalCode::Gap));
        assert!(error.to_string().contains("epoch 9 does not follow 7"), "{error}");
        assert!(error.is_retryable());
    }
}

/// The sender is in full flight when it is refused: what it has sent and nobody read must not eat the refusal.
#[tokio::test]
async fn a_refusal_is_not_lost_under_data_in_flight() {
    for _ in 0..10 {
        let (mut sender, _receipts, receiver) = delivery(Held::default(), 1 << 30).await;
        let flood = tokio::spawn(async move {
            let data = pattern(1 << 20);
            sender.begin(Epoch(1), ByteCount(1 << 30)).await?;
            for _ in 0..1024 {
                sender.data(data.clone()).await?;
            }
            sender.end().await
        });
        receiver.answerer().refuse(RefusalCode::Full, "no space");
        drop(receiver);
        let error = flood.await.unwrap().unwrap_err();
        assert_eq!(error.refusal(), Some(RefusalCode::Full), "{error}");
    }
}

#[tokio::test]
async fn an_end_between_changesets_is_in_order_and_within_one_an_error() {
    let (mut sender, receipts, mut receiver) = delivery(Held::default(), 100).await;
    sender.deliver(Epoch(1), ByteCount(3), [Bytes::from_static(b"abc")]).await.unwrap();
    drop((sender, receipts));
    take(&mut receiver).await;
    assert_eq!(receiver.next().await.unwrap(), None);

    let (mut sender, receipts, mut receiver) = delivery(Held::default(), 100).await;
    sender.begin(Epoch(1), ByteCount(3)).await.unwrap();
    sender.data(Bytes::from_static(b"ab")).await.unwrap();
    drop((sender, receipts));
    receiver.next().await.unwrap();
    receiver.next().await.unwrap();
    let error = receiver.next().await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn the_announced_length_binds_the_sender() {
    let (mut sender, _receipts, _receiver) = delivery(Held::default(), 100).await;
    let short = sender.deliver(Epoch(4), ByteCount(4), [Bytes::from_static(b"abc")]).await.unwrap_err();
    assert_eq!(short.to_string(), "deliver epoch 4: 4 B were announced, 3 B were given");
    let (mut sender, _receipts, _receiver) = delivery(Held::default(), 100).await;
    assert!(sender.deliver(Epoch(4), ByteCount(2), [Bytes::from_static(b"abc")]).await.is_err());
    assert!(sender.data(Bytes::from_static(b"x")).await.is_err());
    let (mut sender, _receipts, _receiver) = delivery(Held::default(), 100).await;
    assert!(sender.end().await.is_err());
    sender.begin(Epoch(1), ByteCount(1)).await.unwrap();
    assert!(sender.begin(Epoch(2), ByteCount(1)).await.is_err());
}

/// A connection that breaks without a word is an error on both sides, also when nothing is under way.
#[tokio::test]
async fn a_broken_connection_is_told() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = proxy.local_addr().unwrap().to_string();
    let cut = Arc::new(tokio::sync::Notify::new());
    let cut_here = cut.clone();
    tokio::spawn(async move {
        let (mut near, _) = proxy.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(addr).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = cut_here.notified() => {}
        }
    });
    let agent = site.agent();
    let client = async {
        let connection: Connection = connect(&through, Role::TargetServer, &agent).await.unwrap();
        Sender::open(connection, GROUP, GENERATION).await.unwrap()
    };
    let server = async {
        let Opening::Deliver(receiver) = open(&listener).await.unwrap() else {
            panic!("expected a delivery")
        };
        receiver.accept(Held::default(), ByteCount(1));
        receiver
    };
    let ((_sender, mut receipts), mut receiver) = tokio::join!(client, server);
    cut.notify_one();
    let (client, server) = tokio::join!(receipts.next(), receiver.next());
    for error in [client.unwrap_err(), server.unwrap_err()] {
        assert!(matches!(error, WireError::Lost { .. }), "{error}");
        assert!(error.is_retryable());
    }
}
