//! A process server of a fleet: which groups it accepts, and where they go, is told by the config server, and acted on whether
//! that runs or not.

use std::sync::Arc;
use std::time::Duration;

use control::fleet::{Capacity, CheckIn, Desired, PartReport, Task};
use control::metrics::Values;
use enrol::{Charge, ConfigServerSection, Member, TaskDone};
use parking_lot::Mutex;

use crate::config::{Config, ConfigError, GroupConfig};
use crate::server::{Handle, ProcessServer, StartError};

/// After so long it is tried again to do what could not be done.
const AGAIN: Duration = Duration::from_secs(10);

/// What is running, and what it was told.
#[derive(Default)]
struct Running {
    server: Option<Handle>,
    digest: String,
    trouble: Option<String>,
}

struct Post {
    config: Config,
    section: ConfigServerSection,
    running: Mutex<Running>,
}

/// A running process server of a fleet. Dropping it stops it without waiting.
pub struct FleetProcessServer {
    post: Arc<Post>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl std::fmt::Debug for FleetProcessServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FleetProcessServer")
    }
}

impl FleetProcessServer {
    /// Starts: what was told last is served at once, and the config server is asked.
    ///
    /// # Errors
    /// When the configuration has no `[config_server]`, the server has not enrolled, or it does not start.
    pub async fn start(config: Config) -> Result<FleetProcessServer, StartError> {
        let missing = || ConfigError::Value("there is no [config_server]".to_owned());
        let section = config.config_server.clone().ok_or_else(missing)?;
        let member = Arc::new(Member::open(section.clone())?);
        let post = Arc::new(Post { config, section, running: Mutex::default() });
        let told = member.desired().borrow().clone();
        post.act(told).await?;
        let reporting = {
            let (member, post) = (member.clone(), post.clone());
            tokio::spawn(async move { member.run(post).await })
        };
        let acting = tokio::spawn(act(member, post.clone()));
        Ok(FleetProcessServer { post, tasks: vec![reporting, acting] })
    }

    /// Where it listens; `None` while it could not be started anew.
    pub fn local_addr(&self) -> Option<std::net::SocketAddr> {
        self.post.running.lock().server.as_ref().map(Handle::local_addr)
    }

    /// Its figures, for Prometheus, as long as it runs.
    pub fn figures(&self) -> impl Fn() -> Values + Send + Sync + use<> {
        let post = self.post.clone();
        move || {
            let status = post.running.lock().server.as_ref().map(Handle::status);
            control::metrics::of_process_server(&status.unwrap_or_default())
        }
    }

    /// Stops, as [`Handle::shutdown`] does.
    ///
    /// # Errors
    /// As [`Handle::shutdown`].
    pub async fn shutdown(mut self) -> Result<(), cache::CacheError> {
        for task in self.tasks.drain(..) {
            task.abort();
        }
        let server = self.post.running.lock().server.take();
        match server {
            Some(server) => server.shutdown().await,
            None => Ok(()),
        }
    }
}

impl Drop for FleetProcessServer {
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
    /// Brings what runs to what is told. New groups are taken up without a pause; where a group's targets have changed the
    /// server starts anew, which agents see as a short absence.
    async fn act(&self, told: Option<(String, Desired)>) -> Result<(), StartError> {
        let (digest, groups) = match told {
            None => (String::new(), Vec::new()),
            Some((digest, Desired::ProcessServer(desired))) => (digest, desired.groups),
            Some(_) => {
                let reason = "the config server takes this process server for something else".to_owned();
                return Err(ConfigError::Value(reason).into());
            }
        };
        let groups: Vec<GroupConfig> =
            groups.into_iter().map(|group| GroupConfig { id: group.id, targets: group.targets }).collect();
        let changed = {
            let running = self.running.lock();
            match &running.server {
                Some(_) if running.digest == digest && running.trouble.is_none() => return Ok(()),
                Some(server) => server.set_groups(groups.clone())?,
                None => false,
            }
        };
        if !changed {
            self.stop().await;
            let server = ProcessServer::start(Config { groups, ..self.config.clone() }).await?;
            self.running.lock().server = Some(server);
        }
        let mut running = self.running.lock();
        running.digest = digest;
        running.trouble = None;
        Ok(())
    }

    async fn stop(&self) {
        let server = self.running.lock().server.take();
        if let Some(server) = server
            && let Err(error) = server.shutdown().await
        {
            tracing::error!(%error, "close the cache");
        }
    }
}

impl Charge for Post {
    fn report(&self) -> CheckIn {
        let running = self.running.lock();
        let status = running.server.as_ref().map(Handle::status);
        let local = running.server.as_ref().map(|server| server.local_addr().to_string());
        let (digest, trouble) = (running.digest.clone(), running.trouble.clone());
        drop(running);
        let capacity = status.as_ref().map(|status| Capacity {
            bytes_total: status.cache_limit.get(),
            bytes_free: status.cache_limit.get().saturating_sub(status.cache_used.get()),
        });
        let status = status.map(|mut status| {
            // Agents say themselves how they are.
            for group in &mut status.groups {
                group.report = None;
            }
            PartReport::ProcessServer(status)
        });
        CheckIn {
            version: env!("CARGO_PKG_VERSION").into(),
            address: self.section.advertise.clone().or(local),
            digest,
            trouble,
            report: status,
            capacity,
            ..CheckIn::default()
        }
    }

    fn begin(self: Arc<Self>, _: Task, done: TaskDone) {
        tokio::spawn(done.failed("a process server has no tasks"));
    }
}
