//! Check-ins: what parts report and are told. Those that come within a moment share one transaction, so that thousands of
//! parts cost few syncs; each is answered when it is durable.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use control::fleet::{
    CheckIn, CheckInReply, EventKind, POINTS_SHOWN_MAX, PartReport, PartRole, ProblemCode, TaskState,
    UnixMillis,
};
use parking_lot::Mutex;
use sqlx::Row;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::api::enrol::{collection, revoked};
use crate::app::App;
use crate::desired::desired;
use crate::fault::{Answer, fault, internal, invalid};
use crate::job::open_tasks;
use crate::sample::{Samples, Slots};
use crate::store::{Act, Counter, Said, count, say};
use crate::view;

/// How often parts report, in milliseconds.
pub const CHECK_IN_EVERY_MS: u64 = 5_000;
/// How soon a part comes back that was told to do something, in milliseconds: somebody waits for it.
pub const CHECK_IN_SOON_MS: u64 = 1_000;
/// How soon a part comes back that was let wait, in milliseconds.
pub const CHECK_IN_AGAIN_MS: u64 = 50;
/// Check-ins of one transaction.
const BATCH_MAX: usize = 256;
/// Check-ins that wait. Past it parts are told to come again.
const WAITING_MAX: usize = 4096;
/// How long others are waited for.
const BATCH_WAIT: Duration = Duration::from_millis(20);
/// The longest message of a task, in bytes.
const MESSAGE_BYTES_MAX: usize = 2000;
/// The longest result of a task, in bytes of JSON.
const RESULT_BYTES_MAX: usize = 64 * 1024;

/// A check-in on its way.
struct Arrived {
    part: String,
    role: PartRole,
    name: String,
    said: CheckIn,
    /// What it reported, as it is kept; made before others wait for it.
    report: String,
    /// A machine's disks, as they are kept; empty when they are as they were.
    disks: String,
    answer: oneshot::Sender<Answer<()>>,
}

/// Where check-ins go.
#[derive(Clone)]
pub(crate) struct CheckIns {
    arrived: mpsc::Sender<Arrived>,
}

/// What is derived from the store again and again: good for one version of what is declared.
#[derive(Default)]
pub(crate) struct Digests {
    known: Mutex<(i64, HashMap<String, String>)>,
}

impl Digests {
    fn get(&self, version: i64, part: &str) -> Option<String> {
        let known = self.known.lock();
        (known.0 == version).then(|| known.1.get(part).cloned()).flatten()
    }

    fn put(&self, version: i64, part: &str, digest: &str) {
        let mut known = self.known.lock();
        if known.0 < version {
            *known = (version, HashMap::new());
        }
        if known.0 == version {
            known.1.insert(part.to_owned(), digest.to_owned());
        }
    }
}

/// The queue, to be given to [`run`].
pub(crate) struct Queue(mpsc::Receiver<Arrived>);

pub(crate) fn queue() -> (CheckIns, Queue) {
    let (arrived, waiting) = mpsc::channel(WAITING_MAX);
    (CheckIns { arrived }, Queue(waiting))
}

/// Takes one check-in, and answers it.
pub(crate) async fn check_in(
    app: &Arc<App>,
    (part, role, name): (String, PartRole, String),
    mut said: CheckIn,
) -> Answer<CheckInReply> {
    sensible(role, &mut said)?;
    let (digest, revoked_version, patient) = (said.digest.clone(), said.revoked_version, said.patient);
    let (answer, kept) = oneshot::channel();
    let json = |kept: serde_json::Result<String>| kept.map_err(|error| internal("keep a report", error));
    let report = said.report.as_ref().map(serde_json::to_string).transpose();
    let disks = said.disks.as_ref().map(serde_json::to_string).transpose();
    let (report, disks) =
        (json(report.map(Option::unwrap_or_default))?, json(disks.map(Option::unwrap_or_default))?);
    // PostgreSQL has no texts with it.
    let disks = disks.replace("\\u0000", "?");
    let arrived = Arrived { part: part.clone(), role, name, said, report, disks, answer };
    app.check_ins.arrived.try_send(arrived).map_err(|_| {
        fault(
            ProblemCode::Unavailable,
            "More parts report than the config server can take",
            "Come again later.",
        )
        .retry_after(CHECK_IN_EVERY_MS / 1000)
    })?;
    kept.await.map_err(|error| internal("keep a report", error))??;
    let until = Instant::now() + Duration::from_millis(CHECK_IN_EVERY_MS);
    let mut stopping = app.stopping.clone();
    loop {
        // Before it is looked (else what comes between would be heard of only at the end).
        let mut woken = pin!(app.tasks_wake.notified());
        woken.as_mut().enable();
        let mut reply = reply(app, &part, role, &digest, revoked_version).await?;
        if !patient || reply.interval_ms < CHECK_IN_EVERY_MS || reply.revoked.is_some() {
            return Ok(reply);
        }
        // It has waited here.
        reply.interval_ms = CHECK_IN_AGAIN_MS;
        tokio::select! {
            () = woken => {}
            () = tokio::time::sleep_until(until) => return Ok(reply),
            _ = stopping.wait_for(|stopping| *stopping) => return Ok(reply),
        }
    }
}

fn sensible(role: PartRole, said: &mut CheckIn) -> Answer<()> {
    let fits = match &said.report {
        None => true,
        Some(PartReport::Agent(_)) => role == PartRole::Agent,
        Some(PartReport::ProcessServer(_)) => role == PartRole::ProcessServer,
        Some(PartReport::TargetServer(_)) => role == PartRole::TargetServer,
    };
    if !fits {
        return Err(invalid(format!("A {role} reported as something else")));
    }
    if let Some(excess) = said.excess() {
        return Err(invalid(excess));
    }
    let texts = [
        ("version", Some(&said.version)),
        ("address", said.address.as_ref()),
        ("sealing_key", said.sealing_key.as_ref()),
        ("digest", Some(&said.digest)),
        ("trouble", said.trouble.as_ref()),
    ];
    if let Some((name, _)) = texts.iter().find(|(_, text)| text.is_some_and(|text| text.contains('\0'))) {
        return Err(invalid(format!("{name} has a NUL")));
    }
    if !said.points.is_empty() && role != PartRole::TargetServer {
        return Err(invalid(format!("A {role} told recovery points; only targets have them")));
    }
    if said.points.iter().any(|list| list.points.len() > POINTS_SHOWN_MAX) {
        return Err(invalid(format!("More than {POINTS_SHOWN_MAX} recovery points of a group were told")));
    }
    let long = |update: &&control::fleet::TaskUpdate| {
        update.message.len() > MESSAGE_BYTES_MAX || update.result.to_string().len() > RESULT_BYTES_MAX
    };
    if let Some(update) =
        said.tasks.iter().find(|update| !update.result.is_object() && !update.result.is_null())
    {
        return Err(invalid(format!("The result of task {} is neither an object nor null", update.id)));
    }
    match said.tasks.iter().find(long) {
        Some(update) => Err(invalid(format!("The result of task {} is too long", update.id))),
        None => Ok(()),
    }
}

async fn reply(
    app: &Arc<App>,
    part: &str,
    role: PartRole,
    has: &str,
    revoked_version: i64,
) -> Answer<CheckInReply> {
    let mut from = app.store.read.acquire().await?;
    let rows = sqlx::query("SELECT name, value FROM counters WHERE name IN ('declared', 'revoked')")
        .fetch_all(&mut *from)
        .await?;
    let (mut declared, mut revocations) = (0, 0);
    for row in &rows {
        match row.try_get::<String, _>("name")?.as_str() {
            "declared" => declared = row.try_get("value")?,
            _ => revocations = row.try_get("value")?,
        }
    }
    let mut reply = CheckInReply {
        time: UnixMillis::now(),
        interval_ms: CHECK_IN_EVERY_MS,
        tasks: open_tasks(&mut from, part).await?,
        ..CheckInReply::default()
    };
    match app.digests.get(declared, part) {
        Some(digest) if digest == has => reply.digest = digest,
        _ => {
            let (state, digest) = desired(&mut from, part, role).await?;
            app.digests.put(declared, part, &digest);
            reply.desired = (digest != has).then_some(state);
            reply.digest = digest;
        }
    }
    let mut wanted_soon = false;
    if role == PartRole::TargetServer {
        (reply.points_of, wanted_soon) = view::points_wanted(&mut from, part).await?;
    }
    drop(from);
    if wanted_soon || reply.desired.is_some() || !reply.tasks.is_empty() {
        reply.interval_ms = CHECK_IN_SOON_MS;
    }
    if revoked_version != revocations {
        reply.revoked = Some(revoked(app).await?);
    }
    Ok(reply)
}

/// Keeps check-ins until the config server stops.
pub(crate) async fn run(app: Arc<App>, mut queue: Queue) {
    let mut slots = Slots::new();
    while let Some(first) = queue.0.recv().await {
        tokio::time::sleep(BATCH_WAIT).await;
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX {
            match queue.0.try_recv() {
                Ok(next) => batch.push(next),
                Err(_) => break,
            }
        }
        let now = UnixMillis::now();
        let kept = keep_all(&app, &batch, now, &mut slots).await;
        if batch.iter().any(|arrived| !arrived.said.tasks.is_empty()) {
            app.jobs_wake.notify_one();
        }
        for arrived in batch {
            if kept.is_ok() {
                app.store.reports.put(arrived.part, now, arrived.said.report);
            }
            // Whoever does not wait any more comes again.
            let _ = arrived.answer.send(kept.clone());
        }
    }
}

async fn keep_all(app: &App, batch: &[Arrived], now: UnixMillis, slots: &mut Slots) -> Answer<()> {
    let mut act = app.store.act().await?;
    let places: Vec<String> = (1..=batch.len()).map(|place| format!("${place}")).collect();
    let sql =
        format!("SELECT id, state, silent, seen, group_id, address FROM parts WHERE id IN ({})", places.join(", "));
    // As many texts as there are lengths of batches are not worth being prepared for ever.
    let mut query = sqlx::query(&sql).persistent(false);
    for arrived in batch {
        query = query.bind(arrived.part.as_str());
    }
    let rows = query.fetch_all(&mut *act).await?;
    let mut before = HashMap::new();
    for row in &rows {
        let was = Was {
            state: row.try_get("state")?,
            silent: row.try_get::<i64, _>("silent")? != 0,
            first: row.try_get::<i64, _>("seen")? == 0,
            group: row.try_get("group_id")?,
            address: row.try_get("address")?,
        };
        before.insert(row.try_get::<String, _>("id")?, was);
    }
    let mut samples = Samples::new(slots, now);
    for arrived in batch {
        let was = before.get(&arrived.part);
        keep_one(&mut act, arrived, now, was).await?;
        let group = was.map(|was| was.group.as_str());
        samples.take(&arrived.part, group, arrived.said.report.as_ref());
    }
    let taken = samples.keep(&mut act).await?;
    act.commit().await?;
    // Only now, so that what was not kept is tried again.
    slots.extend(taken);
    Ok(())
}

/// How a part was before its check-in.
struct Was {
    state: String,
    silent: bool,
    first: bool,
    /// An agent's group.
    group: String,
    address: String,
}

async fn keep_one(act: &mut Act, arrived: &Arrived, now: UnixMillis, was: Option<&Was>) -> Answer<()> {
    let said = &arrived.said;
    let state = said.report.as_ref().map(PartReport::state);
    let code = match (&said.trouble, state) {
        (Some(_), _) => control::StateCode::Misconfigured.code(),
        (None, Some(state)) => state.code(),
        (None, None) => control::StateCode::Idle.code(),
    };
    let trouble = said.trouble.clone().or_else(|| said.report.as_ref()?.last_error().map(str::to_owned));
    let capacity = said.capacity;
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    sqlx::query(
        "UPDATE parts SET version = $1, seen = $2, silent = 0, clock_ahead = $3, state = $4, trouble = $5, digest = $6,
             report = $7, address = $8, sealing_key = $9, bytes_total = $10, bytes_free = $11, certificate_expires = $12,
             disks = CASE WHEN $13 = '' THEN disks ELSE $13 END
         WHERE id = $14",
    )
    .bind(&said.version)
    .bind(now.0)
    .bind(said.time.since(now))
    .bind(code)
    .bind(trouble.unwrap_or_default().replace('\0', "?"))
    .bind(&said.digest)
    .bind(&arrived.report)
    .bind(said.address.clone().unwrap_or_default())
    .bind(said.sealing_key.clone().unwrap_or_default())
    .bind(capacity.map_or(0, |capacity| number(capacity.bytes_total)))
    .bind(capacity.map_or(0, |capacity| number(capacity.bytes_free)))
    .bind(said.certificate_expires.0)
    .bind(&arrived.disks)
    .bind(&arrived.part)
    .execute(&mut **act)
    .await?;
    if let Some(guests) = &said.guests {
        let json =
            serde_json::to_string(guests).map_err(|error| internal("keep a machine's guests", error))?;
        sqlx::query("UPDATE parts SET guests = $1 WHERE id = $2 AND guests <> $1")
            .bind(json.replace("\\u0000", "?"))
            .bind(&arrived.part)
            .execute(&mut **act)
            .await?;
    }
    for told in &said.points {
        view::keep_points(act, &arrived.part, told).await?;
    }
    for update in &said.tasks {
        let state = match update.state {
            TaskState::Running => "running",
            TaskState::Done => "done",
            TaskState::Failed => "failed",
        };
        let result = update.result.to_string();
        // One that has ended stays ended, and parts speak of their own tasks only.
        sqlx::query(
            "UPDATE tasks SET state = $1, message = $2, result = $3
             WHERE id = $4 AND part_id = $5 AND state IN ('waiting', 'running')",
        )
        .bind(state)
        .bind(update.message.replace('\0', "?"))
        .bind(result.replace("\\u0000", "?"))
        .bind(update.id.as_str())
        .bind(&arrived.part)
        .execute(&mut **act)
        .await?;
    }
    let Some(was) = was else { return Ok(()) };
    if said.address.as_ref().is_some_and(|address| *address != was.address) {
        // Others are told of it with what they are to do, which is made anew only when something was declared.
        count(act, Counter::Declared).await?;
    }
    let subject = format!("{}/{}", collection(arrived.role), arrived.part);
    let (role, name) = (arrived.role, &arrived.name);
    if was.first {
        let said = Said::new(
            EventKind::State,
            subject.clone(),
            format!("The {role} {name} reports for the first time"),
        );
        say(act, said).await?;
    } else if was.silent {
        say(act, Said::new(EventKind::State, subject.clone(), format!("The {role} {name} reports again")))
            .await?;
    }
    if was.state != code {
        let severity = state.unwrap_or_default().severity();
        let message = format!("The {role} {name} is {code}, was {}", was.state);
        say(act, Said::new(EventKind::State, subject, message).severity(severity)).await?;
    }
    Ok(())
}

/// Says which parts have fallen silent; of several config servers one says it.
pub(crate) async fn note_silence(app: &App) -> Answer<()> {
    let since = UnixMillis::now().0 - view::SILENT_AFTER.as_millis() as i64;
    let mut act = app.store.act().await?;
    let rows = sqlx::query(
        "UPDATE parts SET silent = 1 WHERE silent = 0 AND seen > 0 AND seen < $1 AND removed = 0 RETURNING id, role, name",
    )
    .bind(since)
    .fetch_all(&mut *act)
    .await?;
    for row in &rows {
        let role: PartRole = crate::api::guard::parse(row.try_get("role")?)?;
        let (id, name): (String, String) = (row.try_get("id")?, row.try_get("name")?);
        let message = format!("The {role} {name} has not reported for {} s", view::SILENT_AFTER.as_secs());
        let said = Said::new(EventKind::State, format!("{}/{id}", collection(role)), message);
        say(&mut act, said.severity(control::Severity::Notice)).await?;
    }
    Ok(act.commit().await?)
}
