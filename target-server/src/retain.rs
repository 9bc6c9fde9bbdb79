//! Answering operators: the list of points, pins, deleting, scrubbing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ByteOffset, GroupId, VolumeId};
use bytes::Bytes;
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

pub(crate) fn replica_of(
    server: &Server,
    group: GroupId,
) -> Result<(Arc<Group>, Arc<GroupReplica>), Refusal> {
    let group = server.group(group).ok_or_else(|| unknown(group))?;
    let replica = group.replica()?.clone();
    Ok((group.clone(), replica))
}

pub(crate) fn epoch_of(replica: &GroupReplica, selector: PointSelector) -> Result<block::Epoch, Refusal> {
    match selector {
        PointSelector::Epoch(epoch) => Ok(epoch),
        PointSelector::Latest => replica.points_summary().newest.map(|point| point.epoch).ok_or_else(|| {
            let message = format!("group {} has no recovery point yet", replica.group());
            Refusal::new(RefusalCode::NotFound, message)
        }),
    }
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
