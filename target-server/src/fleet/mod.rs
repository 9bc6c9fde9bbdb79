//! A target server of a fleet: which groups it keeps, and how, is told by the config server, and acted on whether that runs or
//! not. Their keys come sealed: only this server can open them.

mod drill;
mod prove;
pub(crate) mod task;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, GroupId};
use control::fleet::{
    AdoptedVolume, Capacity, CheckIn, CheckInReply, Desired, KeptGroup, POINT_LISTS_MAX, PartReport, Task,
};
use control::metrics::Values;
use durable::{RealStorage, Storage};
use enrol::seal::Opener;
use enrol::{Charge, ConfigServerSection, Member, TaskDone};
use parking_lot::Mutex;

use crate::config::{Config, ConfigError, DeviceConfig, GroupConfig, RetentionConfig};
use crate::server::{Handle, StartError, TargetServer};

/// Who it is that exports and proves points when the config server asks.
const OPERATOR: &str = "the config server";
/// Where keys of groups are, below the state directory.
const KEYS_DIR: &str = "keys";
/// After so long it is tried again to do what could not be done.
const AGAIN: Duration = Duration::from_secs(10);

/// What is running, and what it was told.
#[derive(Default)]
struct Running {
    server: Option<Handle>,
    groups: Vec<GroupConfig>,
    digest: String,
    trouble: Option<String>,
}

struct Post {
    config: Config,
    section: ConfigServerSection,
    opener: Opener,
    running: Mutex<Running>,
    /// Groups whose points somebody looks at.
    points_of: Mutex<Vec<GroupId>>,
    /// Held by the proof that goes on.
    proving: tokio::sync::Mutex<()>,
}

/// A running target server of a fleet. Dropping it stops it without waiting.
pub struct FleetTargetServer {
    post: Arc<Post>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl std::fmt::Debug for FleetTargetServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FleetTargetServer")
    }
}

impl FleetTargetServer {
    /// Starts: what was told last is kept at once, and the config server is asked.
    ///
    /// # Errors
    /// When the configuration has no `[config_server]`, the server has not enrolled, or it does not start.
    pub async fn start(config: Config) -> Result<FleetTargetServer, StartError> {
        let missing = || ConfigError::Value("there is no [config_server]".to_owned());
        let section = config.config_server.clone().ok_or_else(missing)?;
        let member = Arc::new(Member::open(section.clone())?);
        let opener = Opener::open(&section.state)?;
        let post = Arc::new(Post {
            config,
            section,
            opener,
            running: Mutex::default(),
            points_of: Mutex::default(),
            proving: tokio::sync::Mutex::default(),
        });
        let told = member.desired().borrow().clone();
        post.act(told).await?;
        let reporting = {
            let (member, post) = (member.clone(), post.clone());
            tokio::spawn(async move { member.run(post).await })
        };
        let acting = tokio::spawn(act(member, post.clone()));
        Ok(FleetTargetServer { post, tasks: vec![reporting, acting] })
    }

    /// Where it listens; `None` while it could not be started anew.
    pub fn local_addr(&self) -> Option<std::net::SocketAddr> {
        self.post.running.lock().server.as_ref().map(Handle::local_addr)
    }

    /// How it is; `None` while it could not be started anew.
    pub fn status(&self) -> Option<control::TargetServerStatus> {
        self.post.running.lock().server.as_ref().map(Handle::status)
    }

    /// Its figures, for Prometheus, as long as it runs.
    pub fn figures(&self) -> impl Fn() -> Values + Send + Sync + use<> {
        let post = self.post.clone();
        move || {
            let status = post.running.lock().server.as_ref().map(Handle::status);
            control::metrics::of_target_server(&status.unwrap_or_default())
        }
    }

    /// Stops, as [`Handle::shutdown`] does.
    pub async fn shutdown(mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        self.post.stop().await;
    }
}

impl Drop for FleetTargetServer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn act(member: Arc<Member>, post: Arc<Post>) {
    let mut desired = member.desired();
    loop {
        let troubled = post.running.lock().trouble.is_some();
        let again = if troubled { AGAIN } else { Duration::from_secs(3600) };
        tokio::select! {
            changed = desired.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(again) => {}
        }
        let told = desired.borrow_and_update().clone();
        if let Err(error) = post.act(told).await {
            let error = error.to_string();
            tracing::error!(error, "act on what the config server says; tried again");
            post.running.lock().trouble = Some(error);
        }
    }
}

impl Post {
    /// Brings what runs to what is told. New groups are taken up without a pause; where a group has gone or is kept in another
    /// way the server starts anew, which process servers see as a short absence.
    async fn act(&self, told: Option<(String, Desired)>) -> Result<(), StartError> {
        let (digest, kept) = match told {
            None => (String::new(), Vec::new()),
            Some((digest, Desired::TargetServer(desired))) => (digest, desired.groups),
            Some(_) => {
                let reason = "the config server takes this target server for something else".to_owned();
                return Err(ConfigError::Value(reason).into());
            }
        };
        let groups: Vec<GroupConfig> =
            kept.iter().map(|group| self.group(group)).collect::<Result<_, StartError>>()?;
        let added = {
            let running = self.running.lock();
            match &running.server {
                Some(_) if running.digest == digest && running.trouble.is_none() => return Ok(()),
                Some(server) if running.groups.iter().all(|before| groups.contains(before)) => {
                    Some(server.adder())
                }
                _ => None,
            }
        };
        match added {
            Some(adder) => adder.add(groups.clone()).await?,
            None => {
                self.stop().await;
                let config = Config { groups: groups.clone(), ..self.config.clone() };
                let server = TargetServer::start(config).await?;
                self.running.lock().server = Some(server);
            }
        }
        let mut running = self.running.lock();
        (running.groups, running.digest, running.trouble) = (groups, digest, None);
        Ok(())
    }

    /// A group's configuration. Its key is opened, and kept in a file as that of any other group.
    fn group(&self, kept: &KeptGroup) -> Result<GroupConfig, StartError> {
        let policy = kept.retention.parse().map_err(|error| {
            ConfigError::Value(format!("keep group {} as the config server says: {error}", kept.id))
        })?;
        let own = self.config.groups.iter().find(|own| own.id == kept.id);
        let devices = match kept.adopt.as_slice() {
            [] => own.map(|own| own.devices.clone()).unwrap_or_default(),
            adopted => {
                adopted.iter().map(|volume| self.adopted(kept.id, volume)).collect::<Result<_, _>>()?
            }
        };
        Ok(GroupConfig {
            id: kept.id,
            key: self.key_file(kept.id, &kept.sealed_key)?,
            retention: RetentionConfig {
                policy: Some(policy),
                space_max: kept.space_bytes_max.map(ByteCount),
                ..RetentionConfig::default()
            },
            adopt_generation: None,
            // What concerns this machine only is in its own file.
            upkeep: own.map(|own| own.upkeep.clone()).unwrap_or_default(),
            devices,
        })
    }

    /// A disk that comes home. What is on it will be overwritten, so this machine's own configuration must allow it.
    fn adopted(&self, group: GroupId, volume: &AdoptedVolume) -> Result<DeviceConfig, ConfigError> {
        let device = PathBuf::from(&volume.device);
        // Whatever link names it.
        let same = |path: &PathBuf| {
            *path == device
                || path
                    .canonicalize()
                    .ok()
                    .is_some_and(|path| device.canonicalize().is_ok_and(|other| path == other))
        };
        if !self.config.adoptable_devices.iter().any(same) {
            return Err(ConfigError::Value(format!(
                "the config server asks to adopt {} for volume {} of group {group}, which this target server's own configuration does \
                 not allow; name it there, adoptable_devices = [{:?}], and start it again",
                volume.device, volume.name, volume.device
            )));
        }
        Ok(DeviceConfig { name: volume.name.clone(), device, adopt: true })
    }

    fn key_file(&self, group: GroupId, sealed: &str) -> Result<PathBuf, StartError> {
        let dir = self.section.state.join(KEYS_DIR);
        let path = dir.join(format!("{group}.key"));
        let text = zeroize::Zeroizing::new(format!("{}\n", *self.opener.open_key(group, sealed)?));
        let same = std::fs::read_to_string(&path).is_ok_and(|there| zeroize::Zeroizing::new(there) == text);
        if !same {
            let failed = |source| ConfigError::Write { path: path.clone(), source };
            RealStorage.create_dir_all(&dir).map_err(failed)?;
            durable::replace(&RealStorage, &path, text.as_bytes()).map_err(failed)?;
        }
        Ok(path)
    }

    async fn stop(&self) {
        let server = self.running.lock().server.take();
        if let Some(server) = server {
            server.shutdown().await;
        }
    }
}

/// Room on the file system of the replicas, or of where their directory will be made with the first group.
fn capacity(data: &Path) -> Option<Capacity> {
    let found = data.ancestors().find_map(|place| rustix::fs::statvfs(place).ok())?;
    Some(Capacity {
        bytes_total: found.f_frsize * found.f_blocks,
        bytes_free: found.f_frsize * found.f_bavail,
    })
}

impl Charge for Post {
    fn report(&self) -> CheckIn {
        let running = self.running.lock();
        let status = running.server.as_ref().map(Handle::status);
        let local = running.server.as_ref().map(|server| server.local_addr().to_string());
        let (digest, trouble) = (running.digest.clone(), running.trouble.clone());
        let points_of = self.points_of.lock().clone();
        let points = running.server.as_ref().map_or_else(Vec::new, |server| server.points_shown(&points_of));
        drop(running);
        CheckIn {
            version: env!("CARGO_PKG_VERSION").into(),
            address: self.section.advertise.clone().or(local),
            sealing_key: Some(self.opener.public_key()),
            digest,
            trouble,
            report: status.map(PartReport::TargetServer),
            capacity: capacity(&self.config.data),
            points,
            // People fail over, and wait for it.
            patient: true,
            ..CheckIn::default()
        }
    }

    fn hear(&self, reply: &CheckInReply) {
        let asked = reply.points_of.iter().copied().take(POINT_LISTS_MAX).collect();
        *self.points_of.lock() = asked;
    }

    fn begin(self: Arc<Self>, task: Task, done: TaskDone) {
        tokio::spawn(task::perform(self, task.kind, done));
    }
}
