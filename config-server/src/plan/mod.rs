//! Recovery plans: kept, run, reported.
//!
//! Rooms: `state` is what is known of a run; `step` does steps and `dry` looks whether they could be done; `effect` has what they do over the
//! network, `dns` and `webhook` are two of those; `look` makes the pictures; `report` is a run's page.
//!
//! A run is a job, so the config server that holds its lease goes on with it after any other. Crash order of a step: 1. that it has begun is
//! durable, 2. it is done, 3. what came of it is durable. So a step of which nothing is known was not begun. Between 1 and 3 it may be done
//! twice: jobs and tasks are made in the transaction that names them, and so once; an update of DNS makes the same of any state; a webhook
//! carries a key by which its receiver knows it again.

mod dns;
mod dry;
mod effect;
mod look;
mod report;
mod state;
mod step;
mod webhook;

use control::fleet::plan::{AnswerStep, Plan, RunMode, RunPlan, StepOutcome};
use control::fleet::{JobInfo, JobKind, JobState, ProblemCode, ResourceId, StepState, UnixMillis};
use sqlx::Row;

pub(crate) use self::effect::Effects;
pub(crate) use self::look::{plan, plans, run, runs};
pub use self::report::report;
pub(crate) use self::report::style_hash;
use self::state::Run;
use self::step::Went;
use crate::api::guard::parse;
use crate::app::App;
use crate::fault::{Answer, conflict, fault, invalid, not_found};
use crate::job::{Held, NewJob, insert_job, step as job_step};
use crate::secret::new_id;
use crate::store::{Act, Said, say};
use crate::view::job_of_row;

/// Plans. More are refused.
pub(crate) const PLANS_MAX: i64 = 1000;

/// Reads a plan's text.
pub(crate) fn read(text: &str) -> Answer<Plan> {
    Plan::read(text).map_err(|error| {
        fault(
            ProblemCode::Invalid,
            format!("The plan makes no sense: {error}"),
            "Correct the text; docs/plans.md says what there is.",
        )
    })
}

/// Keeps a plan: a new one, or in place of one.
pub(crate) async fn write(
    act: &mut Act,
    id: Option<&ResourceId>,
    text: &str,
    who: &str,
) -> Answer<ResourceId> {
    // PostgreSQL has no texts with it.
    if text.contains('\0') {
        return Err(invalid("The plan's text has a NUL"));
    }
    let plan = read(text)?;
    let own = id.cloned().unwrap_or_else(new_id);
    let taken: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM plans WHERE name = $1 AND id <> $2")
        .bind(plan.name.as_str())
        .bind(own.as_str())
        .fetch_one(&mut **act)
        .await?;
    if taken > 0 {
        return Err(conflict(format!("There is a plan {} already", plan.name), "Choose another name."));
    }
    let sql = match id {
        Some(_) => "UPDATE plans SET name = $2, text = $3, changed = $4, changed_by = $5 WHERE id = $1",
        None => {
            let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM plans").fetch_one(&mut **act).await?;
            if there >= PLANS_MAX {
                return Err(fault(
                    ProblemCode::Limit,
                    format!("There are {there} plans"),
                    "Delete those that nobody needs.",
                ));
            }
            "INSERT INTO plans (id, name, text, changed, changed_by) VALUES ($1, $2, $3, $4, $5)"
        }
    };
    let kept = sqlx::query(sql)
        .bind(own.as_str())
        .bind(plan.name.as_str())
        .bind(text)
        .bind(UnixMillis::now().0)
        .bind(who)
        .execute(&mut **act)
        .await?;
    if kept.rows_affected() == 0 {
        return Err(not_found("plan", own));
    }
    let what = if id.is_some() { "changed" } else { "made" };
    let message = format!("The plan {} was {what}", plan.name);
    say(act, Said::new(control::fleet::EventKind::Declared, format!("plans/{own}"), message)).await?;
    Ok(own)
}

/// Lets a plan go. Its runs stay.
pub(crate) async fn drop_plan(act: &mut Act, id: &ResourceId) -> Answer<()> {
    let under_way = under_way(act, id).await?;
    if under_way > 0 {
        return Err(conflict("The plan is being run", "Wait for the run, or cancel its job."));
    }
    let gone = sqlx::query("DELETE FROM plans WHERE id = $1").bind(id.as_str()).execute(&mut **act).await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("plan", id));
    }
    let said = Said::new(control::fleet::EventKind::Declared, format!("plans/{id}"), "A plan was deleted");
    Ok(say(act, said).await?)
}

async fn under_way(act: &mut Act, plan: &ResourceId) -> Answer<i64> {
    let count = "SELECT COUNT(*) FROM jobs WHERE subject_id = $1 AND kind = 'plan' AND state IN ('waiting', 'running')";
    Ok(sqlx::query_scalar(count).bind(plan.as_str()).fetch_one(&mut **act).await?)
}

/// Begins a run.
pub(crate) async fn begin(app: &App, id: &ResourceId, asked: &RunPlan, who: String) -> Answer<JobInfo> {
    let mut act = app.store.act().await?;
    let text: Option<String> = sqlx::query_scalar("SELECT text FROM plans WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(&mut *act)
        .await?;
    let plan = read(&text.ok_or_else(|| not_found("plan", id))?)?;
    if asked.mode != RunMode::DryRun {
        crate::api::approval::confirmed(&asked.confirm, plan.name.as_str())?;
    }
    let steps = plan.steps.iter().map(|step| job_step(step.id.as_str(), step.shown())).collect();
    let subject = plan.name.to_string();
    let run = Run::new(id.clone(), plan, asked.mode);
    let new = NewJob {
        kind: JobKind::Plan,
        subject,
        subject_id: id.to_string(),
        body: run.text()?,
        steps,
        created_by: who,
    };
    let job = insert_job(&mut act, new).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok(job)
}

/// Brings a run as far as it comes now.
pub(crate) async fn advance(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let mut run = Run::of_text(&held.body)?;
    let went = walk(app, act, held, &mut run).await;
    held.body = run.text()?;
    went
}

async fn walk(app: &App, act: &mut Act, held: &mut Held, run: &mut Run) -> Answer<()> {
    while let Some(place) = run.current() {
        let step = run.plan.steps[place].clone();
        let code = step.id.as_str();
        let now = UnixMillis::now();
        if run.records[place].began.is_none() {
            if let Some(why) = run.not_needed(&step) {
                run.records[place].outcome = Some(StepOutcome::Skipped);
                held.set(code, StepState::Skipped, why, "");
                continue;
            }
            let record = &mut run.records[place];
            record.began = Some(now);
            record.attempts += 1;
            let ages = step::ages(app, &step, run.mode).await?;
            run.points.retain(|age| age.step != step.id);
            run.points.extend(ages);
            held.set(code, StepState::Running, "", "");
            held.job.percent = run.percent();
            held.job.message = format!("{} ({} of {})", step.shown(), place + 1, run.plan.steps.len());
            // What was begun is durable before it is done.
            app.jobs_wake.notify_one();
            return Ok(());
        }
        let mut doing = step::Doing { app, act, job: &held.job, run, place, step: &step };
        let mut went = match doing.run.mode {
            RunMode::DryRun => dry::look(&mut doing).await?,
            _ => step::go_on(&mut doing).await?,
        };
        let began = run.records[place].began.unwrap_or(now);
        if let Went::On(message) = &went
            && now.since(began) >= step::limit_ms(&step)
        {
            let more = if message.is_empty() { String::new() } else { format!(" {message}") };
            step::give_up(act, &run.records[place]).await?;
            went = Went::Failed(
                format!("Not done after {} s.{more}", step.timeout_s),
                "Look why it takes so long, and resume the run; what the step has begun elsewhere goes on."
                    .to_owned(),
            );
        }
        let (outcome, state, message, mend) = match went {
            Went::On(message) => {
                held.set(code, StepState::Running, message, "");
                return Ok(());
            }
            Went::Passed(message) => (StepOutcome::Passed, StepState::Passed, message, String::new()),
            Went::Warned(message) => (StepOutcome::Passed, StepState::Warned, message, String::new()),
            Went::Failed(message, mend) => (StepOutcome::Failed, StepState::Failed, message, mend),
        };
        run.records[place].outcome = Some(outcome);
        run.records[place].ended = Some(UnixMillis::now());
        held.set(code, state, message.clone(), mend);
        held.job.percent = run.percent();
        if outcome == StepOutcome::Failed && run.stops_at(&step) {
            held.fail(format!("The step {} failed: {message}", step.shown()));
            return Ok(());
        }
    }
    let (failed, all) = (run.count(StepOutcome::Failed), run.plan.steps.len());
    match (run.mode, failed) {
        (RunMode::DryRun, 0) => held.done("Everything that can be looked at beforehand is as it must be."),
        (RunMode::DryRun, failed) => {
            held.fail(format!("{failed} of {all} steps could not be done as things are."))
        }
        (_, 0) => held.done(format!("{} is done.", run.plan.name)),
        (_, failed) => held
            .done(format!("{} is done; {failed} of {all} steps failed and were passed over.", run.plan.name)),
    }
    Ok(())
}

/// Notes a person's answer to the step that waits for one.
pub(crate) async fn answer(app: &App, id: &ResourceId, asked: &AnswerStep, who: String) -> Answer<()> {
    let limit = control::fleet::plan::NOTE_CHARS_MAX;
    if asked.note.chars().count() > limit || asked.note.chars().any(|one| one.is_control() && one != '\n') {
        return Err(invalid(format!("The note is not a text of at most {limit} characters")));
    }
    let mut act = app.store.act().await?;
    let row = sqlx::query("SELECT * FROM jobs WHERE id = $1 AND kind = 'plan'")
        .bind(id.as_str())
        .fetch_optional(&mut *act)
        .await?;
    let row = row.ok_or_else(|| not_found("run", id))?;
    let run = Run::of_text(&row.try_get::<String, _>("body")?)?;
    let waiting = match row.try_get::<String, _>("state")?.as_str() {
        "waiting" | "running" if run.mode != RunMode::DryRun => run.current(),
        _ => None,
    };
    let waiting = waiting.filter(|place| {
        let step = &run.plan.steps[*place];
        step.id == asked.step && step.manual.is_some() && run.records[*place].began.is_some()
    });
    let Some(place) = waiting else {
        return Err(conflict(
            format!("The step {} does not wait for anybody", asked.step),
            "Look at the run: it may have ended, or be at another step.",
        ));
    };
    let made = sqlx::query(
        "INSERT INTO plan_answers (run_id, step, attempt, done, note, who, time) VALUES ($1, $2, $3, $4, $5, $6, $7)
         ON CONFLICT (run_id, step, attempt) DO NOTHING",
    )
    .bind(id.as_str())
    .bind(asked.step.as_str())
    .bind(i64::from(run.records[place].attempts))
    .bind(i64::from(asked.done))
    .bind(&asked.note)
    .bind(who)
    .bind(UnixMillis::now().0)
    .execute(&mut *act)
    .await?;
    if made.rows_affected() == 0 {
        return Err(conflict("Somebody has answered already", "Look at the run."));
    }
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok(())
}

/// Has a run that failed go on at the step that failed.
pub(crate) async fn resume(app: &App, id: &ResourceId, who: &str) -> Answer<JobInfo> {
    let mut act = app.store.act().await?;
    let row = sqlx::query("SELECT * FROM jobs WHERE id = $1 AND kind = 'plan'")
        .bind(id.as_str())
        .fetch_optional(&mut *act)
        .await?;
    let row = row.ok_or_else(|| not_found("run", id))?;
    let mut job = job_of_row(&row, true)?;
    let mut run = Run::of_text(&row.try_get::<String, _>("body")?)?;
    if job.state != JobState::Failed || run.mode == RunMode::DryRun {
        let what = if run.mode == RunMode::DryRun { "dry" } else { job.state.as_str() };
        return Err(conflict(
            format!("The run is {what}; one that failed can be resumed"),
            "Run the plan anew.",
        ));
    }
    if under_way(&mut act, &parse(row.try_get("subject_id")?)?).await? > 0 {
        return Err(conflict("Another run of the plan is under way", "Wait for it, or cancel its job."));
    }
    run.reopen();
    if let Some(place) = run.current() {
        step::forget_failed(&mut act, &mut run.records[place]).await?;
    }
    for (step, record) in job.steps.iter_mut().zip(&run.records) {
        if record.outcome.is_none() {
            *step = job_step(&step.code, &step.title);
        }
    }
    let steps =
        serde_json::to_string(&job.steps).map_err(|error| crate::fault::internal("keep a job", error))?;
    let row = sqlx::query(
        "UPDATE jobs SET state = 'waiting', percent = $1, message = $2, body = $3, steps = $4, changed = $5,
             lease_holder = '', lease_until = 0
         WHERE id = $6 AND state = 'failed' RETURNING *",
    )
    .bind(i64::from(run.percent()))
    .bind(format!("Resumed by {who}."))
    .bind(run.text()?)
    .bind(steps)
    .bind(UnixMillis::now().0)
    .bind(id.as_str())
    .fetch_one(&mut *act)
    .await?;
    let job = job_of_row(&row, true)?;
    let message = format!("The run of the plan {} was resumed", job.subject);
    say(&mut act, Said::new(control::fleet::EventKind::Job, format!("jobs/{id}"), message)).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok(job)
}
