//! A group over all stages: where it stands, how old its newest point is, and why.

use std::collections::HashMap;
use std::sync::Arc;

use block::{Epoch, GroupId, Ladder, UnixNanos};
use control::fleet::{
    GroupInfo, Name, Overview, Page, Policy, ResourceId, RpoStage, SampleInfo, UnixMillis, VolumeInfo,
};
use control::{
    AgentReport, Bottleneck, ProcessGroup, ProcessServerStatus, ResyncStatus, Severity, StateCode,
    TargetGroup, TargetServerStatus,
};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::part::SILENT_AFTER;
use super::policy::policy_of_text;
use crate::api::guard::parse;
use crate::fault::{Answer, internal, not_found};
use crate::reports::{Report, Served};
use crate::store::Store;

/// What is kept beside groups, and what parts reported: each read once for all groups.
#[derive(Default)]
struct Around {
    /// By part.
    reports: HashMap<String, Arc<Report>>,
    /// By server: when it was last heard of.
    seen: HashMap<String, UnixMillis>,
    policies: HashMap<String, (Name, Policy)>,
    /// By group.
    target_ids: HashMap<String, Vec<String>>,
    /// By group: name and device.
    volumes: HashMap<String, Vec<(String, String)>>,
}

/// A group with what else alerts look at.
pub(crate) struct Watched {
    pub(crate) group: GroupInfo,
    /// As its policy says; 0 for none.
    pub(crate) application_every_s: u64,
    /// When its newest application-consistent point was cut.
    pub(crate) application_point: Option<UnixMillis>,
    /// Since when it is protected.
    pub(crate) since: Option<UnixMillis>,
    pub(crate) resync: Option<ResyncStatus>,
}

const GROUP: &str = "SELECT g.id, g.machine_id, g.generation, g.policy_id, g.process_id, g.state AS declared,
        m.name, m.seen, m.trouble, g.created
    FROM protection_groups g JOIN parts m ON m.id = g.machine_id
    WHERE g.state <> 'removed'";

pub(crate) async fn groups(store: &Store, after: &str, limit: i64) -> Answer<Page<GroupInfo>> {
    let rows = sqlx::query(&format!("{GROUP} AND g.id > $1 ORDER BY g.id LIMIT $2"))
        .bind(after)
        .bind(limit)
        .fetch_all(&store.read)
        .await?;
    let around = Around::load(store, &rows, None).await?;
    let items: Vec<GroupInfo> =
        rows.iter().map(|row| Ok(group_of_row(row, &around)?.group)).collect::<Answer<_>>()?;
    let next = (items.len() as i64 == limit).then(|| items.last().map(|last| last.id.to_string())).flatten();
    Ok(Page { items, next })
}

pub(crate) async fn group(store: &Store, id: &GroupId) -> Answer<GroupInfo> {
    let row = sqlx::query(&format!("{GROUP} AND g.id = $1"))
        .bind(id.to_string())
        .fetch_optional(&store.read)
        .await?
        .ok_or_else(|| not_found("group", id))?;
    let around = Around::load(store, std::slice::from_ref(&row), Some(id)).await?;
    Ok(group_of_row(&row, &around)?.group)
}

/// All protected groups.
pub(crate) async fn watched(store: &Store) -> Answer<Vec<Watched>> {
    let rows = sqlx::query(&format!("{GROUP} AND g.state = 'protected' ORDER BY g.id"))
        .fetch_all(&store.read)
        .await?;
    let around = Around::load(store, &rows, None).await?;
    rows.iter().map(|row| group_of_row(row, &around)).collect()
}

impl Around {
    /// Of these groups: one, or as many as all.
    async fn load(store: &Store, rows: &[AnyRow], group: Option<&GroupId>) -> Answer<Around> {
        let mut around = Around::default();
        let mut parts = Vec::with_capacity(rows.len());
        for row in rows {
            parts.push((row.try_get("machine_id")?, UnixMillis(row.try_get("seen")?)));
        }
        let servers = sqlx::query("SELECT id, seen FROM parts WHERE role <> 'agent' AND removed = 0")
            .fetch_all(&store.read)
            .await?;
        for row in &servers {
            let (id, seen): (String, _) = (row.try_get("id")?, UnixMillis(row.try_get("seen")?));
            around.seen.insert(id.clone(), seen);
            parts.push((id, seen));
        }
        around.reports = store.reports.of(&store.read, parts.into_iter()).await?;
        let policies = sqlx::query("SELECT id, name, policy FROM policies").fetch_all(&store.read).await?;
        for row in &policies {
            let policy = policy_of_text(&row.try_get::<String, _>("policy")?)?;
            around.policies.insert(row.try_get("id")?, (parse(row.try_get("name")?)?, policy));
        }
        let only = group.map(|id| format!("WHERE group_id = '{id}'")).unwrap_or_default();
        let sql = format!("SELECT group_id, target_id FROM group_targets {only} ORDER BY target_id");
        for row in &sqlx::query(&sql).fetch_all(&store.read).await? {
            around.target_ids.entry(row.try_get("group_id")?).or_default().push(row.try_get("target_id")?);
        }
        let sql = format!("SELECT group_id, name, device FROM volumes {only} ORDER BY place");
        for row in &sqlx::query(&sql).fetch_all(&store.read).await? {
            let volume = (row.try_get("name")?, row.try_get("device")?);
            around.volumes.entry(row.try_get("group_id")?).or_default().push(volume);
        }
        Ok(around)
    }
}

impl Around {
    fn process(&self, id: &str) -> Option<(UnixMillis, &Served<ProcessServerStatus>)> {
        match &**self.reports.get(id)? {
            Report::ProcessServer(served) => Some((*self.seen.get(id)?, served)),
            _ => None,
        }
    }

    fn target(&self, id: &str) -> Option<(UnixMillis, &Served<TargetServerStatus>)> {
        match &**self.reports.get(id)? {
            Report::TargetServer(served) => Some((*self.seen.get(id)?, served)),
            _ => None,
        }
    }
}

fn is_fresh(seen: UnixMillis) -> bool {
    UnixMillis::now().since(seen) <= SILENT_AFTER.as_millis() as i64
}

fn group_of_row(row: &AnyRow, around: &Around) -> Answer<Watched> {
    let named: String = row.try_get("id")?;
    let target_ids = around.target_ids.get(&named).map_or(&[][..], Vec::as_slice);
    let volumes = around.volumes.get(&named).map_or(&[][..], Vec::as_slice);
    let id: GroupId = parse(named)?;
    let agent_seen = UnixMillis(row.try_get("seen")?);
    let machine: String = row.try_get("machine_id")?;
    let report = match around.reports.get(&machine).map(|report| &**report) {
        Some(Report::Agent(report)) => Some(&**report),
        _ => None,
    };
    let process_id: String = row.try_get("process_id")?;
    let process = around.process(&process_id);
    let process_group = process.and_then(|(_, served)| served.group(&id));
    // Of several targets the one that is furthest counts: from it one could recover.
    let targets = target_ids.iter().filter_map(|target| {
        let (seen, served) = around.target(target)?;
        Some((seen, served.group(&id)?))
    });
    let target = targets.max_by_key(|(_, group)| group.applied);
    let kept = row.try_get::<String, _>("declared")? == "kept";
    let stages = stages((agent_seen, report, kept), (process.map(|(seen, _)| seen), process_group), target);
    let state = stages
        .iter()
        .map(|stage| stage.state)
        .max_by_key(|state| (state.severity(), *state))
        .unwrap_or_default();
    let rpo = target.and_then(|(_, group)| group.newest_point.as_ref()).map(|point| {
        let age = UnixNanos::now().since(point.cut_time);
        i64::try_from(age.as_millis()).unwrap_or(i64::MAX)
    });
    let volumes = volumes.iter().map(|volume| volume_of(volume, report, target.map(|(_, g)| g)));
    let mut warnings: Vec<String> = target.map(|(_, group)| group.warnings.clone()).unwrap_or_default();
    let trouble: String = row.try_get("trouble")?;
    if !trouble.is_empty() {
        warnings.push(format!("The agent could not take up what it was told: {trouble}"));
    }
    let lag = report.map_or(0, |report| {
        report.remaining_bytes().get() + report.epoch_memory_used.get() + report.ring_used.get()
    });
    let policy_id: String = row.try_get("policy_id")?;
    let (policy_name, policy) =
        around.policies.get(&policy_id).ok_or_else(|| internal("find a group's policy", &policy_id))?;
    let group = GroupInfo {
        id,
        machine: parse(machine)?,
        name: parse(row.try_get("name")?)?,
        protected: !kept,
        generation: block::Generation(
            u64::try_from(row.try_get::<i64, _>("generation")?).unwrap_or_default(),
        ),
        policy: parse(policy_id)?,
        policy_name: policy_name.clone(),
        process_server: parse(process_id)?,
        target_servers: target_ids.iter().cloned().map(parse::<ResourceId>).collect::<Answer<_>>()?,
        volumes: volumes.collect(),
        state,
        meaning: state.meaning().to_owned(),
        what_to_do: state.what_to_do().to_owned(),
        severity: state.severity(),
        ladder: ladder(report, process_group, target.map(|(_, group)| group)),
        rpo_ms: rpo,
        rpo_ms_max: policy.rpo_s_max.saturating_mul(1000) as i64,
        rpo_stages: stages,
        bottleneck: process_group.and_then(Bottleneck::of),
        newest_point: target.and_then(|(_, group)| group.newest_point.clone()),
        oldest_point: target.and_then(|(_, group)| group.oldest_point.clone()),
        points: target.map_or(0, |(_, group)| group.points),
        churn_bytes_per_s: report.map_or(0.0, |report| report.churn_bytes_per_s),
        sent_bytes_per_s: report.map_or(0.0, |report| report.sent_bytes_per_s),
        lag_bytes: lag + process_group.map_or(0, |group| group.cached_bytes.get()),
        warnings,
    };
    Ok(Watched {
        group,
        application_every_s: policy.application_every_s,
        application_point: target
            .and_then(|(_, group)| group.newest_application_cut_time)
            .map(UnixMillis::from),
        since: Some(UnixMillis(row.try_get("created")?)),
        resync: report.and_then(|report| report.resync.clone()),
    })
}

fn volume_of(
    (name, device): &(String, String),
    report: Option<&AgentReport>,
    target: Option<&TargetGroup>,
) -> VolumeInfo {
    let name = name.clone();
    let reported = report.and_then(|report| report.volumes.iter().find(|volume| volume.volume.name == name));
    let replica = target.and_then(|group| group.volumes.iter().find(|volume| volume.name == name));
    let bytes = reported.map(|volume| volume.volume.size).or(replica.map(|volume| volume.size));
    VolumeInfo {
        device: device.clone(),
        bytes: bytes.map_or(0, |bytes| bytes.get()),
        mode: reported.map(|volume| volume.mode),
        dirty_bytes: reported
            .map_or(0, |volume| volume.dirty_bytes.saturating_add(volume.draining_bytes).get()),
        name,
    }
}

/// Each stage spoke at another moment. What a later stage has, the earlier ones must have had.
fn ladder(
    report: Option<&AgentReport>,
    process: Option<&ProcessGroup>,
    target: Option<&TargetGroup>,
) -> Ladder {
    let of_report = |position: fn(&AgentReport) -> Epoch| report.map_or(Epoch::NONE, position);
    let applied = target.map_or(Epoch::NONE, |group| group.applied);
    let cached = process.map_or(Epoch::NONE, |group| group.cached).max(applied);
    let sealed = of_report(|report| report.sealed).max(cached);
    let captured = of_report(|report| report.captured).max(sealed);
    let oldest_kept =
        target.and_then(|group| group.oldest_point.as_ref()).map_or(Epoch::NONE, |point| point.epoch);
    let ladder = Ladder { captured, sealed, cached, applied, oldest_kept };
    ladder.checked().unwrap_or(Ladder { oldest_kept: Epoch::NONE, ..ladder })
}

/// Where the age of the newest point comes from. The stages' parts add up to it, as far as each is known.
fn stages(
    (agent_seen, report, kept): (UnixMillis, Option<&AgentReport>, bool),
    (process_seen, process): (Option<UnixMillis>, Option<&ProcessGroup>),
    target: Option<(UnixMillis, &TargetGroup)>,
) -> Vec<RpoStage> {
    let stage =
        |stage: &str, ms: Option<i64>, explanation: String, state: StateCode, error: Option<String>| {
            RpoStage { stage: stage.to_owned(), ms, explanation, state, last_error: error }
        };
    let between = |later: UnixNanos, earlier: UnixNanos| {
        i64::try_from(later.since(earlier).as_millis()).unwrap_or(i64::MAX)
    };
    let now = UnixNanos::now();
    let applied_cut = target.map(|(_, group)| group.applied_cut_time).filter(|time| time.0 > 0);
    let sealed_cut = report.map(|report| report.sealed_cut_time).filter(|time| time.0 > 0);
    let mut stages = Vec::new();
    let fresh_agent = report.filter(|_| is_fresh(agent_seen));
    stages.push(match (kept, fresh_agent) {
        (true, _) => stage(
            "capture",
            None,
            "The machine is not protected any more; its recovery points are kept.".to_owned(),
            StateCode::Replicating,
            None,
        ),
        (false, Some(report)) => stage(
            "capture",
            sealed_cut.map(|cut| between(now, cut)),
            match report.remaining_bytes().get() {
                0 => "Writes since the last cut; the next cut ends the epoch.".to_owned(),
                bytes => format!("{} still to be read from the disks.", block::ByteCount(bytes)),
            },
            report.state,
            report.last_error.clone(),
        ),
        (false, None) => stage(
            "capture",
            None,
            "The agent has not reported; whether it captures is not known.".to_owned(),
            StateCode::Unknown,
            None,
        ),
    });
    let way = sealed_cut.zip(applied_cut).map(|(sealed, applied)| between(sealed, applied));
    let process_fresh = process.filter(|_| process_seen.is_some_and(is_fresh));
    stages.push(match process_fresh {
        Some(group) => {
            let backlog = group.targets.iter().map(|link| link.backlog_bytes.get()).max().unwrap_or(0);
            let link = group.targets.iter().max_by_key(|link| link.state.severity());
            let state = link.map_or(group.state, |link| link.state);
            let worst = if state.severity() > group.state.severity() { state } else { group.state };
            let explanation = match backlog {
                0 => "Sent, cached and forwarded.".to_owned(),
                bytes => format!("{} cached, on their way to the target.", block::ByteCount(bytes)),
            };
            let error = group.last_error.clone().or_else(|| link.and_then(|link| link.last_error.clone()));
            stage("send", way, explanation, if kept { StateCode::Replicating } else { worst }, error)
        }
        None => stage(
            "send",
            way,
            "The process server has not reported on the group.".to_owned(),
            if kept { StateCode::Replicating } else { StateCode::Unknown },
            None,
        ),
    });
    stages.push(match target.filter(|(seen, _)| is_fresh(*seen)) {
        Some((_, group)) => {
            let behind = group.newest_point.as_ref().zip(applied_cut);
            let ms = behind.map(|(point, applied)| between(applied, point.cut_time));
            let explanation = match &group.newest_point {
                None => "Applied; there is no recovery point yet.".to_owned(),
                Some(point) => format!("Applied; epoch {} is the newest recovery point.", point.epoch),
            };
            let waiting = kept && group.state == StateCode::WaitingForAgent;
            let state = if waiting { StateCode::Replicating } else { group.state };
            stage("apply", ms, explanation, state, group.last_error.clone())
        }
        None => stage(
            "apply",
            None,
            "No target server has reported on the group.".to_owned(),
            StateCode::Unknown,
            None,
        ),
    });
    stages
}

pub(crate) async fn overview(store: &Store) -> Answer<Overview> {
    let count =
        async |sql: &str| -> Answer<i64> { Ok(sqlx::query_scalar(sql).fetch_one(&store.read).await?) };
    let mut overview = Overview {
        time: UnixMillis::now(),
        machines: count("SELECT COUNT(*) FROM parts WHERE role = 'agent' AND removed = 0").await?,
        silent_parts: count("SELECT COUNT(*) FROM parts WHERE removed = 0 AND silent = 1").await?,
        jobs: count("SELECT COUNT(*) FROM jobs WHERE state IN ('waiting', 'running')").await?,
        approvals: count("SELECT COUNT(*) FROM approvals WHERE state = 'waiting'").await?,
        ..Overview::default()
    };
    for Watched { group, .. } in watched(store).await? {
        overview.groups += 1;
        overview.groups_in_trouble += i64::from(group.severity == Severity::Trouble);
        overview.groups_recoverable += i64::from(group.newest_point.is_some());
        overview.worst_rpo_ms = overview.worst_rpo_ms.max(group.rpo_ms);
    }
    Ok(overview)
}

/// Figures of a group between two times, the older first.
pub(crate) async fn samples(
    store: &Store,
    id: &GroupId,
    step_s: i64,
    from: UnixMillis,
    to: UnixMillis,
    limit: i64,
) -> Answer<Vec<SampleInfo>> {
    let slot = |time: UnixMillis| time.0.div_euclid(step_s * 1000);
    let rows = sqlx::query(
        "SELECT slot, rpo, churn, sent, dirty, unsent FROM samples
         WHERE group_id = $1 AND step = $2 AND slot >= $3 AND slot <= $4 ORDER BY slot LIMIT $5",
    )
    .bind(id.to_string())
    .bind(step_s)
    .bind(slot(from))
    .bind(slot(to))
    .bind(limit)
    .fetch_all(&store.read)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(SampleInfo {
                time: UnixMillis(row.try_get::<i64, _>("slot")? * step_s * 1000),
                rpo_ms: row.try_get("rpo")?,
                churn_bytes_per_s: row.try_get("churn")?,
                sent_bytes_per_s: row.try_get("sent")?,
                dirty_bytes: row.try_get("dirty")?,
                unsent_bytes: row.try_get("unsent")?,
            })
        })
        .collect()
}
