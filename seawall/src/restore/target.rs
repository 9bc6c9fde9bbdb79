//! Where a restore writes: a file that gets its name at the end, a file that is changed in place, a block device.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use block::ByteCount;
use rustix::fs::{CWD, FallocateFlags, FlockOperation, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::restore::RestoreOptions;

/// How much of a device must be zeroes for it to be taken for an empty one.
const EMPTY_BYTES: usize = 1 << 20;
/// How many zeroes are written at once where the medium cannot make them.
const ZEROES: &[u8] = &[0; 256 * 1024];

pub(super) fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}

/// Something that may be written to.
pub(super) enum Target {
    New(Naming),
    /// What a restore that was cut short left.
    Partial(Naming),
    InPlace {
        path: PathBuf,
        file: File,
        delta: bool,
    },
}

/// Something that is being written to.
pub(super) struct Output {
    path: PathBuf,
    file: File,
    /// Whether it can be longer than it is.
    is_device: bool,
    /// Whether what was not written reads as zeroes.
    is_empty: bool,
    naming: Option<Partial>,
}

impl Target {
    pub(super) fn check(options: &RestoreOptions) -> anyhow::Result<Target> {
        let out = &options.out;
        match std::fs::metadata(out) {
            Ok(found) if found.file_type().is_block_device() => device(options),
            Ok(found) if options.delta => {
                ensure!(found.is_file(), "restore to {}: it is not a regular file", out.display());
                let file = OpenOptions::new().read(true).write(true).open(out);
                let file = file.with_context(|| format!("open {}", out.display()))?;
                lock(&file, out)?;
                Ok(Target::InPlace { path: out.clone(), file, delta: true })
            }
            Err(_) if options.delta => bail!(
                "restore to {}: --delta changes what is there, and there is nothing; leave it out",
                out.display()
            ),
            _ => {
                let naming = Naming::check(out, options.force, false)?;
                Ok(if naming.partial.exists() { Target::Partial(naming) } else { Target::New(naming) })
            }
        }
    }

    /// Whether there is something to compare with.
    pub(super) fn continues(&self) -> bool {
        matches!(self, Target::Partial(_) | Target::InPlace { delta: true, .. })
    }

    pub(super) fn open(self, size: ByteCount) -> anyhow::Result<Output> {
        let fit = |file: &File, path: &Path| {
            file.set_len(size.0).with_context(|| format!("size {} to {size}", path.display()))
        };
        match self {
            Target::New(naming) => {
                let partial = naming.lock_new()?;
                fit(&partial.file, partial.path())?;
                let (path, file) = (partial.path().to_owned(), partial.file.try_clone()?);
                Ok(Output { path, file, is_device: false, is_empty: true, naming: Some(partial) })
            }
            Target::Partial(naming) => {
                let partial = naming.lock_old()?;
                fit(&partial.file, partial.path())?;
                let (path, file) = (partial.path().to_owned(), partial.file.try_clone()?);
                Ok(Output { path, file, is_device: false, is_empty: false, naming: Some(partial) })
            }
            Target::InPlace { path, file, .. } => {
                let is_device = file.metadata()?.file_type().is_block_device();
                if is_device {
                    let room = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
                    ensure!(
                        room >= size.0,
                        "restore to {}: it has {} and the volume {size}; give a larger device",
                        path.display(),
                        ByteCount(room)
                    );
                } else {
                    fit(&file, &path)?;
                }
                Ok(Output { path, file, is_device, is_empty: false, naming: None })
            }
        }
    }
}

/// Opens a device that nobody uses.
fn device(options: &RestoreOptions) -> anyhow::Result<Target> {
    let path = options.out.clone();
    let mut open = OpenOptions::new();
    open.read(true).write(true);
    if !options.force {
        // Of a block device it asks for the device alone, with all its partitions.
        open.custom_flags(OFlags::EXCL.bits() as i32);
    }
    let file = open.open(&path).map_err(|error| match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::BUSY) => anyhow::anyhow!(
            "restore to {}: it is mounted or in use (lsblk shows by whom); end that first, or overwrite it all the same \
             with --force",
            path.display()
        ),
        _ => anyhow::Error::new(error).context(format!("open {}", path.display())),
    })?;
    if !options.force && !options.delta {
        let mut start = vec![0; EMPTY_BYTES];
        let count = file.read_at(&mut start, 0).with_context(|| format!("read {}", path.display()))?;
        ensure!(
            start[..count].iter().all(|byte| *byte == 0),
            "restore to {}: it is not empty; overwrite it with --force, or use what it holds with --delta",
            path.display()
        );
    }
    Ok(Target::InPlace { path, file, delta: options.delta })
}

impl Output {
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> anyhow::Result<()> {
        self.file
            .read_exact_at(buffer, offset)
            .with_context(|| format!("read {} bytes at {offset} of {}", buffer.len(), self.path.display()))
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .with_context(|| format!("write {} bytes at {offset} of {}", bytes.len(), self.path.display()))
    }

    /// Where data begins at or after a place; `None` when only holes follow.
    pub(super) fn next_data(&self, offset: u64) -> anyhow::Result<Option<u64>> {
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            // A medium that does not know its holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(errno) => Err(errno).with_context(|| format!("look for data in {}", self.path.display())),
        }
    }

    /// Makes a range zeroes.
    pub(super) fn zero(&self, start: u64, end: u64) -> anyhow::Result<()> {
        if self.is_empty || start >= end {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let ways: &[FallocateFlags] = if self.is_device { &[hole, zero] } else { &[hole] };
        for way in ways {
            match rustix::fs::fallocate(&self.file, *way, start, end - start) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
                Err(errno) => {
                    return Err(errno).with_context(|| format!("zero a range of {}", self.path.display()));
                }
            }
        }
        let mut at = start;
        while at < end {
            let count = (end - at).min(ZEROES.len() as u64);
            self.write(at, &ZEROES[..count as usize])?;
            at += count;
        }
        Ok(())
    }

    pub(super) fn make_durable(&mut self) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("make {} durable", self.path.display()))
    }

    /// Gives a new file its name.
    pub(super) fn name(self) -> anyhow::Result<()> {
        self.naming.map_or(Ok(()), Partial::name)
    }
}

/// A file that may be made.
#[derive(Debug)]
pub(super) struct Naming {
    out: PathBuf,
    partial: PathBuf,
    force: bool,
    /// A partial one is begun again, not gone on with.
    fresh: bool,
}

impl Naming {
    pub(super) fn check(out: &Path, force: bool, fresh: bool) -> anyhow::Result<Naming> {
        let Some(name) = out.file_name() else { bail!("restore to {}: name a file", out.display()) };
        let mut partial = name.to_owned();
        partial.push(".partial");
        if let Ok(found) = std::fs::metadata(out) {
            ensure!(found.is_file(), "restore to {}: it is not a regular file", out.display());
            ensure!(
                force,
                "restore to {}: it exists; choose another name, replace it with --force, or change it with --delta",
                out.display()
            );
        }
        Ok(Naming { out: out.to_owned(), partial: out.with_file_name(partial), force, fresh })
    }

    /// Makes the partial file, or empties what is left of one.
    pub(super) fn lock_new(self) -> anyhow::Result<Partial> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.partial)
            .with_context(|| format!("create {}", self.partial.display()))?;
        lock(&file, &self.partial)?;
        file.set_len(0).with_context(|| format!("empty {}", self.partial.display()))?;
        Ok(Partial { naming: self, file, named: false })
    }

    /// Opens the partial file that is there.
    fn lock_old(self) -> anyhow::Result<Partial> {
        let file = OpenOptions::new().read(true).write(true).open(&self.partial);
        let file = file.with_context(|| format!("open {}", self.partial.display()))?;
        ensure!(file.metadata()?.is_file(), "go on with {}: it is no file", self.partial.display());
        lock(&file, &self.partial)?;
        Ok(Partial { naming: self, file, named: false })
    }
}

/// Two restores to one file would each undo what the other does.
fn lock(file: &File, path: &Path) -> anyhow::Result<()> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => bail!("restore to {}: another restore to it is running", path.display()),
        Err(errno) => Err(errno).with_context(|| format!("lock {}", path.display())),
    }
}

/// The file before it has its name. Kept when it does not get that far, to be gone on with.
#[derive(Debug)]
pub(super) struct Partial {
    naming: Naming,
    file: File,
    named: bool,
}

impl Partial {
    pub(super) fn path(&self) -> &Path {
        &self.naming.partial
    }

    /// Makes it durable and gives it its name.
    pub(super) fn name(mut self) -> anyhow::Result<()> {
        let (partial, out) = (&self.naming.partial, &self.naming.out);
        self.file.sync_all().with_context(|| format!("make {} durable", partial.display()))?;
        let flags = if self.naming.force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        match renameat_with(CWD, partial, CWD, out, flags) {
            // Some filesystems cannot refuse to replace; there the check at the start must do.
            Err(Errno::INVAL) if !out.exists() => std::fs::rename(partial, out),
            other => other.map_err(std::io::Error::from),
        }
        .with_context(|| format!("name {}", out.display()))?;
        self.named = true;
        let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("make the name of {} durable", out.display()))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.named && self.naming.fresh {
            // Nobody else knows of it, and nothing goes on with it.
            let _ = std::fs::remove_file(&self.naming.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::cli::{Cli, Command};

    fn options(out: &Path, more: &[&str]) -> RestoreOptions {
        use clap::Parser;
        let out = out.to_str().unwrap();
        let words = ["seawall", "restore", "--volume", "v", "--point", "1", "--out", out];
        match Cli::try_parse_from(words.iter().chain(more)).unwrap().command {
            Command::Restore(options) => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_whole_file_gets_its_name_and_stays_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        let target = Target::check(&options(&out, &[])).unwrap();
        assert!(!target.continues());
        let mut output = target.open(ByteCount::mib(64)).unwrap();
        output.write(4096, b"abc").unwrap();
        output.zero(8192, 60 << 20).unwrap();
        output.write((64 << 20) - 1, b"z").unwrap();
        assert!(!out.exists() && dir.path().join("disk.img.partial").exists());
        output.make_durable().unwrap();
        output.name().unwrap();
        let found = std::fs::read(&out).unwrap();
        assert_eq!((&found[4096..4099], found[(64 << 20) - 1], found.len()), (&b"abc"[..], b'z', 64 << 20));
        assert!(std::fs::metadata(&out).unwrap().blocks() < 1000);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_cut_short_is_gone_on_with_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        let output = Target::check(&options(&out, &[])).unwrap().open(ByteCount(1 << 20)).unwrap();
        output.write(10, b"abc").unwrap();
        let busy = Target::check(&options(&out, &[])).unwrap().open(ByteCount(1 << 20));
        assert!(busy.err().unwrap().to_string().contains("another restore"));
        drop(output);
        let target = Target::check(&options(&out, &[])).unwrap();
        assert!(target.continues());
        let output = target.open(ByteCount(2 << 20)).unwrap();
        let mut found = [0; 5];
        output.read(9, &mut found).unwrap();
        assert_eq!(&found, b"\0abc\0");
        output.zero(10, 12).unwrap();
        output.name().unwrap();
        assert_eq!(std::fs::read(&out).unwrap()[9..14], *b"\0\0\0c\0");
    }

    #[test]
    fn existing_files_are_replaced_by_force_only() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        std::fs::write(&out, "old").unwrap();
        let check = |more: &[&str]| Target::check(&options(&out, more));
        assert!(check(&[]).err().unwrap().to_string().contains("--force"));
        let output = check(&["--force"]).unwrap().open(ByteCount(3)).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        output.name().unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), [0; 3]);
        let output = check(&["--delta"]).unwrap().open(ByteCount(5)).unwrap();
        output.write(4, b"x").unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"\0\0\0\0x");
        assert!(Target::check(&options(dir.path(), &["--force"])).is_err());
        let none = Target::check(&options(&dir.path().join("none"), &["--delta"]));
        assert!(none.err().unwrap().to_string().contains("there is nothing"));
    }

    /// The name was taken while the restore ran.
    #[test]
    fn a_file_that_came_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        let output = Target::check(&options(&out, &[])).unwrap().open(ByteCount(3)).unwrap();
        std::fs::write(&out, "new").unwrap();
        assert!(output.name().is_err());
        assert_eq!(std::fs::read(&out).unwrap(), b"new");
    }

    #[test]
    fn devices_that_are_in_use_full_or_small_are_refused() {
        if !scratch::is_root() {
            let why = "it needs root, for loop devices";
            eprintln!("NOT RUN: devices_that_are_in_use_full_or_small_are_refused: {why}");
            assert!(std::env::var_os("CI").is_none(), "it must run in CI, but: {why}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = scratch::LoopDisk::create(&dir.path().join("disk"), 16 << 20).unwrap();
        let check = |more: &[&str]| Target::check(&options(disk.device(), more));
        let large = check(&[]).unwrap().open(ByteCount::mib(17)).err().unwrap();
        assert!(large.to_string().contains("larger device"), "{large}");
        let output = check(&[]).unwrap().open(ByteCount::mib(16)).unwrap();
        output.write(5 << 20, &[7; 4096]).unwrap();
        output.zero(5 << 20, (5 << 20) + 4096).unwrap();
        let mut found = [1; 4096];
        output.read(5 << 20, &mut found).unwrap();
        assert_eq!(found, [0; 4096]);
        drop(output);
        scratch::FileSystem::Ext4.make(disk.device()).unwrap();
        assert!(check(&[]).err().unwrap().to_string().contains("not empty"));
        assert!(!check(&["--force"]).unwrap().continues());
        assert!(check(&["--delta"]).unwrap().continues());
        let mount = scratch::Mount::new(disk.device(), &dir.path().join("mnt"), "rw").unwrap();
        assert!(check(&["--delta"]).err().unwrap().to_string().contains("mounted or in use"));
        mount.unmount().unwrap();
    }
}
