//! The thread that drives the source: one place that waits, one place that decides when to cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use block::{ByteCount, Consistency, Epoch, UnixNanos};
use capture::{Progress, Source};
use changeset::{Fold, VolumeInfo};
use durable::fault_point;

use crate::compare::Comparisons;
use crate::config::AgentConfig;
use crate::limits::Processor;
use crate::order::{Orders, Serving};
use crate::outbox::Outbox;
use crate::report::Reports;
use crate::seal::{Job, Sealer, Verdict};
use crate::source;
use crate::volumes::{Presence, Volume, Volumes};

/// An epoch is cut early when it holds this much, so that sealing, sending and applying overlap.
const EPOCH_BYTES: ByteCount = ByteCount::mib(32);
/// Epochs that may wait in the outbox before the timer stops cutting: from then on the open epoch coalesces.
pub(crate) const EPOCHS_UNSENT_MAX: usize = 8;
/// How long the engine sleeps when there is nothing to do; doubled from one to the other while it stays so.
const IDLE_SLEEP: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(8));
/// How long it sleeps while something is frozen.
const URGENT_SLEEP: Duration = Duration::from_micros(100);
/// How often the report is renewed.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// After an attempt to follow a disk that has grown, the next waits so long.
const TAKE_UP_PAUSE: Duration = Duration::from_secs(2);

pub(crate) struct Engine {
    config: AgentConfig,
    volumes: Vec<Volume>,
    /// When a disk that has grown may be taken up next.
    next_take_up: Instant,
    pub(crate) source: Box<dyn Source>,
    presence: Arc<Presence>,
    pub(crate) comparisons: Arc<Comparisons>,
    pub(crate) sealer: Sealer,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) orders: Arc<Orders>,
    pub(crate) serving: Serving,
    reports: Arc<Reports>,
    processor: Processor,
    stop: Arc<AtomicBool>,
    interval: Duration,
    memory: ByteCount,
    /// What the source has been told of.
    acknowledged: Epoch,
    /// The last epoch was no point: as soon as there is one, it is taken, and not only at the next interval.
    behind: bool,
}

impl Engine {
    pub(crate) fn new(
        config: &AgentConfig,
        (source, volumes, comparisons): (Box<dyn Source>, &Volumes, Arc<Comparisons>),
        sealer: Sealer,
        outbox: Arc<Outbox>,
        orders: Arc<Orders>,
        reports: Arc<Reports>,
        (processor, stop): (Processor, Arc<AtomicBool>),
    ) -> Engine {
        let interval = Duration::from_millis(config.agent.epoch_interval_ms);
        let memory = config.agent.epoch_memory_bytes;
        let serving = Serving::default();
        let acknowledged = Epoch::NONE;
        let mut engine = Engine {
            config: config.clone(),
            volumes: volumes.list.clone(),
            next_take_up: Instant::now(),
            source,
            presence: volumes.presence.clone(),
            comparisons,
            sealer,
            outbox,
            orders,
            serving,
            reports,
            processor,
            stop,
            interval,
            memory,
            acknowledged,
            behind: true,
        };
        // Delivery tells this first: whoever sees a point can see how it was captured.
        engine.report();
        engine
    }

    fn report(&mut self) {
        let status = self.source.status();
        self.decide_resync(&status);
        let resync = self.comparisons.resyncs.status();
        let open = (self.source.open_bytes(), self.outbox.progress().epochs >= EPOCHS_UNSENT_MAX);
        self.reports.update(status, &self.outbox, resync, self.memory_used(), open);
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        if let Err(error) = capture::give_way() {
            tracing::warn!(%error, "let applications go before the capture thread");
        }
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
                fault_point("before-acknowledged");
                self.source.acknowledged(held);
                fault_point("after-acknowledged");
            }
            self.serve_resyncs();
            let served = self.serve(progress);
            let now = Instant::now();
            let due = now >= next_cut;
            let large = progress == Progress::Full || self.source.open_bytes() >= EPOCH_BYTES;
            let caught_up = self.behind && self.source.consistency().is_point();
            let cut = (due || large || caught_up) && self.cut();
            if due && cut {
                next_cut += self.interval;
                if next_cut < now {
                    next_cut = now + self.interval;
                }
            }
            if now >= next_report {
                next_report = now + REPORT_EVERY;
                self.report();
                self.take_up_growth(now);
            }
            let rest = self.processor.rest().filter(|_| !self.serving.is_urgent());
            if let Some(rest) = rest {
                self.orders.sleep(rest);
            } else if progress == Progress::Busy || cut || served {
                sleep = IDLE_SLEEP.0;
            } else {
                let until_cut = next_cut.saturating_duration_since(now).max(IDLE_SLEEP.0);
                let most = if self.serving.is_urgent() { URGENT_SLEEP } else { until_cut };
                self.orders.sleep(sleep.min(most));
                sleep = (sleep * 2).min(IDLE_SLEEP.1);
            }
        }
    }

    /// A disk that has grown is followed in its new size: by another source, which carries over what this one knows.
    fn take_up_growth(&mut self, now: Instant) {
        if now < self.next_take_up || self.serving.is_urgent() {
            return;
        }
        let known = self.source.volumes();
        let grown =
            |(volume, info): &(&Volume, &VolumeInfo)| volume.size().is_some_and(|size| size > info.size);
        let Some((volume, info)) = self.volumes.iter().zip(&known).find(grown) else { return };
        self.next_take_up = now + TAKE_UP_PAUSE;
        tracing::info!(volume = volume.name, from = %info.size, "a disk has grown: following it in its new size");
        self.source.release();
        match source::open(&self.config, &self.volumes, &self.comparisons) {
            Ok(opened) => {
                // What the open epoch held is among what is read again.
                self.source = opened.source;
                self.acknowledged = Epoch::NONE;
            }
            // The source goes on as it was; what is written behind the old end makes the volume suspect.
            Err(error) => tracing::error!(error = format!("{error:#}"), "follow the disk in its new size"),
        }
    }

    fn memory_used(&self) -> ByteCount {
        self.source.open_bytes() + self.sealer.bytes() + self.outbox.progress().bytes
    }

    /// What the open epoch may hold, so that it, the sealing one with its result, and the outbox stay in the budget.
    pub(crate) fn open_limit(&self) -> ByteCount {
        let free = self.memory.saturating_sub(self.outbox.progress().bytes);
        let sealing = ByteCount(self.sealer.bytes().0 * 2);
        ByteCount(free.0 / 3).min(free.saturating_sub(sealing))
    }

    /// Ends the epoch, if there is something to end, a number for it, and nobody is waiting before it.
    pub(crate) fn cut(&mut self) -> bool {
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
        self.cut_as(epoch, spare, None);
        true
    }

    /// Ends the epoch as `epoch`. It is sealed when the verdict has come, if there is to be one.
    pub(crate) fn cut_as(
        &mut self,
        epoch: Epoch,
        spare: Fold,
        verdict: Option<Receiver<Verdict>>,
    ) -> (Consistency, UnixNanos) {
        fault_point("before-cut");
        let mut cut = self.source.cut(spare, epoch);
        fault_point("after-cut");
        // Looked at after the cut: what is there now was there all the time before.
        if self.presence.any_gone() {
            cut.consistency = Consistency::None;
        }
        self.behind = !cut.consistency.is_point();
        let what = (cut.consistency, cut.time);
        self.sealer.seal(Job { epoch, cut, volumes: self.source.volumes(), verdict });
        what
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // However it ended: who waits for a cut must not wait for ever, with filesystems frozen.
        self.orders.close();
    }
}
