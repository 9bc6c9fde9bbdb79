//! Whether a machine's disks can be protected: every check passes, warns or fails, and says what to do.
//!
//! Every check is made again in each round until all have an answer; so any config server can go on.

use block::ByteCount;
use control::fleet::{MachineInfo, PartRole, SealFor, ServerInfo, StepState, TaskKind, UnixMillis};
use serde_json::Value;

use super::{Plan, link};
use crate::app::App;
use crate::fault::Answer;
use crate::job::{Asked, Held, ask, task_of};
use crate::store::Act;
use crate::view;

/// A clock further off than this is warned of, in milliseconds: points are named and kept by their times.
pub const CLOCK_SKEW_WARNED_MS: i64 = 5_000;
/// A clock further off than this is refused: retention would keep the wrong points.
pub const CLOCK_SKEW_REFUSED_MS: i64 = 5 * 60_000;
/// Free space at a target below this part of the disks' size is warned of, in percent.
const SPACE_WARNED_PERCENT: u64 = 120;
/// Free space at a target below this part of the disks' size is refused, in percent. Replicas are sparse.
const SPACE_REFUSED_PERCENT: u64 = 10;

/// All checks. Whether every one has passed, or was warned of and may pass.
pub(super) async fn check(
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
    history(app, held, plan).await?;
    let failed = |held: &mut Held| held.job.steps.iter().any(|step| step.state == StepState::Failed);
    if failed(held) {
        held.fail("A check failed; nothing was changed.");
        return Ok(false);
    }
    if plan.protected {
        let group = view::group(&app.store, &plan.group).await?;
        let new = targets.iter().filter(|target| !group.target_servers.contains(&target.id));
        judge_space(held, group.volumes.iter().map(|volume| volume.bytes).sum(), new);
    } else if !disks(app, act, held, plan, machine, &process, &targets).await? {
        return Ok(false);
    }
    if failed(held) {
        held.fail("A check failed; nothing was changed.");
        return Ok(false);
    }
    sealed(act, held, plan, machine, &targets).await
}

/// What the agent finds of the disks and the way to the process server. Whether it has said it.
async fn disks(
    app: &App,
    act: &mut Act,
    held: &mut Held,
    plan: &Plan,
    machine: &MachineInfo,
    process: &ServerInfo,
    targets: &[ServerInfo],
) -> Answer<bool> {
    let Some(checked) = asked(act, held, machine, "check-disks", || TaskKind::CheckDisks {
        devices: plan.volumes.iter().map(|volume| volume.device.clone()).collect(),
        process_server: process.address.clone(),
    })
    .await?
    else {
        held.set(
            "disks",
            StepState::Running,
            "The agent looks at the disks and measures the way to the process server.",
            "",
        );
        held.job.message =
            "The agent looks at the disks and measures the way to the process server.".to_owned();
        held.job.percent = 10;
        return Ok(false);
    };
    judge_disks(held, &checked);
    if checked.state != "failed" {
        let policy = view::policy(&app.store, &plan.policy).await?;
        judge_link(held, &checked, policy.policy.bandwidth_bytes_s);
    }
    if !plan.adopt.is_empty() {
        let message = "The target's own disks are adopted; the target looks whether they are large enough.";
        held.set("space", StepState::Passed, message, "");
        return Ok(true);
    }
    let disks = checked.result["disks"].as_array().cloned().unwrap_or_default();
    judge_space(held, disks.iter().filter_map(|disk| disk["bytes"].as_u64()).sum(), targets);
    Ok(true)
}

/// Whether the agent has sealed the group's key for all targets.
async fn sealed(
    act: &mut Act,
    held: &mut Held,
    plan: &Plan,
    machine: &MachineInfo,
    targets: &[ServerInfo],
) -> Answer<bool> {
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

/// Whether a failover has come between the machine and its target.
async fn history(app: &App, held: &mut Held, plan: &Plan) -> Answer<()> {
    let (standing, reversed_by) = match view::group(&app.store, &plan.group).await {
        Ok(group) => (group.failover, group.reversed_by),
        Err(fault) if fault.is(control::fleet::ProblemCode::NotFound) => (None, None),
        Err(fault) => return Err(fault),
    };
    match standing {
        _ if reversed_by.is_some() => held.set(
            "history",
            StepState::Failed,
            "What runs in its place is protected, and is the newest state.",
            "Bring it home (`seawall group failback`), or end the protection of what runs in its place and remove that group.",
        ),
        Some(standing) if standing.failover.is_some() || standing.promoted.is_some() => held.set(
            "history",
            StepState::Failed,
            "The group has failed over: its volumes are at the target, and nothing of the machine is taken.",
            "Commit or cancel the failover, and demote the group, before the machine is protected.",
        ),
        Some(standing) if standing.committed => held.set(
            "history",
            StepState::Warned,
            "A failover was committed: the newest state is at the target, and protecting makes the machine's disks the newest. \
             What is at the target now stays a recovery point as long as retention keeps it.",
            "Bring the machine's disks up to date first (docs/lifecycle.md, \"The way home\"); then go on despite the warning.",
        ),
        _ => held.set("history", StepState::Passed, "No failover has come between.", ""),
    }
    Ok(())
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

/// The agent's findings: `disks: [{device, bytes, mode, why, advice, written_bytes_per_s}]`, and what [`link`] has.
fn judge_disks(held: &mut Held, checked: &Asked) {
    if checked.state == "failed" {
        held.set("disks", StepState::Failed, checked.message.clone(), "Look at the agent's log.");
        return;
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
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
}

fn judge_link(held: &mut Held, checked: &Asked, limit: Option<u64>) {
    let (state, message, mend) = link::reached(&checked.result["link"]);
    held.set("link", state, message, mend);
    if state != StepState::Failed {
        let (state, message, mend) = link::carries(&checked.result, limit);
        held.set("bandwidth", state, message, mend);
    }
}

fn judge_space<'a>(held: &mut Held, needed: u64, targets: impl IntoIterator<Item = &'a ServerInfo>) {
    let targets: Vec<&ServerInfo> = targets.into_iter().collect();
    if targets.is_empty() {
        held.set("space", StepState::Passed, "No target is new.", "");
        return;
    }
    let least = targets.iter().filter_map(|target| Some((target.capacity?.bytes_free, &target.name))).min();
    let Some((free, name)) = least else {
        let message = "No target has said how much space it has.";
        held.set("space", StepState::Warned, message, "Look at the target server.");
        return;
    };
    let size = ByteCount;
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
