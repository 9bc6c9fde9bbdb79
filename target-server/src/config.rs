use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::{ByteCount, Generation, GroupId};
use changeset::{GroupKey, VolumeInfo, volume_id};
use enrol::ConfigServerSection;
use replica::{POINTS_MAX, Policy, Retention};
use serde::{Deserialize, Deserializer};

/// Groups that one target server keeps. More are refused when the configuration is read.
pub const GROUPS_MAX: usize = 256;
/// Threads that open one changeset. More are refused when the configuration is read.
pub const THREADS_MAX: usize = 64;

/// What a target server is told. Unknown keys are refused by name. In a file, relative paths begin at its directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where to listen, `host:port`.
    pub listen: String,
    /// The directory with `ca.pem`, `cert.pem` and `key.pem` of this target server.
    pub credentials: PathBuf,
    /// The directory of replicas; each group has its own below it.
    pub data: PathBuf,
    /// Threads that decrypt and decompress one changeset. Default: the machine's, at most 4.
    #[serde(default = "default_threads")]
    pub threads: usize,
    /// The groups to keep.
    #[serde(default, rename = "group")]
    pub groups: Vec<GroupConfig>,
    /// The config server that says which groups are kept; then the file need name none.
    #[serde(default)]
    pub config_server: Option<ConfigServerSection>,
    /// Disks of this machine, by their paths, that the config server may have this server adopt for a group that comes home; then they
    /// are overwritten. Without it none.
    #[serde(default)]
    pub adoptable_devices: Vec<PathBuf>,
    /// How machines are started here when the config server asks for a boot proof.
    #[serde(default)]
    pub proof: ProofConfig,
}

/// How machines are started for boot proofs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProofConfig {
    /// QEMU, as the system finds it. Default: `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// A program of this machine, its path, that is run when the console has said what it must, and tells by its exit status whether
    /// all is well. It finds SEAWALL_GROUP and SEAWALL_POINT in its environment. Default: none.
    pub probe: Option<PathBuf>,
}

impl Default for ProofConfig {
    fn default() -> ProofConfig {
        ProofConfig { qemu: PathBuf::from("qemu-system-x86_64"), probe: None }
    }
}

/// One group.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Its id, 32 hexadecimal digits.
    pub id: GroupId,
    /// The file with the group's key, readable by its owner only; the same as the agent's.
    pub key: PathBuf,
    /// Which recovery points are kept.
    #[serde(default)]
    pub retention: RetentionConfig,
    /// How work in the background goes.
    #[serde(default)]
    pub upkeep: UpkeepConfig,
    /// The history that begins with adopted disks: the generation of the agent that is to follow. Default: 1.
    #[serde(default)]
    pub adopt_generation: Option<Generation>,
    /// Volumes whose replica lies on a block device. The others are sparse files.
    #[serde(default, rename = "volume")]
    pub devices: Vec<DeviceConfig>,
}

/// A volume whose replica lies on a block device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The volume's name, as the agent gives it.
    pub name: String,
    /// The device. Its content is overwritten.
    pub device: PathBuf,
    /// What is on the device is kept as the first recovery point of a new replica, pinned as `as found`, and the source is
    /// compared with it instead of copied: for a disk that comes home. Said for every device of a group, or for none. Once
    /// there is a history it means nothing.
    #[serde(default)]
    pub adopt: bool,
}

/// Which recovery points are kept. The newest always is, and so are pinned ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionConfig {
    /// At most so many, the newest ones. Default: 1000; with a policy, as many as there can be.
    #[serde(default)]
    pub points_max: Option<usize>,
    /// None older than this; without it, of any age.
    #[serde(default)]
    pub age_hours_max: Option<u32>,
    /// Which for how long, as in `all for 2h, hourly for 24h, daily for 30d, weekly for 1y`.
    #[serde(default, deserialize_with = "policy")]
    pub policy: Option<Policy>,
    /// The most that undo layers may take, as in `500 GiB`. Past it the oldest point that is not pinned goes first, and so on.
    #[serde(default, deserialize_with = "size")]
    pub space_max: Option<ByteCount>,
}

fn policy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Policy>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteCount>, D::Error> {
    block::size_from_text(deserializer).map(Some)
}

impl From<&RetentionConfig> for Retention {
    fn from(config: &RetentionConfig) -> Retention {
        let age_max = config.age_hours_max.map(|hours| Duration::from_secs(u64::from(hours) * 3600));
        let all = if config.policy.is_some() { POINTS_MAX } else { Retention::default().points_max };
        Retention {
            points_max: config.points_max.unwrap_or(all),
            age_max,
            policy: config.policy.clone(),
            space_max: config.space_max,
        }
    }
}

/// How work in the background goes: merging layers, building indexes, scrubbing.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpkeepConfig {
    /// The most that it reads and writes, together, a second.
    #[serde(default = "default_rate", deserialize_with = "block::size_from_text")]
    pub rate_max: ByteCount,
    /// A scrub begins so many days after the one before, and an hour after the start; 0: only when asked for.
    #[serde(default = "default_scrub_days")]
    pub scrub_every_days: u32,
}

impl Default for UpkeepConfig {
    fn default() -> UpkeepConfig {
        UpkeepConfig { rate_max: default_rate(), scrub_every_days: default_scrub_days() }
    }
}

/// Work in the background may not go slower than this: it would never end.
pub const UPKEEP_RATE_MIN: ByteCount = ByteCount::mib(1);

fn default_rate() -> ByteCount {
    ByteCount::mib(64)
}

fn default_scrub_days() -> u32 {
    30
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4))
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
    /// What the config server says cannot be written down.
    #[error("write {path}: {source}", path = path.display())]
    Write {
        /// Where.
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
    /// A group's key cannot be used.
    #[error("load the key of group {group}: {source}")]
    Key {
        /// Which group.
        group: GroupId,
        /// What is wrong with it.
        source: changeset::KeyError,
    },
    /// A device cannot hold a replica.
    #[error("use {device} for volume {volume:?} of group {group}: {reason}", device = device.display())]
    Device {
        /// Which group.
        group: GroupId,
        /// Which volume.
        volume: String,
        /// Which device.
        device: PathBuf,
        /// Why not.
        reason: String,
    },
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
        let groups = config.groups.iter_mut();
        let in_groups = groups.flat_map(|group| {
            let devices = group.devices.iter_mut().map(|device| &mut device.device);
            std::iter::once(&mut group.key).chain(devices)
        });
        let state = config.config_server.as_mut().map(|section| &mut section.state);
        for path in [&mut config.credentials, &mut config.data].into_iter().chain(in_groups).chain(state) {
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
        if self.groups.is_empty() && self.config_server.is_none() {
            return refuse("no [[group]] is given; a target server keeps at least one".to_owned());
        }
        if self.groups.len() > GROUPS_MAX {
            return refuse(format!("{} groups are given, at most {GROUPS_MAX} go", self.groups.len()));
        }
        if !(1..=THREADS_MAX).contains(&self.threads) {
            return refuse(format!("threads is {}, expected 1 to {THREADS_MAX}", self.threads));
        }
        if let Some(device) = self.adoptable_devices.iter().find(|device| !device.is_absolute()) {
            return refuse(format!(
                "adoptable_devices has {}, which is not an absolute path",
                device.display()
            ));
        }
        if let Some(probe) = self.proof.probe.as_ref().filter(|probe| !probe.is_absolute()) {
            return refuse(format!("probe of [proof] is {}, which is not an absolute path", probe.display()));
        }
        let (mut ids, mut devices) = (HashSet::new(), BTreeSet::new());
        for group in &self.groups {
            if !ids.insert(group.id) {
                return refuse(format!("group {} is given twice", group.id));
            }
            let points_max = group.retention.points_max;
            if let Some(points_max) = points_max.filter(|points| !(1..=POINTS_MAX).contains(points)) {
                return refuse(format!(
                    "points_max of group {} is {points_max}, expected 1 to {POINTS_MAX}",
                    group.id
                ));
            }
            if group.retention.space_max == Some(ByteCount::ZERO) {
                return refuse(format!("space_max of group {} is 0; leave it out for no limit", group.id));
            }
            if group.upkeep.rate_max < UPKEEP_RATE_MIN {
                let rate = group.upkeep.rate_max;
                return refuse(format!(
                    "rate_max of group {} is {rate}, expected at least {UPKEEP_RATE_MIN}",
                    group.id
                ));
            }
            if group.retention.age_hours_max == Some(0) {
                return refuse(format!("age_hours_max of group {} is 0, expected at least 1", group.id));
            }
            let adopted = group.devices.iter().filter(|device| device.adopt).count();
            if adopted != 0 && adopted != group.devices.len() {
                return refuse(format!(
                    "{adopted} of {} devices of group {} are adopted; adopt all or none, for they share their first point",
                    group.devices.len(),
                    group.id
                ));
            }
            if group.adopt_generation == Some(Generation(0)) {
                return refuse(format!(
                    "adopt_generation of group {} is 0; generations are numbered from 1",
                    group.id
                ));
            }
            let mut names = HashSet::new();
            for DeviceConfig { name, device, .. } in &group.devices {
                if !names.insert(name) {
                    return refuse(format!("volume {name:?} of group {} is given twice", group.id));
                }
                // The same device by two names is found when both are claimed.
                if !devices.insert(device) {
                    return refuse(format!("device {} is given for two volumes", device.display()));
                }
            }
        }
        Ok(())
    }
}

impl GroupConfig {
    pub(crate) fn load_key(&self) -> Result<GroupKey, ConfigError> {
        GroupKey::load(&self.key).map_err(|source| ConfigError::Key { group: self.id, source })
    }

    /// Opens the devices so that nothing can mount them, or another group use them, while the claims are held.
    pub(crate) fn claim_devices(&self) -> Result<Vec<Claim>, ConfigError> {
        let claim = |config: &DeviceConfig| {
            Claim::new(&config.device).map_err(|reason| ConfigError::Device {
                group: self.id,
                volume: config.name.clone(),
                device: config.device.clone(),
                reason,
            })
        };
        self.devices.iter().map(claim).collect()
    }

    /// What is to be adopted, as the devices say.
    pub(crate) fn adopted(&self, claims: &[Claim]) -> Result<Vec<VolumeInfo>, String> {
        let adopted = self.devices.iter().zip(claims).filter(|(config, _)| config.adopt);
        let volume = |(config, claim): (&DeviceConfig, &Claim)| {
            let (size, logical_block) =
                claim.geometry().map_err(|errno| format!("measure {}: {errno}", config.device.display()))?;
            let id = volume_id(self.id, &config.name);
            Ok(VolumeInfo { id, name: config.name.clone(), size, logical_block })
        };
        adopted.map(volume).collect()
    }

    pub(crate) fn device_paths(&self) -> BTreeMap<String, PathBuf> {
        self.devices.iter().map(|device| (device.name.clone(), device.device.clone())).collect()
    }
}

/// A block device that is this process's alone until dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    device: rustix::fd::OwnedFd,
}

impl Claim {
    fn new(device: &Path) -> Result<Claim, String> {
        let metadata = std::fs::metadata(device).map_err(|error| error.to_string())?;
        if !metadata.file_type().is_block_device() {
            return Err("it is not a block device; leave it out to replicate to a file".to_owned());
        }
        // Of a block device, O_EXCL without O_CREAT asks for it alone.
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
        match rustix::fs::open(device, flags, rustix::fs::Mode::empty()) {
            Ok(device) => Ok(Claim { device }),
            Err(rustix::io::Errno::BUSY) => {
                Err("it is mounted or in use (or given for two volumes); its content would be overwritten"
                    .to_owned())
            }
            Err(errno) => Err(errno.to_string()),
        }
    }

    /// Its size and its logical block size.
    fn geometry(&self) -> rustix::io::Result<(ByteCount, u32)> {
        let size = rustix::fs::seek(&self.device, rustix::fs::SeekFrom::End(0))?;
        Ok((ByteCount(size), rustix::fs::ioctl_blksszget(&self.device)?))
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
        for path in fixtures("valid") {
            let config = Config::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(config.data.is_absolute());
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
    fn a_file_is_not_taken_for_a_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Claim::new(file.path()).unwrap_err().contains("not a block device"));
        assert!(Claim::new(Path::new("/nonexistent")).unwrap_err().contains("No such file"));
    }
}
