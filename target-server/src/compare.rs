//! Answering a source that asks whether the replica holds what its disks hold.
//!
//! - Consistency: a question names the epoch that must have been applied; no later one touches its granules before the source
//!   has the answer. So they are read from the image while epochs go on being applied. It must be the image of the source's own
//!   history from before the reading until after it: what a failover puts there meanwhile and a cancel takes away would be
//!   found the same, and lost.
//! - Cancellation: when the conversation ends, what is being read is read to its end and thrown away.

use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, ByteOffset, Extent, GRANULE_BYTES, Generation, Granule};
use bytes::Bytes;
use changeset::{CompareAnswer, CompareQuestion, Conversation, DAMAGED_GRANULES_MAX, Digester};
use replica::{GroupReplica, ReplicaError};
use tokio::sync::{Semaphore, mpsc};
use wire::{Comparison, RefusalCode, Role, Turn};

use crate::refusal::Refusal;
use crate::server::Server;

/// Questions of one conversation that are worked on at the same time. More wait in the network.
const QUESTIONS_AT_ONCE: usize = 4;
/// How often it is looked whether an epoch has been applied.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Serves one conversation until it ends.
pub(crate) async fn serve(server: &Arc<Server>, mut comparison: Comparison) {
    let group = comparison.group();
    match answer_all(server, &mut comparison).await {
        Ok(()) => tracing::debug!(%group, "comparison ended"),
        Err(refusal) => {
            tracing::warn!(%group, peer = %comparison.peer(), code = %refusal.code, "comparison refused: {}", refusal.message);
            comparison.refuse(refusal.code, &refusal.message);
        }
    }
}

async fn answer_all(server: &Arc<Server>, comparison: &mut Comparison) -> Result<(), Refusal> {
    if comparison.peer().role != Role::ProcessServer {
        let message = format!("compare with a target server: {} is not a process server", comparison.peer());
        return Err(Refusal::new(RefusalCode::Unauthorised, message));
    }
    let (id, generation) = (comparison.group(), comparison.generation());
    let Some(group) = server.group(id) else {
        let message = format!("compare group {id}: this target server does not keep it");
        return Err(Refusal::new(RefusalCode::UnknownGroup, message));
    };
    let replica = group.replica()?.clone();
    replica.standing(generation)?;
    // Whoever passes questions on here has given out turns.
    if comparison.tell_turn(Turn { ahead: 0, at_once: u32::MAX }).await.is_err() {
        return Ok(());
    }
    let conversation = Conversation::new(&group.key, id, generation, &comparison.conversation());
    let digester = Digester::new(&group.key, id, generation);
    let turns = Arc::new(Semaphore::new(QUESTIONS_AT_ONCE));
    let (answers, mut answered) = mpsc::channel::<Result<(u64, CompareAnswer), Refusal>>(QUESTIONS_AT_ONCE);
    loop {
        tokio::select! {
            question = comparison.next(), if turns.available_permits() > 0 => {
                // The other side has what it wanted, or will say so in another conversation.
                let Ok((number, message)) = question else { return Ok(()) };
                let question = conversation.open_question(number, &message).map_err(|error| {
                    Refusal::new(RefusalCode::BadRequest, format!("compare group {id}: {error}"))
                })?;
                let turn = turns.clone().acquire_owned().await;
                let (replica, digester, answers) = (replica.clone(), digester.clone(), answers.clone());
                tokio::spawn(async move {
                    let answer = answer(replica, generation, digester, question).await.map(|answer| (number, answer));
                    drop(turn);
                    // Nobody wants it when the conversation has ended.
                    let _ = answers.send(answer).await;
                });
            }
            Some(answer) = answered.recv() => {
                let (number, answer) = answer?;
                let sealed = Bytes::from(conversation.seal_answer(number, &answer));
                if comparison.send(number, sealed).await.is_err() {
                    return Ok(());
                }
            }
            () = server.stopping() => {
                return Err(Refusal::new(RefusalCode::Stopping, "compare: this target server is stopping"));
            }
        }
    }
}

async fn answer(
    replica: Arc<GroupReplica>,
    generation: Generation,
    digester: Digester,
    question: CompareQuestion,
) -> Result<CompareAnswer, Refusal> {
    let before = loop {
        let standing = replica.standing(generation)?;
        if standing.applied >= question.as_of {
            break standing;
        }
        if let Some(reason) = replica.poisoned() {
            return Err(Refusal::new(
                RefusalCode::Failed,
                format!("compare: the replica is poisoned: {reason}"),
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    let looked = {
        let replica = replica.clone();
        tokio::task::spawn_blocking(move || compare(&replica, &digester, &question)).await
    };
    let answer = looked.map_err(|error| Refusal::new(RefusalCode::Internal, error.to_string()))??;
    if replica.standing(generation)?.taken_back != before.taken_back {
        let message = format!(
            "compare group {}: its replica was at another point meanwhile; ask again",
            replica.group()
        );
        return Err(Refusal::new(RefusalCode::Busy, message));
    }
    Ok(answer)
}

fn compare(
    replica: &GroupReplica,
    digester: &Digester,
    question: &CompareQuestion,
) -> Result<CompareAnswer, ReplicaError> {
    let volumes = replica.volumes();
    let Some(volume) = volumes.iter().find(|volume| volume.info.id == question.volume) else {
        return Ok(CompareAnswer::Unknown);
    };
    if question.is_about_damage() {
        return Ok(CompareAnswer::Damaged(damaged(replica, question)));
    }
    if replica.unproven() > ByteCount::ZERO {
        // What is the same here says nothing of other targets, which may lack what the source has lost track of. So all is sent, to all.
        return Ok(CompareAnswer::Unknown);
    }
    let size = volume.info.size;
    let granules: Vec<Granule> = question.granules().collect();
    if granules.last().is_none_or(|last| last.offset() >= ByteOffset(size.0)) {
        return Ok(CompareAnswer::Unknown);
    }
    // What is damaged is sent, even if it should be the checksum of it that was damaged.
    let damaged: Vec<Extent> = replica.damaged_blocks(question.volume);
    let mut digests = Vec::with_capacity(granules.len());
    let mut data = vec![0; GRANULE_BYTES as usize];
    for granule in granules {
        let length = ByteCount(size.0 - granule.offset().0).min(ByteCount(GRANULE_BYTES));
        let data = &mut data[..length.0 as usize];
        replica.read_newest(question.volume, data, granule.offset())?;
        let mut digest = digester.granule(question.volume, granule, data);
        if damaged.iter().any(|extent| is_in(granule, extent)) {
            digest = digest.map(|byte| !byte);
        }
        digests.push(digest);
    }
    let same = digester.all(digests.iter()) == question.digest;
    Ok(if same { CompareAnswer::Same } else { CompareAnswer::Differs(digests) })
}

fn is_in(granule: Granule, extent: &Extent) -> bool {
    (extent.offset().granule().0..extent.end().0.div_ceil(GRANULE_BYTES)).contains(&granule.0)
}

/// The first granules that a scrub found damaged, from where the question says.
fn damaged(replica: &GroupReplica, question: &CompareQuestion) -> Vec<Granule> {
    let mut granules = Vec::new();
    for extent in replica.damaged_blocks(question.volume) {
        let first = extent.offset().granule().max(question.first);
        for granule in first.0..extent.end().0.div_ceil(GRANULE_BYTES) {
            if granules.len() == DAMAGED_GRANULES_MAX {
                return granules;
            }
            if granules.last() != Some(&Granule(granule)) {
                granules.push(Granule(granule));
            }
        }
    }
    granules
}
