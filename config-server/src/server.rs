//! The one place that waits for connections, and starts and stops everything.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use axum::Router;
use axum::extract::Request;
use control::fleet::{MadeEnrolToken, Name, PartRole};
use control::metrics::Values;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::RwLock;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use wire::{Authority, Credentials, Identity, Role, web_peer, web_server};

use crate::api::guard::Peer;
use crate::app::{App, Shared};
use crate::config::Config;
use crate::fault::Fault;
use crate::secret::new_id;
use crate::store::Store;
use crate::{alert, api, checkin, job, plan, protect, view};

/// Connections at the same time. Further ones wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 8192;
/// How long TLS may take.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the head of a request may take.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// How long requests that are under way may take when the server stops.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);
/// Between two looks at jobs, and at parts that have fallen silent.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two rounds of letting old things go, and of looking at the own certificate.
const TIDY_EVERY: Duration = Duration::from_secs(600);
/// The own certificate is good so long, and is renewed when a third is left.
const CERTIFICATE_TIME: Duration = Duration::from_secs(90 * 86_400);

/// A config server.
#[derive(Debug)]
pub struct ConfigServer;

/// A running config server. Dropping it stops the server without waiting.
pub struct Handle {
    local: SocketAddr,
    app: Shared,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("local", &self.local).finish_non_exhaustive()
    }
}

impl ConfigServer {
    /// Opens the state, listens, and goes on with the jobs.
    ///
    /// # Errors
    /// When configuration, authority or database cannot be used, or the port cannot be listened on.
    pub async fn start(config: Config) -> anyhow::Result<Handle> {
        config.check()?;
        let authority = Authority::load(&config.authority).context("open the fleet's authority")?;
        let credentials = Arc::new(RwLock::new(own_credentials(&authority, &config)?));
        let fingerprint = fingerprint_of(&authority)?;
        let store = Store::open(&config.database).await?;
        allow_connections();
        let listener = TcpListener::bind(&config.listen)
            .await
            .with_context(|| format!("listen on {}", config.listen))?;
        let local = listener.local_addr().context("ask where it listens")?;
        let (stop, stopping) = watch::channel(false);
        let newest = crate::store::newest_event(&mut *store.read.acquire().await?).await?;
        let (newest_event, newest_seen) = watch::channel(newest);
        let (check_ins, queue) = checkin::queue();
        let app = Arc::new(App {
            store,
            authority,
            fingerprint,
            holder: new_id(),
            check_ins,
            digests: checkin::Digests::default(),
            password_checks: Semaphore::new(2),
            streams: Arc::new(Semaphore::new(api::STREAMS_MAX)),
            newest_event: newest_seen,
            effects: plan::Effects::default(),
            dns_keys: config.dns_keys.clone(),
            jobs_wake: Notify::new(),
            tasks_wake: Notify::new(),
            stopping: stopping.clone(),
        });
        let router = api::router(&app);
        tracing::info!(%local, names = ?config.names, database = ?app.store.backend, "config server listens");
        let until_stopped = |work: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let mut stopping = stopping.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = work => {}
                    _ = stopping.wait_for(|stopping| *stopping) => {}
                }
            })
        };
        let tasks = vec![
            tokio::spawn(accept(listener, router, credentials.clone(), stopping.clone())),
            until_stopped(Box::pin(checkin::run(app.clone(), queue))),
            until_stopped(Box::pin(api::watch_events(app.clone(), newest_event))),
            until_stopped(Box::pin(work(app.clone()))),
            until_stopped(Box::pin(alert::run(app.clone()))),
            until_stopped(Box::pin(prove(app.clone()))),
            until_stopped(Box::pin(tidy(app.clone(), credentials, config))),
        ];
        Ok(Handle { local, app, stop, tasks })
    }
}

impl Handle {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// By what the fleet's authority is known: SHA-256 of its certificate, hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.app.fingerprint
    }

    /// A token with which a server that runs in this process enrols, once and soon.
    ///
    /// # Errors
    /// When the state cannot be written, or a part of that name reports.
    pub async fn invite(&self, role: PartRole, name: &Name) -> Result<MadeEnrolToken, Fault> {
        api::enrol::invite(&self.app, role, name).await
    }

    /// The fleet's figures, for Prometheus.
    pub fn figures(
        &self,
    ) -> impl Fn() -> std::pin::Pin<Box<dyn Future<Output = Values> + Send>> + Send + Sync + use<> {
        let store = self.app.store.clone();
        move || {
            let store = store.clone();
            Box::pin(async move {
                let values = view::figures(&store).await;
                values.unwrap_or_else(|fault| {
                    tracing::warn!(%fault, "collect the fleet's figures");
                    Values::default()
                })
            })
        }
    }

    /// Stops: no new connections, requests that are under way are finished. When this returns, nothing of the server runs
    /// any more and the state is closed.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "stop the config server");
            }
        }
        // Another config server need not wait until it is clear that this one has gone.
        if let Err(fault) = job::let_go(&self.app).await {
            tracing::warn!(%fault, "let go of the jobs; another config server goes on with them in {} s", job::LEASE.as_secs());
        }
        self.app.store.close().await;
    }
}

/// Every part keeps a connection open, and each is an open file: as many as the system lets this process have.
fn allow_connections() {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(u64::MAX);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "raise the limit of open files");
    } else if wanted < CONNECTIONS_MAX as u64 {
        tracing::warn!(
            files = wanted,
            "the system allows fewer open files than connections ({CONNECTIONS_MAX}); a large fleet needs a higher limit (LimitNOFILE=)"
        );
    }
}

/// The own certificate: made when there is none, when its names are others, and when its end comes near.
fn own_credentials(authority: &Authority, config: &Config) -> anyhow::Result<Arc<Credentials>> {
    let identity = Identity::new(Role::ConfigServer, "config-server", None)?;
    let issued = crate::credentials::issue(authority, &identity, config, CERTIFICATE_TIME)?;
    let credentials = Credentials::load(&issued).context("load the config server's credentials")?;
    ensure!(credentials.identity().role == Role::ConfigServer, "the credentials are of another part");
    Ok(Arc::new(credentials))
}

async fn accept(
    listener: TcpListener,
    router: Router,
    credentials: Arc<RwLock<Arc<Credentials>>>,
    mut stopping: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let stopped = stopping.clone();
    let mut until = pin!(async {
        // An error means that the handle was dropped, which stops as well.
        let _ = stopping.wait_for(|stopping| *stopping).await;
    });
    loop {
        let permit = tokio::select! {
            permit = permits.clone().acquire_owned() => permit,
            () = &mut until => break,
        };
        let Ok(permit) = permit else { break };
        tokio::select! {
            () = &mut until => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let served = serve(stream, address, router.clone(), credentials.read().clone(), stopped.clone());
                    connections.spawn(async move {
                        served.await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a connection; tried again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIME_MAX, ended).await.is_err() {
        connections.abort_all();
    }
}

async fn serve(
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
    credentials: Arc<Credentials>,
    mut stopping: watch::Receiver<bool>,
) {
    let config = match web_server(&credentials) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(error, "use the config server's credentials");
            return;
        }
    };
    // A client that has gone already is its own affair.
    let _ = stream.set_nodelay(true);
    let accepting = TlsAcceptor::from(config).accept(stream);
    let stream = match tokio::time::timeout(HANDSHAKE_TIME_MAX, accepting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "a TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let certificate = match web_peer(stream.get_ref().1, &credentials) {
        Ok(certificate) => certificate,
        Err(error) => {
            tracing::warn!(%address, %error, "a client's certificate is not believed");
            return;
        }
    };
    let peer = Peer { address, certificate };
    let service = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        hyper::service::Service::call(&service, request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let stop = async {
        // An error means that the handle was dropped, which stops as well.
        let _ = stopping.wait_for(|stopping| *stopping).await;
    };
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stop => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%address, %error, "a connection ended early");
    }
}

/// Goes on with jobs, and notes who has fallen silent.
async fn work(app: Shared) {
    loop {
        tokio::select! {
            () = app.jobs_wake.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        if let Err(fault) = checkin::note_silence(&app).await {
            tracing::warn!(%fault, "look who has fallen silent; tried again");
        }
        let held = match job::claim(&app).await {
            Ok(held) => held,
            Err(fault) => {
                tracing::warn!(%fault, "look for jobs; tried again");
                continue;
            }
        };
        for mut held in held {
            if let Err(fault) = protect::advance(&app, &mut held).await {
                tracing::warn!(%fault, job = %held.job.id, "go on with a job; tried again");
            }
        }
    }
}

/// Begins the boot proofs that are due.
async fn prove(app: Shared) {
    loop {
        tokio::time::sleep(protect::proof::LOOK_EVERY).await;
        if let Err(fault) = protect::proof::begin_due(&app).await {
            tracing::warn!(%fault, "look which proofs are due; tried again");
        }
    }
}

/// Lets old things go, and renews the own certificate.
async fn tidy(app: Shared, credentials: Arc<RwLock<Arc<Credentials>>>, config: Config) {
    loop {
        tokio::time::sleep(TIDY_EVERY).await;
        if let Err(fault) = crate::tidy::tidy(&app).await {
            tracing::warn!(%fault, "let old things go; tried again");
        }
        match own_credentials(&app.authority, &config) {
            Ok(renewed) => *credentials.write() = renewed,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "renew the own certificate; tried again")
            }
        }
    }
}

/// Looks at everything that a start needs, without starting.
///
/// # Errors
/// What a start would answer.
pub fn check(config: &Config) -> anyhow::Result<()> {
    config.check()?;
    fingerprint(config)?;
    let file = config.database.strip_prefix("sqlite:").map(Path::new);
    if let Some(parent) = file.and_then(Path::parent) {
        ensure!(parent.is_dir(), "the directory {} of the database is not there", parent.display());
    }
    Ok(())
}

/// By what the fleet's authority is known to whoever logs in: SHA-256 of its certificate, hexadecimal.
///
/// # Errors
/// When the authority cannot be read.
pub fn fingerprint(config: &Config) -> anyhow::Result<String> {
    fingerprint_of(&Authority::load(&config.authority).context("open the fleet's authority")?)
}

fn fingerprint_of(authority: &Authority) -> anyhow::Result<String> {
    let bytes = wire::fingerprint(authority.certificate_pem()).map_err(anyhow::Error::msg)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
