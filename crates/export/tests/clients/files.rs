//! File systems on exports, through nbdfuse and the kernel's loop device.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use block::ByteCount;
use scratch::{FileSystem, LoopDisk, Mount};

use crate::support::{At, Lab, cannot_run, installed, run, text};

/// An export as a file, until dropped.
struct Fused {
    child: Child,
    point: std::path::PathBuf,
}

impl Fused {
    fn new(uri: &str, point: &Path) -> Fused {
        std::fs::create_dir(point).unwrap();
        let mut command = Command::new("nbdfuse");
        command.arg(point).arg(uri).stdin(Stdio::null());
        let mut fused = Fused { child: command.spawn().unwrap(), point: point.to_owned() };
        let limit = Instant::now() + Duration::from_secs(30);
        while !point.join("nbd").exists() {
            assert!(
                fused.child.try_wait().unwrap().is_none() && Instant::now() < limit,
                "nbdfuse does not start"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        fused
    }
}

impl Drop for Fused {
    fn drop(&mut self) {
        let _ = Command::new("fusermount3").arg("-u").arg(&self.point).status();
        let _ = self.child.wait();
    }
}

/// A file system is made on one export, filled, and found whole through another client.
#[test]
fn kernel_file_systems_live_on_an_overlay() {
    const TEST: &str = "kernel_file_systems_live_on_an_overlay";
    if !installed(TEST, &["nbdfuse", "fusermount3", "e2fsck", "qemu-img"]) {
        return;
    }
    if !scratch::is_root() || !Path::new("/dev/fuse").exists() {
        return cannot_run(TEST, "it needs root and /dev/fuse");
    }
    let lab = Lab::new();
    let served = lab.serve(lab.overlay(At::Newest, ByteCount::mib(512)));
    {
        let fused = Fused::new(&served.uri, &lab.path("fuse"));
        let disk = LoopDisk::attach(&fused.point.join("nbd"), 512).unwrap();
        FileSystem::Ext4.make(disk.device()).unwrap();
        let mount = Mount::new(disk.device(), &lab.path("mnt"), "rw").unwrap();
        for number in 0..200 {
            let bytes = crate::support::noise(number * 100, number as u64);
            std::fs::write(mount.point().join(format!("{number}")), bytes).unwrap();
        }
        std::fs::remove_file(mount.point().join("7")).unwrap();
        run("fstrim", &[text(mount.point())]);
        mount.unmount().unwrap();
        FileSystem::Ext4.check(disk.device()).unwrap();
    }
    let copy = lab.path("copy.img");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &served.uri, text(&copy)]);
    run("e2fsck", &["-f", "-n", text(&copy)]);
    let disk = LoopDisk::attach(&copy, 512).unwrap();
    let mount = Mount::new(disk.device(), &lab.path("mnt"), "ro").unwrap();
    for number in (0..200).filter(|number| *number != 7) {
        let found = std::fs::read(mount.point().join(format!("{number}"))).unwrap();
        assert!(found == crate::support::noise(number * 100, number as u64), "file {number}");
    }
    assert!(!mount.point().join("7").exists());
    mount.unmount().unwrap();
}
