//! The agent: captures a machine's disks and sends changesets to the process server.
//!
//! Rooms: `config` reads the file; `volumes` finds the disks; `engine` is the thread that drives the source and decides when
//! to cut; `seal` turns folds into changesets; `outbox` holds them until the process server has them durably; `deliver`
//! talks to it; `compare` asks the target, through it, what need not be sent; `resync` decides when; `limits` is what it may take of the machine and the way; `check` says what the machine lacks. `point` takes points that somebody asked for: `hooks` quiesces
//! applications, `freeze` freezes filesystems, `order` is the way from there to the engine; `hand_over` keeps the disks from everybody and proves that the
//! target has them; `socket` is how root of this machine asks.
//!
//! Memory: open epoch, the epoch being sealed and the outbox together stay inside `epoch_memory_bytes`. When it is full the
//! engine stops consuming; the ring fills; writes turn into dirty bits. The application never waits.
//!
//! Crash: only which disks are protected is persistent here. But the kernel goes on tracking, and knows which granules were
//! taken and are not held by the process server. An agent that starts again asks the process server for the last epoch it
//! holds, and reads just those granules again. After a reboot it reads everything.

mod application;
mod check;
mod compare;
mod config;
mod deliver;
mod engine;
mod fleet;
mod freeze;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hand_over;
mod hooks;
mod limits;
mod order;
mod outbox;
mod point;
mod report;
mod resync;
mod seal;
mod socket;
mod source;
mod volumes;

pub use application::{ApplicationSection, BUDGET_MS, ENVIRONMENT_MAX, EVERY_S, HOOK_TIMEOUT_MS};
pub use capture::DeviceName;
pub use check::{CheckReport, check};
pub use config::{
    AgentConfig, AgentSection, ConfigError, EPOCH_INTERVAL_MS, EPOCH_MEMORY_MIN, RING_BYTES_MAX,
    SourceChoice, TRACKING_FOLDER, VolumeConfig,
};
pub use fleet::{FleetAgent, FleetConfig};
pub use freeze::{FILESYSTEMS_FROZEN_MAX, watchdog_instead};
pub use hand_over::COMPARISONS_MAX;
pub use hooks::check_hooks;
pub use hooks::{HOOKS_MAX, OUTPUT_BYTES_MAX};
pub use limits::{BANDWIDTH_MIN, CPU_PERCENT_MIN, Day, LimitsSection, SCHEDULE_MAX, Window};
pub use resync::{DIRTY_PERCENT, Hours, ResyncSection, WINDOWS_MAX};
pub use socket::CONVERSATIONS_MAX;
pub use source::probe;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use block::GroupId;
use changeset::GroupKey;
use control::AgentReport;
use control::metrics::{Values, of_agent};
use parking_lot::Mutex;
use wire::{LiveCredentials, Peers};

use crate::compare::Comparisons;
use crate::engine::Engine;
use crate::limits::Processor;
use crate::order::Orders;
use crate::outbox::Outbox;
use crate::report::Reports;
use crate::socket::Socket;
use crate::source::Opened;
use crate::volumes::Volumes;

/// How often it is looked whether a disk that was taken away is there again.
const LOOK_FOR_DISKS_EVERY: Duration = Duration::from_secs(1);

/// A running agent. Dropping it stops it; the kernel goes on tracking if `keep_tracking` is set.
///
/// When a disk that was taken away is back, under whatever name, the agent starts anew, which goes on with the other disks
/// and reads that one.
pub struct Agent {
    group: GroupId,
    parts: Arc<Mutex<Parts>>,
    watch: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// Starts capture and delivery. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the configuration names what cannot be used: a disk, a key, credentials.
    pub fn start(config: AgentConfig) -> anyhow::Result<Agent> {
        let parts = Arc::new(Mutex::new(Parts::start(&config)?));
        let group = config.agent.group;
        let watch = tokio::spawn(watch_disks(Arc::downgrade(&parts), config));
        Ok(Agent { group, parts, watch })
    }

    /// What the agent says of itself, at most a second old.
    pub fn report(&self) -> AgentReport {
        self.parts.lock().reports.latest()
    }

    /// Its figures, for Prometheus; none when it has stopped.
    pub fn figures(&self) -> impl Fn() -> Values + Send + Sync + use<> {
        let (group, parts) = (self.group.to_string(), Arc::downgrade(&self.parts));
        move || {
            let report = parts.upgrade().map(|parts| parts.lock().reports.latest());
            report.map_or_else(Values::default, |report| of_agent(Some(&group), &report))
        }
    }

    /// Stops capture and delivery. What was not delivered is read again from the disks at the next start.
    pub fn shutdown(self) {
        // As dropping does.
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.watch.abort();
        self.parts.lock().end();
    }
}

async fn watch_disks(parts: Weak<Mutex<Parts>>, config: AgentConfig) {
    let config = Arc::new(config);
    loop {
        tokio::time::sleep(LOOK_FOR_DISKS_EVERY).await;
        let (parts, config) = (parts.clone(), config.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let Some(parts) = parts.upgrade() else { return };
            let mut parts = parts.lock();
            if parts.ended {
                return;
            }
            if parts.volumes.presence.any_gone() && volumes::all_there(&config) {
                tracing::info!("a disk that was taken away is back: starting anew with it");
                parts.start_anew(&config, None);
            } else if let Some(cause) = parts.comparisons.resyncs.take_rebase() {
                tracing::warn!("{}: starting anew", cause.why);
                parts.start_anew(&config, Some(cause));
            }
        });
        // A panic in there has reported itself; there is nothing to start anew then.
        let _ = looked.await;
    }
}

/// What an agent is made of.
struct Parts {
    stop: Arc<AtomicBool>,
    reports: Arc<Reports>,
    comparisons: Arc<Comparisons>,
    threads: Vec<JoinHandle<()>>,
    /// Keeps the disks from other agents.
    volumes: Volumes,
    delivery: tokio::task::JoinHandle<()>,
    comparing: tokio::task::JoinHandle<()>,
    /// `None` when it cannot be had; the agent does its work without it.
    socket: Option<Socket>,
    /// For good.
    ended: bool,
}

impl Parts {
    fn start(config: &AgentConfig) -> anyhow::Result<Parts> {
        let credentials =
            LiveCredentials::load(&config.agent.credentials).context("load the agent's credentials")?;
        let way = (Arc::new(credentials), Peers::default());
        let key = GroupKey::load(&config.agent.group_key).context("load the group's key")?;
        let thawed = freeze::thaw_left(&point::freeze_marker(config));
        let mut volumes = volumes::settle(config)?;
        let comparisons = Arc::new(Comparisons::new(config, &key, &volumes.list));
        let Opened { source, mut notes, resumed, .. } = source::open(config, &volumes.list, &comparisons)?;
        if volumes.are_new {
            comparisons.resyncs.at_once();
        }
        notes.append(&mut volumes.notes);
        notes.extend(thawed);
        let stop = Arc::new(AtomicBool::new(false));
        let outbox = Arc::new(Outbox::new(resumed));
        comparisons.follow(&outbox);
        let disks: Vec<_> = volumes.list.iter().map(|volume| volume.path.clone()).collect();
        let kept = Arc::new(hand_over::Disks::new(disks.clone()));
        let reports = Arc::new(Reports::new(config, &volumes, notes, kept.clone()));
        let processor = Processor::new(&config.limits);
        let sealing = (outbox.clone(), reports.clone(), processor.clone(), stop.clone());
        let (sealer, seal_thread) = seal::start(config, key, sealing)?;
        let orders = Arc::new(Orders::default());
        let scanned = source.status().volumes.iter().any(|volume| volume.mode == capture::Mode::Scan);
        let engine = Engine::new(
            config,
            (source, &volumes, comparisons.clone()),
            sealer,
            outbox.clone(),
            orders.clone(),
            reports.clone(),
            (processor, stop.clone()),
        );
        let engine = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || engine.run())
            .context("start the capture thread")?;
        let (points, point_thread) = point::start(config, disks, scanned, orders.clone(), stop.clone())?;
        let means = hand_over::Means {
            disks: kept,
            points,
            orders,
            outbox: outbox.clone(),
            comparisons: comparisons.clone(),
        };
        let socket = Socket::listen(config.control_socket(), means);
        if let Err(error) = &socket {
            let error = format!("{error:#}");
            tracing::warn!(error, "`seawall point` cannot reach this agent; replication goes on");
        }
        let comparing = tokio::spawn(compare::run(config.clone(), way.clone(), comparisons.clone()));
        let delivery =
            tokio::spawn(deliver::run(config.clone(), way, outbox, comparisons.clone(), reports.clone()));
        // Points first: what is frozen is thawed, and applications go on, before anything else ends.
        let threads = vec![point_thread, engine, seal_thread];
        Ok(Parts {
            stop,
            reports,
            comparisons,
            threads,
            volumes,
            delivery,
            comparing,
            socket: socket.ok(),
            ended: false,
        })
    }

    /// Ends, and begins again with what is there now. With a cause, what is known of what was sent is forgotten, and all is compared.
    fn start_anew(&mut self, config: &AgentConfig, cause: Option<resync::Cause>) {
        self.stop_all();
        self.volumes.release();
        if cause.is_some() {
            source::forget_kept(config);
        }
        match Parts::start(config) {
            Ok(parts) => {
                if let Some(cause) = cause {
                    parts.comparisons.resyncs.expect(Some(cause), false);
                }
                *self = parts;
            }
            // Looked at again; meanwhile the report says what is wrong.
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(error, "start anew");
                self.reports.fail(format!("start anew: {error}"));
            }
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.stop_all();
    }

    fn stop_all(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.delivery.abort();
        self.comparing.abort();
        self.socket.take();
        for thread in self.threads.drain(..) {
            // A panicked thread has already reported itself.
            let _ = thread.join();
        }
    }
}
