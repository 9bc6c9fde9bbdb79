//! The jobs of protection: looking whether disks can be protected, protecting them, and what a group is asked for later.
//!
//! Every step is found again from the store, so that any config server can go on after any other; nothing is declared
//! before every check has passed.

use std::collections::HashSet;

use block::GroupId;
use control::fleet::{
    EventKind, JobKind, MachineInfo, PartRole, Protect, ProtectedVolume, ResourceId, SealFor, ServerInfo,
    StepInfo, StepState, TaskKind, UnixMillis,
};
use serde::{Deserialize, Serialize};
use sqlx::Row;

use crate::api::guard::parse;
use crate::api::policy::DEFAULT_POLICY;
use crate::app::App;
use crate::fault::{Answer, conflict, internal, invalid};
use crate::job::{self, Asked, Held, ask, step, task_of};
use crate::reports::Report;
use crate::store::{Act, Counter, Said, count, say};
use crate::view;

/// A clock further off than this is warned of, in milliseconds: points are named and kept by their times.
pub const CLOCK_SKEW_WARNED_MS: i64 = 5_000;
/// A clock further off than this is refused: retention would keep the wrong points.
pub const CLOCK_SKEW_REFUSED_MS: i64 = 5 * 60_000;
/// Free space at a target below this part of the disks' size is warned of, in percent.
const SPACE_WARNED_PERCENT: u64 = 120;
/// Free space at a target below this part of the disks' size is refused, in percent. Replicas are sparse.
const SPACE_REFUSED_PERCENT: u64 = 10;

/// What a job of protection is to do, with everything chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    group: GroupId,
    volumes: Vec<ProtectedVolume>,
    policy: ResourceId,
    process_server: ResourceId,
    target_servers: Vec<ResourceId>,
    despite_warnings: bool,
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
        let reporting = reporting(app, PartRole::TargetServer).await?;
        let free = |server: &ServerInfo| server.capacity.map_or(0, |capacity| capacity.bytes_free);
        let roomy = reporting.into_iter().max_by_key(free);
        target_servers.push(roomy.map(|server| server.id).ok_or_else(|| no_server("target server"))?);
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

pub(crate) fn steps() -> Vec<StepInfo> {
    vec![
        step("agent", "The agent reports"),
        step("servers", "Process and target server report and can be reached"),
        step("clock", "The machine's clock is right"),
        step("space", "The target has space"),
        step("disks", "The disks can be captured"),
        step("link", "The agent reaches the process server"),
        step("key", "The agent makes the group's key and seals it for the target"),
        step("declare", "The protection is declared"),
        step("taken-up", "Every part has taken it up"),
        step("first-point", "The first recovery point"),
    ]
}

pub(crate) fn unprotect_steps() -> Vec<StepInfo> {
    vec![step("taken-up", "The agent has ended the capture")]
}

pub(crate) fn task_steps(kind: JobKind) -> Vec<StepInfo> {
    vec![match kind {
        JobKind::Resync => step("task", "The agent compares"),
        _ => step("task", "The agent takes the point"),
    }]
}

/// Brings a job as far as it comes now.
pub(crate) async fn advance(app: &App, held: &mut Held) -> Answer<()> {
    let mut act = app.store.act().await?;
    let went = match held.job.kind {
        JobKind::Protect => advance_protect(app, &mut act, held).await,
        JobKind::Unprotect => advance_unprotect(app, &mut act, held).await,
        JobKind::Point | JobKind::Resync => advance_task(&mut act, held).await,
    };
    match went {
        Ok(()) => {}
        // What was looked for is gone: the job cannot go on. Anything else is tried again.
        Err(fault) if fault.is(control::fleet::ProblemCode::NotFound) => held.fail(fault.problem.detail),
        Err(fault) => return Err(fault),
    }
    if job::keep(app, &mut act, held).await? {
        act.commit().await?;
    }
    Ok(())
}

async fn advance_protect(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let plan: Plan = serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
    let machine_id: ResourceId = parse(held.subject_id.clone())?;
    let machine = view::machine(&app.store, &machine_id).await?;
    if held.step("declare").state != StepState::Passed {
        if !check(app, act, held, &plan, &machine).await? {
            return Ok(());
        }
        declare(act, held, &plan, &machine_id).await?;
        return Ok(());
    }
    if held.step("taken-up").state != StepState::Passed {
        let waiting = not_taken_up(app, &plan, &machine_id).await?;
        if waiting.is_empty() {
            held.set("taken-up", StepState::Passed, "Every part acts on it.", "");
            held.job.percent = 50;
        } else {
            let message = format!("Waiting for {}.", waiting.join(", "));
            held.job.message.clone_from(&message);
            held.set("taken-up", StepState::Running, message, "");
            return Ok(());
        }
    }
    let group = view::group(&app.store, &plan.group).await?;
    match &group.newest_point {
        Some(point) => {
            held.set(
                "first-point",
                StepState::Passed,
                format!("Epoch {} is a recovery point.", point.epoch),
                "",
            );
            held.done(format!("{} is protected.", group.name));
        }
        None => {
            let all: u64 = group.volumes.iter().map(|volume| volume.bytes).sum();
            let left: u64 = group.volumes.iter().map(|volume| volume.dirty_bytes).sum();
            let done = all.saturating_sub(left) * 49 / all.max(1);
            held.job.percent = 50 + u8::try_from(done).unwrap_or(49);
            held.job.message = format!("{} ({})", group.meaning, group.state.code());
            let message = held.job.message.clone();
            held.set("first-point", StepState::Running, message, "");
        }
    }
    Ok(())
}

/// All checks. Whether every one has passed, or was warned of and may pass.
async fn check(
    app: &App,
    act: &mut Act,
    held: &mut Held,
    plan: &Plan,
    machine: &MachineInfo,
) -> Answer<bool> {
    let since = UnixMillis::now().0 - view::SILENT_AFTER.as_millis() as i64;
    let reports = |seen: Option<UnixMillis>| seen.is_some_and(|seen| seen.0 >= since);
    match reports(machine.seen) {
        true => held.set("agent", StepState::Passed, format!("Version {}.", machine.version), ""),
        false => {
            held.set("agent", StepState::Failed, "It does not report.", "Start seawall-agent on the machine.")
        }
    }
    let process = view::server(&app.store, PartRole::ProcessServer, &plan.process_server).await?;
    let mut targets = Vec::new();
    for target in &plan.target_servers {
        targets.push(view::server(&app.store, PartRole::TargetServer, target).await?);
    }
    let silent =
        targets.iter().chain([&process]).find(|server| !reports(server.seen) || server.address.is_empty());
    match silent {
        None => held.set(
            "servers",
            StepState::Passed,
            format!("{} and {} targets.", process.name, targets.len()),
            "",
        ),
        Some(server) => held.set(
            "servers",
            StepState::Failed,
            format!("The {} {} does not report where it listens.", server.role, server.name),
            "Start it, or choose another one.",
        ),
    }
    let off = machine.clock_ahead_ms;
    let clock = match off {
        -99..=99 => "It agrees with the config server's within 0.1 s.".to_owned(),
        100.. => format!("It is {:.1} s ahead of the config server's.", off as f64 / 1000.0),
        _ => format!("It is {:.1} s behind the config server's.", -off as f64 / 1000.0),
    };
    let mend = "Let chrony or systemd-timesyncd set it.";
    match off.abs() {
        0..=CLOCK_SKEW_WARNED_MS => held.set("clock", StepState::Passed, clock, ""),
        off if off <= CLOCK_SKEW_REFUSED_MS => held.set("clock", StepState::Warned, clock, mend),
        _ => held.set("clock", StepState::Failed, clock, mend),
    }
    let failed = |held: &mut Held| held.job.steps.iter().any(|step| step.state == StepState::Failed);
    if failed(held) {
        held.fail("A check failed; nothing was changed.");
        return Ok(false);
    }
    let Some(checked) = asked(act, held, machine, "check-disks", || TaskKind::CheckDisks {
        devices: plan.volumes.iter().map(|volume| volume.device.clone()).collect(),
        process_server: process.address.clone(),
    })
    .await?
    else {
        held.set("disks", StepState::Running, "The agent looks at the disks.", "");
        held.job.message = "The agent looks at the disks.".to_owned();
        held.job.percent = 10;
        return Ok(false);
    };
    judge_disks(held, &checked);
    judge_space(held, &checked, &targets);
    if failed(held) {
        held.fail("A check failed; nothing was changed.");
        return Ok(false);
    }
    if !plan.despite_warnings && held.job.steps.iter().any(|step| step.state == StepState::Warned) {
        held.fail("A check warns; nothing was changed. Mend it, or ask again with --despite-warnings (in the API, despite_warnings).");
        return Ok(false);
    }
    let seal_for = targets
        .iter()
        .map(|target| SealFor { target: target.id.clone(), key: String::new() })
        .collect::<Vec<_>>();
    let seal_for = with_keys(act, seal_for).await?;
    if let Some(without) = seal_for.iter().find(|seal_for| seal_for.key.is_empty()) {
        held.set(
            "key",
            StepState::Failed,
            format!("The target server {} has shown no key to seal for.", without.target),
            "Upgrade and restart it.",
        );
        held.fail("The group's key cannot be given to the target; nothing was changed.");
        return Ok(false);
    }
    let group = plan.group;
    let Some(sealed) =
        asked(act, held, machine, "seal-key", || TaskKind::SealKey { group, targets: seal_for }).await?
    else {
        held.set("key", StepState::Running, "The agent makes and seals the key.", "");
        held.job.percent = 30;
        return Ok(false);
    };
    match sealed.state.as_str() {
        "done" => held.set("key", StepState::Passed, "Only the agent and the target can read it.", ""),
        _ => {
            held.set("key", StepState::Failed, sealed.message, "Look at the agent's log.");
            held.fail("The group's key could not be made; nothing was changed.");
            return Ok(false);
        }
    }
    Ok(true)
}

async fn with_keys(act: &mut Act, mut targets: Vec<SealFor>) -> Answer<Vec<SealFor>> {
    for seal_for in &mut targets {
        seal_for.key = sqlx::query_scalar("SELECT sealing_key FROM parts WHERE id = $1")
            .bind(seal_for.target.as_str())
            .fetch_one(&mut **act)
            .await?;
    }
    Ok(targets)
}

/// What came of a task; asks for it first. `None` while it is under way.
async fn asked(
    act: &mut Act,
    held: &Held,
    machine: &MachineInfo,
    kind: &str,
    task: impl FnOnce() -> TaskKind,
) -> Answer<Option<Asked>> {
    match task_of(act, &held.job, kind).await? {
        Some(asked) if matches!(asked.state.as_str(), "done" | "failed") => Ok(Some(asked)),
        Some(_) => Ok(None),
        None => {
            ask(act, &held.job, machine.id.as_str(), &task()).await?;
            Ok(None)
        }
    }
}

/// The agent's findings: `disks: [{device, bytes, mode, why, advice}]`, `link: {reached, ms, error}`.
fn judge_disks(held: &mut Held, checked: &Asked) {
    if checked.state == "failed" {
        held.set("disks", StepState::Failed, checked.message.clone(), "Look at the agent's log.");
        return;
    }
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let disks = checked.result["disks"].as_array().cloned().unwrap_or_default();
    let uncapturable = disks.iter().find(|disk| disk["mode"].is_null());
    let lower = disks.iter().find(|disk| disk["mode"] != "data");
    match (disks.is_empty(), uncapturable, lower) {
        (true, ..) => held.set(
            "disks",
            StepState::Failed,
            "The agent found none of the disks.",
            "Name disks that it has.",
        ),
        (_, Some(disk), _) => {
            let message = format!("{} cannot be protected: {}", text(&disk["device"]), text(&disk["why"]));
            held.set("disks", StepState::Failed, message, text(&disk["advice"]));
        }
        (_, None, Some(disk)) => {
            let mode = text(&disk["mode"]);
            let message =
                format!("{} is captured in mode {mode}: {}", text(&disk["device"]), text(&disk["why"]));
            held.set("disks", StepState::Warned, message, text(&disk["advice"]));
        }
        (_, None, None) => {
            held.set("disks", StepState::Passed, format!("{} disks, in data mode.", disks.len()), "");
        }
    }
    let link = &checked.result["link"];
    match link["reached"].as_bool() {
        Some(true) => {
            let ms = link["ms"].as_f64().unwrap_or_default();
            held.set("link", StepState::Passed, format!("Reached in {ms:.0} ms."), "");
        }
        _ => held.set(
            "link",
            StepState::Failed,
            format!("The agent does not reach the process server: {}", text(&link["error"])),
            "Let its port through, or give the process server an address that the machine reaches.",
        ),
    }
}

fn judge_space(held: &mut Held, checked: &Asked, targets: &[ServerInfo]) {
    let disks = checked.result["disks"].as_array().cloned().unwrap_or_default();
    let needed: u64 = disks.iter().filter_map(|disk| disk["bytes"].as_u64()).sum();
    let least = targets.iter().filter_map(|target| Some((target.capacity?.bytes_free, &target.name))).min();
    let Some((free, name)) = least else {
        let message = "No target has said how much space it has.";
        held.set("space", StepState::Warned, message, "Look at the target server.");
        return;
    };
    let size = block::ByteCount;
    let message = format!("{name} has {} free; the disks have {}.", size(free), size(needed));
    let part = |percent: u64| u128::from(needed) * u128::from(percent) / 100;
    let mend = "Give the target's file system more space, or choose another target.";
    if u128::from(free) < part(SPACE_REFUSED_PERCENT) {
        held.set("space", StepState::Failed, message, mend);
    } else if u128::from(free) < part(SPACE_WARNED_PERCENT) {
        held.set("space", StepState::Warned, message, mend);
    } else {
        held.set("space", StepState::Passed, message, "");
    }
}

async fn declare(act: &mut Act, held: &mut Held, plan: &Plan, machine: &ResourceId) -> Answer<()> {
    let sealed = task_of(act, &held.job, "seal-key").await?;
    let sealed = sealed.map(|asked| asked.result).unwrap_or_default();
    let group = plan.group.to_string();
    sqlx::query(
        "INSERT INTO protection_groups (id, machine_id, generation, state, policy_id, process_id, created)
         VALUES ($1, $2, 1, 'protected', $3, $4, $5)
         ON CONFLICT (id) DO UPDATE SET state = 'protected', policy_id = excluded.policy_id, process_id = excluded.process_id",
    )
    .bind(&group)
    .bind(machine.as_str())
    .bind(plan.policy.as_str())
    .bind(plan.process_server.as_str())
    .bind(UnixMillis::now().0)
    .execute(&mut **act)
    .await?;
    for table in ["volumes", "group_targets"] {
        sqlx::query(&format!("DELETE FROM {table} WHERE group_id = $1"))
            .bind(&group)
            .execute(&mut **act)
            .await?;
    }
    for (place, volume) in plan.volumes.iter().enumerate() {
        sqlx::query("INSERT INTO volumes (group_id, name, device, place) VALUES ($1, $2, $3, $4)")
            .bind(&group)
            .bind(&volume.name)
            .bind(&volume.device)
            .bind(place as i64)
            .execute(&mut **act)
            .await?;
    }
    for target in &plan.target_servers {
        let Some(key) = sealed["keys"][target.as_str()].as_str() else {
            held.set(
                "key",
                StepState::Failed,
                format!("The agent has sealed no key for {target}."),
                "Try again.",
            );
            held.fail("The group's key could not be given to every target; nothing was changed.");
            // What this act has written is not kept.
            return Err(internal("give the group's key to every target", "no sealed key"));
        };
        sqlx::query("INSERT INTO group_targets (group_id, target_id, sealed_key) VALUES ($1, $2, $3)")
            .bind(&group)
            .bind(target.as_str())
            .bind(key)
            .execute(&mut **act)
            .await?;
    }
    count(act, Counter::Declared).await?;
    let message = format!("{} is to be protected", held.job.subject);
    say(act, Said::new(EventKind::Declared, format!("groups/{group}"), message)).await?;
    held.set("declare", StepState::Passed, "", "");
    held.job.percent = 40;
    held.job.message = "Declared; the parts take it up.".to_owned();
    Ok(())
}

/// Parts that do not act on it yet, as people call them.
async fn not_taken_up(app: &App, plan: &Plan, machine: &ResourceId) -> Answer<Vec<String>> {
    let mut waiting = Vec::new();
    let servers = plan.target_servers.iter().chain([&plan.process_server]);
    for part in servers.chain([machine]) {
        let row = sqlx::query("SELECT name, role, seen, trouble FROM parts WHERE id = $1")
            .bind(part.as_str())
            .fetch_one(&app.store.read)
            .await?;
        let heard = (part.to_string(), UnixMillis(row.try_get("seen")?));
        let reports = app.store.reports.of(&app.store.read, std::iter::once(heard)).await?;
        let has = match reports.get(part.as_str()).map(|report| &**report) {
            Some(Report::Agent(report)) => !report.volumes.is_empty(),
            // A process server shows a group from the agent's first delivery on; the agent's report tells of that.
            Some(Report::ProcessServer(_)) => true,
            Some(Report::TargetServer(served)) => served.group(&plan.group).is_some(),
            Some(Report::Nothing) | None => false,
        };
        if !has {
            let (role, name): (String, String) = (row.try_get("role")?, row.try_get("name")?);
            let trouble: String = row.try_get("trouble")?;
            let why = if trouble.is_empty() { String::new() } else { format!(" ({trouble})") };
            waiting.push(format!("the {role} {name}{why}"));
        }
    }
    Ok(waiting)
}

async fn advance_unprotect(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let row = sqlx::query(
        "SELECT m.id, m.digest, m.seen FROM protection_groups g JOIN parts m ON m.id = g.machine_id WHERE g.id = $1",
    )
    .bind(&held.subject_id)
    .fetch_optional(&mut **act)
    .await?;
    let Some(row) = row else {
        held.fail("The group is gone.");
        return Ok(());
    };
    let (machine, digest): (String, String) = (row.try_get("id")?, row.try_get("digest")?);
    let mut from = app.store.read.acquire().await?;
    let (_, wanted) = crate::desired::desired(&mut from, &machine, PartRole::Agent).await?;
    if digest == wanted {
        held.set("taken-up", StepState::Passed, "The agent captures nothing of it any more.", "");
        held.done("The protection has ended; the recovery points stay until the group is removed.");
    } else {
        let message = "Waiting for the agent to hear of it.";
        held.set("taken-up", StepState::Running, message, "If the machine is gone for good, cancel the job.");
        held.job.message = message.to_owned();
    }
    Ok(())
}

/// A point or a comparison, which the agent does.
async fn advance_task(act: &mut Act, held: &mut Held) -> Answer<()> {
    let kind = held.job.kind;
    let name = if kind == JobKind::Resync { "resync" } else { "point" };
    match task_of(act, &held.job, name).await? {
        None => {
            let machine: Option<String> = sqlx::query_scalar(
                "SELECT machine_id FROM protection_groups WHERE id = $1 AND state = 'protected'",
            )
            .bind(&held.subject_id)
            .fetch_optional(&mut **act)
            .await?;
            let Some(machine) = machine else {
                held.fail("The group is not protected any more.");
                return Ok(());
            };
            let task = if kind == JobKind::Resync {
                TaskKind::Resync { volume: None }
            } else {
                let point: control::fleet::PointNow =
                    serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
                let label = point.label.map(|label| label.as_str().to_owned());
                TaskKind::Point { consistency: point.consistency.to_string(), label }
            };
            ask(act, &held.job, &machine, &task).await?;
            held.set("task", StepState::Running, "The agent was asked.", "");
            held.job.message = "The agent was asked.".to_owned();
        }
        Some(asked) if asked.state == "done" => {
            let less = asked.result["less"].as_bool() == Some(true);
            let state = if less { StepState::Warned } else { StepState::Passed };
            held.set("task", state, asked.message.clone(), "");
            held.done(asked.message);
        }
        Some(asked) if asked.state == "failed" => {
            held.set("task", StepState::Failed, asked.message.clone(), "Look at the agent's log.");
            held.fail(asked.message);
        }
        Some(asked) => {
            if !asked.message.is_empty() {
                held.job.message.clone_from(&asked.message);
            }
            held.set("task", StepState::Running, asked.message, "");
        }
    }
    Ok(())
}
