//! What a part keeps of the fleet: where the config server is, and what it was told last.
//!
//! `desired.json` holds the last desired state with its checksum: docs/formats/desired.md.

use std::path::{Path, PathBuf};

use control::fleet::Desired;
use durable::RealStorage;
use serde::{Deserialize, Serialize};

use crate::EnrolError;
use crate::error::file;
use crate::url::ServerUrl;

/// What was told last.
const DESIRED_FILE: &str = "desired.json";
/// The version of the list of revoked certificates that is in use.
const REVOKED_VERSION_FILE: &str = "revoked.version";
/// The first line of the file.
pub(crate) const FIRST_LINE: &str = "seawall desired state 1";
/// The largest file, in bytes. A larger one is refused.
const DESIRED_BYTES_MAX: u64 = 64 << 20;

/// `[config_server]` of a part's configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigServerSection {
    /// Where it is.
    pub url: ServerUrl,
    /// The directory in which the part keeps its credentials and what it was told. Relative to the configuration file.
    pub state: PathBuf,
    /// Where others reach this server, `host:port`; not for agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
}

/// Keeps what was told.
pub(crate) fn keep_desired(state: &Path, digest: &str, desired: &Desired) -> Result<(), EnrolError> {
    let path = state.join(DESIRED_FILE);
    let json = serde_json::to_string(desired).map_err(|error| EnrolError::Credentials(error.to_string()))?;
    durable::replace(&RealStorage, &path, text(digest, &json).as_bytes())
        .map_err(file("keep what is to be done in", &path))
}

pub(crate) fn text(digest: &str, json: &str) -> String {
    let sum = blake3::hash(json.as_bytes());
    format!("{FIRST_LINE}\n{digest}\n{}\n{json}\n", sum.to_hex())
}

/// What was told last, with its digest; `None` when nothing was.
///
/// A damaged file counts as nothing, and is said: the config server tells it again.
pub(crate) fn kept_desired(state: &Path) -> Result<Option<(String, Desired)>, EnrolError> {
    let path = state.join(DESIRED_FILE);
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() > DESIRED_BYTES_MAX => {
            tracing::error!(path = %path.display(), bytes = metadata.len(), "what was told last is too large to be read");
            return Ok(None);
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(file("read", &path)(source)),
    }
    let text = std::fs::read_to_string(&path).map_err(file("read", &path))?;
    let read = parse(&text);
    if read.is_none() {
        tracing::error!(path = %path.display(), "what was told last is damaged; it is fetched again");
    }
    Ok(read)
}

pub(crate) fn parse(text: &str) -> Option<(String, Desired)> {
    let mut lines = text.splitn(4, '\n');
    if lines.next()? != FIRST_LINE {
        return None;
    }
    let (digest, sum, json) = (lines.next()?, lines.next()?, lines.next()?);
    let json = json.strip_suffix('\n')?;
    if blake3::hash(json.as_bytes()).to_hex().as_str() != sum {
        return None;
    }
    Some((digest.to_owned(), serde_json::from_str(json).ok()?))
}

pub(crate) fn keep_revoked_version(state: &Path, version: i64) -> Result<(), EnrolError> {
    let path = state.join(REVOKED_VERSION_FILE);
    durable::replace(&RealStorage, &path, format!("{version}\n").as_bytes()).map_err(file("write", &path))
}

/// 0 when it is not known: the list is fetched again.
pub(crate) fn kept_revoked_version(state: &Path) -> i64 {
    let text = std::fs::read_to_string(state.join(REVOKED_VERSION_FILE)).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use control::fleet::{DesiredAgent, DesiredProcessServer};

    use super::*;

    #[test]
    fn what_was_told_is_kept_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        assert!(kept_desired(dir.path()).unwrap().is_none());
        let desired = Desired::Agent(DesiredAgent::default());
        keep_desired(dir.path(), "d1", &desired).unwrap();
        assert_eq!(kept_desired(dir.path()).unwrap(), Some(("d1".into(), desired)));
        let second = Desired::ProcessServer(DesiredProcessServer::default());
        keep_desired(dir.path(), "d2", &second).unwrap();
        assert_eq!(kept_desired(dir.path()).unwrap(), Some(("d2".into(), second)));
        let path = dir.path().join(DESIRED_FILE);
        let whole = std::fs::read_to_string(&path).unwrap();
        // The golden text: magic and version, digest, checksum, JSON.
        assert!(whole.starts_with("seawall desired state 1\nd2\n"));
        assert!(whole.ends_with("\n{\"part\":\"process-server\",\"groups\":[]}\n"));
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(kept_desired(dir.path()).unwrap().is_none(), "{length}");
        }
        std::fs::write(&path, whole.replace("[]", "[ ]")).unwrap();
        assert!(kept_desired(dir.path()).unwrap().is_none());
    }
}
