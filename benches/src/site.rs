//! A fleet to measure: its config server is a process of its own (the bench's program started again), its machines are made up.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use control::fleet::{
    JobInfo, Login, MachineInfo, MadeEnrolToken, MadeToken, NewApiToken, NewEnrolToken, NewPolicy, Overview,
    Page, PartRole, PolicyInfo, Protect, Scope, VolumeChoice,
};
use enrol::{Client, ConfigServerSection, Member, ServerUrl};
use seawall_config_server::{Config, ConfigServer, InitOptions, init};
use tokio::task::JoinSet;
use wire::WebTrust;

use crate::fleet::{Meter, Part, World};

/// The administrator's.
pub const PASSWORD: &str = "correct horse battery";
/// Names the configuration when this program is started again as the config server.
const CONFIG_SERVER: &str = "SEAWALL_BENCH_CONFIG_SERVER";
/// Machines that enrol at the same time.
const AT_ONCE: usize = 32;
/// Nothing that is set up takes longer.
const PATIENCE: Duration = Duration::from_secs(400);

/// A bench's main: measures, or is the config server when it was started as that.
///
/// # Errors
/// What either answers.
pub fn run(measure: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match std::env::var_os(CONFIG_SERVER) {
        Some(file) => runtime.block_on(serve(Path::new(&file))),
        None => runtime.block_on(measure),
    }
}

/// A config server without machines, and its process.
///
/// # Errors
/// When it does not start.
pub async fn start(base: &Path) -> anyhow::Result<(Server, Arc<Site>)> {
    let dir = base.join("config");
    init(&InitOptions {
        dir: dir.clone(),
        listen: "127.0.0.1:0".into(),
        names: vec!["127.0.0.1".into()],
        administrator: "admin".into(),
        password: PASSWORD.into(),
        database: None,
    })
    .await?;
    let server = Server::start(&dir.join("config-server.toml"), base.join("log"))?;
    let trust = WebTrust::Authority(std::fs::read_to_string(dir.join("ca/ca.pem"))?);
    let site = Site { url: server.url.clone(), trust, states: base.to_owned() };
    Ok((server, Arc::new(site)))
}

/// The config server, until its standard input ends. The first line that it prints says where it listens.
async fn serve(file: &Path) -> anyhow::Result<()> {
    telemetry::init(telemetry::Format::Json, "warn,seawall_config_server::alert=debug")?;
    let server = ConfigServer::start(Config::load(file)?).await?;
    println!("https://{}", server.local_addr());
    std::io::stdout().flush()?;
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    server.shutdown().await;
    Ok(())
}

/// The process of the config server.
#[derive(Debug)]
pub struct Server {
    process: Child,
    /// Where it is.
    pub url: ServerUrl,
    log: PathBuf,
}

impl Server {
    fn start(file: &Path, log: PathBuf) -> anyhow::Result<Server> {
        let mut process = Command::new(std::env::current_exe()?)
            .env(CONFIG_SERVER, file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .context("start the config server")?;
        let mut line = String::new();
        let out = process.stdout.take().context("the config server's output")?;
        BufReader::new(out).read_line(&mut line)?;
        let url = line.trim().parse().map_err(|error| anyhow::anyhow!("where it listens: {error}"))?;
        Ok(Server { process, url, log })
    }

    /// Processor time so far.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn processor_time(&self) -> anyhow::Result<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // After the name in parentheses, which may hold blanks: fields 14 and 15 of proc_pid_stat(5), in ticks.
        let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |place: usize| fields.get(place).and_then(|field| field.parse::<u64>().ok());
        let ticks = ticks(11).zip(ticks(12)).map(|(user, system)| user + system).context("processor time")?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }

    /// The most memory that it has had.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn memory_bytes(&self) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib * 1024.0)
    }

    /// What its looks for what is wrong took, in milliseconds.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn looks(&self) -> anyhow::Result<Vec<f64>> {
        let log = std::fs::read_to_string(&self.log)?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        Ok(lines.filter_map(|line| line["look_ms"].as_f64()).collect())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// The fleet's default policy, with a limit of age that some groups exceed.
///
/// # Errors
/// When the config server refuses it.
pub async fn allow_rpo(client: &Client) -> anyhow::Result<()> {
    let policies: Vec<PolicyInfo> = client.get("/policies").await?;
    let mut policy = policies[0].policy.clone();
    policy.rpo_s_max = 300;
    let changed = NewPolicy { name: policies[0].name.clone(), policy };
    let path = format!("/policies/{}", policies[0].id);
    let _: serde_json::Value = client.call(hyper::Method::PUT, &path, Some(&changed)).await?;
    Ok(())
}

/// Protects every machine that is not, and waits until all `machines` can be recovered.
///
/// # Errors
/// When the config server refuses one, or it takes too long.
pub async fn protect_all(client: &Client, machines: usize) -> anyhow::Result<()> {
    let mut after = String::new();
    loop {
        let page: Page<MachineInfo> = client.get(&format!("/machines?limit=1000{after}")).await?;
        for machine in page.items.iter().filter(|machine| !machine.protected) {
            let disk = |device: &str| VolumeChoice::of(device);
            let asked = Protect {
                volumes: vec![disk("/dev/vda"), disk("/dev/vdb")],
                policy: None,
                process_server: None,
                target_servers: Vec::new(),
                despite_warnings: false,
                reverses: None,
            };
            let _: JobInfo = client.post(&format!("/machines/{}/protect", machine.id), &asked).await?;
        }
        match page.next {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let until = Instant::now() + PATIENCE;
    loop {
        let overview: Overview = client.get("/overview").await?;
        if overview.groups_recoverable == machines as i64 && overview.jobs == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "not every machine is protected: {overview:?}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Where the config server is, and where parts keep what is theirs.
pub struct Site {
    /// Where the config server is.
    pub url: ServerUrl,
    trust: WebTrust,
    states: PathBuf,
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Site").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Site {
    /// An administrator.
    ///
    /// # Errors
    /// When the config server does not let it in.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let client = Client::new(self.url.clone(), &self.trust, None, None)?;
        client.login(&Login { name: "admin".parse()?, password: PASSWORD.into() }).await?;
        Ok(client)
    }

    /// Enrols a part, and lets it report from now on.
    ///
    /// # Errors
    /// When the config server does not take it.
    pub async fn join(
        &self,
        client: &Client,
        role: PartRole,
        name: &str,
        world: &Arc<World>,
        meter: &Arc<Meter>,
    ) -> anyhow::Result<()> {
        let new = NewEnrolToken { role, name: Some(name.parse()?), minutes: 60 };
        let made: MadeEnrolToken = client.post("/enrol-tokens", &new).await?;
        let state = self.states.join(name);
        enrol::join(self.url.clone(), &made.token, role, name.parse()?, &state).await?;
        let member = Member::open(ConfigServerSection { url: self.url.clone(), state, advertise: None })?;
        let part = Arc::new(Part::new(role, name, world.clone(), meter.clone()));
        tokio::spawn(async move { member.run(part).await });
        Ok(())
    }

    /// Several at a time, each over a connection of its own: `machine-0000` and so on.
    ///
    /// # Errors
    /// As [`Site::join`].
    pub async fn join_machines(
        self: &Arc<Site>,
        machines: Range<usize>,
        world: &Arc<World>,
        meter: &Arc<Meter>,
    ) -> anyhow::Result<()> {
        let asked = NewApiToken { name: "bench".parse()?, scopes: vec![Scope::Enrol], days: 1 };
        let made: MadeToken = self.client().await?.post("/tokens", &asked).await?;
        let mut joining = JoinSet::new();
        for worker in 0..AT_ONCE {
            let client = Client::new(self.url.clone(), &self.trust, None, Some(made.token.clone()))?;
            let (site, world, meter, machines) =
                (self.clone(), world.clone(), meter.clone(), machines.clone());
            joining.spawn(async move {
                for number in (machines.start + worker..machines.end).step_by(AT_ONCE) {
                    let name = format!("machine-{number:04}");
                    site.join(&client, PartRole::Agent, &name, &world, &meter).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(joined) = joining.join_next().await {
            joined??;
        }
        Ok(())
    }
}
