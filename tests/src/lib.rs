//! What the whole-system tests share.

pub mod bootable;
pub mod browser;
pub mod chance;
pub mod console;
pub mod followed;
pub mod follower;
pub mod frozen;
pub mod guest;
pub mod proxy;
pub mod site;
pub mod system;

use std::io::Read as _;
use std::path::Path;

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
