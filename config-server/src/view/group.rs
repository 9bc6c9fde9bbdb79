//! A group over all stages: where it stands, how old its newest point is, and why.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Bound;
use std::sync::Arc;

use block::{Epoch, GroupId, Ladder, UnixNanos};
use control::fleet::{
    GroupDrill, GroupFailover, GroupInfo, Overview, Page, ResourceId, RpoStage, SampleInfo, UnixMillis,
    VolumeInfo,
};
use control::{
    AgentReport, Bottleneck, ProcessGroup, ProcessServerStatus, ResyncStatus, Severity, StateCode,
    TargetGroup, TargetServerStatus,
};
use sqlx::Row;

use super::part::SILENT_AFTER;
use crate::declared::{DeclaredGroup, declared};
use crate::fault::{Answer, not_found};
use crate::reports::{Report, Served};
use crate::store::Store;

/// Of more machines than this all are asked for, which one statement does faster.
const MACHINES_ASKED_FOR_MAX: usize = 250;

/// What parts reported last.
#[derive(Default)]
struct Heard {
    /// By part.
    reports: HashMap<String, Arc<Report>>,
    /// By part: when it was last heard of, and what it could not take up.
    seen: HashMap<String, (UnixMillis, String)>,
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

pub(crate) async fn groups(store: &Store, after: &str, limit: i64) -> Answer<Page<GroupInfo>> {
    let declared = declared(store, None).await?;
    let after = (Bound::Excluded(after.to_owned()), Bound::Unbounded);
    let groups: Vec<&DeclaredGroup> =
        declared.range(after).map(|(_, group)| group).take(usize::try_from(limit).unwrap_or(0)).collect();
    let heard = Heard::of(store, &groups).await?;
    let items: Vec<GroupInfo> = groups.iter().map(|group| seen_now(group, &heard).group).collect();
    let next = (items.len() as i64 == limit).then(|| items.last().map(|last| last.id.to_string())).flatten();
    Ok(Page { items, next })
}

/// Those that need a look first, then the oldest newest point; of those whose names have this text in them, from place `from` on.
pub(crate) async fn groups_by_attention(
    store: &Store,
    name: &str,
    from: usize,
    limit: usize,
) -> Answer<Page<GroupInfo>> {
    let declared = declared(store, None).await?;
    let wanted = name.to_ascii_lowercase();
    let named = |group: &&DeclaredGroup| group.name.as_str().to_ascii_lowercase().contains(&wanted);
    let groups: Vec<&DeclaredGroup> = declared.values().filter(named).collect();
    let heard = Heard::of(store, &groups).await?;
    let mut seen: Vec<GroupInfo> = groups.iter().map(|group| seen_now(group, &heard).group).collect();
    seen.sort_by_cached_key(|group| (Reverse(group.attention()), Reverse(group.rpo_ms), group.name.clone()));
    let next = (seen.len() > from.saturating_add(limit)).then(|| (from + limit).to_string());
    Ok(Page { items: seen.into_iter().skip(from).take(limit).collect(), next })
}

pub(crate) async fn group(store: &Store, id: &GroupId) -> Answer<GroupInfo> {
    let declared = declared(store, Some(id)).await?;
    let group = declared.get(&id.to_string()).ok_or_else(|| not_found("group", id))?;
    let heard = Heard::of(store, &[group]).await?;
    Ok(seen_now(group, &heard).group)
}

/// All protected groups.
pub(crate) async fn watched(store: &Store) -> Answer<Vec<Watched>> {
    let declared = declared(store, None).await?;
    let groups: Vec<&DeclaredGroup> = declared.values().filter(|group| !group.kept).collect();
    let heard = Heard::of(store, &groups).await?;
    Ok(groups.iter().map(|group| seen_now(group, &heard)).collect())
}

impl Heard {
    /// Of the machines of these groups, and of all servers.
    async fn of(store: &Store, groups: &[&DeclaredGroup]) -> Answer<Heard> {
        let mut heard = Heard::default();
        let machines: Vec<&str> = match groups.len() {
            ..=MACHINES_ASKED_FOR_MAX => groups.iter().map(|group| group.machine.as_str()).collect(),
            _ => Vec::new(),
        };
        let places: Vec<String> = (1..=machines.len()).map(|place| format!("${place}")).collect();
        let which = match machines.is_empty() {
            true => "role = 'agent'".to_owned(),
            false => format!("id IN ({})", places.join(", ")),
        };
        let sql =
            format!("SELECT id, seen, trouble FROM parts WHERE {which} OR (role <> 'agent' AND removed = 0)");
        let mut query = sqlx::query(&sql).persistent(machines.len() <= 1);
        for machine in machines {
            query = query.bind(machine);
        }
        let mut parts = Vec::with_capacity(groups.len());
        for row in &query.fetch_all(&store.read).await? {
            let (id, seen): (String, _) = (row.try_get("id")?, UnixMillis(row.try_get("seen")?));
            heard.seen.insert(id.clone(), (seen, row.try_get("trouble")?));
            parts.push((id, seen));
        }
        heard.reports = store.reports.of(&store.read, parts.into_iter()).await?;
        Ok(heard)
    }

    fn process(&self, id: &str) -> Option<(UnixMillis, &Served<ProcessServerStatus>)> {
        match &**self.reports.get(id)? {
            Report::ProcessServer(served) => Some((self.seen.get(id)?.0, served)),
            _ => None,
        }
    }

    fn target(&self, id: &str) -> Option<(UnixMillis, &Served<TargetServerStatus>)> {
        match &**self.reports.get(id)? {
            Report::TargetServer(served) => Some((self.seen.get(id)?.0, served)),
            _ => None,
        }
    }
}

fn is_fresh(seen: UnixMillis) -> bool {
    UnixMillis::now().since(seen) <= SILENT_AFTER.as_millis() as i64
}

fn seen_now(declared: &DeclaredGroup, heard: &Heard) -> Watched {
    let DeclaredGroup { id, machine, kept, .. } = declared;
    let (id, kept) = (*id, *kept);
    let (agent_seen, trouble) =
        heard.seen.get(machine.as_str()).map_or((UnixMillis(0), ""), |(seen, trouble)| (*seen, trouble));
    let report = match heard.reports.get(machine.as_str()).map(|report| &**report) {
        Some(Report::Agent(report)) => Some(&**report),
        _ => None,
    };
    let process = heard.process(declared.process.as_str());
    let process_group = process.and_then(|(_, served)| served.group(&id));
    // Of several targets the one that is furthest counts: from it one could recover. One that has failed over is further than any.
    let targets = declared.targets.iter().filter_map(|target| {
        let (seen, served) = heard.target(target.as_str())?;
        Some((target, seen, served.group(&id)?))
    });
    let target = targets.max_by_key(|(.., group)| (group.generation, group.applied));
    let failover = target.and_then(|(target, _, group)| standing(declared, target, group));
    let target = target.map(|(_, seen, group)| (seen, group));
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
    let volumes = declared.volumes.iter().map(|volume| volume_of(volume, report, target.map(|(_, g)| g)));
    let mut warnings: Vec<String> = target.map(|(_, group)| group.warnings.clone()).unwrap_or_default();
    if !trouble.is_empty() {
        warnings.push(format!("The agent could not take up what it was told: {trouble}"));
    }
    let handed_over = report.is_some_and(|report| report.handed_over);
    if handed_over && failover.is_none() {
        warnings
            .push("Its disks are handed over: nothing can write to them until they are released.".to_owned());
    }
    if !kept && failover.as_ref().is_some_and(|standing| standing.committed) {
        warnings.push("A failover was committed at the target itself; the machine is still told to replicate, and is refused. End its protection.".to_owned());
    }
    let lag = report.map_or(0, |report| {
        report.remaining_bytes().get() + report.epoch_memory_used.get() + report.ring_used.get()
    });
    let policy = &declared.policy.policy;
    let group = GroupInfo {
        id,
        machine: machine.clone(),
        name: declared.name.clone(),
        protected: !kept,
        generation: declared.generation,
        policy: declared.policy.id.clone(),
        policy_name: declared.policy.name.clone(),
        process_server: declared.process.clone(),
        target_servers: declared.targets.clone(),
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
        handed_over,
        failover,
        reversed_by: declared.reversed_by,
        proof: target.and_then(|(_, group)| group.proof.clone()),
        drills: drills(declared, heard),
    };
    Watched {
        group,
        application_every_s: policy.application_every_s,
        application_point: target
            .and_then(|(_, group)| group.newest_application_cut_time)
            .map(UnixMillis::from),
        since: Some(declared.created),
        resync: report.and_then(|report| report.resync.clone()),
    }
}

/// The drills of a group at its target servers.
fn drills(declared: &DeclaredGroup, heard: &Heard) -> Vec<GroupDrill> {
    let mut drills = Vec::new();
    for target_server in &declared.targets {
        let Some((_, served)) = heard.target(target_server.as_str()) else { continue };
        let of_group = served.status.exports.iter();
        let of_group = of_group.filter(|export| export.group == declared.id && export.drill.is_some());
        drills.extend(
            of_group
                .map(|export| GroupDrill { target_server: target_server.clone(), export: export.clone() }),
        );
    }
    drills
}

/// Where a group stands between its source and this target; nothing when no failover has come between them.
fn standing(declared: &DeclaredGroup, target: &ResourceId, group: &TargetGroup) -> Option<GroupFailover> {
    let (failover, promoted) = (group.failover, group.promoted);
    let later = group.generation > declared.generation && failover.is_none();
    let committed = declared.committed.is_some() || later;
    (failover.is_some() || promoted.is_some() || committed).then(|| GroupFailover {
        target_server: target.clone(),
        generation: group.generation,
        failover,
        promoted,
        committed: committed && failover.is_none(),
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
        overview.groups_to_look_at += i64::from(group.attention() == Severity::Trouble);
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
