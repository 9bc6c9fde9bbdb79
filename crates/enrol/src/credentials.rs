//! The part's certificates on disk: each with its key in a directory of its own, and a link to the one in use.
//!
//! The order, and what breaks when it is reversed:
//! 1. key, certificate, authority and the list of what is revoked, durable in a new directory (else a crash leaves a
//!    certificate without its key, or believes what was revoked);
//! 2. the link leads there, in one step (else there is a moment without credentials);
//! 3. what was before goes.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use block::UnixNanos;
use durable::{OpenMode, RealStorage, Storage};
use wire::{CA_FILE, CERT_FILE, Credentials, KEY_FILE, REVOKED_FILE};

use crate::EnrolError;
use crate::error::file;

/// The link to the credentials in use, below a part's state directory.
pub const CURRENT: &str = "credentials";
/// What directories of credentials begin with.
const PREFIX: &str = "credentials.";

/// Makes these the part's credentials.
pub(crate) fn install(state: &Path, key: &str, certificate: &str, authority: &str) -> Result<(), EnrolError> {
    RealStorage.create_dir_all(state).map_err(file("make directory", state))?;
    let name = format!("{PREFIX}{:020}", UnixNanos::now().0);
    let dir = state.join(&name);
    RealStorage.create_dir_all(&dir).map_err(file("make directory", &dir))?;
    let revoked = match std::fs::read_to_string(state.join(CURRENT).join(REVOKED_FILE)) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => return Err(file("read", &state.join(CURRENT).join(REVOKED_FILE))(source)),
    };
    let files = [
        (KEY_FILE, Some(key)),
        (CERT_FILE, Some(certificate)),
        (CA_FILE, Some(authority)),
        (REVOKED_FILE, revoked.as_deref()),
    ];
    for (name, text) in files.into_iter().filter_map(|(name, text)| Some((name, text?))) {
        let path = dir.join(name);
        let write = || {
            let file = RealStorage.open(&path, OpenMode::CreateNew)?;
            file.write_all_at(text.as_bytes(), 0)?;
            file.sync_data()
        };
        write().map_err(file("write", &path))?;
    }
    RealStorage.sync_dir(&dir).map_err(file("sync directory", &dir))?;
    Credentials::load(&dir).map_err(|error| EnrolError::Credentials(error.to_string()))?;

    let link = state.join(CURRENT);
    let beside = state.join(format!("{CURRENT}.new"));
    let replace = || {
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(&name, &beside)?;
        RealStorage.rename(&beside, &link)?;
        RealStorage.sync_dir(state)
    };
    replace().map_err(file("put credentials into use at", &link))?;
    for old in directories(state)?.into_iter().filter(|old| *old != dir) {
        if let Err(error) = std::fs::remove_dir_all(&old) {
            tracing::warn!(%error, path = %old.display(), "remove credentials that are not used any more");
        }
    }
    Ok(())
}

fn directories(state: &Path) -> Result<Vec<PathBuf>, EnrolError> {
    let names = RealStorage.list(state).map_err(file("look into", state))?;
    Ok(names
        .into_iter()
        .filter(|name| name.starts_with(PREFIX) && !name.ends_with(".new"))
        .map(|name| state.join(name))
        .collect())
}

/// Replaces the list of what is revoked, beside the credentials in use.
pub(crate) fn revoke(state: &Path, text: &str) -> Result<(), EnrolError> {
    let link = state.join(CURRENT);
    let dir = std::fs::canonicalize(&link).map_err(file("find the credentials at", &link))?;
    let path = dir.join(REVOKED_FILE);
    durable::replace(&RealStorage, &path, text.as_bytes()).map_err(file("write", &path))
}
