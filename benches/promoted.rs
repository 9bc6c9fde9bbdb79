//! Writing to a promoted group's volume: random writes of 4 KiB, sixteen under way, a flush after each sixteen, against `qemu-nbd`
//! serving a raw file of the same content; the same client (fio) on a Unix socket. It is cut every second, as a target server does.
//!
//! And how long a failover takes from the replica's side, from the call to an export that listens: of a volume of 1 GiB and one of
//! 64 GiB (sparse), after which the same 64 MiB had changed. The ratio is of the small one's time to the large one's.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use block::{ByteCount, ByteOffset, Consistency, Epoch, Generation};
use changeset::{Fold, Level, Opener, SealOptions, Stamp, seal};
use durable::RealStorage;
use export::{Export, Exported, Place, Security};
use replica::{GroupReplica, Options, Pace};
use seawall_benches::disk::{IMAGE_BYTES, fill};
use seawall_benches::{Pair, compare, data, result};

/// Written in one turn.
const WRITTEN_BYTES: u64 = 16 << 20;
/// What had changed since the point, by epochs.
const CHANGED_BYTES: u64 = 64 << 20;
const NEXT: Generation = Generation(1 << 20);

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

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

    for program in ["qemu-nbd", "fio"] {
        if Command::new(program).arg("--version").output().is_err() {
            println!("promoted: NOT MEASURED: {program} is not installed (`cargo xtask test` installs it)");
            return Ok(());
        }
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
    let _server = serve_with_qemu(&raw, &theirs)?;
    let mut turn = 0;
    compare("promoted_write4k", WRITTEN_BYTES, || {
        turn += 1;
        let write = |socket: &Path| client(socket, turn).expect("fio writes");
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

fn serve_with_qemu(image: &Path, socket: &Path) -> anyhow::Result<Server> {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--format=raw", "--shared=16", "--socket"]).arg(socket);
    let mut server = Server(command.arg(image).stdin(Stdio::null()).spawn().context("run qemu-nbd")?);
    while !socket.exists() {
        ensure!(server.0.try_wait()?.is_none(), "qemu-nbd ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(server)
}

/// Writes with fio; how long its writing took. `seed`: other places each time.
fn client(socket: &Path, seed: u64) -> anyhow::Result<Duration> {
    let mut command = Command::new("fio");
    command.args([
        "--name=write",
        "--ioengine=nbd",
        "--output-format=json",
        "--thread",
        "--rw=randwrite",
        "--bs=4k",
    ]);
    command.args(["--iodepth=16", "--fsync=16", "--norandommap", "--refill_buffers"]);
    command.arg(format!("--randseed={seed}"));
    command.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
    command.arg(format!("--io_size={WRITTEN_BYTES}")).arg(format!("--size={IMAGE_BYTES}"));
    let output = command.output().context("run fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    // Its engine talks before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let report: serde_json::Value =
        serde_json::from_str(&text[text.find('{').context("a report of fio")?..])?;
    let written = &report["jobs"][0]["write"];
    ensure!(written["io_bytes"].as_u64() == Some(WRITTEN_BYTES), "fio wrote {}", written["io_bytes"]);
    let ms = written["runtime"].as_f64().context("the time fio took")?;
    Ok(Duration::from_secs_f64(ms / 1000.0))
}
