use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use block::{ByteCount, Generation, GroupId, VolumeId, size_from_text};
use capture::{DeviceName, TrackerLimits};
use serde::{Deserialize, Deserializer};

use crate::application::ApplicationSection;
use crate::limits::LimitsSection;
use crate::resync::ResyncSection;

/// The shortest and the longest epoch interval, in milliseconds.
pub const EPOCH_INTERVAL_MS: (u64, u64) = (100, 3_600_000);
/// Where tracking is kept if the configuration names no other place.
pub const TRACKING_FOLDER: &str = "/sys/fs/bpf/seawall";
/// The least epoch memory: below it a drain could not go on beside the records.
pub const EPOCH_MEMORY_MIN: ByteCount = ByteCount::mib(24);

/// The largest ring that the kernel makes.
pub const RING_BYTES_MAX: ByteCount = ByteCount::gib(1);

/// The agent's configuration file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The agent itself.
    pub agent: AgentSection,
    /// The disks that share one cut.
    pub volume: Vec<VolumeConfig>,
    /// Points that more than a power cut could have left.
    #[serde(default)]
    pub application: ApplicationSection,
    /// What the agent may take of the machine and of the way.
    #[serde(default)]
    pub limits: LimitsSection,
    /// When disks are compared with their replicas.
    #[serde(default)]
    pub resync: ResyncSection,
    /// When the process server is tried again.
    #[serde(default)]
    pub retry: wire::RetryPolicy,
}

/// `[agent]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSection {
    /// Names the group; `seawall init` makes one.
    pub group: GroupId,
    /// The group's history; grows at a failover.
    #[serde(default = "first_generation")]
    pub generation: Generation,
    /// File with the group's key, readable by its owner only. Relative to the configuration file.
    pub group_key: PathBuf,
    /// Directory with ca.pem, cert.pem and key.pem. Relative to the configuration file.
    pub credentials: PathBuf,
    /// Where the process server listens: host:port.
    pub process_server: String,
    /// Between two cuts.
    #[serde(default = "default_interval")]
    pub epoch_interval_ms: u64,
    /// The kernel's ring of write records.
    #[serde(default = "default_ring", deserialize_with = "size_from_text")]
    pub ring_bytes: ByteCount,
    /// Open, sealing and unsent epochs together.
    #[serde(default = "default_memory", deserialize_with = "size_from_text")]
    pub epoch_memory_bytes: ByteCount,
    /// How changes are found.
    #[serde(default)]
    pub source: SourceChoice,
    /// Whether tracking goes on while no agent runs, so that a restart reads nothing again.
    #[serde(default = "yes")]
    pub keep_tracking: bool,
    /// Where the kernel keeps it: a folder in the BPF file system.
    #[serde(default = "default_tracking_folder")]
    pub tracking_folder: PathBuf,
    /// Of the time, in percent (1 to 100), in which missed writes are read from the disks while applications write.
    #[serde(default = "default_drain_share")]
    pub drain_share_percent: u32,
    /// File in which the agent remembers which disks it protects. Relative to the configuration file.
    #[serde(default = "default_disks_file")]
    pub disks_file: PathBuf,
    /// Where the agent listens for commands of this machine's root: a path for a socket, in a directory that is not
    /// on a protected disk. See [`AgentConfig::control_socket`].
    pub control_socket: Option<PathBuf>,
}

/// How changes are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceChoice {
    /// eBPF for disks when the kernel lets us, else scan.
    #[default]
    Auto,
    /// eBPF, data and bitmap; an error when it cannot be.
    Ebpf,
    /// eBPF without data.
    EbpfBitmap,
    /// Checksums.
    Scan,
}

/// `[[volume]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// What people call it; its identity in the group.
    pub name: String,
    /// The disk, or a file for `scan`.
    #[serde(deserialize_with = "device_from_text")]
    pub device: DeviceName,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read configuration {path}: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file does not say what it must.
    #[error("read configuration {path}: {reason}", path = path.display())]
    Invalid {
        /// Which.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
}

fn first_generation() -> Generation {
    Generation(1)
}

fn default_interval() -> u64 {
    1000
}

fn yes() -> bool {
    true
}

fn default_tracking_folder() -> PathBuf {
    TRACKING_FOLDER.into()
}

fn default_drain_share() -> u32 {
    TrackerLimits::default().share
}

pub(crate) fn default_ring() -> ByteCount {
    ByteCount::mib(128)
}

fn default_memory() -> ByteCount {
    ByteCount::mib(256)
}

fn default_disks_file() -> PathBuf {
    "protected-disks".into()
}

fn device_from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DeviceName, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

impl AgentConfig {
    /// Reads and checks a file. Paths in it are relative to its directory.
    ///
    /// # Errors
    /// When it cannot be read, has an unknown or missing key, or a value out of range; the error names it.
    pub fn load(path: &Path) -> Result<AgentConfig, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        AgentConfig::parse(&text, path)
    }

    /// The text of a file.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<AgentConfig, ConfigError> {
        let invalid = |reason: String| ConfigError::Invalid { path: path.to_owned(), reason };
        let mut config: AgentConfig = toml::from_str(text).map_err(|error| invalid(error.to_string()))?;
        let base = path.parent().unwrap_or(Path::new("."));
        config.agent.group_key = base.join(&config.agent.group_key);
        config.agent.credentials = base.join(&config.agent.credentials);
        config.agent.disks_file = base.join(&config.agent.disks_file);
        config.application.hooks = base.join(&config.application.hooks);
        config.check().map_err(invalid)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let agent = &self.agent;
        let (least, most) = EPOCH_INTERVAL_MS;
        if !(least..=most).contains(&agent.epoch_interval_ms) {
            return Err(format!(
                "epoch_interval_ms = {}: must be {least} to {most}",
                agent.epoch_interval_ms
            ));
        }
        if agent.epoch_memory_bytes < EPOCH_MEMORY_MIN {
            return Err(format!(
                "epoch_memory_bytes = {}: at least {EPOCH_MEMORY_MIN}",
                agent.epoch_memory_bytes
            ));
        }
        if !(1..=100).contains(&agent.drain_share_percent) {
            return Err(format!("drain_share_percent = {}: must be 1 to 100", agent.drain_share_percent));
        }
        if agent.ring_bytes > RING_BYTES_MAX {
            return Err(format!("ring_bytes = {}: at most {RING_BYTES_MAX}", agent.ring_bytes));
        }
        if agent.generation.0 == 0 {
            return Err("generation = 0: generations are numbered from 1".into());
        }
        if self.volume.is_empty() {
            return Err("no [[volume]]: name at least one disk to protect".into());
        }
        let mut names = HashSet::new();
        for volume in &self.volume {
            if volume.name.is_empty() || volume.name.len() > changeset::NAME_BYTES_MAX {
                return Err(format!(
                    "volume name {:?}: must have 1 to {} bytes",
                    volume.name,
                    changeset::NAME_BYTES_MAX
                ));
            }
            if !names.insert(&volume.name) {
                return Err(format!("volume name {:?} is used twice", volume.name));
            }
        }
        self.limits.check()?;
        self.resync.check()?;
        self.retry.check().map_err(|error| format!("[retry]: {error}"))?;
        self.application.check()
    }

    /// Where the agent listens for commands: /run/seawall/GROUP.sock, if nothing else is configured.
    pub fn control_socket(&self) -> PathBuf {
        let named = || Path::new(control::AGENT_SOCKET_DIR).join(format!("{}.sock", self.agent.group));
        self.agent.control_socket.clone().unwrap_or_else(named)
    }

    /// A volume's identity: of its group and name, so that it stays when the device is renamed.
    pub fn volume_id(&self, name: &str) -> VolumeId {
        changeset::volume_id(self.agent.group, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<AgentConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        fs::write(&path, text).unwrap();
        AgentConfig::load(&path)
    }

    #[test]
    fn the_sample_is_valid() {
        let config = load(include_str!("../sample.toml")).unwrap();
        assert_eq!(config.agent.ring_bytes, ByteCount::mib(128));
        assert_eq!(config.volume.len(), 2);
        assert_ne!(config.volume_id(&config.volume[0].name), config.volume_id(&config.volume[1].name));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let sample = include_str!("../sample.toml");
        for (from, to, named) in [
            ("epoch_interval_ms", "epoch_interval", "epoch_interval"),
            ("epoch_interval_ms = 1000", "epoch_interval_ms = 1", "epoch_interval_ms = 1"),
            ("ring_bytes = \"128MiB\"", "ring_bytes = \"128MB\"", "128MB"),
            ("ring_bytes = \"128MiB\"", "ring_bytes = \"2GiB\"", "at most 1.0 GiB"),
            ("name = \"log\"", "name = \"data\"", "used twice"),
            ("group = \"", "group = \"x", "32 hexadecimal digits"),
            ("device = \"/dev/vdb\"", "device = \"uuid:1\"", "fsuuid"),
            ("source = \"auto\"", "source = \"magic\"", "magic"),
            ("every_s = 3600", "every_s = 1", "every_s = 1"),
            ("budget_ms = 2000", "budget_ms = 0", "budget_ms = 0"),
            ("hook_timeout_ms = 30000", "hook_timeout_ms = 1", "hook_timeout_ms = 1"),
            ("consistency = \"application\"", "consistency = \"crash\"", "every epoch_interval_ms"),
            ("leave_out = [\"/", "leave_out = [\"", "not an absolute path"),
            ("cpu_percent = 100", "cpu_percent = 4", "cpu_percent = 4"),
            ("from = \"08:00\"", "from = \"8 am\"", "no time of day"),
            ("dirty_percent = 50", "dirty_percent = 0", "dirty_percent = 0"),
            ("quick_s = 30", "quick_s = 4000", "[retry]: quick_s = 4000"),
            ("POSTGRESQL_DATA =", "\"A B\" =", "not the name of a variable"),
            ("POSTGRESQL_DATA =", "SEAWALL_LABEL =", "the agent's own"),
        ] {
            let text = sample.replacen(from, to, 1);
            assert_ne!(text, sample, "{from}");
            let error = load(&text).unwrap_err().to_string();
            assert!(error.contains(named), "{to}: {error}");
        }
    }
}
