//! What the whole-system tests share.

pub mod attached;
pub mod bootable;
pub mod browser;
pub mod chance;
pub mod console;
pub mod database;
pub mod followed;
pub mod follower;
pub mod frozen;
pub mod guest;
pub mod network;
pub mod proxy;
pub mod site;
pub mod system;

use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::ensure;

/// Nothing is waited for longer; what is waited for comes much sooner.
const PATIENCE: Duration = Duration::from_secs(90);

/// Says why a test cannot run here, loudly, and whether it may be left out: CI may leave nothing out.
///
/// # Panics
/// In CI (`CI` is set), where everything must run.
pub fn cannot_run(test: &str, why: &str) {
    eprintln!("NOT RUN: {test}: {why}");
    assert!(std::env::var_os("CI").is_none(), "{test} must run in CI, but: {why}");
}

/// Whether this is root; if not, says that the test cannot run.
pub fn root(test: &str) -> bool {
    if !scratch::is_root() {
        cannot_run(test, "it needs root, for loop devices, mounts and eBPF");
    }
    scratch::is_root()
}

/// A path as an argument.
///
/// # Panics
/// When it is not UTF-8, which tests' paths are.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// What a device is called in `/dev`, and its volume by `seawall init`.
///
/// # Panics
/// When the path ends in no name.
pub fn name(device: &Path) -> String {
    device.file_name().expect("a device has a name").to_string_lossy().into_owned()
}

/// So many bytes that no compression makes smaller.
///
/// # Errors
/// When `/dev/urandom` gives none.
pub fn random(bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut data = vec![0; bytes as usize];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut data)?;
    Ok(data)
}

/// Waits until something holds.
///
/// # Errors
/// When it does not for long, or cannot be looked at.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let limit = Instant::now() + PATIENCE;
    while !holds()? {
        ensure!(Instant::now() < limit, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// All that a disk holds, as it lies there now.
///
/// # Errors
/// When it cannot be read.
pub fn content(device: &Path) -> anyhow::Result<Vec<u8>> {
    scratch::run("blockdev", &["--flushbufs", text(device)])?;
    Ok(std::fs::read(device)?)
}

/// What a resync counts in.
pub const GRANULE: usize = 65536;

/// Granules in which two disks differ, in bytes.
pub fn differing(a: &[u8], b: &[u8]) -> u64 {
    let granules = a.chunks(GRANULE).zip(b.chunks(GRANULE));
    granules.filter(|(a, b)| a != b).count() as u64 * GRANULE as u64
}
