//! Reading old content, checked.

use std::path::Path;

use durable::StorageFile;

use super::Entry;
use crate::error::Context;
use crate::{IMAGE_BATCH_BYTES, ReplicaError};

/// Calls `each` with every entry and its data, checked; `None` for zeroes. Data that is adjacent in the file is read in one
/// call.
pub(crate) fn for_each_run(
    file: &dyn StorageFile,
    path: &Path,
    entries: impl Iterator<Item = Result<Entry, ReplicaError>>,
    mut each: impl FnMut(&Entry, Option<&[u8]>) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    let mut buffer = Vec::new();
    let mut batch: Vec<Entry> = Vec::new();
    let mut entries = entries.peekable();
    while let Some(first) = entries.next().transpose()? {
        if first.is_zeroes() {
            each(&first, None)?;
            continue;
        }
        batch.clear();
        batch.push(first);
        let mut length = first.length();
        let mut follows = |entry: &Result<Entry, ReplicaError>| {
            let Ok(entry) = entry else { return false };
            let fits =
                entry.position == first.position + length && length + entry.length() <= IMAGE_BATCH_BYTES.0;
            if fits {
                length += entry.length();
            }
            fits
        };
        while let Some(next) = entries.next_if(&mut follows) {
            batch.push(next?);
        }
        buffer.resize(length as usize, 0);
        read(file, &mut buffer, first.position, path)?;
        let mut data = &buffer[..];
        for entry in &batch {
            let (run, after) = data.split_at(entry.length() as usize);
            check_run(entry, run, path)?;
            each(entry, Some(run))?;
            data = after;
        }
    }
    Ok(())
}

fn read(file: &dyn StorageFile, buffer: &mut [u8], position: u64, path: &Path) -> Result<(), ReplicaError> {
    match file.read_exact_at(buffer, position) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(ReplicaError::corrupt(path, "cut short within its data"))
        }
        other => other.context("read undo layer", path),
    }
}

/// Whether a run is what was written.
pub(crate) fn check_run(entry: &Entry, data: &[u8], path: &Path) -> Result<(), ReplicaError> {
    if crc32c::crc32c(data) == entry.crc {
        return Ok(());
    }
    let problem = format!(
        "checksum of the {} bytes at byte {} does not match (damaged)",
        entry.length(),
        entry.position
    );
    Err(ReplicaError::corrupt(path, problem))
}
