//! A group's work in the background, on a thread of its own: spans, retention, pins that expire, scrubbing.
//!
//! Bounded in the bytes it reads and writes a second. A failure is told in the group's status, and tried again; it never stops
//! apply. It ends when told to, or when dropped.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::GroupId;
use parking_lot::{Condvar, Mutex};
use replica::{GroupReplica, Maintained, Pace, ReplicaError, ScrubReport};

use crate::GroupConfig;

/// How long it rests when there was nothing to do.
const REST: Duration = Duration::from_secs(1);
/// How long it waits after a failure.
const PAUSE: Duration = Duration::from_secs(30);
/// When the first scrub begins after the start, so that a server that is started again and again gets on.
const FIRST_SCRUB: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) struct Upkeep {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    group: GroupId,
    /// For what goes on by itself.
    pace: Pace,
    /// For what somebody waits for.
    asked: Pace,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    stopping: bool,
    /// What failed last, until the same succeeds.
    trouble: Option<String>,
    /// What the last scrub found.
    damage: Vec<String>,
}

impl Upkeep {
    pub(crate) fn start(config: &GroupConfig, replica: Arc<GroupReplica>) -> Upkeep {
        let shared = Arc::new(Shared {
            group: config.id,
            pace: Pace::bounded(config.upkeep.rate_max),
            asked: Pace::unbounded(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let every = (config.upkeep.scrub_every_days > 0).then(|| DAY * config.upkeep.scrub_every_days);
        let work = {
            let shared = shared.clone();
            move || shared.run(&replica, every)
        };
        let thread = match std::thread::Builder::new().name("upkeep".to_owned()).spawn(work) {
            Ok(thread) => Some(thread),
            Err(error) => {
                let trouble = format!("start work in the background: {error}; retention does not thin");
                tracing::error!(group = %config.id, trouble);
                shared.state.lock().trouble = Some(trouble);
                None
            }
        };
        Upkeep { shared, thread }
    }

    /// Makes it end soon.
    pub(crate) fn stop(&self) {
        self.shared.pace.stop();
        self.shared.asked.stop();
        self.shared.state.lock().stopping = true;
        self.shared.changed.notify_all();
    }

    /// For work that an operator waits for.
    pub(crate) fn asked(&self) -> &Pace {
        &self.shared.asked
    }

    /// What a person should know.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let state = self.shared.state.lock();
        state.trouble.iter().chain(&state.damage).cloned().collect()
    }

    /// Takes note of what a scrub of all volumes found.
    pub(crate) fn scrubbed(&self, report: &ScrubReport) {
        self.shared.scrubbed(report);
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(group = %self.shared.group, "work in the background ended by a fault");
        }
    }
}

impl Shared {
    fn run(&self, replica: &GroupReplica, scrub_every: Option<Duration>) {
        let mut scrub_at = scrub_every.map(|_| Instant::now() + FIRST_SCRUB);
        loop {
            let rest = match self.step(replica, &mut scrub_at, scrub_every) {
                Ok(Maintained::Nothing) => REST,
                Ok(done) => {
                    self.told(&done);
                    Duration::ZERO
                }
                Err(ReplicaError::Stopped) => REST,
                Err(error) => {
                    let trouble = format!("work in the background: {error}; tried again");
                    tracing::error!(group = %self.group, trouble);
                    self.state.lock().trouble = Some(trouble);
                    PAUSE
                }
            };
            let mut state = self.state.lock();
            if rest.is_zero() {
                state.trouble = None;
            } else if !state.stopping {
                self.changed.wait_for(&mut state, rest);
            }
            if state.stopping {
                return;
            }
        }
    }

    fn step(
        &self,
        replica: &GroupReplica,
        scrub_at: &mut Option<Instant>,
        scrub_every: Option<Duration>,
    ) -> Result<Maintained, ReplicaError> {
        let done = replica.maintain(&self.pace)?;
        if done != Maintained::Nothing {
            return Ok(done);
        }
        self.state.lock().trouble = None;
        if let (Some(at), Some(every)) = (*scrub_at, scrub_every)
            && at <= Instant::now()
        {
            *scrub_at = Some(Instant::now() + every);
            tracing::info!(group = %self.group, "scrub begins");
            let report = replica.scrub(None, &self.pace, &|_| {})?;
            tracing::info!(
                group = %self.group, read = %report.read, findings = report.findings.len(), "scrub ended"
            );
            self.scrubbed(&report);
        }
        Ok(Maintained::Nothing)
    }

    fn told(&self, done: &Maintained) {
        match done {
            Maintained::Thinned { layers, before, after } => {
                tracing::debug!(group = %self.group, layers, %before, %after, "recovery points thinned");
            }
            Maintained::Dropped { oldest } => {
                tracing::debug!(group = %self.group, %oldest, "recovery points dropped");
            }
            Maintained::Unpinned(epochs) => {
                tracing::info!(group = %self.group, ?epochs, "pins have expired");
            }
            Maintained::Span | Maintained::Checksums | Maintained::Catalogue | Maintained::Nothing => {}
        }
    }

    fn scrubbed(&self, report: &ScrubReport) {
        let mut damage = Vec::new();
        for finding in &report.findings {
            let concerns = match finding.points {
                None => "no recovery point".to_owned(),
                Some((first, last)) => format!("{} recovery points, {first} to {last}", finding.points_count),
            };
            let said = format!("{}: {}; it concerns {concerns}", finding.path.display(), finding.problem);
            tracing::error!(group = %self.group, "scrub: {said}");
            damage.push(said);
        }
        for note in &report.notes {
            tracing::warn!(group = %self.group, "scrub: {note}");
        }
        self.state.lock().damage = damage;
    }
}
