//! Points that somebody asked for: the thread that runs hooks, freezes, has the engine cut, thaws, and says what became of it.
//!
//! What a point is, is only said when all of it is known: `filesystem` when every filesystem was frozen from before the cut
//! until after it; `application` when besides every hook has succeeded, the last word of each among them. What could not be
//! had makes the point less, down to crash-consistent, and the reason is kept with it.
//!
//! Order: wait until little is left to be read (nothing is quiesced yet); hooks; find filesystems, start the watchdog, write
//! out; freeze; cut; thaw; hooks again; verdict. The epoch is sealed when the verdict has come.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::{Consistency, GroupId, Label, PointNote};
use control::{AgentRefusal, TakenPoint};
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;

use crate::application::ApplicationSection;
use crate::config::AgentConfig;
use crate::freeze::{self, DeviceNumber, Freeze};
use crate::hooks::{self, Action, Hook, Runner};
use crate::order::{MISSED_AT_THE_CUT, Orders, Refusal, Taken};
use crate::seal::Verdict;

/// How long is waited until a freeze would be short enough; past it the point is crash-consistent.
const SETTLE_MAX: Duration = Duration::from_secs(30);
/// The same once applications are quiesced: they wait.
const SETTLE_QUIESCED_MAX: Duration = Duration::from_secs(3);
/// How long is waited for a crash-consistent cut; past it there is no point.
const CRASH_CUT_MAX: Duration = Duration::from_secs(60);
/// What a holder of a lock waits for besides hooks and budget: looking for filesystems and writing them out.
const HOLD_BESIDES: Duration = Duration::from_secs(10);
/// How often the thread looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) consistency: Consistency,
    pub(crate) label: Option<Label>,
}

/// What is told to who asked.
#[derive(Debug)]
pub(crate) enum Event {
    /// What is being done now.
    Doing(String),
    /// The point was cut. Nothing follows.
    Taken(TakenPoint),
    /// There is none. Nothing follows.
    Refused(AgentRefusal, String),
}

struct Request {
    wish: Wish,
    /// Who asked; nobody, when it was the schedule.
    events: Option<UnboundedSender<Event>>,
}

/// What is being taken now.
struct Current {
    wish: Wish,
    since: Instant,
}

/// The way to the thread.
pub(crate) struct Points {
    requests: Mutex<Sender<Request>>,
    current: Arc<Mutex<Option<Current>>>,
}

impl Points {
    /// Begins a point.
    ///
    /// # Errors
    /// When another one is being taken.
    pub(crate) fn begin(
        &self,
        wish: Wish,
        events: UnboundedSender<Event>,
    ) -> Result<(), (AgentRefusal, String)> {
        let mut current = self.current.lock();
        if let Some(current) = &*current {
            let label = current.wish.label.as_ref().map(|label| format!(" {:?}", label.as_str()));
            return Err((
                AgentRefusal::Busy,
                format!(
                    "take a point: another one ({}{}) is being taken since {:.1} s; try again when it is done",
                    current.wish.consistency,
                    label.unwrap_or_default(),
                    current.since.elapsed().as_secs_f64()
                ),
            ));
        }
        let request = Request { wish: wish.clone(), events: Some(events) };
        if self.requests.lock().send(request).is_err() {
            return Err((AgentRefusal::Stopping, "take a point: the agent is stopping".into()));
        }
        *current = Some(Current { wish, since: Instant::now() });
        Ok(())
    }
}

/// What the thread needs.
pub(crate) struct Taker {
    group: GroupId,
    application: ApplicationSection,
    /// Of the volumes, as configured.
    devices: Vec<PathBuf>,
    /// Where hooks keep what they need from one run to the next.
    hook_state: PathBuf,
    /// Where a freeze leaves word for the next agent.
    marker: PathBuf,
    /// The disks are read again and again instead of being followed.
    scanned: bool,
    orders: Arc<Orders>,
    stop: Arc<AtomicBool>,
    current: Arc<Mutex<Option<Current>>>,
}

/// How a freeze with its cut went.
struct Frozen {
    taken: Taken,
    /// Whether everything was frozen from before the cut until after it.
    held: bool,
    /// How long, which filesystems, and why it did not hold.
    note: PointNote,
}

/// A point on the way.
struct Way<'a> {
    events: Option<&'a UnboundedSender<Event>>,
}

impl Way<'_> {
    fn doing(&self, what: impl Into<String>) {
        let what = what.into();
        tracing::debug!(what, "point");
        self.quietly(what);
    }

    /// Without a log: something is frozen.
    fn quietly(&self, what: impl Into<String>) {
        if let Some(events) = self.events {
            // Who asked may have gone; the point is taken all the same.
            let _ = events.send(Event::Doing(what.into()));
        }
    }
}

/// Starts the thread.
/// Where a freeze leaves word for the next agent.
pub(crate) fn freeze_marker(config: &AgentConfig) -> PathBuf {
    config.control_socket().with_extension("frozen")
}

pub(crate) fn start(
    config: &AgentConfig,
    devices: Vec<PathBuf>,
    scanned: bool,
    orders: Arc<Orders>,
    stop: Arc<AtomicBool>,
) -> anyhow::Result<(Arc<Points>, JoinHandle<()>)> {
    let (requests, receiver) = channel();
    let current = Arc::new(Mutex::new(None));
    let taker = Taker {
        group: config.agent.group,
        application: config.application.clone(),
        devices,
        hook_state: config.control_socket().with_extension("hooks"),
        marker: freeze_marker(config),
        scanned,
        orders,
        stop,
        current: current.clone(),
    };
    let thread = std::thread::Builder::new()
        .name("points".into())
        .spawn(move || taker.run(&receiver))
        .context("start the thread that takes points")?;
    Ok((Arc::new(Points { requests: Mutex::new(requests), current }), thread))
}

impl Taker {
    fn run(&self, requests: &Receiver<Request>) {
        let every = self.application.every();
        let mut next = every.map(|every| Instant::now() + every);
        while !self.stop.load(Ordering::SeqCst) {
            let wait = next
                .map_or(LOOK_EVERY, |next| next.saturating_duration_since(Instant::now()).min(LOOK_EVERY));
            match requests.recv_timeout(wait) {
                Ok(request) => self.serve(&request),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    if let (Some(every), Some(due)) = (every, next)
                        && due <= Instant::now()
                    {
                        next = Some(Instant::now() + every);
                        self.serve_schedule();
                    }
                }
            }
        }
        // Whoever asked in this instant hears it from the closed channel.
    }

    fn serve_schedule(&self) {
        let wish = Wish { consistency: self.application.consistency, label: None };
        {
            let mut current = self.current.lock();
            if current.is_some() {
                return; // somebody's request is on its way here; it is as good
            }
            *current = Some(Current { wish: wish.clone(), since: Instant::now() });
        }
        self.serve(&Request { wish, events: None });
    }

    fn serve(&self, request: &Request) {
        let way = Way { events: request.events.as_ref() };
        let asked = request.wish.consistency;
        let event = match self.take(&request.wish, &way) {
            Ok(point) => {
                let TakenPoint { epoch, consistency, note, .. } = &point;
                let (label, reason) = (note.label.as_ref().map(Label::as_str), note.reason.as_deref());
                let frozen_ms = note.frozen.map(|frozen| frozen.as_millis() as u64);
                if *consistency < asked {
                    tracing::warn!(%epoch, %consistency, %asked, label, frozen_ms, reason, "point taken, but less than asked");
                } else {
                    tracing::info!(%epoch, %consistency, label, frozen_ms, "point taken");
                }
                Event::Taken(point)
            }
            Err(reason) => {
                tracing::warn!(%asked, reason, "no point could be taken");
                let stopping = self.stop.load(Ordering::SeqCst);
                let code = if stopping { AgentRefusal::Stopping } else { AgentRefusal::NoPoint };
                Event::Refused(code, reason)
            }
        };
        *self.current.lock() = None;
        if let Some(events) = &request.events {
            // Who asked may have gone.
            let _ = events.send(event);
        }
    }

    fn take(&self, wish: &Wish, way: &Way<'_>) -> Result<TakenPoint, Refusal> {
        if wish.consistency <= Consistency::Crash {
            return self.take_crash(wish, None, way);
        }
        if self.scanned {
            let reason = "the disks are scanned, and reading all of them takes longer than a freeze may last";
            return self.take_crash(wish, Some(reason.into()), way);
        }
        way.doing("waiting until little is left to be read");
        let budget = self.application.budget();
        if let Err(reason) = self.orders.prepare(Instant::now() + SETTLE_MAX, budget) {
            return self.take_crash(wish, Some(reason), way);
        }
        // Not yet: others may cut while hooks run.
        self.orders.release();
        let (mut quiesced, mut reason) = match wish.consistency {
            Consistency::Application => match self.quiesce(wish, way) {
                Ok(quiesced) => (Some(quiesced), None),
                Err(reason) => (None, Some(reason)),
            },
            _ => (None, None),
        };
        let frozen = self.freeze_and_cut(way);
        if let Some(quiesced) = &mut quiesced {
            // Applications first; what is wrong with a hook now makes the point less.
            let action = if frozen.is_ok() { Action::PostThaw } else { Action::Abort };
            way.doing(format!("hooks: {}", action.name()));
            if let Err(failed) = quiesced.end(action) {
                reason.get_or_insert(failed);
            }
        }
        match frozen {
            Err(failed) => {
                let reason = reason.map_or(failed.clone(), |hooks| format!("{failed}; {hooks}"));
                self.take_crash(wish, Some(reason), way)
            }
            Ok(Frozen { taken, held, note }) => {
                let reason = match (note.reason, reason) {
                    (Some(freeze), Some(hooks)) => Some(format!("{freeze}; {hooks}")),
                    (freeze, hooks) => freeze.or(hooks),
                };
                let consistency = match (held, &reason) {
                    (false, _) => Consistency::Crash,
                    (true, None) => wish.consistency,
                    (true, Some(_)) => Consistency::Filesystem,
                };
                Ok(self.conclude(wish, taken, consistency, PointNote { reason, ..note }))
            }
        }
    }

    /// Without hooks and freeze; `reason` when more was asked for.
    fn take_crash(&self, wish: &Wish, reason: Option<String>, way: &Way<'_>) -> Result<TakenPoint, Refusal> {
        way.doing("waiting for a crash-consistent cut");
        let until = Instant::now() + CRASH_CUT_MAX;
        let mut cut = self.orders.cut(until);
        while cut.as_ref().is_err_and(|failed| *failed == MISSED_AT_THE_CUT) && Instant::now() < until {
            cut = self.orders.cut(until);
        }
        let taken = cut.map_err(|failed| match &reason {
            Some(reason) => format!("take a point: {reason}; and not even a crash-consistent one: {failed}"),
            None => format!("take a point: {failed}"),
        })?;
        Ok(self.conclude(wish, taken, Consistency::Crash, PointNote { reason, ..PointNote::default() }))
    }

    fn conclude(&self, wish: &Wish, taken: Taken, consistency: Consistency, note: PointNote) -> TakenPoint {
        let note = PointNote { label: wish.label.clone(), ..note }.bounded();
        // The sealing thread has gone only when the agent stops.
        let _ = taken.verdict.send(Verdict { consistency, note: note.clone() });
        TakenPoint {
            group: self.group,
            epoch: taken.epoch,
            cut_time: taken.cut_time,
            asked: wish.consistency,
            consistency,
            note,
        }
    }

    /// Freezes, has the engine cut, thaws.
    ///
    /// # Errors
    /// When there was no cut while all was frozen; nothing is frozen any more.
    fn freeze_and_cut(&self, way: &Way<'_>) -> Result<Frozen, Refusal> {
        let told = |result: anyhow::Error| format!("{result:#}");
        if self.stop.load(Ordering::SeqCst) {
            return Err("the agent is stopping".into());
        }
        way.doing("writing out filesystems");
        let disks: HashSet<DeviceNumber> = freeze::disks(self.devices.iter());
        let found = freeze::find(&disks, &self.application.leave_out).map_err(told)?;
        if found.filesystems.is_empty() {
            return Err("no mounted filesystem lies on the group's disks".into());
        }
        let names = freeze::names(&found.filesystems);
        let left_out = found.left_out.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        tracing::debug!(filesystems = names.join(" "), left_out = left_out.join(" "), "freezing");
        if let Some(holder) =
            found.filesystems.iter().find(|filesystem| hooks::lies_on(&self.hook_state, &filesystem.dir))
        {
            return Err(format!(
                "{} lies on {}, which is frozen, so hooks could hang; set control_socket to a path on tmpfs",
                self.hook_state.display(),
                holder.mount_point.display()
            ));
        }
        let budget = self.application.budget();
        let mut freeze = Freeze::prepare(&found.filesystems, budget, &self.marker).map_err(told)?;
        self.orders.prepare(Instant::now() + SETTLE_QUIESCED_MAX, budget)?;
        // From here to the thaw: no file, no log.
        let cut = match freeze.freeze() {
            Ok(()) => {
                way.quietly("frozen");
                self.orders.cut(freeze.deadline())
            }
            Err(refused) => {
                self.orders.release();
                Err(refused)
            }
        };
        let thaw = freeze.thaw();
        drop(freeze);
        let taken = cut.map_err(|failed| format!("{failed}; thawed after {} ms", thaw.lasted.as_millis()))?;
        let held = thaw.held.is_ok();
        let reason =
            thaw.held.err().map(|why| format!("the freeze did not last until the cut was over: {why}"));
        let frozen = Some(thaw.lasted);
        Ok(Frozen { taken, held, note: PointNote { frozen, filesystems: names, reason, label: None } })
    }

    /// Runs every hook's pre-freeze.
    ///
    /// # Errors
    /// When one failed, or there is none: nothing is quiesced.
    fn quiesce(&self, wish: &Wish, way: &Way<'_>) -> Result<Quiesced, Refusal> {
        let told = |result: anyhow::Error| format!("{result:#}");
        let dir = &self.application.hooks;
        let hooks = hooks::list(dir).map_err(told)?;
        if hooks.is_empty() {
            return Err(format!("there are no hooks in {}", dir.display()));
        }
        let disks = freeze::disks(self.devices.iter());
        let found = freeze::find(&disks, &self.application.leave_out).map_err(told)?;
        let (budget, timeout) = (self.application.budget(), self.application.hook_timeout());
        let hold = timeout * hooks.len() as u32 + budget + SETTLE_QUIESCED_MAX + HOLD_BESIDES;
        let mut runner =
            Runner::new(self.application.environment.clone(), timeout, &self.hook_state, self.stop.clone())
                .map_err(told)?;
        // What is written out now need not be written while applications wait.
        for filesystem in &found.filesystems {
            freeze::write_out(filesystem).map_err(told)?;
        }
        runner.set("SEAWALL_GROUP", self.group.to_string());
        runner.set("SEAWALL_LABEL", wish.label.as_ref().map_or_else(String::new, Label::to_string));
        runner.set("SEAWALL_FILESYSTEMS", freeze::lines(&found.filesystems));
        runner.set("SEAWALL_TIMEOUT_S", timeout.as_secs().max(1).to_string());
        runner.set("SEAWALL_HOLD_S", hold.as_secs().to_string());
        drop(found);
        let mut quiesced = Quiesced { runner, ran: Vec::new() };
        for hook in hooks {
            way.doing(format!("hook {}: pre-freeze", hook.name));
            quiesced.ran.push(hook);
            let hook = quiesced.ran.last().expect("just pushed");
            if let Err(failed) = quiesced.runner.run(hook, Action::PreFreeze) {
                let failed = told(failed);
                return Err(match quiesced.end(Action::Abort) {
                    Ok(()) => failed,
                    Err(more) => format!("{failed}; {more}"),
                });
            }
        }
        Ok(quiesced)
    }
}

/// Hooks that have begun, to be ended in the opposite order. Dropping it aborts them.
struct Quiesced {
    runner: Runner,
    ran: Vec<Hook>,
}

impl Quiesced {
    /// Lets applications go on. Every hook is run, whatever becomes of the others; the first failure is told.
    fn end(&mut self, action: Action) -> Result<(), String> {
        self.runner.finish_while_stopping();
        let mut result = Ok(());
        while let Some(hook) = self.ran.pop() {
            if let Err(failed) = self.runner.run(&hook, action)
                && result.is_ok()
            {
                result = Err(format!("{failed:#}"));
            }
        }
        result
    }
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        // Has been told already, unless this thread panics.
        let _ = self.end(Action::Abort);
    }
}
