//! Keeps the cursor file and frees space, in a thread of its own, so that the log's writer never waits for it.
//!
//! The order, and what breaks when it is changed:
//! 1. what the targets have applied is durable in the cursor file;
//! 2. only then is a segment removed, or data punched out of it (else, after a crash, the cache would miss changesets that it
//!    believes somebody still needs, and call it damage).
//!
//! The cursor file is written at most once a second, or when that frees space somebody waits for.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use durable::{OpenMode, fault_point, replace};

use crate::cache::Shared;
use crate::error::CacheError;
use crate::recover::{CURSORS_FILE, segment_name};
use crate::state::{News, pages, tell};

/// How often the cursor file is written, at most, while nobody waits for space.
pub const CURSORS_EVERY: Duration = Duration::from_secs(1);
/// Kept free for the cursor file, in bytes: without it nothing could be freed on a full file system.
const BALLAST_BYTES: u64 = 4 << 20;
const BALLAST_FILE: &str = "ballast";

/// Runs until the cache is closed.
pub(crate) fn run(shared: &Arc<Shared>) {
    keep_ballast(shared);
    let mut wrote = Instant::now();
    loop {
        let mut state = shared.state.lock();
        loop {
            let wanted = (state.pressure || state.disk_full) && state.has_garbage(true);
            if state.closing || wanted {
                break;
            }
            let wait = CURSORS_EVERY.saturating_sub(wrote.elapsed());
            if wait.is_zero() {
                wrote = Instant::now();
                if state.cursors_dirty || state.has_garbage(false) {
                    break;
                }
            } else {
                shared.keep.wait_for(&mut state, wait);
            }
        }
        let closing = state.closing;
        drop(state);
        wrote = Instant::now();
        if let Err(error) = tidy(shared) {
            if is_full(&error) {
                tracing::warn!(%error, "write the cache's cursors; trying again");
                let mut state = shared.state.lock();
                if !state.closing {
                    shared.keep.wait_for(&mut state, CURSORS_EVERY);
                }
            } else {
                shared.poison(&error);
                return;
            }
        }
        if closing {
            return;
        }
    }
}

/// Steps 1 and 2, once.
fn tidy(shared: &Shared) -> Result<(), CacheError> {
    let (gone, holes) = shared.state.lock().take_garbage();
    fault_point("before-cursors");
    if let Err(error) = write_cursors(shared) {
        shared.state.lock().give_garbage_back(gone, holes);
        return Err(error);
    }
    fault_point("after-cursors");
    let mut freed = 0;
    for number in &gone {
        let path = shared.dir.join(segment_name(number.0));
        match shared.storage.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CacheError::Io { action: "remove", path, source: error });
            }
            _ => freed += number.1,
        }
    }
    let mut punched = Vec::new();
    for (number, ranges) in holes {
        let path = shared.dir.join(segment_name(number));
        let io = |source| CacheError::Io { action: "free data in", path: path.clone(), source };
        let file = shared.storage.open(&path, OpenMode::ReadWrite).map_err(io)?;
        let mut bytes = 0;
        for (offset, length) in ranges.into_iter().map(pages).filter(|(_, length)| *length > 0) {
            file.zero_range(offset, length).map_err(io)?;
            bytes += length;
        }
        punched.push((number, bytes));
    }
    let mut news = News::new();
    let mut state = shared.state.lock();
    for (number, bytes) in punched {
        if let Some(segment) = state.segments.get_mut(&number) {
            segment.bytes -= bytes;
            freed += bytes;
        }
    }
    state.used -= freed;
    if freed > 0 {
        state.room(&mut news);
        shared.freed.notify_all();
    }
    drop(state);
    tell(news);
    Ok(())
}

/// Writes what is known now. Callers come one at a time.
pub(crate) fn write_cursors(shared: &Shared) -> Result<(), CacheError> {
    let _alone = shared.cursors_file.lock();
    let mut state = shared.state.lock();
    let bytes = state.cursors().encode();
    state.cursors_dirty = false;
    drop(state);
    let path = shared.dir.join(CURSORS_FILE);
    let mut written = replace(&*shared.storage, &path, &bytes);
    if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::StorageFull) {
        // Makes room for this file, so that it can free more.
        let _ = shared.storage.remove(&shared.dir.join(BALLAST_FILE));
        written = replace(&*shared.storage, &path, &bytes);
    }
    written.map_err(|source| {
        shared.state.lock().cursors_dirty = true;
        CacheError::Io { action: "write", path, source }
    })
}

/// Best effort: without it a full file system may need a person to make room.
fn keep_ballast(shared: &Shared) {
    let path = shared.dir.join(BALLAST_FILE);
    let kept = shared
        .storage
        .open(&path, OpenMode::CreateOrOpen)
        .and_then(|file| if file.len()? < BALLAST_BYTES { file.allocate(0, BALLAST_BYTES) } else { Ok(()) });
    if let Err(error) = kept {
        tracing::debug!(%error, "keep space for the cache's cursors");
    }
}

fn is_full(error: &CacheError) -> bool {
    let CacheError::Io { source, .. } = error else { return false };
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
