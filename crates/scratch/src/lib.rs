//! Loop disks, file systems and mounts that go away again, and writers with an oracle: for the demo and for tests.
//!
//! Clean-up happens on drop, in any order that values are dropped in, and does not panic: what could not be taken away is
//! said on standard error.

pub mod lanes;
pub mod postgres;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

/// How often a busy mount is tried again, and how long is waited between.
const CLEAN_UP_TRIES: (u32, Duration) = (50, Duration::from_millis(100));

/// Runs a program and gives its standard output.
///
/// # Errors
/// When it cannot be started or fails; the error holds what it said.
pub fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("run {program}: is it installed?"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("use path {}: it is not UTF-8", path.display()))
}

/// Whether this process may make loop devices and mounts.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A file that is a disk.
///
/// The device is told to clear itself when its last user closes it, and this is one: so it goes with this value, with the
/// last mount of it, or with a process that is killed, whichever is last.
#[derive(Debug)]
pub struct LoopDisk {
    device: PathBuf,
    _user: fs::File,
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        // The next file at this number must not be read-only because this one was.
        let _ = std::process::Command::new("blockdev").arg("--setrw").arg(&self.device).status();
    }
}

impl LoopDisk {
    /// Makes a disk of an existing file. `sector_bytes` is the logical block size: 512 or 4096. Partitions appear as
    /// /dev/loopNpM.
    ///
    /// # Errors
    /// When there is no loop device to be had.
    pub fn attach(file: &Path, sector_bytes: u32) -> anyhow::Result<LoopDisk> {
        let sector_bytes = sector_bytes.to_string();
        LoopDisk::with(file, &["--partscan", "--sector-size", &sector_bytes])
    }

    /// Makes a disk of `bytes` from `offset` of a file or another disk.
    ///
    /// # Errors
    /// When there is no loop device to be had.
    pub fn attach_part(file: &Path, offset: u64, bytes: u64) -> anyhow::Result<LoopDisk> {
        LoopDisk::with(file, &["--offset", &offset.to_string(), "--sizelimit", &bytes.to_string()])
    }

    fn with(file: &Path, options: &[&str]) -> anyhow::Result<LoopDisk> {
        let device = run("losetup", &[&["--find", "--show"], options, &[text(file)?]].concat())?;
        let user = fs::File::open(&device);
        // In use, it is not detached but told to go when it is not used any more.
        run("losetup", &["--detach", &device])?;
        let user = user.with_context(|| format!("open {device}"))?;
        // A test that was killed may have left this number read-only.
        run("blockdev", &["--setrw", &device])?;
        Ok(LoopDisk { device: PathBuf::from(device), _user: user })
    }

    /// Makes a sparse file of `bytes` and a disk of it.
    ///
    /// # Errors
    /// When the file cannot be made, or there is no loop device to be had.
    pub fn create(file: &Path, bytes: u64) -> anyhow::Result<LoopDisk> {
        let image = fs::File::create(file).with_context(|| format!("create {}", file.display()))?;
        image.set_len(bytes).with_context(|| format!("extend {} to {bytes} bytes", file.display()))?;
        LoopDisk::attach(file, 512)
    }

    /// /dev/loopN.
    pub fn device(&self) -> &Path {
        &self.device
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mount {
    point: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts `device` on `point`, which is made if need be. `options` as for mount -o.
    ///
    /// # Errors
    /// When mount refuses.
    pub fn new(device: &Path, point: &Path, options: &str) -> anyhow::Result<Mount> {
        fs::create_dir_all(point).with_context(|| format!("create mount point {}", point.display()))?;
        run("mount", &["-o", options, text(device)?, text(point)?])?;
        Ok(Mount { point: point.to_owned(), mounted: true })
    }

    /// Mounts memory of at most `bytes` on `point`, which is made if need be.
    ///
    /// # Errors
    /// When mount refuses.
    pub fn memory(point: &Path, bytes: u64) -> anyhow::Result<Mount> {
        fs::create_dir_all(point).with_context(|| format!("create mount point {}", point.display()))?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs", text(point)?])?;
        Ok(Mount { point: point.to_owned(), mounted: true })
    }

    /// Where it is mounted.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// When it stays busy.
    pub fn unmount(mut self) -> anyhow::Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> anyhow::Result<()> {
        if !self.mounted {
            return Ok(());
        }
        let (tries, pause) = CLEAN_UP_TRIES;
        let mut left = tries;
        loop {
            match text(&self.point).and_then(|point| run("umount", &[point])) {
                Ok(_) => break,
                Err(error) if left == 0 => return Err(error),
                Err(_) => std::thread::sleep(pause),
            }
            left -= 1;
        }
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("left behind: {}: {error:#}", self.point.display());
        }
    }
}

/// The file systems that the tests and the demo know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
}

impl FileSystem {
    /// Its name for mount and mkfs.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
            FileSystem::Btrfs => "btrfs",
        }
    }

    /// Makes one on a device.
    ///
    /// # Errors
    /// When mkfs is missing or fails.
    pub fn make(self, device: &Path) -> anyhow::Result<()> {
        let device = text(device)?;
        match self {
            FileSystem::Ext4 => run("mkfs.ext4", &["-q", "-F", device]),
            FileSystem::Xfs => run("mkfs.xfs", &["-q", "-f", device]),
            FileSystem::Btrfs => run("mkfs.btrfs", &["-q", "-f", device]),
        }
        .map(drop)
    }

    /// Checks one after its journal was replayed (by a mount before). Reads only.
    ///
    /// # Errors
    /// When anything is wrong with it; the error holds the checker's words.
    pub fn check(self, device: &Path) -> anyhow::Result<()> {
        let device = text(device)?;
        match self {
            FileSystem::Ext4 => run("e2fsck", &["-f", "-n", device]),
            FileSystem::Xfs => run("xfs_repair", &["-n", device]),
            FileSystem::Btrfs => run("btrfs", &["check", "--readonly", device]),
        }
        .map(drop)
    }
}
