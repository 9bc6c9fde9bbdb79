//! Writing to a promoted group's volume: random writes of 4 KiB, sixteen under way, a flush after each sixteen, against `qemu-nbd`
//! serving a raw file of the same content; the same client (fio) on a Unix socket. It is cut every second, as a target server does.
//!
//! And how long a failover takes from the replica's side, from the call to an export that listens: of a volume of 1 GiB and one of
//! 64 GiB (sparse), after which the same 64 MiB had changed. The ratio is of the small one's time to the large one's.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use block::{ByteCount, ByteOffset, Consistency, Epoch, Generation};
use changeset::{Fold, Level, Opener, SealOptions, Stamp, seal};
use durable::RealStorage;
use export::{Export, Exported, Place, Security};
use replica::{GroupReplica, Options, Pace};
use seawall_benches::disk::fill;
use seawall_benches::nbd::{self, Qemu};
use seawall_benches::{Pair, compare, data, result};

/// Written in one turn.
const WRITTEN_BYTES: u64 = 16 << 20;
/// What had changed since the point, by epochs.
const CHANGED_BYTES: u64 = 64 << 20;
const NEXT: Generation = Generation(1 << 20);

fn main() -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    // Socket paths must be short.
    let sockets = tempfile::tempdir()?;
    let mut times = Vec::new();
    for gib in [1, 64] {
        let took = fail_over(
            &dir.path().join(format!("{gib}")),
            &sockets.path().join("f.sock"),
            ByteCount::gib(gib),
        )?;
        println!("promoted_failover: {gib} GiB: {:.0} ms to the running export", took.as_secs_f64() * 1000.0);
        times.push(took.as_secs_f64());
    }
    result("promoted_failover", 1.0 / times[1], "failovers/s of 64 GiB", 1.0 / times[0])?;

    if !nbd::is_possible("promoted") {
        return Ok(());
    }
    let (replica, _) =
        GroupReplica::open(Arc::new(RealStorage), &dir.path().join("own"), data::GROUP, Options::default())?;
    let replica = Arc::new(replica);
    let newest = fill(&replica)?;
    let volume = replica.volumes().remove(0);
    let raw = dir.path().join("raw.img");
    std::fs::copy(&volume.path, &raw)?;
    replica.fail_over(newest, NEXT, &Pace::unbounded())?;
    replica.commit_failover()?;
    replica.promote()?;
    let ours = sockets.path().join("ours.sock");
    let _ours = start(&replica, &ours)?;
    let cutter = {
        let replica = replica.clone();
        std::thread::spawn(move || {
            while replica.wait_to_cut(Duration::from_secs(1)) {
                replica.cut_promoted().expect("it is cut");
            }
        })
    };
    let theirs = sockets.path().join("qemu.sock");
    let _server = Qemu::serve(&raw, &theirs, false)?;
    let mut turn = 0;
    compare("promoted_write4k", WRITTEN_BYTES, || {
        turn += 1;
        let write = |socket: &Path| write(socket, turn).expect("fio writes");
        if turn % 2 == 0 {
            let subject = write(&ours);
            Pair { subject, limit: write(&theirs) }
        } else {
            let limit = write(&theirs);
            Pair { subject: write(&ours), limit }
        }
    })?;
    drop(_ours);
    replica.demote()?;
    cutter.join().expect("cutting goes on to its end");
    Ok(())
}

fn start(replica: &Arc<GroupReplica>, socket: &Path) -> anyhow::Result<Export> {
    let volume = replica.volumes().remove(0);
    let disk = Arc::new(replica.promoted_volume(volume.info.id)?);
    let exported = Exported { name: String::new(), description: String::new(), disk };
    Ok(Export::start(vec![exported], Place::Socket(socket.to_owned()), Security::Open)?)
}

/// From the call to the export that listens.
fn fail_over(dir: &Path, socket: &Path, size: ByteCount) -> anyhow::Result<Duration> {
    let (replica, _) = GroupReplica::open(Arc::new(RealStorage), dir, data::GROUP, Options::default())?;
    let replica = Arc::new(replica);
    let key = data::key();
    for epoch in [1, 2] {
        let mut fold = Fold::new();
        let block: Vec<u8> = (0..4096).map(|at| (at % 251) as u8 ^ epoch as u8).collect();
        let blocks = CHANGED_BYTES / 4096;
        for number in 0..blocks {
            // All over the volume.
            let at = number * (size.0 / blocks) / 4096 * 4096;
            fold.write(0, ByteOffset(at), &block);
        }
        let stamp = Stamp { consistency: Consistency::Crash, ..data::stamp(Epoch(epoch)) };
        let mut volumes = data::volumes();
        volumes[0].size = size;
        let sealed = seal(&stamp, &volumes, &fold, &key, SealOptions { level: Level::Store, threads: 2 })?;
        let mut opener = Opener::new(key.clone(), data::GROUP, 2);
        sealed.pieces.into_iter().try_for_each(|piece| opener.push(piece))?;
        replica.apply(&opener.finish()?)?;
    }
    let begun = Instant::now();
    let done = replica.fail_over(Epoch(1), NEXT, &Pace::unbounded())?;
    replica.promote()?;
    let export = start(&replica, socket)?;
    let took = begun.elapsed();
    ensure!(done.changed.0 == CHANGED_BYTES, "{} were put back", done.changed);
    drop(export);
    Ok(took)
}

/// Writes with fio; how long its writing took. `seed`: other places each time.
fn write(socket: &Path, seed: u64) -> anyhow::Result<Duration> {
    let places = format!("--randseed={seed}");
    let kind =
        ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=16", "--norandommap", "--refill_buffers"];
    nbd::fio(socket, &[&kind[..], &[&places]].concat(), WRITTEN_BYTES)
}
