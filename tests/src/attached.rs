//! An export as a disk of this machine: nbdfuse shows it as a file, and that is a loop disk.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;
use scratch::{FileSystem, LoopDisk, Mount};

use crate::wait_until;

/// An export with the file system on it, mounted. All of it goes when dropped.
pub struct Attached {
    mount: Option<Mount>,
    disk: Option<LoopDisk>,
    fuse: Child,
    dir: PathBuf,
}

impl Attached {
    /// Attaches an export at `dir`, which must not exist, and mounts it beside.
    ///
    /// # Errors
    /// When a program is missing or says so.
    pub fn new(uri: &str, dir: &Path) -> anyhow::Result<Attached> {
        std::fs::create_dir(dir)?;
        let fuse = Command::new("nbdfuse").arg(dir).arg(uri).stdin(Stdio::null()).spawn();
        let fuse = fuse.context("run nbdfuse; `cargo xtask test` installs it")?;
        let mut attached = Attached { mount: None, disk: None, fuse, dir: dir.to_owned() };
        let file = dir.join("nbd");
        wait_until("nbdfuse shows the export", || Ok(file.exists()))?;
        let disk = attached.disk.insert(LoopDisk::attach(&file, 512)?);
        attached.mount = Some(Mount::new(disk.device(), &dir.with_extension("mnt"), "rw")?);
        Ok(attached)
    }

    /// A file on it.
    ///
    /// # Panics
    /// When it is not mounted any more.
    pub fn file(&self, name: &str) -> PathBuf {
        self.mount.as_ref().expect("it is mounted").point().join(name)
    }

    /// Its device.
    ///
    /// # Panics
    /// Never: it has one until it is dropped.
    pub fn device(&self) -> &Path {
        self.disk.as_ref().expect("it is attached").device()
    }

    /// Unmounts it and checks the file system; the disk stays.
    ///
    /// # Errors
    /// When it is in use, or anything is wrong with it.
    pub fn unmount(&mut self) -> anyhow::Result<()> {
        self.mount.take().context("it is mounted")?.unmount()?;
        FileSystem::Ext4.check(self.device())
    }

    /// Unmounts it, checks the file system, and lets go of it.
    ///
    /// # Errors
    /// As [`Attached::unmount`].
    pub fn end(mut self) -> anyhow::Result<()> {
        self.unmount()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        drop(self.mount.take());
        drop(self.disk.take());
        let _ = Command::new("fusermount3").args(["-u", "-z"]).arg(&self.dir).stderr(Stdio::null()).status();
        if self.fuse.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = self.fuse.kill();
        }
        let _ = self.fuse.wait();
    }
}
