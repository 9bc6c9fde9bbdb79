//! Reading an exported recovery point, against `qemu-nbd` serving the replica's raw image: the same client (fio) on a Unix
//! socket, the same bytes in the system's cache. Sequential reads of 1 MiB, four under way; random ones of 4 KiB, sixteen.
//! The point is the newest one, and for `export_seq_older` the one before, after which 1 % of the blocks have changed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use block::Epoch;
use durable::RealStorage;
use export::{Disk, Export, Exported, Place, Security};
use replica::{GroupReplica, Options};
use seawall_benches::disk::{IMAGE_BYTES, fill};
use seawall_benches::{Pair, compare, data};

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() -> anyhow::Result<()> {
    for program in ["qemu-nbd", "fio"] {
        if Command::new(program).arg("--version").output().is_err() {
            println!("export: NOT MEASURED: {program} is not installed (`cargo xtask test` installs it)");
            return Ok(());
        }
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    // Socket paths must be short.
    let sockets = tempfile::tempdir()?;
    let (replica, _) =
        GroupReplica::open(Arc::new(RealStorage), dir.path(), data::GROUP, Options::default())?;
    let newest = fill(&replica)?;
    let volume = replica.volumes().remove(0);
    let image = volume.path.clone();
    // Everything is in the cache from here on.
    std::io::copy(&mut std::fs::File::open(&image)?, &mut std::io::sink())?;

    let theirs = sockets.path().join("qemu.sock");
    let _server = serve_with_qemu(&image, &theirs)?;
    let start = |epoch: Epoch, name: &str| -> anyhow::Result<(Export, std::path::PathBuf)> {
        let disk: Arc<dyn Disk> = Arc::new(replica.view(volume.info.id, epoch)?);
        let socket = sockets.path().join(name);
        let exported = Exported { name: String::new(), description: String::new(), disk };
        Ok((Export::start(vec![exported], Place::Socket(socket.clone()), Security::Open)?, socket))
    };
    let (_newest, ours) = start(newest, "newest.sock")?;
    let (_older, older) = start(Epoch(newest.0 - 1), "older.sock")?;
    let seq = ["--rw=read", "--bs=1m", "--iodepth=4"];
    let rand = ["--rw=randread", "--bs=4k", "--iodepth=16", "--norandommap", "--randrepeat=1"];
    for (name, socket, kind, bytes) in [
        ("export_seq", &ours, &seq[..], IMAGE_BYTES),
        ("export_seq_older", &older, &seq[..], IMAGE_BYTES),
        ("export_rand4k", &ours, &rand[..], IMAGE_BYTES / 4),
    ] {
        let mut turn = 0;
        compare(name, bytes, || {
            turn += 1;
            let read = |socket: &Path| client(socket, kind, bytes).expect("fio reads");
            if turn % 2 == 0 {
                let subject = read(socket);
                Pair { subject, limit: read(&theirs) }
            } else {
                let limit = read(&theirs);
                Pair { subject: read(socket), limit }
            }
        })?;
    }
    Ok(())
}

fn serve_with_qemu(image: &Path, socket: &Path) -> anyhow::Result<Server> {
    let mut command = Command::new("qemu-nbd");
    command.args(["--read-only", "--persistent", "--format=raw", "--shared=16", "--socket"]).arg(socket);
    let mut server = Server(command.arg(image).stdin(Stdio::null()).spawn().context("run qemu-nbd")?);
    while !socket.exists() {
        ensure!(server.0.try_wait()?.is_none(), "qemu-nbd ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(server)
}

/// Reads `bytes` with fio; how long its reading took.
fn client(socket: &Path, kind: &[&str], bytes: u64) -> anyhow::Result<Duration> {
    let mut command = Command::new("fio");
    command.args(["--name=read", "--ioengine=nbd", "--output-format=json", "--thread"]).args(kind);
    command.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
    command.arg(format!("--io_size={bytes}")).arg(format!("--size={IMAGE_BYTES}"));
    let output = command.output().context("run fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    // Its engine talks before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let report: serde_json::Value =
        serde_json::from_str(&text[text.find('{').context("a report of fio")?..])?;
    let read = &report["jobs"][0]["read"];
    ensure!(read["io_bytes"].as_u64() == Some(bytes), "fio read {}", read["io_bytes"]);
    let ms = read["runtime"].as_f64().context("the time fio took")?;
    Ok(Duration::from_secs_f64(ms / 1000.0))
}
