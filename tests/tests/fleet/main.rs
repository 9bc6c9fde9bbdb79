//! A whole fleet, in one process: config server, process server, target server and agents that scan files, each with its own
//! certificate and state. What needs root is called `kernel_`.

mod failover;
mod home;
mod placement;
mod proof;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block::GroupId;
use control::StateCode;
use control::fleet::{
    Confirm, GroupInfo, JobInfo, JobState, Login, MachineInfo, MadeEnrolToken, NewEnrolToken, NewPolicy,
    Page, PartRole, PolicyInfo, Protect, ServerInfo, StepState, Unprotect, VolumeChoice,
};
use enrol::{Client, EnrolError, ServerUrl};
use hyper::Method;
use seawall_agent::{FleetAgent, FleetConfig};
use seawall_config_server::{Config, ConfigServer, Handle, InitOptions, init};
use seawall_process_server::FleetProcessServer;
use seawall_target_server::FleetTargetServer;
use seawall_tests::proxy::{Proxy, Weather};
use serde_json::Value;
use wire::WebTrust;

/// Nothing waits longer; what is waited for comes much sooner.
const PATIENCE: Duration = Duration::from_secs(90);
const PASSWORD: &str = "correct horse battery";
/// Where an agent mounts a BPF file system of the test's own for its tracking, after its name.
const BPF: &str = "-bpf";
const DISK_BYTES: usize = 4 << 20;

struct Fleet {
    base: tempfile::TempDir,
    config: Config,
    server: Option<Handle>,
    url: ServerUrl,
    process: Option<FleetProcessServer>,
    target: Option<FleetTargetServer>,
}

impl Fleet {
    /// With one process and one target server, enrolled and running.
    async fn new() -> Fleet {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("config");
        init(&InitOptions {
            dir: dir.clone(),
            listen: "127.0.0.1:0".into(),
            names: vec!["127.0.0.1".into()],
            administrator: "admin".into(),
            password: PASSWORD.into(),
            database: None,
        })
        .await
        .unwrap();
        let mut config = Config::load(&dir.join("config-server.toml")).unwrap();
        let server = ConfigServer::start(config.clone()).await.unwrap();
        config.listen = server.local_addr().to_string();
        let url = format!("https://{}", server.local_addr()).parse().unwrap();
        let mut fleet = Fleet { base, config, server: Some(server), url, process: None, target: None };
        let file = fleet
            .enrol(
                PartRole::TargetServer,
                "dr",
                "listen = \"127.0.0.1:0\"\ncredentials = \"state/credentials\"\ndata = \"data\"\n",
            )
            .await;
        let config = seawall_target_server::Config::load(&file).unwrap();
        std::fs::create_dir(&config.data).unwrap();
        fleet.target = Some(FleetTargetServer::start(config).await.unwrap());
        let file = fleet
            .enrol(
                PartRole::ProcessServer,
                "cache",
                "[process_server]\nlisten = \"127.0.0.1:0\"\ncredentials = \"state/credentials\"\ncache = \"cache\"\n\
                 cache_bytes = \"256MiB\"\n",
            )
            .await;
        let config = seawall_process_server::Config::load(&file).unwrap();
        fleet.process = Some(FleetProcessServer::start(config).await.unwrap());
        fleet
    }

    async fn client(&self) -> Client {
        let trust =
            WebTrust::Authority(std::fs::read_to_string(self.config.authority.join("ca.pem")).unwrap());
        let client = Client::new(self.url.clone(), &trust, None, None).unwrap();
        client.login(&Login { name: "admin".parse().unwrap(), password: PASSWORD.into() }).await.unwrap();
        client
    }

    /// Enrols a part as its command does; its configuration file.
    async fn enrol(&self, role: PartRole, name: &str, rest: &str) -> PathBuf {
        let dir = self.base.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let new = NewEnrolToken { role, name: Some(name.parse().unwrap()), minutes: 10 };
        let made: MadeEnrolToken = self.client().await.post("/enrol-tokens", &new).await.unwrap();
        let config = dir.join("part.toml");
        let asked = enrol::FileEnrolment {
            server: self.url.clone(),
            token: made.token,
            role,
            name: None,
            config: config.clone(),
            rest: rest.to_owned(),
            advertise: None,
        };
        enrol::enrol_with_file(asked).await.unwrap();
        config
    }

    async fn machine(&self, name: &str) -> Machine {
        let disk = self.base.path().join(format!("{name}.img"));
        std::fs::write(&disk, vec![7; DISK_BYTES]).unwrap();
        self.machine_with(name, "scan", &disk).await
    }

    /// A machine whose agent captures this disk in this way.
    async fn machine_with(&self, name: &str, source: &str, disk: &Path) -> Machine {
        let socket = self.base.path().join(format!("{name}.sock")).display().to_string();
        let tracking = match source {
            "scan" => String::new(),
            _ => {
                let bpf = self.base.path().join(format!("{name}{BPF}"));
                std::fs::create_dir(&bpf).unwrap();
                format!(
                    "keep_tracking = true\ntracking_folder = {:?}\n",
                    bpf.join("seawall").display().to_string()
                )
            }
        };
        let rest = format!("[agent]\nsource = {source:?}\ncontrol_socket = {socket:?}\n{tracking}");
        let file = self.enrol(PartRole::Agent, name, &rest).await;
        let agent = start_agent(&file);
        let machines: Page<MachineInfo> = self.client().await.get("/machines").await.unwrap();
        let info = machines.items.into_iter().find(|machine| machine.name.as_str() == name).unwrap();
        Machine { file, disk: disk.to_owned(), agent: Some(agent), info }
    }

    /// Protects the machine's disk, with a quick policy, and waits for the first point.
    async fn protect(&self, machine: &Machine) -> GroupInfo {
        let client = self.client().await;
        self.reporting(&client).await;
        let policies: Vec<PolicyInfo> = client.get("/policies").await.unwrap();
        let mut policy = policies[0].policy.clone();
        policy.epoch_interval_ms = 200;
        let changed = NewPolicy { name: policies[0].name.clone(), policy };
        client
            .call::<_, Value>(Method::PUT, &format!("/policies/{}", policies[0].id), Some(&changed))
            .await
            .unwrap();
        let asked = Protect {
            volumes: vec![VolumeChoice {
                name: Some("data".parse().unwrap()),
                ..VolumeChoice::of(machine.disk.display().to_string())
            }],
            policy: None,
            process_server: None,
            target_servers: Vec::new(),
            // A file is scanned, and that is warned of.
            despite_warnings: true,
            reverses: None,
        };
        let path = format!("/machines/{}/protect", machine.info.id);
        let job: JobInfo = client.post(&path, &asked).await.unwrap();
        let job = ended(&client, &job).await;
        assert_eq!(job.state, JobState::Done, "{job:#?}");
        assert!(
            job.steps.iter().all(|step| matches!(step.state, StepState::Passed | StepState::Warned)),
            "{job:#?}"
        );
        client.get(&format!("/groups/{}", machine.info.group)).await.unwrap()
    }

    async fn reporting(&self, client: &Client) {
        until("both servers report", || async {
            let mut seen = 0;
            for role in ["process-servers", "target-servers"] {
                let servers: Page<ServerInfo> = client.get(&format!("/{role}")).await.unwrap();
                seen += servers.items.iter().filter(|server| server.seen.is_some()).count();
            }
            (seen >= 2).then_some(())
        })
        .await;
    }

    /// The bytes of a group's volume at the target.
    fn replica(&self, group: &GroupInfo) -> Vec<u8> {
        let dir = self.base.path().join("dr/data").join(group.id.to_string());
        let image = find(&dir, "replica.img").unwrap_or_else(|| panic!("no image below {}", dir.display()));
        std::fs::read(image).unwrap()
    }

    async fn end(mut self, machines: Vec<Machine>) {
        for machine in machines {
            if let Some(agent) = machine.agent {
                agent.shutdown().await;
            }
        }
        self.process.take().unwrap().shutdown().await.unwrap();
        self.target.take().unwrap().shutdown().await;
        if let Some(server) = self.server.take() {
            server.shutdown().await;
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let entries = std::fs::read_dir(self.base.path()).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(BPF)) {
            let mut umount = std::process::Command::new("umount");
            let _ = umount.arg(entry.path()).stderr(std::process::Stdio::null()).status();
        }
    }
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.is_dir() { find(&path, name) } else { path.ends_with(name).then_some(path) }
    })
}

struct Machine {
    file: PathBuf,
    disk: PathBuf,
    agent: Option<FleetAgent>,
    info: MachineInfo,
}

impl Machine {
    /// Writes something that was never there before.
    fn write(&self, byte: u8) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.disk).unwrap();
        file.write_all_at(&[byte; 4096], 65536 * u64::from(byte % 32)).unwrap();
        file.sync_all().unwrap();
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.disk).unwrap()
    }
}

fn start_agent(file: &Path) -> FleetAgent {
    FleetAgent::start(FleetConfig::load(file).unwrap().unwrap()).unwrap()
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, look: impl Fn() -> F) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn ended(client: &Client, job: &JobInfo) -> JobInfo {
    let path = format!("/jobs/{}", job.id);
    until("the job ends", || async {
        let job: JobInfo = client.get(&path).await.unwrap();
        job.state.ended().then_some(job)
    })
    .await
}

async fn replicated(fleet: &Fleet, machine: &Machine, group: &GroupInfo) {
    becomes_equal(fleet, &group.id, || (fleet.replica(group), machine.content())).await;
}

/// Waits until a replica and a disk of the group are equal. Says how the group is when that does not come.
async fn becomes_equal(fleet: &Fleet, group: &GroupId, look: impl Fn() -> (Vec<u8>, Vec<u8>)) {
    let began = Instant::now();
    loop {
        let (replica, disk) = look();
        if replica == disk {
            return;
        }
        if began.elapsed() >= PATIENCE {
            let at = replica.iter().zip(&disk).position(|(replica, disk)| replica != disk);
            let client = fleet.client().await;
            let now: Value = client.get(&format!("/groups/{group}")).await.unwrap();
            panic!(
                "waited in vain: the replica has {} bytes, the disk {}, they differ at {at:?}: {now:#}",
                replica.len(),
                disk.len()
            );
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Protected by one request, without anybody editing a file; the group's key stays with agent and target; the protection
/// ends by one request, and the points stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_protected_by_desired_state() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine("web").await;
    let group = fleet.protect(&machine).await;
    assert!(group.newest_point.is_some() && group.rpo_ms.is_some(), "{group:#?}");
    replicated(&fleet, &machine, &group).await;

    // Two machines: the second does not disturb the first.
    let other = fleet.machine("db").await;
    let other_group = fleet.protect(&other).await;
    other.write(99);
    replicated(&fleet, &other, &other_group).await;
    machine.write(98);
    replicated(&fleet, &machine, &group).await;

    // The key is nowhere in what the config server keeps.
    let key = std::fs::read_to_string(fleet.base.path().join("web/state/group.key")).unwrap();
    let at_target = fleet.base.path().join(format!("dr/state/keys/{}.key", group.id));
    assert_eq!(std::fs::read_to_string(&at_target).unwrap(), key);
    for entry in std::fs::read_dir(fleet.base.path().join("config")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            let found = bytes.windows(64).any(|window| window == key.trim().as_bytes());
            assert!(!found, "{}", path.display());
        }
    }

    let client = fleet.client().await;
    let path = format!("/groups/{}/unprotect", group.id);
    let job: JobInfo = client.post(&path, &Unprotect { confirm: "web".into() }).await.unwrap();
    assert_eq!(ended(&client, &job).await.state, JobState::Done);
    let after: GroupInfo = client.get(&format!("/groups/{}", group.id)).await.unwrap();
    assert!(after.newest_point.is_some());
    let before = fleet.replica(&group);
    machine.write(97);
    other.write(96);
    replicated(&fleet, &other, &other_group).await;
    assert_eq!(fleet.replica(&group), before, "what is not protected is not captured");
    fleet.end(vec![machine, other]).await;
}

/// The way from agent to process server is measured before anything is declared: what comes through a slow one is known, and
/// one that is down is its own failed check, with the mend.
#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_the_process_server_is_measured_before_anything_is_declared() {
    const SLOW: u64 = 1 << 20;
    let mut fleet = Fleet::new().await;
    let machine = fleet.machine("web").await;
    let client = fleet.client().await;
    fleet.reporting(&client).await;
    // A proxy is put before the process server.
    let listens = fleet.process.as_ref().unwrap().local_addr().unwrap();
    fleet.process.take().unwrap().shutdown().await.unwrap();
    let proxy = Proxy::start(listens).unwrap();
    let mut config =
        seawall_process_server::Config::load(&fleet.base.path().join("cache/part.toml")).unwrap();
    config.process_server.listen = listens.to_string();
    config.config_server.as_mut().unwrap().advertise = Some(proxy.address().to_string());
    fleet.process = Some(FleetProcessServer::start(config).await.unwrap());
    until("the process server says where it is reached", || async {
        let servers: Page<ServerInfo> = client.get("/process-servers").await.unwrap();
        (servers.items[0].address == proxy.address().to_string()).then_some(())
    })
    .await;

    let protect = async |despite_warnings| {
        let volume = VolumeChoice::of(machine.disk.display().to_string());
        let asked = Protect {
            volumes: vec![volume],
            policy: None,
            process_server: None,
            target_servers: Vec::new(),
            despite_warnings,
            reverses: None,
        };
        let path = format!("/machines/{}/protect", machine.info.id);
        let job: JobInfo = client.post(&path, &asked).await.unwrap();
        let job = ended(&client, &job).await;
        let step = |code: &str| job.steps.iter().find(|step| step.code == code).unwrap().clone();
        (job.clone(), step("link"), step("bandwidth"))
    };
    proxy.set(Weather::Down);
    let (job, link, bandwidth) = protect(true).await;
    assert_eq!((job.state, link.state), (JobState::Failed, StepState::Failed), "{job:#?}");
    assert!(link.message.contains("does not reach the process server"), "{link:#?}");
    assert!(link.mend.contains("port"), "{link:#?}");
    assert_eq!(bandwidth.state, StepState::Skipped);

    // A file is scanned, which is warned of: nothing is declared, and the way was measured all the same.
    proxy.set(Weather::Slow(SLOW));
    let (job, link, bandwidth) = protect(false).await;
    assert_eq!((job.state, link.state), (JobState::Failed, StepState::Passed), "{job:#?}");
    assert_eq!(bandwidth.state, StepState::Passed, "{job:#?}");
    let (rate, rest) = bandwidth.message.split_once("/s came through").unwrap();
    let (number, unit) = rate.split_once(' ').unwrap();
    let unit = ["B", "KiB", "MiB", "GiB"].iter().position(|name| *name == unit).unwrap();
    let rate = number.parse::<f64>().unwrap() * 1024_f64.powi(unit as i32);
    assert!(rate > 0.0 && rate <= SLOW as f64 * 1.1, "{bandwidth:#?}");
    assert!(rest.contains("The first copy of 4.0 MiB takes about"), "{bandwidth:#?}");

    proxy.set(Weather::Clear);
    let (job, ..) = protect(true).await;
    assert_eq!(job.state, JobState::Done, "{job:#?}");
    fleet.end(vec![machine]).await;
}

/// The config server dies for long: points go on, parts restart without it, and when it is back everything is as it says.
#[tokio::test(flavor = "multi_thread")]
async fn the_data_path_goes_on_without_the_config_server() {
    let mut fleet = Fleet::new().await;
    let mut machine = fleet.machine("web").await;
    let group = fleet.protect(&machine).await;
    let epoch = group.newest_point.as_ref().unwrap().epoch;
    fleet.server.take().unwrap().shutdown().await;

    machine.write(50);
    replicated(&fleet, &machine, &group).await;
    // Each part starts anew without it, and knows what to do.
    machine.agent.take().unwrap().shutdown().await;
    fleet.target.take().unwrap().shutdown().await;
    let target = seawall_target_server::Config::load(&fleet.base.path().join("dr/part.toml")).unwrap();
    // A port of its own choice would be another one now, and nobody could tell the process server.
    let address = group_address(&fleet);
    let target = seawall_target_server::Config { listen: address, ..target };
    fleet.target = Some(FleetTargetServer::start(target).await.unwrap());
    machine.agent = Some(start_agent(&machine.file));
    machine.write(51);
    replicated(&fleet, &machine, &group).await;

    fleet.server = Some(ConfigServer::start(fleet.config.clone()).await.unwrap());
    let client = fleet.client().await;
    let path = format!("/groups/{}", group.id);
    let after = until("the agent reports again, with newer points", || async {
        let group: GroupInfo = client.get(&path).await.unwrap();
        let newer = group.newest_point.as_ref().is_some_and(|point| point.epoch > epoch);
        (newer && group.state == StateCode::Replicating).then_some(group)
    })
    .await;
    assert!(after.ladder.applied > epoch);
    // What is declared now is taken up as if nothing had been.
    let job: JobInfo =
        client.post(&format!("{path}/unprotect"), &Unprotect { confirm: "web".into() }).await.unwrap();
    assert_eq!(ended(&client, &job).await.state, JobState::Done);
    fleet.end(vec![machine]).await;
}

/// Where the process server was told that the target listens.
fn group_address(fleet: &Fleet) -> String {
    let text = std::fs::read_to_string(fleet.base.path().join("cache/state/desired.json")).unwrap();
    let desired: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    desired["groups"][0]["targets"][0].as_str().unwrap().to_owned()
}

/// A revoked agent is cut off by the process server, which it talks to all the time, within a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_machine_is_cut_off() {
    let fleet = Fleet::new().await;
    let mut machine = fleet.machine("web").await;
    let group = fleet.protect(&machine).await;
    replicated(&fleet, &machine, &group).await;
    let client = fleet.client().await;
    // The agent does not hear of it: whoever has stolen a certificate would not either.
    let stolen = fleet.base.path().join("stolen");
    copy(&fleet.base.path().join("web"), &stolen);
    let job: JobInfo = client
        .post(&format!("/groups/{}/unprotect", group.id), &Unprotect { confirm: "web".into() })
        .await
        .unwrap();
    ended(&client, &job).await;
    machine.agent.take().unwrap().shutdown().await;
    let credentials = wire::Credentials::load(&stolen.join("state/credentials")).unwrap();
    let process = fleet.process.as_ref().unwrap().local_addr().unwrap().to_string();
    wire::connect(&process, wire::Role::ProcessServer, &credentials).await.unwrap();

    let path = format!("/machines/{}", machine.info.id);
    let wrong: Result<Value, EnrolError> =
        client.call(Method::DELETE, &path, Some(&Confirm { confirm: "wbe".into() })).await;
    assert!(wrong.unwrap_err().problem().unwrap().code == "not-confirmed");
    client.call::<_, Value>(Method::DELETE, &path, Some(&Confirm { confirm: "web".into() })).await.unwrap();
    let error = until("the stolen certificate is refused", || async {
        wire::connect(&process, wire::Role::ProcessServer, &credentials).await.err()
    })
    .await;
    assert!(!error.to_string().is_empty());
    fleet.end(Vec::new()).await;
}

fn copy(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

/// What somebody who asks over HTTP is told.
async fn scrape(at: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Every name of ours that a text speaks of.
fn metrics_in(text: &str) -> std::collections::BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
    words.filter(|word| word.starts_with("seawall_")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_is_told_what_the_dashboard_shows() {
    let fleet = Fleet::new().await;
    let machine = fleet.machine("web").await;
    fleet.protect(&machine).await;
    let ready = |values: control::metrics::Values| std::future::ready(values.text());
    let agent = machine.agent.as_ref().unwrap().figures();
    let process = fleet.process.as_ref().unwrap().figures();
    let target = fleet.target.as_ref().unwrap().figures();
    let server = fleet.server.as_ref().unwrap().figures();
    let of_fleet = move || {
        let values = server();
        async move { values.await.text() }
    };
    let all = [
        telemetry::Scraped::start("127.0.0.1:0", move || ready(agent())).await.unwrap(),
        telemetry::Scraped::start("127.0.0.1:0", move || ready(process())).await.unwrap(),
        telemetry::Scraped::start("127.0.0.1:0", move || ready(target())).await.unwrap(),
        telemetry::Scraped::start("127.0.0.1:0", of_fleet).await.unwrap(),
    ];
    let told = until("the process server has heard of everything", || async {
        let mut told = String::new();
        for scraped in &all {
            told += &scrape(scraped.local_addr(), "/metrics").await;
        }
        told.contains("seawall_process_target_backlog_bytes{").then_some(told)
    })
    .await;
    let lines: Vec<&str> = told.lines().filter(|line| line.starts_with("seawall_")).collect();
    for line in &lines {
        let (_, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok_and(|value| value.is_finite() && value >= 0.0), "{line}");
    }
    let names: std::collections::BTreeSet<String> =
        lines.iter().map(|line| line.split(['{', ' ']).next().unwrap().to_owned()).collect();
    let dashboard = include_str!("../../../packaging/grafana/seawall.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let shown: Vec<&str> = dashboard["panels"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default())
        .map(|target| target["expr"].as_str().unwrap().to_owned().leak() as &str)
        .collect();
    let shown = metrics_in(&shown.join(" "));
    assert!(shown.len() > 20, "{shown:?}");
    let missing: Vec<_> = shown.difference(&names).collect();
    assert!(missing.is_empty(), "the dashboard shows {missing:?}, which nobody tells: {names:#?}");
    // What is told is documented, and nothing else is answered.
    let documented = metrics_in(include_str!("../../../docs/metrics.md"));
    assert!(names.is_subset(&documented), "{:?}", names.difference(&documented));
    assert!(scrape(all[0].local_addr(), "/").await.starts_with("HTTP/1.1 404"));
    drop(all);
    fleet.end(vec![machine]).await;
}
