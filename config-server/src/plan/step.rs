//! Doing a step.

use std::collections::BTreeMap;

use control::PointSelector;
use control::fleet::plan::{
    FailoverPoint, PlanAction, PlanCommit, PlanFailover, PlanManual, PlanPoint, PlanProve, PlanScript,
    PlanStep, RunMode, StepPointAge,
};
use control::fleet::{
    GroupInfo, JobInfo, JobKind, JobState, Name, PartRole, PointNow, ProblemCode, ResourceId, StepState,
    TaskKind, UnixMillis,
};
use sqlx::Row;

use super::effect::{Key, Trouble, Went as Effect};
use super::state::{Record, Run};
use super::{dns, webhook};
use crate::api::declare::insert_group_job;
use crate::app::App;
use crate::declared::declared;
use crate::fault::{Answer, Fault, internal};
use crate::job::{self, Asked, task};
use crate::protect::failover::{self, Wish};
use crate::protect::proof;
use crate::store::Act;
use crate::view;

/// After a script's time-out its agent has so long to hear of it, kill it and say so, in milliseconds.
const AGENT_GRACE_MS: i64 = 30_000;

/// How a step goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Went {
    /// It goes on; with what it waits for.
    On(String),
    Passed(String),
    /// Done, and somebody should know something.
    Warned(String),
    /// Not done: why, and what to do.
    Failed(String, String),
}

/// What a step is done with.
pub(super) struct Doing<'a> {
    pub(super) app: &'a App,
    pub(super) act: &'a mut Act,
    pub(super) job: &'a JobInfo,
    pub(super) run: &'a mut Run,
    pub(super) place: usize,
    pub(super) step: &'a PlanStep,
}

impl Doing<'_> {
    pub(super) fn record(&mut self) -> &mut Record {
        &mut self.run.records[self.place]
    }

    fn key(&self) -> Key {
        (self.job.id.clone(), self.step.id.to_string(), self.run.records[self.place].attempts)
    }

    /// Does something over the network, as often as it must be tried.
    pub(super) fn effect<F>(&self, mend: &str, make: impl FnOnce() -> F) -> Went
    where
        F: Future<Output = Result<String, Trouble>> + Send + 'static,
    {
        match self.app.effects.poll(self.key(), make) {
            Effect::On(None) => Went::On(String::new()),
            Effect::On(Some(before)) => Went::On(format!("{}; it is tried again.", capital(&before))),
            Effect::Done(message) => Went::Passed(message),
            Effect::Failed(message) => Went::Failed(format!("{}.", capital(&message)), mend.to_owned()),
        }
    }
}

/// A sentence's beginning.
pub(super) fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// The group of a machine's name.
pub(super) async fn group_named(app: &App, name: &Name) -> Answer<Option<GroupInfo>> {
    let all = declared(&app.store, None).await?;
    let found = all.values().find(|group| group.name == *name).map(|group| group.id);
    match found {
        Some(id) => Ok(Some(view::group(&app.store, &id).await?)),
        None => Ok(None),
    }
}

/// How old the points are that a step takes or uses.
pub(super) async fn ages(app: &App, step: &PlanStep, mode: RunMode) -> Answer<Vec<StepPointAge>> {
    let (groups, point) = match step.action() {
        // What is handed over is at the target when it fails over.
        Some(PlanAction::Failover(_)) if mode == RunMode::Planned => return Ok(Vec::new()),
        Some(PlanAction::Failover(failover)) => (&failover.groups, failover.point),
        Some(PlanAction::Point(point)) => (&point.groups, FailoverPoint::Newest),
        Some(PlanAction::Prove(prove)) => (&prove.groups, prove.point),
        _ => return Ok(Vec::new()),
    };
    let now = UnixMillis::now();
    let watched = view::watched(&app.store).await?;
    let age = |name: &Name| {
        let watched = watched.iter().find(|watched| watched.group.name == *name)?;
        match point {
            FailoverPoint::Newest => watched.group.rpo_ms,
            FailoverPoint::Application => watched.application_point.map(|time| now.since(time)),
        }
    };
    let age = |name: &Name| StepPointAge { step: step.id.clone(), group: name.clone(), age_ms: age(name) };
    Ok(groups.iter().map(age).collect())
}

pub(super) async fn go_on(doing: &mut Doing<'_>) -> Answer<Went> {
    let Some(action) = doing.step.action() else {
        return Ok(Went::Failed("The step says nothing to do.".to_owned(), "Correct the plan.".to_owned()));
    };
    match action {
        PlanAction::Wait(wait) => {
            let began = doing.record().began.unwrap_or_default();
            let waited = UnixMillis::now().since(began) / 1000;
            let seconds = i64::try_from(wait.seconds).unwrap_or(i64::MAX);
            Ok(match waited >= seconds {
                true => Went::Passed(format!("Waited {seconds} s.")),
                false => Went::On(String::new()),
            })
        }
        // A drill leaves machines and their targets as they are.
        PlanAction::Failover(PlanFailover { groups, .. }) | PlanAction::Commit(PlanCommit { groups })
            if doing.run.mode == RunMode::Drill =>
        {
            super::dry::look_at_groups(doing, groups, "Nothing was failed over, because this is a drill. ")
                .await
        }
        PlanAction::Failover(PlanFailover { groups, .. })
        | PlanAction::Commit(PlanCommit { groups })
        | PlanAction::Point(PlanPoint { groups, .. })
        | PlanAction::Prove(PlanProve { groups, .. }) => children(doing, groups).await,
        PlanAction::Script(script) => run_script(doing, script).await,
        PlanAction::Manual(manual) => ask_person(doing, manual).await,
        PlanAction::Dns(asked) => {
            // A drill must not lead people to a copy, unless that is what the step is for.
            if doing.run.mode == RunMode::Drill && doing.step.when != control::fleet::plan::PlanWhen::Drill {
                return Ok(super::dry::look_at_dns(
                    doing,
                    asked,
                    "Nothing was changed, because this is a drill. ",
                ));
            }
            let (keys, asked) = (doing.app.dns_keys.clone(), asked.clone());
            let mend =
                "Correct it, and resume the run; or change the records by hand, and take the step out.";
            Ok(doing.effect(mend, || async move { dns::update(keys.as_deref(), &asked).await }))
        }
        PlanAction::Webhook(asked) => {
            let (run, step, attempt) = doing.key();
            let (asked, key) = (asked.clone(), format!("{run}-{step}-{attempt}"));
            let mend = "Look at the receiver, and resume the run, which sends it again.";
            Ok(doing.effect(mend, || async move { webhook::send(&asked, key).await }))
        }
    }
}

/// One job for each group, all at once; what is to be done is asked for as anybody would ask.
async fn children(doing: &mut Doing<'_>, groups: &[Name]) -> Answer<Went> {
    let (mut waiting, mut warned, mut failed, mut done) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for name in groups {
        let Some(child) = doing.record().children.get(name.as_str()).cloned() else {
            match begin_child(doing, name).await {
                Ok(Some(id)) => {
                    doing.record().children.insert(name.to_string(), id);
                    waiting.push(name.to_string());
                }
                Ok(None) => waiting.push(format!("{name} (another job is under way for it)")),
                Err(fault) if is_refusal(&fault) => {
                    failed.push(format!("{name}: {}. {}", fault.problem.detail, fault.problem.mend));
                }
                Err(fault) => return Err(fault),
            }
            continue;
        };
        let Some(job) = child_job(doing.act, &child).await? else {
            failed.push(format!("{name}: its job {child} is gone"));
            continue;
        };
        match job.state {
            JobState::Waiting | JobState::Running => waiting.push(name.to_string()),
            JobState::Failed | JobState::Cancelled => failed.push(format!("{name}: {}", job.message)),
            JobState::Done if job.steps.iter().any(|step| step.state == StepState::Warned) => {
                warned.push(format!("{name}: {}", job.message));
            }
            JobState::Done => done += 1,
        }
    }
    // All are waited for, so that none goes on when the run has ended.
    if !waiting.is_empty() {
        return Ok(Went::On(format!("Waiting for {}.", waiting.join(", "))));
    }
    if !failed.is_empty() {
        let mend = "Look at the groups' jobs, and resume the run; groups that are done are not done again.";
        return Ok(Went::Failed(failed.join("; "), mend.to_owned()));
    }
    Ok(match warned.is_empty() {
        true if done == 1 => Went::Passed("1 group is done.".to_owned()),
        true => Went::Passed(format!("{done} groups are done.")),
        false => Went::Warned(warned.join("; ")),
    })
}

/// Whether asking again is of no use.
fn is_refusal(fault: &Fault) -> bool {
    [ProblemCode::NotFound, ProblemCode::Conflict, ProblemCode::Invalid]
        .into_iter()
        .any(|code| fault.is(code))
}

/// The job of a group; nothing while another one is under way for it, for ours comes after it.
async fn begin_child(doing: &mut Doing<'_>, name: &Name) -> Answer<Option<ResourceId>> {
    let group = group_named(doing.app, name).await?;
    let group = group.ok_or_else(|| crate::fault::not_found("group", name))?;
    let others: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM jobs WHERE subject_id = $1 AND state IN ('waiting', 'running')",
    )
    .bind(group.id.to_string())
    .fetch_one(&mut **doing.act)
    .await?;
    if others > 0 {
        return Ok(None);
    }
    let who = format!("plan {} of {}", doing.run.plan.name, doing.job.created_by);
    let wish = match doing.step.action() {
        Some(PlanAction::Failover(failover)) => {
            let planned = doing.run.mode == RunMode::Planned;
            let point = match failover.point {
                FailoverPoint::Application if !planned => PointSelector::Application,
                _ => PointSelector::Latest,
            };
            Wish { kind: JobKind::Failover, point, planned, promote: failover.promote, target: None }
        }
        Some(PlanAction::Commit(_)) => Wish::of(JobKind::CommitFailover),
        Some(PlanAction::Prove(prove)) => {
            let point = match prove.point {
                FailoverPoint::Newest => PointSelector::Latest,
                FailoverPoint::Application => PointSelector::Application,
            };
            let proof = proof::policy_of(doing.app, &group).await?;
            let wish = proof::Wish { point, proof, target: None };
            return Ok(Some(proof::begin(doing.app, doing.act, &group.id, wish, who).await?.id));
        }
        Some(PlanAction::Point(point)) => {
            let label = format!("plan {}", doing.run.plan.name).parse().ok();
            let asked = PointNow { consistency: point.consistency, label };
            let body = serde_json::to_string(&asked).map_err(|error| internal("keep a job", error))?;
            return Ok(Some(insert_group_job(doing.act, &group, JobKind::Point, body, who).await?.id));
        }
        _ => return Err(crate::fault::invalid("The step is about no groups")),
    };
    Ok(Some(failover::begin(doing.app, doing.act, &group.id, wish, who).await?.id))
}

pub(super) async fn child_job(act: &mut Act, id: &ResourceId) -> Answer<Option<JobInfo>> {
    let row =
        sqlx::query("SELECT * FROM jobs WHERE id = $1").bind(id.as_str()).fetch_optional(&mut **act).await?;
    row.as_ref().map(|row| view::job_of_row(row, true)).transpose()
}

/// The machine of a name.
pub(super) async fn machine_named(act: &mut Act, name: &Name) -> Answer<Option<(String, UnixMillis)>> {
    let row = sqlx::query("SELECT id, seen FROM parts WHERE role = $1 AND live_name = $2")
        .bind(PartRole::Agent.as_str())
        .bind(name.as_str())
        .fetch_optional(&mut **act)
        .await?;
    row.map(|row| Ok((row.try_get("id")?, UnixMillis(row.try_get("seen")?)))).transpose()
}

/// Asks a machine's agent once in an attempt, and says how that goes.
pub(super) async fn ask_agent(
    doing: &mut Doing<'_>,
    machine: &Name,
    kind: impl FnOnce(&Run) -> TaskKind,
) -> Answer<Result<Asked, Went>> {
    if let Some(id) = doing.record().task.clone() {
        return match task(doing.act, &id).await? {
            Some(asked) => Ok(Ok(asked)),
            None => Ok(Err(Went::Failed(
                "What the agent was asked for is gone.".to_owned(),
                "Resume the run.".to_owned(),
            ))),
        };
    }
    let Some((part, _)) = machine_named(doing.act, machine).await? else {
        let mend = "Enrol it, or correct the plan.".to_owned();
        return Ok(Err(Went::Failed(format!("There is no machine {machine}."), mend)));
    };
    let kind = kind(doing.run);
    let id = job::ask(doing.act, doing.job, &part, &kind).await?;
    doing.record().task = Some(id);
    Ok(Err(Went::On(format!("The agent of {machine} was asked."))))
}

async fn run_script(doing: &mut Doing<'_>, script: &PlanScript) -> Answer<Went> {
    let (run_id, step, timeout_s) =
        (doing.job.id.to_string(), doing.step.id.to_string(), doing.step.timeout_s);
    let asked = ask_agent(doing, &script.machine, |run| TaskKind::Script {
        command: script.command.to_string(),
        arguments: script.arguments.clone(),
        environment: BTreeMap::from([
            ("SEAWALL_PLAN".to_owned(), run.plan.name.to_string()),
            ("SEAWALL_RUN".to_owned(), run_id),
            ("SEAWALL_STEP".to_owned(), step),
            ("SEAWALL_MODE".to_owned(), run.mode.as_str().to_owned()),
        ]),
        timeout_s,
    })
    .await?;
    let asked = match asked {
        Ok(asked) => asked,
        Err(went) => return Ok(went),
    };
    let mend = "Look at its output in the run's report, and resume the run, which runs it again.".to_owned();
    Ok(match asked.state.as_str() {
        "done" if asked.result["succeeded"] == true => Went::Passed(format!("{}.", asked.message)),
        "done" => Went::Failed(format!("{}.", asked.message), mend),
        "failed" => Went::Failed(
            format!("{}.", capital(&asked.message)),
            "Look at the machine and its agent's configuration, and resume the run.".to_owned(),
        ),
        "waiting" => Went::On(format!("The agent of {} was asked.", script.machine)),
        _ => Went::On(asked.message),
    })
}

/// How long a step may take, in milliseconds.
pub(super) fn limit_ms(step: &PlanStep) -> i64 {
    let limit = i64::try_from(step.timeout_s.saturating_mul(1000)).unwrap_or(i64::MAX);
    // A script's time-out is its agent's to keep, which knows when it was started and what it has printed.
    if step.script.is_some() { limit.saturating_add(AGENT_GRACE_MS) } else { limit }
}

async fn ask_person(doing: &mut Doing<'_>, manual: &PlanManual) -> Answer<Went> {
    let (run, step, attempt) = doing.key();
    let row = sqlx::query(
        "SELECT done, note, who FROM plan_answers WHERE run_id = $1 AND step = $2 AND attempt = $3",
    )
    .bind(run.as_str())
    .bind(&step)
    .bind(i64::from(attempt))
    .fetch_optional(&mut **doing.act)
    .await?;
    let Some(row) = row else {
        let first = manual.text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        return Ok(Went::On(format!("Waiting for a person: {first}")));
    };
    let (done, note, who): (i64, String, String) =
        (row.try_get("done")?, row.try_get("note")?, row.try_get("who")?);
    let note = if note.is_empty() { String::new() } else { format!(" {note}") };
    Ok(match done != 0 {
        true => Went::Passed(format!("Confirmed by {who}.{note}")),
        false => Went::Failed(
            format!("Refused by {who}.{note}"),
            "Settle it, and resume the run; the person is asked again.".to_owned(),
        ),
    })
}

/// Nobody waits any more for what a machine was asked.
pub(super) async fn give_up(act: &mut Act, record: &Record) -> Answer<()> {
    if let Some(task) = &record.task {
        sqlx::query("UPDATE tasks SET state = 'failed', message = 'nobody waits for it any more' WHERE id = $1 AND state IN ('waiting', 'running')")
            .bind(task.as_str())
            .execute(&mut **act)
            .await?;
    }
    Ok(())
}

/// Forgets those of a step's jobs that did not end well, so that they are begun anew; others are waited for, or are done.
pub(super) async fn forget_failed(act: &mut Act, record: &mut Record) -> Answer<()> {
    let mut kept = BTreeMap::new();
    for (group, id) in std::mem::take(&mut record.children) {
        let job = child_job(act, &id).await?;
        let useful = job.is_some_and(|job| !matches!(job.state, JobState::Failed | JobState::Cancelled));
        if useful {
            kept.insert(group, id);
        }
    }
    record.children = kept;
    Ok(())
}
