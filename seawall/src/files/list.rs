//! What is where.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use block::{ByteCount, UnixNanos};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Serialize;

use super::find::FileSystem;
use crate::text;

/// Something in a directory.
#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    kind: &'static str,
    mode: String,
    owner: u32,
    group: u32,
    size: ByteCount,
    modified: UnixNanos,
    /// Where a symbolic link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

pub(super) fn file_systems(found: &[FileSystem], json: bool) -> anyhow::Result<()> {
    if json {
        let all = serde_json::json!({ "file_systems": found });
        return Ok(text::say(&format!("{all}\n"))?);
    }
    if found.is_empty() {
        return Ok(text::say("No file system was found on the volume.\n")?);
    }
    let mut table = text::table(&["Name", "Kind", "Label", "Size", "UUID", ""], &[3]);
    for fs in found {
        table.add_row([
            fs.name.clone(),
            fs.kind.clone(),
            fs.label.clone().unwrap_or_default(),
            fs.size.to_string(),
            fs.uuid.clone().unwrap_or_default(),
            fs.problem.clone().unwrap_or_default(),
        ]);
    }
    Ok(text::say(&format!("{table}\n"))?)
}

/// Finds a path below `root`. Symbolic links lead where they would if `root` were the system's.
pub(super) fn resolve(root: &Path, path: &Path) -> anyhow::Result<OwnedFd> {
    let top = File::open(root).with_context(|| format!("open {}", root.display()))?;
    let inside = path.strip_prefix("/").unwrap_or(path);
    let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // Never out of the file system, whatever its links say.
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let found = rustix::fs::openat2(&top, inside, flags, Mode::empty(), within);
    found.map_err(std::io::Error::from).with_context(|| format!("find {} in the point", path.display()))
}

/// A path that leads this program and its children to what is open.
pub(super) fn path_of(open: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd()))
}

pub(super) fn directory(root: &Path, path: &Path, json: bool) -> anyhow::Result<()> {
    let open = resolve(root, path)?;
    let place = path_of(&open);
    let context = || format!("list {}", path.display());
    let metadata = std::fs::metadata(&place).with_context(context)?;
    let mut entries = Vec::new();
    if metadata.is_dir() {
        // The link in /proc itself is followed, what is in the directory is not.
        for found in std::fs::read_dir(place.join(".")).with_context(context)? {
            let found = found.with_context(context)?;
            entries.push(entry(&found.file_name(), &found.path()).with_context(context)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
    } else {
        let mut only = entry(path.file_name().unwrap_or(path.as_os_str()), &place).with_context(context)?;
        only.kind = kind(&metadata);
        (only.size, only.mode, only.target) = (ByteCount(metadata.size()), mode(&metadata), None);
        entries.push(only);
    }
    if json {
        let all = serde_json::json!({ "path": path, "entries": entries });
        return Ok(text::say(&format!("{all}\n"))?);
    }
    let mut table = text::table(&["Mode", "Owner", "Group", "Size", "Modified", "Name"], &[1, 2, 3]);
    for entry in &entries {
        let name = match &entry.target {
            Some(target) => format!("{} -> {target}", entry.name),
            None => entry.name.clone(),
        };
        table.add_row([
            entry.mode.clone(),
            entry.owner.to_string(),
            entry.group.to_string(),
            entry.size.to_string(),
            text::instant(entry.modified).0,
            name,
        ]);
    }
    Ok(text::say(&format!("{table}\n"))?)
}

fn entry(name: &OsStr, path: &Path) -> std::io::Result<Entry> {
    let metadata = std::fs::symlink_metadata(path)?;
    let nanos = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    Ok(Entry {
        name: name.to_string_lossy().into_owned(),
        kind: kind(&metadata),
        mode: mode(&metadata),
        owner: metadata.uid(),
        group: metadata.gid(),
        size: ByteCount(metadata.size()),
        modified: UnixNanos(u64::try_from(nanos).unwrap_or(0)),
        target: std::fs::read_link(path).ok().map(|target| target.to_string_lossy().into_owned()),
    })
}

fn kind(metadata: &std::fs::Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => "directory",
        () if kind.is_symlink() => "link",
        () if kind.is_file() => "file",
        () if kind.is_block_device() || kind.is_char_device() => "device",
        () => "other",
    }
}

/// As ls shows it.
fn mode(metadata: &std::fs::Metadata) -> String {
    let first = match kind(metadata) {
        "directory" => 'd',
        "link" => 'l',
        "file" => '-',
        "device" if metadata.file_type().is_block_device() => 'b',
        "device" => 'c',
        _ => '?',
    };
    let bit = |shift: u32, letter: char| if metadata.mode() >> shift & 1 == 1 { letter } else { '-' };
    let bits = (0..9).rev().map(|shift| bit(shift, ['x', 'w', 'r'][shift as usize % 3]));
    std::iter::once(first).chain(bits).collect()
}
