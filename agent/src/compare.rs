//! Asks the target, through the process server, whether its replica holds what a suspect granule of a disk holds.
//!
//! Retries: when the conversation ends, what is open is asked again in a new one, until it is answered, as [`wire::Retry`]
//! says; the suspects wait, and no point is offered meanwhile.
//! Restarts of the source: each source has a place of its own; answers to questions of an earlier one are thrown away.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anyhow::ensure;
use block::{Epoch, Granule, UnixNanos, VolumeId};
use bytes::Bytes;
use capture::{Answer, Comparer, Question, Verdict, VolumeIndex};
use changeset::{
    CompareAnswer, CompareQuestion, Conversation, DAMAGED_GRANULES_MAX, Digester, GranuleDigest, GroupKey,
};
use durable::fault_point;
use parking_lot::Mutex;
use tokio::sync::Notify;
use wire::{
    Comparison, Credentials, FailureClass, LiveCredentials, Peers, Purpose, Retry, Role, Turn, WireError,
};

use crate::config::AgentConfig;
use crate::outbox::Outbox;
use crate::resync::Resyncs;
use crate::volumes::Volume;

/// Questions that may be open: the target reads as far ahead, 16 MiB each.
const QUESTIONS_MAX: usize = 32;

/// A question on its way, with what the disk held.
struct Open {
    question: Question,
    sent: bool,
}

#[derive(Default)]
struct State {
    /// Which source asks now.
    source: u64,
    /// Open questions of it.
    open: BTreeMap<u64, Open>,
    answers: VecDeque<Answer>,
    outbox: Option<Arc<Outbox>>,
}

/// Between the thread that reads disks and the task that talks.
pub(crate) struct Comparisons {
    state: Mutex<State>,
    asked: Notify,
    /// Says when what is suspect is compared.
    pub(crate) resyncs: Resyncs,
    key: GroupKey,
    digester: Digester,
    volumes: Vec<VolumeId>,
}

impl Comparisons {
    pub(crate) fn new(config: &AgentConfig, key: &GroupKey, volumes: &[Volume]) -> Comparisons {
        Comparisons {
            state: Mutex::default(),
            asked: Notify::new(),
            resyncs: Resyncs::new(&config.resync),
            key: key.clone(),
            digester: Digester::new(key, config.agent.group, config.agent.generation),
            volumes: volumes.iter().map(|volume| volume.id).collect(),
        }
    }

    /// Where the history stands, which says from when on the target can answer.
    pub(crate) fn follow(&self, outbox: &Arc<Outbox>) {
        self.state.lock().outbox = Some(outbox.clone());
    }

    /// The end of a new source; what an earlier one had asked is forgotten.
    pub(crate) fn begin(self: &Arc<Comparisons>) -> Box<dyn Comparer> {
        let mut state = self.state.lock();
        state.source += 1;
        state.open.clear();
        state.answers.clear();
        Box::new(Asker { comparisons: self.clone(), source: state.source })
    }

    /// Questions that were not sent in this conversation.
    fn unsent(&self) -> Vec<(u64, CompareQuestion)> {
        let mut state = self.state.lock();
        let unsent = state.open.iter_mut().filter(|(_, open)| !open.sent);
        unsent
            .map(|(number, open)| {
                open.sent = true;
                let Question { volume, as_of, granules, .. } = &open.question;
                let digest = self.digester.all(granules.iter().map(|(_, digest)| digest));
                let id = self.volumes.get(usize::from(volume.0)).copied().unwrap_or(VolumeId([0; 16]));
                (
                    *number,
                    CompareQuestion::new(*as_of, id, granules.iter().map(|(granule, _)| *granule), digest),
                )
            })
            .collect()
    }

    fn ask_all_again(&self) {
        self.state.lock().open.values_mut().for_each(|open| open.sent = false);
    }

    fn answered(&self, number: u64, answer: CompareAnswer) {
        let mut state = self.state.lock();
        let Some(Open { question, .. }) = state.open.remove(&number) else { return };
        let verdict = match answer {
            CompareAnswer::Same => Verdict::Same,
            CompareAnswer::Unknown => Verdict::Unknown,
            CompareAnswer::Differs(held) => {
                let pairs = question.granules.iter().zip(&held);
                let different = pairs.filter(|((_, ours), theirs)| ours != *theirs);
                Verdict::Differs(different.map(|((granule, _), _)| *granule).collect())
            }
            // Only to a question about damage, which has no granules.
            CompareAnswer::Damaged(_) => Verdict::Unknown,
        };
        fault_point("before-answer");
        state.answers.push_back(Answer { number: question.number, verdict });
    }

    fn granules(&self, number: u64) -> usize {
        self.state.lock().open.get(&number).map_or(0, |open| open.question.granules.len())
    }
}

/// A source's end.
struct Asker {
    comparisons: Arc<Comparisons>,
    source: u64,
}

impl Comparer for Asker {
    fn is_wanted(&mut self) -> Option<bool> {
        let outbox = self.comparisons.state.lock().outbox.clone()?;
        // Before the first epoch is held there is nothing at the target.
        match outbox.is_opened() {
            true if outbox.progress().held.held == Epoch::NONE => Some(false),
            _ => self.comparisons.resyncs.is_running().then_some(true),
        }
    }

    fn digest(&self, volume: VolumeIndex, granule: Granule, data: &[u8]) -> GranuleDigest {
        let id = self.comparisons.volumes.get(usize::from(volume.0)).copied().unwrap_or(VolumeId([0; 16]));
        self.comparisons.digester.granule(id, granule, data)
    }

    fn ask(&mut self, mut question: Question) {
        let mut state = self.comparisons.state.lock();
        if state.source != self.source {
            return;
        }
        // What an earlier agent sent may still be on its way to the target.
        if let Some(outbox) = &state.outbox {
            question.as_of = question.as_of.max(outbox.progress().numbered);
        }
        // Numbers of a conversation are from 1, and rise over all sources.
        let number = (self.source << 40) + question.number + 1;
        state.open.insert(number, Open { question, sent: false });
        drop(state);
        self.comparisons.asked.notify_one();
    }

    fn answer(&mut self) -> Option<Answer> {
        let mut state = self.comparisons.state.lock();
        if state.source == self.source { state.answers.pop_front() } else { None }
    }

    fn questions_max(&self) -> usize {
        QUESTIONS_MAX
    }
}

/// Runs until aborted. There is a connection only while something is to be compared, or damage to be asked about.
pub(crate) async fn run(
    config: AgentConfig,
    (credentials, peers): (Arc<LiveCredentials>, Peers),
    comparisons: Arc<Comparisons>,
) {
    let mut retry = Retry::new(&config.retry, &peers, &config.agent.process_server, UnixNanos::now().0);
    let resyncs = &comparisons.resyncs;
    loop {
        let damage = resyncs.take_damage_question();
        if !damage && !resyncs.wants_turn() {
            resyncs.changed().await;
            continue;
        }
        comparisons.ask_all_again();
        let ended = converse(&config, &credentials.current(), &comparisons, damage, &mut retry).await;
        if let Err(error) = ended {
            resyncs.turn_lost();
            if damage {
                resyncs.damage_unanswered();
            }
            let pause = match error.downcast_ref::<WireError>() {
                Some(error) => retry.failed(error),
                // An answer that cannot be opened: another one may.
                None => retry.refused(FailureClass::Recoverable),
            };
            let next_s = pause.wait.as_secs_f64();
            tracing::warn!(error = format!("{error:#}"), next_s, "comparison with the target interrupted");
            retry.pause(pause, credentials.renewed()).await;
        }
    }
}

/// Until nothing is to be asked any more.
async fn converse(
    config: &AgentConfig,
    credentials: &Credentials,
    comparisons: &Comparisons,
    damage: bool,
    retry: &mut Retry,
) -> anyhow::Result<()> {
    let (group, generation) = (config.agent.group, config.agent.generation);
    let server = &config.agent.process_server;
    let connection = wire::connect_for(Purpose::Compare, server, Role::ProcessServer, credentials).await?;
    let id = Conversation::id()?;
    let conversation = Conversation::new(&comparisons.key, group, generation, &id);
    let mut comparison = Comparison::open(connection, group, generation, id).await?;
    loop {
        let turn = comparison.turn().await?;
        comparisons.resyncs.turn(turn);
        if turn.ahead == 0 {
            break;
        }
        tracing::debug!(ahead = turn.ahead, "waiting for the turn to compare");
    }
    retry.succeeded();
    if damage {
        ask_for_damage(comparisons, &conversation, &mut comparison).await?;
    }
    while comparisons.resyncs.wants_turn() {
        // A turn that came for the sake of the damage is good for what follows from it.
        comparisons.resyncs.turn(Turn { ahead: 0, at_once: 0 });
        for (number, question) in comparisons.unsent() {
            let sealed = Bytes::from(conversation.seal_question(number, &question));
            comparison.send(number, sealed).await?;
        }
        tokio::select! {
            answer = comparison.next() => {
                let (number, message) = answer?;
                let granules = comparisons.granules(number);
                if granules > 0 {
                    comparisons.answered(number, conversation.open_answer(number, granules, &message)?);
                    retry.succeeded();
                }
            }
            () = comparisons.asked.notified() => {}
            () = comparisons.resyncs.changed() => {}
        }
    }
    Ok(())
}

/// Asks which granules the target knows to be damaged, and plans to compare them.
async fn ask_for_damage(
    comparisons: &Comparisons,
    conversation: &Conversation,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    // Numbers of comparisons are above these.
    let mut number = 0;
    for (volume, id) in comparisons.volumes.iter().enumerate() {
        let mut first = Granule(0);
        loop {
            number += 1;
            let question = conversation.seal_question(number, &CompareQuestion::damaged(*id, first));
            comparison.send(number, question.into()).await?;
            let (answered, message) = comparison.next().await?;
            ensure!(answered == number, "answer {answered} came to question {number} about damage");
            let CompareAnswer::Damaged(granules) = conversation.open_answer(number, 0, &message)? else {
                break;
            };
            let Some(last) = granules.last() else { break };
            first = Granule(last.0 + 1);
            let more = granules.len() == DAMAGED_GRANULES_MAX;
            tracing::warn!(%id, granules = granules.len(), "the target has damaged granules; they are compared");
            comparisons.resyncs.damaged(volume, granules);
            if !more {
                break;
            }
        }
    }
    Ok(())
}
