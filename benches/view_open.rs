//! Opening a view of the oldest point and reading its first MiB, with many epochs after it, against the same with few: a view's cost
//! should not grow with history. Then reading a view from end to end against reading the raw image, where few blocks have changed;
//! merging layers against copying their bytes; and what the store takes against what changed.
//!
//! `view_open_50gib`: opening a point since which every second block of 100 GiB has changed, 50 GiB in all, against the same with few
//! changes. What the blocks held is zeroes, so that the store has the indexes of such a history without its data, which opening
//! does not read.
//!
//! History is made by apply, epoch by epoch. `SEAWALL_BENCH_EPOCHS` sets how long the long one is (default 20000; with
//! `SEAWALL_BENCH_QUICK` 2000).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::{BLOCK_BYTES, ByteCount, ByteOffset, Consistency, Epoch, Extent, UnixNanos, VolumeId};
use changeset::{Changeset, Fold, Level, Opener, SealOptions, Stamp, seal};
use durable::RealStorage;
use replica::{GroupReplica, Maintained, Options, POINTS_MAX, Pace, Retention};
use seawall_benches::{Pair, compare, data, quick, result};

const FEW: u64 = 20;
const MIB: usize = 1 << 20;
/// Blocks that each epoch writes.
const BLOCKS: u64 = 8;
const VOLUME: VolumeId = VolumeId([2; 16]);

fn epochs() -> u64 {
    let wanted = std::env::var("SEAWALL_BENCH_EPOCHS").ok().and_then(|text| text.parse().ok());
    wanted.unwrap_or(if quick() { 2000 } else { 20_000 })
}

fn open(dir: &Path) -> anyhow::Result<GroupReplica> {
    let retention = Retention { points_max: POINTS_MAX, ..Retention::default() };
    let options = Options { retention, ..Options::default() };
    Ok(GroupReplica::open(Arc::new(RealStorage), dir, data::GROUP, options)?.0)
}

fn epoch(number: u64, fold: &Fold) -> anyhow::Result<Changeset> {
    epoch_of(number, fold, data::VOLUME_BYTES)
}

fn epoch_of(number: u64, fold: &Fold, size: ByteCount) -> anyhow::Result<Changeset> {
    let cut_time = UnixNanos(number * 1_000_000_000);
    let stamp = Stamp { consistency: Consistency::Crash, cut_time, ..data::stamp(Epoch(number)) };
    let key = data::key();
    let mut volumes = data::volumes();
    volumes[0].size = size;
    let sealed = seal(&stamp, &volumes, fold, &key, SealOptions { level: Level::Store, threads: 1 })?;
    let mut opener = Opener::new(key, data::GROUP, 1);
    sealed.pieces.into_iter().try_for_each(|piece| opener.push(piece))?;
    Ok(opener.finish()?)
}

/// A replica with the mix, and then so many epochs of a few blocks each, everywhere.
fn history(dir: &Path, epochs: u64) -> anyhow::Result<GroupReplica> {
    let replica = open(dir)?;
    replica.apply(&epoch(1, &data::fold(&data::mix()))?)?;
    let total = data::VOLUME_BYTES.0 / 4096;
    let mut place = 0x9e37_79b9_u64;
    for number in 2..=epochs {
        let mut fold = Fold::new();
        for _ in 0..BLOCKS {
            place = place.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            fold.write(0, ByteOffset((place >> 33) % total * 4096), &[number as u8 | 1; 4096]);
        }
        replica.apply(&epoch(number, &fold)?)?;
    }
    Ok(replica)
}

/// A replica of which every second block has changed since the first point, a GiB with each epoch.
fn much_changed(dir: &Path, gib: u64) -> anyhow::Result<GroupReplica> {
    let replica = open(dir)?;
    let size = ByteCount::gib(2 * gib);
    replica.apply(&epoch_of(1, &Fold::new(), size)?)?;
    for number in 0..gib {
        let mut fold = Fold::new();
        let start = number * ByteCount::gib(2).0;
        for at in (start..start + ByteCount::gib(2).0).step_by(2 * BLOCK_BYTES as usize) {
            let block = Extent::new(ByteOffset(at), ByteCount(BLOCK_BYTES));
            fold.zero(0, block.context("a block within the volume")?);
        }
        replica.apply(&epoch_of(number + 2, &fold, size)?)?;
    }
    Ok(replica)
}

fn settle(replica: &GroupReplica) -> anyhow::Result<()> {
    while replica.maintain(&Pace::unbounded())? != Maintained::Nothing {}
    Ok(())
}

fn open_and_read(replica: &GroupReplica) -> Duration {
    let start = Instant::now();
    let view = replica.view(VOLUME, Epoch(1)).expect("the oldest point opens");
    let mut buffer = vec![0; MIB];
    view.read_at(&mut buffer, ByteOffset(0)).expect("it can be read");
    start.elapsed()
}

fn read_view(replica: &GroupReplica, point: Epoch) -> Duration {
    let view = replica.view(VOLUME, point).expect("the point opens");
    let mut buffer = vec![0; MIB];
    let start = Instant::now();
    for at in (0..view.size().0).step_by(MIB) {
        view.read_at(&mut buffer, ByteOffset(at)).expect("it can be read");
    }
    start.elapsed()
}

/// Where the replicas lie: SEAWALL_BENCH_DIR, such as a file system in memory for a long history, or the target directory.
fn dir() -> anyhow::Result<tempfile::TempDir> {
    let dir = std::env::var_os("SEAWALL_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
    Ok(tempfile::tempdir_in(dir)?)
}

fn open_much_changed(few: &GroupReplica) -> anyhow::Result<()> {
    let gib = if quick() { 2 } else { 50 };
    let dir = dir()?;
    let start = Instant::now();
    let replica = much_changed(dir.path(), gib)?;
    settle(&replica)?;
    let entries = replica.layer_bytes().0;
    println!("view_open_50gib: {gib} GiB changed, {entries} bytes of indexes, in {:?}", start.elapsed());
    drop(replica);
    let replica = open(dir.path())?;
    println!("view_open_50gib: first view after opening the replica in {:?}", open_and_read(&replica));
    compare("view_open_50gib", MIB as u64, || Pair {
        subject: open_and_read(&replica),
        limit: open_and_read(few),
    })
}

fn main() -> anyhow::Result<()> {
    let (short, long) = (dir()?, dir()?);
    let few = history(short.path(), FEW)?;
    settle(&few)?;
    let epochs = epochs();
    let start = Instant::now();
    let many = history(long.path(), epochs)?;
    println!("view_open: {epochs} epochs applied in {:?}", start.elapsed());
    let start = Instant::now();
    settle(&many)?;
    println!("view_open: spans and checksums of these made in {:?}", start.elapsed());
    let changed: u64 = many.points().iter().skip(1).map(|point| point.written.0).sum();
    result("store_size", many.layer_bytes().0 as f64 / 1e6, "MB", changed as f64 / 1e6)?;
    drop(many);
    let start = Instant::now();
    let many = open(long.path())?;
    println!("view_open: a replica with {epochs} layers opened in {:?}", start.elapsed());
    println!("view_open: first view after that in {:?}", open_and_read(&many));

    compare("view_open", MIB as u64, || Pair { subject: open_and_read(&many), limit: open_and_read(&few) })?;

    open_much_changed(&few)?;

    let image = few.volumes()[0].path.clone();
    let raw = File::open(&image)?;
    let size = raw.metadata()?.len();
    compare("view_read", size, || {
        let subject = read_view(&few, Epoch(1));
        let mut buffer = vec![0; MIB];
        let start = Instant::now();
        for at in (0..size).step_by(MIB) {
            raw.read_exact_at(&mut buffer, at).expect("the image can be read");
        }
        Pair { subject, limit: start.elapsed() }
    })?;

    // What is merged is read, and what is left of it written and synced.
    let bytes = many.layer_bytes().0;
    let (mut merged, mut took) = (0, Duration::ZERO);
    let policy =
        Retention { points_max: POINTS_MAX, policy: Some("hourly for 1y".parse()?), ..Retention::default() };
    drop(many);
    // Cuts are a second apart: of each hour one stays, of the last all.
    let options = Options { retention: policy, ..Options::default() };
    let (many, _) = GroupReplica::open(Arc::new(RealStorage), long.path(), data::GROUP, options)?;
    let start = Instant::now();
    loop {
        match many.maintain(&Pace::unbounded())? {
            Maintained::Nothing => break,
            Maintained::Thinned { before, .. } => {
                merged += before.0;
                took = start.elapsed();
            }
            _ => {}
        }
    }
    let copy = {
        let from = vec![7; MIB];
        let file = File::create(long.path().join("copy"))?;
        let start = Instant::now();
        for at in (0..merged).step_by(MIB) {
            file.write_all_at(&from, at)?;
        }
        file.sync_data()?;
        start.elapsed()
    };
    println!("thin: {} layers' {bytes} bytes merged, {merged} with rounds, in {took:?}", epochs);
    if merged > 0 {
        result(
            "thin",
            merged as f64 / 1e6 / took.as_secs_f64(),
            "MB/s",
            merged as f64 / 1e6 / copy.as_secs_f64(),
        )?;
    }
    Ok(())
}
