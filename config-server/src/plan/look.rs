//! The pictures of plans and their runs.

use control::fleet::plan::{Plan, PlanGoals, PlanInfo, PlanRun, RunStep, StepAnswer, StepChild};
use control::fleet::{JobInfo, ResourceId, StepState, UnixMillis};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row};

use super::state::{Record, Run};
use crate::api::guard::parse;
use crate::fault::{Answer, not_found};
use crate::job::task;
use crate::store::Store;
use crate::view::job_of_row;

/// Runs that a list shows.
const RUNS_SHOWN: i64 = 100;

async fn plan_of_row(from: &mut AnyConnection, row: &AnyRow, whole: bool) -> Answer<PlanInfo> {
    let (id, text): (String, String) = (row.try_get("id")?, row.try_get("text")?);
    // One that an older version has kept and this one does not read is shown with why, so that it can be mended.
    let (about, goals, steps) = match Plan::read(&text) {
        Ok(plan) => (plan.about, plan.goals, plan.steps.len()),
        Err(error) => (format!("This plan is not read any more: {error}"), PlanGoals::default(), 0),
    };
    let last = sqlx::query(
        "SELECT * FROM jobs WHERE subject_id = $1 AND kind = 'plan' ORDER BY number DESC LIMIT 1",
    )
    .bind(&id)
    .fetch_optional(from)
    .await?;
    Ok(PlanInfo {
        id: parse(id)?,
        name: parse(row.try_get("name")?)?,
        about,
        goals,
        steps: steps as i64,
        text: if whole { text } else { String::new() },
        changed: UnixMillis(row.try_get("changed")?),
        changed_by: row.try_get("changed_by")?,
        last_run: last.map(|row| job_of_row(&row, false)).transpose()?,
    })
}

/// All plans, by name.
pub(crate) async fn plans(store: &Store) -> Answer<Vec<PlanInfo>> {
    let mut from = store.read.acquire().await?;
    let rows = sqlx::query("SELECT * FROM plans ORDER BY name").fetch_all(&mut *from).await?;
    let mut plans = Vec::new();
    for row in &rows {
        plans.push(plan_of_row(&mut from, row, false).await?);
    }
    Ok(plans)
}

pub(crate) async fn plan(store: &Store, id: &ResourceId) -> Answer<PlanInfo> {
    let mut from = store.read.acquire().await?;
    let row =
        sqlx::query("SELECT * FROM plans WHERE id = $1").bind(id.as_str()).fetch_optional(&mut *from).await?;
    let row = row.ok_or_else(|| not_found("plan", id))?;
    plan_of_row(&mut from, &row, true).await
}

/// The newest runs of a plan.
pub(crate) async fn runs(store: &Store, plan: &ResourceId) -> Answer<Vec<JobInfo>> {
    let rows = sqlx::query(
        "SELECT * FROM jobs WHERE subject_id = $1 AND kind = 'plan' ORDER BY number DESC LIMIT $2",
    )
    .bind(plan.as_str())
    .bind(RUNS_SHOWN)
    .fetch_all(&store.read)
    .await?;
    // Of a plan that is deleted the runs stay; of one that never was there are none.
    let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM plans WHERE id = $1")
        .bind(plan.as_str())
        .fetch_one(&store.read)
        .await?;
    if rows.is_empty() && there == 0 {
        return Err(not_found("plan", plan));
    }
    rows.iter().map(|row| job_of_row(row, false)).collect()
}

/// A run, with all that is known of it.
pub(crate) async fn run(store: &Store, id: &ResourceId) -> Answer<PlanRun> {
    let mut from = store.read.acquire().await?;
    let row = sqlx::query("SELECT * FROM jobs WHERE id = $1 AND kind = 'plan'")
        .bind(id.as_str())
        .fetch_optional(&mut *from)
        .await?;
    let row = row.ok_or_else(|| not_found("run", id))?;
    let mut job = job_of_row(&row, true)?;
    let run = Run::of_text(&row.try_get::<String, _>("body")?)?;
    let answers = answers(&mut from, id).await?;
    let mut steps = Vec::new();
    for (place, step) in run.plan.steps.iter().enumerate() {
        let Some(record) = run.records.get(place) else { continue };
        let stands = job.steps.iter().find(|stands| stands.code == step.id.as_str());
        let output = match &record.task {
            Some(id) => {
                task(&mut from, id).await?.and_then(|asked| Some(asked.result["output"].as_str()?.to_owned()))
            }
            None => None,
        };
        let answer =
            answers.iter().find(|(own, attempt, _)| own == step.id.as_str() && *attempt == record.attempts);
        steps.push(RunStep {
            id: step.id.clone(),
            title: step.shown().to_owned(),
            kind: step.action().map_or("", |action| action.kind()).to_owned(),
            state: stands.map_or(StepState::Waiting, |stands| stands.state),
            message: stands.map(|stands| stands.message.clone()).unwrap_or_default(),
            mend: stands.map(|stands| stands.mend.clone()).unwrap_or_default(),
            attempts: record.attempts,
            began: record.began,
            ended: record.ended,
            text: step.manual.as_ref().map(|manual| manual.text.clone()).unwrap_or_default(),
            output: output.unwrap_or_default(),
            children: children(&mut from, record).await?,
            answer: answer.map(|(_, _, answer)| answer.clone()),
        });
    }
    job.steps = Vec::new();
    let ended = job.state.ended().then_some(job.changed);
    let mut shown = PlanRun {
        id: job.id.clone(),
        plan: run.plan_id,
        name: run.plan.name,
        mode: run.mode,
        goals: run.plan.goals,
        began: job.created,
        ended,
        took_ms: ended.unwrap_or_else(UnixMillis::now).since(job.created),
        job,
        rto_reached: None,
        points: run.points,
        rpo_reached: None,
        steps,
    };
    shown.judge();
    Ok(shown)
}

async fn answers(from: &mut AnyConnection, id: &ResourceId) -> Answer<Vec<(String, u32, StepAnswer)>> {
    let rows = sqlx::query("SELECT step, attempt, done, note, who, time FROM plan_answers WHERE run_id = $1")
        .bind(id.as_str())
        .fetch_all(from)
        .await?;
    let answer = |row: &AnyRow| {
        let answer = StepAnswer {
            who: row.try_get("who")?,
            time: UnixMillis(row.try_get("time")?),
            done: row.try_get::<i64, _>("done")? != 0,
            note: row.try_get("note")?,
        };
        Ok((
            row.try_get("step")?,
            u32::try_from(row.try_get::<i64, _>("attempt")?).unwrap_or_default(),
            answer,
        ))
    };
    rows.iter().map(answer).collect()
}

async fn children(from: &mut AnyConnection, record: &Record) -> Answer<Vec<StepChild>> {
    let mut children = Vec::new();
    for (group, id) in &record.children {
        let row = sqlx::query("SELECT * FROM jobs WHERE id = $1")
            .bind(id.as_str())
            .fetch_optional(&mut *from)
            .await?;
        // One that ended long ago has been let go.
        if let Some(row) = row {
            let job = job_of_row(&row, false)?;
            children.push(StepChild {
                group: parse(group.clone())?,
                job: job.id,
                state: job.state,
                message: job.message,
            });
        }
    }
    Ok(children)
}
