//! The thread that drives the source: one place that waits, one place that decides when to cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::{ByteCount, Consistency, Epoch, UnixNanos};
use capture::{Progress, Source};

use crate::config::AgentConfig;
use crate::outbox::Outbox;
use crate::report::Reports;
use crate::seal::{Job, Sealer};
use crate::volumes::Presence;

/// An epoch is cut early when it holds this much, so that sealing, sending and applying overlap.
const EPOCH_BYTES: ByteCount = ByteCount::mib(32);
/// Epochs that may wait in the outbox before the timer stops cutting: from then on the open epoch coalesces.
const EPOCHS_UNSENT_MAX: usize = 8;
/// How long the engine sleeps when there is nothing to do; doubled from one to the other while it stays so.
const IDLE_SLEEP: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(8));
/// How often the report is renewed.
const REPORT_EVERY: Duration = Duration::from_millis(250);

pub(crate) struct Engine {
    source: Box<dyn Source>,
    presence: Arc<Presence>,
    sealer: Sealer,
    outbox: Arc<Outbox>,
    reports: Arc<Reports>,
    stop: Arc<AtomicBool>,
    interval: Duration,
    memory: ByteCount,
    /// What the source has been told of.
    acknowledged: Epoch,
}

impl Engine {
    pub(crate) fn new(
        config: &AgentConfig,
        source: Box<dyn Source>,
        presence: Arc<Presence>,
        sealer: Sealer,
        outbox: Arc<Outbox>,
        reports: Arc<Reports>,
        stop: Arc<AtomicBool>,
    ) -> Engine {
        let interval = Duration::from_millis(config.agent.epoch_interval_ms);
        let memory = config.agent.epoch_memory_bytes;
        let acknowledged = Epoch::NONE;
        Engine { source, presence, sealer, outbox, reports, stop, interval, memory, acknowledged }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        let mut next_cut = Instant::now() + self.interval;
        let mut next_report = Instant::now();
        let mut sleep = IDLE_SLEEP.0;
        while !self.stop.load(Ordering::SeqCst) {
            let progress = match self.source.advance(UnixNanos::now(), self.open_limit()) {
                Ok(progress) => progress,
                Err(error) => {
                    self.reports.fail(error.to_string());
                    tracing::error!(%error, "capture ended");
                    return;
                }
            };
            let held = self.outbox.progress().held.held;
            if held > self.acknowledged {
                self.acknowledged = held;
                self.source.acknowledged(held);
            }
            let now = Instant::now();
            let due = now >= next_cut;
            let large = progress == Progress::Full || self.source.open_bytes() >= EPOCH_BYTES;
            let cut = (due || large) && self.cut();
            if due && cut {
                next_cut += self.interval;
                if next_cut < now {
                    next_cut = now + self.interval;
                }
            }
            if now >= next_report {
                next_report = now + REPORT_EVERY;
                self.reports.update(&*self.source, &self.outbox, self.memory_used());
            }
            if progress == Progress::Busy || cut {
                sleep = IDLE_SLEEP.0;
            } else {
                let until_cut = next_cut.saturating_duration_since(now).max(IDLE_SLEEP.0);
                std::thread::sleep(sleep.min(until_cut));
                sleep = (sleep * 2).min(IDLE_SLEEP.1);
            }
        }
    }

    fn memory_used(&self) -> ByteCount {
        self.source.open_bytes() + self.sealer.bytes() + self.outbox.progress().bytes
    }

    /// What the open epoch may hold, so that it, the sealing one with its result, and the outbox stay in the budget.
    fn open_limit(&self) -> ByteCount {
        let free = self.memory.saturating_sub(self.outbox.progress().bytes);
        let sealing = ByteCount(self.sealer.bytes().0 * 2);
        ByteCount(free.0 / 3).min(free.saturating_sub(sealing))
    }

    /// Ends the epoch, if there is something to end, a number for it, and nobody is waiting before it.
    fn cut(&mut self) -> bool {
        let point = self.source.consistency() != Consistency::None;
        if !point && self.source.open_bytes() == ByteCount::ZERO {
            return false; // neither a point nor a change
        }
        if self.outbox.progress().epochs >= EPOCHS_UNSENT_MAX {
            return false;
        }
        let Some(spare) = self.sealer.spare() else { return false };
        let Some(epoch) = self.outbox.number() else {
            self.sealer.give_back(spare);
            return false;
        };
        let mut cut = self.source.cut(spare, epoch);
        // Looked at after the cut: what is there now was there all the time before.
        if self.presence.any_gone() {
            cut.consistency = Consistency::None;
        }
        self.sealer.seal(Job { epoch, cut, volumes: self.source.volumes() });
        true
    }
}
