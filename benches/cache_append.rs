//! Taking changesets of four sources into the process server's cache, each acknowledged when it is durable, against writing
//! the same bytes one after another to a preallocated file, with a sync after each changeset. Both go on to fresh space.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use anyhow::Context;
use block::{ByteCount, Epoch, Generation, GroupId};
use bytes::Bytes;
use cache::{Appender, Cache, Event, Options, Position};
use durable::RealStorage;
use seawall_benches::{Pair, compare};

const SOURCES: usize = 4;
const CHANGESET_BYTES: usize = 8 << 20;
const PIECE_BYTES: usize = 256 << 10;
/// The plain file; written round and round.
const PLAIN_BYTES: u64 = 2 << 30;

struct Source {
    group: GroupId,
    appender: Appender,
    held: Receiver<Epoch>,
    epoch: Epoch,
}

fn main() -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let targets = Arc::new(|_| vec!["target".to_owned()]);
    let storage = Arc::new(RealStorage);
    let (cache, _) =
        Cache::open(storage, &dir.path().join("cache"), Options::new(ByteCount::gib(4), targets))?;
    let mut sources = (0..SOURCES)
        .map(|index| {
            let (send, held) = channel();
            let group = GroupId([index as u8; 16]);
            let observer = Arc::new(move |event| {
                if let Event::Held(epoch) = event {
                    // Nobody listens any more at the end.
                    let _ = send.send(epoch);
                }
            });
            let appender = cache.appender(group, Generation(1), observer)?;
            Ok(Source { group, appender, held, epoch: Epoch::NONE })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let piece = Bytes::from((0..PIECE_BYTES).map(|index| ((index * 31) >> 3) as u8).collect::<Vec<u8>>());
    let total = (SOURCES * CHANGESET_BYTES) as u64;
    let plain = File::create(dir.path().join("plain"))?;
    rustix::fs::fallocate(&plain, rustix::fs::FallocateFlags::empty(), 0, PLAIN_BYTES)?;
    plain.sync_all()?;
    let mut end = 0;
    compare("cache_append", total, || {
        let start = Instant::now();
        for source in &mut sources {
            append(source, &piece).expect("the cache takes what fits");
        }
        for source in &mut sources {
            while source.held.recv().expect("the cache tells what it holds") < source.epoch {}
        }
        let subject = start.elapsed();
        for source in &sources {
            let position = Position { generation: Generation(1), epoch: source.epoch };
            cache.applied(source.group, "target", position).expect("the target is known");
        }
        let start = Instant::now();
        for _ in 0..SOURCES {
            for _ in 0..CHANGESET_BYTES / PIECE_BYTES {
                plain.write_all_at(&piece, end % PLAIN_BYTES).expect("the disk takes it");
                end += PIECE_BYTES as u64;
            }
            plain.sync_data().expect("the disk syncs");
        }
        Pair { subject, limit: start.elapsed() }
    })
}

fn append(source: &mut Source, piece: &Bytes) -> anyhow::Result<()> {
    source.epoch = source.epoch.next();
    source.appender.begin(source.epoch, ByteCount(CHANGESET_BYTES as u64)).context("begin")?;
    for _ in 0..CHANGESET_BYTES / PIECE_BYTES {
        source.appender.push(piece.clone()).context("push")?;
    }
    source.appender.end().context("end")
}
