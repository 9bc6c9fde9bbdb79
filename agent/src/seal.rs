//! The thread that turns folds into changesets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::Context;
use block::{ByteCount, Consistency, Epoch, Generation, GroupId, PointNote};
use capture::Cut;
use changeset::{Fold, GroupKey, Level, SealOptions, Stamp, VolumeInfo, seal_point};
use durable::fault_point;

use crate::config::AgentConfig;
use crate::limits::Processor;
use crate::outbox::{Entry, Outbox};
use crate::report::Reports;

/// Threads that compress.
const SEAL_THREADS: usize = 2;
/// Unsent bytes from which on the way to the process server counts as what limits.
const WAY_LIMITS_BYTES: ByteCount = ByteCount::mib(8);
/// Below these rates of the way, in bytes a second, a stronger level still gives more than the way takes.
const BALANCED_BELOW: f64 = 60e6;
const SMALL_BELOW: f64 = 12e6;

/// An epoch to be sealed.
pub(crate) struct Job {
    pub(crate) epoch: Epoch,
    pub(crate) cut: Cut,
    pub(crate) volumes: Vec<VolumeInfo>,
    /// Comes when all is known of a point that somebody asked for; it is not sealed before.
    pub(crate) verdict: Option<Receiver<Verdict>>,
}

/// What is told of a point that somebody asked for.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// What it is, if it is a point at all.
    pub(crate) consistency: Consistency,
    pub(crate) note: PointNote,
}

impl Job {
    /// What may be said of the epoch. Waits for the verdict, if there is to be one.
    fn judge(&self) -> (Consistency, PointNote) {
        let Some(verdict) = &self.verdict else { return (self.cut.consistency, PointNote::default()) };
        match verdict.recv() {
            Ok(verdict) if self.cut.consistency.is_point() => (verdict.consistency, verdict.note.bounded()),
            // Who asked has ended without a word, or the epoch is no point: what the cut says holds.
            _ => (self.cut.consistency, PointNote::default()),
        }
    }
}

/// The engine's end of the sealer: one epoch at a time.
pub(crate) struct Sealer {
    jobs: Sender<Job>,
    empty: Receiver<Fold>,
    emptied: Sender<Fold>,
    busy: Arc<AtomicU64>,
}

impl Sealer {
    /// An empty fold, when no epoch is being sealed.
    pub(crate) fn spare(&self) -> Option<Fold> {
        self.empty.try_recv().ok()
    }

    /// Takes back a spare that was not needed.
    pub(crate) fn give_back(&self, spare: Fold) {
        // The receiver is our own.
        let _ = self.emptied.send(spare);
    }

    /// Seals an epoch that was cut into a spare.
    pub(crate) fn seal(&self, job: Job) {
        self.busy.store(job.cut.fold.memory_bytes().0, Ordering::SeqCst);
        // Only fails when the sealer has ended, which it reports itself.
        let _ = self.jobs.send(job);
    }

    /// Memory of the fold being sealed.
    pub(crate) fn bytes(&self) -> ByteCount {
        ByteCount(self.busy.load(Ordering::SeqCst))
    }
}

pub(crate) fn start(
    config: &AgentConfig,
    key: GroupKey,
    (outbox, reports, processor, stop): (Arc<Outbox>, Arc<Reports>, Processor, Arc<AtomicBool>),
) -> anyhow::Result<(Sealer, JoinHandle<()>)> {
    let (jobs, receiver) = channel::<Job>();
    let (sender, empty) = channel();
    let busy = Arc::new(AtomicU64::new(0));
    // One spare: the engine cuts into it while the other is being sealed.
    sender.send(Fold::new()).expect("the receiver is above");
    let sealer = Sealer { jobs, empty, emptied: sender.clone(), busy: busy.clone() };
    let (group, generation) = (config.agent.group, config.agent.generation);
    let thread = std::thread::Builder::new()
        .name("seal".into())
        .spawn(move || {
            for job in receiver {
                // Who waits for a point need not wait for this as well.
                if job.verdict.is_none() {
                    processor.wait(|| stop.load(Ordering::SeqCst));
                }
                let progress = outbox.progress();
                let level = choose(progress.bytes, progress.way_rate);
                match seal_one(group, generation, &job, &key, level) {
                    Ok(entry) => {
                        fault_point("after-seal");
                        outbox.push(entry);
                    }
                    Err(error) => {
                        // Not sealing an epoch leaves a gap that can never be filled: stop here, with the reason.
                        reports.fail(format!("seal epoch {}: {error}", job.epoch));
                        return;
                    }
                }
                let mut fold = job.cut.fold;
                fold.clear();
                busy.store(0, Ordering::SeqCst);
                if sender.send(fold).is_err() {
                    return;
                }
            }
        })
        .context("start the sealing thread")?;
    Ok((sealer, thread))
}

fn seal_one(
    group: GroupId,
    generation: Generation,
    job: &Job,
    key: &GroupKey,
    level: Level,
) -> Result<Entry, changeset::SealError> {
    let cut_time = job.cut.time;
    let (consistency, note) = job.judge();
    let stamp = Stamp { group, generation, epoch: job.epoch, consistency, cut_time };
    let options = SealOptions { level, threads: SEAL_THREADS };
    let sealed = seal_point(&stamp, &note, &job.volumes, &job.cut.fold, key, options)?;
    let bytes = sealed.total_bytes();
    Ok(Entry { epoch: job.epoch, consistency, cut_time, pieces: sealed.pieces, bytes })
}

/// A way that is behind and slow wants smaller changesets. A fast way that is behind wants none of the processor's time:
/// then the other parts, or this machine, are what limits.
fn choose(unsent: ByteCount, way_rate: Option<f64>) -> Level {
    match way_rate {
        Some(rate) if unsent >= WAY_LIMITS_BYTES && rate < SMALL_BELOW => Level::Small,
        Some(rate) if unsent >= WAY_LIMITS_BYTES && rate < BALANCED_BELOW => Level::Balanced,
        _ => Level::Fast,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_slow_way_that_is_behind_makes_compression_stronger() {
        let behind = ByteCount::mib(20);
        assert_eq!(choose(behind, Some(5e6)), Level::Small);
        assert_eq!(choose(behind, Some(30e6)), Level::Balanced);
        assert_eq!(choose(behind, Some(400e6)), Level::Fast);
        assert_eq!(choose(behind, None), Level::Fast);
        assert_eq!(choose(ByteCount::ZERO, Some(1e6)), Level::Fast);
    }
}
