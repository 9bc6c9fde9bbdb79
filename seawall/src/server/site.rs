//! A small site: the config server, a process server and a target server below one directory, in one process.
//!
//! Consistency: one process at a time has the directory, by a lock that ends with it.
//! Crash consistency: making a site ends with the directory of the config server, which gets its name when it is whole; until
//! then the next start makes everything again. A server that has no credentials enrols at any start, so it does not matter
//! where its first enrolment was cut short.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use block::UnixNanos;
use control::fleet::{Name, PartRole};
use enrol::{ServerUrl, join};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use seawall_config_server::{Config, ConfigServer, InitOptions};
use seawall_process_server::FleetProcessServer;
use seawall_target_server::FleetTargetServer;
use wire::authority::IDENTITY_DAYS;
use wire::{Authority, Credentials, CredentialsError, Identity, Role};

use crate::config::{OperatorConfig, OperatorSection};
use crate::init::Endpoint;

/// Held by whoever runs the site.
const LOCK_FILE: &str = "lock";
const CONFIG_SERVER: &str = "config-server";
const OPERATOR: &str = "operator";
/// The operator's certificate is replaced when it is valid for less than this: a fifth of its time.
const OPERATOR_LEFT_MIN: Duration = Duration::from_secs(IDENTITY_DAYS / 5 * 24 * 60 * 60);
/// How often that is looked at, besides at each start.
const OPERATOR_LOOK_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// Where a server keeps its credentials, below its directory.
const STATE_DIR: &str = "state";

/// What a new site is told.
#[derive(Debug)]
pub(crate) struct NewSite {
    /// By which others reach this machine.
    pub(crate) name: String,
    /// Where people and parts reach the config server, `host:port`.
    pub(crate) listen: String,
    pub(crate) process_server_port: u16,
    pub(crate) target_server_port: u16,
    pub(crate) administrator: Name,
    pub(crate) password: String,
}

/// The directory of a site, which nobody else uses meanwhile.
#[derive(Debug)]
pub(crate) struct SiteDir {
    path: PathBuf,
    _lock: File,
}

impl SiteDir {
    /// Makes the directory if there is none.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<SiteDir> {
        let path = std::path::absolute(dir).with_context(|| format!("open directory {}", dir.display()))?;
        let lock = path.join(LOCK_FILE);
        // What somebody keeps there is not taken for a site.
        if let Ok(mut entries) = std::fs::read_dir(&path)
            && !lock.exists()
        {
            ensure!(
                entries.next().is_none(),
                "make a site in {}: it is not empty, and no site; choose another directory",
                path.display()
            );
        }
        std::fs::create_dir_all(&path).with_context(|| format!("make directory {}", path.display()))?;
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(&lock);
        let open = open.with_context(|| format!("open {}", lock.display()))?;
        match rustix::fs::flock(&open, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(SiteDir { path, _lock: open }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!("use the site {}: another `seawall server` runs it", path.display())
            }
            Err(error) => Err(error).with_context(|| format!("lock {}", lock.display())),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a site is there, as far as making one goes.
    pub(crate) fn is_made(&self) -> bool {
        self.path.join(CONFIG_SERVER).is_dir()
    }

    /// What the config server was told when the site was made.
    pub(crate) fn config(&self) -> anyhow::Result<Config> {
        Ok(Config::load(&self.path.join(CONFIG_SERVER).join("config-server.toml"))?)
    }

    /// Makes the site. The order, and what breaks when it is reversed:
    /// 1. the servers' configurations, each whole (else a site that looks made lacks one);
    /// 2. the config server, with the authority and the administrator.
    pub(crate) async fn make(&self, new: &NewSite) -> anyhow::Result<()> {
        let listen = Endpoint::parse("--listen", &new.listen)?;
        let (url, names) = (listen.own_url()?, listen.names(&new.name));
        let reached = if listen.is_loopback() { &listen.host } else { &new.name };
        if !listen.is_loopback() {
            let found = tokio::net::lookup_host((new.name.as_str(), listen.port)).await;
            let found = found.ok().and_then(|mut found| found.next());
            found.with_context(|| {
                format!(
                    "use {} as the name of this machine: it has no address, so that no machine would find its servers; \
                     give a name or an address with --name",
                    new.name
                )
            })?;
        }
        let address = |host: &str, port: u16| match host.contains(':') && !host.starts_with('[') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        for (part, port, own) in [
            (PartRole::ProcessServer, new.process_server_port, PROCESS_SERVER),
            (PartRole::TargetServer, new.target_server_port, TARGET_SERVER),
        ] {
            let own = own.replace("LISTEN", &quoted(&address(&listen.host, port)));
            let text = format!(
                "# The {part} of a site that `seawall server` runs. The config server says which groups it serves.\n{own}\n\
                 [config_server]\nurl = {}\n# Credentials, and what the config server said last.\nstate = \"{STATE_DIR}\"\n\
                 # Where others reach it.\nadvertise = {}\n",
                quoted(&url.to_string()),
                quoted(&address(reached, port))
            );
            replace(&self.path.join(part.as_str()), &format!("{part}.toml"), &text)?;
        }
        let dir = self.path.join(CONFIG_SERVER);
        let partial = dir.with_extension("partial");
        if partial.exists() {
            // Of a start that was cut short: nobody else has the lock, and nobody ever used it.
            std::fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))?;
        }
        let init = InitOptions {
            dir,
            listen: new.listen.clone(),
            names,
            administrator: new.administrator.to_string(),
            password: new.password.clone(),
            database: None,
        };
        seawall_config_server::init(&init).await
    }

    /// Starts everything, from the end of the way to its beginning.
    pub(crate) async fn start(self) -> anyhow::Result<Site> {
        let config = self.config()?;
        let name = config.names.first().cloned().unwrap_or_default();
        let authority = Authority::load(&config.authority).context("open the site's authority")?;
        let listen = Endpoint::parse("listen", &config.listen)?;
        let server = ConfigServer::start(config).await.context("start the config server")?;
        let mut site = Site {
            url: listen.url_of(&name)?,
            own_url: listen.own_url()?,
            authority,
            dir: self,
            config: server,
            process: None,
            target: None,
        };
        match site.start_parts().await {
            Ok(()) => Ok(site),
            Err(error) => {
                // What has started ends in order.
                site.shutdown().await;
                Err(error)
            }
        }
    }
}

const PROCESS_SERVER: &str = "[process_server]
listen = LISTEN
credentials = \"state/credentials\"
cache = \"cache\"
cache_bytes = \"16GiB\"
";
const TARGET_SERVER: &str = "listen = LISTEN
credentials = \"state/credentials\"
# Replicas and their recovery points are below it.
data = \"data\"
";

/// A site that runs.
pub(crate) struct Site {
    dir: SiteDir,
    config: seawall_config_server::Handle,
    process: Option<FleetProcessServer>,
    target: Option<FleetTargetServer>,
    authority: Authority,
    url: ServerUrl,
    own_url: ServerUrl,
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Site in {}", self.dir.path.display())
    }
}

impl Site {
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where people and machines find the config server.
    pub(crate) fn url(&self) -> &ServerUrl {
        &self.url
    }

    /// Where this machine finds it.
    pub(crate) fn own_url(&self) -> &ServerUrl {
        &self.own_url
    }

    /// By what the site's authority is known.
    pub(crate) fn fingerprint(&self) -> &str {
        self.config.fingerprint()
    }

    /// The target server; `None` only while it stops.
    pub(crate) fn target(&self) -> Option<&FleetTargetServer> {
        self.target.as_ref()
    }

    async fn start_parts(&mut self) -> anyhow::Result<()> {
        let file = self.enrol(PartRole::TargetServer).await?;
        let config = seawall_target_server::Config::load(&file)?;
        let listen = config.listen.clone();
        self.target = Some(FleetTargetServer::start(config).await.context("start the target server")?);
        let file = self.enrol(PartRole::ProcessServer).await?;
        let config = seawall_process_server::Config::load(&file)?;
        let process_listen = config.process_server.listen.clone();
        self.process = Some(FleetProcessServer::start(config).await.context("start the process server")?);
        self.issue_operator(&process_listen, &listen)
    }

    /// Enrols a server that has no credentials yet; its configuration file.
    async fn enrol(&self, role: PartRole) -> anyhow::Result<PathBuf> {
        let dir = self.dir.path.join(role.as_str());
        let state = dir.join(STATE_DIR);
        if !state.join(enrol::CURRENT).exists() {
            let name: Name = role.as_str().parse()?;
            let made = self.config.invite(role, &name).await;
            let made = made.with_context(|| format!("make a token for the {role}"))?;
            let joined = join(self.own_url.clone(), &made.token, role, name, &state).await;
            joined.with_context(|| format!("enrol the {role}"))?;
        }
        Ok(dir.join(format!("{role}.toml")))
    }

    /// What the commands with `--dir` need: `seawall restore --dir DIR` and the like.
    fn issue_operator(&self, process: &str, target: &str) -> anyhow::Result<()> {
        let dir = self.dir.path.join(OPERATOR);
        if dir.exists() {
            self.renew_operator(UnixNanos::now());
            return Ok(());
        }
        let partial = self.new_operator()?;
        let reached =
            |listen: &str| -> anyhow::Result<String> { Ok(Endpoint::parse("listen", listen)?.own_address()) };
        let operator = OperatorConfig {
            operator: OperatorSection {
                process_server: reached(process)?,
                target_server: reached(target)?,
                credentials: ".".into(),
            },
        };
        let text = toml::to_string(&operator).context("write the operator's configuration")?;
        replace(&partial, "operator.toml", &text)?;
        std::fs::rename(&partial, &dir).with_context(|| format!("name {}", dir.display()))?;
        sync(&self.dir.path)
    }

    /// Credentials of the operator, in a directory that nobody uses yet.
    fn new_operator(&self) -> anyhow::Result<PathBuf> {
        let partial = self.dir.path.join(OPERATOR).with_extension("partial");
        if partial.exists() {
            std::fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))?;
        }
        self.authority.issue(&Identity::new(Role::Operator, OPERATOR, None)?, &partial)?;
        Ok(partial)
    }

    /// Replaces the operator's certificate when it ends soon; whether it did. The order, and what breaks when it is reversed:
    /// 1. the new directory is whole, with the old one's configuration, and durable (else a crash leaves half of one);
    /// 2. both change places in one step (else a command in between finds a key and a certificate that do not fit);
    /// 3. the old one is removed; one that a crash has left is removed by the next renewal.
    ///
    /// What cannot be renewed keeps nobody from using the site.
    fn renew_operator(&self, now: UnixNanos) -> bool {
        let renewed = self.renewed_operator(now);
        if let Err(error) = &renewed {
            let error = format!("{error:#}");
            tracing::error!(
                error,
                "renew the operator's certificate; tried again in a day and at the next start"
            );
        }
        renewed.unwrap_or(false)
    }

    fn renewed_operator(&self, now: UnixNanos) -> anyhow::Result<bool> {
        let dir = self.dir.path.join(OPERATOR);
        let left = match Credentials::load(&dir) {
            Ok(credentials) => credentials.expires().since(now),
            Err(CredentialsError::Expired { .. }) => Duration::ZERO,
            Err(error) => return Err(error).context("read the operator's credentials"),
        };
        if left >= OPERATOR_LEFT_MIN {
            return Ok(false);
        }
        let partial = self.new_operator()?;
        let config = dir.join("operator.toml");
        let text = std::fs::read_to_string(&config).with_context(|| format!("read {}", config.display()))?;
        replace(&partial, "operator.toml", &text)?;
        rustix::fs::renameat_with(CWD, &partial, CWD, &dir, RenameFlags::EXCHANGE)
            .with_context(|| format!("exchange {} and {}", partial.display(), dir.display()))?;
        sync(&self.dir.path)?;
        std::fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))?;
        tracing::info!(dir = %dir.display(), "the operator's certificate was renewed");
        Ok(true)
    }

    /// Renews the operator's certificate in time, as long as the site runs.
    pub(crate) async fn renew_operator_for_ever(&self) {
        loop {
            tokio::time::sleep(OPERATOR_LOOK_EVERY).await;
            self.renew_operator(UnixNanos::now());
        }
    }

    /// The figures of all three servers, for Prometheus.
    pub(crate) fn figures(
        &self,
    ) -> impl Fn() -> Pin<Box<dyn Future<Output = String> + Send>> + Send + Sync + use<> {
        let config = self.config.figures();
        let process = self.process.as_ref().map(FleetProcessServer::figures);
        let target = self.target.as_ref().map(FleetTargetServer::figures);
        move || {
            let config = config();
            let parts = [process.as_ref().map(|figures| figures()), target.as_ref().map(|figures| figures())];
            Box::pin(async move {
                let mut values = config.await;
                parts.into_iter().flatten().for_each(|part| values.append(part));
                values.text()
            })
        }
    }

    /// Ends from the beginning of the way to its end, so that what is under way can still arrive.
    pub(crate) async fn shutdown(mut self) {
        if let Some(process) = self.process.take()
            && let Err(error) = process.shutdown().await
        {
            tracing::error!(%error, "close the process server's cache");
        }
        if let Some(target) = self.target.take() {
            target.shutdown().await;
        }
        self.config.shutdown().await;
    }
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// Writes a file whole or not at all, and its directory if there is none.
fn replace(dir: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let (path, partial) = (dir.join(name), dir.join(format!("{name}.partial")));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let mut file = File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    };
    write().with_context(|| format!("write {}", path.display()))?;
    sync(dir)
}

fn sync(dir: &Path) -> anyhow::Result<()> {
    File::open(dir).and_then(|open| open.sync_all()).with_context(|| format!("sync {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_port() -> u16 {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn new_site() -> NewSite {
        NewSite {
            name: "127.0.0.1".into(),
            listen: format!("127.0.0.1:{}", free_port()),
            process_server_port: free_port(),
            target_server_port: free_port(),
            administrator: "admin".parse().unwrap(),
            password: "correct horse battery".into(),
        }
    }

    /// A start that was cut short while the config server was made leaves a directory that nobody would use; the next one
    /// makes it again. One that was cut short after an enrolment was written down, and before its certificate was kept, left a
    /// server of that name in the fleet, and every later start was refused with a conflict.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_first_start_that_was_cut_short_goes_on() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("site");
        let dir = SiteDir::open(&path).unwrap();
        std::fs::create_dir_all(path.join("config-server.partial/ca")).unwrap();
        assert!(!dir.is_made());
        dir.make(&new_site()).await.unwrap();
        assert!(dir.is_made() && !path.join("config-server.partial").exists());

        let server = ConfigServer::start(dir.config().unwrap()).await.unwrap();
        let url: ServerUrl = format!("https://{}", server.local_addr()).parse().unwrap();
        let name: Name = "target-server".parse().unwrap();
        let made = server.invite(PartRole::TargetServer, &name).await.unwrap();
        join(url, &made.token, PartRole::TargetServer, name, &base.path().join("lost")).await.unwrap();
        server.shutdown().await;
        std::fs::create_dir_all(path.join("operator.partial")).unwrap();

        let site = dir.start().await.unwrap();
        assert!(site.target().unwrap().status().is_some());
        assert!(path.join("operator/operator.toml").exists());
        let operator = std::fs::read_to_string(path.join("operator/cert.pem")).unwrap();
        assert!(SiteDir::open(&path).unwrap_err().to_string().contains("another"));
        // In time it gets another one, and keeps its configuration.
        let config = std::fs::read_to_string(path.join("operator/operator.toml")).unwrap();
        let years = |years: u64| UnixNanos(UnixNanos::now().0 + years * 365 * 24 * 60 * 60 * 1_000_000_000);
        assert!(!site.renew_operator(years(3)));
        assert!(site.renew_operator(years(4)) && !site.renew_operator(years(0)));
        assert!(site.renew_operator(years(9)), "one that has ended is replaced too");
        assert_eq!(std::fs::read_to_string(path.join("operator/operator.toml")).unwrap(), config);
        let renewed = std::fs::read_to_string(path.join("operator/cert.pem")).unwrap();
        assert_ne!(renewed, operator);
        Credentials::load(&path.join("operator")).unwrap();
        assert!(!path.join("operator.partial").exists());
        site.shutdown().await;
        // A later start changes nothing of that.
        SiteDir::open(&path).unwrap().start().await.unwrap().shutdown().await;
        assert_eq!(std::fs::read_to_string(path.join("operator/cert.pem")).unwrap(), renewed);
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_refused_before_anything_is_made() {
        let base = tempfile::tempdir().unwrap();
        let dir = SiteDir::open(&base.path().join("site")).unwrap();
        let new = NewSite { name: "no.such.invalid".into(), listen: "0.0.0.0:7443".into(), ..new_site() };
        let error = dir.make(&new).await.unwrap_err().to_string();
        assert!(error.contains("no.such.invalid") && error.contains("--name"), "{error}");
        assert!(!dir.is_made());
    }
}
