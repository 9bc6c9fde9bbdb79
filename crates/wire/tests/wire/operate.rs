//! An operator's requests.

use block::ByteOffset;
use bytes::Bytes;
use wire::{Listener, Opening, Operation, Operator, RefusalCode, Role, WireError};

use super::{Site, open};

async fn operation(listener: &Listener) -> Operation {
    match open(listener).await.unwrap() {
        Opening::Operate(operation) => operation,
        _ => panic!("expected a request"),
    }
}

#[tokio::test]
async fn answers_of_any_length_arrive() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let operator = site.operator();
    for length in [0, 5, 1 << 20, (1 << 20) + 1, 5_000_000] {
        let reply = "ü".repeat(length / 2);
        let server = async {
            let operation = operation(&listener).await;
            assert_eq!(operation.request(), "{\"request\":\"status\"}");
            assert_eq!(operation.peer().name, "operator");
            operation.reply(&reply).await.unwrap();
        };
        let call = Operator::call(&addr, Role::TargetServer, &operator, "{\"request\":\"status\"}");
        let (answer, ()) = tokio::join!(call, server);
        assert_eq!(answer.unwrap(), reply);
    }
}

#[tokio::test]
async fn too_long_an_answer_or_request_is_refused_by_name() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let operator = site.operator();
    let long = "x".repeat(wire::REPLY_BYTES_MAX.get() as usize + 1);
    let server = async { operation(&listener).await.reply(&long).await };
    let (answer, server) = tokio::join!(Operator::call(&addr, Role::TargetServer, &operator, "{}"), server);
    assert_eq!(answer.unwrap_err().refusal(), Some(RefusalCode::Limit));
    assert!(matches!(server, Err(WireError::TooLarge { .. })));
    let long = "x".repeat(wire::REQUEST_BYTES_MAX.get() as usize + 1);
    let error = Operator::call(&addr, Role::TargetServer, &operator, &long).await.unwrap_err();
    assert!(matches!(error, WireError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_refusal_says_why() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let operator = site.operator();
    let server =
        async { operation(&listener).await.refuse(RefusalCode::NotFound, "point 7: retention dropped it") };
    let (answer, ()) = tokio::join!(Operator::call(&addr, Role::TargetServer, &operator, "{}"), server);
    let error = answer.unwrap_err();
    assert_eq!(error.to_string(), "refused (not-found): point 7: retention dropped it");
    assert!(!error.is_retryable());
}

/// Much more than the window, so that credit must flow, and pieces larger than a frame.
#[tokio::test]
async fn a_view_arrives_whole_and_in_place() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let operator = site.operator();
    let piece = 3 << 20;
    let count = 20_u64;
    let server = async {
        let mut view = operation(&listener).await.stream("head").await.unwrap();
        for index in 0..count {
            let bytes = Bytes::from(vec![index as u8; piece]);
            view.data(ByteOffset(index * 10_000_000), bytes).await.unwrap();
        }
        view.finish("tail").await.unwrap();
    };
    let client = async {
        let mut view = Operator::stream(&addr, Role::TargetServer, &operator, "{}").await.unwrap();
        assert_eq!((view.head(), view.tail()), ("head", None));
        let mut taken = vec![0_usize; count as usize];
        while let Some((offset, bytes)) = view.next().await.unwrap() {
            let index = (offset.get() / 10_000_000) as usize;
            assert_eq!(offset.get() as usize % 10_000_000, taken[index]);
            assert!(bytes.iter().all(|byte| usize::from(*byte) == index));
            taken[index] += bytes.len();
        }
        assert!(taken.iter().all(|length| *length == piece));
        assert_eq!(view.tail(), Some("tail"));
        assert!(view.next().await.unwrap().is_none());
    };
    tokio::join!(server, client);
}

#[tokio::test]
async fn a_view_that_breaks_off_is_not_whole() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let operator = site.operator();
    for refuse in [true, false] {
        let server = async {
            let mut view = operation(&listener).await.stream("head").await.unwrap();
            view.data(ByteOffset(0), Bytes::from_static(b"abc")).await.unwrap();
            if refuse {
                view.refuse(RefusalCode::Corrupt, "layer 12 is damaged");
            }
        };
        // A refusal overtakes what is queued, so it may come before the view has begun.
        let client = async {
            let mut view = match Operator::stream(&addr, Role::TargetServer, &operator, "{}").await {
                Ok(view) => view,
                Err(error) => return error,
            };
            loop {
                match view.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("it is not whole"),
                    Err(error) => return error,
                }
            }
        };
        let ((), error) = tokio::join!(server, client);
        assert_eq!(error.refusal(), refuse.then_some(RefusalCode::Corrupt), "{error}");
    }
}

/// The reader goes away: the writer learns it and ends.
#[tokio::test]
async fn a_writer_whose_reader_left_ends() {
    let site = Site::new();
    let (listener, addr) = site.server().await;
    let operator = site.operator();
    let server = async {
        let mut view = operation(&listener).await.stream("head").await.unwrap();
        loop {
            if let Err(error) = view.data(ByteOffset(0), Bytes::from(vec![0; 1 << 20])).await {
                break error;
            }
        }
    };
    let client = async {
        let mut view = Operator::stream(&addr, Role::TargetServer, &operator, "{}").await.unwrap();
        view.next().await.unwrap();
    };
    let (error, ()) = tokio::join!(server, client);
    assert!(error.is_retryable(), "{error}");
}
