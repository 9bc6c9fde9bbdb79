//! Sealed changesets that the process server does not hold durably yet, in order, and how far it has come.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use block::{ByteCount, Consistency, Epoch, UnixNanos};
use bytes::Bytes;
use capture::Resumed;
use parking_lot::Mutex;
use tokio::sync::Notify;
use wire::Held;

/// A sealed epoch.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) epoch: Epoch,
    pub(crate) consistency: Consistency,
    pub(crate) cut_time: UnixNanos,
    pub(crate) pieces: Vec<Bytes>,
    pub(crate) bytes: ByteCount,
}

/// What the process server holds does not fit with what this agent has: somebody else writes the group, or it lost what it
/// had acknowledged.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Mismatch {
    #[error(
        "the process server holds epoch {held}, this agent has sealed {sealed} only: another agent writes this group. \
         Stop one of them, then start this one again"
    )]
    Ahead { held: Epoch, sealed: Epoch },
    #[error(
        "the process server holds epoch {held}, but had acknowledged {acknowledged}: it lost its cache. Restore it, or \
         give the group a new generation on agent and target"
    )]
    Behind { held: Epoch, acknowledged: Epoch },
}

#[derive(Default)]
struct State {
    entries: VecDeque<Entry>,
    bytes: ByteCount,
    /// The last epoch given a number; `None` until the process server has said where to go on.
    numbered: Option<Epoch>,
    sealed: Epoch,
    sealed_cut_time: UnixNanos,
    last_point: Option<(Epoch, UnixNanos)>,
    held: Held,
    window: Option<Window>,
}

/// How fast the way is while something waits: acknowledged bytes since then.
#[derive(Clone, Copy)]
struct Window {
    since: Instant,
    bytes: u64,
}

impl Window {
    /// Bytes a second; `None` before anything can be said.
    fn rate(self) -> Option<f64> {
        let elapsed = self.since.elapsed();
        (elapsed >= RATE_AFTER).then(|| self.bytes as f64 / elapsed.as_secs_f64())
    }
}

/// A rate is not told before so much time, and forgets half of what it knows after so much.
const RATE_AFTER: Duration = Duration::from_millis(500);
const RATE_HALVED_AFTER: Duration = Duration::from_secs(8);

/// Shared between the engine, the sealer and delivery.
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Notify,
}

/// What of the outbox goes into a report.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    pub(crate) numbered: Epoch,
    pub(crate) sealed: Epoch,
    pub(crate) sealed_cut_time: UnixNanos,
    pub(crate) held: Held,
    pub(crate) bytes: ByteCount,
    pub(crate) epochs: usize,
    pub(crate) had_point: bool,
    /// Bytes a second that the way takes while something waits; `None` when that cannot be said.
    pub(crate) way_rate: Option<f64>,
}

impl Outbox {
    /// After an earlier agent that has left what it knew, if it has.
    pub(crate) fn new(resumed: Option<Resumed>) -> Outbox {
        let mut state = State::default();
        if let Some(resumed) = resumed {
            state.sealed = resumed.numbered;
            state.held.held = resumed.acknowledged;
        }
        Outbox { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Whether the process server has said where to go on.
    pub(crate) fn is_opened(&self) -> bool {
        self.state.lock().numbered.is_some()
    }

    /// Gives the next epoch its number; `None` until the process server has been asked.
    pub(crate) fn number(&self) -> Option<Epoch> {
        let mut state = self.state.lock();
        let next = state.numbered?.next();
        state.numbered = Some(next);
        Some(next)
    }

    /// Adds the next epoch.
    pub(crate) fn push(&self, entry: Entry) {
        let mut state = self.state.lock();
        assert_eq!(entry.epoch, state.sealed.next(), "epochs are sealed in order");
        state.sealed = entry.epoch;
        state.sealed_cut_time = entry.cut_time;
        if entry.consistency.is_point() {
            state.last_point = Some((entry.epoch, entry.cut_time));
        }
        if state.entries.is_empty() {
            state.window = Some(Window { since: Instant::now(), bytes: 0 });
        }
        state.bytes += entry.bytes;
        state.entries.push_back(entry);
        drop(state);
        self.changed.notify_one();
    }

    /// Whether the process server holds less than it had acknowledged.
    pub(crate) fn is_behind(&self, held: Held) -> bool {
        let state = self.state.lock();
        held.held < state.held.held
    }

    /// The process server has accepted this agent and says where it is.
    pub(crate) fn opened(&self, held: Held) -> Result<(), Mismatch> {
        let mut state = self.state.lock();
        let known = state.numbered.is_some() || state.sealed != Epoch::NONE;
        if known && held.held > state.sealed {
            return Err(Mismatch::Ahead { held: held.held, sealed: state.sealed });
        }
        if known && held.held < state.held.held {
            return Err(Mismatch::Behind { held: held.held, acknowledged: state.held.held });
        }
        if state.numbered.is_none() {
            // Epochs that an earlier agent numbered and nobody holds are numbered again; what they held is read again.
            state.numbered = Some(held.held);
            state.sealed = held.held;
        }
        drop(state);
        self.acknowledge(held)
    }

    /// The process server holds more.
    pub(crate) fn acknowledge(&self, held: Held) -> Result<(), Mismatch> {
        let mut state = self.state.lock();
        if held.held > state.sealed {
            return Err(Mismatch::Ahead { held: held.held, sealed: state.sealed });
        }
        while state.entries.front().is_some_and(|entry| entry.epoch <= held.held) {
            if let Some(entry) = state.entries.pop_front() {
                state.bytes = state.bytes - entry.bytes;
                if let Some(window) = &mut state.window {
                    window.bytes += entry.bytes.0;
                    if window.since.elapsed() > RATE_HALVED_AFTER {
                        window.bytes /= 2;
                        window.since += window.since.elapsed() / 2;
                    }
                }
            }
        }
        state.held = held;
        Ok(())
    }

    /// The first epoch after `after`, when it is sealed.
    pub(crate) async fn next(&self, after: Epoch) -> Entry {
        loop {
            if let Some(entry) = self.get(after.next()) {
                return entry;
            }
            self.changed.notified().await;
        }
    }

    fn get(&self, epoch: Epoch) -> Option<Entry> {
        let state = self.state.lock();
        let first = state.entries.front()?.epoch;
        state.entries.get(usize::try_from(epoch.0.checked_sub(first.0)?).ok()?).cloned()
    }

    pub(crate) fn progress(&self) -> Progress {
        let state = self.state.lock();
        Progress {
            numbered: state.numbered.unwrap_or_default(),
            sealed: state.sealed,
            sealed_cut_time: state.sealed_cut_time,
            held: state.held,
            bytes: state.bytes,
            epochs: state.entries.len(),
            had_point: state.last_point.is_some(),
            way_rate: state.window.and_then(Window::rate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(epoch: u64) -> Entry {
        Entry {
            epoch: Epoch(epoch),
            consistency: Consistency::Crash,
            cut_time: UnixNanos(epoch),
            pieces: vec![],
            bytes: ByteCount(10),
        }
    }

    fn held(epoch: u64) -> Held {
        Held { held: Epoch(epoch), applied: Epoch::NONE }
    }

    #[test]
    fn numbering_goes_on_after_what_is_held() {
        let outbox = Outbox::new(None);
        assert_eq!(outbox.number(), None);
        outbox.opened(held(7)).unwrap();
        assert_eq!(outbox.number(), Some(Epoch(8)));
        outbox.push(entry(8));
        outbox.number();
        outbox.push(entry(9));
        assert_eq!(outbox.get(Epoch(9)).unwrap().epoch, Epoch(9));
        outbox.acknowledge(held(8)).unwrap();
        assert_eq!((outbox.progress().epochs, outbox.progress().bytes), (1, ByteCount(10)));
        assert!(outbox.get(Epoch(8)).is_none());
    }

    #[test]
    fn what_an_earlier_agent_left_is_held_against_the_server() {
        let resumed = Resumed { numbered: Epoch(9), acknowledged: Epoch(6) };
        for (server, fits) in [(5, false), (6, true), (8, true), (9, true), (10, false)] {
            let outbox = Outbox::new(Some(resumed));
            assert_eq!(outbox.number(), None);
            assert_eq!(outbox.opened(held(server)).is_ok(), fits, "{server}");
            assert_eq!(outbox.number().is_some(), fits);
            if fits {
                outbox.push(entry(server + 1));
            }
        }
    }

    #[test]
    fn a_server_that_knows_more_or_forgot_is_not_trusted() {
        let outbox = Outbox::new(None);
        outbox.opened(held(0)).unwrap();
        outbox.number();
        outbox.push(entry(1));
        assert!(matches!(outbox.opened(held(5)), Err(Mismatch::Ahead { .. })));
        outbox.acknowledge(held(1)).unwrap();
        assert!(matches!(outbox.opened(held(0)), Err(Mismatch::Behind { .. })));
    }
}
