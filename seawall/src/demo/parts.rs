//! The demo's fleet: a site as `seawall server` runs it, and an agent that enrolled with a token and protects what the config
//! server says.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use control::fleet::{
    JobInfo, JobState, Login, MachineInfo, MadeEnrolToken, NewEnrolToken, Page, PartRole, Protect,
    ServerInfo, StepState, VolumeChoice,
};
use control::{AgentReport, TargetGroup};
use enrol::{Client, FileEnrolment, Fingerprint, enrol_with_file};
use seawall_agent::{FleetAgent, FleetConfig};

use super::source::Scenario;
use crate::server::{NewSite, Site, SiteDir};

const ADMINISTRATOR: &str = "admin";
const MACHINE: &str = "demo";
/// Minutes that the demo's token is good.
const TOKEN_MINUTES: u32 = 5;
/// Until all parts have reported for the first time.
const REPORTING_TIME_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// The parts, all in this process, on loopback.
pub(super) struct Parts {
    pub(super) site: Site,
    pub(super) agent: FleetAgent,
    /// Of the site's administrator.
    pub(super) password: String,
    client: Client,
}

impl Parts {
    /// Makes the site, enrols the agent, and waits until everybody has reported.
    pub(super) async fn start(dir: &Path, scenario: Scenario) -> anyhow::Result<Parts> {
        let [listen, process, target] = free_ports()?;
        let password = seawall_config_server::new_password();
        let made = SiteDir::open(&dir.join("seawall"))?;
        made.make(&NewSite {
            name: "127.0.0.1".to_owned(),
            listen: format!("127.0.0.1:{listen}"),
            process_server_port: process,
            target_server_port: target,
            administrator: ADMINISTRATOR.parse()?,
            password: password.clone(),
        })
        .await?;
        let site = made.start().await?;
        let known_by: Fingerprint = site.fingerprint().parse()?;
        let client = Client::new(site.own_url().clone(), &known_by.trust(), None, None)?;
        client.login(&Login { name: ADMINISTRATOR.parse()?, password: password.clone() }).await?;
        let config = enrol_agent(&client, &site, dir, scenario).await?;
        let config = FleetConfig::load(&config)?.context("the agent's configuration has no config server")?;
        let parts = Parts { agent: FleetAgent::start(config)?, site, password, client };
        parts.all_report().await?;
        Ok(parts)
    }

    /// How the agent is; as if it had never done anything while it protects nothing.
    pub(super) fn report(&self) -> AgentReport {
        self.agent.report().unwrap_or_default()
    }

    /// The group at the target, once that has heard of it.
    pub(super) fn group(&self) -> Option<TargetGroup> {
        self.site.target()?.status()?.groups.into_iter().next()
    }

    /// Asks the config server for the disk's protection.
    pub(super) async fn protect(&self, device: &Path) -> anyhow::Result<JobInfo> {
        let machines: Page<MachineInfo> = self.client.get("/machines").await?;
        let machine = machines.items.into_iter().next().context("the config server knows no machine")?;
        let asked = Protect {
            volumes: vec![VolumeChoice::of(device.display().to_string())],
            policy: None,
            process_server: None,
            target_servers: Vec::new(),
            // An image file is scanned, and loop devices have no number of their own: both are warned of.
            despite_warnings: true,
            reverses: None,
        };
        Ok(self.client.post(&format!("/machines/{}/protect", machine.id), &asked).await?)
    }

    /// Looks how the job is; fails when that failed.
    pub(super) async fn look_at(&self, job: &JobInfo) -> anyhow::Result<JobInfo> {
        let now: JobInfo = self.client.get(&format!("/jobs/{}", job.id)).await?;
        if matches!(now.state, JobState::Failed | JobState::Cancelled) {
            let failed = now.steps.iter().filter(|step| step.state == StepState::Failed);
            let why: Vec<String> =
                failed.map(|step| format!("{}: {} {}", step.title, step.message, step.mend)).collect();
            bail!("protect the demo's disk: {} {}", now.message, why.join("; "));
        }
        Ok(now)
    }

    async fn all_report(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let mut silent = Vec::new();
            for (what, path) in [("process server", "/process-servers"), ("target server", "/target-servers")]
            {
                let servers: Page<ServerInfo> = self.client.get(path).await?;
                if servers.items.iter().all(|server| server.seen.is_none()) {
                    silent.push(what);
                }
            }
            let machines: Page<MachineInfo> = self.client.get("/machines").await?;
            if machines.items.iter().all(|machine| machine.seen.is_none()) {
                silent.push("agent");
            }
            if silent.is_empty() {
                return Ok(());
            }
            ensure!(
                began.elapsed() < REPORTING_TIME_MAX,
                "wait for the first reports to the config server: none of the {} after {} s",
                silent.join(" and the "),
                REPORTING_TIME_MAX.as_secs()
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// As `seawall-agent enroll` does; the agent's configuration file.
async fn enrol_agent(
    client: &Client,
    site: &Site,
    dir: &Path,
    scenario: Scenario,
) -> anyhow::Result<std::path::PathBuf> {
    let asked = NewEnrolToken { role: PartRole::Agent, name: Some(MACHINE.parse()?), minutes: TOKEN_MINUTES };
    let made: MadeEnrolToken = client.post("/enrol-tokens", &asked).await?;
    let home = dir.join("agent");
    std::fs::create_dir(&home).with_context(|| format!("make directory {}", home.display()))?;
    let quoted = |path: std::path::PathBuf| toml::Value::from(path.display().to_string()).to_string();
    // The demo leaves nothing behind in the kernel, and keeps away from what an agent of this machine has there.
    let rest = format!(
        "[agent]\nsource = \"{}\"\nkeep_tracking = false\ntracking_folder = {}\ncontrol_socket = {}\n",
        scenario.source(),
        quoted(home.join("tracking")),
        quoted(home.join("agent.sock"))
    );
    let config = home.join("agent.toml");
    enrol_with_file(FileEnrolment {
        server: site.own_url().clone(),
        token: made.token,
        role: PartRole::Agent,
        name: None,
        config: config.clone(),
        rest,
        advertise: None,
    })
    .await?;
    Ok(config)
}

/// Ports of loopback that nobody uses just now.
fn free_ports() -> anyhow::Result<[u16; 3]> {
    let mut held = Vec::new();
    let mut ports = [0; 3];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0").context("find a free port on loopback")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
