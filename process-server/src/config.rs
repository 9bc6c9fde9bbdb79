use std::collections::HashSet;
use std::path::{Path, PathBuf};

use block::{ByteCount, GroupId, size_from_text};
use enrol::ConfigServerSection;
use serde::Deserialize;

/// Groups with a `[[group]]` of their own. More are refused when the configuration is read.
pub const GROUPS_MAX: usize = 4096;
/// Targets of one group. More are refused when the configuration is read.
pub const TARGETS_MAX: usize = 8;
/// The smallest cache. In a smaller one the largest changeset would not fit beside a segment of the log.
pub const CACHE_BYTES_MIN: ByteCount = ByteCount::mib(192);

/// The most comparisons at a time that may be configured.
pub const RESYNCS_AT_ONCE_MAX: u32 = 256;

fn resyncs_at_once() -> u32 {
    4
}

/// What a process server is told. Unknown keys are refused by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The server itself.
    pub process_server: ProcessServerSection,
    /// The groups that are accepted, and where each goes.
    #[serde(default, rename = "group")]
    pub groups: Vec<GroupConfig>,
    /// The config server that says which groups are accepted; then the file need name none.
    #[serde(default)]
    pub config_server: Option<ConfigServerSection>,
}

/// `[process_server]`. In a file, relative paths begin at its directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessServerSection {
    /// Where to listen, `host:port`.
    pub listen: String,
    /// The directory with `ca.pem`, `cert.pem` and `key.pem` of this process server.
    pub credentials: PathBuf,
    /// The directory of the cache.
    pub cache: PathBuf,
    /// The most that the cache takes; at least [`CACHE_BYTES_MIN`]. When it is reached, agents wait.
    #[serde(deserialize_with = "size_from_text")]
    pub cache_bytes: ByteCount,
    /// Where groups go that have no `[[group]]` of their own, as `host:port`. Without it they are refused.
    #[serde(default)]
    pub targets: Vec<String>,
    /// How many groups may compare their disks with their replicas at a time; the others wait for their turn. 1 to
    /// [`RESYNCS_AT_ONCE_MAX`].
    #[serde(default = "resyncs_at_once")]
    pub resyncs_at_once: u32,
    /// When a target that cannot be reached is tried again.
    #[serde(default)]
    pub retry: wire::RetryPolicy,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Its id, 32 hexadecimal digits.
    pub id: GroupId,
    /// The target servers that get its changes, as `host:port`.
    pub targets: Vec<String>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read configuration {path}: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// It is not what a configuration must be.
    #[error("read configuration {path}: {reason}", path = path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// What is wrong, with the line.
        reason: String,
    },
    /// A value makes no sense.
    #[error("check configuration: {0}")]
    Value(String),
}

impl Config {
    /// Reads a configuration file and checks its values. What they name is looked at when the server starts.
    ///
    /// # Errors
    /// When it cannot be read, holds an unknown key, lacks one, or a value makes no sense.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Config = toml::from_str(&text)
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), reason: error.to_string() })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let server = &mut config.process_server;
        let state = config.config_server.as_mut().map(|section| &mut section.state);
        for path in [&mut server.credentials, &mut server.cache].into_iter().chain(state) {
            // A path that is absolute already stays as it is.
            *path = base.join(&*path);
        }
        config.check()?;
        Ok(config)
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// When one makes no sense; the message names it.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |reason: String| Err(ConfigError::Value(reason));
        let server = &self.process_server;
        check_address("listen", &server.listen)?;
        if server.cache_bytes < CACHE_BYTES_MIN {
            return refuse(format!(
                "cache_bytes is {}, expected at least {CACHE_BYTES_MIN}",
                server.cache_bytes
            ));
        }
        if !(1..=RESYNCS_AT_ONCE_MAX).contains(&server.resyncs_at_once) {
            return refuse(format!(
                "resyncs_at_once is {}, expected 1 to {RESYNCS_AT_ONCE_MAX}",
                server.resyncs_at_once
            ));
        }
        if self.groups.is_empty() && server.targets.is_empty() && self.config_server.is_none() {
            return refuse("no [[group]] is given, and no targets for those without one".to_owned());
        }
        if self.groups.len() > GROUPS_MAX {
            return refuse(format!("{} groups are given, at most {GROUPS_MAX} go", self.groups.len()));
        }
        check_targets("targets of [process_server]", &server.targets)?;
        server
            .retry
            .check()
            .map_err(|error| ConfigError::Value(format!("[process_server.retry]: {error}")))?;
        let mut ids = HashSet::new();
        for group in &self.groups {
            if !ids.insert(group.id) {
                return refuse(format!("group {} is given twice", group.id));
            }
            if group.targets.is_empty() {
                return refuse(format!(
                    "targets of group {} is empty; its changes must go somewhere",
                    group.id
                ));
            }
            check_targets(&format!("targets of group {}", group.id), &group.targets)?;
        }
        Ok(())
    }

    /// The target servers of a group; none when the group is not accepted.
    pub fn targets_of(&self, group: GroupId) -> &[String] {
        let own = self.groups.iter().find(|own| own.id == group);
        own.map_or(&self.process_server.targets, |own| &own.targets)
    }
}

fn check_targets(what: &str, targets: &[String]) -> Result<(), ConfigError> {
    if targets.len() > TARGETS_MAX {
        return Err(ConfigError::Value(format!(
            "{what} has {} entries, at most {TARGETS_MAX} go",
            targets.len()
        )));
    }
    for (index, target) in targets.iter().enumerate() {
        check_address(what, target)?;
        if targets[..index].contains(target) {
            return Err(ConfigError::Value(format!("{what} has {target:?} twice")));
        }
    }
    Ok(())
}

fn check_address(what: &str, text: &str) -> Result<(), ConfigError> {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let good = port.is_some_and(|(_, port)| port.parse::<u16>().is_ok())
        && text.len() <= cache::TARGET_NAME_BYTES_MAX;
    match good {
        true => Ok(()),
        false => Err(ConfigError::Value(format!("{what}: {text:?} is not HOST:PORT, as in dr.example:7441"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixtures(kind: &str) -> Vec<PathBuf> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config").join(kind);
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> =
            entries.filter(|path| path.extension().is_some_and(|e| e == "toml")).collect();
        paths.sort();
        assert!(!paths.is_empty());
        paths
    }

    #[test]
    fn valid_samples_are_accepted() {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample.toml");
        for path in fixtures("valid").into_iter().chain([sample]) {
            let config = Config::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(config.process_server.cache.is_absolute());
        }
    }

    /// The first line of each says what the error must name.
    #[test]
    fn invalid_samples_are_refused_by_name() {
        for path in fixtures("invalid") {
            let text = std::fs::read_to_string(&path).unwrap();
            let expected = text.lines().next().unwrap().strip_prefix("# refused: ").unwrap();
            let error = Config::load(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{}: {error:?} does not name {expected:?}", path.display());
        }
    }

    #[test]
    fn groups_go_where_they_are_told() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/valid");
        let config = Config::load(&dir.join("both.toml")).unwrap();
        let named = config.groups[0].id;
        assert_eq!(config.targets_of(named), ["a.example:7441", "b.example:7441"]);
        assert_eq!(config.targets_of(GroupId([9; 16])), ["[2001:db8::1]:7441"]);
    }
}
