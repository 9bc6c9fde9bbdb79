//! The jobs of protection: looking whether disks can be protected, protecting them, and what a group is asked for later.
//!
//! Every step is found again from the store, so that any config server can go on after any other; nothing is declared
//! before every check has passed.

pub(crate) mod drill;
pub(crate) mod failover;
pub(crate) mod home;
mod link;
mod plan;
mod preflight;
pub(crate) mod proof;

use control::fleet::{EventKind, JobKind, PartRole, ResourceId, StepInfo, StepState, TaskKind, UnixMillis};
use sqlx::Row;

pub use self::failover::SILENT_WAIT_MAX;
pub(crate) use self::plan::{Plan, plan, retarget};
pub use self::preflight::{CLOCK_SKEW_REFUSED_MS, CLOCK_SKEW_WARNED_MS};
use crate::api::guard::parse;
use crate::app::App;
use crate::fault::{Answer, internal};
use crate::job::{self, Held, ask, step, task_of};
use crate::reports::Report;
use crate::store::{Act, Counter, Said, count, say};
use crate::view;

pub(crate) fn steps() -> Vec<StepInfo> {
    vec![
        step("agent", "The agent reports"),
        step("servers", "Process and target server report and can be reached"),
        step("clock", "The machine's clock is right"),
        step("history", "The machine's disks are what is to be kept"),
        step("space", "The target has space"),
        step("disks", "The disks can be captured"),
        step("link", "The agent reaches the process server"),
        step("bandwidth", "The way there carries what the disks write"),
        step("key", "The agent makes the group's key and seals it for the target"),
        step("declare", "The protection is declared"),
        step("taken-up", "Every part has taken it up"),
        step("first-point", "The first recovery point"),
    ]
}

pub(crate) fn target_steps() -> Vec<StepInfo> {
    vec![
        step("agent", "The agent reports"),
        step("servers", "Process and target servers report and can be reached"),
        step("clock", "The machine's clock is right"),
        step("history", "The machine's disks are what is to be kept"),
        step("space", "The new targets have space"),
        step("key", "The agent seals the group's key for the targets"),
        step("declare", "The targets are declared"),
        step("taken-up", "Every part has taken it up"),
        step("first-point", "A recovery point at every target"),
        step("leave", "What is not wanted any more is left"),
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
        JobKind::Drill | JobKind::EndDrill => drill::advance(app, &mut act, held).await,
        JobKind::Prove => proof::advance(app, &mut act, held).await,
        JobKind::FailBack => home::advance(app, &mut act, held).await,
        JobKind::Plan => crate::plan::advance(app, &mut act, held).await,
        _ => failover::advance(app, &mut act, held).await,
    };
    match went {
        Ok(()) => {}
        // What was looked for is gone: the job cannot go on. Anything else is tried again.
        Err(fault) if fault.is(control::fleet::ProblemCode::NotFound) => held.fail(fault.problem.detail),
        Err(fault) => return Err(fault),
    }
    if job::keep(app, &mut act, held).await? {
        act.commit().await?;
        app.tasks_wake.notify_waiters();
    }
    Ok(())
}

async fn advance_protect(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let plan: Plan = serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
    let machine_id: ResourceId = parse(held.subject_id.clone())?;
    let machine = view::machine(&app.store, &machine_id).await?;
    if held.step("declare").state != StepState::Passed {
        if !preflight::check(app, act, held, &plan, &machine).await? {
            return Ok(());
        }
        match plan.protected {
            true => declare_targets(act, held, &plan).await?,
            false => declare(app, act, held, &plan, &machine_id).await?,
        }
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
    let without = without_point(app, &plan).await?;
    match &group.newest_point {
        Some(_) if !without.is_empty() => {
            held.job.message = format!("Waiting for a recovery point at {}.", without.join(", "));
            let message = format!("{} It was never compared with the disks.", held.job.message);
            held.set("first-point", StepState::Running, message, "");
        }
        Some(point) => {
            held.set(
                "first-point",
                StepState::Passed,
                format!("Epoch {} is a recovery point.", point.epoch),
                "",
            );
            if plan.protected {
                leave(act, held, &plan).await?;
            }
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

async fn declare(app: &App, act: &mut Act, held: &mut Held, plan: &Plan, machine: &ResourceId) -> Answer<()> {
    // A target may follow a later history than was declared: what it is sent goes on from there.
    let known = match view::group(&app.store, &plan.group).await {
        Ok(group) => {
            group.failover.map_or(group.generation, |standing| standing.generation.max(group.generation))
        }
        Err(fault) if fault.is(control::fleet::ProblemCode::NotFound) => block::Generation(1),
        Err(fault) => return Err(fault),
    };
    let sealed = task_of(act, &held.job, "seal-key").await?;
    let sealed = sealed.map(|asked| asked.result).unwrap_or_default();
    let group = plan.group.to_string();
    if let Some(reverses) = &plan.reverses {
        let reversed = sqlx::query(
            "UPDATE protection_groups SET reversed_by = $1 WHERE id = $2 AND state = 'kept' AND reversed_by IN ('', $1)",
        )
        .bind(&group)
        .bind(reverses.to_string())
        .execute(&mut **act)
        .await?;
        if reversed.rows_affected() == 0 {
            let mend = "Look at the group that is to come home.";
            held.set(
                "declare",
                StepState::Failed,
                "Its failover is not committed any more, or another one reverses it.",
                mend,
            );
            held.fail("What these disks are to be brought home for has changed; nothing was changed.");
            return Ok(());
        }
    }
    sqlx::query(
        "INSERT INTO protection_groups (id, machine_id, generation, state, policy_id, process_id, created)
         VALUES ($1, $2, $6, 'protected', $3, $4, $5)
         ON CONFLICT (id) DO UPDATE SET state = 'protected', policy_id = excluded.policy_id, process_id = excluded.process_id,
             generation = excluded.generation, committed = 0",
    )
    .bind(&group)
    .bind(machine.as_str())
    .bind(plan.policy.as_str())
    .bind(plan.process_server.as_str())
    .bind(UnixMillis::now().0)
    .bind(i64::try_from(known.0).unwrap_or(i64::MAX))
    .execute(&mut **act)
    .await?;
    for table in ["volumes", "group_targets"] {
        sqlx::query(&format!("DELETE FROM {table} WHERE group_id = $1"))
            .bind(&group)
            .execute(&mut **act)
            .await?;
    }
    for (place, volume) in plan.volumes.iter().enumerate() {
        sqlx::query("INSERT INTO volumes (group_id, name, device, place, adopt) VALUES ($1, $2, $3, $4, $5)")
            .bind(&group)
            .bind(&volume.name)
            .bind(&volume.device)
            .bind(place as i64)
            .bind(plan.adopt.get(&volume.name).map_or("", String::as_str))
            .execute(&mut **act)
            .await?;
    }
    goes_to(act, held, plan, &sealed).await?;
    let message = format!("{} is to be protected", held.job.subject);
    declared(act, held, plan, message).await
}

/// The targets' keys, as the agent has sealed them.
async fn goes_to(act: &mut Act, held: &mut Held, plan: &Plan, sealed: &serde_json::Value) -> Answer<()> {
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
        sqlx::query(
            "INSERT INTO group_targets (group_id, target_id, sealed_key) VALUES ($1, $2, $3)
             ON CONFLICT (group_id, target_id) DO UPDATE SET sealed_key = excluded.sealed_key",
        )
        .bind(plan.group.to_string())
        .bind(target.as_str())
        .bind(key)
        .execute(&mut **act)
        .await?;
    }
    Ok(())
}

/// More targets for a group that is protected; those that it is to leave stay for now.
async fn declare_targets(act: &mut Act, held: &mut Held, plan: &Plan) -> Answer<()> {
    let state: Option<String> = sqlx::query_scalar("SELECT state FROM protection_groups WHERE id = $1")
        .bind(plan.group.to_string())
        .fetch_optional(&mut **act)
        .await?;
    if state.as_deref() != Some("protected") {
        held.fail("The group is not protected any more; nothing was changed.");
        return Ok(());
    }
    let sealed = task_of(act, &held.job, "seal-key").await?;
    let sealed = sealed.map(|asked| asked.result).unwrap_or_default();
    goes_to(act, held, plan, &sealed).await?;
    let message = format!("{} goes to other target servers", held.job.subject);
    declared(act, held, plan, message).await
}

/// The end of a change of targets: what has no more use keeps nothing back and gets nothing.
async fn leave(act: &mut Act, held: &mut Held, plan: &Plan) -> Answer<()> {
    for target in &plan.leaving {
        sqlx::query("DELETE FROM group_targets WHERE group_id = $1 AND target_id = $2")
            .bind(plan.group.to_string())
            .bind(target.as_str())
            .execute(&mut **act)
            .await?;
    }
    let message = match plan.leaving.len() {
        0 => "Nothing is left.".to_owned(),
        count => {
            count_declared(act, plan, format!("{} has left {count} target servers", held.job.subject))
                .await?;
            format!("{count} left; what they hold stays there as files until a person deletes it.")
        }
    };
    held.set("leave", StepState::Passed, message, "");
    Ok(())
}

async fn count_declared(act: &mut Act, plan: &Plan, message: String) -> Answer<()> {
    count(act, Counter::Declared).await?;
    Ok(say(act, Said::new(EventKind::Declared, format!("groups/{}", plan.group), message)).await?)
}

async fn declared(act: &mut Act, held: &mut Held, plan: &Plan, message: String) -> Answer<()> {
    count_declared(act, plan, message).await?;
    held.set("declare", StepState::Passed, "", "");
    held.job.percent = 40;
    held.job.message = "Declared; the parts take it up.".to_owned();
    Ok(())
}

/// Targets of a group that have no recovery point of it yet, as people call them.
async fn without_point(app: &App, plan: &Plan) -> Answer<Vec<String>> {
    let mut without = Vec::new();
    for target in &plan.target_servers {
        let row = sqlx::query("SELECT name, seen FROM parts WHERE id = $1")
            .bind(target.as_str())
            .fetch_one(&app.store.read)
            .await?;
        let heard = (target.to_string(), UnixMillis(row.try_get("seen")?));
        let reports = app.store.reports.of(&app.store.read, std::iter::once(heard)).await?;
        let has = match reports.get(target.as_str()).map(|report| &**report) {
            Some(Report::TargetServer(served)) => {
                served.group(&plan.group).is_some_and(|group| group.newest_point.is_some())
            }
            _ => false,
        };
        if !has {
            without.push(row.try_get("name")?);
        }
    }
    Ok(without)
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
