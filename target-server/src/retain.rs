//! Answering operators: the list of points, pins, deleting, scrubbing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ByteOffset, Consistency, GroupId, VolumeId};
use bytes::Bytes;
use control::fleet::POINTS_SHOWN_MAX;
use control::{
    DamagedRange, DeleteReply, GroupPoints, OperatorRequest, PinReply, PointSelector, PointsReply,
    ScrubFinding, ScrubProgressInfo, ScrubReply,
};
use replica::{Finding, GroupReplica, ScrubProgress, ScrubReport};
use tokio::sync::watch;
use wire::{Operation, RefusalCode, WireError};

use crate::group::{Group, point_info, summary};
use crate::operate::{json, unknown};
use crate::refusal::Refusal;
use crate::server::Server;

/// Points of one group in a list, the newest. How many older ones there are is told.
pub const POINTS_LISTED_MAX: usize = 20_000;
/// Ranges that one finding of a scrub names. More are left out.
const RANGES_MAX: usize = 1000;
/// How often a scrub tells how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

pub(crate) fn points(server: &Server, only: Option<GroupId>) -> Result<PointsReply, Refusal> {
    if let Some(group) = only.filter(|group| server.group(*group).is_none()) {
        return Err(unknown(group));
    }
    let mut groups = Vec::new();
    for group in server.groups().into_iter().filter(|group| only.is_none_or(|only| only == group.id)) {
        let replica = match group.replica() {
            Ok(replica) => replica,
            Err(refusal) if only.is_some() => return Err(refusal),
            Err(_) => continue,
        };
        let points = replica.points();
        let omitted = points.len().saturating_sub(POINTS_LISTED_MAX);
        // A point may have come or gone between the two.
        let kept_for: std::collections::HashMap<_, _> = replica.kept_for().into_iter().collect();
        let listed = points[omitted..].iter().map(|point| {
            let kept_for = kept_for.get(&point.epoch).cloned().flatten();
            control::PointInfo { kept_for, ..point_info(point) }
        });
        groups.push(GroupPoints {
            group: group.id,
            generation: replica.applied().0.unwrap_or_default(),
            volumes: points.last().map_or_else(Vec::new, |point| point.volumes.iter().map(summary).collect()),
            points: listed.collect(),
            omitted: omitted as u64,
        });
    }
    Ok(PointsReply { groups })
}

/// Recovery points of a group that show all of its history: its newest, those that somebody named, pinned or made more than
/// crash-consistent, and of the others one for each stretch of age, the stretches growing with it.
pub(crate) fn points_shown(server: &Server, group: GroupId) -> Option<GroupPoints> {
    let replica = server.group(group)?.replica().ok()?.clone();
    let points = replica.points();
    let kept_for: std::collections::HashMap<_, _> = replica.kept_for().into_iter().collect();
    let marked = |point: &replica::Point| {
        point.pin.is_some() || point.note.label.is_some() || point.consistency > Consistency::Crash
    };
    let times: Vec<(u64, bool)> = points.iter().map(|point| (point.cut_time.0, marked(point))).collect();
    let chosen = chosen(&times, POINTS_SHOWN_MAX);
    let omitted = (points.len() - chosen.len()) as u64;
    let listed = chosen.into_iter().map(|index| {
        let point = &points[index];
        control::PointInfo { kept_for: kept_for.get(&point.epoch).cloned().flatten(), ..point_info(point) }
    });
    Some(GroupPoints {
        group,
        generation: replica.applied().0.unwrap_or_default(),
        volumes: points.last().map_or_else(Vec::new, |point| point.volumes.iter().map(summary).collect()),
        points: listed.collect(),
        omitted,
    })
}

/// Which of these points, the oldest first, each with its time and whether it is marked; at most `most`, in order.
fn chosen(points: &[(u64, bool)], most: usize) -> Vec<usize> {
    if points.len() <= most {
        return (0..points.len()).collect();
    }
    let quarter = most / 4;
    let mut chosen: std::collections::BTreeSet<usize> = (points.len() - quarter..points.len()).collect();
    let marked = (0..points.len()).rev().filter(|index| points[*index].1 && !chosen.contains(index));
    let marked: Vec<usize> = marked.take(quarter).collect();
    chosen.extend(marked);
    // How far back one can go is always shown.
    chosen.insert(0);
    // Stretches that grow with age by the same factor, the newest point of each.
    let stretches = most - 2 * quarter - 1;
    let newest = points.last().map_or(0, |point| point.0);
    let age = |index: usize| newest.saturating_sub(points[index].0) as f64 + 1.0;
    let factor = age(0).ln().max(f64::MIN_POSITIVE) / stretches as f64;
    let mut last = None;
    for index in (0..points.len()).rev() {
        let stretch = ((age(index).ln() / factor) as usize).min(stretches - 1);
        if last != Some(stretch) {
            last = Some(stretch);
            chosen.insert(index);
        }
    }
    chosen.into_iter().collect()
}

pub(crate) fn replica_of(
    server: &Server,
    group: GroupId,
) -> Result<(Arc<Group>, Arc<GroupReplica>), Refusal> {
    let group = server.group(group).ok_or_else(|| unknown(group))?;
    let replica = group.replica()?.clone();
    Ok((group.clone(), replica))
}

pub(crate) fn epoch_of(replica: &GroupReplica, selector: PointSelector) -> Result<block::Epoch, Refusal> {
    let (point, what) = match selector {
        PointSelector::Epoch(epoch) => return Ok(epoch),
        PointSelector::Latest => (replica.points_summary().newest, "recovery point"),
        PointSelector::Application => {
            (replica.points_summary().newest_application, "application-consistent recovery point")
        }
    };
    point.map(|point| point.epoch).ok_or_else(|| {
        Refusal::new(RefusalCode::NotFound, format!("group {} has no {what} yet", replica.group()))
    })
}

/// Pins, unpins, deletes.
pub(crate) async fn change(
    server: &Arc<Server>,
    operation: Operation,
    request: OperatorRequest,
) -> Result<(), WireError> {
    let server = server.clone();
    tracing::info!(peer = operation.address(), ?request, "operator changes points");
    let work = move || change_now(&server, request);
    let answer = tokio::task::spawn_blocking(work).await;
    match answer.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Internal, error.to_string()))) {
        Ok(json) => operation.reply(&json).await,
        Err(refusal) => {
            operation.refuse(refusal.code, &refusal.message);
            Ok(())
        }
    }
}

fn change_now(server: &Server, request: OperatorRequest) -> Result<String, Refusal> {
    match request {
        OperatorRequest::Pin { group, point, label, expires } => {
            let (_, replica) = replica_of(server, group)?;
            let point = replica.pin(epoch_of(&replica, point)?, label, expires)?;
            Ok(json(&PinReply { group, point: point_info(&point) }))
        }
        OperatorRequest::Unpin { group, point } => {
            let (_, replica) = replica_of(server, group)?;
            let epoch = epoch_of(&replica, point)?;
            // Looked up first: without its pin it may go at once.
            let point = replica.point(epoch)?;
            replica.unpin(epoch)?;
            Ok(json(&PinReply { group, point: control::PointInfo { pin: None, ..point_info(&point) } }))
        }
        OperatorRequest::DeletePoint { group: id, epoch } => {
            let (group, replica) = replica_of(server, id)?;
            let pace = group.upkeep.as_ref().map(|upkeep| upkeep.asked().clone()).unwrap_or_default();
            replica.delete_point(epoch, &pace)?;
            Ok(json(&DeleteReply { group: id, epoch, points: replica.points_summary().count }))
        }
        _ => Err(Refusal::new(RefusalCode::BadRequest, "it changes no point")),
    }
}

pub(crate) async fn scrub(
    server: &Arc<Server>,
    operation: Operation,
    id: GroupId,
    volume: Option<VolumeId>,
) -> Result<(), WireError> {
    let (group, replica) = match replica_of(server, id) {
        Ok(found) => found,
        Err(refusal) => {
            operation.refuse(refusal.code, &refusal.message);
            return Ok(());
        }
    };
    if let Some(volume) = volume.filter(|id| replica.volumes().iter().all(|volume| volume.info.id != *id)) {
        operation
            .refuse(RefusalCode::NotFound, &format!("scrub volume {volume}: group {id} has no such volume"));
        return Ok(());
    }
    let (tell, mut told) = watch::channel(ScrubProgress::default());
    let work = {
        let replica = replica.clone();
        move || {
            let pace = group.upkeep.as_ref().map(|upkeep| upkeep.asked().clone()).unwrap_or_default();
            let said = std::cell::Cell::new(Instant::now());
            let report = replica.scrub(volume, &pace, &|progress| {
                if said.get().elapsed() >= PROGRESS_EVERY {
                    said.set(Instant::now());
                    tell.send_replace(progress);
                }
            })?;
            if let Some(upkeep) = group.upkeep.as_ref().filter(|_| volume.is_none()) {
                upkeep.scrubbed(&report);
            }
            Ok::<_, Refusal>(report)
        }
    };
    let working = tokio::task::spawn_blocking(work);
    let mut writer = operation.stream(&json(&ScrubProgressInfo::default())).await?;
    let mut sent = 0;
    let mut gone = None;
    while told.changed().await.is_ok() {
        let progress = *told.borrow_and_update();
        let progress = ScrubProgressInfo { done_bytes: progress.done, total_bytes: progress.total };
        let line = Bytes::from(json(&progress));
        let length = line.len() as u64;
        // Whoever asked may have gone; what is found is told in the status then.
        if gone.is_none()
            && let Err(error) = writer.data(ByteOffset(sent), line).await
        {
            gone = Some(error);
        }
        sent += length;
    }
    match working.await.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Internal, error.to_string()))) {
        Ok(_) if let Some(gone) = gone => Err(gone),
        Ok(report) => writer.finish(&json(&scrub_reply(id, &replica, report))).await,
        Err(refusal) => {
            writer.refuse(refusal.code, &refusal.message);
            Ok(())
        }
    }
}

fn scrub_reply(group: GroupId, replica: &GroupReplica, report: ScrubReport) -> ScrubReply {
    let volumes = replica.volumes();
    let finding = |finding: Finding| {
        let (volume, damaged) = match finding.blocks {
            None => (None, Vec::new()),
            Some((id, extents)) => {
                let volume = volumes.iter().find(|volume| volume.info.id == id);
                let ranges = extents
                    .iter()
                    .take(RANGES_MAX)
                    .map(|extent| DamagedRange { offset: extent.offset().0, bytes: extent.length().0 });
                (volume.map(|volume| summary(&volume.info)), ranges.collect())
            }
        };
        ScrubFinding {
            file: finding.path.display().to_string(),
            problem: finding.problem,
            volume,
            damaged,
            points: finding.points,
            points_count: finding.points_count,
        }
    };
    ScrubReply {
        group,
        layers: report.layers,
        read_bytes: report.read,
        new_checksum_bytes: report.new_checksums,
        findings: report.findings.into_iter().map(finding).collect(),
        notes: report.notes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the history, few points are shown, and the newest, the oldest and the marked ones are among them.
    #[test]
    fn few_points_show_all_of_a_history() {
        const SECOND: u64 = 1_000_000_000;
        let few: Vec<_> = (0..400).map(|second| (second * SECOND, false)).collect();
        assert_eq!(chosen(&few, 400), (0..400).collect::<Vec<_>>());
        // A year of days, and all points of the last day.
        let day = 86_400 * SECOND;
        let mut points: Vec<_> = (0..365).map(|number| (number * day, false)).collect();
        points.extend((0..86_400).map(|second| (365 * day + second * SECOND, false)));
        points[400].1 = true;
        let chosen_few = chosen(&points, 400);
        assert!(chosen_few.len() <= 400 && chosen_few.len() > 150, "{}", chosen_few.len());
        assert!(chosen_few.is_sorted() && chosen_few.contains(&400) && chosen_few.contains(&0));
        assert!((points.len() - 100..points.len()).all(|index| chosen_few.contains(&index)));
        let days = chosen_few.iter().filter(|index| **index < 365).count();
        assert!(days > 20, "{days} points of a year before the last day");
        // More marked ones than there is room for, and all at the same instant.
        assert!(chosen(&vec![(5, true); 5000], 400).len() <= 400);
    }
}
