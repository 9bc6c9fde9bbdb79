//! An agent of a fleet: what it protects is told by the config server, and acted on whether that runs or not.
//!
//! Its configuration file has `[config_server]` in place of a group and volumes. What else it says under `[agent]`,
//! `[limits]` and `[application]` holds on this machine; where a policy says something, the policy counts.

mod churn;
mod disks;
mod guests;
mod script;
mod task;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use control::fleet::{
    CheckIn, Desired, DesiredAgent, DiskInfo, GuestInfo, PartReport, Policy, Protection, Task,
};
use control::metrics::{Values, of_agent};
use control::{AgentReport, StateCode};
use durable::RealStorage;
use enrol::{Charge, ConfigServerSection, Member, TaskDone};
use parking_lot::Mutex;
use toml::{Table, Value};

use crate::{Agent, AgentConfig};
use churn::Churn;
use script::ScriptsSection;

/// The file with the group's key, in the state directory.
const GROUP_KEY_FILE: &str = "group.key";
/// The file with the group whose disks the kernel follows for this agent, in the state directory; absent: none.
const FOLLOWED_FILE: &str = "followed-group";
/// After so long it is tried again to do what could not be done.
const AGAIN: Duration = Duration::from_secs(10);
/// How often it is looked how much was written to disks.
const COUNT_WRITES_EVERY: Duration = Duration::from_secs(10);
/// Every so many of these it is looked which disks and guests there are.
const COUNTS_BETWEEN_LOOKS: u64 = 6;

/// What an agent of a fleet is told by its own file.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// Where the config server is.
    pub config_server: ConfigServerSection,
    /// Scripts that plans may run here; none when the file says nothing.
    scripts: Option<ScriptsSection>,
    file: PathBuf,
    local: Table,
}

impl FleetConfig {
    /// Reads a configuration file; `None` when it has no `[config_server]`, and is an [`AgentConfig`].
    ///
    /// # Errors
    /// When it cannot be read, or its table makes no sense.
    pub fn load(path: &Path) -> anyhow::Result<Option<FleetConfig>> {
        let reading = || format!("read configuration {}", path.display());
        let text = std::fs::read_to_string(path).with_context(reading)?;
        let mut local: Table = toml::from_str(&text).with_context(reading)?;
        let Some(section) = local.remove("config_server") else { return Ok(None) };
        let mut config_server: ConfigServerSection = section.try_into().with_context(reading)?;
        let base = path.parent().unwrap_or(Path::new(""));
        config_server.state = std::path::absolute(base.join(&config_server.state)).with_context(reading)?;
        let scripts: Option<ScriptsSection> =
            local.remove("scripts").map(toml::Value::try_into).transpose().with_context(reading)?;
        if let Some(scripts) = &scripts {
            scripts.check().with_context(reading)?;
        }
        let config = FleetConfig { config_server, scripts, file: path.to_owned(), local };
        // What the file says beside must make sense with any policy.
        config.with(&config.example()).with_context(reading)?;
        Ok(Some(config))
    }

    fn example(&self) -> Protection {
        Protection {
            group: block::GroupId([0; 16]),
            generation: block::Generation(1),
            process_server: "localhost:1".into(),
            volumes: vec![control::fleet::ProtectedVolume { name: "x".into(), device: "/dev/x".into() }],
            policy: Policy::default(),
        }
    }

    fn key_file(&self) -> PathBuf {
        self.config_server.state.join(GROUP_KEY_FILE)
    }

    fn followed_file(&self) -> PathBuf {
        self.config_server.state.join(FOLLOWED_FILE)
    }

    /// The group whose disks the kernel may follow for this agent. Other agents of this machine have others.
    fn followed(&self) -> anyhow::Result<Option<block::GroupId>> {
        let path = self.followed_file();
        let reading = || format!("read which group is followed, in {}", path.display());
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(reading),
        };
        Ok(Some(text.trim().parse().map_err(|error| anyhow::anyhow!("{error}")).with_context(reading)?))
    }

    /// Noted before the kernel follows anything (else nobody could end that after a crash).
    fn note_followed(&self, group: block::GroupId) -> anyhow::Result<()> {
        let path = self.followed_file();
        durable::replace(&RealStorage, &path, format!("{group}\n").as_bytes())
            .with_context(|| format!("note which group is followed, in {}", path.display()))
    }

    /// Ends what the kernel follows for this agent, which must not protect anything; whether there was something.
    ///
    /// # Errors
    /// When it cannot be ended, or the note of it not be read or removed.
    pub fn detach(&self) -> anyhow::Result<bool> {
        let Some(group) = self.followed()? else { return Ok(false) };
        let folder = self.with(&self.example())?.agent.tracking_folder;
        let ended = capture::detach(&folder, Some(&group.to_string()))?;
        let path = self.followed_file();
        // Last, so that it is tried again after an error.
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        Ok(ended > 0)
    }

    /// The agent's configuration for what it is to protect.
    pub(crate) fn with(&self, protection: &Protection) -> anyhow::Result<AgentConfig> {
        let mut table = self.local.clone();
        let policy = &protection.policy;
        let state = &self.config_server.state;
        let path = |path: PathBuf| Value::from(path.to_string_lossy().into_owned());
        let number = |value: u64| Value::from(i64::try_from(value).unwrap_or(i64::MAX));
        let size = |bytes: u64| Value::from(format!("{bytes}B"));

        let agent = section(&mut table, "agent")?;
        agent.insert("group".into(), protection.group.to_string().into());
        agent.insert("generation".into(), number(protection.generation.0));
        agent.insert("group_key".into(), path(self.key_file()));
        agent.insert("credentials".into(), path(state.join(enrol::CURRENT)));
        agent.insert("process_server".into(), protection.process_server.clone().into());
        agent.insert("epoch_interval_ms".into(), number(policy.epoch_interval_ms));
        agent.entry("disks_file").or_insert_with(|| path(state.join("protected-disks")));
        if let Some(bytes) = policy.ring_bytes {
            agent.insert("ring_bytes".into(), size(bytes));
        }
        if let Some(bytes) = policy.epoch_memory_bytes {
            agent.insert("epoch_memory_bytes".into(), size(bytes));
        }

        let application = section(&mut table, "application")?;
        application.insert("every_s".into(), number(policy.application_every_s));
        let consistency = if policy.application_filesystem_only { "filesystem" } else { "application" };
        application.insert("consistency".into(), consistency.into());

        let limits = section(&mut table, "limits")?;
        if let Some(percent) = policy.cpu_percent {
            limits.insert("cpu_percent".into(), number(percent.into()));
        }
        if policy.bandwidth_bytes_s.is_some() || !policy.bandwidth_windows.is_empty() {
            for key in ["bandwidth_bytes_s", "time_zone", "schedule"] {
                limits.remove(key);
            }
            if let Some(bytes) = policy.bandwidth_bytes_s {
                limits.insert("bandwidth_bytes_s".into(), size(bytes));
            }
            if let Some(zone) = &policy.time_zone {
                limits.insert("time_zone".into(), zone.clone().into());
            }
            let windows = policy.bandwidth_windows.iter().map(|window| {
                let mut table = Table::new();
                let days: Vec<Value> = window.days.iter().map(|day| day.clone().into()).collect();
                table.insert("days".into(), days.into());
                table.insert("from".into(), window.from.clone().into());
                table.insert("to".into(), window.to.clone().into());
                if let Some(bytes) = window.bandwidth_bytes_s {
                    table.insert("bandwidth_bytes_s".into(), size(bytes));
                }
                Value::from(table)
            });
            limits.insert("schedule".into(), windows.collect::<Vec<_>>().into());
        }

        if let Some(windows) = &policy.resync_windows {
            let resync = section(&mut table, "resync")?;
            resync.remove("time_zone");
            if let Some(zone) = &policy.time_zone {
                resync.insert("time_zone".into(), zone.clone().into());
            }
            let windows = windows.iter().map(|hours| {
                let mut table = Table::new();
                let days: Vec<Value> = hours.days.iter().map(|day| day.clone().into()).collect();
                table.insert("days".into(), days.into());
                table.insert("from".into(), hours.from.clone().into());
                table.insert("to".into(), hours.to.clone().into());
                Value::from(table)
            });
            resync.insert("window".into(), windows.collect::<Vec<_>>().into());
        }

        let volumes = protection.volumes.iter().map(|volume| {
            let mut table = Table::new();
            table.insert("name".into(), volume.name.clone().into());
            table.insert("device".into(), volume.device.clone().into());
            Value::from(table)
        });
        table.insert("volume".into(), volumes.collect::<Vec<_>>().into());
        Ok(AgentConfig::parse(
            &toml::to_string(&table).context("write the agent's configuration")?,
            &self.file,
        )?)
    }
}

fn section<'a>(table: &'a mut Table, name: &str) -> anyhow::Result<&'a mut Table> {
    let entry = table.entry(name).or_insert_with(|| Table::new().into());
    entry.as_table_mut().with_context(|| format!("{name} is not a table"))
}

/// What is running, and what it was told.
#[derive(Default)]
struct Running {
    agent: Option<Agent>,
    protection: Option<Protection>,
    digest: String,
    trouble: Option<String>,
}

struct Post {
    config: FleetConfig,
    running: Mutex<Running>,
    disks: Mutex<Vec<DiskInfo>>,
    guests: Mutex<Option<Vec<GuestInfo>>>,
}

/// A running agent of a fleet. Dropping it stops it; the kernel goes on tracking.
pub struct FleetAgent {
    post: Arc<Post>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl FleetAgent {
    /// Starts: what was told last goes on at once, and the config server is asked. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the machine has not enrolled, or its files cannot be read.
    pub fn start(config: FleetConfig) -> anyhow::Result<FleetAgent> {
        let member = Arc::new(Member::open(config.config_server.clone())?);
        let post = Arc::new(Post {
            config,
            running: Mutex::default(),
            disks: Mutex::default(),
            guests: Mutex::default(),
        });
        let reporting = {
            let (member, post) = (member.clone(), post.clone());
            tokio::spawn(async move { member.run(post).await })
        };
        let acting = tokio::spawn(act(member, post.clone()));
        let looking = tokio::spawn(look_for_disks(post.clone()));
        Ok(FleetAgent { post, tasks: vec![reporting, acting, looking] })
    }

    /// How it is; `None` while it protects nothing.
    pub fn report(&self) -> Option<AgentReport> {
        self.post.running.lock().agent.as_ref().map(Agent::report)
    }

    /// Its figures, for Prometheus.
    pub fn figures(&self) -> impl Fn() -> Values + Send + Sync + use<> {
        let post = self.post.clone();
        move || {
            let running = post.running.lock();
            let group = running.protection.as_ref().map(|protection| protection.group.to_string());
            let report = running.agent.as_ref().map(Agent::report);
            of_agent(group.as_deref().filter(|_| report.is_some()), &report.unwrap_or_default())
        }
    }

    /// Stops capture and delivery. What was not delivered is read again from the disks at the next start.
    pub async fn shutdown(mut self) {
        self.end();
        let post = self.post.clone();
        // A panic in there has reported itself.
        let _ = tokio::task::spawn_blocking(move || post.stop()).await;
    }

    fn end(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
        }
    }
}

impl Drop for FleetAgent {
    fn drop(&mut self) {
        self.end();
    }
}

/// Acts on what is told, and starts anew when there are other credentials.
async fn act(member: Arc<Member>, post: Arc<Post>) {
    let (mut desired, mut renewed) = (member.desired(), member.renewed());
    loop {
        let told = desired.borrow_and_update().clone();
        renewed.mark_unchanged();
        if let Some((digest, told)) = told {
            let post = post.clone();
            // Opening disks and reading maps takes a while.
            let acted = tokio::task::spawn_blocking(move || post.act(digest, told)).await;
            if let Err(error) = acted {
                tracing::error!(%error, "act on what the config server says; tried again");
            }
        }
        let again = async {
            match post.running.lock().trouble.is_some() {
                true => AGAIN,
                false => Duration::from_secs(3600),
            }
        };
        let again = again.await;
        tokio::select! {
            changed = desired.changed() => if changed.is_err() { return },
            changed = renewed.changed() => {
                if changed.is_err() {
                    return;
                }
                tracing::info!("starting anew with the new certificate");
                post.running.lock().digest.clear();
            }
            () = tokio::time::sleep(again) => {}
        }
    }
}

async fn look_for_disks(post: Arc<Post>) {
    let mut churn = Churn::default();
    for look in 0u64.. {
        if look % COUNTS_BETWEEN_LOOKS == 0 {
            match tokio::task::spawn_blocking(|| (disks::disks(), guests::guests())).await {
                Ok((found, guests)) => {
                    match found {
                        Ok(found) => *post.disks.lock() = found,
                        Err(error) => {
                            tracing::warn!(error = format!("{error:#}"), "look which disks there are")
                        }
                    }
                    match guests {
                        Ok(guests) => *post.guests.lock() = guests,
                        Err(error) => {
                            tracing::warn!(error = format!("{error:#}"), "look which guests there are")
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "look which disks there are"),
            }
        }
        churn.count(&mut post.disks.lock(), Path::new("/sys/block"), Instant::now());
        tokio::time::sleep(COUNT_WRITES_EVERY).await;
    }
}

impl Post {
    /// Brings what runs to what is told. What cannot be done is kept as trouble, and what ran before goes on where it can.
    fn act(&self, digest: String, told: Desired) {
        if self.running.lock().digest == digest {
            return;
        }
        let Desired::Agent(DesiredAgent { protection }) = told else {
            self.running.lock().trouble = Some("the config server takes this agent for a server".into());
            return;
        };
        let acted = match protection {
            None => self.end_protection(),
            Some(protection) => self.protect(*protection),
        };
        let mut running = self.running.lock();
        match acted {
            Ok(()) => {
                running.digest = digest;
                running.trouble = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "act on what the config server says; tried again");
                running.trouble = Some(error);
            }
        }
    }

    fn protect(&self, protection: Protection) -> anyhow::Result<()> {
        // Whether it can be read is found before anything is stopped.
        let config = self.config.with(&protection)?;
        self.stop();
        let group = protection.group;
        if self.config.followed()?.is_some_and(|followed| followed != group) {
            self.config.detach()?;
        }
        self.config.note_followed(group)?;
        let agent = Agent::start(config)?;
        tracing::info!(volumes = protection.volumes.len(), "protecting, as the config server says");
        let mut running = self.running.lock();
        running.agent = Some(agent);
        running.protection = Some(protection);
        Ok(())
    }

    /// Nothing is captured any more, by the kernel either.
    fn end_protection(&self) -> anyhow::Result<()> {
        self.stop();
        self.running.lock().protection = None;
        if self.config.detach()? {
            tracing::info!("nothing is protected: the kernel follows no disk any more");
        }
        Ok(())
    }

    fn stop(&self) {
        let agent = self.running.lock().agent.take();
        if let Some(agent) = agent {
            agent.shutdown();
        }
    }
}

impl Charge for Post {
    fn report(&self) -> CheckIn {
        let running = self.running.lock();
        let mut said = CheckIn {
            version: env!("CARGO_PKG_VERSION").into(),
            digest: running.digest.clone(),
            trouble: running.trouble.clone(),
            report: running.agent.as_ref().map(|agent| PartReport::Agent(Box::new(agent.report()))),
            ..CheckIn::default()
        };
        drop(running);
        if let Some(PartReport::Agent(report)) = &mut said.report
            && report.state == StateCode::Unknown
        {
            report.state = StateCode::Starting;
        }
        let disks = self.disks.lock().clone();
        said.disks = (!disks.is_empty()).then_some(disks);
        said.guests = self.guests.lock().clone();
        said
    }

    fn begin(self: Arc<Self>, task: Task, done: TaskDone) {
        tokio::spawn(async move { task::perform(&self, task, done).await });
    }
}

#[cfg(test)]
mod tests {
    use block::ByteCount;
    use control::fleet::BandwidthWindow;

    use super::*;

    fn load(text: &str) -> anyhow::Result<Option<FleetConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        FleetConfig::load(&path)
    }

    const FILE: &str =
        "[config_server]\nurl = \"https://c.example\"\nstate = \"state\"\n[agent]\nsource = \"scan\"\n";

    #[test]
    fn the_policy_counts_where_it_says_something_and_the_file_elsewhere() {
        assert!(load("[agent]\n").unwrap().is_none());
        let text = format!(
            "{FILE}drain_share_percent = 7\n[limits]\nbandwidth_bytes_s = \"1MiB\"\ncpu_percent = 50\n"
        );
        let config = load(&text).unwrap().unwrap();
        let mut protection = config.example();
        let made = config.with(&protection).unwrap();
        assert_eq!(made.agent.drain_share_percent, 7);
        assert_eq!(made.limits.bandwidth_bytes_s, Some(ByteCount::mib(1)));
        protection.policy = Policy {
            epoch_interval_ms: 5000,
            application_every_s: 600,
            application_filesystem_only: true,
            bandwidth_windows: vec![BandwidthWindow {
                days: vec!["mon".into()],
                from: "08:00".into(),
                to: "18:00".into(),
                bandwidth_bytes_s: Some(1 << 20),
            }],
            time_zone: Some("UTC".into()),
            ring_bytes: Some(1 << 26),
            ..Policy::default()
        };
        let made = config.with(&protection).unwrap();
        assert_eq!((made.agent.epoch_interval_ms, made.agent.ring_bytes), (5000, ByteCount::mib(64)));
        assert_eq!(
            (made.application.every_s, made.application.consistency),
            (600, block::Consistency::Filesystem)
        );
        assert_eq!((made.limits.bandwidth_bytes_s, made.limits.cpu_percent), (None, Some(50)));
        assert_eq!(made.limits.schedule.len(), 1);
        assert_eq!(made.resync.window.len(), 2, "as without a policy");
        protection.policy.resync_windows = Some(vec!["sat sun 02:00-03:00".parse().unwrap()]);
        let resync = config.with(&protection).unwrap().resync;
        assert_eq!((resync.window.len(), resync.window[0].days.len()), (1, 2));
        assert_eq!((resync.time_zone.as_deref(), resync.dirty_percent), (Some("UTC"), 50));
        protection.policy.resync_windows = Some(Vec::new());
        assert!(config.with(&protection).unwrap().resync.window.is_empty(), "at any time");
        assert!(made.agent.group_key.ends_with("state/group.key"));
    }

    #[test]
    fn what_is_wrong_in_the_file_is_named() {
        for (text, named) in [
            (FILE.replace("https", "http"), "https://HOST"),
            (FILE.replace("state =", "sate ="), "sate"),
            (FILE.replace("source", "sauce"), "sauce"),
            (FILE.replace("\"scan\"", "\"magic\""), "magic"),
            (format!("{FILE}[scripts]\ndirectory = \"scripts\"\n"), "a whole path"),
            (format!("{FILE}[scripts]\nfolder = \"/x\"\n"), "folder"),
        ] {
            let error = format!("{:#}", load(&text).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }

    /// On one machine there may be other agents, and tests, whose tracking lies in the same folder.
    #[test]
    fn what_others_follow_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let others = dir.path().join("tracking/0123/1");
        std::fs::create_dir_all(&others).unwrap();
        std::fs::write(others.join("link_on_issue"), "").unwrap();
        let file = dir.path().join("agent.toml");
        let text = format!(
            "[config_server]\nurl = \"https://localhost:1\"\nstate = \".\"\n[agent]\ntracking_folder = \"{}\"\n",
            dir.path().join("tracking").display()
        );
        std::fs::write(&file, text).unwrap();
        let config = FleetConfig::load(&file).unwrap().unwrap();
        assert_eq!(config.followed().unwrap(), None);
        assert!(!config.detach().unwrap());
        assert!(others.join("link_on_issue").exists());

        let group = block::GroupId([7; 16]);
        config.note_followed(group).unwrap();
        assert_eq!(config.followed().unwrap(), Some(group));
        std::fs::write(config.followed_file(), "not a group").unwrap();
        let error = format!("{:#}", config.detach().unwrap_err());
        assert!(error.contains(FOLLOWED_FILE), "{error}");
        assert!(others.join("link_on_issue").exists());
    }
}
