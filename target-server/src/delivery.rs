//! Taking changesets of one group from one connection.
//!
//! Three stages work at the same time: the network is read, changeset N+1 is opened, changeset N is applied. What lies
//! between them is bounded, and credit is given back only as bytes are opened; so memory is bounded by
//! [`PIPELINE_CHANGESETS`] opened ones and [`CREDIT_BYTES`].
//!
//! - Consistency: a changeset is given to the replica only when all of it was verified and is what the wire announced.
//! - Crash consistency: the replica's; "applied" is told only when it is durable.
//! - Retries: none; after any failure the connection is refused by name, and the sender goes on after what is held.
//! - Cancellation: when the connection ends, an opened changeset is still applied, for it is verified; a partial one is
//!   dropped. The turn ends only when nothing is being applied any more.

use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc as sync_mpsc;
use std::time::Instant;

use block::{ByteCount, Epoch, Generation};
use bytes::Bytes;
use changeset::{Changeset, Opener, SEALED_BYTES_MAX};
use replica::{GroupReplica, Standing};
use tokio::sync::{mpsc, oneshot};
use wire::{Answerer, Condition, Held, Incoming, Receiver, RefusalCode, Role};

use crate::group::Group;
use crate::refusal::Refusal;
use crate::server::Server;

/// Bytes that a sender may have under way. More wait at the sender.
pub const CREDIT_BYTES: ByteCount = ByteCount::mib(32);
/// Changesets of one group in memory, opened or being opened. The next waits in the network.
pub const PIPELINE_CHANGESETS: usize = 3;
/// Pieces between the network and the opener; their bytes are bounded by the credit.
const PIECES_QUEUED_MAX: usize = 256;

/// A part of a changeset on its way to the opener.
enum Piece {
    Begin(Epoch),
    Data(Bytes),
    End,
}

/// Serves one connection until it ends.
pub(crate) async fn serve(server: &Arc<Server>, mut receiver: Receiver) {
    let answerer = receiver.answerer();
    let sender = receiver.peer().to_string();
    let (group, generation) = (receiver.group(), receiver.generation());
    let outcome = deliver(server, &mut receiver, &sender).await;
    match outcome {
        Ok(()) => tracing::info!(%group, %sender, "delivery ended"),
        Err(refusal) => {
            tracing::warn!(%group, %generation, %sender, code = %refusal.code, "delivery refused: {}", refusal.message);
            if let Some(group) = server.group(group) {
                group.refused(&refusal);
            }
            answerer.refuse(refusal.code, &refusal.message);
        }
    }
}

async fn deliver(server: &Arc<Server>, receiver: &mut Receiver, sender: &str) -> Result<(), Refusal> {
    let answerer = receiver.answerer();
    if receiver.peer().role != Role::ProcessServer {
        let message = format!("deliver to a target server: {sender} is not a process server");
        return Err(Refusal::new(RefusalCode::Unauthorised, message));
    }
    let Some(group) = server.group(receiver.group()) else {
        let message = format!(
            "deliver for group {}: this target server does not keep it; add a [[group]] to its configuration",
            receiver.group()
        );
        return Err(Refusal::new(RefusalCode::UnknownGroup, message));
    };
    let replica = group.replica()?.clone();
    let Some(_turn) = group.take_turn(&answerer, sender).await else {
        return Ok(());
    };
    if let Some(reason) = replica.poisoned() {
        let message = format!("deliver for group {}: its replica is poisoned: {reason}", group.id);
        return Err(Refusal::new(RefusalCode::Failed, message));
    }
    let generation = receiver.generation();
    let Standing { applied, history, .. } = replica.standing(generation)?;
    tracing::info!(group = %group.id, %generation, %applied, %sender, "delivery begins");
    receiver.accept_of(Held { held: applied, applied }, CREDIT_BYTES, history);
    let told_condition = condition(&replica, false);
    answerer.tell(told_condition);

    let (pieces, taken) = mpsc::channel(PIECES_QUEUED_MAX);
    // One is being opened and one being applied; the others wait here.
    let (opened, waiting) = sync_mpsc::sync_channel(PIPELINE_CHANGESETS - 2);
    let opener = {
        let (answerer, group, threads) = (answerer.clone(), group.clone(), server.threads);
        let work =
            move || told(&group, &answerer, open_all(taken, &opened, &group, generation, threads, &answerer));
        thread("open", work)?
    };
    let applier = {
        let (answerer, group, replica) = (answerer.clone(), group.clone(), replica.clone());
        thread("apply", move || {
            told(&group, &answerer, apply_all(&waiting, &group, &replica, &answerer, told_condition))
        })?
    };
    let received = receive(server, receiver, &replica, pieces, applied).await;
    // Both threads end when the one before them has; the applier's word is the weightiest, then the opener's.
    let opened = finished(opener.await);
    let applied = finished(applier.await);
    applied.and(opened).and(received)
}

/// Reads the network until the connection ends or must be refused.
async fn receive(
    server: &Server,
    receiver: &mut Receiver,
    replica: &Arc<GroupReplica>,
    pieces: mpsc::Sender<Piece>,
    applied: Epoch,
) -> Result<(), Refusal> {
    let mut stopping = pin!(server.stopping());
    let mut next = applied.next();
    loop {
        let incoming = tokio::select! {
            incoming = receiver.next() => incoming,
            () = &mut stopping => {
                return Err(Refusal::new(RefusalCode::Stopping, "deliver: this target server is stopping"));
            }
        };
        let piece = match incoming {
            Ok(Some(Incoming::Begin { epoch, total })) => {
                let group = receiver.group();
                if epoch > next && next == Epoch::NONE.next() {
                    // The first of a replica that has nothing, from a process server that has no longer what was before it.
                    begin_after(replica, receiver, Epoch(epoch.0 - 1)).await?;
                    next = epoch;
                }
                if epoch != next {
                    let (code, what) = match epoch < next {
                        true => (RefusalCode::Replayed, "it was delivered already"),
                        false => (RefusalCode::Gap, "epochs between are missing"),
                    };
                    let message =
                        format!("deliver epoch {epoch} of group {group} in place of {next}: {what}");
                    return Err(Refusal::new(code, message));
                }
                if total > SEALED_BYTES_MAX {
                    let message = format!(
                        "deliver epoch {epoch} of group {group}: {total} is more than {SEALED_BYTES_MAX}"
                    );
                    return Err(Refusal::new(RefusalCode::Limit, message));
                }
                next = epoch.next();
                Piece::Begin(epoch)
            }
            Ok(Some(Incoming::Data(bytes))) => Piece::Data(bytes),
            Ok(Some(Incoming::End)) => Piece::End,
            Ok(Some(Incoming::Report(_))) => continue,
            Ok(None) => return Ok(()),
            Err(error) => {
                // Refusals by a later stage end the connection too, and are told there.
                tracing::info!(group = %receiver.group(), %error, "delivery's connection ended");
                return Ok(());
            }
        };
        if pieces.send(piece).await.is_err() {
            // The opener has refused.
            return Ok(());
        }
    }
}

/// An empty replica begins in the middle of the history; one that is not empty, or becomes so meanwhile, refuses.
async fn begin_after(replica: &Arc<GroupReplica>, receiver: &Receiver, epoch: Epoch) -> Result<(), Refusal> {
    let (replica, generation, history) = (replica.clone(), receiver.generation(), receiver.history());
    let begin = tokio::task::spawn_blocking(move || replica.begin_after(generation, epoch, history));
    let begun = begin.await.map_err(|error| Refusal::new(RefusalCode::Internal, error.to_string()))?;
    begun?;
    tracing::warn!(
        group = %receiver.group(), %generation, %epoch,
        "the replica is empty and begins after this epoch: it has no point before all was compared with the source"
    );
    Ok(())
}

/// Opens changesets until there are no more pieces.
fn open_all(
    mut pieces: mpsc::Receiver<Piece>,
    opened: &sync_mpsc::SyncSender<Changeset>,
    group: &Group,
    generation: Generation,
    threads: usize,
    answerer: &Answerer,
) -> Result<(), Refusal> {
    let mut opening: Option<(Epoch, Opener)> = None;
    while let Some(piece) = pieces.blocking_recv() {
        match (piece, &mut opening) {
            (Piece::Begin(epoch), _) => {
                opening = Some((epoch, Opener::new(group.key.clone(), group.id, threads)));
            }
            (Piece::Data(bytes), Some((_, opener))) => {
                let count = ByteCount(bytes.len() as u64);
                opener.push(bytes)?;
                answerer.grant(count);
            }
            (Piece::End, Some(_)) => {
                let (epoch, opener) = opening.take().expect("just seen");
                let changeset = opener.finish()?;
                check_stamp(&changeset, group, generation, epoch)?;
                if opened.send(changeset).is_err() {
                    // The applier has refused.
                    return Ok(());
                }
            }
            // The wire lets no bytes or end through without a beginning.
            (Piece::Data(_) | Piece::End, None) => {
                return Err(Refusal::new(RefusalCode::BadRequest, "bytes came before a changeset began"));
            }
        }
    }
    Ok(())
}

/// Whether a changeset is the one that the wire announced.
fn check_stamp(
    changeset: &Changeset,
    group: &Group,
    generation: Generation,
    epoch: Epoch,
) -> Result<(), Refusal> {
    let stamp = &changeset.header.stamp;
    let code = match stamp {
        stamp if stamp.generation != generation => RefusalCode::Generation,
        stamp if stamp.epoch < epoch => RefusalCode::Replayed,
        stamp if stamp.epoch > epoch => RefusalCode::Gap,
        _ => return Ok(()),
    };
    let message = format!(
        "deliver epoch {epoch} of generation {generation} of group {}: its content is epoch {} of generation {}",
        group.id, stamp.epoch, stamp.generation
    );
    Err(Refusal::new(code, message))
}

/// Applies changesets until there are no more, or one is refused.
fn apply_all(
    changesets: &sync_mpsc::Receiver<Changeset>,
    group: &Group,
    replica: &GroupReplica,
    answerer: &Answerer,
    mut condition_told: Condition,
) -> Result<(), Refusal> {
    for changeset in changesets {
        let begun = Instant::now();
        let applied = replica.apply(&changeset)?;
        group.applied(&applied, begun.elapsed());
        answerer.hold(Held { held: applied.epoch, applied: applied.epoch });
        let now = condition(replica, condition_told.has_point);
        if now != condition_told {
            answerer.tell(now);
            condition_told = now;
        }
        tracing::debug!(
            group = %group.id, epoch = %applied.epoch, written = %applied.written, took = ?begun.elapsed(), "applied"
        );
    }
    Ok(())
}

/// How the replica is, for the source. `had_point`: it has a point, as is known already; a group never loses its last one.
fn condition(replica: &GroupReplica, had_point: bool) -> Condition {
    let volumes = replica.volumes();
    let damaged = volumes.iter().flat_map(|volume| replica.damaged_blocks(volume.info.id));
    Condition {
        has_point: had_point || replica.points_summary().count > 0,
        damaged: damaged.map(|extent| extent.length()).sum(),
        unproven: replica.unproven(),
    }
}

/// Tells the sender of a failure at once: the network's reader may be waiting for bytes that will not come.
fn told(group: &Group, answerer: &Answerer, outcome: Result<(), Refusal>) -> Result<(), Refusal> {
    if let Err(refusal) = &outcome {
        group.refused(refusal);
        answerer.refuse(refusal.code, &refusal.message);
    }
    outcome
}

/// Runs work that blocks on a thread of its own: a delivery lasts, and the runtime's pool is for short work.
fn thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, Refusal> {
    let (tell, told) = oneshot::channel();
    let run = move || {
        // Nobody listens when the server is being torn down.
        let _ = tell.send(work());
    };
    match std::thread::Builder::new().name(name.to_owned()).spawn(run) {
        Ok(_) => Ok(told),
        Err(error) => Err(Refusal::new(RefusalCode::Busy, format!("deliver: start a thread: {error}"))),
    }
}

fn finished(told: Result<Result<(), Refusal>, oneshot::error::RecvError>) -> Result<(), Refusal> {
    told.unwrap_or_else(|_| Err(Refusal::new(RefusalCode::Internal, "deliver: a stage ended half-way")))
}
