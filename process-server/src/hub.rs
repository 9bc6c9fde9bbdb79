//! What the tasks of one group tell each other, and what is shown of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{GroupId, UnixNanos};
use cache::{CacheGroup, Position};
use control::{AgentReport, Bottleneck, ProcessGroup, StateCode, TargetLink};
use telemetry::Meter;
use tokio::sync::{Notify, watch};
use wire::Condition;

/// One group: its agent's side and its targets' sides.
pub(crate) struct Hub {
    pub(crate) group: GroupId,
    /// The last held changeset.
    pub(crate) held: watch::Sender<Position>,
    /// What all targets have applied.
    pub(crate) applied: watch::Sender<Position>,
    /// How the replicas are, all together.
    pub(crate) condition: watch::Sender<Option<Condition>>,
    pub(crate) received: Meter,
    pub(crate) routes: Vec<Arc<Route>>,
    agent: Mutex<Agent>,
}

#[derive(Default)]
struct Agent {
    connections: u64,
    current: Option<Current>,
    report: Option<AgentReport>,
    trouble: Option<(StateCode, String)>,
}

/// The agent's connection.
struct Current {
    number: u64,
    name: String,
    /// Changes whenever something arrives; closed when the connection has ended.
    heard: watch::Receiver<()>,
}

/// An agent's turn. Ends when dropped.
pub(crate) struct Turn {
    hub: Arc<Hub>,
    number: u64,
    heard: watch::Sender<()>,
}

/// One target of a group, as it is shown.
pub(crate) struct Route {
    pub(crate) address: String,
    pub(crate) sent: Meter,
    /// The target has applied something.
    pub(crate) progress: Notify,
    /// What the target says of its replica.
    condition: Mutex<Option<Condition>>,
    shown: Mutex<Shown>,
}

#[derive(Clone, Default)]
struct Shown {
    connected: bool,
    state: StateCode,
    last_error: Option<String>,
    next_try: Option<UnixNanos>,
}

impl Hub {
    pub(crate) fn new(group: GroupId, held: Position, applied: Position, targets: &[String]) -> Hub {
        let route = |address: &String| {
            let shown = Shown { state: StateCode::Starting, ..Shown::default() };
            Arc::new(Route {
                address: address.clone(),
                sent: Meter::new(),
                progress: Notify::new(),
                condition: Mutex::default(),
                shown: Mutex::new(shown),
            })
        };
        Hub {
            group,
            held: watch::Sender::new(held),
            applied: watch::Sender::new(applied),
            condition: watch::Sender::new(None),
            received: Meter::new(),
            routes: targets.iter().map(route).collect(),
            agent: Mutex::default(),
        }
    }

    fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the group to a new connection, unless the one that has it shows a sign of life within `wait`: then two agents
    /// speak for the group (a cloned machine, say), and their histories must not be mixed. A connection that broke
    /// without a word is silent, and is replaced.
    ///
    /// # Errors
    /// The name of the agent that has the group.
    pub(crate) async fn claim(self: &Arc<Hub>, name: &str, wait: Duration) -> Result<Turn, String> {
        let current = {
            let mut agent = self.agent();
            agent.current.as_mut().map(|current| {
                current.heard.borrow_and_update();
                (current.name.clone(), current.heard.clone())
            })
        };
        if let Some((other, mut heard)) = current
            && let Ok(Ok(())) = tokio::time::timeout(wait, heard.changed()).await
        {
            return Err(other);
        }
        let (sender, heard) = watch::channel(());
        let mut agent = self.agent();
        agent.connections += 1;
        let number = agent.connections;
        agent.current = Some(Current { number, name: name.to_owned(), heard });
        agent.trouble = None;
        drop(agent);
        Ok(Turn { hub: self.clone(), number, heard: sender })
    }

    /// More is held: wakes the forwarders.
    pub(crate) fn hold(&self, position: Position) {
        self.held.send_if_modified(|held| {
            let more = position > *held;
            *held = position.max(*held);
            more
        });
    }

    /// A target has said how its replica is: tells the agent's side.
    pub(crate) fn conditioned(&self, route: &Route, condition: Condition) {
        *route.condition() = Some(condition);
        self.tell_condition();
    }

    /// A target cannot be reached: nothing can be compared with it, and what it lacks must not keep the source at that.
    pub(crate) fn left(&self, route: &Route) {
        if let Some(condition) = &mut *route.condition() {
            condition.unproven = block::ByteCount::ZERO;
        }
        self.tell_condition();
    }

    fn tell_condition(&self) {
        let known = self.routes.iter().filter_map(|route| *route.condition());
        let all = known.reduce(|sum, one| Condition {
            has_point: sum.has_point || one.has_point,
            damaged: sum.damaged.saturating_add(one.damaged),
            unproven: sum.unproven.saturating_add(one.unproven),
        });
        self.condition.send_if_modified(|told| std::mem::replace(told, all) != all);
    }

    /// The targets, those first that a comparison is of use for: what was never compared, then what is damaged.
    pub(crate) fn routes_by_need(&self) -> Vec<&Arc<Route>> {
        let mut routes: Vec<&Arc<Route>> = self.routes.iter().collect();
        routes.sort_by_key(|route| {
            let told = route.condition().unwrap_or_default();
            std::cmp::Reverse((told.unproven, told.damaged))
        });
        routes
    }

    pub(crate) fn reported(&self, report: AgentReport) {
        self.agent().report = Some(report);
    }

    /// What keeps the agent's changes from being taken; until the next connection is accepted.
    pub(crate) fn trouble(&self, state: StateCode, message: &str) {
        self.agent().trouble = Some((state, message.to_owned()));
    }

    /// What is shown of the group. `server`: what is wrong with the whole server, if anything.
    pub(crate) fn show(&self, cached: Option<&CacheGroup>, server: Option<StateCode>) -> ProcessGroup {
        let held = cached.map_or(Position::NONE, |cached| cached.held);
        let targets: Vec<TargetLink> = self.routes.iter().map(|route| route.show(cached, held)).collect();
        let agent = self.agent();
        let worst = targets.iter().max_by_key(|target| target.state.severity());
        let lost = cached.and_then(|cached| cached.lost.as_ref());
        let lost = lost.filter(|(from, _)| from.generation >= held.generation);
        let (state, last_error) = if let Some((from, reason)) = lost {
            let message = format!(
                "the cache lost {from} and what followed ({reason}); give the group a new generation"
            );
            (StateCode::Gap, Some(message))
        } else if let Some((state, message)) = &agent.trouble {
            (*state, Some(message.clone()))
        } else if let Some(state) = server {
            (state, None)
        } else if let Some(worst) = worst.filter(|worst| worst.state != StateCode::Replicating) {
            let message = worst.last_error.as_ref().map(|error| format!("{}: {error}", worst.address));
            (worst.state, message)
        } else if agent.current.is_none() {
            (StateCode::WaitingForAgent, None)
        } else {
            (StateCode::Replicating, None)
        };
        let mut shown = ProcessGroup {
            group: self.group,
            generation: held.generation,
            agent: agent.current.as_ref().map(|current| current.name.clone()),
            cached: held.epoch,
            cached_bytes: cached.map_or_else(Default::default, |cached| cached.bytes),
            received_bytes_total: block::ByteCount(self.received.total()),
            received_bytes_per_s: self.received.per_second(),
            targets,
            report: agent.report.clone(),
            state,
            last_error,
            bottleneck: None,
        };
        shown.bottleneck = Bottleneck::of(&shown);
        shown
    }
}

impl Turn {
    /// Something arrived.
    pub(crate) fn heard(&self) {
        self.heard.send_replace(());
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut agent = self.hub.agent();
        if agent.current.as_ref().is_some_and(|current| current.number == self.number) {
            agent.current = None;
        }
    }
}

impl Route {
    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn condition(&self) -> MutexGuard<'_, Option<Condition>> {
        self.condition.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn connected(&self) {
        *self.shown() = Shown { connected: true, state: StateCode::Replicating, ..Shown::default() };
    }

    pub(crate) fn failed(&self, state: StateCode, message: &str, next_try: UnixNanos) {
        let (last_error, next_try) = (Some(message.to_owned()), Some(next_try));
        *self.shown() = Shown { connected: false, state, last_error, next_try };
    }

    /// There is nothing to send yet, so nobody was asked.
    pub(crate) fn idle(&self) {
        *self.shown() = Shown { state: StateCode::WaitingForAgent, ..Shown::default() };
    }

    fn show(&self, cached: Option<&CacheGroup>, held: Position) -> TargetLink {
        let target =
            cached.and_then(|cached| cached.targets.iter().find(|target| target.name == self.address));
        let applied = target.and_then(|target| target.applied).unwrap_or_default();
        let Shown { connected, state, last_error, next_try } = self.shown().clone();
        TargetLink {
            address: self.address.clone(),
            connected,
            applied: applied.epoch_in(held.generation),
            backlog_bytes: target.map_or_else(Default::default, |target| target.backlog_bytes),
            sent_bytes_total: block::ByteCount(self.sent.total()),
            sent_bytes_per_s: self.sent.per_second(),
            state,
            last_error,
            next_try,
        }
    }
}
