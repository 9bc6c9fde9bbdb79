//! Enrolling from the command line: a configuration file that is there is used, one that is not there is made.

use std::path::{Path, PathBuf};

use control::fleet::{Name, PartRole};
use durable::{OpenMode, RealStorage, Storage};

use crate::EnrolError;
use crate::error::file;
use crate::join::{Joined, join};
use crate::state::ConfigServerSection;
use crate::url::ServerUrl;

/// What the command line says.
#[derive(Clone, Debug)]
pub struct FileEnrolment {
    /// Where the config server is.
    pub server: ServerUrl,
    /// The token.
    pub token: String,
    /// What enrols.
    pub role: PartRole,
    /// Its name; the machine's when left out.
    pub name: Option<Name>,
    /// The configuration file.
    pub config: PathBuf,
    /// What a new configuration file says beside `[config_server]`.
    pub rest: String,
    /// Where others reach a server, for a new configuration file.
    pub advertise: Option<String>,
}

/// Where a new configuration keeps the part's state, below the file's directory.
const STATE_DIR: &str = "state";

/// Enrols, and makes the configuration file if there is none.
///
/// # Errors
/// When a file that is there has no `[config_server]`, or the enrolment fails; then nothing was written.
pub async fn enrol_with_file(asked: FileEnrolment) -> Result<Joined, EnrolError> {
    let base = asked.config.parent().unwrap_or(Path::new("")).to_owned();
    let section = match std::fs::read_to_string(&asked.config) {
        Ok(text) => Some(section_of(&text, &asked.config)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => return Err(file("read configuration", &asked.config)(source)),
    };
    if let Some(section) = &section
        && section.url != asked.server
    {
        return Err(EnrolError::Credentials(format!(
            "enrol: {} names the config server {}, not {}; correct one of them",
            asked.config.display(),
            section.url,
            asked.server
        )));
    }
    let state = base.join(section.as_ref().map_or(Path::new(STATE_DIR), |section| &section.state));
    let name = match asked.name {
        Some(name) => name,
        None => host_name()?,
    };
    let joined = join(asked.server.clone(), &asked.token, asked.role, name, &state).await?;
    if section.is_none() {
        let advertise = asked
            .advertise
            .map(|address| format!("# Where others reach it.\nadvertise = {}\n", toml::Value::from(address)));
        let advertise = advertise.unwrap_or_default();
        let text = format!(
            "# Made when this part enrolled. The config server says what is to be done.\n{}\n[config_server]\n\
             url = \"{}\"\n# Credentials, and what the config server said last.\nstate = \"{STATE_DIR}\"\n{advertise}",
            asked.rest, asked.server
        );
        let write = || {
            let file = RealStorage.open(&asked.config, OpenMode::CreateNew)?;
            file.write_all_at(text.as_bytes(), 0)?;
            file.sync_data()?;
            RealStorage.sync_dir(if base.as_os_str().is_empty() { Path::new(".") } else { &base })
        };
        write().map_err(file("write configuration", &asked.config))?;
    }
    Ok(joined)
}

fn section_of(text: &str, path: &Path) -> Result<ConfigServerSection, EnrolError> {
    let wrong =
        |reason: String| EnrolError::Credentials(format!("read configuration {}: {reason}", path.display()));
    let mut table: toml::Table = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
    let section = table.remove("config_server").ok_or_else(|| {
        wrong(
            "it has no [config_server] with url and state; add it, or name another file with --config".into(),
        )
    })?;
    section.try_into().map_err(|error: toml::de::Error| wrong(error.to_string()))
}

fn host_name() -> Result<Name, EnrolError> {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_err(file("read this machine's name", Path::new("/proc/sys/kernel/hostname")))?;
    text.trim().parse().map_err(|error| {
        EnrolError::Credentials(format!("use this machine's name: {error}; give one with --name"))
    })
}
