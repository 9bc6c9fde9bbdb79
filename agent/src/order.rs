//! What the thread that takes points asks of the engine: get ready for a cut, cut.
//!
//! The engine alone drives the source, so that an order is served between two of its steps. One order at a time.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use block::{ByteCount, Epoch, UnixNanos};
use capture::{Position, Progress, SourceStatus};
use changeset::Fold;
use control::{AgentRefusal, ResyncWhen};
use durable::fault_point;
use jiff::Timestamp;
use parking_lot::{Condvar, Mutex};

use crate::engine::{EPOCHS_UNSENT_MAX, Engine};
use crate::resync::{Deed, Look, Part};
use crate::seal::Verdict;

/// A freeze reads at most what takes half of its budget; the rest is for what is not foreseen.
const BUDGET_SHARE: f64 = 0.5;
/// What a freeze may read while it is not known how fast the disks are read.
const READ_UNKNOWN: ByteCount = ByteCount::mib(4);
/// How often what is left to read is looked at while getting ready.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Reads are timed over at least so long.
const RATE_AFTER: Duration = Duration::from_millis(100);
/// The engine stays ready so long besides the budget; then whoever asked is taken to be gone.
const READY_BESIDES: Duration = Duration::from_secs(30);

/// An order that cannot be carried out, in words.
pub(crate) type Refusal = String;

/// A cut that was taken for an order.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) epoch: Epoch,
    pub(crate) cut_time: UnixNanos,
    /// The epoch is sealed when the verdict has come, or this is dropped.
    pub(crate) verdict: Sender<Verdict>,
}

enum Order {
    /// Wait until a freeze of `budget` is enough to read what is still to be read, and keep everything that a cut needs.
    Prepare { until: Instant, budget: Duration, reply: Sender<Result<(), Refusal>> },
    /// Cut once everything that was written before now is in, and nothing is left to be read.
    Cut { until: Instant, reply: Sender<Result<Taken, Refusal>> },
    /// Not ready any more.
    Release,
}

/// The way to the engine.
#[derive(Default)]
pub(crate) struct Orders {
    slot: Mutex<Slot>,
    given: Condvar,
}

/// What is compared with the replica because somebody asked for it.
#[derive(Debug)]
pub(crate) struct Comparing {
    pub(crate) volumes: Vec<String>,
    pub(crate) bytes: ByteCount,
    /// When it begins, if the hours for it must come first.
    pub(crate) begins: Option<UnixNanos>,
}

/// A wish for a resync: of one volume or all.
struct Resync {
    volume: Option<String>,
    when: ResyncWhen,
    reply: Sender<Result<Comparing, (AgentRefusal, Refusal)>>,
}

#[derive(Default)]
struct Slot {
    next: Option<Order>,
    resyncs: Vec<Resync>,
    /// Nobody takes orders any more.
    closed: bool,
}

impl Orders {
    fn give(&self, order: Order) {
        let mut slot = self.slot.lock();
        if !slot.closed {
            slot.next = Some(order);
            self.given.notify_all();
        } // else the order goes, and its reply's sender with it
    }

    /// Waits until a freeze of `budget` would do; at most until `until`. The engine then waits for [`Orders::cut`] or
    /// [`Orders::release`], and cuts nothing else meanwhile.
    pub(crate) fn prepare(&self, until: Instant, budget: Duration) -> Result<(), Refusal> {
        let (reply, answer) = channel();
        self.give(Order::Prepare { until, budget, reply });
        answer.recv().unwrap_or_else(|_| Err(ENDED.into()))
    }

    /// Cuts with everything in it that was written before; at most until `until`.
    pub(crate) fn cut(&self, until: Instant) -> Result<Taken, Refusal> {
        let (reply, answer) = channel();
        self.give(Order::Cut { until, reply });
        answer.recv().unwrap_or_else(|_| Err(ENDED.into()))
    }

    /// Has volumes compared with the replica.
    pub(crate) fn resync(
        &self,
        volume: Option<String>,
        when: ResyncWhen,
    ) -> Result<Comparing, (AgentRefusal, Refusal)> {
        let (reply, answer) = channel();
        let mut slot = self.slot.lock();
        if !slot.closed {
            slot.resyncs.push(Resync { volume, when, reply });
            self.given.notify_all();
        }
        drop(slot);
        answer.recv().unwrap_or_else(|_| Err((AgentRefusal::Stopping, ENDED.into())))
    }

    /// No cut will be asked for.
    pub(crate) fn release(&self) {
        self.give(Order::Release);
    }

    /// Sleeps until an order comes, at most `time`.
    pub(crate) fn sleep(&self, time: Duration) {
        let mut slot = self.slot.lock();
        if slot.next.is_none() {
            self.given.wait_for(&mut slot, time);
        }
    }

    fn take(&self) -> Option<Order> {
        self.slot.lock().next.take()
    }

    /// Answers whoever waits, and whoever asks from now on: the engine has ended.
    pub(crate) fn close(&self) {
        let mut slot = self.slot.lock();
        slot.closed = true;
        slot.next = None;
        slot.resyncs.clear();
    }
}

const ENDED: &str = "capture has ended";

/// What the engine is doing for an order.
#[derive(Default)]
pub(crate) enum Serving {
    #[default]
    Nothing,
    /// Waiting until little is left to be read.
    Preparing(Preparing),
    /// Keeping what a cut needs.
    Ready { spare: Fold, until: Instant },
    /// Waiting until all that was written before the order is in.
    Cutting(Cutting),
}

pub(crate) struct Preparing {
    until: Instant,
    budget: Duration,
    reply: Sender<Result<(), Refusal>>,
    reads: Reads,
}

pub(crate) struct Cutting {
    /// There from the beginning when it was prepared.
    spare: Option<Fold>,
    position: Position,
    until: Instant,
    reply: Sender<Result<Taken, Refusal>>,
}

impl Serving {
    /// Whether something is frozen or about to be.
    pub(crate) fn is_urgent(&self) -> bool {
        match self {
            Serving::Nothing | Serving::Preparing(_) => false,
            Serving::Ready { .. } => true,
            Serving::Cutting(cutting) => cutting.spare.is_some(),
        }
    }

    fn into_spare(self) -> Option<Fold> {
        match self {
            Serving::Ready { spare, .. } => Some(spare),
            Serving::Cutting(cutting) => cutting.spare,
            Serving::Nothing | Serving::Preparing(_) => None,
        }
    }
}

/// How fast the disks are read, as far as drains have shown.
pub(crate) struct Reads {
    looked: Instant,
    began: Option<(Instant, ByteCount)>,
    bytes_per_s: Option<f64>,
}

impl Reads {
    fn new() -> Reads {
        Reads { looked: Instant::now() - LOOK_EVERY, began: None, bytes_per_s: None }
    }

    fn look(&mut self, status: &SourceStatus) {
        match self.began {
            Some((began, drained)) if began.elapsed() >= RATE_AFTER => {
                let bytes = status.drained.saturating_sub(drained);
                if bytes > ByteCount::ZERO {
                    self.bytes_per_s = Some(bytes.0 as f64 / began.elapsed().as_secs_f64());
                }
                self.began = None;
            }
            None if status.draining > ByteCount::ZERO => self.began = Some((Instant::now(), status.drained)),
            _ => {}
        }
    }

    /// What can be read within a share of the budget.
    fn within(&self, budget: Duration) -> ByteCount {
        match self.bytes_per_s {
            None => READ_UNKNOWN,
            Some(rate) => ByteCount((rate * budget.as_secs_f64() * BUDGET_SHARE) as u64),
        }
    }
}

fn remaining(status: &SourceStatus) -> ByteCount {
    status.volumes.iter().map(|volume| volume.dirty).sum::<ByteCount>() + status.draining
}

impl Engine {
    /// Answers who asks for resyncs, and begins those whose time has come.
    pub(crate) fn serve_resyncs(&mut self) {
        let asked = std::mem::take(&mut self.orders.slot.lock().resyncs);
        for Resync { volume: wanted, when, reply } in asked {
            let volumes = self.source.volumes();
            let meant: Vec<usize> = (0..volumes.len())
                .filter(|index| wanted.as_ref().is_none_or(|name| *name == volumes[*index].name))
                .collect();
            let answer = if meant.is_empty() {
                let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
                let reason =
                    format!("no volume of this group has that name; there are: {}", names.join(", "));
                Err((AgentRefusal::NoSuchVolume, reason))
            } else if self.source.suspect_granules(meant[0], &mut std::iter::empty()) {
                tracing::info!(volume = wanted, ?when, "resync asked for");
                self.comparisons.resyncs.ask(&meant, when);
                Ok(Comparing {
                    volumes: meant.iter().map(|index| volumes[*index].name.clone()).collect(),
                    bytes: meant.iter().map(|index| volumes[*index].size).sum(),
                    begins: self.comparisons.resyncs.begins(when),
                })
            } else {
                let reason = "what is scanned is compared with what was sent, all the time".to_owned();
                Err((AgentRefusal::NotFollowed, reason))
            };
            // Who asked may have gone.
            let _ = reply.send(answer);
        }
        if self.comparisons.resyncs.is_urgent() {
            let status = self.source.status();
            self.decide_resync(&status);
        }
    }

    /// Begins to compare, if it is time to.
    pub(crate) fn decide_resync(&mut self, status: &SourceStatus) {
        let look = Look {
            suspect: status.suspect,
            compared: status.compared,
            different: status.different,
            volumes: status
                .volumes
                .iter()
                .map(|volume| (volume.name.clone(), volume.size, volume.dirty))
                .collect(),
            losses: status.losses,
            last_error: status.last_error.clone(),
            has_replica: self.outbox.is_opened().then(|| self.outbox.progress().held.held != Epoch::NONE),
        };
        let Deed::Begin(parts) = self.comparisons.resyncs.look(look, Timestamp::now()) else { return };
        fault_point("before-resync");
        for (volume, part) in parts {
            match part {
                Part::All if self.source.suspect(volume) => {}
                Part::All => self.source.send_again(volume),
                Part::Granules(granules) => {
                    self.source.suspect_granules(volume, &mut granules.into_iter());
                }
            }
        }
    }
}

impl Engine {
    /// Serves an order as far as it goes without waiting; whether it cut.
    pub(crate) fn serve(&mut self, progress: Progress) -> bool {
        if let Some(order) = self.orders.take() {
            let kept = std::mem::take(&mut self.serving).into_spare();
            match order {
                Order::Release => self.give_back(kept),
                Order::Prepare { until, budget, reply } => {
                    self.give_back(kept);
                    self.serving =
                        Serving::Preparing(Preparing { until, budget, reply, reads: Reads::new() });
                }
                Order::Cut { until, reply } => {
                    let position = self.source.position();
                    self.serving = Serving::Cutting(Cutting { spare: kept, position, until, reply });
                }
            }
        }
        match std::mem::take(&mut self.serving) {
            Serving::Nothing => false,
            Serving::Preparing(preparing) => self.serve_prepare(preparing),
            Serving::Ready { spare, until } => {
                if Instant::now() < until {
                    self.serving = Serving::Ready { spare, until };
                } else {
                    self.give_back(Some(spare));
                }
                false
            }
            Serving::Cutting(cutting) => self.serve_cut(cutting, progress),
        }
    }

    fn give_back(&self, spare: Option<Fold>) {
        if let Some(spare) = spare {
            self.sealer.give_back(spare);
        }
    }

    fn serve_prepare(&mut self, mut preparing: Preparing) -> bool {
        let now = Instant::now();
        if now.duration_since(preparing.reads.looked) < LOOK_EVERY {
            self.serving = Serving::Preparing(preparing);
            return false;
        }
        preparing.reads.looked = now;
        let status = self.source.status();
        preparing.reads.look(&status);
        let (left, most) = (remaining(&status), preparing.reads.within(preparing.budget));
        let mut cut = false;
        let why = if let Some(why) = self.why_no_epoch() {
            why
        } else if left > most {
            format!(
                "{left} are still to be read from the disks, and a freeze of {} ms is enough for {most}",
                preparing.budget.as_millis()
            )
        } else if self.source.open_bytes() + left > self.open_limit() {
            cut = self.cut();
            "the agent's memory holds what the process server has not taken yet".into()
        } else if let Some(spare) = self.sealer.spare() {
            match preparing.reply.send(Ok(())) {
                Ok(()) => {
                    let until = now + preparing.budget + READY_BESIDES;
                    self.serving = Serving::Ready { spare, until };
                }
                // Who asked has gone.
                Err(_) => self.give_back(Some(spare)),
            }
            return false;
        } else {
            SEALING.into()
        };
        if now < preparing.until {
            self.serving = Serving::Preparing(preparing);
        } else {
            // Who asked may have gone.
            let _ = preparing.reply.send(Err(why));
        }
        cut
    }

    fn serve_cut(&mut self, mut cutting: Cutting, progress: Progress) -> bool {
        let prepared = cutting.spare.is_some();
        let why = match self.why_not_yet(&cutting) {
            Some(why) => why,
            None => match cutting.spare.take().or_else(|| self.sealer.spare()) {
                Some(spare) => return self.cut_for_order(spare, &cutting.reply),
                None => SEALING.into(),
            },
        };
        // Prepared, an epoch that has outgrown its memory cannot be cut to go on.
        let stuck = prepared && progress == Progress::Full;
        if Instant::now() < cutting.until && !stuck {
            self.serving = Serving::Cutting(cutting);
            return false;
        }
        self.give_back(cutting.spare);
        // Who asked may have gone.
        let _ = cutting.reply.send(Err(why));
        false
    }

    fn cut_for_order(&mut self, spare: Fold, reply: &Sender<Result<Taken, Refusal>>) -> bool {
        let Some(epoch) = self.outbox.number() else {
            self.give_back(Some(spare));
            let _ = reply.send(Err(NOT_REACHED.into()));
            return false;
        };
        let (verdict, comes) = channel();
        let (consistency, cut_time) = self.cut_as(epoch, spare, Some(comes));
        let taken = match consistency.is_point() {
            true => Ok(Taken { epoch, cut_time, verdict }),
            // The verdict's sender goes, so that the epoch is sealed as what it is.
            false => Err(MISSED_AT_THE_CUT.to_owned()),
        };
        // Who asked may have gone; the epoch is a point all the same.
        let _ = reply.send(taken);
        true
    }

    /// Why no epoch could be ended now, whatever is in it.
    fn why_no_epoch(&self) -> Option<Refusal> {
        if !self.outbox.is_opened() {
            return Some(NOT_REACHED.into());
        }
        let unsent = self.outbox.progress().epochs;
        (unsent >= EPOCHS_UNSENT_MAX).then(|| {
            format!("{unsent} epochs wait for the process server; look whether it is reached and keeps up")
        })
    }

    /// Why the open epoch does not hold everything before the order, as a point.
    fn why_not_yet(&self, cutting: &Cutting) -> Option<Refusal> {
        if cutting.spare.is_none()
            && let Some(why) = self.why_no_epoch()
        {
            return Some(why);
        }
        if !self.source.reached(cutting.position) {
            return Some("what was written has not been taken from the ring yet".into());
        }
        (!self.source.consistency().is_point()).then(|| {
            let left = remaining(&self.source.status());
            format!("{left} were still to be read from the disks")
        })
    }
}

const NOT_REACHED: &str = "the process server has not been reached yet";
/// Everything was consumed and read, and then something was missed before the cut: the next one may do better.
pub(crate) const MISSED_AT_THE_CUT: &str = "writes were missed at the cut itself";
const SEALING: &str = "the epoch before is being sealed";
