//! `seawall restore` of a volume to a new file, from a target server on this machine through TLS, verified and durable, against
//! `cp --sparse=always` of the replica's image with an fsync after it.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use block::GroupId;
use durable::RealStorage;
use replica::{GroupReplica, Options};
use seawall_benches::disk::{IMAGE_BYTES, fill};
use seawall_benches::{Pair, compare};

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The operator's command, as released.
fn build() -> anyhow::Result<PathBuf> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the checkout")?;
    run(Command::new(env!("CARGO")).current_dir(checkout).args([
        "build",
        "--release",
        "--quiet",
        "--bin",
        "seawall",
    ]))?;
    Ok(checkout.join("target/release/seawall"))
}

fn main() -> anyhow::Result<()> {
    let program = build()?;
    let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let dir = base.path();
    File::create(dir.join("disk"))?.set_len(1 << 20)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut init = Command::new(&program);
    init.current_dir(dir).args([
        "init",
        "site",
        "--device",
        "disk",
        "--target-server",
        &format!("127.0.0.1:{port}"),
    ]);
    run(&mut init)?;
    let config = std::fs::read_to_string(dir.join("site/target-server/target-server.toml"))?;
    let value = |key: &str| {
        let line = config.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_prefix('='));
        line.map(|value| value.trim().trim_matches('"').to_owned())
            .with_context(|| format!("{key} in {config}"))
    };
    let group: GroupId = value("id")?.parse()?;
    let data = dir.join("site/target-server").join(value("data")?);
    let image = {
        let (replica, _) = GroupReplica::open(Arc::new(RealStorage), &data, group, Options::default())?;
        fill(&replica)?;
        replica.volumes().remove(0).path
    };
    let mut server = Command::new(&program);
    server.current_dir(dir).args(["run", "--dir", "site", "--role", "target-server"]).stderr(Stdio::null());
    let _server = Server(server.spawn()?);
    let limit = Instant::now() + Duration::from_secs(30);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        ensure!(Instant::now() < limit, "the target server does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    // In the cache for both.
    std::io::copy(&mut File::open(&image)?, &mut std::io::sink())?;
    let (restored, copied) = (dir.join("restored.img"), dir.join("copied.img"));
    let mut turn = 0;
    compare("restore", IMAGE_BYTES, || {
        turn += 1;
        for file in [&restored, &copied] {
            // Not there in the first turn.
            let _ = std::fs::remove_file(file);
        }
        let restore = || {
            let start = Instant::now();
            let mut command = Command::new(&program);
            command
                .current_dir(dir)
                .args(["restore", "--dir", "site", "--volume", "disk", "--point", "latest"]);
            run(command.arg("--out").arg(&restored)).expect("the restore succeeds");
            start.elapsed()
        };
        let copy = || {
            let start = Instant::now();
            run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&copied)).expect("cp succeeds");
            File::open(&copied).and_then(|file| file.sync_all()).expect("the disk syncs");
            start.elapsed()
        };
        if turn % 2 == 0 {
            let subject = restore();
            Pair { subject, limit: copy() }
        } else {
            let limit = copy();
            Pair { subject: restore(), limit }
        }
    })
}
