//! The tap on the running kernel: loads the eBPF program, finds out how to read pages, and reads its maps.
//!
//! Rooms: `layout` is what both sides share; `maps` opens the kernel's maps and `memory` maps them; `ring` reads records;
//! `calibrate` finds where page frames are; `attach` makes a tap, of nothing or of what the last agent left; `pins` is
//! where that is; `touched` what is not held elsewhere yet; `skipped` is R11's watch, `ends` compares with what the kernel
//! has counted; `sys` are bare system calls; this file ties them to [`Tap`].

mod attach;
mod calibrate;
mod ends;
mod layout;
mod maps;
mod memory;
mod pins;
mod ring;
mod skipped;
mod sys;
mod touched;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use block::{Bitmap, ByteCount, Epoch, Extent, GRANULE_BYTES, Generation, Granule, GroupId, VolumeId};

use crate::tap::{LossReason, Record, RingPosition, Tap, TapCounters, VolumeIndex};
use crate::{CaptureError, Device};
use attach::Attached;
use ends::Ends;
use layout::{GranuleWord, VolumeEntry};
use maps::{Maps, wait_for_programs};
use pins::Pins;
use skipped::Skipped;

pub use attach::OBJECT;
pub(crate) use attach::{RING_BYTES_MAX, tracepoints};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing {
    pub(crate) use super::layout::decode_record;
}

pub use pins::detach;
pub use sys::give_way;

/// How the tap is set up.
#[derive(Clone, Debug)]
pub struct KernelTapOptions {
    /// Size of the ring of write records; rounded up to a power of two, at least one page. Locked kernel memory.
    pub ring: ByteCount,
    /// Capture data if the kernel lets us; else granules only.
    pub data: bool,
    /// Where tracking outlives this process; `None` ends it with the tap.
    pub keep: Option<Keep>,
}

/// Where tracking outlives its process, and whose it is.
#[derive(Clone, Debug)]
pub struct Keep {
    /// A folder in the BPF file system, made if it is missing; the file system is mounted on its parent if need be.
    pub folder: PathBuf,
    /// Each group has its own place there.
    pub group: GroupId,
    /// Of another generation, everything is read again.
    pub generation: Generation,
}

/// What an earlier process has left of the same history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// The last epoch that was given a number; [`Epoch::NONE`] if none was.
    pub numbered: Epoch,
    /// The last epoch that was held durably by the process server, as far as was known.
    pub acknowledged: Epoch,
}

/// Longer than any program runs; waited when the kernel cannot say that they have ended.
const PROGRAM_RUN_MAX: Duration = Duration::from_millis(200);

/// Write capture by eBPF. Dropping it ends tracking, unless it is kept.
pub struct KernelTap {
    volumes: Vec<VolumeEntry>,
    maps: Maps,
    attached: Attached,
    /// `marked - marked_again` of all CPUs and this, wrapping, is at least the number of dirty granules.
    counted: u64,
    /// In-flight writes that a grace period waits for: place and value.
    waited_for: Vec<(usize, u64)>,
    /// What was last read of the kernel's counts of skipped runs.
    looked: Option<Skipped>,
    ends: Ends,
    data_mode: bool,
    why_not_data: Option<String>,
    resumed: bool,
    why_all: Option<String>,
    /// Held while it is kept: one agent a group.
    pins: Option<Pins>,
}

impl KernelTap {
    /// Attaches to the kernel and begins to follow the volumes, in this order. Without something left to go on from, all
    /// granules are dirty.
    ///
    /// # Errors
    /// When the kernel refuses: no privilege, no BTF, a verifier's word; when another process keeps the group. Data mode
    /// that does not work is no error: the tap is then in bitmap mode and [`KernelTap::why_not_data`] says why.
    pub fn attach(
        volumes: &[(VolumeId, &Device)],
        options: &KernelTapOptions,
    ) -> Result<KernelTap, CaptureError> {
        attach::attach(volumes, options)
    }

    fn new(
        volumes: Vec<VolumeEntry>,
        maps: Maps,
        attached: Attached,
        why_not_data: Option<String>,
        pins: Option<Pins>,
    ) -> KernelTap {
        KernelTap {
            ends: Ends::new(&volumes),
            volumes,
            maps,
            attached,
            counted: 0,
            waited_for: Vec::new(),
            looked: None,
            data_mode: why_not_data.is_none(),
            why_not_data,
            resumed: false,
            why_all: None,
            pins,
        }
    }

    /// Why only granules are followed; `None` in data mode.
    pub fn why_not_data(&self) -> Option<&str> {
        self.why_not_data.as_deref()
    }

    /// What an earlier process has left; `None` when everything is read again.
    pub fn resumed(&self) -> Option<Resumed> {
        let kept = &self.maps.kept[0];
        let resumed = Resumed {
            numbered: Epoch(kept.numbered.load(Ordering::SeqCst)),
            acknowledged: Epoch(kept.acknowledged.load(Ordering::SeqCst)),
        };
        (self.resumed && resumed.numbered != Epoch::NONE).then_some(resumed)
    }

    /// Why a disk is read as a whole although an earlier process left something; `None` when none is.
    pub fn why_all(&self) -> Option<&str> {
        self.why_all.as_deref()
    }

    fn word(&self, volume: VolumeIndex, granule: Granule) -> Option<(&GranuleWord, u64)> {
        let entry = self.volumes.get(usize::from(volume.0))?;
        (granule.0 < entry.granules).then(|| {
            (&self.maps.granules[(entry.first_word + granule.0 / 64) as usize], 1 << (granule.0 % 64))
        })
    }

    fn mark_word(&mut self, entry: &VolumeEntry, word: u64, bits: u64) {
        // Counted first, corrected after: never too few.
        self.counted = self.counted.wrapping_add(u64::from(bits.count_ones()));
        let dirty = &self.maps.granules[(entry.first_word + word) as usize].dirty;
        let already = dirty.fetch_or(bits, Ordering::SeqCst) & bits;
        self.counted = self.counted.wrapping_sub(u64::from(already.count_ones()));
    }

    /// Dirty, and to be compared.
    fn mark_suspect(&mut self, entry: &VolumeEntry, word: u64, bits: u64) {
        let suspect = &self.maps.granules[(entry.first_word + word) as usize].suspect;
        suspect.fetch_or(bits, Ordering::SeqCst);
        self.mark_word(entry, word, bits);
    }

    fn mark_extent(&mut self, entry: &VolumeEntry, extent: Extent) {
        let first = extent.offset().0 / GRANULE_BYTES;
        for granule in first..extent.end().0.div_ceil(GRANULE_BYTES).min(entry.granules) {
            self.mark_word(entry, granule / 64, 1 << (granule % 64));
        }
    }

    fn mark_all(&mut self) {
        for entry in self.volumes.clone() {
            for word in 0..entry.words() {
                self.mark_suspect(&entry, word, entry.mask(word));
            }
        }
    }
}

/// A slot that is freed or claimed anew meanwhile is not the one that was meant.
fn miss(slot: &AtomicU64, value: u64) {
    let same = |now: u64| (now | layout::SLOT_DOUBTED) == value | layout::SLOT_DOUBTED;
    let _ = slot.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| {
        same(now).then_some(now | layout::SLOT_MISSED)
    });
}

impl Tap for KernelTap {
    fn granules(&self, volume: VolumeIndex) -> u64 {
        self.volumes.get(usize::from(volume.0)).map_or(0, |entry| entry.granules)
    }

    fn volumes(&self) -> u16 {
        self.volumes.len() as u16
    }

    fn produced(&self) -> RingPosition {
        RingPosition(self.maps.ring.produced())
    }

    fn consumed(&self) -> RingPosition {
        RingPosition(self.maps.ring.consumed())
    }

    fn consume(&mut self, until: RingPosition, sink: &mut dyn FnMut(Record<'_>) -> ControlFlow<()>) {
        let Maps { ring, touched, lost, .. } = &mut self.maps;
        let volumes = &self.volumes;
        ring.consume(until.0, |bytes| {
            let known = layout::decode_record(bytes)
                .and_then(|record| Some((record, volumes.get(usize::from(record.volume.0))?)));
            if let Some((record, entry)) = known {
                touched.insert(entry, record.extent);
                return sink(record);
            }
            // Only a broken program writes such a record. What it meant is unknown: everything is suspect.
            for volume in 0..volumes.len() {
                lost[volume].fetch_or(layout::LOST_WALK, Ordering::SeqCst);
            }
            ControlFlow::Continue(())
        });
    }

    fn touch(&mut self, volume: VolumeIndex, extent: Extent) {
        if let Some(entry) = self.volumes.get(usize::from(volume.0)) {
            self.maps.touched.insert(entry, extent);
        }
    }

    fn unfinished(&self, volume: VolumeIndex) -> Bitmap {
        let Some(entry) = self.volumes.get(usize::from(volume.0)) else { return Bitmap::empty(0) };
        let mut unfinished = Bitmap::empty(entry.granules);
        for word in 0..entry.words() {
            unfinished.insert_word(word, self.maps.unfinished(entry, word));
        }
        unfinished
    }

    fn forget_unfinished(&mut self) {
        for word in self.maps.granules.iter() {
            word.draining.store(0, Ordering::SeqCst);
        }
        self.maps.touched.clear_all();
    }

    fn age_touched(&mut self) {
        self.maps.touched.age(&self.maps.kept[0]);
    }

    fn release(&mut self) {
        self.pins = None;
    }

    fn keep_numbered(&mut self, epoch: Epoch) {
        self.maps.kept[0].numbered.store(epoch.0, Ordering::SeqCst);
    }

    fn keep_acknowledged(&mut self, epoch: Epoch) {
        self.maps.kept[0].acknowledged.store(epoch.0, Ordering::SeqCst);
    }

    fn ring_bytes(&self) -> ByteCount {
        ByteCount(self.maps.ring.bytes())
    }

    fn dirty_at_most(&self) -> u64 {
        // `counted` is ours and exact; `marked` is counted before a bit is set, and what is taken off again is read first.
        let again = self.maps.sum(|cpu| &cpu.marked_again);
        self.maps.sum(|cpu| &cpu.marked).wrapping_sub(again).wrapping_add(self.counted)
    }

    fn count_again(&mut self) {
        // What was counted in this sum is set when the programs that counted it have ended; what they take off again is
        // in the sum that is read last. What is set meanwhile is counted twice until the next time: never too few.
        let marked = self.maps.sum(|cpu| &cpu.marked);
        if wait_for_programs().is_err() {
            std::thread::sleep(PROGRAM_RUN_MAX);
        }
        let dirty = |word: &GranuleWord| u64::from(word.dirty.load(Ordering::SeqCst).count_ones());
        let dirty: u64 = self.maps.granules.iter().map(dirty).sum();
        let again = self.maps.sum(|cpu| &cpu.marked_again);
        self.counted = dirty.wrapping_sub(marked.wrapping_sub(again));
    }

    fn dirty(&self, volume: VolumeIndex) -> Bitmap {
        let Some(entry) = self.volumes.get(usize::from(volume.0)) else { return Bitmap::empty(0) };
        let mut dirty = Bitmap::empty(entry.granules);
        for word in 0..entry.words() {
            let bits = self.maps.granules[(entry.first_word + word) as usize].dirty.load(Ordering::SeqCst);
            dirty.insert_word(word, bits);
        }
        dirty
    }

    fn begin_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let Some((word, bit)) = self.word(volume, granule) else { return };
        word.draining.fetch_or(bit, Ordering::SeqCst);
        let before = word.dirty.fetch_and(!bit, Ordering::SeqCst);
        self.counted = self.counted.wrapping_sub(u64::from(before & bit != 0));
    }

    fn end_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let extent = Extent::new(granule.offset(), ByteCount(GRANULE_BYTES)).expect("a granule is not empty");
        self.touch(volume, extent);
        if let Some((word, bit)) = self.word(volume, granule) {
            word.draining.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    fn leave_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        if let Some((word, bit)) = self.word(volume, granule) {
            word.draining.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    fn suspects(&self, volume: VolumeIndex) -> Bitmap {
        let Some(entry) = self.volumes.get(usize::from(volume.0)) else { return Bitmap::empty(0) };
        let mut suspects = Bitmap::empty(entry.granules);
        for word in 0..entry.words() {
            let bits = &self.maps.granules[(entry.first_word + word) as usize].suspect;
            suspects.insert_word(word, bits.load(Ordering::SeqCst));
        }
        suspects
    }

    fn suspect(&mut self, volume: VolumeIndex, granule: Granule) {
        if let Some((word, bit)) = self.word(volume, granule) {
            word.suspect.fetch_or(bit, Ordering::SeqCst);
        }
    }

    fn trust(&mut self, volume: VolumeIndex, granule: Granule) {
        if let Some((word, bit)) = self.word(volume, granule) {
            word.suspect.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    fn mark_dirty(&mut self, volume: VolumeIndex, granule: Granule) {
        if let Some(entry) = self.volumes.get(usize::from(volume.0)).copied()
            && granule.0 < entry.granules
        {
            self.mark_word(&entry, granule.0 / 64, 1 << (granule.0 % 64));
        }
    }

    fn begin_grace(&mut self) {
        fence(Ordering::SeqCst);
        // A request that is captured again in its old place looks different then.
        self.maps.control[0].phase.fetch_xor(1, Ordering::SeqCst);
        let slots = self.maps.slots().map(|slot| slot.load(Ordering::SeqCst)).enumerate();
        self.waited_for.clear();
        self.waited_for.extend(slots.filter(|(_, value)| *value != 0 && value & layout::SLOT_MISSED == 0));
    }

    fn grace_over(&mut self) -> bool {
        let maps = &self.maps;
        let doubted = layout::SLOT_DOUBTED;
        self.waited_for
            .retain(|(at, value)| maps.slot(*at).load(Ordering::SeqCst) | doubted == *value | doubted);
        self.waited_for.is_empty()
    }

    fn miss_waited(&mut self) {
        for (at, value) in self.waited_for.drain(..) {
            miss(self.maps.slot(at), value);
        }
    }

    fn miss_in_flight(&mut self) {
        for slot in self.maps.slots() {
            match slot.load(Ordering::SeqCst) {
                0 => {}
                value => miss(slot, value),
            }
        }
    }

    fn loss(&self, volume: VolumeIndex) -> Option<LossReason> {
        match self.maps.lost.get(usize::from(volume.0))?.load(Ordering::SeqCst) {
            0 => None,
            word if word & layout::LOST_PASSTHROUGH != 0 => Some(LossReason::Passthrough),
            word if word & layout::LOST_RANGE != 0 => Some(LossReason::OutOfRange),
            word if word & layout::LOST_OPERATION != 0 => Some(LossReason::Operation),
            word if word & layout::LOST_STALE != 0 => Some(LossReason::Unseen),
            _ => Some(LossReason::Walk),
        }
    }

    fn forget_loss(&mut self, volume: VolumeIndex) {
        if let Some(word) = self.maps.lost.get(usize::from(volume.0)) {
            word.store(0, Ordering::SeqCst);
        }
    }

    fn skipped(&mut self) -> bool {
        self.looked = self.attached.skipped(&self.maps);
        self.looked.is_none_or(|now| now.lost_since(Skipped::seen(&self.maps)))
    }

    fn forget_skipped(&mut self) {
        if let Some(looked) = self.looked {
            looked.store(&self.maps);
        }
    }

    fn missed_in_flight(&self) -> bool {
        self.maps.slots().any(|slot| {
            let value = slot.load(Ordering::SeqCst);
            value & layout::SLOT_MISSED != 0 && value & !layout::SLOT_FLAGS != 0
        })
    }

    fn unseen(&mut self, volume: VolumeIndex) -> u64 {
        self.ends.unseen(&self.maps, usize::from(volume.0))
    }

    fn accept_unseen(&mut self, volume: VolumeIndex) {
        self.ends.accept(&self.maps, &self.attached, usize::from(volume.0));
    }

    fn note_stale(&mut self) {
        self.ends.note_stale(&self.maps, &self.attached);
    }

    fn mend_stale(&mut self) {
        self.ends.mend_stale(&self.maps, &self.attached);
    }

    fn mended(&self, volume: VolumeIndex) -> u64 {
        self.maps.ledger[usize::from(volume.0)].mended.load(Ordering::SeqCst)
    }

    fn writes(&self) -> u64 {
        self.maps.sum(|cpu| &cpu.data_writes)
            + self.maps.sum(|cpu| &cpu.zero_writes)
            + self.maps.sum(|cpu| &cpu.missed_dirty)
            + self.maps.sum(|cpu| &cpu.missed_ring)
            + self.maps.sum(|cpu| &cpu.missed_copy)
    }

    fn counters(&self) -> TapCounters {
        let sum = |of: fn(&layout::Counters) -> &AtomicU64| self.maps.sum(of);
        TapCounters {
            data_writes: sum(|cpu| &cpu.data_writes),
            data_bytes: sum(|cpu| &cpu.data_bytes),
            zero_writes: sum(|cpu| &cpu.zero_writes),
            missed_dirty: sum(|cpu| &cpu.missed_dirty),
            missed_ring: sum(|cpu| &cpu.missed_ring),
            missed_other: sum(|cpu| &cpu.missed_slot)
                + sum(|cpu| &cpu.missed_copy)
                + sum(|cpu| &cpu.missed_requeue),
            failed: sum(|cpu| &cpu.failed),
        }
    }

    fn ended_twice(&self) -> u64 {
        self.ends.twice()
    }

    fn data_mode(&self) -> bool {
        self.data_mode
    }
}
