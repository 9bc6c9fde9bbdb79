//! Freezing the filesystems on the group's disks, and thawing them whatever happens.
//!
//! Rooms: `mounts` finds them; `ioctl` asks the kernel; `watchdog` is the process that thaws when the agent does not;
//! `marker` is for the agent that comes after both were killed.
//!
//! Order, and what breaks when it is changed:
//! 1. The directories are open, and the watchdog holds them too, before anything is frozen: a path on a frozen filesystem may not
//!    be looked up any more.
//! 2. Filesystems are written out before they are frozen, so that the freeze has little left to write.
//! 3. What was mounted last is frozen first: it may lie, in a loop device, on what was mounted before, and writes through
//!    that while it is frozen and thawed. Thawing goes the other way round.
//! 4. While anything is frozen this thread and the one that cuts write no file and no log: either may lie on a frozen filesystem.
//! 5. The kernel's answer to each thaw says whether that filesystem was frozen until then. Only if all were, the cut in between
//!    was taken of frozen filesystems.

mod ioctl;
mod marker;
mod mounts;
mod watchdog;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;

use marker::Marker;
pub(crate) use marker::thaw_left;
pub(crate) use mounts::{DeviceNumber, Filesystem, find, lines, names};
use watchdog::Watchdog;

/// Filesystems that are frozen together. With more, no freeze is tried, and the reason says so.
pub const FILESYSTEMS_FROZEN_MAX: usize = 256;
/// The agent thaws by itself so long before the watchdog would: a tenth of the budget, but no longer than this.
const THAW_EARLY_MAX: Duration = Duration::from_millis(100);

/// When the first argument makes this process the watchdog of a freeze, is that until it ends. To be asked first in the
/// `main` of every program that runs an agent: the agent starts its own program again for it.
pub fn watchdog_instead() -> Option<ExitCode> {
    (std::env::args_os().nth(1)? == watchdog::COMMAND).then(watchdog::main)
}

/// Filesystems about to be frozen, or frozen. Dropping it thaws them.
#[derive(Debug)]
pub(crate) struct Freeze<'a> {
    filesystems: &'a [Filesystem],
    watchdog: Option<Watchdog>,
    budget: Duration,
    began: Instant,
    /// Indices of those that are frozen, in the order in which they were.
    frozen: Vec<usize>,
    /// Removed when all is thawed.
    marker: Option<Marker>,
}

/// How a freeze ended.
#[derive(Debug)]
pub(crate) struct Thaw {
    /// From before the first freeze to after the last thaw.
    pub(crate) lasted: Duration,
    /// Whether every filesystem was frozen until it was thawed here; else which was not, and why.
    pub(crate) held: Result<(), String>,
}

impl<'a> Freeze<'a> {
    /// Gets everything ready, with nothing frozen: written out, and a watchdog that waits.
    /// `marker` is a file for the next agent, should this one and the watchdog be killed together.
    pub(crate) fn prepare(
        filesystems: &'a [Filesystem],
        budget: Duration,
        marker: &Path,
    ) -> anyhow::Result<Freeze<'a>> {
        Freeze::prepare_with(&watchdog::own_program(), filesystems, budget, marker)
    }

    /// With another program as the watchdog.
    fn prepare_with(
        program: &Path,
        filesystems: &'a [Filesystem],
        budget: Duration,
        marker: &Path,
    ) -> anyhow::Result<Freeze<'a>> {
        if filesystems.len() > FILESYSTEMS_FROZEN_MAX {
            anyhow::bail!(
                "{} filesystems lie on the group's disks, at most {FILESYSTEMS_FROZEN_MAX} are frozen together",
                filesystems.len()
            );
        }
        let dirs: Vec<_> = filesystems.iter().map(|filesystem| &filesystem.dir).collect();
        let watchdog = Watchdog::start(program, &dirs)?;
        for filesystem in filesystems {
            write_out(filesystem)?;
        }
        let marker = Some(Marker::write(marker, filesystems)?);
        let began = Instant::now();
        Ok(Freeze { filesystems, watchdog: Some(watchdog), budget, began, frozen: Vec::new(), marker })
    }

    /// Freezes all of them. On an error, which says of which and why, what was frozen is thawed again.
    pub(crate) fn freeze(&mut self) -> Result<(), String> {
        let result = self.freeze_all();
        if result.is_err() {
            self.thaw();
        }
        result
    }

    fn freeze_all(&mut self) -> Result<(), String> {
        let watchdog = self.watchdog.as_ref().ok_or("the freeze is over")?;
        let told = |result: anyhow::Result<()>| result.map_err(|error| format!("{error:#}"));
        self.frozen.reserve(self.filesystems.len());
        self.began = Instant::now();
        told(watchdog.arm(self.budget))?;
        for (index, filesystem) in self.filesystems.iter().enumerate().rev() {
            told(watchdog.freezing(index))?;
            match ioctl::freeze(&filesystem.dir) {
                Ok(()) => {
                    self.frozen.push(index);
                    told(watchdog.frozen(index))?;
                }
                Err(error) => {
                    told(watchdog.refused(index))?;
                    return Err(refusal(filesystem, error));
                }
            }
        }
        Ok(())
    }

    /// When the cut must have been taken.
    pub(crate) fn deadline(&self) -> Instant {
        self.began + self.budget - (self.budget / 10).min(THAW_EARLY_MAX)
    }

    /// Thaws everything. May be called again; then nothing is left to do.
    pub(crate) fn thaw(&mut self) -> Thaw {
        let mut held = Ok(());
        while let Some(index) = self.frozen.pop() {
            let filesystem = &self.filesystems[index];
            let mount_point = filesystem.mount_point.display();
            match ioctl::thaw(&filesystem.dir) {
                Ok(ioctl::Thawed::Now) => {}
                Ok(ioctl::Thawed::NotFrozen) => {
                    held = Err(format!("{mount_point} was thawed before the cut was known to be over"));
                }
                Err(error) => {
                    // The watchdog tries as well, when its channel closes without a farewell.
                    held = Err(format!("thaw {mount_point}: {error}"));
                    self.watchdog.take();
                }
            }
        }
        let lasted = self.began.elapsed();
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.done();
        }
        match (self.marker.take(), &held) {
            // The watchdog may have thawed, or nobody.
            (Some(marker), Err(_)) => marker.keep(),
            (marker, _) => drop(marker),
        }
        Thaw { lasted, held }
    }
}

impl Drop for Freeze<'_> {
    fn drop(&mut self) {
        self.thaw();
    }
}

/// Writes out what the filesystem holds in memory.
pub(crate) fn write_out(filesystem: &Filesystem) -> anyhow::Result<()> {
    rustix::fs::syncfs(&filesystem.dir)
        .with_context(|| format!("write out {}", filesystem.mount_point.display()))
}

fn refusal(filesystem: &Filesystem, error: Errno) -> String {
    let Filesystem { mount_point, kind, .. } = filesystem;
    let mount_point = mount_point.display();
    match error {
        Errno::BUSY => format!("{mount_point} is frozen already, by somebody else"),
        Errno::OPNOTSUPP | Errno::NOTTY => format!(
            "{mount_point} ({kind}) cannot be frozen; if nothing that matters is written there, name it in leave_out"
        ),
        Errno::PERM | Errno::ACCESS => format!("freeze {mount_point}: it needs CAP_SYS_ADMIN"),
        error => format!("freeze {mount_point}: {error}"),
    }
}

/// The whole disks of the group, by number. Files are none.
pub(crate) fn disks<'p>(paths: impl Iterator<Item = &'p PathBuf>) -> std::collections::HashSet<DeviceNumber> {
    paths.filter_map(|path| DeviceNumber::of(path)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use scratch::{FileSystem, LoopDisk, Mount};

    use super::*;

    fn filesystem(point: &Path) -> Filesystem {
        let dir = std::fs::File::open(point).unwrap();
        let device = dir.metadata().unwrap().dev();
        let number = DeviceNumber(rustix::fs::major(device), rustix::fs::minor(device));
        Filesystem { mount_point: point.to_owned(), kind: "some".into(), number, dir }
    }

    /// Says loudly when a test cannot run, which it must in CI.
    fn can_freeze(test: &str, program: &Path) -> bool {
        let why = match (scratch::is_root(), program.exists()) {
            (false, _) => "it needs root",
            (_, false) => "run `cargo build --workspace --bins` first",
            (true, true) => return true,
        };
        eprintln!("NOT RUN: {test}: {why}");
        assert!(std::env::var_os("CI").is_none(), "{test} must run in CI, but: {why}");
        false
    }

    fn program() -> PathBuf {
        std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("seawall-agent")
    }

    #[test]
    fn kernel_a_freeze_that_the_watchdog_ended_did_not_hold() {
        if !can_freeze("kernel_a_freeze_that_the_watchdog_ended_did_not_hold", &program()) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = LoopDisk::create(&dir.path().join("disk"), 64 << 20).unwrap();
        FileSystem::Ext4.make(disk.device()).unwrap();
        let mount = Mount::new(disk.device(), &dir.path().join("mnt"), "defaults").unwrap();
        let filesystems = [filesystem(mount.point())];
        let file = mount.point().join("file");
        let marker = dir.path().join("frozen");

        let mut freeze =
            Freeze::prepare_with(&program(), &filesystems, Duration::from_secs(60), &marker).unwrap();
        freeze.freeze().unwrap();
        let thaw = freeze.thaw();
        assert_eq!(thaw.held, Ok(()));
        drop(freeze);
        std::fs::write(&file, "thawed").unwrap();

        let mut freeze =
            Freeze::prepare_with(&program(), &filesystems, Duration::from_millis(200), &marker).unwrap();
        freeze.freeze().unwrap();
        // Ends only when the watchdog has thawed.
        std::fs::write(&file, "thawed").unwrap();
        let thaw = freeze.thaw();
        assert!(thaw.held.unwrap_err().contains("was thawed before"));
        assert!(thaw.lasted >= Duration::from_millis(200));
        drop(freeze);

        // Dropped without a word, as by a panic.
        let mut freeze =
            Freeze::prepare_with(&program(), &filesystems, Duration::from_secs(60), &marker).unwrap();
        freeze.freeze().unwrap();
        drop(freeze);
        std::fs::write(&file, "thawed").unwrap();

        // One that cannot be frozen: the others are thawed again.
        let other = Mount::memory(&dir.path().join("memory"), 1 << 20).unwrap();
        let both = [filesystem(mount.point()), filesystem(other.point())];
        let mut freeze = Freeze::prepare_with(&program(), &both, Duration::from_secs(60), &marker).unwrap();
        let refused = freeze.freeze().unwrap_err();
        assert!(refused.contains("memory (some) cannot be frozen"), "{refused}");
        drop(freeze);
        std::fs::write(&file, "thawed").unwrap();
        drop((filesystems, both));
    }

    #[test]
    fn a_program_that_is_no_watchdog_is_found_out_before_anything_is_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let filesystems = [filesystem(dir.path())];
        let marker = dir.path().join("frozen");
        for program in ["/bin/true", "/bin/cat", "/nonexistent"] {
            let refused =
                Freeze::prepare_with(Path::new(program), &filesystems, Duration::from_secs(1), &marker);
            let error = format!("{:#}", refused.unwrap_err());
            assert!(error.contains("watchdog"), "{program}: {error}");
        }
    }
}
