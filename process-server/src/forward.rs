//! Forwarding one group's changesets to one target.
//!
//! Consistency: the target says what it holds, delivery goes on after it, in order; the cache checks that this can be the
//! same history. Crash consistency: the cursor is the cache's; a target that is told something twice refuses it. Retries:
//! as [`wire::Retry`] says; the state names the reason and the next try. A new generation is tried at once. Cancellation: dropping the task drops the connection; the target discards the unfinished changeset.
//!
//! Memory: two chunks being read ([`cache::CHUNK_BYTES`]) and what the wire queues; further bytes wait for the target's credit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Epoch, Generation, HistoryId, UnixNanos};
use bytes::Bytes;
use cache::{HeldChangeset, Position, ReadError};
use control::StateCode;
use tokio::task::JoinHandle;
use wire::{FailureClass, Receipts, RefusalCode, Retry, Role, Sender, WireError, Woken};

use crate::hub::{Hub, Route};
use crate::server::Server;

/// How long the cache is left alone after it could not be read.
const READ_RETRY_WAIT: Duration = Duration::from_secs(5);

/// Why a session ended.
enum Ended {
    /// Everything of its generation is applied, and the next changeset is of a later one; or what it was opened for is not so any more.
    NextGeneration,
    Wire(WireError),
    Read(ReadError),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Ended {
        Ended::Wire(error)
    }
}

impl From<ReadError> for Ended {
    fn from(error: ReadError) -> Ended {
        Ended::Read(error)
    }
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mend {
    /// Trying again may help.
    Time,
    /// This generation cannot be delivered there unless somebody mends something; a later one can.
    Generation,
    /// Somebody must mend something.
    Person,
}

pub(crate) struct Forwarder {
    pub(crate) server: Arc<Server>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) route: Arc<Route>,
}

impl Forwarder {
    /// Runs until dropped.
    pub(crate) async fn run(self) {
        let mut held = self.hub.held.subscribe();
        self.route.idle();
        // The sender is the hub's, which this task keeps.
        let _ = held.wait_for(|held| *held != Position::NONE).await;
        let seed = UnixNanos::now().0 ^ u64::from(self.hub.group.0[0]) << 56;
        let server = &self.server;
        let mut retry = Retry::new(&server.retry_policy(), &server.peers, &self.route.address, seed);
        // Generations before it are given up.
        let mut from = Generation(0);
        // Said already.
        let mut complaint: Option<String> = None;
        loop {
            let generation = self.next_generation().max(from);
            let connected = Instant::now();
            let ended = self.session(generation, &mut retry).await;
            retry.lasted(connected.elapsed());
            let (state, mend, message) = match &ended {
                Ended::NextGeneration => continue,
                Ended::Wire(error) => {
                    let (state, mend) = meaning(error);
                    (state, mend, error.to_string())
                }
                Ended::Read(error) => {
                    let (state, mend) = match error {
                        ReadError::Cache(_) => (StateCode::StoreFailed, Mend::Time),
                        ReadError::Freed(_) => (StateCode::Replicating, Mend::Time),
                        ReadError::UnknownTarget { .. } => (StateCode::Misconfigured, Mend::Person),
                        ReadError::Damaged { .. } => (StateCode::Corrupt, Mend::Generation),
                        ReadError::TooLate { .. } | ReadError::Ahead { .. } | ReadError::OtherHistory(_) => {
                            (StateCode::Gap, Mend::Generation)
                        }
                    };
                    (state, mend, error.to_string())
                }
            };
            let pause = match &ended {
                Ended::Wire(error) => retry.failed(error),
                Ended::Read(_) if mend == Mend::Time => retry.after(READ_RETRY_WAIT),
                _ => retry.refused(FailureClass::NonRecoverable),
            };
            self.route.failed(state, &message, pause.next_try());
            self.hub.left(&self.route);
            let (group, target, next_s) = (self.hub.group, &self.route.address, pause.wait.as_secs_f64());
            if mend == Mend::Time {
                tracing::warn!(%group, target, next_s, "forward: {message}");
            } else if complaint.as_ref() != Some(&message) {
                tracing::error!(%group, target, %generation, next_s, "forward stopped: {message}");
                complaint = Some(message);
            }
            tokio::select! {
                later = self.wait_generation(generation), if mend == Mend::Generation => {
                    tracing::info!(%group, target, generation = %later, "forward: a new generation has begun");
                    from = later;
                }
                woken = retry.pause(pause, server.credentials.renewed()) => {
                    if woken == Woken::Returned {
                        tracing::info!(%group, target, "forward: the target is back");
                    }
                }
            }
        }
    }

    /// Of the next changeset to send, or of the last one held.
    fn next_generation(&self) -> Generation {
        let held = *self.hub.held.borrow();
        let cursor = self.server.cache.cursor(self.hub.group, &self.route.address);
        let next = self.server.cache.next_after(self.hub.group, cursor.unwrap_or_default());
        match (next, cursor) {
            (Ok(Some(next)), _) => next.position().generation,
            (Ok(None), _) => held.generation,
            (Err(_), Some(cursor)) => cursor.generation,
            (Err(_), None) => held.generation,
        }
    }

    async fn wait_generation(&self, after: Generation) -> Generation {
        let mut held = self.hub.held.subscribe();
        loop {
            if let Some(generation) = self.server.cache.generation_after(self.hub.group, after) {
                return generation;
            }
            let _ = held.changed().await;
        }
    }

    async fn session(&self, generation: Generation, retry: &mut Retry) -> Ended {
        let (group, target) = (self.hub.group, &self.route.address);
        let history = self.server.cache.history(group, generation);
        let opened = async {
            let connection =
                wire::connect(target, Role::TargetServer, &self.server.credentials.current()).await?;
            Sender::open_of(connection, group, generation, history).await
        };
        let (sender, receipts) = match opened.await {
            Ok(halves) => halves,
            Err(error) => return error.into(),
        };
        let opening = sender.held();
        let holds = Position { generation, epoch: opening.held };
        let applied = Position { generation, epoch: opening.applied };
        if let Err(error) = self.contact(applied, sender.history()).await {
            return error.into();
        }
        let holds = match self.server.cache.next_after(group, holds) {
            Err(ReadError::TooLate { .. }) if opening.held == Epoch::NONE => match self.join().await {
                Ok(begins) => begins,
                Err(error) => return error.into(),
            },
            _ => holds,
        };
        self.applied();
        if holds.generation != generation || self.server.cache.history(group, generation) != history {
            // Known since it was opened; it begins with what it was told.
            return Ended::NextGeneration;
        }
        self.route.connected();
        tracing::info!(%group, target, %generation, held = %opening.held, "forwarding");
        // A refusal tells more than the broken connection that follows it, so receipts are looked at first.
        tokio::select! {
            biased;
            ended = self.receive(receipts, generation, retry) => ended,
            ended = self.send(sender, holds) => ended,
        }
    }

    async fn contact(&self, applied: Position, history: HistoryId) -> Result<(), ReadError> {
        let (server, group, target) = (self.server.clone(), self.hub.group, self.route.address.clone());
        let contact = tokio::task::spawn_blocking(move || {
            server.cache.follow(group, applied, history)?;
            server.cache.contact(group, &target, applied)
        });
        contact.await.unwrap_or(Err(ReadError::Cache(cache::CacheError::Closing)))
    }

    /// The target holds nothing, and what it would have to begin with is gone: it begins after what is held.
    async fn join(&self) -> Result<Position, ReadError> {
        let (server, group, target) = (self.server.clone(), self.hub.group, self.route.address.clone());
        let join = tokio::task::spawn_blocking(move || server.cache.join(group, &target));
        let position = join.await.unwrap_or(Err(ReadError::Cache(cache::CacheError::Closing)))?;
        tracing::warn!(
            %group, target = self.route.address, %position,
            "the target holds nothing: it begins here, and has no point before all was compared with the source"
        );
        Ok(position)
    }

    /// Tells the agent's side how far all targets are.
    fn applied(&self) {
        self.hub.applied.send_if_modified(|applied| {
            // Read in here: of two forwarders that come at once, the later sees what the earlier brought.
            let now = self.server.cache.applied_by_all(self.hub.group);
            std::mem::replace(applied, now) != now
        });
    }

    async fn receive(&self, mut receipts: Receipts, generation: Generation, retry: &mut Retry) -> Ended {
        let mut condition = receipts.condition();
        loop {
            let receipt = tokio::select! {
                receipt = receipts.next() => receipt,
                Ok(()) = condition.changed() => {
                    if let Some(condition) = *condition.borrow_and_update() {
                        self.hub.conditioned(&self.route, condition);
                    }
                    continue;
                }
            };
            match receipt {
                Ok(held) => {
                    let applied = Position { generation, epoch: held.applied };
                    if let Err(error) =
                        self.server.cache.applied(self.hub.group, &self.route.address, applied)
                    {
                        return error.into();
                    }
                    retry.succeeded();
                    self.route.progress.notify_one();
                    self.applied();
                }
                Err(error) => return error.into(),
            }
        }
    }

    async fn send(&self, mut sender: Sender, mut sent: Position) -> Ended {
        let group = self.hub.group;
        let mut held = self.hub.held.subscribe();
        loop {
            held.borrow_and_update();
            match self.server.cache.next_after(group, sent) {
                Ok(Some(next)) if next.position().generation == sent.generation => {
                    sent = next.position();
                    if let Err(ended) = self.deliver(&mut sender, next).await {
                        return ended;
                    }
                    continue;
                }
                // What was sent must be applied before the next generation takes over the target.
                Ok(Some(_)) if self.server.cache.cursor(group, &self.route.address) >= Some(sent) => {
                    return Ended::NextGeneration;
                }
                Ok(_) => {}
                Err(error) => return error.into(),
            }
            tokio::select! {
                _ = held.changed() => {}
                () = self.route.progress.notified() => {}
            }
        }
    }

    async fn deliver(&self, sender: &mut Sender, changeset: HeldChangeset) -> Result<(), Ended> {
        sender.begin(changeset.position().epoch, changeset.total()).await?;
        let mut reading = read(changeset);
        loop {
            // The runtime ends only with the server.
            let (changeset, chunk) =
                reading.await.map_err(|_| ReadError::Cache(cache::CacheError::Closing))?;
            let Some(bytes) = chunk? else { break };
            // The next one is read while this one is sent.
            reading = read(changeset);
            let count = bytes.len() as u64;
            sender.data(bytes).await?;
            self.route.sent.add(count);
        }
        Ok(sender.end().await?)
    }
}

type Read = (HeldChangeset, Result<Option<Bytes>, ReadError>);

fn read(mut changeset: HeldChangeset) -> JoinHandle<Read> {
    tokio::task::spawn_blocking(move || {
        let chunk = changeset.next_chunk();
        (changeset, chunk)
    })
}

fn meaning(error: &WireError) -> (StateCode, Mend) {
    match error {
        WireError::Tls { .. } | WireError::Credentials(_) => (StateCode::Unauthenticated, Mend::Person),
        WireError::Identity { .. } => (StateCode::Unauthorised, Mend::Person),
        WireError::Handshake { .. } => (StateCode::VersionMismatch, Mend::Person),
        WireError::Refused { code, retry, .. } => {
            let state = match code {
                RefusalCode::Version => StateCode::VersionMismatch,
                RefusalCode::Unauthorised | RefusalCode::WrongGroup => StateCode::Unauthorised,
                RefusalCode::UnknownGroup | RefusalCode::Limit => StateCode::Misconfigured,
                RefusalCode::Generation => return (StateCode::Fenced, Mend::Generation),
                RefusalCode::Gap | RefusalCode::Replayed => StateCode::Gap,
                RefusalCode::Corrupt | RefusalCode::BadRequest => StateCode::Corrupt,
                RefusalCode::Full => StateCode::TargetFull,
                RefusalCode::Failed => StateCode::StoreFailed,
                RefusalCode::Superseded => StateCode::Superseded,
                _ => StateCode::Unreachable,
            };
            (state, if *retry { Mend::Time } else { Mend::Person })
        }
        error if error.is_retryable() => (StateCode::Unreachable, Mend::Time),
        _ => (StateCode::Misconfigured, Mend::Person),
    }
}
