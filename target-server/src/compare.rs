//! Answering a source that asks whether the replica holds what its disks hold.
//!
//! - Consistency: a question names the epoch that must have been applied; no later one touches its granules before the source
//!   has the answer. So they are read from the image while epochs go on being applied.
//! - Cancellation: when the conversation ends, what is being read is read to its end and thrown away.

use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, ByteOffset, GRANULE_BYTES, Granule};
use bytes::Bytes;
use changeset::{CompareAnswer, CompareQuestion, Conversation, Digester};
use replica::{GroupReplica, ReplicaError};
use tokio::sync::{Semaphore, mpsc};
use wire::{Comparison, RefusalCode, Role};

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
    if let Some(followed) = replica.applied().0.filter(|followed| *followed != generation) {
        let message = format!(
            "compare generation {generation} of group {id}: its replica follows generation {followed}"
        );
        return Err(Refusal::new(RefusalCode::Generation, message));
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
                    let answer = answer(replica, digester, question).await.map(|answer| (number, answer));
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
    digester: Digester,
    question: CompareQuestion,
) -> Result<CompareAnswer, Refusal> {
    while replica.applied().1 < question.as_of {
        if let Some(reason) = replica.poisoned() {
            return Err(Refusal::new(
                RefusalCode::Failed,
                format!("compare: the replica is poisoned: {reason}"),
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let looked = tokio::task::spawn_blocking(move || compare(&replica, &digester, &question)).await;
    let looked = looked.map_err(|error| Refusal::new(RefusalCode::Internal, error.to_string()))?;
    looked.map_err(Refusal::from)
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
    let size = volume.info.size;
    let granules: Vec<Granule> = question.granules().collect();
    if granules.last().is_none_or(|last| last.offset() >= ByteOffset(size.0)) {
        return Ok(CompareAnswer::Unknown);
    }
    let mut digests = Vec::with_capacity(granules.len());
    let mut data = vec![0; GRANULE_BYTES as usize];
    for granule in granules {
        let length = ByteCount(size.0 - granule.offset().0).min(ByteCount(GRANULE_BYTES));
        let data = &mut data[..length.0 as usize];
        replica.read_newest(question.volume, data, granule.offset())?;
        digests.push(digester.granule(question.volume, granule, data));
    }
    let same = digester.all(digests.iter()) == question.digest;
    Ok(if same { CompareAnswer::Same } else { CompareAnswer::Differs(digests) })
}
