//! Credentials that are replaced while the program runs: new ones count from the next connection on.
//!
//! Connections that were made stay. Whoever replaces the files may do so one after the other: what does not fit together yet
//! is not taken, and is looked at again when it changes.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::credentials::{CA_FILE, CERT_FILE, Credentials, CredentialsError, KEY_FILE};

/// The files are looked at at most so often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What tells that a file was replaced: inode, length, time of change.
type Stamp = [Option<(u64, u64, i64, i64)>; 3];

struct Held {
    stamp: Stamp,
    looked: Instant,
    credentials: Arc<Credentials>,
}

/// The credentials of a directory, as they are now.
pub struct LiveCredentials {
    dir: PathBuf,
    held: Mutex<Held>,
}

impl std::fmt::Debug for LiveCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveCredentials").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl LiveCredentials {
    /// Reads those of `dir`, as [`Credentials::load`].
    ///
    /// # Errors
    /// As [`Credentials::load`].
    pub fn load(dir: &Path) -> Result<LiveCredentials, CredentialsError> {
        let stamp = stamp(dir);
        let credentials = Arc::new(Credentials::load(dir)?);
        let held = Mutex::new(Held { stamp, looked: Instant::now(), credentials });
        Ok(LiveCredentials { dir: dir.to_owned(), held })
    }

    /// The newest that can be used. They name the same identity as the first: another one needs a restart.
    pub fn current(&self) -> Arc<Credentials> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.looked.elapsed() >= LOOK_EVERY {
            held.looked = Instant::now();
            self.take(&mut held);
        }
        held.credentials.clone()
    }

    /// Waits until the files are no longer what was last looked at, and can be used.
    pub async fn renewed(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            if self.take(&mut held) {
                return;
            }
        }
    }

    /// Whether there are new ones.
    fn take(&self, held: &mut Held) -> bool {
        let stamp = stamp(&self.dir);
        if stamp == held.stamp {
            return false;
        }
        // Remembered also when they cannot be used: once is enough to say so.
        held.stamp = stamp;
        match Credentials::load(&self.dir) {
            Ok(new) if new.identity() == held.credentials.identity() => {
                tracing::info!(dir = %self.dir.display(), identity = %new.identity(), "credentials renewed");
                held.credentials = Arc::new(new);
                true
            }
            Ok(new) => {
                let (before, now) = (held.credentials.identity(), new.identity());
                tracing::error!(
                    dir = %self.dir.display(),
                    "credentials not renewed: they are of {now}, and this runs as {before}; start it again if that is meant"
                );
                false
            }
            Err(error) => {
                tracing::warn!(%error, "credentials not renewed yet; the old ones are used");
                false
            }
        }
    }
}

fn stamp(dir: &Path) -> Stamp {
    [CA_FILE, CERT_FILE, KEY_FILE].map(|name| {
        let file = std::fs::metadata(dir.join(name)).ok()?;
        Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authority, Identity, Role};

    fn now(live: &LiveCredentials) -> Arc<Credentials> {
        live.held.lock().unwrap().looked -= LOOK_EVERY;
        live.current()
    }

    #[test]
    fn new_files_count_and_bad_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("server");
        let authority = Authority::create(&dir.path().join("authority")).unwrap();
        let identity = Identity::new(Role::ProcessServer, "ps", None).unwrap();
        authority.issue(&identity, &home).unwrap();
        let live = LiveCredentials::load(&home).unwrap();
        let first = now(&live);
        assert!(Arc::ptr_eq(&first, &now(&live)));

        // A certificate without its key.
        let next = dir.path().join("next");
        authority.issue(&identity, &next).unwrap();
        std::fs::copy(next.join(CERT_FILE), home.join(CERT_FILE)).unwrap();
        assert!(Arc::ptr_eq(&first, &now(&live)));
        // With it.
        std::fs::copy(next.join(KEY_FILE), home.join(KEY_FILE)).unwrap();
        let second = now(&live);
        assert!(!Arc::ptr_eq(&first, &second));

        // Somebody else's.
        let other = dir.path().join("other");
        authority.issue(&Identity::new(Role::ProcessServer, "other", None).unwrap(), &other).unwrap();
        for file in [CERT_FILE, KEY_FILE] {
            std::fs::copy(other.join(file), home.join(file)).unwrap();
        }
        assert!(Arc::ptr_eq(&second, &now(&live)));
    }
}
