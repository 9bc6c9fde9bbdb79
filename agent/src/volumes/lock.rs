//! One agent protects a disk: a file for each disk, locked as long as its agent runs.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, bail};
use block::GroupId;
use capture::FoundDisk;

/// Takes the disk; the inner error says why no lock can be had here at all, which is not an error of the disk.
///
/// # Errors
/// When another agent has it.
pub(super) fn take(run: &Path, disk: &FoundDisk, group: &GroupId) -> anyhow::Result<Result<File, String>> {
    // A path may be another disk's tomorrow; the sequence number never is, until the machine starts again.
    let name = match disk.sequence {
        Some(sequence) => format!("disk-{sequence}.lock"),
        None => format!("disk-{}.lock", disk.path.display().to_string().replace('/', "-")),
    };
    let path = run.join(name);
    let opened = fs::create_dir_all(run)
        .and_then(|()| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path));
    let mut file = match opened {
        Ok(file) => file,
        Err(error) => return Ok(Err(format!("open {}: {error}", path.display()))),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only for the message.
            let _ = file.read_to_string(&mut holder);
            bail!(
                "protect {}: it is protected already, by {}. A disk is protected by one agent at a time",
                disk.path.display(),
                if holder.is_empty() { "another agent" } else { holder.trim() }
            );
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("lock {}", path.display()));
        }
    }
    let holder = format!("process {} for group {group}\n", std::process::id());
    let written = file
        .set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| file.write_all(holder.as_bytes()));
    written.with_context(|| format!("write {}", path.display()))?;
    Ok(Ok(file))
}
