//! What is wrong, found from what is declared and reported.

use std::collections::HashMap;

use block::ByteCount;
use control::fleet::{AlertKind, AlertSettings, PartRole, UnixMillis};
use control::{ResyncStage, Severity, StateCode};
use sqlx::Row;

use super::subject;
use crate::fault::Answer;
use crate::reports::Report;
use crate::store::Store;
use crate::view;

const DAY_MS: i64 = 86_400_000;

/// Something that is wrong now.
pub(super) struct Cause {
    pub(super) kind: AlertKind,
    pub(super) severity: Severity,
    pub(super) subject: String,
    pub(super) message: String,
    pub(super) mend: String,
}

impl Cause {
    /// One alert at a time has it.
    pub(super) fn key(&self) -> String {
        format!("{} {}", self.kind.as_str(), self.subject)
    }
}

/// A time for people.
fn span(ms: i64) -> String {
    match ms / 1000 {
        seconds @ ..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// All that is wrong.
pub(super) async fn all(store: &Store, settings: &AlertSettings) -> Answer<Vec<Cause>> {
    let mut causes = of_groups(store, settings).await?;
    causes.extend(of_parts(store, settings).await?);
    Ok(causes)
}

async fn of_groups(store: &Store, settings: &AlertSettings) -> Answer<Vec<Cause>> {
    let mut causes = Vec::new();
    let unproven = unproven(store).await?;
    for watched in view::watched(store).await? {
        let (group, about) = (&watched.group, subject("groups", &watched.group.id.to_string()));
        let mut add = |kind, severity, message: String, mend: &str| {
            causes.push(Cause { kind, severity, subject: about.clone(), message, mend: mend.to_owned() });
        };
        let limit = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX / 1000).saturating_mul(1000);
        let allowed = group.rpo_ms_max;
        if let Some(age) = group.rpo_ms.filter(|age| allowed > 0 && *age > allowed) {
            let message = format!(
                "The newest recovery point of {} is {} old, more than the {} that its policy allows",
                group.name,
                span(age),
                span(allowed)
            );
            let stage = group.rpo_stages.iter().max_by_key(|stage| stage.state.severity());
            let mend = stage.map_or(group.what_to_do.clone(), |stage| {
                format!("{} {}", stage.explanation, stage.state.what_to_do())
            });
            add(AlertKind::PointAge, Severity::Trouble, message, &mend);
        }
        if settings.application_point_age_s > 0 && watched.application_every_s > 0 {
            let since = watched.application_point.or(watched.since);
            let age = since.map(|time| UnixMillis::now().since(time));
            if let Some(age) = age.filter(|age| *age > limit(settings.application_point_age_s)) {
                let message = format!(
                    "{} has had no application-consistent recovery point for {}",
                    group.name,
                    span(age)
                );
                let mend = "Look at the agent's log for what the hooks said; `seawall point now` takes one and says why it cannot.";
                add(AlertKind::ApplicationPointAge, Severity::Notice, message, mend);
            }
        }
        if group.state.severity() == Severity::Trouble {
            let message = format!("{} needs a person: {}", group.name, group.meaning);
            add(AlertKind::Trouble, Severity::Trouble, message, &group.what_to_do);
        }
        if let Some(resync) = watched.resync.as_ref().filter(|resync| resync.stage != ResyncStage::Comparing)
        {
            let message =
                format!("The disks of {} must be compared with their replicas: {}", group.name, resync.why);
            let mend = "It begins by itself in the resync window; `seawall resync` begins it now.";
            add(AlertKind::Resync, Severity::Notice, message, mend);
        }
        if let Some(why) = unproven.get(&group.id.to_string()) {
            let message = format!("{} did not come up when that was tried last: {why}", group.name);
            let mend = "Look at the job, and at proof-console in the group's directory at the target; prove an older point.";
            add(AlertKind::Proof, Severity::Trouble, message, mend);
        }
        if let Some(warning) = group.warnings.iter().find(|warning| warning.contains("space")) {
            let message = format!("{}: {warning}", group.name);
            add(
                AlertKind::Store,
                Severity::Notice,
                message,
                "Give the store more space, or keep points for a shorter time.",
            );
        }
    }
    Ok(causes)
}

/// Groups whose last boot proof has failed, with what it said first.
async fn unproven(store: &Store) -> Answer<HashMap<String, String>> {
    let rows = sqlx::query(
        "SELECT subject_id, message FROM jobs WHERE state = 'failed' AND kind = 'prove' AND number IN
             (SELECT MAX(number) FROM jobs WHERE kind = 'prove' AND state IN ('done', 'failed') GROUP BY subject_id)",
    )
    .fetch_all(&store.read)
    .await?;
    let mut unproven = HashMap::new();
    for row in rows {
        let message: String = row.try_get("message")?;
        unproven.insert(row.try_get("subject_id")?, message.lines().next().unwrap_or_default().to_owned());
    }
    Ok(unproven)
}

async fn of_parts(store: &Store, settings: &AlertSettings) -> Answer<Vec<Cause>> {
    let rows = sqlx::query(
        "SELECT id, role, name, state, silent, certificate_expires, bytes_total, bytes_free, seen
         FROM parts WHERE removed = 0 AND seen > 0",
    )
    .fetch_all(&store.read)
    .await?;
    let mut process_servers = Vec::new();
    for row in &rows {
        if row.try_get::<String, _>("role")? == PartRole::ProcessServer.as_str() {
            process_servers.push((row.try_get("id")?, UnixMillis(row.try_get("seen")?)));
        }
    }
    let caches = store.reports.of(&store.read, process_servers.into_iter()).await?;
    let mut causes = Vec::new();
    for row in &rows {
        let role: PartRole = crate::api::guard::parse(row.try_get("role")?)?;
        let (id, name): (String, String) = (row.try_get("id")?, row.try_get("name")?);
        let who = format!("The {role} {name}");
        let about = subject(crate::api::enrol::collection(role), &id);
        let mut add = |kind, severity, message: String, mend: &str| {
            causes.push(Cause { kind, severity, subject: about.clone(), message, mend: mend.to_owned() });
        };
        if row.try_get::<i64, _>("silent")? != 0 {
            let message = format!("{who} does not report");
            let mend = "Look whether it runs and reaches the config server. Replication goes on without the config server.";
            add(AlertKind::Silent, Severity::Trouble, message, mend);
        } else {
            let state = view::state_code(&row.try_get::<String, _>("state")?);
            // An agent's trouble is its group's.
            if role != PartRole::Agent && state.severity() == Severity::Trouble {
                add(
                    AlertKind::Trouble,
                    Severity::Trouble,
                    format!("{who} needs a person: {}", state.meaning()),
                    state.what_to_do(),
                );
            } else if role == PartRole::Agent && state == StateCode::Misconfigured {
                add(
                    AlertKind::Trouble,
                    Severity::Trouble,
                    format!("{who}: {}", state.meaning()),
                    state.what_to_do(),
                );
            }
        }
        let left = UnixMillis(row.try_get("certificate_expires")?).since(UnixMillis::now());
        let known = row.try_get::<i64, _>("certificate_expires")? > 0;
        if known && left < i64::from(settings.certificate_days) * DAY_MS {
            let message = match left {
                ..=0 => format!("The certificate of {role} {name} has ended"),
                left => format!("The certificate of {role} {name} ends in {}", span(left)),
            };
            let mend =
                "Look at its log for why it was not renewed; enrol it anew if the certificate has ended.";
            add(AlertKind::Certificate, Severity::Trouble, message, mend);
        }
        let (total, free): (i64, i64) = (row.try_get("bytes_total")?, row.try_get("bytes_free")?);
        if role == PartRole::TargetServer
            && total > 0
            && free * 100 < total * i64::from(settings.store_free_percent)
        {
            let bytes = |bytes: i64| ByteCount(u64::try_from(bytes).unwrap_or_default());
            let message = format!("The store of {name} has {} of {} free", bytes(free), bytes(total));
            add(
                AlertKind::Store,
                Severity::Trouble,
                message,
                "Give it more space, or keep points for a shorter time.",
            );
        }
        if let Some(Report::ProcessServer(served)) = caches.get(&id).map(|report| &**report) {
            let (used, limit) = (served.status.cache_used.0, served.status.cache_limit.0);
            if limit > 0
                && u128::from(used) * 100 > u128::from(limit) * u128::from(settings.cache_used_percent)
            {
                let message =
                    format!("The cache of {name} holds {} of {}", ByteCount(used), ByteCount(limit));
                let mend = "Look whether its targets are reached and fast enough; when it is full, changes wait on the machines.";
                add(AlertKind::Cache, Severity::Trouble, message, mend);
            }
        }
    }
    Ok(causes)
}
