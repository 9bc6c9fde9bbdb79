//! Jobs: what is long. Kept in the store, done by the config server that holds the lease, step by step; a step that was begun
//! twice does no harm.

use std::time::Duration;

use control::Severity;
use control::fleet::{
    EventKind, JobInfo, JobKind, JobState, ResourceId, StepInfo, StepState, Task, TaskKind, UnixMillis,
};
use sqlx::{AnyConnection, Row};

use crate::api::guard::parse;
use crate::app::App;
use crate::fault::{Answer, conflict, fault, internal, not_found};
use crate::secret::new_id;
use crate::store::{Act, Counter, Said, count, say};

/// Jobs that have not ended. More are refused.
pub const JOBS_UNDER_WAY_MAX: i64 = 10_000;
/// Jobs that are kept after they have ended; the oldest go.
pub const JOBS_KEPT: i64 = 10_000;
/// How long a config server may be silent before another goes on with its job.
pub const LEASE: Duration = Duration::from_secs(15);
/// Jobs that one config server looks at in one round.
const AT_ONCE: i64 = 256;

/// A job to make.
pub(crate) struct NewJob {
    pub(crate) kind: JobKind,
    pub(crate) subject: String,
    pub(crate) subject_id: String,
    /// What its steps need, JSON.
    pub(crate) body: String,
    pub(crate) steps: Vec<StepInfo>,
    pub(crate) created_by: String,
}

/// A step that nobody has begun.
pub(crate) fn step(code: &str, title: &str) -> StepInfo {
    StepInfo {
        code: code.to_owned(),
        title: title.to_owned(),
        state: StepState::Waiting,
        message: String::new(),
        mend: String::new(),
    }
}

/// Makes a job; one of a kind at a time for one subject.
pub(crate) async fn insert_job(act: &mut Act, new: NewJob) -> Answer<JobInfo> {
    let same: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM jobs WHERE subject_id = $1 AND kind = $2 AND state IN ('waiting', 'running')",
    )
    .bind(&new.subject_id)
    .bind(new.kind.as_str())
    .fetch_one(&mut **act)
    .await?;
    if same > 0 {
        return Err(conflict(
            format!("A job does that already: {} of {}", new.kind.as_str(), new.subject),
            "Wait for it, or cancel it.",
        ));
    }
    let under_way: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM jobs WHERE state IN ('waiting', 'running')")
            .fetch_one(&mut **act)
            .await?;
    if under_way >= JOBS_UNDER_WAY_MAX {
        let detail = format!("{under_way} jobs are under way");
        return Err(fault(control::fleet::ProblemCode::Limit, detail, "Wait until some have ended."));
    }
    let number = count(act, Counter::Job).await?;
    let now = UnixMillis::now();
    let job = JobInfo {
        id: new_id(),
        kind: new.kind,
        subject: new.subject,
        state: JobState::Waiting,
        percent: 0,
        message: "Waiting for its turn.".to_owned(),
        created_by: new.created_by,
        created: now,
        changed: now,
        steps: new.steps,
    };
    sqlx::query(
        "INSERT INTO jobs (id, number, kind, subject, subject_id, state, percent, message, body, steps, created_by, created,
             changed, lease_holder, lease_until)
         VALUES ($1, $2, $3, $4, $5, 'waiting', 0, $6, $7, $8, $9, $10, $10, '', 0)",
    )
    .bind(job.id.as_str())
    .bind(number)
    .bind(job.kind.as_str())
    .bind(&job.subject)
    .bind(new.subject_id)
    .bind(&job.message)
    .bind(new.body)
    .bind(serde_json::to_string(&job.steps).map_err(|error| internal("keep a job", error))?)
    .bind(&job.created_by)
    .bind(now.0)
    .execute(&mut **act)
    .await?;
    say(act, said(&job, "was asked for")).await?;
    Ok(job)
}

fn said(job: &JobInfo, what: &str) -> Said {
    let severity = if job.state == JobState::Failed { Severity::Trouble } else { Severity::Good };
    let message = format!("The job {} of {} {what}", job.kind.as_str(), job.subject);
    Said::new(EventKind::Job, format!("jobs/{}", job.id), message).severity(severity)
}

/// A job whose lease this config server holds.
pub(crate) struct Held {
    pub(crate) job: JobInfo,
    pub(crate) subject_id: String,
    pub(crate) body: String,
    before: (JobInfo, String),
}

impl Held {
    /// The step of that code.
    pub(crate) fn step(&mut self, code: &str) -> &mut StepInfo {
        let place = self.job.steps.iter().position(|step| step.code == code);
        let place = place.unwrap_or_else(|| {
            self.job.steps.push(step(code, code));
            self.job.steps.len() - 1
        });
        &mut self.job.steps[place]
    }

    /// A step's state and what was found.
    pub(crate) fn set(
        &mut self,
        code: &str,
        state: StepState,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) {
        let step = self.step(code);
        step.state = state;
        step.message = message.into();
        step.mend = mend.into();
    }

    pub(crate) fn fail(&mut self, message: impl Into<String>) {
        self.job.state = JobState::Failed;
        self.job.message = message.into();
        for step in &mut self.job.steps {
            if matches!(step.state, StepState::Waiting | StepState::Running) {
                step.state = StepState::Skipped;
            }
        }
    }

    pub(crate) fn done(&mut self, message: impl Into<String>) {
        self.job.state = JobState::Done;
        self.job.percent = 100;
        self.job.message = message.into();
    }
}

/// Takes the leases of jobs that nobody works on, or that are ours already.
pub(crate) async fn claim(app: &App) -> Answer<Vec<Held>> {
    let now = UnixMillis::now();
    let free: Vec<String> = sqlx::query_scalar(
        "SELECT id FROM jobs WHERE state IN ('waiting', 'running') AND (lease_until < $1 OR lease_holder = $2)
         ORDER BY number LIMIT $3",
    )
    .bind(now.0)
    .bind(app.holder.as_str())
    .bind(AT_ONCE)
    .fetch_all(&app.store.read)
    .await?;
    if free.is_empty() {
        return Ok(Vec::new());
    }
    let places: Vec<String> = (0..free.len()).map(|place| format!("${}", place + 4)).collect();
    // The conditions again: of two config servers that have read the same, the second finds nothing.
    let sql = format!(
        "UPDATE jobs SET lease_holder = $1, lease_until = $2, state = 'running'
         WHERE state IN ('waiting', 'running') AND (lease_until < $3 OR lease_holder = $1) AND id IN ({})
         RETURNING *",
        places.join(", ")
    );
    let mut act = app.store.act().await?;
    let mut query =
        sqlx::query(&sql).persistent(false).bind(app.holder.as_str()).bind(now.plus(LEASE).0).bind(now.0);
    for id in &free {
        query = query.bind(id.as_str());
    }
    let mut rows = Vec::new();
    for row in query.fetch_all(&mut *act).await? {
        rows.push((row.try_get::<i64, _>("number")?, row));
    }
    act.commit().await?;
    rows.sort_by_key(|(number, _)| *number);
    let mut held = Vec::new();
    for (_, row) in rows {
        let job = crate::view::job_of_row(&row, true)?;
        let body: String = row.try_get("body")?;
        held.push(Held {
            before: (job.clone(), body.clone()),
            job,
            subject_id: row.try_get("subject_id")?,
            body,
        });
    }
    Ok(held)
}

/// Ends the leases of this config server, which stops.
pub(crate) async fn let_go(app: &App) -> Answer<()> {
    let mut act = app.store.act().await?;
    sqlx::query("UPDATE jobs SET lease_until = 0 WHERE lease_holder = $1")
        .bind(app.holder.as_str())
        .execute(&mut *act)
        .await?;
    Ok(act.commit().await?)
}

/// Keeps what has become of a job, if its lease is still ours; with `also`, in the same act.
pub(crate) async fn keep(app: &App, act: &mut Act, held: &mut Held) -> Answer<bool> {
    if held.job == held.before.0 && held.body == held.before.1 {
        return Ok(true);
    }
    held.job.changed = UnixMillis::now();
    let job = &held.job;
    let kept = sqlx::query(
        "UPDATE jobs SET state = $1, percent = $2, message = $3, steps = $4, changed = $5, body = $6
         WHERE id = $7 AND lease_holder = $8 AND state = 'running'",
    )
    .bind(job.state.as_str())
    .bind(i64::from(job.percent))
    .bind(&job.message)
    .bind(serde_json::to_string(&job.steps).map_err(|error| internal("keep a job", error))?)
    .bind(job.changed.0)
    .bind(&held.body)
    .bind(job.id.as_str())
    .bind(app.holder.as_str())
    .execute(&mut **act)
    .await?;
    if kept.rows_affected() == 0 {
        // Cancelled, or another config server goes on with it.
        return Ok(false);
    }
    let steps_changed =
        job.steps.iter().map(|step| step.state).ne(held.before.0.steps.iter().map(|step| step.state));
    if job.state != held.before.0.state || steps_changed {
        let what = match job.state {
            JobState::Done => "is done".to_owned(),
            JobState::Failed => format!("failed: {}", job.message),
            _ => "went on".to_owned(),
        };
        say(act, said(job, &what)).await?;
    }
    held.before = (held.job.clone(), held.body.clone());
    Ok(true)
}

/// Ends a job, and what parts were to do for it.
pub(crate) async fn cancel(app: &App, id: &ResourceId, who: &str) -> Answer<()> {
    let mut act = app.store.act().await?;
    let row = sqlx::query(
        "UPDATE jobs SET state = 'cancelled', message = $1, changed = $2
         WHERE id = $3 AND state IN ('waiting', 'running') RETURNING *",
    )
    .bind(format!("Cancelled by {who}. What was done before stays."))
    .bind(UnixMillis::now().0)
    .bind(id.as_str())
    .fetch_optional(&mut *act)
    .await?;
    let Some(row) = row else {
        let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM jobs WHERE id = $1")
            .bind(id.as_str())
            .fetch_one(&mut *act)
            .await?;
        return Err(match there {
            0 => not_found("job", id),
            _ => conflict("The job has ended already", "Nothing need be done."),
        });
    };
    sqlx::query("UPDATE tasks SET state = 'failed', message = 'the job was cancelled' WHERE job_id = $1 AND state IN ('waiting', 'running')")
        .bind(id.as_str())
        .execute(&mut *act)
        .await?;
    say(&mut act, said(&crate::view::job_of_row(&row, false)?, "was cancelled")).await?;
    Ok(act.commit().await?)
}

/// What a part was asked to do, and how that goes.
pub(crate) struct Asked {
    pub(crate) state: String,
    pub(crate) message: String,
    pub(crate) result: serde_json::Value,
}

/// How the task of a job goes that is of this kind (`task` of its JSON), the newest; `None` when none was asked for.
pub(crate) async fn task_of(from: &mut AnyConnection, job: &JobInfo, kind: &str) -> Answer<Option<Asked>> {
    let rows = sqlx::query(
        "SELECT task, state, message, result FROM tasks WHERE job_id = $1 ORDER BY created DESC, id",
    )
    .bind(job.id.as_str())
    .fetch_all(from)
    .await?;
    for row in &rows {
        let task: serde_json::Value = serde_json::from_str(&row.try_get::<String, _>("task")?)
            .map_err(|error| internal("read a task", error))?;
        if task["task"] == kind {
            let result: String = row.try_get("result")?;
            return Ok(Some(Asked {
                state: row.try_get("state")?,
                message: row.try_get("message")?,
                result: serde_json::from_str(&result).unwrap_or_default(),
            }));
        }
    }
    Ok(None)
}

/// How one task goes.
pub(crate) async fn task(from: &mut AnyConnection, id: &ResourceId) -> Answer<Option<Asked>> {
    let row = sqlx::query("SELECT state, message, result FROM tasks WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(from)
        .await?;
    let asked = |row: sqlx::any::AnyRow| {
        let result: String = row.try_get("result")?;
        let result = serde_json::from_str(&result).unwrap_or_default();
        Ok(Asked { state: row.try_get("state")?, message: row.try_get("message")?, result })
    };
    row.map(asked).transpose()
}

/// Asks a part to do something.
pub(crate) async fn ask(act: &mut Act, job: &JobInfo, part: &str, kind: &TaskKind) -> Answer<ResourceId> {
    let json = serde_json::to_string(kind).map_err(|error| internal("keep a task", error))?;
    let id = new_id();
    sqlx::query(
        "INSERT INTO tasks (id, job_id, part_id, task, state, message, result, created)
         VALUES ($1, $2, $3, $4, 'waiting', '', 'null', $5)",
    )
    .bind(id.as_str())
    .bind(job.id.as_str())
    .bind(part)
    .bind(json)
    .bind(UnixMillis::now().0)
    .execute(&mut **act)
    .await?;
    Ok(id)
}

/// What a part is to do now.
pub(crate) async fn open_tasks(from: &mut AnyConnection, part: &str) -> Answer<Vec<Task>> {
    let rows = sqlx::query(
        "SELECT id, task FROM tasks WHERE part_id = $1 AND state IN ('waiting', 'running') ORDER BY created LIMIT $2",
    )
    .bind(part)
    .bind(control::fleet::TASKS_MAX as i64)
    .fetch_all(from)
    .await?;
    rows.iter()
        .map(|row| {
            let kind = serde_json::from_str(&row.try_get::<String, _>("task")?)
                .map_err(|error| internal("read a task", error))?;
            Ok(Task { id: parse(row.try_get("id")?)?, kind })
        })
        .collect()
}
