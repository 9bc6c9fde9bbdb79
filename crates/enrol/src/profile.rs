//! What the operator's command knows a fleet by: where its config server is, how it is recognised, and a token.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use control::fleet::{Name, ResourceId, UnixMillis};
use durable::{RealStorage, Storage};
use serde::{Deserialize, Serialize};

use crate::EnrolError;
use crate::client::Client;
use crate::error::file;
use crate::fingerprint::Fingerprint;
use crate::url::ServerUrl;

/// The largest profile, in bytes. A larger one is refused.
const PROFILE_BYTES_MAX: u64 = 64 * 1024;
const HEAD: &str = "# Made by `seawall login`. Whoever reads this file can do what its token can.\n";

/// A login that is kept in a file, readable by its owner only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Where the config server is.
    pub server: ServerUrl,
    /// By what it is known.
    pub fingerprint: Fingerprint,
    /// Who logged in.
    pub user: Name,
    /// The token's secret.
    pub token: String,
    /// Names the token.
    pub token_id: ResourceId,
    /// When the token ends.
    pub expires: UnixMillis,
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Profile of {} at {}", self.user, self.server)
    }
}

impl Profile {
    /// Reads it.
    ///
    /// # Errors
    /// When there is none, others may read it, or it is none.
    pub fn load(path: &Path) -> Result<Profile, EnrolError> {
        let metadata = std::fs::metadata(path).map_err(file("read profile", path))?;
        let wrong =
            |reason: String| EnrolError::Credentials(format!("read profile {}: {reason}", path.display()));
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            let path = path.display();
            return Err(wrong(format!("mode {mode:04o} lets others read its token; run: chmod 600 {path}")));
        }
        if metadata.len() > PROFILE_BYTES_MAX {
            return Err(wrong(format!(
                "it has {} bytes, expected at most {PROFILE_BYTES_MAX}",
                metadata.len()
            )));
        }
        let text = std::fs::read_to_string(path).map_err(file("read profile", path))?;
        // What TOML's errors show of the file would show the token.
        toml::from_str(&text).map_err(|error: toml::de::Error| {
            wrong(format!("{}; make it anew with `seawall login`", error.message()))
        })
    }

    /// Writes it, in one step. Its directory is made when it is not there.
    ///
    /// # Errors
    /// What the file system says; then what was there before still is.
    pub fn save(&self, path: &Path) -> Result<(), EnrolError> {
        let text = toml::to_string(self).map_err(|error| EnrolError::Credentials(error.to_string()))?;
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            RealStorage.create_dir_all(dir).map_err(file("make directory", dir))?;
        }
        // Relative to here, a bare name has no directory that could be made durable.
        let path = std::path::absolute(path).map_err(file("write profile", path))?;
        durable::replace(&RealStorage, &path, format!("{HEAD}{text}").as_bytes())
            .map_err(file("write profile", &path))
    }

    /// A client that shows the token; nothing is connected yet.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn client(&self) -> Result<Client, EnrolError> {
        Client::new(self.server.clone(), &self.fingerprint.trust(), None, Some(self.token.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_profile_is_its_owners_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/profile.toml");
        let profile = Profile {
            server: "https://a.example".parse().unwrap(),
            fingerprint: Fingerprint([0xa7; 32]),
            user: "vera".parse().unwrap(),
            token: "swt_secret".into(),
            token_id: ResourceId::from_bytes([1; 16]),
            expires: UnixMillis(5),
        };
        assert!(matches!(Profile::load(&path), Err(EnrolError::File { .. })));
        profile.save(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(Profile::load(&path).unwrap() == profile);
        let other = Profile { token: "swt_other".into(), ..profile.clone() };
        other.save(&path).unwrap();
        assert!(Profile::load(&path).unwrap() == other);
        assert!(!format!("{other:?}").contains("swt_"));

        let text = std::fs::read_to_string(&path).unwrap();
        for bad in
            [text.replace("a.example", "a example"), text.replace("user", "usr"), text[..60].to_owned()]
        {
            std::fs::write(&path, bad).unwrap();
            let error = Profile::load(&path).unwrap_err().to_string();
            assert!(error.contains("seawall login") && !error.contains("swt_"), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Profile::load(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
