//! The one place that waits for connections, and starts and stops everything.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use block::{GroupId, UnixNanos};
use control::metrics::Values;
use control::{StateCode, TargetServerStatus};
use durable::RealStorage;
use parking_lot::RwLock;
use replica::{ReplicaError, Report};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use wire::{CredentialsError, Listener, LiveCredentials, Opening, Pending, Role, WireError};

use crate::config::{ConfigError, GroupConfig};
use crate::export::Exports;
use crate::group::Group;
use crate::upkeep::Upkeep;
use crate::{Config, VIEWS_MAX, compare, delivery, operate, retain};

/// Why a target server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The credentials cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The credentials are another part's.
    #[error(
        "use the credentials in {path}: they are of a {role}, expected a {expected}; issue the right ones"
    )]
    Role {
        /// Where they lie.
        path: std::path::PathBuf,
        /// Whose they are.
        role: Role,
        /// Whose they must be.
        expected: Role,
    },
    /// The server has not enrolled, or what it keeps of its fleet cannot be read.
    #[error(transparent)]
    Fleet(#[from] enrol::EnrolError),
    /// The port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] WireError),
    /// A replica could not be looked at because the process is short of something.
    #[error("open replicas: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// How long to wait when the port failed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What all connections share.
pub(crate) struct Server {
    name: String,
    groups: RwLock<BTreeMap<GroupId, Arc<Group>>>,
    data: PathBuf,
    pub(crate) threads: usize,
    pub(crate) views: Semaphore,
    pub(crate) exports: Exports,
    stopping: watch::Receiver<bool>,
}

impl Server {
    pub(crate) fn group(&self, id: GroupId) -> Option<Arc<Group>> {
        self.groups.read().get(&id).cloned()
    }

    pub(crate) fn groups(&self) -> Vec<Arc<Group>> {
        self.groups.read().values().cloned().collect()
    }

    /// Waits until the server is to stop.
    pub(crate) async fn stopping(&self) {
        // An error means that the handle was dropped, which stops as well.
        let _ = self.stopping.clone().wait_for(|stopping| *stopping).await;
    }

    pub(crate) fn status(&self) -> TargetServerStatus {
        let groups: Vec<_> = self.groups().iter().map(|group| group.status()).collect();
        let worst = groups.iter().max_by_key(|group| group.state.severity());
        let state = match *self.stopping.borrow() {
            true => StateCode::Stopping,
            false => worst.map_or(StateCode::Idle, |group| group.state),
        };
        TargetServerStatus {
            time: UnixNanos::now(),
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state,
            last_error: worst.and_then(|group| group.last_error.clone()),
            groups,
            exports: self.exports.list(),
        }
    }
}

/// A target server.
#[derive(Debug)]
pub struct TargetServer;

/// A running target server. Dropping it stops the server without waiting.
pub struct Handle {
    server: Arc<Server>,
    local: SocketAddr,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("local", &self.local).finish_non_exhaustive()
    }
}

impl TargetServer {
    /// Opens the replicas, repairing what a crash left, and listens. A group whose replica does not open is not
    /// served and says why; the others are.
    ///
    /// # Errors
    /// When configuration, credentials, keys or devices cannot be used, or the port cannot be listened on.
    pub async fn start(config: Config) -> Result<Handle, StartError> {
        config.check()?;
        let credentials = Arc::new(load_credentials(&config)?);
        let name = credentials.current().identity().name.clone();
        let (listen, threads, data) = (config.listen.clone(), config.threads, config.data.clone());
        let groups = tokio::task::spawn_blocking(move || open_groups(&config)).await??;
        let listener = Listener::bind_live(&listen, credentials.clone()).await?;
        let local = listener.local_addr();
        let exports = Exports::new(credentials, local.ip());
        let (stop, stopping) = watch::channel(false);
        tracing::info!(%local, name, groups = groups.len(), "target server listens");
        let (groups, views) = (RwLock::new(groups), Semaphore::new(VIEWS_MAX));
        let server = Arc::new(Server { name, groups, data, threads, views, exports, stopping });
        let accepting = tokio::spawn(accept(server.clone(), listener));
        Ok(Handle { server, local, stop, accepting })
    }

    /// Looks at everything that a start needs, without starting: values, credentials, keys, devices.
    ///
    /// # Errors
    /// What a start would answer.
    pub fn check(config: &Config) -> Result<(), StartError> {
        config.check()?;
        load_credentials(config)?;
        for group in &config.groups {
            group.load_key()?;
        }
        let claims: Result<Vec<_>, _> = config.groups.iter().map(|group| group.claim_devices()).collect();
        claims?;
        Ok(())
    }
}

/// Checks the files of one group's replica. The server must not run.
///
/// # Errors
/// When the files cannot be read, or the server has them open.
pub fn verify(data: &Path, group: GroupId) -> Result<Report, ReplicaError> {
    replica::verify(&RealStorage, &data.join(group.to_string()))
}

fn load_credentials(config: &Config) -> Result<LiveCredentials, StartError> {
    let credentials = LiveCredentials::load(&config.credentials)?;
    let (role, expected) = (credentials.current().identity().role, Role::TargetServer);
    if role != expected {
        return Err(StartError::Role { path: config.credentials.clone(), role, expected });
    }
    Ok(credentials)
}

fn open_groups(config: &Config) -> Result<BTreeMap<GroupId, Arc<Group>>, ConfigError> {
    let open = |group| Group::open(group, &config.data).map(|group| (group.id, Arc::new(group)));
    config.groups.iter().map(open).collect()
}

impl Handle {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// How it is.
    pub fn status(&self) -> TargetServerStatus {
        self.server.status()
    }

    /// Its figures, for Prometheus; none when it has stopped.
    pub fn figures(&self) -> impl Fn() -> Values + Send + Sync + use<> {
        let server = Arc::downgrade(&self.server);
        move || {
            let status = server.upgrade().map(|server| server.status());
            status.as_ref().map_or_else(Values::default, control::metrics::of_target_server)
        }
    }

    /// Some recovery points of each of these groups, as [`retain::points_shown`] chooses them; of groups that are not here, none.
    pub(crate) fn points_shown(&self, groups: &[block::GroupId]) -> Vec<control::GroupPoints> {
        groups.iter().filter_map(|group| retain::points_shown(&self.server, *group)).collect()
    }

    /// For work that goes on until the server stops.
    pub(crate) fn shared(&self) -> Arc<Server> {
        self.server.clone()
    }

    /// What leads groups through failovers.
    pub(crate) fn failovers(&self) -> crate::fleet::task::Failovers {
        crate::fleet::task::Failovers { server: self.server.clone() }
    }

    /// What takes up more groups while the server runs.
    pub(crate) fn adder(&self) -> Adder {
        Adder { server: self.server.clone() }
    }

    /// Stops: no new connections, deliveries and views are refused as stopping, what is being applied is finished.
    /// When this returns, nothing of the server runs any more and the replicas are closed.
    pub async fn shutdown(self) {
        let Handle { server, stop, accepting, .. } = self;
        stop.send_replace(true);
        server.groups().iter().filter_map(|group| group.upkeep.as_ref()).for_each(Upkeep::stop);
        if let Err(error) = accepting.await {
            tracing::error!(%error, "stop accepting");
        }
        // Waits for work in the background, which ends soon.
        let ended = tokio::task::spawn_blocking(move || drop(server)).await;
        if let Err(error) = ended {
            tracing::error!(%error, "close the replicas");
        }
    }
}

/// Takes up groups while the server runs.
pub(crate) struct Adder {
    server: Arc<Server>,
}

impl Adder {
    /// Opens those that are not kept yet.
    pub(crate) async fn add(self, groups: Vec<GroupConfig>) -> Result<(), StartError> {
        let opened = tokio::task::spawn_blocking(move || -> Result<(), ConfigError> {
            let server = self.server;
            for config in groups.iter().filter(|config| server.group(config.id).is_none()) {
                let group = Group::open(config, &server.data)?;
                server.groups.write().insert(group.id, Arc::new(group));
            }
            Ok(())
        });
        Ok(opened.await??)
    }
}

/// Accepts connections until the server is to stop, and then waits until all have ended.
async fn accept(server: Arc<Server>, listener: Listener) {
    let mut stopping = pin!(server.stopping());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = &mut stopping => break,
            pending = listener.accept() => match pending {
                Ok(pending) => {
                    connections.spawn(serve(server.clone(), pending));
                }
                Err(error) => {
                    tracing::error!(%error, "accept connections; tried again");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = connections.join_next() => report(ended),
        }
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        report(ended);
    }
    // Those that had outlived their operators.
    let ending = server.clone();
    report(tokio::task::spawn_blocking(move || ending.exports.stop_all()).await);
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "serve a connection");
    }
}

async fn serve(server: Arc<Server>, pending: Pending) {
    let address = pending.address();
    let open = async { Opening::read(pending.handshake().await?).await };
    let opening = tokio::select! {
        opening = open => opening,
        () = server.stopping() => return,
    };
    match opening {
        Ok(Opening::Deliver(receiver)) => delivery::serve(&server, receiver).await,
        Ok(Opening::Operate(operation)) => operate::serve(&server, operation).await,
        Ok(Opening::Compare(comparison)) => compare::serve(&server, comparison).await,
        Ok(Opening::Measure(measurement)) => measurement.refuse(
            wire::RefusalCode::BadRequest,
            "measure: agents send to a process server; this is a target server",
        ),
        Err(error) => tracing::warn!(%address, %error, "connection refused"),
    }
}
