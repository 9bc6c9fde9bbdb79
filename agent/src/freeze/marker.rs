//! What is about to be frozen, in a file: agent and watchdog may be killed in the same instant, and the next agent thaws.
//!
//! Written before anything is frozen, removed when all is thawed. It lies beside the control socket, which is checked to be on
//! no filesystem that is frozen; a reboot takes it along with the freeze.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::ioctl::{self, Thawed};
use super::mounts::Filesystem;

/// Mount points in a marker end so; no path has one.
const END: u8 = 0;

/// The marker of a freeze. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Marker {
    path: PathBuf,
}

impl Marker {
    pub(super) fn write(path: &Path, filesystems: &[Filesystem]) -> anyhow::Result<Marker> {
        let mut text = Vec::new();
        for filesystem in filesystems {
            text.extend_from_slice(filesystem.mount_point.as_os_str().as_bytes());
            text.push(END);
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        }
        fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(Marker { path: path.to_owned() })
    }

    /// The next agent looks at it.
    pub(super) fn keep(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "remove the marker of a freeze");
        }
    }
}

/// Thaws what an agent that is gone, with its watchdog, has left frozen. Says what it did.
pub(crate) fn thaw_left(path: &Path) -> Vec<String> {
    let Ok(text) = fs::read(path) else { return Vec::new() };
    let mut said = Vec::new();
    for mount_point in text.split(|byte| *byte == END).filter(|path| !path.is_empty()) {
        let mount_point = Path::new(OsStr::from_bytes(mount_point));
        match open(mount_point).and_then(|dir| Ok(ioctl::thaw(&dir)?)) {
            Ok(Thawed::Now) => said.push(format!(
                "{} was left frozen by an agent that was killed with its watchdog; it is thawed",
                mount_point.display()
            )),
            Ok(Thawed::NotFrozen) => {}
            Err(error) => said.push(format!(
                "{} may have been left frozen: {error}. Thaw it: fsfreeze --unfreeze {0}",
                mount_point.display()
            )),
        }
    }
    // With an error kept, so that it is tried again.
    if said.iter().all(|text| text.ends_with("it is thawed"))
        && let Err(error) = fs::remove_file(path)
    {
        said.push(format!("remove {}: {error}", path.display()));
    }
    said
}

/// Without touching the time of the last access, which would be a write.
fn open(mount_point: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOATIME).open(mount_point)
}
