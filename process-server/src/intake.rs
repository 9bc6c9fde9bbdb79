//! Taking one agent's changesets.
//!
//! Consistency: the cache keeps the order and refuses everything else. Crash consistency: "held" is told only once the
//! cache says that it is durable. Retries: none; after any failure the agent connects again and hears what is held.
//! Cancellation: when the connection or the server ends, the unfinished changeset is discarded, what was ended is held.
//!
//! Memory: what an agent may have under way is [`INTAKE_WINDOW`] bytes, given back as bytes reach the cache's files; and up
//! to [`INTAKE_BACKLOG_MAX`] messages while the cache is full. Bytes count against the window until they are written, and
//! are written only into space that was set aside for the whole changeset.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, Epoch, Generation};
use cache::{AppendError, Appender, CacheError, Closed, Event, Position};
use control::{AgentReport, StateCode};
use tokio::sync::{mpsc, oneshot, watch};
use wire::{Answerer, Condition, Held, Incoming, Receiver, RefusalCode, Role, Sender};

use crate::hub::{Hub, Turn};
use crate::server::Server;

/// Bytes that an agent may have under way and this server in memory. More wait at the agent.
pub const INTAKE_WINDOW: ByteCount = ByteCount::mib(8);
/// Messages that are kept while the cache has no room. More wait in the network.
pub const INTAKE_BACKLOG_MAX: usize = 4096;
/// How long a connection that has a group must be silent before another of the same group replaces it. Agents report
/// several times in that time.
pub const TAKEOVER_WAIT: Duration = Duration::from_secs(3);

/// How long a target may take to say what it holds.
const ADOPT_TIME_MAX: Duration = Duration::from_secs(5);

/// Why a delivery is refused.
struct Refusal {
    code: RefusalCode,
    state: Option<StateCode>,
    message: String,
}

/// Serves one connection until it ends.
pub(crate) async fn serve(server: &Arc<Server>, mut receiver: Receiver) {
    let answerer = receiver.answerer();
    let (group, generation, agent) = (receiver.group(), receiver.generation(), receiver.peer().to_string());
    match deliver(server, &mut receiver).await {
        Ok(()) => tracing::info!(%group, agent, "delivery ended"),
        Err(Refusal { code, state, message }) => {
            tracing::warn!(%group, %generation, agent, %code, "delivery refused: {message}");
            if let Some(state) = state
                && let Some(hub) = server.known_hub(group)
            {
                hub.trouble(state, &message);
            }
            answerer.refuse(code, &message);
        }
    }
}

async fn deliver(server: &Arc<Server>, receiver: &mut Receiver) -> Result<(), Refusal> {
    let (group, generation) = (receiver.group(), receiver.generation());
    let peer = receiver.peer().clone();
    if peer.role != Role::Agent {
        let message = format!("deliver to a process server: {peer} is not an agent");
        return Err(Refusal { code: RefusalCode::Unauthorised, state: None, message });
    }
    let Some(hub) = server.hub(group) else {
        let message = format!(
            "deliver for group {group}: no target is configured for it; add a [[group]] with its targets"
        );
        return Err(Refusal { code: RefusalCode::UnknownGroup, state: None, message });
    };
    let turn = hub.claim(&peer.name, TAKEOVER_WAIT).await.map_err(|other| {
        let message = format!(
            "deliver for group {group}: agent {other:?} is connected and delivers; if two machines have the same \
             credentials, stop one of them"
        );
        Refusal { code: RefusalCode::Busy, state: None, message }
    })?;

    if server.cache.knows_nothing(group) || server.cache.held(group).generation < generation {
        adopt(server, &hub, generation).await?;
    }
    let (events, heard) = mpsc::unbounded_channel();
    let told = hub.clone();
    let observer = Arc::new(move |event| {
        // Not left to the task: what is held must be forwarded also when the agent has gone meanwhile.
        if let Event::Held(epoch) = event {
            told.hold(Position { generation, epoch });
        }
        // Fails only when the task has ended.
        let _ = events.send(event);
    });
    let (ready, opened) = oneshot::channel();
    let opening = server.cache.appender_with(group, generation, observer, move |appender| {
        let _ = ready.send(appender);
    });
    opening.map_err(refused)?;
    // On a full disk it may take long until what came before is durable.
    let appender = tokio::select! {
        opened = opened => opened.unwrap_or(Err(CacheError::Closing.into())).map_err(refused)?,
        () = server.stopping() => return Err(refused(CacheError::Closing.into())),
    };

    let answerer = receiver.answerer();
    // Subscribed before it is read, so that no change between is missed.
    let mut applied = hub.applied.subscribe();
    let applied_now = applied.borrow_and_update().epoch_in(generation);
    let held = Held { held: appender.held(), applied: applied_now.min(appender.held()) };
    tracing::info!(%group, %generation, held = %held.held, agent = %peer, "delivery begins");
    match server.cache.is_adopted(group) {
        true => receiver.accept_rebased(held, INTAKE_WINDOW),
        false => receiver.accept(held, INTAKE_WINDOW),
    }
    let mut condition = hub.condition.subscribe();
    condition.mark_changed();
    let waiting = VecDeque::new();
    let intake = Intake { hub, turn, generation, answerer, appender, held, applied, condition, waiting };
    intake.run(server, receiver, heard).await
}

/// This cache has never held anything of the group's generation. If its targets hold something, an earlier cache was lost, or they
/// have failed over to this generation, whose epochs are numbered on: the cache begins after them. All targets must have
/// answered, as what one holds must not be numbered again. One that does not answer makes it begin like a new group, which an
/// agent or target that knows better refuses; but a generation that is not the first is known to begin somewhere, and waits.
async fn adopt(server: &Arc<Server>, hub: &Hub, generation: Generation) -> Result<(), Refusal> {
    let is_later = server.cache.held(hub.group).generation < generation && generation > Generation(1);
    let (mut holds, mut histories, mut fenced) = (Vec::new(), Vec::new(), 0);
    for route in &hub.routes {
        let asked = async {
            let credentials = server.credentials.current();
            let connection = wire::connect(&route.address, Role::TargetServer, &credentials).await?;
            Sender::open(connection, hub.group, generation).await
        };
        let (code, why) = match tokio::time::timeout(ADOPT_TIME_MAX, asked).await {
            Ok(Ok((sender, _))) => {
                holds.push((route.address.clone(), Position { generation, epoch: sender.held().applied }));
                histories.push(sender.history());
                continue;
            }
            Ok(Err(error)) => (error.refusal(), error.to_string()),
            Err(_) => (None, "it does not answer".to_owned()),
        };
        tracing::debug!(group = %hub.group, target = route.address, why, "ask what a target holds");
        let message = format!(
            "deliver for group {}: ask target {} where generation {generation} begins: {why}",
            hub.group, route.address
        );
        if !is_later {
            if code != Some(RefusalCode::Generation) {
                return Ok(());
            }
            fenced += 1;
            // Nobody takes it, and nobody will: what would be kept for is for nobody.
            if fenced == hub.routes.len() {
                return Err(Refusal {
                    code: RefusalCode::Generation,
                    state: Some(StateCode::Fenced),
                    message,
                });
            }
            continue;
        }
        return Err(match code {
            Some(RefusalCode::Generation) => {
                Refusal { code: RefusalCode::Generation, state: Some(StateCode::Fenced), message }
            }
            _ => Refusal { code: RefusalCode::Busy, state: None, message },
        });
    }
    if holds.len() < hub.routes.len() {
        return Ok(());
    }
    if histories.iter().any(|history| *history != histories[0]) {
        let message = format!(
            "deliver for group {}: its targets have begun generation {generation} each on its own: one has another history. \
             Begin a new generation with the target that is to go on, and leave the other one out",
            hub.group
        );
        return Err(Refusal { code: RefusalCode::Busy, state: Some(StateCode::Gap), message });
    }
    let (server, group) = (server.clone(), hub.group);
    let adopt = move || {
        let adopted = server.cache.adopt(group, &holds)?;
        if let (true, Some(history), Some((_, first))) = (adopted, histories.first(), holds.first()) {
            // Else it is believed when it is forwarded to for the first time.
            drop(server.cache.follow(group, *first, *history));
        }
        Ok(adopted)
    };
    let adopted = tokio::task::spawn_blocking(adopt).await;
    if adopted.unwrap_or(Err(CacheError::Closing)).map_err(|error| refused(error.into()))? {
        tracing::warn!(%group, "nothing is held of this group, but its targets have it: the cache goes on after them");
    }
    Ok(())
}

struct Intake {
    hub: Arc<Hub>,
    turn: Turn,
    generation: Generation,
    answerer: Answerer,
    appender: Appender,
    held: Held,
    applied: watch::Receiver<Position>,
    condition: watch::Receiver<Option<Condition>>,
    /// What arrived since the cache had no room; the first is a beginning.
    waiting: VecDeque<Incoming>,
}

impl Intake {
    async fn run(
        mut self,
        server: &Server,
        receiver: &mut Receiver,
        mut events: mpsc::UnboundedReceiver<Event>,
    ) -> Result<(), Refusal> {
        let mut stopping = std::pin::pin!(server.stopping());
        loop {
            tokio::select! {
                biased;
                () = &mut stopping => {
                    let message = "deliver: this process server is stopping".to_owned();
                    return Err(Refusal { code: RefusalCode::Stopping, state: None, message });
                }
                event = events.recv() => match event {
                    Some(event) => self.told(event)?,
                    None => return Err(refused(CacheError::Closing.into())),
                },
                Ok(()) = self.applied.changed() => self.tell(self.held.held),
                Ok(()) = self.condition.changed() => {
                    if let Some(condition) = *self.condition.borrow_and_update() {
                        self.answerer.tell(condition);
                    }
                }
                incoming = receiver.next(), if self.waiting.len() < INTAKE_BACKLOG_MAX => match incoming {
                    Ok(Some(incoming)) => {
                        self.turn.heard();
                        self.take(incoming)?;
                    }
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        tracing::info!(group = %self.hub.group, %error, "delivery's connection ended");
                        return Ok(());
                    }
                },
            }
        }
    }

    /// Tells the agent what is held, and what of it all targets have applied. Both are looked at whenever one changes:
    /// the targets may be told of a changeset, and apply it, before this task hears that it is held.
    fn tell(&mut self, epoch: Epoch) {
        let applied = self.applied.borrow_and_update().epoch_in(self.generation).min(epoch);
        let held = Held { held: epoch, applied: applied.max(self.held.applied) };
        if held != self.held {
            self.held = held;
            self.answerer.hold(held);
        }
    }

    fn told(&mut self, event: Event) -> Result<(), Refusal> {
        match event {
            Event::Written(bytes) => self.answerer.grant(bytes),
            Event::Held(epoch) => self.tell(epoch),
            Event::Room => {
                let waiting = std::mem::take(&mut self.waiting);
                for incoming in waiting {
                    self.take(incoming)?;
                }
            }
            Event::Closed(Closed::Superseded) => return Err(refused(AppendError::Superseded)),
            Event::Closed(Closed::Lost(reason)) => {
                let message =
                    format!("deliver for group {}: the cache lost changesets: {reason}", self.hub.group);
                return Err(Refusal { code: RefusalCode::Gap, state: Some(StateCode::Gap), message });
            }
            Event::Closed(Closed::Poisoned(reason)) => {
                return Err(refused(CacheError::Poisoned(reason).into()));
            }
        }
        Ok(())
    }

    fn take(&mut self, incoming: Incoming) -> Result<(), Refusal> {
        if let Incoming::Report(json) = incoming {
            match serde_json::from_str::<AgentReport>(&json) {
                Ok(report) => self.hub.reported(report),
                Err(error) => tracing::debug!(group = %self.hub.group, %error, "read an agent's report"),
            }
            return Ok(());
        }
        if !self.waiting.is_empty() {
            self.waiting.push_back(incoming);
            return Ok(());
        }
        match incoming {
            Incoming::Begin { epoch, total } => match self.appender.begin(epoch, total) {
                Err(error @ AppendError::Full { .. }) => {
                    tracing::debug!(group = %self.hub.group, %epoch, %error, "an agent waits");
                    self.waiting.push_back(Incoming::Begin { epoch, total });
                }
                begun => begun.map_err(refused)?,
            },
            Incoming::Data(bytes) => {
                self.hub.received.add(bytes.len() as u64);
                self.appender.push(bytes).map_err(refused)?;
            }
            Incoming::End => self.appender.end().map_err(refused)?,
            Incoming::Report(_) => {}
        }
        Ok(())
    }
}

fn refused(error: AppendError) -> Refusal {
    let (code, state) = match &error {
        AppendError::Replayed { .. } => (RefusalCode::Replayed, None),
        AppendError::Gap { .. } => (RefusalCode::Gap, Some(StateCode::Gap)),
        AppendError::OldGeneration { .. } => (RefusalCode::Generation, Some(StateCode::Fenced)),
        // What was acknowledged is gone, so nothing may follow it: to the agent that is a gap it cannot fill.
        AppendError::Lost { .. } => (RefusalCode::Gap, Some(StateCode::Gap)),
        AppendError::Full { .. } => (RefusalCode::Full, Some(StateCode::CacheFull)),
        AppendError::TooLarge { .. } => (RefusalCode::Limit, Some(StateCode::Misconfigured)),
        AppendError::Superseded => (RefusalCode::Superseded, None),
        AppendError::Protocol(_) => (RefusalCode::BadRequest, None),
        AppendError::Cache(CacheError::Closing) => (RefusalCode::Stopping, None),
        AppendError::Cache(_) => (RefusalCode::Failed, Some(StateCode::StoreFailed)),
    };
    Refusal { code, state, message: format!("deliver: {error}") }
}

const _: () = assert!(
    INTAKE_WINDOW.get() >= 4 * cache::CHUNK_BYTES as u64,
    "a chunk is written while the next arrives"
);
