//! When disks are compared with their replicas, and why. The one place that decides it; the engine and `compare` do it.
//!
//! What is never done without being decided here: a suspect granule is compared only while a resync runs. What may wait:
//! - A resync because tracking has a gap waits for the window. Its granules are suspect already, so that every write to
//!   them counts as missed, and no point is offered meanwhile: nothing that could be offered would be consistent. Points
//!   from before stay.
//! - One that repairs the replica (scrub findings, a command) waits with tracking as it is: points go on, and the granules
//!   become suspect only when it begins.
//!
//! What never waits for the window: a target that was never compared; a group that has no point yet, for which waiting would only mean to have none; one that had
//! been begun by an agent before this one; and what a person has asked for now: by command, by protecting disks for the first
//! time (there may be points: those of adopted disks), or by a generation that begins after a failover. All of these wait for their turn at the
//! process server, but for the first copy, which compares nothing.
//!
//! Once begun, a resync goes on when the window closes: half of it is worth nothing, as there is no point before its end.
//!
//! Crash: what is suspect outlives the agent in the kernel's maps. What is planned does not: what a scrub found is told again by
//! the target, a command must be given again.

mod section;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use block::{ByteCount, Epoch, GRANULE_BYTES, Granule, UnixNanos};
use control::{ResyncReason, ResyncStage, ResyncStatus, ResyncWhen};
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::Notify;
use wire::{Condition, Turn};

use section::Windows;
pub use section::{DIRTY_PERCENT, Hours, ResyncSection, WINDOWS_MAX};

/// How fast disks are taken to be read before it was seen, in bytes a second.
const READ_ASSUMED: f64 = 200e6;
/// More damaged granules than this of a volume, and all of it is compared.
const DAMAGED_MAX: usize = 64 * 1024;
/// A target that still says that it lacks something is sent everything again so long after the last time: what it says may be older.
const UNPROVEN_AGAIN: Duration = Duration::from_secs(60);
/// The same while something waits to be sent, which may be what it lacks, and may be what is written all the time.
const UNPROVEN_SENDING_MAX: Duration = Duration::from_secs(3600);
/// The rate of a comparison is told after so long.
const RATE_AFTER_S: f64 = 2.0;

/// A reason with its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cause {
    pub(crate) reason: ResyncReason,
    pub(crate) why: String,
    pub(crate) since: UnixNanos,
}

impl Cause {
    pub(crate) fn new(reason: ResyncReason, why: impl Into<String>) -> Cause {
        Cause { reason, why: why.into(), since: UnixNanos::now() }
    }
}

/// What of a volume becomes suspect when a resync begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    All,
    Granules(BTreeSet<Granule>),
}

/// What the engine has seen of the source.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// Suspect bytes of all volumes.
    pub(crate) suspect: ByteCount,
    pub(crate) compared: ByteCount,
    pub(crate) different: ByteCount,
    /// By volume: its name, its size, dirty bytes.
    pub(crate) volumes: Vec<(String, ByteCount, ByteCount)>,
    /// How often tracking was lost, and what was said of it last.
    pub(crate) losses: u64,
    pub(crate) last_error: Option<String>,
    /// The process server holds something, so that there is something to compare with; `None` before it was asked.
    pub(crate) has_replica: Option<bool>,
}

/// What the engine is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Nothing,
    /// These parts of these volumes become suspect, and are compared.
    Begin(BTreeMap<usize, Part>),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Nothing is to be compared.
    #[default]
    None,
    Window,
    /// At the process server; how many are ahead, when it has said so.
    Turn(Option<u32>),
    /// The turn has come; the engine begins.
    Given,
    Running,
}

/// What of a volume is to be compared.
struct Plan {
    part: Part,
    cause: Cause,
    /// Whatever the window says.
    now: bool,
}

#[derive(Default)]
struct State {
    stage: Stage,
    /// Why there are suspects.
    lost: Option<Cause>,
    /// What becomes suspect when it begins.
    planned: BTreeMap<usize, Plan>,
    /// What the source says of its beginning, until suspects are seen.
    expected: Option<Cause>,
    /// Whether the window does not count for what is suspect already.
    now: bool,
    losses: u64,
    /// By volume: it has been clean since its granules were last made dirty by a comparison.
    armed: Vec<bool>,
    condition: Option<Condition>,
    /// The process server has lost what it acknowledged after this epoch.
    rebased: Option<Epoch>,
    /// When the last one ended.
    ended: Option<Instant>,
    /// Of the damage that was asked for last.
    asked_damage: ByteCount,
    /// When the running one began, and what the counts were then.
    began: Option<(Instant, ByteCount, ByteCount)>,
    /// What is compared by the running one.
    total: ByteCount,
    last: Look,
}

/// Decides when disks are compared. Shared between the engine, the task that talks, and who asks.
pub(crate) struct Resyncs {
    state: Mutex<State>,
    changed: Notify,
    windows: Windows,
    dirty_percent: u32,
}

impl Resyncs {
    pub(crate) fn new(section: &ResyncSection) -> Resyncs {
        Resyncs {
            state: Mutex::default(),
            changed: Notify::new(),
            windows: Windows::new(section),
            dirty_percent: section.dirty_percent,
        }
    }

    /// A source begins that has, or will have, suspects because of this. `begun`: an earlier agent had begun to compare.
    pub(crate) fn expect(&self, cause: Option<Cause>, begun: bool) {
        let mut state = self.state.lock();
        let condition = state.condition;
        *state = State { expected: cause, now: begun, condition, ..State::default() };
        drop(state);
        self.changed.notify_one();
    }

    /// What is suspect now need not wait for the hours: a person has just begun to protect these disks, or to protect them again in
    /// another generation.
    pub(crate) fn at_once(&self) {
        self.state.lock().now = true;
        self.changed.notify_one();
    }

    /// Plans to compare volumes, by number, because somebody has asked for it.
    pub(crate) fn ask(&self, volumes: &[usize], when: ResyncWhen) {
        let mut state = self.state.lock();
        for volume in volumes {
            let cause = Cause::new(ResyncReason::Command, "asked for by command");
            let now = when == ResyncWhen::Now;
            state.planned.insert(*volume, Plan { part: Part::All, cause, now });
            // What waits is what is asked for.
            state.now |= now && state.lost.is_some();
        }
    }

    /// When a resync that is asked for now would begin, if the hours must come first.
    pub(crate) fn begins(&self, when: ResyncWhen) -> Option<UnixNanos> {
        let now = Timestamp::now();
        let waits = when == ResyncWhen::Window && !self.windows.are_open(now);
        if waits { self.windows.next_opening(now) } else { None }
    }

    /// Plans to compare granules of a volume that a scrub found damaged at a target.
    pub(crate) fn damaged(&self, volume: usize, granules: impl IntoIterator<Item = Granule>) {
        let mut state = self.state.lock();
        let cause = Cause::new(ResyncReason::Scrub, "a scrub found parts of the replica damaged");
        let none = || Plan { part: Part::Granules(BTreeSet::new()), cause, now: false };
        let plan = state.planned.entry(volume).or_insert_with(none);
        if let Part::Granules(planned) = &mut plan.part {
            planned.extend(granules);
            if planned.len() > DAMAGED_MAX {
                plan.part = Part::All;
            }
        }
    }

    /// The process server says how the replica is.
    pub(crate) fn conditioned(&self, condition: Condition) {
        let mut state = self.state.lock();
        state.condition = Some(condition);
        if condition.damaged == ByteCount::ZERO {
            state.asked_damage = ByteCount::ZERO;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// The process server has lost what it had acknowledged after `held`, and no replica has it: all is to be compared, and
    /// epochs are numbered from there again.
    pub(crate) fn rebase(&self, held: Epoch) {
        self.state.lock().rebased = Some(held);
    }

    /// Whether the agent must begin anew because of that, and why.
    pub(crate) fn take_rebase(&self) -> Option<Cause> {
        let held = self.state.lock().rebased.take()?;
        let why = format!("the process server lost its cache; replicas have all up to epoch {held}");
        Some(Cause::new(ResyncReason::Gap, why))
    }

    /// Whether the target should be asked what is damaged; true once for each change of what it says.
    pub(crate) fn take_damage_question(&self) -> bool {
        let mut state = self.state.lock();
        let damaged = state.condition.map_or(ByteCount::ZERO, |condition| condition.damaged);
        // Less than before: it is being repaired.
        let asked = std::mem::replace(&mut state.asked_damage, damaged);
        damaged > asked
    }

    /// The target could not be asked: it is to be asked again.
    pub(crate) fn damage_unanswered(&self) {
        self.state.lock().asked_damage = ByteCount::ZERO;
    }

    /// Whether the process server should be asked for a turn, or one is being used.
    pub(crate) fn wants_turn(&self) -> bool {
        matches!(self.state.lock().stage, Stage::Turn(_) | Stage::Given | Stage::Running)
    }

    /// Waits until something of what is wanted may have changed.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What the process server says of the turn.
    pub(crate) fn turn(&self, turn: Turn) {
        let mut state = self.state.lock();
        if let Stage::Turn(_) = state.stage {
            state.stage = if turn.ahead == 0 { Stage::Given } else { Stage::Turn(Some(turn.ahead)) };
        }
    }

    /// The conversation has ended, and with it the turn. What was begun stays begun: it goes on with the next turn.
    pub(crate) fn turn_lost(&self) {
        let mut state = self.state.lock();
        if matches!(state.stage, Stage::Turn(_) | Stage::Given | Stage::Running) {
            state.stage = Stage::Turn(None);
            state.now = true;
        }
    }

    /// Whether suspects are compared now.
    pub(crate) fn is_running(&self) -> bool {
        self.state.lock().stage == Stage::Running
    }

    /// Whether the engine should look at once.
    pub(crate) fn is_urgent(&self) -> bool {
        let state = self.state.lock();
        let begins = state.expected.is_some() || !state.planned.is_empty();
        state.stage == Stage::Given || state.stage == Stage::None && begins
    }

    /// Decides, from what the engine sees. Called again and again.
    pub(crate) fn look(&self, look: Look, now: Timestamp) -> Deed {
        let mut state = self.state.lock();
        let deed = self.decide(&mut state, &look, now);
        state.last = look;
        deed
    }

    fn decide(&self, state: &mut State, look: &Look, now: Timestamp) -> Deed {
        match look.has_replica {
            Some(true) => {}
            None => return Deed::Nothing,
            Some(false) => {
                // Everything is sent as it is; there is nothing to compare with.
                (state.lost, state.expected, state.stage, state.now) = (None, None, Stage::None, false);
                return Deed::Nothing;
            }
        }
        if look.losses > state.losses {
            let why = look.last_error.clone().unwrap_or_else(|| "tracking had a gap".into());
            // It makes a resync of something less one of the whole volume.
            state.expected = Some(Cause::new(ResyncReason::TrackingLost, why));
        }
        state.losses = look.losses;
        if look.suspect > ByteCount::ZERO && state.lost.is_none() && state.stage != Stage::Running {
            let unknown = || Cause::new(ResyncReason::Continued, "an agent before this one had begun it");
            state.lost = Some(state.expected.take().unwrap_or_else(unknown));
        }
        if look.suspect == ByteCount::ZERO {
            state.expected = None;
        }
        self.plan_mostly_dirty(state, look);
        self.plan_new_target(state, look);
        match state.stage {
            Stage::Running => {
                if look.suspect == ByteCount::ZERO {
                    // The different ones are sent by now, or will be: that needs no turn.
                    state.armed.fill(false);
                    (state.stage, state.lost, state.now, state.began) = (Stage::None, None, false, None);
                    state.ended = Some(Instant::now());
                    self.changed.notify_one();
                }
                Deed::Nothing
            }
            Stage::Given => {
                let planned = std::mem::take(&mut state.planned);
                if state.lost.is_none() {
                    state.lost = planned.values().next().map(|plan| plan.cause.clone());
                }
                let bytes = planned.iter().map(|(volume, plan)| bytes(look, *volume, &plan.part)).sum();
                state.total = look.suspect.max(bytes);
                state.stage = Stage::Running;
                state.began = Some((Instant::now(), look.compared, look.different));
                Deed::Begin(planned.into_iter().map(|(volume, plan)| (volume, plan.part)).collect())
            }
            Stage::None | Stage::Window | Stage::Turn(_) => {
                let wanted =
                    state.lost.is_some() && look.suspect > ByteCount::ZERO || !state.planned.is_empty();
                let stage = if !wanted {
                    (state.lost, state.now) = (None, false);
                    Stage::None
                } else if state.now
                    || state.planned.values().any(|plan| plan.now)
                    || self.windows.are_open(now)
                    || self.has_no_point(state)
                {
                    match state.stage {
                        Stage::Turn(ahead) => Stage::Turn(ahead),
                        _ => Stage::Turn(None),
                    }
                } else {
                    Stage::Window
                };
                if stage != state.stage {
                    tracing::info!(?stage, cause = ?cause(state), "resync");
                    state.stage = stage;
                    self.changed.notify_one();
                }
                Deed::Nothing
            }
        }
    }

    /// It is known that the target has no point.
    fn has_no_point(&self, state: &State) -> bool {
        state.condition.is_some_and(|condition| !condition.has_point)
    }

    /// A volume of which most was missed is compared as a whole: much of it may be the same as before, and to read it all
    /// belongs into the window.
    fn plan_mostly_dirty(&self, state: &mut State, look: &Look) {
        state.armed.resize(look.volumes.len(), false);
        // Before the first point everything is dirty, and what a comparison found is about to be sent.
        let counts =
            state.condition.is_some_and(|condition| condition.has_point) && state.stage != Stage::Running;
        for (volume, (name, size, dirty)) in look.volumes.iter().enumerate() {
            if *dirty == ByteCount::ZERO {
                state.armed[volume] = true;
                // It was all read before its hours came.
                let read = |plan: &Plan| plan.cause.reason == ResyncReason::MostlyDirty;
                if state.stage != Stage::Given && state.planned.get(&volume).is_some_and(read) {
                    state.planned.remove(&volume);
                }
            } else if counts
                && state.armed[volume]
                && state.lost.is_none()
                && u128::from(dirty.0) * 100 > u128::from(size.0) * u128::from(self.dirty_percent)
            {
                state.armed[volume] = false;
                let why = format!(
                    "{dirty} of volume {name} ({size}) were missed, more than {} %",
                    self.dirty_percent
                );
                let cause = Cause::new(ResyncReason::MostlyDirty, why);
                state.planned.insert(volume, Plan { part: Part::All, cause, now: false });
            }
        }
    }

    /// A target that began in the middle of the history has no point before it was sent everything; that does not wait.
    fn plan_new_target(&self, state: &mut State, look: &Look) {
        let unproven = state.condition.map_or(ByteCount::ZERO, |condition| condition.unproven);
        let sending = look.volumes.iter().any(|(_, _, dirty)| *dirty > ByteCount::ZERO);
        let pause = if sending { UNPROVEN_SENDING_MAX } else { UNPROVEN_AGAIN };
        let lately = state.ended.is_some_and(|ended| ended.elapsed() < pause);
        if unproven == ByteCount::ZERO || state.stage != Stage::None || !state.planned.is_empty() || lately {
            return;
        }
        for volume in 0..look.volumes.len() {
            let cause =
                Cause::new(ResyncReason::NewTarget, "a target has nothing of before, and is sent everything");
            state.planned.insert(volume, Plan { part: Part::All, cause, now: true });
        }
    }

    /// Bytes compared and bytes found different since the agent started.
    pub(crate) fn counts(&self) -> (ByteCount, ByteCount) {
        let last = &self.state.lock().last;
        (last.compared, last.different)
    }

    /// What is shown of it; `None` when nothing is to be compared.
    pub(crate) fn status(&self) -> Option<ResyncStatus> {
        let state = self.state.lock();
        let stage = match state.stage {
            Stage::None => return None,
            Stage::Window => ResyncStage::WaitingForWindow,
            Stage::Turn(_) | Stage::Given => ResyncStage::WaitingForTurn,
            Stage::Running => ResyncStage::Comparing,
        };
        let look = &state.last;
        let cause = cause(&state)?;
        let planned: ByteCount =
            state.planned.iter().map(|(volume, plan)| bytes(look, *volume, &plan.part)).sum();
        let (mut bytes, mut compared, mut different) =
            (look.suspect.max(planned), ByteCount::ZERO, ByteCount::ZERO);
        let mut rate = READ_ASSUMED;
        // Nothing is known of how much differs before some of it was seen.
        let mut share = 1.0;
        if let Some((began, compared_before, different_before)) = state.began {
            compared = look.compared.saturating_sub(compared_before);
            different = look.different.saturating_sub(different_before);
            bytes = state.total.max(compared.saturating_add(look.suspect));
            let elapsed = began.elapsed().as_secs_f64();
            if elapsed > RATE_AFTER_S && compared > ByteCount::ZERO {
                rate = compared.0 as f64 / elapsed;
            }
            if compared > ByteCount::ZERO {
                share = different.0 as f64 / compared.0 as f64;
            }
        }
        let left = bytes.saturating_sub(compared);
        let begins =
            (stage == ResyncStage::WaitingForWindow).then(|| self.windows.next_opening(Timestamp::now()));
        let volumes = match state.planned.is_empty() {
            true => look.volumes.iter().map(|(name, ..)| name.clone()).collect(),
            false => {
                state.planned.keys().filter_map(|volume| Some(look.volumes.get(*volume)?.0.clone())).collect()
            }
        };
        Some(ResyncStatus {
            reason: cause.reason,
            why: cause.why,
            since: cause.since,
            volumes,
            stage,
            begins: begins.flatten(),
            ahead: match state.stage {
                Stage::Turn(ahead) => ahead,
                _ => None,
            },
            bytes,
            compared,
            different,
            send_estimate: ByteCount(different.0.saturating_add((left.0 as f64 * share) as u64)),
            seconds_estimate: (left.0 as f64 / rate).ceil() as u64,
        })
    }
}

/// The weightiest.
fn cause(state: &State) -> Option<Cause> {
    let planned = || state.planned.values().map(|plan| plan.cause.clone()).next();
    state.lost.clone().or_else(planned)
}

fn bytes(look: &Look, volume: usize, part: &Part) -> ByteCount {
    match part {
        Part::All => look.volumes.get(volume).map_or(ByteCount::ZERO, |(_, size, _)| *size),
        Part::Granules(granules) => ByteCount(granules.len() as u64 * GRANULE_BYTES),
    }
}

#[cfg(test)]
mod tests;
