//! Peers that are no clients, and the ends of exports.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use export::{CONNECTIONS_MAX, Export, Exported, ListenError, Place, Security};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

use crate::support::{At, Lab, installed, run, text};

/// Says something and reads until the other side ends; what it said.
fn say(socket: &std::path::Path, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut heard = Vec::new();
    // It may have been closed already.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read_to_end(&mut heard);
    heard
}

#[test]
fn garbage_is_closed_and_the_next_client_served() {
    if !installed("garbage_is_closed_and_the_next_client_served", &["nbdinfo"]) {
        return;
    }
    let lab = Lab::new();
    let served = lab.serve(lab.view(At::Newest));
    let mut runner = proptest::test_runner::TestRunner::default();
    for _ in 0..50 {
        let bytes = prop::collection::vec(any::<u8>(), 0..4000).new_tree(&mut runner).unwrap().current();
        let heard = say(&served.socket, &bytes);
        assert!(heard.starts_with(b"NBDMAGICIHAVEOPT"));
    }
    say(&served.socket, b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(run("nbdinfo", &["--size", &served.uri]).trim(), crate::support::SIZE.to_string());
}

#[test]
fn connections_are_limited_and_end_with_the_export() {
    let lab = Lab::new();
    let served = lab.serve(lab.view(At::Newest));
    assert_eq!(std::fs::metadata(&served.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut streams: Vec<_> =
        (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&served.socket).unwrap()).collect();
    for stream in &mut streams {
        stream.read_exact(&mut [0; 18]).unwrap();
    }
    let mut surplus = UnixStream::connect(&served.socket).unwrap();
    assert_eq!(surplus.read(&mut [0; 18]).unwrap(), 0);
    assert_eq!(served.export.counted().connections, CONNECTIONS_MAX);
    // One leaves, one comes.
    drop(streams.pop());
    while served.export.counted().connections == CONNECTIONS_MAX {
        std::thread::yield_now();
    }
    let socket = served.socket.clone();
    drop(served);
    for stream in &mut streams {
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    assert!(!socket.exists());
    assert_eq!(std::fs::read_dir(lab.dir.path()).unwrap().count(), 1, "nothing but the replica is left");
}

#[test]
fn what_is_in_the_way_is_not_overwritten() {
    let lab = Lab::new();
    let listen = |path: &std::path::Path| {
        let exported =
            Exported { name: String::new(), description: String::new(), disk: lab.view(At::Older) };
        Export::start(vec![exported], Place::Socket(path.to_owned()), Security::Open)
    };
    let file = lab.path("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(listen(&file), Err(ListenError::Taken { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let used = lab.path("used.sock");
    let first = listen(&used).unwrap();
    assert!(matches!(listen(&used), Err(ListenError::Taken { .. })));
    // A socket that a crash left is not in the way.
    let dead = lab.path("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let second = listen(&dead).unwrap();
    // The name was given to somebody else meanwhile: it is theirs.
    std::fs::remove_file(&used).unwrap();
    std::fs::write(&used, "theirs").unwrap();
    drop(first);
    assert_eq!(std::fs::read(&used).unwrap(), b"theirs");
    drop(second);
    assert!(!dead.exists());
    let long = lab.path(&"x".repeat(200));
    assert!(listen(&long).unwrap_err().to_string().contains(text(&long)));
}
