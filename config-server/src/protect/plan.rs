//! What is to be protected and where, with everything chosen that was left to choose.

use std::collections::{BTreeMap, HashSet};

use block::GroupId;
use control::fleet::{
    ChangeTargets, GroupInfo, MachineInfo, PartRole, Protect, ProtectedVolume, ResourceId, ServerInfo,
    UnixMillis,
};
use serde::{Deserialize, Serialize};

use crate::api::guard::parse;
use crate::api::policy::DEFAULT_POLICY;
use crate::app::App;
use crate::fault::{Answer, conflict, invalid};
use crate::view;

/// What a job of protection is to do, with everything chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(super) group: GroupId,
    pub(super) volumes: Vec<ProtectedVolume>,
    pub(super) policy: ResourceId,
    pub(super) process_server: ResourceId,
    pub(super) target_servers: Vec<ResourceId>,
    pub(super) despite_warnings: bool,
    /// The group is protected, and only where it goes changes.
    #[serde(default)]
    pub(super) protected: bool,
    /// Targets that it is to leave when all others have a point.
    #[serde(default)]
    pub(super) leaving: Vec<ResourceId>,
    /// By volume, the disks at the target that it comes home to.
    #[serde(default)]
    pub(super) adopt: BTreeMap<String, String>,
    /// The group in whose place these disks are in use.
    #[serde(default)]
    pub(super) reverses: Option<GroupId>,
}

/// Chooses what was left to choose.
pub(crate) async fn plan(app: &App, machine: &MachineInfo, asked: Protect) -> Answer<Plan> {
    if machine.protected {
        return Err(conflict(
            format!("The machine {} is protected already", machine.name),
            "To protect other disks, end its protection and protect it again; what is at the target is compared and used.",
        ));
    }
    let policy = match &asked.policy {
        Some(policy) => view::policy(&app.store, policy).await?.id,
        None => {
            let policies = view::policies(&app.store).await?;
            let named = policies.into_iter().find(|policy| policy.name.as_str() == DEFAULT_POLICY);
            named
                .map(|policy| policy.id)
                .ok_or_else(|| invalid(format!("There is no policy {DEFAULT_POLICY}; say which")))?
        }
    };
    let process_server = match &asked.process_server {
        Some(server) => view::server(&app.store, PartRole::ProcessServer, server).await?.id,
        None => {
            let reporting = reporting(app, PartRole::ProcessServer).await?;
            let free = reporting.into_iter().min_by_key(|server| server.groups);
            free.map(|server| server.id).ok_or_else(|| no_server("process server"))?
        }
    };
    let mut target_servers = named(app, &asked.target_servers).await?;
    let kept = targets_before(app, &machine.group).await?;
    if target_servers.is_empty() {
        target_servers.clone_from(&kept);
    }
    if target_servers.is_empty() {
        let reporting = reporting(app, PartRole::TargetServer).await?;
        let free = |server: &ServerInfo| server.capacity.map_or(0, |capacity| capacity.bytes_free);
        let roomy = reporting.into_iter().max_by_key(free);
        target_servers.push(roomy.map(|server| server.id).ok_or_else(|| no_server("target server"))?);
    }
    let volumes = volumes(&asked)?;
    let adopt = adopted(&asked, &volumes)?;
    if !adopt.is_empty() {
        comes_home(app, machine, &asked, &kept).await?;
    }
    let (despite_warnings, reverses) = (asked.despite_warnings, asked.reverses);
    let (protected, leaving) = (false, Vec::new());
    if !kept.is_empty() && !target_servers.iter().any(|target| kept.contains(target)) {
        let before = view::group(&app.store, &machine.group).await?;
        if before.process_server != process_server {
            // Nobody would be left who knows where its epochs go on.
            return Err(conflict(
                format!(
                    "{} was protected before; neither its process server nor any of its target servers is named",
                    machine.name
                ),
                "Protect it through the process server or to a target server that it had, and change the other one afterwards.",
            ));
        }
    }
    let group = machine.group;
    Ok(Plan {
        group,
        volumes,
        policy,
        process_server,
        target_servers,
        despite_warnings,
        protected,
        leaving,
        adopt,
        reverses,
    })
}

/// The disks at the target that are to be adopted, by volume; none when the disks are replicated to wherever the target likes.
fn adopted(asked: &Protect, volumes: &[ProtectedVolume]) -> Answer<BTreeMap<String, String>> {
    let named = asked.volumes.iter().zip(volumes);
    let adopt: BTreeMap<String, String> = named
        .filter_map(|(choice, volume)| Some((volume.name.clone(), choice.adopt.as_ref()?.trim().to_owned())))
        .collect();
    if !adopt.is_empty() && adopt.len() != volumes.len() {
        return Err(invalid(format!(
            "{} of {} disks adopt one at the target server; all of them do or none, for they share their first point",
            adopt.len(),
            volumes.len()
        )));
    }
    let mut devices = HashSet::new();
    for device in adopt.values() {
        if !device.starts_with('/') || device.len() > 255 || device.chars().any(char::is_control) {
            return Err(invalid(format!("{device:?} is no path of a disk at the target server")));
        }
        if !devices.insert(device) {
            return Err(invalid(format!("The disk {device} of the target server is named twice")));
        }
    }
    match (&asked.reverses, adopt.is_empty()) {
        (Some(_), true) => Err(invalid(
            "reverses is given, and no disk adopts one: say for each which disk at the original site it comes home to",
        )),
        _ => Ok(adopt),
    }
}

/// Refuses what cannot come home.
async fn comes_home(app: &App, machine: &MachineInfo, asked: &Protect, kept: &[ResourceId]) -> Answer<()> {
    if asked.target_servers.len() != 1 {
        return Err(invalid(format!(
            "{} target servers are named; disks are adopted at one",
            asked.target_servers.len()
        )));
    }
    if !kept.is_empty() {
        return Err(conflict(
            format!(
                "{} was protected before, so its replica has a history, and adopts nothing",
                machine.name
            ),
            "Enrol the machine anew, under another name, and protect that.",
        ));
    }
    let Some(reverses) = &asked.reverses else { return Ok(()) };
    let group = view::group(&app.store, reverses).await?;
    let name = &group.name;
    if group.id == machine.group {
        return Err(invalid(format!("{name} is the group of this machine itself")));
    }
    if !group.failover.as_ref().is_some_and(|standing| standing.committed) || group.protected {
        return Err(conflict(
            format!("No failover of {name} is committed"),
            "Fail it over, and commit that: until then it may be taken back.",
        ));
    }
    if group.handed_over {
        return Err(conflict(
            format!("The disks of {name} are handed over, and nothing can write to them"),
            "Release them: `seawall group failover release`, or the group's page.",
        ));
    }
    if let Some(other) = group.reversed_by {
        return Err(conflict(
            format!("The group {other} protects already what runs in place of {name}"),
            "End its protection and remove it first.",
        ));
    }
    Ok(())
}

/// Other targets for a group that is protected. Those that it has and is to leave stay until every new one has a point.
pub(crate) async fn retarget(app: &App, group: &GroupInfo, asked: ChangeTargets) -> Answer<Plan> {
    if !group.protected {
        return Err(conflict(
            format!("The group {} is not protected", group.name),
            "Name the target servers when you protect it.",
        ));
    }
    let target_servers = named(app, &asked.target_servers).await?;
    if target_servers.is_empty() {
        return Err(invalid("target_servers is empty; a group has at least one"));
    }
    let kept = targets_before(app, &group.id).await?;
    let leaving: Vec<ResourceId> =
        kept.iter().filter(|target| !target_servers.contains(target)).cloned().collect();
    if leaving.is_empty() && target_servers.iter().all(|target| kept.contains(target)) {
        return Err(conflict(
            format!("{} goes to these target servers already", group.name),
            "Nothing need be done.",
        ));
    }
    let volume = |volume: &control::fleet::VolumeInfo| ProtectedVolume {
        name: volume.name.clone(),
        device: volume.device.clone(),
    };
    Ok(Plan {
        group: group.id,
        volumes: group.volumes.iter().map(volume).collect(),
        policy: group.policy.clone(),
        process_server: group.process_server.clone(),
        target_servers,
        despite_warnings: asked.despite_warnings,
        protected: true,
        leaving,
        adopt: BTreeMap::new(),
        reverses: None,
    })
}

/// Target servers that a person has named.
async fn named(app: &App, asked: &[ResourceId]) -> Answer<Vec<ResourceId>> {
    let mut target_servers = Vec::new();
    for target in asked {
        let target = view::server(&app.store, PartRole::TargetServer, target).await?.id;
        if target_servers.contains(&target) {
            return Err(invalid(format!("The target server {target} is named twice")));
        }
        target_servers.push(target);
    }
    if target_servers.len() > 8 {
        return Err(invalid("More than 8 target servers are named"));
    }
    Ok(target_servers)
}

/// The targets that a group has, or had when it was protected before.
async fn targets_before(app: &App, group: &GroupId) -> Answer<Vec<ResourceId>> {
    let rows = sqlx::query_scalar("SELECT target_id FROM group_targets WHERE group_id = $1")
        .bind(group.to_string())
        .fetch_all(&app.store.read)
        .await?;
    rows.into_iter().map(parse).collect()
}

fn no_server(what: &str) -> crate::fault::Fault {
    conflict(
        format!("No {what} reports to the fleet"),
        format!("Enrol and start a {what}, or say which one."),
    )
}

async fn reporting(app: &App, role: PartRole) -> Answer<Vec<ServerInfo>> {
    let servers = view::servers(&app.store, role, "", 1000).await?.items;
    let since = UnixMillis::now().0 - view::SILENT_AFTER.as_millis() as i64;
    Ok(servers.into_iter().filter(|server| server.seen.is_some_and(|seen| seen.0 >= since)).collect())
}

/// A name for each disk: its last part, made different where two agree.
fn volumes(asked: &Protect) -> Answer<Vec<ProtectedVolume>> {
    if asked.volumes.is_empty() || asked.volumes.len() > 64 {
        return Err(invalid(format!("volumes has {} entries, expected 1 to 64", asked.volumes.len())));
    }
    let (mut names, mut devices) = (HashSet::new(), HashSet::new());
    let mut volumes = Vec::new();
    for choice in &asked.volumes {
        let device = choice.device.trim();
        if device.is_empty() || device.len() > 255 || device.chars().any(char::is_control) {
            return Err(invalid(format!("{:?} names no disk", choice.device)));
        }
        if !devices.insert(device.to_owned()) {
            return Err(invalid(format!("The disk {device} is named twice")));
        }
        let name = match &choice.name {
            Some(name) => name.to_string(),
            None => {
                let last = device.rsplit('/').next().unwrap_or(device).replace(':', "-");
                let last: String = last.chars().take(56).collect();
                let numbered = (2..).map(|number| format!("{last}-{number}"));
                let mut candidates = std::iter::once(last.clone()).chain(numbered);
                candidates.find(|name| !names.contains(name)).unwrap_or(last)
            }
        };
        if name.is_empty() || !names.insert(name.clone()) {
            return Err(invalid(format!("Two volumes would be called {name:?}")));
        }
        volumes.push(ProtectedVolume { name, device: device.to_owned() });
    }
    Ok(volumes)
}
