//! Where the operator's configuration is, and what is in it.

use clap::Args;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// Where the operator's configuration is.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Place {
    /// Directory that `seawall init` made [default: $SEAWALL_DIR, else ./seawall]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// Names the directory when no option does.
pub(crate) const DIR_VARIABLE: &str = "SEAWALL_DIR";
/// The directory when nothing does.
const DIR_DEFAULT: &str = "seawall";

/// DIR/operator/operator.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OperatorConfig {
    pub(crate) operator: OperatorSection,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OperatorSection {
    /// host:port
    pub(crate) process_server: String,
    /// host:port
    pub(crate) target_server: String,
    /// Directory of ca.pem, cert.pem and key.pem, relative to the file.
    pub(crate) credentials: PathBuf,
}

impl OperatorConfig {
    pub(crate) fn load(place: &Place) -> anyhow::Result<OperatorConfig> {
        let path = place.find()?.join("operator/operator.toml");
        let text = std::fs::read_to_string(&path).with_context(|| {
            let path = path.display();
            format!("read the operator's configuration {path} (of the directory that `seawall init` made; --dir names it)")
        })?;
        let mut config: OperatorConfig = toml::from_str(&text)
            .with_context(|| format!("read the operator's configuration {}", path.display()))?;
        let base = path.parent().unwrap_or(Path::new("."));
        config.operator.credentials = base.join(&config.operator.credentials);
        Ok(config)
    }
}

impl Place {
    /// The directory that `seawall init` made: the option, the environment, or ./seawall.
    pub(crate) fn find(&self) -> anyhow::Result<PathBuf> {
        let (dir, from) = match (&self.dir, std::env::var_os(DIR_VARIABLE)) {
            (Some(dir), _) => (dir.clone(), "--dir"),
            (None, Some(dir)) => (PathBuf::from(dir), DIR_VARIABLE),
            (None, None) => (PathBuf::from(DIR_DEFAULT), "the default"),
        };
        if !dir.is_dir() {
            bail!(
                "open directory {} (from {from}): there is none; give --dir DIR or set {DIR_VARIABLE}, \
                 or make one with `seawall init DIR --device PATH`",
                dir.display()
            );
        }
        Ok(dir)
    }
}
