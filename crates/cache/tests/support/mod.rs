//! What the tests of the cache share.
// Each test file uses its own part.
#![allow(dead_code, unreachable_pub)]

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::{ByteCount, Epoch, Generation, GroupId};
use bytes::Bytes;
use cache::{AppendError, Appender, Cache, CacheError, Event, Observer, Options, Position, Report};
use durable::Storage;

/// Long enough that it only passes when something hangs.
const HANG: Duration = Duration::from_secs(60);

pub fn dir() -> &'static Path {
    Path::new("/cache")
}

pub fn group(number: u8) -> GroupId {
    GroupId([number; 16])
}

pub fn at(generation: u64, epoch: u64) -> Position {
    Position { generation: Generation(generation), epoch: Epoch(epoch) }
}

/// The content of a changeset: follows from its identity, so that a mix-up shows.
pub fn content(group: GroupId, position: Position, size: usize) -> Bytes {
    let mut state =
        u64::from(group.0[0]) << 48 ^ position.generation.0 << 32 ^ position.epoch.0 ^ (size as u64) << 20;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 8).to_le_bytes());
    }
    bytes.truncate(size);
    bytes.into()
}

pub fn options(bytes_max: u64, segment_bytes: u64, targets: &[&str]) -> Options {
    let targets: Vec<String> = targets.iter().map(|name| (*name).to_owned()).collect();
    let mut options = Options::new(ByteCount(bytes_max), Arc::new(move |_| targets.clone()));
    options.segment_bytes = ByteCount(segment_bytes);
    options
}

pub fn open(
    storage: &(impl Storage + Clone + 'static),
    options: Options,
) -> Result<(Cache, Report), CacheError> {
    Cache::open(Arc::new(storage.clone()), dir(), options)
}

/// An appender and what it was told.
pub struct Source {
    pub appender: Appender,
    pub events: Receiver<Event>,
    pub group: GroupId,
    pub generation: u64,
}

pub fn observer() -> (Observer, Receiver<Event>) {
    let (send, receive) = channel();
    let send = Mutex::new(send);
    (Arc::new(move |event| drop(send.lock().unwrap().send(event))), receive)
}

impl Source {
    pub fn open(cache: &Cache, group: GroupId, generation: u64) -> Result<Source, AppendError> {
        let (observer, events) = observer();
        let appender = cache.appender(group, Generation(generation), observer)?;
        Ok(Source { appender, events, group, generation })
    }

    /// Gives a changeset over without waiting until it is held.
    pub fn give(&mut self, epoch: u64, size: usize) -> Result<(), AppendError> {
        let bytes = content(self.group, at(self.generation, epoch), size);
        self.appender.begin(Epoch(epoch), ByteCount(size as u64))?;
        // Uneven pieces, some of them tiny.
        let mut rest = bytes;
        let mut piece = 1;
        while !rest.is_empty() {
            self.appender.push(rest.split_to(rest.len().min(piece)))?;
            piece = piece * 7 % 300_007 + 1;
        }
        self.appender.end()
    }

    /// Waits until the epoch is held; `false` when the appender was closed before.
    pub fn wait_held(&self, epoch: u64) -> bool {
        loop {
            match self.events.recv_timeout(HANG).expect("the cache hangs") {
                Event::Held(held) if held >= Epoch(epoch) => return true,
                Event::Closed(_) => return false,
                _ => {}
            }
        }
    }

    pub fn put(&mut self, epoch: u64, size: usize) {
        self.give(epoch, size).unwrap();
        assert!(self.wait_held(epoch), "closed");
    }

    pub fn wait_room(&self) {
        while !matches!(self.events.recv_timeout(HANG).expect("no room in a long time"), Event::Room) {}
    }
}

/// Everything held after a position, with its size; asserts that the bytes are those that were given.
pub fn held_after(cache: &Cache, group: GroupId, mut after: Position) -> Vec<(Position, usize)> {
    let mut all = Vec::new();
    while let Some(mut changeset) = cache.next_after(group, after).unwrap() {
        let mut bytes = Vec::new();
        while let Some(chunk) = changeset.next_chunk().unwrap() {
            bytes.extend_from_slice(&chunk);
        }
        assert_eq!(bytes.len() as u64, changeset.total().get());
        after = changeset.position();
        assert!(content(group, after, bytes.len()) == bytes, "{after} is not what was given");
        all.push((after, bytes.len()));
    }
    all
}
