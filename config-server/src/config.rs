use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use wire::ServerNames;

/// Names by which the server may be reached. More are refused.
pub const NAMES_MAX: usize = 16;

/// What a config server is told. Unknown keys are refused by name. In a file, relative paths begin at its directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where to listen, `host:port`.
    pub listen: String,
    /// Names and addresses by which people and parts reach it; its certificate has them all. The first is shown to people.
    pub names: Vec<String>,
    /// The directory of the authority: `ca.pem` and `key.pem`. Every config server of a fleet has the same.
    pub authority: PathBuf,
    /// The directory in which this config server keeps its own certificate.
    pub credentials: PathBuf,
    /// `sqlite:PATH` or `postgres://...`.
    pub database: String,
    /// The directory of the TSIG keys with which plans change DNS, each as tsig-keygen writes it, `NAME.key`; none when left out.
    #[serde(default)]
    pub dns_keys: Option<PathBuf>,
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
    /// Reads a configuration file and checks its values.
    ///
    /// # Errors
    /// When it cannot be read, holds an unknown key, lacks one, or a value makes no sense.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Config = toml::from_str(&text)
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), reason: error.to_string() })?;
        let base = path.parent().unwrap_or(Path::new(""));
        for path in [&mut config.authority, &mut config.credentials].into_iter().chain(&mut config.dns_keys) {
            *path = base.join(&*path);
        }
        if let Some(file) = config.database.strip_prefix("sqlite:") {
            config.database = format!("sqlite:{}", base.join(file).display());
        }
        config.check()?;
        Ok(config)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// When one makes no sense; the message names it.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |reason: String| Err(ConfigError::Value(reason));
        let port = self.listen.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        if port.is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            return refuse(format!("listen: {:?} is not HOST:PORT, as in 0.0.0.0:7443", self.listen));
        }
        if self.names.is_empty() || self.names.len() > NAMES_MAX {
            return refuse(format!("names has {} entries, expected 1 to {NAMES_MAX}", self.names.len()));
        }
        for name in &self.names {
            let host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
            let is_host = !name.is_empty() && name.len() <= 253 && name.bytes().all(host);
            if !is_host && name.parse::<IpAddr>().is_err() {
                return refuse(format!("names: {name:?} is neither a host's name nor an address"));
            }
        }
        Ok(())
    }

    /// What its certificate names.
    pub(crate) fn server_names(&self) -> ServerNames {
        let mut names = ServerNames::default();
        for name in &self.names {
            match name.parse::<IpAddr>() {
                Ok(address) => names.addresses.push(address),
                Err(_) => names.hosts.push(name.clone()),
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config-server.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn the_sample_is_valid_and_what_is_wrong_is_named() {
        let sample = include_str!("../sample.toml");
        let config = load(sample).unwrap();
        assert!(config.database.starts_with("sqlite:/"), "{}", config.database);
        assert_eq!(config.server_names().addresses.len(), 1);
        for (from, to, named) in [
            ("listen = \"0.0.0.0:7443\"", "listen = \"7443\"", "HOST:PORT"),
            ("names = [", "names = [\"a b\", ", "a b"),
            ("listen", "listens", "listens"),
        ] {
            let text = sample.replacen(from, to, 1);
            assert_ne!(text, sample);
            let error = load(&text).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
