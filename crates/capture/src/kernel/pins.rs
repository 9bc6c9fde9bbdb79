//! Where the maps, programs and links outlive the agent: `<folder>/<group>/<number>/` in the BPF file system.
//!
//! A number is one installation. A new one is made beside the old one when what is wanted has changed (another version of
//! the programs, another disk, a disk that grew); it counts from the moment its `kept.layout` is set, and only then is the
//! old one removed. A crash in between leaves either the old one, or both with the new one whole.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::mount::{MountFlags, mount};

use super::maps::Maps;
use crate::CaptureError;

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// A group's folder, locked: one agent a group.
pub(super) struct Pins {
    folder: PathBuf,
    _lock: File,
}

/// One installation.
pub(super) struct Installation {
    pub(super) folder: PathBuf,
    /// `None` when it is not whole, or of another version's layout.
    pub(super) maps: Option<Maps>,
}

impl Pins {
    /// Opens a group's folder below `base`, mounting the BPF file system there if nothing is.
    pub(super) fn open(base: &Path, group: &str) -> Result<Pins, CaptureError> {
        let folder = base.join(group);
        mount_bpf_fs(base)?;
        fs::create_dir_all(&folder).map_err(CaptureError::io("create", &folder))?;
        let lock = File::open(&folder).map_err(CaptureError::io("open", &folder))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            CaptureError::NotCapturable {
                path: folder.clone(),
                reason: format!("another agent holds this group's capture ({error}). Stop it first"),
            }
        })?;
        Ok(Pins { folder, _lock: lock })
    }

    /// What is installed, the newest first.
    pub(super) fn installations(&self) -> Result<Vec<Installation>, CaptureError> {
        let mut folders: Vec<(u64, PathBuf)> = fs::read_dir(&self.folder)
            .map_err(CaptureError::io("list", &self.folder))?
            .flatten()
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
            .collect();
        folders.sort();
        let open = |(_, folder): (u64, PathBuf)| Installation { maps: Maps::pinned(&folder), folder };
        Ok(folders.into_iter().rev().map(open).collect())
    }

    /// An empty folder for a new installation.
    pub(super) fn create(&self, after: Option<&Path>) -> Result<PathBuf, CaptureError> {
        let number = after
            .and_then(|folder| folder.file_name()?.to_str()?.parse::<u64>().ok())
            .map_or(1, |number| number + 1);
        let folder = self.folder.join(number.to_string());
        fs::create_dir(&folder).map_err(CaptureError::io("create", &folder))?;
        Ok(folder)
    }
}

/// Unpins an installation: the kernel detaches its programs and frees its maps when nobody holds them any more.
///
/// Links go first, and the issue programs' first of all: a write that is seen completing but not issuing is a missed one.
pub(super) fn remove(folder: &Path) -> Result<(), CaptureError> {
    let mut names: Vec<PathBuf> = fs::read_dir(folder)
        .map_err(CaptureError::io("list", folder))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    let rank = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (!name.starts_with("link_on_issue"), !name.starts_with("link_"), name)
    };
    names.sort_by_key(|path| rank(path));
    for name in names {
        fs::remove_file(&name).map_err(CaptureError::io("unpin", &name))?;
    }
    fs::remove_dir(folder).map_err(CaptureError::io("remove", folder))
}

/// Ends the tracking of one group, or of all below `base`: programs are detached, maps freed. Returns how many
/// installations there were.
///
/// # Errors
/// When an agent holds the group, or the folder cannot be read or changed.
pub fn detach(base: &Path, group: Option<&str>) -> Result<usize, CaptureError> {
    if !base.exists() {
        return Ok(0);
    }
    let groups: Vec<String> = match group {
        Some(group) => vec![group.to_owned()],
        None => fs::read_dir(base)
            .map_err(CaptureError::io("list", base))?
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect(),
    };
    let mut removed = 0;
    for group in groups {
        let folder = base.join(&group);
        if !folder.exists() {
            continue;
        }
        let pins = Pins::open(base, &group)?;
        for installation in pins.installations()? {
            remove(&installation.folder)?;
            removed += 1;
        }
        fs::remove_dir(&folder).map_err(CaptureError::io("remove", &folder))?;
    }
    // Not an error when other things are there.
    let _ = fs::remove_dir(base);
    Ok(removed)
}

/// The file system that holds `path` or its nearest existing parent.
fn on_bpf_fs(path: &Path) -> io::Result<bool> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    Ok(rustix::fs::statfs(existing)?.f_type as u64 == BPF_FS_MAGIC)
}

fn mount_bpf_fs(base: &Path) -> Result<(), CaptureError> {
    let parent = base.parent().unwrap_or(base);
    let none = |source| CaptureError::NoBpfFileSystem { path: parent.to_owned(), source };
    if on_bpf_fs(base).map_err(none)? {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("bpf", parent, "bpf", flags, None).map_err(|error| none(error.into()))
}
