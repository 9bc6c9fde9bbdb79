//! The agent's side of the simulated kernel, as src/kernel/ is of the real one.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard};

use block::{Bitmap, ByteCount, ByteOffset, Epoch, Extent, Granule};
use capture::{
    Buffer, Disk, LossReason, Read, ReadDone, Record, RecordKind, RingPosition, Tap, TapCounters, VolumeIndex,
};

use crate::kernel::{GRANULE, World};
use crate::mutation::Mutation;
use crate::oracle::Value;
use crate::programs::{Place, Slot};
use crate::ring::{SimRecord, State};
use crate::schedule::NANOS_PER_TICK;

/// One thread drives everything; the lock only satisfies `Send`.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<World>>);

impl Shared {
    pub(crate) fn new(world: World) -> Shared {
        Shared(Arc::new(Mutex::new(world)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().expect("a panic ends the schedule")
    }

    /// For an agent's call: the kernel may have gone on before it.
    fn enter(&self) -> MutexGuard<'_, World> {
        let mut world = self.lock();
        world.preempt();
        world
    }
}

/// What a sector of a value reads as: the value and the sector's number, so that a misplaced one is seen.
pub(crate) fn write_sector(bytes: &mut [u8], value: Value, sector: usize) {
    let sector = if value == 0 { 0 } else { sector as u32 };
    bytes[..4].copy_from_slice(&value.to_le_bytes());
    bytes[4..8].copy_from_slice(&sector.to_le_bytes());
}

pub(crate) struct SimTap {
    shared: Shared,
    scratch: [u8; 4096],
    /// What a grace period waits for.
    waited_for: Vec<(Place, Slot)>,
    /// `marked - marked_again` and this, wrapping, is at least the number of dirty granules.
    counted: u64,
    /// What was found stale.
    stale: Vec<(Place, Slot)>,
    /// What was last read of skipped completions.
    looked: Option<u64>,
    /// For [`Mutation::BitsBeforeRing`].
    counted_before: Option<u64>,
    /// For [`Mutation::RingPerDisk`].
    held: Vec<SimRecord>,
    /// For [`Mutation::PositionTooEarly`] and [`Mutation::FoldedAtOnce`]; shared with the disk.
    landing: Arc<Mutex<Option<u64>>>,
}

impl SimTap {
    fn hand_out(
        &mut self,
        world: &mut World,
        record: SimRecord,
        sink: &mut dyn FnMut(Record<'_>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let base = world.volumes[usize::from(record.volume)].base + record.sector as usize;
        let bytes = record.sectors * 512;
        let kind = match record.data {
            Some(value) => {
                let data = &mut self.scratch[..bytes as usize];
                for (index, sector) in data.chunks_exact_mut(512).enumerate() {
                    write_sector(sector, value, base + index);
                }
                RecordKind::Data(data)
            }
            None => RecordKind::Zeroes,
        };
        let extent =
            Extent::new(ByteOffset(record.sector * 512), ByteCount(bytes)).expect("at least a sector");
        let cut = world.is(Mutation::RequestCut);
        match record.data {
            Some(value) if value != 0 => world.handed.0 += 1,
            _ => world.handed.1 += 1,
        }
        let flow = sink(Record {
            volume: VolumeIndex(record.volume),
            extent,
            kind,
            lane: record.lane,
            first: record.first || cut,
            last: record.last || cut,
        });
        if world.is(Mutation::MemoryUnbounded) { ControlFlow::Continue(()) } else { flow }
    }
}

/// Adds to the young set.
fn touch(world: &mut World, volume: u16, sector: u64, sectors: u64) {
    if world.dead {
        return;
    }
    let young = world.young;
    let volume = world.volume_mut(VolumeIndex(volume));
    let last = ((sector + sectors - 1) / GRANULE).min(volume.granules - 1);
    for granule in sector / GRANULE..=last {
        volume.touched[young] |= 1 << granule;
    }
}

impl SimTap {
    fn at_most(&self, world: &World) -> u64 {
        world.marked.wrapping_sub(world.marked_again).wrapping_add(self.counted)
    }

    fn clear(&mut self, world: &mut World, volume: VolumeIndex, bit: u64) {
        if world.dead {
            return;
        }
        let dirty = &mut world.volume_mut(volume).dirty;
        self.counted = self.counted.wrapping_sub(u64::from(*dirty & bit != 0));
        *dirty &= !bit;
    }
}

impl Tap for SimTap {
    fn granules(&self, volume: VolumeIndex) -> u64 {
        self.shared.lock().volume_mut(volume).granules
    }

    fn volumes(&self) -> u16 {
        self.shared.lock().volumes.len() as u16
    }

    fn produced(&self) -> RingPosition {
        let world = self.shared.enter();
        let landing = self.landing.lock().expect("one thread").take();
        RingPosition(landing.unwrap_or(world.ring.produced))
    }

    fn consumed(&self) -> RingPosition {
        RingPosition(self.shared.enter().ring.consumed)
    }

    fn consume(&mut self, until: RingPosition, sink: &mut dyn FnMut(Record<'_>) -> ControlFlow<()>) {
        let shared = self.shared.clone();
        let mut world = shared.enter();
        if world.is(Mutation::BitsBeforeRing) {
            self.counted_before = Some(self.at_most(&world));
        }
        let until = until.0.min(world.ring.produced);
        let apart = world.is(Mutation::RingPerDisk);
        if apart && world.rng.percent(50) {
            while !self.held.is_empty() {
                let record = self.held.remove(0);
                if self.hand_out(&mut world, record, sink).is_break() {
                    return;
                }
            }
        }
        let holds = if apart { world.rng.below(4) as u16 } else { u16::MAX };
        while world.ring.consumed < until && !world.dead {
            if world.is(Mutation::RecordsSwapped) && world.rng.percent(30) {
                swap_neighbours(&mut world);
            }
            let Some(record) = world.ring.next() else { break };
            if record.state == State::Busy {
                break;
            }
            world.ring.take(&record);
            let late = world.is(Mutation::TouchedTooLate);
            if late && world.rng.percent(20) {
                world.ring.publish();
                world.preempt();
                // Killed just here, which chance alone brings about too rarely.
                let dies = world.rng.percent(2);
                world.dead |= dies;
            }
            if record.state == State::Submitted {
                touch(&mut world, record.volume, record.sector, record.sectors);
                if record.volume == holds || self.held.iter().any(|held| held.volume == record.volume) {
                    self.held.push(record);
                } else if self.hand_out(&mut world, record, sink).is_break() {
                    break;
                }
            }
            world.preempt();
            if world.rng.percent(10) && !world.dead {
                world.ring.publish();
            }
        }
        if !world.dead {
            world.ring.publish();
        }
    }

    fn ring_bytes(&self) -> ByteCount {
        ByteCount(self.shared.lock().ring.bytes)
    }

    fn dirty_at_most(&self) -> u64 {
        let world = self.shared.enter();
        self.counted_before.unwrap_or_else(|| self.at_most(&world))
    }

    fn count_again(&mut self) {
        let mut world = self.shared.enter();
        let marked = world.marked;
        // Every program that runs now comes to its end.
        if !world.is(Mutation::RecountedTooEarly) {
            world.end_programs();
        }
        let dirty: u32 = world.volumes.iter().map(|volume| volume.dirty.count_ones()).sum();
        world.preempt();
        self.counted = u64::from(dirty).wrapping_sub(marked.wrapping_sub(world.marked_again));
    }

    fn dirty(&self, volume: VolumeIndex) -> Bitmap {
        let mut world = self.shared.enter();
        let late = world.is(Mutation::NotedTooLate);
        let volume = world.volume_mut(volume);
        let mut dirty = Bitmap::empty(volume.granules);
        dirty.insert_word(0, if late && volume.dirty != 0 { u64::MAX } else { volume.dirty });
        dirty
    }

    fn begin_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let shared = self.shared.clone();
        let mut world = shared.enter();
        let bit = 1 << granule.0;
        let first = world.is(Mutation::ClearedFirst);
        if first {
            self.clear(&mut world, volume, bit);
            world.preempt();
        }
        if !world.dead {
            world.volume_mut(volume).draining |= bit;
        }
        world.preempt();
        if !first && !world.is(Mutation::ClearedAfterRead) {
            self.clear(&mut world, volume, bit);
        }
    }

    fn end_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let shared = self.shared.clone();
        let mut world = shared.enter();
        let bit = 1 << granule.0;
        if world.is(Mutation::ClearedAfterRead) {
            self.clear(&mut world, volume, bit);
        }
        if !world.is(Mutation::ReadsUntouched) {
            touch(&mut world, volume.0, granule.0 * GRANULE, GRANULE);
        }
        world.preempt();
        if !world.dead {
            world.volume_mut(volume).draining &= !bit;
        }
    }

    fn leave_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        if !world.dead {
            world.volume_mut(volume).draining &= !(1 << granule.0);
        }
    }

    fn suspects(&self, volume: VolumeIndex) -> Bitmap {
        let mut world = self.shared.enter();
        let volume = world.volume_mut(volume);
        let mut suspects = Bitmap::empty(volume.granules);
        suspects.insert_word(0, volume.suspect);
        suspects
    }

    fn suspect(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        if !world.dead {
            world.volume_mut(volume).suspect |= 1 << granule.0;
        }
    }

    fn trust(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        if !world.dead {
            world.volume_mut(volume).suspect &= !(1 << granule.0);
        }
    }

    fn mark_dirty(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        if world.is(Mutation::AgentMarksIgnored) || world.dead {
            return;
        }
        let bit = 1 << granule.0;
        let dirty = &mut world.volume_mut(volume).dirty;
        let newly = *dirty & bit == 0;
        *dirty |= bit;
        self.counted = self.counted.wrapping_add(u64::from(newly));
    }

    fn begin_grace(&mut self) {
        let mut world = self.shared.enter();
        world.phase = 1 - world.phase;
        self.waited_for = world.slots().filter(|(_, slot)| !slot.missed && !slot.left).collect();
        if world.is(Mutation::InFlightIgnored) {
            self.waited_for.clear();
        }
    }

    fn grace_over(&mut self) -> bool {
        let mut world = self.shared.enter();
        self.waited_for.retain(|(place, was)| world.slot(*place).is_some_and(|slot| slot.looks_like(was)));
        self.waited_for.is_empty()
    }

    fn miss_waited(&mut self) {
        for (place, was) in std::mem::take(&mut self.waited_for) {
            let mut world = self.shared.enter();
            let same = world.slot(place).is_some_and(|slot| slot.looks_like(&was));
            if same && !world.dead {
                world.miss_slot(was.tag);
                world.met.waited_too_long += 1;
            }
        }
    }

    fn miss_in_flight(&mut self) {
        let mut world = self.shared.enter();
        let tags: Vec<usize> = world.slots().map(|(_, slot)| slot.tag).collect();
        for tag in tags {
            if !world.dead {
                world.miss_slot(tag);
            }
            world.preempt();
        }
    }

    fn touch(&mut self, volume: VolumeIndex, extent: Extent) {
        let mut world = self.shared.enter();
        if !world.is(Mutation::PartsForgotten) {
            touch(&mut world, volume.0, extent.offset().0 / 512, extent.length().0 / 512);
        }
    }

    fn age_touched(&mut self) {
        let mut world = self.shared.enter();
        if world.dead {
            return;
        }
        world.young = 1 - world.young;
        let (young, all) = (world.young, world.is(Mutation::ForgottenTooEarly));
        for volume in &mut world.volumes {
            volume.touched[young] = 0;
            if all {
                volume.touched = [0; 2];
            }
        }
    }

    fn unfinished(&self, volume: VolumeIndex) -> Bitmap {
        let mut world = self.shared.enter();
        let touched = if world.is(Mutation::TouchedIgnored) { 0 } else { u64::MAX };
        let draining = if world.is(Mutation::DrainingIgnored) { 0 } else { u64::MAX };
        let volume = world.volume_mut(volume);
        let mut unfinished = Bitmap::empty(volume.granules);
        let bits = (volume.touched[0] | volume.touched[1]) & touched | volume.draining & draining;
        unfinished.insert_word(0, bits);
        unfinished
    }

    fn forget_unfinished(&mut self) {
        let mut world = self.shared.enter();
        if world.dead {
            return;
        }
        for volume in &mut world.volumes {
            (volume.draining, volume.touched) = (0, [0; 2]);
        }
    }

    fn keep_numbered(&mut self, _epoch: Epoch) {}

    fn keep_acknowledged(&mut self, _epoch: Epoch) {}

    fn loss(&self, volume: VolumeIndex) -> Option<LossReason> {
        let mut world = self.shared.enter();
        let first = world.is(Mutation::LossForgottenFirst) && !world.dead;
        let lost = &mut world.volume_mut(volume).lost;
        let was = *lost;
        *lost &= !first;
        was.then_some(LossReason::Passthrough)
    }

    fn forget_loss(&mut self, volume: VolumeIndex) {
        let mut world = self.shared.enter();
        if !world.dead {
            world.volume_mut(volume).lost = false;
        }
    }

    fn skipped(&mut self) -> bool {
        let mut world = self.shared.enter();
        let known = !world.writing || world.config.skipped_completions == 0 || world.rng.percent(90);
        self.looked = known.then_some(world.skipped);
        self.looked.is_none_or(|now| now > world.skipped_seen)
    }

    fn forget_skipped(&mut self) {
        let mut world = self.shared.enter();
        if let Some(looked) = self.looked
            && !world.dead
        {
            world.skipped_seen = looked;
        }
    }

    fn missed_in_flight(&self) -> bool {
        let world = self.shared.enter();
        let unlooked = world.is(Mutation::MissedInFlightOffered) || world.is(Mutation::PositionTooEarly);
        !unlooked && world.slots().any(|(_, slot)| slot.missed)
    }

    fn unseen(&mut self, volume: VolumeIndex) -> u64 {
        let mut world = self.shared.enter();
        if world.is(Mutation::EndsUncompared) || world.config.unquiet {
            return 0;
        }
        let volume = world.volume_mut(volume);
        let ahead = volume.ended_kernel.wrapping_sub(volume.ended);
        let unseen = ahead.wrapping_sub(volume.ended_base) as i64;
        let read = (volume.ended_kernel, volume.ended);
        if unseen < 0 && volume.ended_read == read {
            volume.ended_base = ahead;
        }
        volume.ended_read = read;
        unseen.max(0) as u64
    }

    fn accept_unseen(&mut self, volume: VolumeIndex) {
        let mut world = self.shared.enter();
        if world.dead {
            return;
        }
        world.met.unexplained += 1;
        let index = usize::from(volume.0);
        let slots = world.slots().filter(|(_, slot)| slot.volume == index && world.is_stale(slot));
        let explained = slots.map(|(_, slot)| world.part_ended(&slot)).sum();
        let volume = world.volume_mut(volume);
        volume.ended_base = volume.ended_kernel.wrapping_sub(volume.ended).wrapping_sub(explained);
    }

    fn note_stale(&mut self) {
        let mut world = self.shared.enter();
        let slots: Vec<_> = world.slots().collect();
        for (place, slot) in slots {
            if world.is_stale(&slot) {
                world.preempt();
                if let Some(now) = world.slot(place).as_mut().filter(|now| now.looks_like(&slot)) {
                    now.doubted = true;
                    self.stale.push((place, slot));
                }
            }
        }
    }

    fn mend_stale(&mut self) {
        if !self.stale.is_empty() {
            self.shared.enter().end_programs();
        }
        for (place, was) in std::mem::take(&mut self.stale) {
            let mut world = self.shared.enter();
            if !world.dead {
                world.mend(place, &was);
            }
        }
    }

    fn mended(&self, volume: VolumeIndex) -> u64 {
        self.shared.enter().volume_mut(volume).mended
    }

    fn writes(&self) -> u64 {
        self.shared.lock().met.writes
    }

    fn counters(&self) -> TapCounters {
        TapCounters::default()
    }

    fn data_mode(&self) -> bool {
        self.shared.lock().config.data_mode
    }
}

fn swap_neighbours(world: &mut World) {
    if let Some((first, second)) = world.ring.next_two()
        && first.state == State::Submitted
        && second.state == State::Submitted
        && (first.lane != second.lane || first.first && first.last && second.first && second.last)
    {
        let (a, b) = (*first, *second);
        *first = SimRecord { start: a.start, end: a.end, ..b };
        *second = SimRecord { start: b.start, end: b.end, ..a };
    }
}

pub(crate) struct SimDisk {
    shared: Shared,
    landing: Arc<Mutex<Option<u64>>>,
}

impl Disk for SimDisk {
    fn submit(&mut self, read: Read) {
        let mut world = self.shared.enter();
        if !world.dead {
            world.begin_read(read);
        }
        world.preempt();
    }

    fn finished(&mut self) -> Option<ReadDone> {
        let mut world = self.shared.enter();
        if world.finished.is_empty() || world.dead {
            return None;
        }
        let count = world.finished.len();
        let which = world.rng.below(count);
        let done = world.finished.swap_remove(which);
        if world.is(Mutation::PositionTooEarly) {
            *self.landing.lock().expect("one thread") = Some(done.produced);
        }
        if world.is(Mutation::FoldedAtOnce) {
            *self.landing.lock().expect("one thread") = Some(0);
        }
        let Read { volume, extent, .. } = done.read;
        let took_ns = world.rng.below(3) as u64 * NANOS_PER_TICK;
        if world.is(Mutation::EndedBeforeFold) && !world.dead {
            let (first, last) = (extent.offset().granule().0, (extent.end().0 - 1) / block::GRANULE_BYTES);
            for granule in first..=last {
                world.volume_mut(volume).draining &= !(1 << granule);
            }
        }
        if done.failed {
            return Some(ReadDone { read: done.read, data: Err(io::ErrorKind::Other.into()), took_ns });
        }
        let base = world.volume_mut(volume).base + (extent.offset().0 / 512) as usize;
        let mut buffer = Buffer::zeroed(extent.length().0 as usize);
        for (index, value) in done.values.iter().enumerate().filter(|(_, value)| **value != 0) {
            write_sector(&mut buffer[index * 512..], *value, base + index);
        }
        Some(ReadDone { read: done.read, data: Ok(buffer), took_ns })
    }
}

/// The two sides that a tracker wants.
pub(crate) fn sides(shared: &Shared) -> (SimTap, SimDisk) {
    let landing = Arc::new(Mutex::new(None));
    let mut tap = SimTap {
        shared: shared.clone(),
        scratch: [0; 4096],
        waited_for: Vec::new(),
        counted: 0,
        looked: None,
        stale: Vec::new(),
        counted_before: None,
        held: Vec::new(),
        landing: landing.clone(),
    };
    tap.count_again();
    (tap, SimDisk { shared: shared.clone(), landing })
}
