//! Asks the target, through the process server, whether its replica holds what a suspect granule of a disk holds.
//!
//! Retries: when the conversation ends, what is open is asked again in a new one, until it is answered. What the peers refuse
//! for good is tried again at slow intervals; the suspects wait, and no point is offered meanwhile.
//! Restarts of the source: each source has a place of its own; answers to questions of an earlier one are thrown away.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Epoch, Granule, UnixNanos, VolumeId};
use bytes::Bytes;
use capture::{Answer, Comparer, Question, Verdict, VolumeIndex};
use changeset::{CompareAnswer, CompareQuestion, Conversation, Digester, GranuleDigest, GroupKey};
use parking_lot::Mutex;
use tokio::sync::Notify;
use wire::{Comparison, Credentials, Purpose, Retry, Role, WireError};

use crate::config::AgentConfig;
use crate::outbox::Outbox;
use crate::volumes::Volume;

/// Questions that may be open: the target reads as far ahead, 16 MiB each.
const QUESTIONS_MAX: usize = 32;
/// The wait before a conversation that was refused for good is tried again.
const REFUSED_WAIT: Duration = Duration::from_secs(60);

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
    key: GroupKey,
    digester: Digester,
    volumes: Vec<VolumeId>,
}

impl Comparisons {
    pub(crate) fn new(config: &AgentConfig, key: &GroupKey, volumes: &[Volume]) -> Comparisons {
        Comparisons {
            state: Mutex::default(),
            asked: Notify::new(),
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
        };
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
        outbox.is_opened().then(|| outbox.progress().held.held != Epoch::NONE)
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

/// Runs until aborted. There is a connection only while something is asked.
pub(crate) async fn run(config: AgentConfig, credentials: Credentials, comparisons: Arc<Comparisons>) {
    let began = Instant::now();
    let mut retry = Retry::new(UnixNanos::now().0);
    loop {
        while comparisons.state.lock().open.is_empty() {
            comparisons.asked.notified().await;
        }
        comparisons.ask_all_again();
        match converse(&config, &credentials, &comparisons, &mut retry).await {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "comparison with the target interrupted");
                let refused = error.downcast_ref::<WireError>().is_some_and(|error| !error.is_retryable());
                let wait = retry.failed(began.elapsed());
                tokio::time::sleep(if refused { wait.max(REFUSED_WAIT) } else { wait }).await;
            }
        }
    }
}

/// Until nothing is open any more.
async fn converse(
    config: &AgentConfig,
    credentials: &Credentials,
    comparisons: &Comparisons,
    retry: &mut Retry,
) -> anyhow::Result<()> {
    let (group, generation) = (config.agent.group, config.agent.generation);
    let server = &config.agent.process_server;
    let connection = wire::connect_for(Purpose::Compare, server, Role::ProcessServer, credentials).await?;
    let id = Conversation::id()?;
    let conversation = Conversation::new(&comparisons.key, group, generation, &id);
    let mut comparison = Comparison::open(connection, group, generation, id).await?;
    loop {
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
        }
        if comparisons.state.lock().open.is_empty() {
            return Ok(());
        }
    }
}
