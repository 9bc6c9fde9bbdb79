//! Replacing a small file in one step.

use std::io;
use std::path::Path;

use crate::{OpenMode, Storage, fault_point};

/// What [`replace`] appends to a file's name for the new content until it is durable. A file of such a name found
/// when a directory is opened is a leftover of a crash and may be removed.
pub const REPLACE_SUFFIX: &str = ".new";

/// Gives the file at `path` new content: after a crash it holds all of the old content or all of the new, and when
/// this returned, the new.
///
/// The order, and what breaks when it is changed:
/// 1. the new content is written beside the old (else a crash tears the only copy);
/// 2. it is made durable (else the name may point at an empty file after a crash);
/// 3. it takes the name in one step;
/// 4. the name is made durable (else the old content may come back after the caller acted on the new).
///
/// Not for two callers of the same path at once. Memory: nothing beyond `bytes`.
///
/// # Errors
/// What the storage says. Before step 3 the old content is untouched; after an error in step 4 either may be found.
pub fn replace(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut beside = name.to_os_string();
    beside.push(REPLACE_SUFFIX);
    let beside = path.with_file_name(beside);

    let file = storage.open(&beside, OpenMode::CreateOrOpen)?;
    file.set_len(0)?;
    file.write_all_at(bytes, 0)?;
    file.sync_data()?;
    fault_point("before-rename");
    storage.rename(&beside, path)?;
    fault_point("after-rename");
    storage.sync_dir(path.parent().unwrap_or(Path::new("")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CrashStorage;
    use crate::record::read_whole;

    #[test]
    fn a_crash_at_any_step_leaves_the_old_or_the_new() {
        let path = Path::new("/d/state");
        for stop in 0.. {
            let storage = CrashStorage::new();
            storage.create_dir_all(Path::new("/d")).unwrap();
            replace(&storage, path, b"old").unwrap();
            storage.stop_at(storage.operations() + stop);
            let done = replace(&storage, path, &[b'n'; 2000]).is_ok();
            for seed in 0..50 {
                let after = storage.crash(seed);
                let found = read_whole(&after, path, 4096).unwrap();
                assert!(found == [b'n'; 2000] || (!done && found == b"old"), "stop {stop} seed {seed}");
                // And the next replace is not disturbed by what the crash left.
                replace(&after, path, b"again").unwrap();
                assert_eq!(read_whole(&after.crash(0), path, 4096).unwrap(), b"again");
            }
            if done {
                assert!(stop > 4);
                return;
            }
        }
    }
}
