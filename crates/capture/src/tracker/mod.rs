//! The state machine of capture: consumes records, drains dirty granules, cuts epochs. The same in the agent and in the
//! model tests; the kernel and the disks are behind [`Tap`] and [`Disk`].
//!
//! Consistency (R3): an epoch is crash-consistent if at its cut nothing is dirty, nothing is being drained and no missed write
//! is in flight. That is looked at after the ring has been consumed up to the cut, so that a missed write that completed
//! before any recorded one was issued is seen: by its bits, or by its slot if its end was not seen.
//!
//! Ends that nobody saw: the disks' own counts are compared with ours at each cut and every 50 ms in between. What is
//! ahead is looked for among the slots; what they do not explain was never seen, and its volume is read again.
//!
//! Order of a drain, and what breaks if it is changed:
//! 1. Note which granules are dirty. From now on no write to them enters the ring.
//! 2. Wait until every captured write that was in flight has completed. Without it, a write that was captured before the
//!    granule became dirty could reach the disk after our read: the read, landing later, would put old data on
//!    top of it. Such as count as missed need no wait: they make their granules dirty when they complete.
//! 3. Set *draining*, then clear *dirty*. The other way round, a write issued in between would enter the ring although
//!    an older or newer state of it is being read.
//! 4. Read with O_DIRECT. A missed write that completes from now on sets *dirty* again.
//! 5. Note how far the ring has been produced, *after* the read. The read may hold missed writes that depend on captured
//!    ones; the epoch must not end before those.
//! 6. When the ring has been consumed so far, fold what was read, then clear *draining*. If it were cleared first, a
//!    write captured meanwhile could be folded before the older data.
//!
//! Suspect granules, of which it is not known whether they changed, take the same way, but what is read is only compared:
//! 4'. The replica is asked with checksums of what was read. Draining stays set until the answer has come.
//! 5'. It answers when it has applied the open epoch, if that holds anything: no later epoch changes these granules before they
//!     are trusted. An earlier answer could be of a state that a captured write, still on its way, changes.
//! 6'. The same: suspect and draining are cleared. Different: *dirty* is set first, and the next round reads and sends it.
//!
//! Crash: what the tracker has taken and nobody holds durably yet is known to the tap as touched or draining. A tracker
//! that starts on a tap that was used before marks it dirty, and reads it again (R8).
//! Retries: a failed read leaves its granules dirty; the next round begins after [`READ_RETRY_PAUSE_NS`].

mod compare;
mod doubt;
mod pace;

use std::collections::VecDeque;
use std::ops::ControlFlow;

use block::{Bitmap, ByteCount, ByteOffset, Consistency, Epoch, Extent, GRANULE_BYTES, Granule, UnixNanos};
use changeset::{Fold, VolumeInfo};

use crate::CaptureError;
use crate::compare::Comparer;
use crate::disk::{Disk, Read, ReadDone};
use crate::lanes::Lanes;
use crate::source::{Cut, Mode, Position, Progress, Source, SourceStatus, VolumeStatus};
use crate::tap::{RingPosition, Tap, VolumeIndex};
use compare::Comparing;
use doubt::Unseen;
use pace::Pace;

/// Unfinished requests may hold this much besides the epoch's own memory; past it, the one that has waited longest is
/// given up and its granules are read from the disk.
pub const TRACKER_LANE_BYTES_MAX: ByteCount = ByteCount::mib(64);
/// After a failed read, the next round of draining waits this long.
const READ_RETRY_PAUSE_NS: u64 = 1_000_000_000;
/// Samples of (position, time) kept to date a cut that lags; past it the oldest is dropped, and a cut is dated earlier.
const SAMPLES_MAX: usize = 4096;
/// When the bits have been found clear for so long although the count says otherwise, they are counted again. What is counted and not
/// set yet takes microseconds.
const COUNT_AGAIN_NS: u64 = 50_000_000;
/// Captured writes that are in flight for longer count as missed, so that a drain need not wait for a slow disk, nor for a
/// write whose completion the programs did not see.
const GRACE_NS_MAX: u64 = 500_000_000;

/// How hard the tracker drains.
#[derive(Clone, Copy, Debug)]
pub struct TrackerLimits {
    /// The largest single read, a multiple of the granule.
    pub read: ByteCount,
    /// Reads in flight.
    pub reads: usize,
    /// What unfinished requests may hold; at most [`TRACKER_LANE_BYTES_MAX`].
    pub lanes: ByteCount,
    /// Of the time, in percent (1 to 100), in which a read may be in flight while applications write; then there is
    /// only one at a time.
    pub share: u32,
}

impl Default for TrackerLimits {
    fn default() -> TrackerLimits {
        TrackerLimits { read: ByteCount::mib(1), reads: 4, lanes: TRACKER_LANE_BYTES_MAX, share: 10 }
    }
}

/// A round of draining.
enum Round {
    /// Nothing dirty when last looked.
    Idle,
    /// Waiting for the captured writes that were in flight when the dirty granules had been noted.
    InFlight { dirty: Vec<Bitmap>, suspects: Vec<Bitmap>, since: UnixNanos },
    /// Reading what was noted.
    Reading { dirty: Vec<Bitmap>, suspects: Vec<Bitmap>, volume: usize, next: Granule },
}

/// A read that has ended, and how far the ring must be consumed before it may be folded.
struct Landed {
    done: ReadDone,
    after: RingPosition,
}

/// Turns a tap and its disks into epochs.
pub struct Tracker<T, D> {
    tap: T,
    disk: D,
    volumes: Vec<VolumeInfo>,
    limits: TrackerLimits,
    fold: Fold,
    lanes: Lanes,
    round: Round,
    reads: usize,
    reading: ByteCount,
    landed: VecDeque<Landed>,
    comparer: Option<Box<dyn Comparer>>,
    comparing: Comparing,
    samples: VecDeque<(RingPosition, UnixNanos)>,
    /// The disks were in the consumed state at this time or later.
    dated: UnixNanos,
    /// What an earlier tracker had left in the ring is older than `dated` says, until it is consumed.
    undated_until: RingPosition,
    drained: ByteCount,
    losses: u64,
    /// Since when nothing is found dirty although the count says otherwise.
    miscounted: Option<UnixNanos>,
    pace: Pace,
    /// When it was last asked to advance.
    now: UnixNanos,
    /// By volume.
    unseen: Vec<Option<Unseen>>,
    looked_at: UnixNanos,
    /// The count of writes at the last look.
    seen_writes: u64,
    /// And at the last that found all well and nothing under way.
    looked_writes: u64,
    /// Since when there are writes outside a volume's known size.
    outgrown: Option<UnixNanos>,
    /// The last epoch that was cut.
    cut: Epoch,
    /// The last epoch that has something of the touched granules that wait; `None` when none wait.
    touched_through: Option<Epoch>,
    last_error: Option<String>,
    retry_at: UnixNanos,
    #[cfg(feature = "model")]
    rounds_overlap: bool,
}

impl<T: Tap, D: Disk> Tracker<T, D> {
    /// Follows `volumes`, which the tap and the disks number in the same order. `now` dates the beginning.
    pub fn new(
        tap: T,
        disk: D,
        volumes: Vec<VolumeInfo>,
        limits: TrackerLimits,
        now: UnixNanos,
    ) -> Tracker<T, D> {
        assert_eq!(usize::from(tap.volumes()), volumes.len(), "tap and volumes number the same disks");
        let produced = tap.produced();
        let mut tracker = Tracker {
            tap,
            disk,
            unseen: vec![None; volumes.len()],
            looked_at: UnixNanos(0),
            seen_writes: u64::MAX,
            looked_writes: u64::MAX,
            volumes,
            limits,
            fold: Fold::new(),
            lanes: Lanes::default(),
            round: Round::Idle,
            reads: 0,
            reading: ByteCount::ZERO,
            landed: VecDeque::new(),
            comparer: None,
            comparing: Comparing::default(),
            samples: VecDeque::new(),
            dated: now,
            undated_until: produced,
            drained: ByteCount::ZERO,
            losses: 0,
            miscounted: None,
            pace: Pace::default(),
            now,
            outgrown: None,
            cut: Epoch::NONE,
            touched_through: None,
            last_error: None,
            retry_at: UnixNanos(0),
            #[cfg(feature = "model")]
            rounds_overlap: false,
        };
        tracker.take_up();
        tracker
    }

    /// Suspect granules are compared with a replica before they are sent. Without this they are just sent.
    pub fn compare_with(&mut self, comparer: Box<dyn Comparer>) {
        self.comparer = Some(comparer);
    }

    /// What an earlier tracker had taken from this tap and nobody holds durably is read again.
    fn take_up(&mut self) {
        for volume in self.indices() {
            for granule in self.tap.unfinished(volume).iter() {
                self.tap.mark_dirty(volume, granule);
            }
        }
        self.tap.forget_unfinished();
    }

    /// Begins a round as soon as the reads of the one before have ended, folded or not: an error that was once made
    /// here, for the model test to find.
    #[cfg(feature = "model")]
    pub fn let_rounds_overlap(&mut self) {
        self.rounds_overlap = true;
    }

    /// The tap, for its counters and for driving a simulated one.
    pub fn tap(&mut self) -> &mut T {
        &mut self.tap
    }

    /// The disks, for driving simulated ones.
    pub fn disk(&mut self) -> &mut D {
        &mut self.disk
    }

    fn indices(&self) -> impl Iterator<Item = VolumeIndex> + use<T, D> {
        (0..self.tap.volumes()).map(VolumeIndex)
    }

    fn full(&self, limit: ByteCount) -> bool {
        full(&self.fold, limit)
    }

    fn consume(&mut self, until: RingPosition, limit: ByteCount) {
        let (fold, lanes) = (&mut self.fold, &mut self.lanes);
        let lane_bytes = self.limits.lanes.min(TRACKER_LANE_BYTES_MAX);
        self.tap.consume(until, &mut |record| {
            lanes.take(record, fold, lane_bytes);
            if full(fold, limit) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        for (volume, extent) in self.lanes.given_up.drain(..) {
            for granule in granules_of(extent) {
                self.tap.mark_dirty(volume, granule);
            }
        }
        while let Some((position, time)) = self.samples.front().copied()
            && position <= self.tap.consumed()
        {
            self.dated = time;
            self.samples.pop_front();
        }
    }

    fn land(&mut self, limit: ByteCount, now: UnixNanos) -> bool {
        let mut moved = false;
        while let Some(done) = self.disk.finished() {
            self.reads -= 1;
            self.pace.ended(now, done.took_ns);
            self.landed.push_back(Landed { done, after: self.tap.produced() });
        }
        while let Some(front) = self.landed.front()
            && front.after <= self.tap.consumed()
            && !self.full(limit)
            && let Some(Landed { done, .. }) = self.landed.pop_front()
        {
            moved = true;
            let Read { volume, extent, compare } = done.read;
            self.reading = self.reading - extent.length();
            match done.data {
                Ok(data) if compare => {
                    self.drained += extent.length();
                    self.gather(volume, extent, &data);
                    self.disk.recycle(data);
                    continue;
                }
                Ok(data) => {
                    self.drained += extent.length();
                    for (index, granule) in data.chunks(GRANULE_BYTES as usize).enumerate() {
                        let offset = ByteOffset(extent.offset().0 + index as u64 * GRANULE_BYTES);
                        if is_zero(granule) {
                            let zeroes = Extent::new(offset, ByteCount(granule.len() as u64));
                            self.fold.zero(volume.0, zeroes.expect("chunks are not empty"));
                        } else {
                            self.fold.write(volume.0, offset, granule);
                        }
                    }
                    self.disk.recycle(data);
                }
                Err(error) => {
                    let name = &self.volumes[usize::from(volume.0)].name;
                    self.last_error = Some(format!(
                        "read volume {name} at {} ({}): {error}; its granules stay dirty and are read again",
                        extent.offset(),
                        extent.length()
                    ));
                    self.retry_at = UnixNanos(now.0.saturating_add(READ_RETRY_PAUSE_NS));
                    for granule in granules_of(extent) {
                        self.tap.mark_dirty(volume, granule);
                    }
                }
            }
            for granule in granules_of(extent) {
                if compare {
                    self.tap.leave_drain(volume, granule);
                } else {
                    self.tap.end_drain(volume, granule);
                }
            }
        }
        moved
    }

    /// Moves the round on as far as it goes without waiting.
    fn drain(&mut self, limit: ByteCount, now: UnixNanos) -> bool {
        let mut moved = false;
        loop {
            self.round = match std::mem::replace(&mut self.round, Round::Idle) {
                Round::Idle => {
                    // One round at a time: a read of this round that is folded late would otherwise clear the draining
                    // bit of a granule that the next round is reading.
                    let folded = self.reads == 0 && self.landed.is_empty() && self.comparing.is_over();
                    #[cfg(feature = "model")]
                    let folded = folded || (self.rounds_overlap && self.reads == 0);
                    if self.tap.dirty_at_most() == 0 {
                        self.miscounted = None;
                        return moved;
                    }
                    if now < self.retry_at || !folded {
                        return moved;
                    }
                    let wanted = self.comparer.as_mut().map_or(Some(false), |comparer| comparer.is_wanted());
                    let mut suspects: Vec<Bitmap> = Vec::new();
                    let mut dirty: Vec<Bitmap> = Vec::new();
                    for volume in self.indices() {
                        let (mut bits, suspect) = (self.tap.dirty(volume), self.tap.suspects(volume));
                        match wanted {
                            Some(true) => suspects.push(suspect),
                            // They are sent as they are.
                            Some(false) => {
                                suspect.iter().for_each(|granule| self.tap.trust(volume, granule));
                                suspects.push(Bitmap::empty(suspect.granules()));
                            }
                            // They wait until they may be compared.
                            None => {
                                suspect.iter().for_each(|granule| bits.remove(granule));
                                suspects.push(suspect);
                            }
                        }
                        dirty.push(bits);
                    }
                    if dirty.iter().all(Bitmap::is_empty) {
                        if wanted.is_some() || suspects.iter().all(Bitmap::is_empty) {
                            self.count_again(now);
                        }
                        return moved;
                    }
                    self.tap.begin_grace();
                    Round::InFlight { dirty, suspects, since: now }
                }
                Round::InFlight { dirty, suspects, since } => {
                    if !self.tap.grace_over() {
                        if now.0.saturating_sub(since.0) < GRACE_NS_MAX {
                            self.round = Round::InFlight { dirty, suspects, since };
                            return moved;
                        }
                        self.tap.miss_waited();
                    }
                    Round::Reading { dirty, suspects, volume: 0, next: Granule(0) }
                }
                Round::Reading { dirty, suspects, volume, next } => {
                    // Drains leave a quarter of the memory to the records, which cannot wait.
                    let room = ByteCount(limit.0 / 4 * 3);
                    let questions =
                        self.comparer.as_ref().map_or(usize::MAX, |comparer| comparer.questions_max());
                    if self.reads >= self.limits.reads
                        || self.comparing.asked.len() >= questions
                        || !self.pace.may_read(now, self.reads)
                        || self.fold.memory_bytes() + self.reading + self.limits.read > room
                    {
                        self.round = Round::Reading { dirty, suspects, volume, next };
                        return moved;
                    }
                    let Some(bits) = dirty.get(volume) else { continue };
                    let index = VolumeIndex(volume as u16);
                    let Some(first) = bits.next(next) else {
                        self.round = Round::Reading { dirty, suspects, volume: volume + 1, next: Granule(0) };
                        continue;
                    };
                    let compare = suspects[volume].contains(first);
                    let mut end = first;
                    while bits.contains(end)
                        && suspects[volume].contains(end) == compare
                        && end.0 - first.0 < (self.limits.read.0 / GRANULE_BYTES).max(1)
                    {
                        self.tap.begin_drain(index, end);
                        end = Granule(end.0 + 1);
                    }
                    let size = self.volumes[volume].size.0;
                    let length = (end.0 * GRANULE_BYTES).min(size) - first.0 * GRANULE_BYTES;
                    let extent =
                        Extent::new(first.offset(), ByteCount(length)).expect("a granule of the volume");
                    self.disk.submit(Read { compare, volume: index, extent });
                    self.reads += 1;
                    self.reading += extent.length();
                    moved = true;
                    Round::Reading { dirty, suspects, volume, next: end }
                }
            };
        }
    }

    /// Nothing is dirty, but something counts as dirty: its bit is not set yet, or it was counted twice when the bits were last
    /// counted. The latter would keep all epochs from being points.
    fn count_again(&mut self, now: UnixNanos) {
        let since = *self.miscounted.get_or_insert(now);
        if now.0.saturating_sub(since.0) >= COUNT_AGAIN_NS {
            self.miscounted = None;
            self.tap.count_again();
        }
    }

    /// What is touched by epochs that are held durably is forgotten.
    fn forget_held(&mut self, held: Epoch) {
        if self.cut == Epoch::NONE || self.touched_through.is_some_and(|through| held < through) {
            return;
        }
        // What is young now has gone into epochs that were cut, or will go into the next one.
        self.touched_through = Some(self.cut.next());
        self.tap.age_touched();
        // Parts of unfinished requests go into some later one.
        for (volume, extent) in self.lanes.held() {
            self.tap.touch(volume, extent);
        }
    }

    fn suspect_bytes(&self) -> ByteCount {
        if self.comparer.is_none() || self.tap.dirty_at_most() == 0 && self.comparing.is_over() {
            return ByteCount::ZERO;
        }
        ByteCount(self.indices().map(|volume| self.tap.suspects(volume).count()).sum::<u64>() * GRANULE_BYTES)
    }

    fn clean(&self) -> bool {
        self.tap.dirty_at_most() == 0
            && self.reads == 0
            && self.landed.is_empty()
            && self.comparing.is_over()
            && self.undated_until <= self.tap.consumed()
            && self.outgrown.is_none()
            && self.unseen.iter().all(Option::is_none)
            && !self.tap.missed_in_flight()
    }
}

/// Whatever unfinished requests hold must still fit when they end.
fn full(fold: &Fold, limit: ByteCount) -> bool {
    fold.memory_bytes() >= limit || !fold.fits(TRACKER_LANE_BYTES_MAX)
}

fn granules_of(extent: Extent) -> impl Iterator<Item = Granule> {
    (extent.offset().granule().0..extent.end().0.div_ceil(GRANULE_BYTES)).map(Granule)
}

fn is_zero(bytes: &[u8]) -> bool {
    // Compared in chunks so that the compiler uses vector instructions, and data is told by its first bytes.
    bytes.chunks(512).all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
}

impl<T: Tap, D: Disk> Source for Tracker<T, D> {
    fn volumes(&self) -> Vec<VolumeInfo> {
        self.volumes.clone()
    }

    fn advance(&mut self, now: UnixNanos, limit: ByteCount) -> Result<Progress, CaptureError> {
        self.now = now;
        self.take_losses(now);
        self.look_at_ends(now);
        self.pace.look(now, self.tap.writes(), self.limits.share);
        let before = self.tap.consumed();
        let produced = self.tap.produced();
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_back();
        }
        self.samples.push_back((produced, now));
        self.consume(produced, limit);
        let landed = self.land(limit, now);
        let compared = self.compare();
        let drained = self.drain(limit, now);
        Ok(if self.full(limit) {
            Progress::Full
        } else if landed || compared || drained || self.tap.consumed() != before {
            Progress::Busy
        } else {
            Progress::Idle
        })
    }

    fn open_bytes(&self) -> ByteCount {
        self.fold.memory_bytes()
    }

    fn consistency(&self) -> Consistency {
        if self.clean() { Consistency::Crash } else { Consistency::None }
    }

    fn position(&self) -> Position {
        Position(self.tap.produced().0)
    }

    fn reached(&self, position: Position) -> bool {
        // All records of a request that has completed are below the position, so that none of them waits in a lane.
        self.tap.consumed().0 >= position.0
    }

    fn cut(&mut self, reuse: Fold, epoch: Epoch) -> Cut {
        // After the last consumed record: see the module's head.
        self.take_losses(self.now);
        self.watch_skipped();
        // The bits after the counts: what an end counts for is marked before it is counted, perhaps just now. Looked at
        // before as well, because that costs less.
        let clean = self.clean() && self.all_ends_seen() && self.clean();
        let consistency = if clean { Consistency::Crash } else { Consistency::None };
        self.cut = epoch;
        self.tap.keep_numbered(epoch);
        Cut { fold: std::mem::replace(&mut self.fold, reuse), consistency, time: self.dated }
    }

    fn acknowledged(&mut self, held: Epoch) {
        self.tap.keep_acknowledged(held);
        self.forget_held(held);
    }

    fn release(&mut self) {
        self.tap.release();
    }

    fn suspect(&mut self, volume: usize) -> bool {
        self.suspect_all(VolumeIndex(volume as u16));
        true
    }

    fn suspect_granules(&mut self, volume: usize, granules: &mut dyn Iterator<Item = Granule>) -> bool {
        let volume = VolumeIndex(volume as u16);
        let end = self.tap.granules(volume);
        for granule in granules.filter(|granule| granule.0 < end) {
            // In this order, as for all.
            self.tap.mark_dirty(volume, granule);
            self.tap.suspect(volume, granule);
        }
        true
    }

    fn status(&self) -> SourceStatus {
        let counters = self.tap.counters();
        let mode = if self.tap.data_mode() { Mode::Data } else { Mode::Bitmap };
        let volumes = self
            .volumes
            .iter()
            .zip(self.indices())
            .map(|(volume, index)| VolumeStatus {
                name: volume.name.clone(),
                mode,
                size: volume.size,
                dirty: if self.tap.dirty_at_most() == 0 {
                    ByteCount::ZERO
                } else {
                    ByteCount(self.tap.dirty(index).count() * GRANULE_BYTES)
                },
            })
            .collect();
        SourceStatus {
            volumes,
            written: ByteCount(counters.data_bytes),
            drained: self.drained,
            draining: self.reading,
            ring: self.tap.ring_bytes(),
            ring_used: ByteCount(self.tap.produced().0 - self.tap.consumed().0),
            missed_ring: counters.missed_ring,
            missed: counters.missed_dirty + counters.missed_ring + counters.missed_other,
            suspect: self.suspect_bytes(),
            compared: self.comparing.compared,
            different: self.comparing.different,
            losses: self.losses,
            ended_twice: self.tap.ended_twice(),
            last_error: self.last_error.clone(),
        }
    }
}
