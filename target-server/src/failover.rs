//! Failing over, committing, cancelling, as operators ask.

use std::sync::Arc;

use block::{ByteCount, Epoch, Generation, GroupId};
use control::{FailoverInfo, FailoverReply, FailoverStep, PointSelector, PromotedInfo};
use replica::{GroupReplica, Pace, ReplicaError};
use wire::{Operation, RefusalCode, WireError};

use crate::group::{ADOPTED_LABEL, point_info};
use crate::operate::json;
use crate::refusal::Refusal;
use crate::retain::{epoch_of, replica_of};
use crate::server::Server;

pub(crate) fn info(replica: &GroupReplica) -> Option<FailoverInfo> {
    let (failover, complete) = replica.failover()?;
    Some(FailoverInfo {
        point: failover.point,
        from: failover.from,
        ended: failover.ended,
        complete,
        written_bytes: replica.written_since_failover(),
    })
}

pub(crate) fn promoted(replica: &GroupReplica) -> Option<PromotedInfo> {
    let status = replica.promoted()?;
    Some(PromotedInfo { since: status.since, waiting_bytes: status.waiting, open: status.open as u64 })
}

/// Does a step. It goes on to its end when whoever asked has gone.
pub(crate) async fn serve(
    server: &Arc<Server>,
    operation: Operation,
    group: GroupId,
    step: FailoverStep,
) -> Result<(), WireError> {
    tracing::warn!(peer = operation.address(), %group, ?step, "operator fails over");
    let server = server.clone();
    let answer = tokio::task::spawn_blocking(move || run(&server, group, step)).await;
    match answer.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Internal, error.to_string()))) {
        Ok(reply) => operation.reply(&json(&reply)).await,
        Err(refusal) => {
            tracing::warn!(%group, code = %refusal.code, "failover refused: {}", refusal.message);
            operation.refuse(refusal.code, &refusal.message);
            Ok(())
        }
    }
}

pub(crate) fn run(server: &Server, id: GroupId, step: FailoverStep) -> Result<FailoverReply, Refusal> {
    let (group, replica) = replica_of(server, id)?;
    let mut changed_bytes = ByteCount::ZERO;
    match step {
        FailoverStep::Start(point) => {
            let point = chosen(&replica, point)?;
            let generation = replica.applied().0.unwrap_or_default();
            // One that was interrupted goes on in the generation that it has begun.
            let next = match replica.failover() {
                Some(_) => generation,
                None => Generation(generation.0 + 1),
            };
            // People wait for this; nothing else is worth being slow for.
            changed_bytes = replica.fail_over(point, next, &Pace::unbounded()).map_err(asked)?.changed;
        }
        FailoverStep::Commit => drop(replica.commit_failover()?),
        FailoverStep::Cancel => drop(replica.cancel_failover().map_err(asked)?),
        FailoverStep::Promote => {
            replica.promote()?;
            group.cut_by_itself();
        }
        FailoverStep::Demote => replica.demote()?,
    }
    Ok(reply(&replica, id, changed_bytes))
}

/// How the group is after a step.
pub(crate) fn reply(replica: &GroupReplica, group: GroupId, changed_bytes: ByteCount) -> FailoverReply {
    FailoverReply {
        group,
        generation: replica.applied().0.unwrap_or_default(),
        point: replica.points_summary().newest.as_ref().map(point_info),
        changed_bytes,
    }
}

/// The point that is meant. What was found on disks that came home is the newest point until something whole has come of the side that runs
/// now; nobody who says "latest" means to throw that side back so far.
fn chosen(replica: &GroupReplica, selector: PointSelector) -> Result<Epoch, Refusal> {
    let point = epoch_of(replica, selector)?;
    let newest = replica.points_summary().newest;
    let found = newest.filter(|newest| {
        newest.epoch == point
            && newest.note.label.as_ref().is_some_and(|label| label.as_str() == ADOPTED_LABEL)
    });
    match (selector, found) {
        (PointSelector::Latest, Some(_)) => {
            let message = format!(
                "fail over group {} to its newest point: that is {point}, {ADOPTED_LABEL:?}, what the disks held before they became its \
                 replica; nothing whole has come of its source yet. Wait for a point of it, or say --point {point}",
                replica.group()
            );
            Err(Refusal::new(RefusalCode::BadRequest, message))
        }
        _ => Ok(point),
    }
}

/// A sender is told to come again; an operator, what to do first.
fn asked(error: ReplicaError) -> Refusal {
    match error {
        ReplicaError::Promoted { .. } => Refusal::new(RefusalCode::BadRequest, error.to_string()),
        other => other.into(),
    }
}
