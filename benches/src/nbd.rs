//! NBD servers against each other: `qemu-nbd`, and fio as everybody's client.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::disk::IMAGE_BYTES;

/// Whether `qemu-nbd` and fio are there; if not, says that `bench` was not measured.
pub fn is_possible(bench: &str) -> bool {
    for program in ["qemu-nbd", "fio"] {
        if Command::new(program).arg("--version").output().is_err() {
            println!("{bench}: NOT MEASURED: {program} is not installed (`cargo xtask test` installs it)");
            return false;
        }
    }
    true
}

/// A running `qemu-nbd`, ended when dropped.
pub struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    /// Serves a raw image on a Unix socket, which must have a short path.
    ///
    /// # Errors
    /// When it ends before it listens.
    pub fn serve(image: &Path, socket: &Path, read_only: bool) -> anyhow::Result<Qemu> {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--format=raw", "--shared=16", "--socket"]).arg(socket);
        if read_only {
            command.arg("--read-only");
        }
        let mut qemu = Qemu(command.arg(image).stdin(Stdio::null()).spawn().context("run qemu-nbd")?);
        while !socket.exists() {
            ensure!(qemu.0.try_wait()?.is_none(), "qemu-nbd ended");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(qemu)
    }
}

/// Reads or writes `bytes` of an export of [`IMAGE_BYTES`] with fio, as `arguments` say; how long that took.
///
/// # Errors
/// When fio fails, or did less.
pub fn fio(socket: &Path, arguments: &[&str], bytes: u64) -> anyhow::Result<Duration> {
    let mut command = Command::new("fio");
    command.args(["--name=way", "--ioengine=nbd", "--output-format=json", "--thread"]).args(arguments);
    command.arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
    command.arg(format!("--io_size={bytes}")).arg(format!("--size={IMAGE_BYTES}"));
    let output = command.output().context("run fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    // Its engine talks before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let report: serde_json::Value =
        serde_json::from_str(&text[text.find('{').context("a report of fio")?..])?;
    let (read, written) = (&report["jobs"][0]["read"], &report["jobs"][0]["write"]);
    let way = if written["io_bytes"] == 0 { read } else { written };
    ensure!(way["io_bytes"].as_u64() == Some(bytes), "fio did {} of {bytes} bytes", way["io_bytes"]);
    let ms = way["runtime"].as_f64().context("the time fio took")?;
    Ok(Duration::from_secs_f64(ms / 1000.0))
}
