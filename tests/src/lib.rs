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
