//! The jobs that lead a group through a failover: each step is asked of the agent or of a target server, which know best where
//! they stand; what is asked twice is done once.
//!
//! Fencing comes first: the target names the new generation durably before anything else, and from then on takes nothing of the old
//! source. What the fleet declares follows at the commit: the machine is not protected any more.

use std::time::Duration;

use block::{Epoch, Generation, GroupId};
use control::PointSelector;
use control::fleet::{
    EventKind, GroupFailover, GroupInfo, JobInfo, JobKind, PartRole, ResourceId, StepInfo, StepState,
    TaskKind, UnixMillis,
};
use serde::{Deserialize, Serialize};
use sqlx::Row;

use crate::app::App;
use crate::fault::{Answer, conflict, internal, invalid};
use crate::job::{Asked, Held, NewJob, ask, insert_job, step, task_of};
use crate::store::{Act, Counter, Said, count, say};
use crate::view;

/// How long a part may be silent while a step waits for it. Past it the job fails, and the part is not asked any more: a machine that
/// comes back after days does not begin what nobody waits for.
pub const SILENT_WAIT_MAX: Duration = Duration::from_secs(15 * 60);

/// The jobs of this module. One at a time for a group.
const KINDS: [JobKind; 7] = [
    JobKind::Failover,
    JobKind::CommitFailover,
    JobKind::CancelFailover,
    JobKind::Promote,
    JobKind::Demote,
    JobKind::Release,
    JobKind::FailBack,
];

/// What somebody wants of a group.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    /// One of the kinds here.
    pub(crate) kind: JobKind,
    /// Of a failover.
    pub(crate) point: PointSelector,
    /// Of a failover: have the machine hand over its disks first.
    pub(crate) planned: bool,
    /// Of a failover: then take writes at the target.
    pub(crate) promote: bool,
    /// Which of the group's targets; needed where several keep it.
    pub(crate) target: Option<ResourceId>,
}

impl Wish {
    pub(crate) fn of(kind: JobKind) -> Wish {
        Wish { kind, point: PointSelector::Latest, planned: false, promote: false, target: None }
    }
}

/// What a job is to do, with everything chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Begun {
    group: GroupId,
    machine: ResourceId,
    target: ResourceId,
    point: PointSelector,
    planned: bool,
    promote: bool,
    /// The history that the pending failover began; of a new one, that which is taken back first.
    generation: Option<Generation>,
    devices: Vec<String>,
}

/// Makes the job, when what the parts reported last lets it.
pub(crate) async fn begin(
    app: &App,
    act: &mut Act,
    id: &GroupId,
    wish: Wish,
    created_by: String,
) -> Answer<JobInfo> {
    let group = view::group(&app.store, id).await?;
    let target = target_of(&group, &wish)?;
    let standing = group.failover.as_ref().filter(|standing| standing.target_server == target);
    possible(&group, standing, &wish)?;
    if wish.kind == JobKind::Release || wish.planned {
        let machine = view::machine(&app.store, &group.machine).await?;
        reports(machine.seen, &format!("The agent of {}", machine.name), "Start seawall-agent there.")?;
    }
    if wish.kind != JobKind::Release {
        let server = view::server(&app.store, PartRole::TargetServer, &target).await?;
        reports(server.seen, &format!("The target server {}", server.name), "Start it.")?;
    }
    nothing_under_way(act, &group).await?;
    let pending = standing.filter(|standing| standing.failover.is_some());
    let begun = Begun {
        group: *id,
        machine: group.machine.clone(),
        target,
        point: wish.point,
        planned: wish.planned,
        promote: wish.promote,
        generation: pending.map(|standing| standing.generation),
        devices: group.volumes.iter().map(|volume| volume.device.clone()).collect(),
    };
    let new = NewJob {
        kind: wish.kind,
        subject: group.name.to_string(),
        subject_id: id.to_string(),
        body: write(&begun)?,
        steps: steps(wish.kind, &begun),
        created_by,
    };
    insert_job(act, new).await
}

/// Refuses while another of these jobs is under way for the group.
pub(super) async fn nothing_under_way(act: &mut Act, group: &GroupInfo) -> Answer<()> {
    let kinds: Vec<String> = KINDS.iter().map(|kind| format!("'{}'", kind.as_str())).collect();
    let under_way: Option<String> = sqlx::query_scalar(&format!(
        "SELECT kind FROM jobs WHERE subject_id = $1 AND state IN ('waiting', 'running') AND kind IN ({})",
        kinds.join(", ")
    ))
    .bind(group.id.to_string())
    .fetch_optional(&mut **act)
    .await?;
    if let Some(kind) = under_way {
        let detail = format!("A job is under way for {}: {kind}", group.name);
        return Err(conflict(detail, "Wait for it, or cancel it."));
    }
    Ok(())
}

fn write(begun: &Begun) -> Answer<String> {
    serde_json::to_string(begun).map_err(|error| internal("keep a job", error))
}

pub(super) fn reports(seen: Option<UnixMillis>, who: &str, mend: &str) -> Answer<()> {
    let since = UnixMillis::now().0 - view::SILENT_AFTER.as_millis() as i64;
    match seen.is_some_and(|seen| seen.0 >= since) {
        true => Ok(()),
        false => Err(conflict(format!("{who} does not report; nothing can be asked of it"), mend)),
    }
}

/// The target that the job is for: as asked, else the one that has failed over, else the only one.
fn target_of(group: &GroupInfo, wish: &Wish) -> Answer<ResourceId> {
    let keeps = |target: &ResourceId| group.target_servers.contains(target);
    match (&wish.target, &group.failover, group.target_servers.as_slice()) {
        (Some(target), ..) if !keeps(target) => Err(conflict(
            format!("The target server {target} does not keep {}", group.name),
            "Name one that does; the group's page and `seawall group show` list them.",
        )),
        (Some(target), Some(standing), _) if standing.target_server != *target => Err(conflict(
            format!("{} has failed over at another target server", group.name),
            "Never fail over at two: cancel that failover first.",
        )),
        (Some(target), ..) => Ok(target.clone()),
        (None, Some(standing), _) => Ok(standing.target_server.clone()),
        (None, None, [only]) => Ok(only.clone()),
        (None, None, several) => Err(invalid(format!(
            "{} target servers keep {}; say which one (target_server)",
            several.len(),
            group.name
        ))),
    }
}

/// Refuses what the group's state does not allow, and says what would.
fn possible(group: &GroupInfo, standing: Option<&GroupFailover>, wish: &Wish) -> Answer<()> {
    let name = &group.name;
    let pending = standing.and_then(|standing| standing.failover);
    let promoted = standing.and_then(|standing| standing.promoted);
    let committed = standing.is_some_and(|standing| standing.committed);
    let refuse = |what: String, mend: &str| Err(conflict(what, mend));
    let none = || refuse(format!("{name} has not failed over"), "Fail over first.");
    match wish.kind {
        JobKind::Failover if promoted.is_some() => refuse(
            format!("{name} is promoted: its volumes are written at the target"),
            "Demote it first; what was written is then a recovery point.",
        ),
        JobKind::Failover if wish.planned && !group.protected => refuse(
            format!("{name} is not protected, so there is nothing to hand over"),
            "Fail over without `planned`.",
        ),
        JobKind::Failover if wish.planned && pending.is_some() => refuse(
            format!("{name} has failed over already, and its source is not taken"),
            "Cancel the failover first, or fail over to another point without `planned`.",
        ),
        JobKind::Failover if wish.planned && wish.point != PointSelector::Latest => {
            Err(invalid("A planned failover goes to the point that the hand-over makes; leave out the point"))
        }
        JobKind::Failover if group.newest_point.is_none() && !wish.planned => refuse(
            format!("{name} has no recovery point at its target"),
            "Wait for the first one; `seawall group show` says how far it is.",
        ),
        JobKind::CommitFailover | JobKind::CancelFailover if pending.is_none() => none(),
        JobKind::CommitFailover if pending.is_some_and(|pending| !pending.complete) => refuse(
            format!("The failover of {name} is not complete"),
            "Fail over to the same point again, which goes on; or cancel it.",
        ),
        JobKind::CancelFailover if promoted.is_some() => {
            refuse(format!("{name} is promoted: its volumes are written at the target"), "Demote it first.")
        }
        JobKind::Promote if pending.is_none() && !committed => none(),
        JobKind::Promote if promoted.is_some() => {
            refuse(format!("{name} is promoted already"), "Nothing need be done.")
        }
        JobKind::Demote if promoted.is_none() => {
            refuse(format!("{name} is not promoted"), "Nothing need be done.")
        }
        JobKind::Demote if promoted.is_some_and(|promoted| promoted.open > 0) => refuse(
            format!(
                "{} volumes of {name} are exported for writing",
                promoted.map_or(0, |promoted| promoted.open)
            ),
            "Stop what uses them, and end the exports: `seawall export list` and `seawall export stop` at the target.",
        ),
        JobKind::Release if !group.handed_over && !committed => {
            refuse(format!("The disks of {name} are not handed over"), "Nothing need be done.")
        }
        _ => Ok(()),
    }
}

fn steps(kind: JobKind, begun: &Begun) -> Vec<StepInfo> {
    match kind {
        JobKind::Failover => {
            let mut steps = Vec::new();
            if begun.planned {
                steps.push(step(
                    "hand-over",
                    "The machine hands over its disks, and they are proven to be equal",
                ));
            }
            if begun.generation.is_some() {
                steps.push(step("take-back", "The failover before is taken back"));
            }
            steps.push(step("fail-over", "The source is fenced, and the volumes become what they were"));
            if begun.promote {
                steps.push(step("promote", "The volumes can be written to at the target"));
            }
            steps
        }
        JobKind::CommitFailover => vec![
            step("commit", "The target keeps the failover"),
            step("declare", "The machine is not protected any more"),
            step("taken-up", "The agent has ended the capture"),
        ],
        JobKind::CancelFailover => vec![step("cancel", "The target takes the failover back")],
        JobKind::Promote => vec![step("promote", "The volumes can be written to at the target")],
        JobKind::Demote => vec![step("demote", "What was written is applied")],
        _ => vec![step("release", "The machine's disks can be written to again")],
    }
}

/// Brings such a job as far as it comes now.
pub(super) async fn advance(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let mut begun: Begun = serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
    let group = begun.group;
    // Only of jobs that end something is it needed, and those have it.
    let generation = begun.generation.unwrap_or_default();
    match held.job.kind {
        JobKind::Failover => advance_failover(app, act, held, &mut begun).await,
        JobKind::CommitFailover => advance_commit(app, act, held, &begun).await,
        JobKind::CancelFailover => {
            let task = TaskKind::CancelFailover { group, generation };
            last(app, act, held, "cancel", &begun.target, task).await
        }
        JobKind::Promote => last(app, act, held, "promote", &begun.target, TaskKind::Promote { group }).await,
        JobKind::Demote => last(app, act, held, "demote", &begun.target, TaskKind::Demote { group }).await,
        _ => {
            let task = TaskKind::Release { devices: begun.devices.clone() };
            last(app, act, held, "release", &begun.machine, task).await
        }
    }
}

async fn advance_failover(app: &App, act: &mut Act, held: &mut Held, begun: &mut Begun) -> Answer<()> {
    let (group, target) = (begun.group, begun.target.clone());
    if begun.planned && begun.point == PointSelector::Latest {
        let machine = begun.machine.clone();
        let Some(asked) = by(app, act, held, "hand-over", &machine, TaskKind::HandOver).await? else {
            return Ok(());
        };
        let Some(epoch) = asked.result["epoch"].as_u64() else {
            held.set("hand-over", StepState::Failed, "The agent names no point.", "Upgrade the agent.");
            held.fail("The machine handed over, and did not say to which point; release its disks.");
            return Ok(());
        };
        // Kept with the job: whoever goes on with it must not hand over again.
        begun.point = PointSelector::Epoch(Epoch(epoch));
        held.body = write(begun)?;
        held.job.percent = 50;
    }
    if let Some(generation) = begun.generation
        && by(app, act, held, "take-back", &target, TaskKind::CancelFailover { group, generation })
            .await?
            .is_none()
    {
        return Ok(());
    }
    let task = TaskKind::FailOver { group, point: begun.point };
    let Some(over) = by(app, act, held, "fail-over", &target, task).await? else { return Ok(()) };
    if begun.promote {
        let promoted = by(app, act, held, "promote", &target, TaskKind::Promote { group }).await?;
        if promoted.is_none() {
            return Ok(());
        }
    }
    let promoted = if begun.promote { " and promoted" } else { "" };
    held.done(format!("Failed over{promoted}: {} Commit it, or cancel it.", over.message));
    Ok(())
}

async fn advance_commit(app: &App, act: &mut Act, held: &mut Held, begun: &Begun) -> Answer<()> {
    let (group, generation) = (begun.group, begun.generation.unwrap_or_default());
    let task = TaskKind::CommitFailover { group, generation };
    let Some(asked) = by(app, act, held, "commit", &begun.target, task).await? else { return Ok(()) };
    if held.step("declare").state != StepState::Passed {
        let follows = asked.result["generation"].as_u64().unwrap_or(generation.0);
        sqlx::query(
            "UPDATE protection_groups SET generation = $1, committed = $2,
                 state = CASE WHEN state = 'protected' THEN 'kept' ELSE state END WHERE id = $3",
        )
        .bind(i64::try_from(follows).unwrap_or(i64::MAX))
        .bind(UnixMillis::now().0)
        .bind(group.to_string())
        .execute(&mut **act)
        .await?;
        count(act, Counter::Declared).await?;
        let message = format!("{} has failed over for good: generation {follows} goes on", held.job.subject);
        say(act, Said::new(EventKind::Declared, format!("groups/{group}"), message)).await?;
        held.set("declare", StepState::Passed, format!("Generation {follows} goes on from here."), "");
        held.job.percent = 60;
        // What is declared counts from the end of this act on; the agent is looked at in the next round.
        return Ok(());
    }
    let (done, silent) = taken_up(app, act, &begun.machine, PartRole::Agent).await?;
    if done {
        held.set("taken-up", StepState::Passed, "The agent captures nothing of it any more.", "");
    } else if silent {
        let message =
            "The machine does not report. When it comes back its agent is told; what it sends is refused.";
        held.set("taken-up", StepState::Warned, message, "Keep it from serving anybody.");
    } else {
        held.set("taken-up", StepState::Running, "Waiting for the agent to hear of it.", "");
        held.job.message = "Waiting for the agent to hear of it.".to_owned();
        return Ok(());
    }
    held.done(format!("Committed: {}", asked.message));
    Ok(())
}

/// Whether a part acts on what is declared now, and whether it is silent.
pub(super) async fn taken_up(
    app: &App,
    act: &mut Act,
    part: &ResourceId,
    role: PartRole,
) -> Answer<(bool, bool)> {
    let row = sqlx::query("SELECT digest, seen FROM parts WHERE id = $1")
        .bind(part.as_str())
        .fetch_optional(&mut **act)
        .await?;
    let (digest, seen) = match &row {
        Some(row) => (row.try_get::<String, _>("digest")?, row.try_get::<i64, _>("seen")?),
        None => Default::default(),
    };
    let wanted = {
        let mut from = app.store.read.acquire().await?;
        crate::desired::desired(&mut from, part.as_str(), role).await?.1
    };
    Ok((digest == wanted, UnixMillis::now().0 - seen > view::SILENT_AFTER.as_millis() as i64))
}

/// A job of one step.
pub(super) async fn last(
    app: &App,
    act: &mut Act,
    held: &mut Held,
    code: &str,
    part: &ResourceId,
    task: TaskKind,
) -> Answer<()> {
    if let Some(asked) = by(app, act, held, code, part, task).await? {
        held.done(asked.message);
    }
    Ok(())
}

/// A step that a part does: asks it, and gives its answer when that has come. `None` while it has not, and when the job has failed.
pub(super) async fn by(
    app: &App,
    act: &mut Act,
    held: &mut Held,
    code: &str,
    part: &ResourceId,
    task: TaskKind,
) -> Answer<Option<Asked>> {
    let json = serde_json::to_value(&task).map_err(|error| internal("keep a task", error))?;
    let kind = json["task"].as_str().unwrap_or_default();
    let Some(asked) = task_of(act, &held.job, kind).await? else {
        ask(act, &held.job, part.as_str(), &task).await?;
        let message = format!("The {} was asked.", who(&task));
        held.job.message.clone_from(&message);
        held.set(code, StepState::Running, message, "");
        return Ok(None);
    };
    match asked.state.as_str() {
        "done" => {
            held.set(code, StepState::Passed, asked.message.clone(), "");
            Ok(Some(asked))
        }
        "failed" => {
            let mend = format!("Look at the {}'s log, mend it, and ask again.", who(&task));
            held.set(code, StepState::Failed, asked.message.clone(), mend);
            held.fail(format!("{}{}", asked.message, left(&held.job, code)));
            Ok(None)
        }
        _ => {
            if silent_for_too_long(app, part).await? {
                let message = format!(
                    "The {} has been silent for {} minutes.",
                    who(&task),
                    SILENT_WAIT_MAX.as_secs() / 60
                );
                sqlx::query("UPDATE tasks SET state = 'failed', message = $1 WHERE job_id = $2 AND state IN ('waiting', 'running')")
                    .bind(&message)
                    .bind(held.job.id.as_str())
                    .execute(&mut **act)
                    .await?;
                held.set(code, StepState::Failed, message.clone(), "Start it, and ask again.");
                held.fail(format!("{message}{}", left(&held.job, code)));
                return Ok(None);
            }
            if !asked.message.is_empty() {
                held.job.message.clone_from(&asked.message);
                held.set(code, StepState::Running, asked.message, "");
            }
            Ok(None)
        }
    }
}

fn who(task: &TaskKind) -> &'static str {
    match task {
        TaskKind::HandOver | TaskKind::Release { .. } => "agent",
        _ => "target server",
    }
}

/// What a job that failed at a step has left behind, and what to do with it.
fn left(job: &JobInfo, code: &str) -> &'static str {
    let handed_over =
        job.steps.iter().any(|step| step.code == "hand-over" && step.state == StepState::Passed);
    match code {
        "fail-over" if handed_over => {
            " The machine's disks stay handed over: fail over again without `planned`, or release them."
        }
        "promote" if job.kind == JobKind::Failover => {
            " The group has failed over and is not promoted: promote it, or cancel the failover."
        }
        _ => "",
    }
}

async fn silent_for_too_long(app: &App, part: &ResourceId) -> Answer<bool> {
    let seen: Option<i64> = sqlx::query_scalar("SELECT seen FROM parts WHERE id = $1 AND removed = 0")
        .bind(part.as_str())
        .fetch_optional(&app.store.read)
        .await?;
    let silent = UnixMillis::now().0.saturating_sub(seen.unwrap_or_default());
    Ok(silent > SILENT_WAIT_MAX.as_millis() as i64)
}
