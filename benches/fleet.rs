//! A config server with 2,000 machines that report every 5 s, the process server and the target server that serve all of them, and
//! somebody who looks at the console's figures, all on this machine: how long requests take (those of the machines and those of who
//! looks), and what processor time and memory the config server needs. Quick: 200 machines for 10 s.
//!
//! The config server is a process of its own: this program started again. Machines enrol, are protected and report by the code that
//! real ones use (`enrol::Member`), over connections of their own that stay open; only what they report is made up. Times are
//! taken at the machine, from before the request is written until after the answer is read and kept.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use control::fleet::{
    AlertInfo, AlertKind, EventInfo, GroupInfo, JobInfo, Login, MachineInfo, MadeEnrolToken, MadeToken,
    NewApiToken, NewEnrolToken, NewPolicy, Overview, Page, PartRole, PolicyInfo, Protect, Scope,
    VolumeChoice,
};
use enrol::{Client, ConfigServerSection, Member, ServerUrl};
use seawall_benches::fleet::{Figures, LATE_EVERY, Meter, Part, World};
use seawall_benches::{quick, result};
use seawall_config_server::{Config, ConfigServer, InitOptions, init};
use tokio::task::JoinSet;
use wire::WebTrust;

/// Names the configuration when this program is started again as the config server.
const CONFIG_SERVER: &str = "SEAWALL_BENCH_CONFIG_SERVER";
const PASSWORD: &str = "correct horse battery";
/// Machines that enrol at the same time.
const AT_ONCE: usize = 32;
/// Nothing that is set up takes longer.
const PATIENCE: Duration = Duration::from_secs(400);
/// Between two rounds of who looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// What the aim allows: for 99 of 100 requests, and for memory.
const LATENCY_AIM: Duration = Duration::from_millis(100);
const MEMORY_AIM_BYTES: f64 = 500e6;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match std::env::var_os(CONFIG_SERVER) {
        Some(file) => runtime.block_on(serve(Path::new(&file))),
        None => runtime.block_on(measure()),
    }
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
struct Server {
    process: Child,
    url: ServerUrl,
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
    fn processor_time(&self) -> anyhow::Result<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // After the name in parentheses, which may hold blanks: fields 14 and 15 of proc_pid_stat(5), in ticks.
        let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |place: usize| fields.get(place).and_then(|field| field.parse::<u64>().ok());
        let ticks = ticks(11).zip(ticks(12)).map(|(user, system)| user + system).context("processor time")?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }

    /// The most memory that it has had.
    fn memory_bytes(&self) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib * 1024.0)
    }

    /// What its looks for what is wrong took, in milliseconds.
    fn looks(&self) -> anyhow::Result<Vec<f64>> {
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

async fn measure() -> anyhow::Result<()> {
    let (machines, warm_up, time) = match quick() {
        true => (200, Duration::from_secs(6), Duration::from_secs(10)),
        false => (2000, Duration::from_secs(15), Duration::from_secs(60)),
    };
    let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let dir = base.path().join("config");
    init(&InitOptions {
        dir: dir.clone(),
        listen: "127.0.0.1:0".into(),
        names: vec!["127.0.0.1".into()],
        administrator: "admin".into(),
        password: PASSWORD.into(),
        database: None,
    })
    .await?;
    let server = Server::start(&dir.join("config-server.toml"), base.path().join("log"))?;
    let trust = WebTrust::Authority(std::fs::read_to_string(dir.join("ca/ca.pem"))?);
    let site = Arc::new(Site { url: server.url.clone(), trust, states: base.path().to_owned() });
    let client = site.client().await?;
    let world = World::new();
    let meter = Arc::new(Meter::default());

    let began = Instant::now();
    allow_rpo(&client).await?;
    for (role, name) in [(PartRole::TargetServer, "target"), (PartRole::ProcessServer, "process")] {
        site.join(&client, role, name, &world, &meter).await?;
    }
    site.join_machines(machines, &world, &meter).await?;
    println!("fleet: {machines} machines enrolled in {:.0} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    protect_all(&client, machines).await?;
    println!("fleet: {machines} machines protected in {:.0} s", began.elapsed().as_secs_f64());

    tokio::time::sleep(warm_up).await;
    let following = follow(&site).await?;
    let before = (server.processor_time()?, server.looks()?.len());
    meter.begin();
    let looking = tokio::time::timeout(time, look(&client, &meter)).await;
    // It goes on until the time is over, unless something fails.
    if let Ok(failed) = looking {
        failed?;
    }
    let measured = meter.end();
    let (used, looks) = (server.processor_time()? - before.0, server.looks()?.split_off(before.1));
    let events = following.abort_and_count();

    report(&measured, time, used, &server, looks, events)?;
    check(&client, machines, &measured, time).await
}

fn report(
    measured: &Figures,
    time: Duration,
    used: Duration,
    server: &Server,
    mut looks: Vec<f64>,
    events: usize,
) -> anyhow::Result<()> {
    println!("{:<26} {:>8} {:>9} {:>9} {:>9}", "request", "count", "p50 ms", "p99 ms", "max ms");
    for (what, times) in measured.by_request() {
        let at = |part: f64| times.at(part).as_secs_f64() * 1e3;
        println!("{what:<26} {:>8} {:>9.1} {:>9.1} {:>9.1}", times.len(), at(0.5), at(0.99), at(1.0));
    }
    looks.sort_by(f64::total_cmp);
    ensure!(!looks.is_empty(), "the config server has not looked for what is wrong");
    println!(
        "a look for what is wrong: median {:.1} ms, longest {:.1} ms of {}; {events} events on the stream",
        looks[looks.len() / 2],
        looks[looks.len() - 1],
        looks.len()
    );
    println!(
        "the config server used {:.1} s of processor time in {:.0} s",
        used.as_secs_f64(),
        time.as_secs_f64()
    );
    let all = measured.all();
    result("fleet_api_p99", LATENCY_AIM.as_secs_f64() * 1e3, "ms allowed", all.at(0.99).as_secs_f64() * 1e3)?;
    result("fleet_memory", MEMORY_AIM_BYTES / 1e6, "MB allowed", server.memory_bytes()? / 1e6)
}

/// That it was not fast by leaving something out.
async fn check(client: &Client, machines: usize, measured: &Figures, time: Duration) -> anyhow::Result<()> {
    let expected = machines as f64 * time.as_secs_f64() / 5.0;
    let heard = measured.check_ins() as f64;
    ensure!(heard > expected * 0.9, "{heard} check-ins were answered, of {expected}");
    ensure!(measured.failed() == 0, "{} check-ins failed", measured.failed());
    let overview: Overview = client.get("/overview").await?;
    ensure!(overview.groups == machines as i64 && overview.silent_parts == 0, "{overview:?}");
    let alerts: Vec<AlertInfo> = client.get("/alerts").await?;
    let late =
        alerts.iter().filter(|alert| alert.kind == AlertKind::PointAge && alert.cleared.is_none()).count();
    ensure!(late == machines.div_ceil(LATE_EVERY), "{late} groups are told to be late");
    Ok(())
}

/// The fleet's default policy, with a limit of age that some groups exceed.
async fn allow_rpo(client: &Client) -> anyhow::Result<()> {
    let policies: Vec<PolicyInfo> = client.get("/policies").await?;
    let mut policy = policies[0].policy.clone();
    policy.rpo_s_max = 300;
    let changed = NewPolicy { name: policies[0].name.clone(), policy };
    let path = format!("/policies/{}", policies[0].id);
    let _: serde_json::Value = client.call(hyper::Method::PUT, &path, Some(&changed)).await?;
    Ok(())
}

async fn protect_all(client: &Client, machines: usize) -> anyhow::Result<()> {
    let mut after = String::new();
    loop {
        let page: Page<MachineInfo> = client.get(&format!("/machines?limit=1000{after}")).await?;
        for machine in &page.items {
            let disk = |device: &str| VolumeChoice { device: device.into(), name: None };
            let asked = Protect {
                volumes: vec![disk("/dev/vda"), disk("/dev/vdb")],
                policy: None,
                process_server: None,
                target_servers: Vec::new(),
                despite_warnings: false,
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

/// Somebody who looks, one request after the other.
async fn look(client: &Client, meter: &Meter) -> anyhow::Result<()> {
    loop {
        let timed = async |what: &'static str, path: &str| -> anyhow::Result<serde_json::Value> {
            let began = Instant::now();
            let answer = client.get(path).await.with_context(|| format!("look at {path}"))?;
            meter.took(what, began.elapsed());
            Ok(answer)
        };
        timed("GET /overview", "/overview").await?;
        timed("GET /machines", "/machines").await?;
        let groups: Page<GroupInfo> = serde_json::from_value(timed("GET /groups", "/groups").await?)?;
        // What the console's first page asks for.
        timed("GET /groups by attention", "/groups?order=attention&limit=50").await?;
        let group = groups.items.first().context("there are no groups")?;
        timed("GET /groups/{id}", &format!("/groups/{}", group.id)).await?;
        timed("GET /alerts", "/alerts").await?;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

struct Following {
    task: tokio::task::JoinHandle<()>,
    seen: Arc<std::sync::atomic::AtomicUsize>,
}

impl Following {
    fn abort_and_count(self) -> usize {
        self.task.abort();
        self.seen.load(std::sync::atomic::Ordering::Relaxed)
    }
}

async fn follow(site: &Site) -> anyhow::Result<Following> {
    let client = site.client().await?;
    let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = seen.clone();
    let task = tokio::spawn(async move {
        let followed = client
            .follow("/events/stream", |data| {
                let known = serde_json::from_str::<EventInfo>(data).is_ok();
                counted.fetch_add(usize::from(known), std::sync::atomic::Ordering::Relaxed);
                true
            })
            .await;
        if let Err(error) = followed {
            eprintln!("fleet: the stream of events ended: {error}");
        }
    });
    Ok(Following { task, seen })
}

/// Where the config server is, and where parts keep what is theirs.
struct Site {
    url: ServerUrl,
    trust: WebTrust,
    states: PathBuf,
}

impl Site {
    /// An administrator.
    async fn client(&self) -> anyhow::Result<Client> {
        let client = Client::new(self.url.clone(), &self.trust, None, None)?;
        client.login(&Login { name: "admin".parse()?, password: PASSWORD.into() }).await?;
        Ok(client)
    }

    /// Enrols a part, and lets it report from now on.
    async fn join(
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

    /// Several at a time, each over a connection of its own.
    async fn join_machines(
        self: &Arc<Site>,
        machines: usize,
        world: &Arc<World>,
        meter: &Arc<Meter>,
    ) -> anyhow::Result<()> {
        let asked = NewApiToken { name: "bench".parse()?, scopes: vec![Scope::Enrol], days: 1 };
        let made: MadeToken = self.client().await?.post("/tokens", &asked).await?;
        let mut joining = JoinSet::new();
        for worker in 0..AT_ONCE {
            let client = Client::new(self.url.clone(), &self.trust, None, Some(made.token.clone()))?;
            let (site, world, meter) = (self.clone(), world.clone(), meter.clone());
            joining.spawn(async move {
                for number in (worker..machines).step_by(AT_ONCE) {
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
