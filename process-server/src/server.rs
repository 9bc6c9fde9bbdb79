//! The one place that waits for connections, and starts and stops everything.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use block::{GroupId, UnixNanos};
use cache::{Cache, CacheError, Options, Report};
use control::metrics::Values;
use control::{ProcessServerStatus, StateCode};
use durable::RealStorage;
use telemetry::Latencies;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use wire::{
    CredentialsError, Listener, LiveCredentials, Opening, Peers, Pending, RetryPolicy, Role, WireError,
};

use crate::config::{Config, ConfigError, GroupConfig};
use crate::forward::Forwarder;
use crate::hub::Hub;
use crate::measure::MEASURES_AT_ONCE;
use crate::turns::Turns;
use crate::{compare, intake, measure, operate};

/// Why a process server did not start.
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
    /// The cache cannot be opened.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] WireError),
    /// The cache could not be looked at because the process is short of something.
    #[error("open the cache: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// The configuration, of which the groups may change while the server runs.
type SharedConfig = Arc<RwLock<Config>>;

fn read(config: &SharedConfig) -> RwLockReadGuard<'_, Config> {
    config.read().unwrap_or_else(PoisonError::into_inner)
}

/// How long to wait when the port failed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What all tasks share.
pub(crate) struct Server {
    name: String,
    config: SharedConfig,
    pub(crate) credentials: Arc<LiveCredentials>,
    /// Targets that are waited for.
    pub(crate) peers: Peers,
    pub(crate) turns: Turns,
    pub(crate) measuring: Semaphore,
    pub(crate) cache: Cache,
    fsyncs: Arc<Latencies>,
    groups: Mutex<Groups>,
    stopping: watch::Receiver<bool>,
}

#[derive(Default)]
struct Groups {
    hubs: BTreeMap<GroupId, Arc<Hub>>,
    forwarders: JoinSet<()>,
}

impl Server {
    fn groups(&self) -> std::sync::MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The hub of a group that was met before.
    pub(crate) fn known_hub(&self, group: GroupId) -> Option<Arc<Hub>> {
        self.groups().hubs.get(&group).cloned()
    }

    /// The hub of a group, with its forwarders started; `None` when no target is configured for it.
    pub(crate) fn hub(self: &Arc<Server>, group: GroupId) -> Option<Arc<Hub>> {
        let targets = read(&self.config).targets_of(group).to_vec();
        if targets.is_empty() {
            return None;
        }
        let mut groups = self.groups();
        if let Some(hub) = groups.hubs.get(&group) {
            return Some(hub.clone());
        }
        let hub = Hub::new(group, self.cache.held(group), self.cache.applied_by_all(group), &targets);
        let hub = Arc::new(hub);
        groups.hubs.insert(group, hub.clone());
        if !*self.stopping.borrow() {
            for route in &hub.routes {
                let forwarder = Forwarder { server: self.clone(), hub: hub.clone(), route: route.clone() };
                let server = self.clone();
                groups.forwarders.spawn(async move {
                    tokio::select! {
                        () = forwarder.run() => {}
                        () = server.stopping() => {}
                    }
                });
            }
        }
        Some(hub)
    }

    pub(crate) fn retry_policy(&self) -> RetryPolicy {
        read(&self.config).process_server.retry.clone()
    }

    /// Waits until the server is to stop.
    pub(crate) async fn stopping(&self) {
        // An error means that the handle was dropped, which stops as well.
        let _ = self.stopping.clone().wait_for(|stopping| *stopping).await;
    }

    pub(crate) fn status(&self) -> ProcessServerStatus {
        let cache = self.cache.status();
        let store = match (&cache.poisoned, cache.disk_full || cache.waiting) {
            (Some(_), _) => Some(StateCode::StoreFailed),
            (None, true) => Some(StateCode::CacheFull),
            (None, false) => None,
        };
        let hubs: Vec<Arc<Hub>> = self.groups().hubs.values().cloned().collect();
        let mut groups: Vec<_> = hubs
            .iter()
            .map(|hub| hub.show(cache.groups.iter().find(|cached| cached.group == hub.group), store))
            .collect();
        for cached in cache.groups.iter().filter(|cached| !hubs.iter().any(|hub| hub.group == cached.group)) {
            // Held from an earlier configuration: it is kept, and nobody fetches it.
            let orphan = Arc::new(Hub::new(cached.group, cached.held, cached.freed, &[]));
            let message =
                "changes of this group are held, but no target is configured for it; add a [[group]]";
            orphan.trouble(StateCode::Misconfigured, message);
            groups.push(orphan.show(Some(cached), None));
        }
        let worst = groups.iter().max_by_key(|group| group.state.severity());
        let state = match (*self.stopping.borrow(), store) {
            (true, _) => StateCode::Stopping,
            (false, Some(store)) => store,
            (false, None) => worst.map_or(StateCode::Idle, |group| group.state),
        };
        let last_error = match (&cache.poisoned, cache.disk_full) {
            (Some(reason), _) => Some(reason.clone()),
            (None, true) => Some("the file system of the cache is full".to_owned()),
            (None, false) => worst.and_then(|group| group.last_error.clone()),
        };
        let fsyncs = self.fsyncs.summary();
        let (resyncs, resyncs_waiting) = self.turns.count();
        ProcessServerStatus {
            time: UnixNanos::now(),
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state,
            last_error,
            cache_used: cache.bytes_used,
            cache_limit: cache.bytes_max,
            fsync_ms_p50: fsyncs.p50.as_secs_f64() * 1000.0,
            fsync_ms_p99: fsyncs.p99.as_secs_f64() * 1000.0,
            resyncs,
            resyncs_waiting,
            groups,
        }
    }
}

/// A process server.
#[derive(Debug)]
pub struct ProcessServer;

/// A running process server. Dropping it stops the server without waiting.
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

impl ProcessServer {
    /// Opens the cache, recovering what a crash left, listens, and goes on forwarding what is held.
    ///
    /// # Errors
    /// When configuration, credentials or cache cannot be used, or the port cannot be listened on. Damage in the cache
    /// is logged and shown at the groups it hits; the others are served.
    pub async fn start(config: Config) -> Result<Handle, StartError> {
        config.check()?;
        let listen = config.process_server.listen.clone();
        let config = Arc::new(RwLock::new(config));
        let credentials = Arc::new(load_credentials(&read(&config))?);
        let name = credentials.current().identity().name.clone();
        let fsyncs = Arc::new(Latencies::new());
        let (opened, report) = {
            let (config, fsyncs) = (config.clone(), fsyncs.clone());
            tokio::task::spawn_blocking(move || open_cache(config, &fsyncs)).await??
        };
        for damage in &report.damages {
            tracing::error!("open the cache: {damage}");
        }
        let listener = Listener::bind_live(&listen, credentials.clone()).await?;
        let local = listener.local_addr();
        let (stop, stopping) = watch::channel(false);
        let (groups, peers) = (Mutex::default(), Peers::default());
        let turns = Turns::new(read(&config).process_server.resyncs_at_once);
        let server = Arc::new(Server {
            name,
            config,
            credentials,
            peers,
            turns,
            measuring: Semaphore::new(MEASURES_AT_ONCE),
            cache: opened,
            fsyncs,
            groups,
            stopping,
        });
        for group in server.cache.groups() {
            if server.hub(group).is_none() {
                tracing::warn!(%group, "changes of a group without a target are held; they take space until it has one");
            }
        }
        tracing::info!(
            %local,
            name = server.name,
            segments = report.segments,
            cached = %report.bytes,
            torn_tail = report.torn_tail,
            half_received = report.half_received,
            "process server listens"
        );
        let accepting = tokio::spawn(accept(server.clone(), listener));
        Ok(Handle { server, local, stop, accepting })
    }

    /// Looks at everything that a start needs, without starting: values, credentials.
    ///
    /// # Errors
    /// What a start would answer.
    pub fn check(config: &Config) -> Result<(), StartError> {
        config.check()?;
        load_credentials(config)?;
        Ok(())
    }
}

/// Checks every checksum of a cache's files. The server must not run.
///
/// # Errors
/// When the files cannot be read, or the server has them open.
pub fn verify(cache: &Path) -> Result<Report, CacheError> {
    cache::verify(&RealStorage, cache)
}

fn load_credentials(config: &Config) -> Result<LiveCredentials, StartError> {
    let path = &config.process_server.credentials;
    let credentials = LiveCredentials::load(path)?;
    let (role, expected) = (credentials.current().identity().role, Role::ProcessServer);
    if role != expected {
        return Err(StartError::Role { path: path.clone(), role, expected });
    }
    Ok(credentials)
}

fn open_cache(config: SharedConfig, fsyncs: &Arc<Latencies>) -> Result<(Cache, Report), CacheError> {
    let section = read(&config).process_server.clone();
    let targets = Arc::new(move |group| read(&config).targets_of(group).to_vec());
    let mut options = Options::new(section.cache_bytes, targets);
    let fsyncs = fsyncs.clone();
    options.on_sync = Some(Arc::new(move |took| fsyncs.record(took)));
    Cache::open(Arc::new(RealStorage), &section.cache, options)
}

impl Handle {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// How it is.
    pub fn status(&self) -> ProcessServerStatus {
        self.server.status()
    }

    /// Its figures, for Prometheus; none when it has stopped.
    pub fn figures(&self) -> impl Fn() -> Values + Send + Sync + use<> {
        let server = Arc::downgrade(&self.server);
        move || {
            let status = server.upgrade().map(|server| server.status());
            status.as_ref().map_or_else(Values::default, control::metrics::of_process_server)
        }
    }

    /// Takes up other groups without a pause. `false`, and nothing has changed, when a group that is being served has other
    /// targets, or none: then the server must start anew.
    ///
    /// # Errors
    /// When the groups make no sense.
    pub fn set_groups(&self, groups: Vec<GroupConfig>) -> Result<bool, ConfigError> {
        let before = read(&self.server.config).clone();
        let config = Config { groups, ..before };
        config.check()?;
        let served = self.server.groups();
        let same = |hub: &Hub| {
            let routes = hub.routes.iter().map(|route| &route.address);
            routes.eq(config.targets_of(hub.group))
        };
        if !served.hubs.values().all(|hub| same(hub)) {
            return Ok(false);
        }
        *self.server.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        drop(served);
        // What is held from an earlier time, and has a target now, goes there.
        for group in self.server.cache.groups() {
            self.server.hub(group);
        }
        Ok(true)
    }

    /// Stops: no new connections, deliveries are refused as stopping, forwarding ends, what arrived whole is made
    /// durable. When this returns, nothing of the server runs any more and the cache is closed.
    ///
    /// # Errors
    /// When the cache's storage failed, now or before. What was acknowledged before that is durable all the same.
    pub async fn shutdown(self) -> Result<(), CacheError> {
        let Handle { server, stop, accepting, .. } = self;
        stop.send_replace(true);
        if let Err(error) = accepting.await {
            tracing::error!(%error, "stop accepting");
        }
        let mut forwarders = std::mem::take(&mut server.groups().forwarders);
        while let Some(ended) = forwarders.join_next().await {
            report(ended);
        }
        // Somebody may still be reading a chunk; nothing that matters can be changed any more.
        let closed = tokio::task::spawn_blocking(move || server.cache.close());
        closed.await.unwrap_or(Err(CacheError::Closing))
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
        Ok(Opening::Deliver(receiver)) => intake::serve(&server, receiver).await,
        Ok(Opening::Operate(operation)) => operate::serve(&server, operation).await,
        Ok(Opening::Compare(comparison)) => compare::serve(&server, comparison).await,
        Ok(Opening::Measure(measurement)) => measure::serve(&server, measurement).await,
        Err(error) => tracing::warn!(%address, %error, "connection refused"),
    }
}
