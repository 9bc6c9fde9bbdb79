//! `seawall protect` and `seawall unprotect`.

use anyhow::ensure;
use clap::Args;
use control::fleet::{JobInfo, PolicyInfo, Protect, ResourceId, ServerInfo, Unprotect, VolumeChoice};

use super::change::Certain;
use super::{Fleet, ProfilePlace, id_of, job};
use crate::exit::Exit;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Look whether it can be done, do it, and watch the first copy:
    seawall protect web /dev/vda /dev/vdb --watch
  A disk by its serial number, on a target server of one's choice:
    seawall protect web serial:S4EVNX0R --target-server dr2 --policy databases
  seawall machine show web

Disks that are protected together share one instant. Checks come first; when one fails, or warns and --despite-warnings is not given,
nothing is changed. Exit status with --watch: 0 when there is a recovery point, 3 when it could not be done.")]
pub(crate) struct ProtectOptions {
    #[command(flatten)]
    common: Common,
    /// Disks, as the machine names them: a path, or serial:..., wwn:..., ptuuid:..., fsuuid:...
    #[arg(value_name = "DISK", required = true)]
    disks: Vec<String>,
    /// Policy to follow, by name [default: the one called default]
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// Process server, by name [default: the one with the fewest groups]
    #[arg(long, value_name = "NAME")]
    process_server: Option<String>,
    /// Target server, by name; once for each [default: the one with the most free space]
    #[arg(long = "target-server", value_name = "NAME")]
    target_servers: Vec<String>,
    /// Go on although checks warn
    #[arg(long)]
    despite_warnings: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall unprotect web
  seawall unprotect web --yes --watch

Asks for the machine's name to be typed, unless told --yes. Its disks are not captured any more; the recovery points stay. Exit status
with --watch: 0 when it is done, 3 when it could not be done.")]
pub(crate) struct UnprotectOptions {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    certain: Certain,
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    place: ProfilePlace,
    /// Machine, by name or id, as `seawall machine list` shows it
    #[arg(value_name = "MACHINE")]
    machine: String,
    /// Show how it goes on until it has ended
    #[arg(long)]
    watch: bool,
    /// JSON instead of text: the job, with --watch once for each change, one a line
    #[arg(long)]
    json: bool,
}

impl ProtectOptions {
    pub(crate) fn json(&self) -> bool {
        self.common.json
    }
}

impl UnprotectOptions {
    pub(crate) fn json(&self) -> bool {
        self.common.json
    }
}

pub(crate) async fn protect(options: &ProtectOptions) -> anyhow::Result<Exit> {
    let fleet = Fleet::open(&options.common.place)?;
    let machine = fleet.machine(&options.common.machine).await?;
    let policy = match &options.policy {
        Some(named) => {
            let policies: Vec<PolicyInfo> = fleet.get("/policies").await?;
            let policies = policies.iter().map(|policy| (policy.name.as_str(), &policy.id));
            Some(id_of("policy", named, policies)?)
        }
        None => None,
    };
    let process_server = match &options.process_server {
        Some(named) => Some(server(&fleet, "process server", "/process-servers", named).await?),
        None => None,
    };
    let mut target_servers = Vec::new();
    for named in &options.target_servers {
        target_servers.push(server(&fleet, "target server", "/target-servers", named).await?);
    }
    let volumes = options.disks.iter().map(VolumeChoice::of).collect();
    let asked = Protect {
        volumes,
        policy,
        process_server,
        target_servers,
        despite_warnings: options.despite_warnings,
        reverses: None,
    };
    let begun: JobInfo = fleet.post(&format!("/machines/{}/protect", machine.id), &asked).await?;
    job::follow(&fleet, begun, options.common.watch, options.common.json).await
}

pub(crate) async fn unprotect(options: &UnprotectOptions) -> anyhow::Result<Exit> {
    let fleet = Fleet::open(&options.common.place)?;
    let machine = fleet.machine(&options.common.machine).await?;
    let name = machine.name.to_string();
    ensure!(machine.protected, "unprotect {name}: it is not protected; nothing need be done");
    let about = format!("The disks of {name} will not be captured any more; its recovery points stay.");
    options.certain.ask("unprotect", &name, &about)?;
    let path = format!("/groups/{}/unprotect", machine.group);
    let begun: JobInfo = fleet.post(&path, &Unprotect { confirm: name }).await?;
    job::follow(&fleet, begun, options.common.watch, options.common.json).await
}

pub(super) async fn server(fleet: &Fleet, what: &str, path: &str, named: &str) -> anyhow::Result<ResourceId> {
    let servers: Vec<ServerInfo> = fleet.all(path).await?;
    id_of(what, named, servers.iter().map(|server| (server.name.as_str(), &server.id)))
}
