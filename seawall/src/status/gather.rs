//! One picture out of what the parts say, each at its own moment.

use std::collections::BTreeMap;

use block::{ByteCount, Epoch, Generation, GroupId, Ladder, UnixNanos};
use control::{
    AgentReport, Bottleneck, CaptureMode, PointInfo, ProcessGroup, ProcessServerStatus, ProofInfo,
    ResyncStatus, Severity, StateCode, TargetGroup, TargetServerStatus, VolumeReport, VolumeSummary,
};
use serde::Serialize;

/// How old an agent's report may be before its figures are shown as not known.
pub(crate) const REPORT_AGE_MAX_S: f64 = 30.0;

/// Everything that `seawall status --json` prints.
#[derive(Debug, Serialize)]
pub(crate) struct Overview {
    pub(crate) time: UnixNanos,
    pub(crate) groups: Vec<GroupView>,
    pub(crate) process_server: Option<ProcessServerStatus>,
    pub(crate) target_server: Option<TargetServerStatus>,
    /// Servers that did not answer, and why.
    pub(crate) errors: Vec<String>,
}

/// One group, over all stages.
#[derive(Debug, Serialize)]
pub(crate) struct GroupView {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
    pub(crate) agent: Option<String>,
    /// Positions, in order. A stage that did not answer is where the next one proves that it must be.
    pub(crate) ladder: Ladder,
    /// How old the newest recovery point is: what would be lost if the source were lost now.
    pub(crate) lag_seconds: Option<f64>,
    /// What is not applied yet, over all stages.
    pub(crate) lag_bytes: ByteCount,
    pub(crate) lag: LagBytes,
    pub(crate) mode: Option<CaptureMode>,
    /// Why this mode, in the agent's words.
    pub(crate) capture_notes: Vec<String>,
    pub(crate) churn_bytes_per_s: Option<f64>,
    pub(crate) sent_bytes_per_s: Option<f64>,
    pub(crate) applied_bytes_per_s: Option<f64>,
    pub(crate) points: u64,
    pub(crate) newest_point: Option<PointInfo>,
    /// The last proof that a machine comes up from a point.
    pub(crate) proof: Option<ProofInfo>,
    pub(crate) oldest_point: Option<PointInfo>,
    /// The volumes as the agent sees them; empty when it has not reported.
    pub(crate) volumes: Vec<VolumeReport>,
    /// The volumes as the target has them.
    pub(crate) replicas: Vec<VolumeSummary>,
    /// Counters of the agent, when it has reported.
    pub(crate) capture: Option<CaptureFigures>,
    /// The comparison with the replica that goes on, or waits.
    pub(crate) resync: Option<ResyncStatus>,
    /// The stage that holds the others up.
    pub(crate) bottleneck: Option<Bottleneck>,
    /// What a person should know of the replica.
    pub(crate) warnings: Vec<String>,
    /// Every stage with its state, in the order of the way.
    pub(crate) stages: Vec<Stage>,
    /// The state that matters most.
    pub(crate) state: StateCode,
    pub(crate) meaning: &'static str,
    pub(crate) what_to_do: &'static str,
}

/// Where the bytes that are not applied yet are.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct LagBytes {
    /// To be read from the disks.
    pub(crate) remaining: ByteCount,
    /// In the agent's memory.
    pub(crate) agent: ByteCount,
    /// In the process server's cache.
    pub(crate) cache: ByteCount,
}

/// What the agent counts.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct CaptureFigures {
    pub(crate) report_age_seconds: f64,
    pub(crate) ring_used: ByteCount,
    pub(crate) ring_bytes: ByteCount,
    pub(crate) epoch_memory_used: ByteCount,
    pub(crate) epoch_memory_limit: ByteCount,
    pub(crate) missed_writes_total: u64,
    pub(crate) overflow_total: u64,
    pub(crate) suspect_bytes: ByteCount,
    pub(crate) compared_bytes: ByteCount,
    pub(crate) different_bytes: ByteCount,
    pub(crate) processors_used: f64,
    pub(crate) memory_resident: ByteCount,
    pub(crate) written_bytes_total: ByteCount,
    pub(crate) sent_bytes_total: ByteCount,
}

/// One stage of the way.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Stage {
    pub(crate) stage: String,
    pub(crate) state: StateCode,
    pub(crate) last_error: Option<String>,
    /// The next part on the way is not reached, and is tried again in so many seconds.
    pub(crate) next_try_seconds: Option<f64>,
}

pub(crate) fn overview(
    process: Option<ProcessServerStatus>,
    target: Option<TargetServerStatus>,
    errors: Vec<String>,
    now: UnixNanos,
) -> Overview {
    let mut groups: BTreeMap<GroupId, (Option<&ProcessGroup>, Option<&TargetGroup>)> = BTreeMap::new();
    for group in process.iter().flat_map(|status| &status.groups) {
        groups.entry(group.group).or_default().0 = Some(group);
    }
    for group in target.iter().flat_map(|status| &status.groups) {
        groups.entry(group.group).or_default().1 = Some(group);
    }
    let groups = groups
        .into_iter()
        .map(|(id, (at_process, at_target))| {
            let process = at_process.zip(process.as_ref());
            let target = at_target.zip(target.as_ref());
            group_view(id, process, target, now)
        })
        .collect();
    Overview { time: now, groups, process_server: process, target_server: target, errors }
}

fn group_view(
    group: GroupId,
    process: Option<(&ProcessGroup, &ProcessServerStatus)>,
    target: Option<(&TargetGroup, &TargetServerStatus)>,
    now: UnixNanos,
) -> GroupView {
    let report = process.and_then(|(group, _)| group.report.as_ref());
    let report_age = report.map(|report| now.since(report.time).as_secs_f64());
    let fresh = report.filter(|_| {
        process.is_some_and(|(group, _)| group.agent.is_some())
            && report_age.unwrap_or_default() <= REPORT_AGE_MAX_S
    });
    let backlog = process.map_or(ByteCount::ZERO, |(group, _)| group.cached_bytes);
    let lag = LagBytes {
        remaining: report.map_or(ByteCount::ZERO, AgentReport::remaining_bytes),
        agent: report
            .map_or(ByteCount::ZERO, |report| report.epoch_memory_used.saturating_add(report.ring_used)),
        cache: backlog,
    };
    let newest_point = target.and_then(|(group, _)| group.newest_point.clone());
    let stages = stages(process, target, fresh);
    let state = stages
        .iter()
        .map(|stage| stage.state)
        .max_by_key(|state| (state.severity(), *state != StateCode::Unknown))
        .unwrap_or_default();
    GroupView {
        group,
        generation: target
            .map(|(group, _)| group.generation)
            .into_iter()
            .chain(process.map(|(group, _)| group.generation))
            .max()
            .unwrap_or_default(),
        agent: process.and_then(|(group, _)| group.agent.clone()),
        ladder: ladder(report, process.map(|(group, _)| group), target.map(|(group, _)| group)),
        lag_seconds: newest_point.as_ref().map(|point| now.since(point.cut_time).as_secs_f64()),
        lag_bytes: lag.remaining.saturating_add(lag.agent).saturating_add(lag.cache),
        lag,
        mode: fresh.map(AgentReport::mode),
        capture_notes: fresh.map(|report| report.capture_notes.clone()).unwrap_or_default(),
        churn_bytes_per_s: fresh.map(|report| report.churn_bytes_per_s),
        sent_bytes_per_s: fresh.map(|report| report.sent_bytes_per_s),
        applied_bytes_per_s: target.map(|(group, _)| group.applied_bytes_per_s),
        points: target.map_or(0, |(group, _)| group.points),
        newest_point,
        proof: target.and_then(|(group, _)| group.proof.clone()),
        oldest_point: target.and_then(|(group, _)| group.oldest_point.clone()),
        volumes: report.map(|report| report.volumes.clone()).unwrap_or_default(),
        replicas: target.map(|(group, _)| group.volumes.clone()).unwrap_or_default(),
        warnings: target.map(|(group, _)| group.warnings.clone()).unwrap_or_default(),
        capture: report.map(|report| figures(report, report_age.unwrap_or_default())),
        resync: report.and_then(|report| report.resync.clone()),
        bottleneck: process.and_then(|(group, _)| group.bottleneck.clone()),
        stages,
        state,
        meaning: state.meaning(),
        what_to_do: state.what_to_do(),
    }
}

/// Each stage spoke at another moment, the earlier ones first or only now and then. What a later stage has, the
/// earlier ones must have had; so an earlier stage is shown at least there.
fn ladder(
    report: Option<&AgentReport>,
    process: Option<&ProcessGroup>,
    target: Option<&TargetGroup>,
) -> Ladder {
    let of_report = |position: fn(&AgentReport) -> Epoch| report.map_or(Epoch::NONE, position);
    let by_links = process.and_then(|group| group.targets.iter().map(|link| link.applied).max());
    let applied = target.map_or(by_links.unwrap_or_default(), |group| group.applied);
    let cached = process.map_or(Epoch::NONE, |group| group.cached).max(applied);
    let sealed = of_report(|report| report.sealed).max(cached);
    let captured = of_report(|report| report.captured).max(sealed);
    let oldest_kept =
        target.and_then(|group| group.oldest_point.as_ref()).map_or(Epoch::NONE, |point| point.epoch);
    let ladder = Ladder { captured, sealed, cached, applied, oldest_kept };
    // Raised as above, only the target can contradict itself.
    ladder.checked().unwrap_or(Ladder { oldest_kept: Epoch::NONE, ..ladder })
}

fn stages(
    process: Option<(&ProcessGroup, &ProcessServerStatus)>,
    target: Option<(&TargetGroup, &TargetServerStatus)>,
    report: Option<&AgentReport>,
) -> Vec<Stage> {
    let mut stages = Vec::new();
    let stage = |name: String, state: StateCode, error: &Option<String>| Stage {
        stage: name,
        state,
        last_error: error.clone(),
        next_try_seconds: None,
    };
    if let Some((group, server)) = process {
        match (report, &group.agent) {
            (Some(report), _) => stages.push(stage("agent".to_owned(), report.state, &report.last_error)),
            (None, Some(_)) => stages.push(stage("agent".to_owned(), StateCode::Unknown, &None)),
            (None, None) => stages.push(stage("agent".to_owned(), StateCode::WaitingForAgent, &None)),
        }
        if server.state.severity() > Severity::Good {
            stages.push(stage(format!("process server {}", server.name), server.state, &server.last_error));
        }
        stages.push(stage("cache".to_owned(), group.state, &group.last_error));
        for link in &group.targets {
            // Both by the server's clock.
            let left = |time: UnixNanos| time.0.saturating_sub(server.time.0) as f64 / 1e9;
            stages.push(Stage {
                stage: format!("forwarding to {}", link.address),
                state: link.state,
                last_error: link.last_error.clone(),
                next_try_seconds: link.next_try.map(left),
            });
        }
    }
    if let Some((group, server)) = target {
        if server.state.severity() > Severity::Good {
            stages.push(stage(format!("target server {}", server.name), server.state, &server.last_error));
        }
        stages.push(stage("replica".to_owned(), group.state, &group.last_error));
    }
    stages
}

fn figures(report: &AgentReport, report_age_seconds: f64) -> CaptureFigures {
    CaptureFigures {
        report_age_seconds,
        ring_used: report.ring_used,
        ring_bytes: report.ring_bytes,
        epoch_memory_used: report.epoch_memory_used,
        epoch_memory_limit: report.epoch_memory_limit,
        missed_writes_total: report.missed_writes_total,
        overflow_total: report.overflow_total,
        suspect_bytes: report.suspect_bytes,
        compared_bytes: report.compared_bytes,
        different_bytes: report.different_bytes,
        processors_used: report.processors_used,
        memory_resident: report.memory_resident,
        written_bytes_total: report.written_bytes_total,
        sent_bytes_total: report.sent_bytes_total,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use block::{Consistency, PointNote, VolumeId};
    use control::TargetLink;

    use super::*;

    pub(crate) const NOW: UnixNanos = UnixNanos(1_700_000_000_000_000_000);

    fn ago(seconds: u64) -> UnixNanos {
        UnixNanos(NOW.0 - seconds * 1_000_000_000)
    }

    pub(crate) fn process() -> ProcessServerStatus {
        let volume = VolumeReport {
            volume: VolumeSummary { id: VolumeId([2; 16]), name: "data".into(), size: ByteCount::gib(1) },
            device: "/dev/vdb".into(),
            mode: CaptureMode::Data,
            dirty_bytes: ByteCount::mib(3),
            draining_bytes: ByteCount::mib(1),
            drained_total: ByteCount::mib(9),
        };
        let report = AgentReport {
            time: ago(1),
            captured: Epoch(10),
            sealed: Epoch(9),
            cached: Epoch(8),
            applied: Epoch(6),
            volumes: vec![volume],
            churn_bytes_per_s: 1e6,
            epoch_memory_used: ByteCount::mib(2),
            ring_used: ByteCount::mib(1),
            capture_notes: vec!["eBPF with write data".into()],
            state: StateCode::Replicating,
            ..AgentReport::default()
        };
        let link = TargetLink {
            address: "dr:7441".into(),
            connected: true,
            applied: Epoch(7),
            backlog_bytes: ByteCount::mib(5),
            sent_bytes_total: ByteCount::ZERO,
            sent_bytes_per_s: 0.0,
            state: StateCode::Replicating,
            last_error: None,
            next_try: None,
        };
        let group = ProcessGroup {
            group: GroupId([1; 16]),
            generation: Generation(1),
            agent: Some("web-1".into()),
            cached: Epoch(8),
            cached_bytes: ByteCount::mib(5),
            received_bytes_total: ByteCount::ZERO,
            received_bytes_per_s: 0.0,
            targets: vec![link],
            report: Some(report),
            state: StateCode::Replicating,
            last_error: None,
            bottleneck: None,
        };
        ProcessServerStatus {
            groups: vec![group],
            state: StateCode::Replicating,
            ..ProcessServerStatus::default()
        }
    }

    pub(crate) fn target() -> TargetServerStatus {
        let point = |epoch, seconds| PointInfo {
            epoch: Epoch(epoch),
            cut_time: ago(seconds),
            consistency: Consistency::Crash,
            note: PointNote::default(),
            changed_bytes: ByteCount(4096),
            pin: None,
            kept_for: None,
            unusable: None,
        };
        let group = TargetGroup {
            group: GroupId([1; 16]),
            generation: Generation(1),
            sender: Some("process-server".into()),
            volumes: Vec::new(),
            applied: Epoch(7),
            applied_cut_time: ago(3),
            failover: None,
            promoted: None,
            proof: None,
            newest_point: Some(point(7, 3)),
            oldest_point: Some(point(2, 500)),
            points: 6,
            newest_application_cut_time: None,
            undo_bytes: ByteCount::ZERO,
            applied_bytes_total: ByteCount::ZERO,
            applied_bytes_per_s: 5.0,
            apply_ms_p50: 1.0,
            apply_ms_p99: 1.0,
            state: StateCode::Replicating,
            last_error: None,
            warnings: vec!["undo layers take 9.0 GiB of at most 10.0 GiB".into()],
        };
        TargetServerStatus {
            exports: Vec::new(),
            groups: vec![group],
            state: StateCode::Replicating,
            ..TargetServerStatus::default()
        }
    }

    fn only(overview: &Overview) -> &GroupView {
        assert_eq!(overview.groups.len(), 1);
        &overview.groups[0]
    }

    #[test]
    fn one_group_is_put_together_from_both_servers() {
        let overview = overview(Some(process()), Some(target()), Vec::new(), NOW);
        let group = only(&overview);
        let expected = Ladder {
            captured: Epoch(10),
            sealed: Epoch(9),
            cached: Epoch(8),
            applied: Epoch(7),
            oldest_kept: Epoch(2),
        };
        assert_eq!(group.ladder, expected);
        assert_eq!(group.lag_seconds, Some(3.0));
        assert_eq!(group.lag_bytes, ByteCount::mib(4 + 3 + 5));
        assert_eq!(group.state, StateCode::Replicating);
        assert_eq!(group.mode, Some(CaptureMode::Data));
    }

    /// The agent reports once a second: by the time the target is asked, it may have applied what the report does not
    /// know of yet.
    #[test]
    fn positions_are_in_order_whatever_the_moment() {
        let (mut process, mut target) = (process(), target());
        target.groups[0].applied = Epoch(20);
        let ladder = only(&overview(Some(process.clone()), Some(target.clone()), Vec::new(), NOW)).ladder;
        assert_eq!((ladder.captured, ladder.cached, ladder.applied), (Epoch(20), Epoch(20), Epoch(20)));
        process.groups[0].report = None;
        let ladder = only(&overview(Some(process), None, Vec::new(), NOW)).ladder;
        assert_eq!((ladder.captured, ladder.cached, ladder.applied), (Epoch(8), Epoch(8), Epoch(7)));
        assert!(ladder.checked().is_ok());
    }

    #[test]
    fn the_worst_state_is_the_groups() {
        let (mut process, mut target) = (process(), target());
        process.groups[0].targets[0].state = StateCode::Unreachable;
        let state = |process: &ProcessServerStatus, target: &TargetServerStatus| {
            only(&overview(Some(process.clone()), Some(target.clone()), Vec::new(), NOW)).state
        };
        assert_eq!(state(&process, &target), StateCode::Unreachable);
        target.groups[0].state = StateCode::StoreFailed;
        assert_eq!(state(&process, &target), StateCode::StoreFailed);
    }

    #[test]
    fn an_agent_that_is_gone_is_not_shown_as_it_was() {
        let mut gone = process();
        gone.groups[0].agent = None;
        let gone = overview(Some(gone), Some(target()), Vec::new(), NOW);
        assert_eq!(only(&gone).state, StateCode::WaitingForAgent);
        assert_eq!(only(&gone).churn_bytes_per_s, None);
        let mut silent = process();
        if let Some(report) = &mut silent.groups[0].report {
            report.time = ago(60);
        }
        let silent = overview(Some(silent), Some(target()), Vec::new(), NOW);
        assert_eq!(only(&silent).state, StateCode::Unknown);
        assert_eq!(only(&silent).mode, None);
    }
}
