//! Applying an epoch with its undo layer, durably, against plain pwrite of the same extents and one fdatasync: `apply` where there
//! was something before, which the layer then keeps; `apply_fresh` where there was nothing, in new places each turn.
//!
//! `apply_written`: what applying writes besides the layer, to what is applied, both in bytes; the limit is 1.5 for each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::{ByteCount, ByteOffset, Consistency, Epoch};
use changeset::{Changeset, Fold, Level, Opener, Payload, SealOptions, Stamp, seal};
use durable::RealStorage;
use replica::{GroupReplica, Options, Retention};
use seawall_benches::{Pair, compare, data, result};

/// Larger than all turns together; the images are sparse.
const VOLUME_BYTES: ByteCount = ByteCount::gib(1024);

/// What applying may write, besides its layer, for each byte applied.
const WRITTEN_MOST: f64 = 1.5;

struct Bench {
    writes: Vec<data::Write>,
    epoch: Epoch,
    replica: GroupReplica,
    plain: File,
    applied: u64,
    written: u64,
}

impl Bench {
    fn new(dir: &Path) -> anyhow::Result<Bench> {
        let options =
            Options { retention: Retention { points_max: 3, ..Retention::default() }, ..Options::default() };
        let (replica, _) = GroupReplica::open(Arc::new(RealStorage), dir, data::GROUP, options)?;
        let plain = File::create(dir.join("plain"))?;
        plain.set_len(VOLUME_BYTES.0)?;
        let writes = data::mix();
        let mut bench = Bench { writes, epoch: Epoch::NONE, replica, plain, applied: 0, written: 0 };
        // From the second epoch on there is a point to go back to, so every epoch gets its layer.
        let first = bench.next(0)?;
        bench.replica.apply(&first)?;
        Ok(bench)
    }

    /// The next epoch: the mix, so far from the start.
    fn next(&mut self, from: u64) -> anyhow::Result<Changeset> {
        self.epoch = self.epoch.next();
        let stamp = Stamp { consistency: Consistency::Crash, ..data::stamp(self.epoch) };
        let mut fold = Fold::new();
        for write in &self.writes {
            fold.write(0, ByteOffset(from + write.offset.0), &write.data);
        }
        let mut volumes = data::volumes();
        volumes[0].size = VOLUME_BYTES;
        let key = data::key();
        let sealed = seal(&stamp, &volumes, &fold, &key, SealOptions { level: Level::Store, threads: 2 })?;
        let mut opener = Opener::new(key, data::GROUP, 2);
        sealed.pieces.into_iter().try_for_each(|piece| opener.push(piece))?;
        Ok(opener.finish()?)
    }

    fn subject(&mut self, changeset: &Changeset) -> anyhow::Result<Duration> {
        let before = written_by_us()?;
        let start = Instant::now();
        let applied = self.replica.apply(changeset)?;
        let took = start.elapsed();
        self.applied += applied.written.0;
        self.written += written_by_us()? - before - applied.layer.context("a layer")?.0;
        Ok(took)
    }

    fn limit(&self, changeset: &Changeset) -> anyhow::Result<Duration> {
        let zeroes = vec![0; 1 << 20];
        let start = Instant::now();
        for change in changeset.changes() {
            let (offset, length) = (change.extent.offset().0, change.extent.length().0);
            match change.payload {
                Payload::Data(bytes) => self.plain.write_all_at(bytes, offset)?,
                Payload::Zero => {
                    for at in (0..length).step_by(zeroes.len()) {
                        let part = &zeroes[..(length - at).min(zeroes.len() as u64) as usize];
                        self.plain.write_all_at(part, offset + at)?;
                    }
                }
            }
        }
        self.plain.sync_data()?;
        Ok(start.elapsed())
    }

    fn turn(&mut self, turn: u64, from: u64) -> anyhow::Result<Pair> {
        let changeset = self.next(from)?;
        if turn.is_multiple_of(2) {
            let subject = self.subject(&changeset)?;
            Ok(Pair { subject, limit: self.limit(&changeset)? })
        } else {
            let limit = self.limit(&changeset)?;
            Ok(Pair { subject: self.subject(&changeset)?, limit })
        }
    }
}

/// What this process has handed to write calls so far (proc_pid_io(5)).
fn written_by_us() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/io")?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("wchar: ")).context("wchar in /proc/self/io")?;
    Ok(line.trim().parse()?)
}

fn main() -> anyhow::Result<()> {
    for (name, fresh) in [("apply", false), ("apply_fresh", true)] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let mut bench = Bench::new(dir.path())?;
        let mut turn = 0;
        compare(name, data::MIX_BYTES as u64, || {
            turn += 1;
            let from = if fresh { turn * data::VOLUME_BYTES.0 } else { 0 };
            bench.turn(turn, from).expect("the disk takes it")
        })?;
        if bench.applied > 0 {
            let each = bench.written as f64 / bench.applied as f64;
            println!("{name}: {each:.3} bytes written for each byte applied, besides the layer");
            if fresh {
                // Less is better, so that the ratio is the limit to what it is.
                result("apply_written", WRITTEN_MOST, "limit", each)?;
            }
        }
    }
    Ok(())
}
