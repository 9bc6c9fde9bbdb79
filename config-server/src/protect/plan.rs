//! What is to be protected and where, with everything chosen that was left to choose.

use std::collections::HashSet;

use block::GroupId;
use control::fleet::{MachineInfo, PartRole, Protect, ProtectedVolume, ResourceId, ServerInfo, UnixMillis};
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
    let mut target_servers = Vec::new();
    for target in &asked.target_servers {
        let target = view::server(&app.store, PartRole::TargetServer, target).await?.id;
        if target_servers.contains(&target) {
            return Err(invalid(format!("The target server {target} is named twice")));
        }
        target_servers.push(target);
    }
    if target_servers.len() > 8 {
        return Err(invalid("More than 8 target servers are named"));
    }
    if target_servers.is_empty() {
        target_servers = targets_before(app, &machine.group).await?;
    }
    if target_servers.is_empty() {
        let reporting = reporting(app, PartRole::TargetServer).await?;
        let free = |server: &ServerInfo| server.capacity.map_or(0, |capacity| capacity.bytes_free);
        let roomy = reporting.into_iter().max_by_key(free);
        target_servers.push(roomy.map(|server| server.id).ok_or_else(|| no_server("target server"))?);
    }
    let kept = targets_before(app, &machine.group).await?;
    if let Some(other) = target_servers.iter().find(|target| !kept.is_empty() && !kept.contains(*target)) {
        return Err(conflict(
            format!(
                "The target server {other} holds nothing of {}, whose history began at another one",
                machine.name
            ),
            "Protect it to the target server that it had. To begin anew at another one, enrol the machine under another name; what is \
             at the first one stays.",
        ));
    }
    Ok(Plan {
        group: machine.group,
        volumes: volumes(&asked)?,
        policy,
        process_server,
        target_servers,
        despite_warnings: asked.despite_warnings,
    })
}

/// The targets that a group had when it was protected before. Its epochs go on where they are; a target that lacks the ones
/// before could take none of them.
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
