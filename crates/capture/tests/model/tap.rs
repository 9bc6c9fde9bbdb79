//! The agent's side of the simulated kernel, as src/kernel/ is of the real one.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard};

use block::{Bitmap, ByteCount, ByteOffset, Extent, Granule};
use capture::{
    Buffer, Disk, LossReason, Read, ReadDone, Record, RecordKind, RingPosition, Tap, TapCounters, VolumeIndex,
};

use crate::kernel::World;
use crate::mutation::Mutation;
use crate::oracle::Value;
use crate::ring::{SimRecord, State};

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
    /// Whether the phase was flipped since the bits were last noted.
    flipped: bool,
    /// For [`Mutation::BitsBeforeRing`].
    counted: Option<u64>,
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
            self.counted = Some(world.dirty_at_most());
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
        while world.ring.consumed < until {
            if world.is(Mutation::RecordsSwapped) && world.rng.percent(30) {
                swap_neighbours(&mut world);
            }
            let Some(record) = world.ring.records.front().copied() else { break };
            if record.state == State::Busy {
                break;
            }
            world.ring.records.pop_front();
            world.ring.consumed = record.end;
            if record.state == State::Submitted {
                if record.volume == holds || self.held.iter().any(|held| held.volume == record.volume) {
                    self.held.push(record);
                } else if self.hand_out(&mut world, record, sink).is_break() {
                    break;
                }
            }
            world.preempt();
        }
        world.ring.published = world.ring.consumed;
    }

    fn ring_bytes(&self) -> ByteCount {
        ByteCount(self.shared.lock().ring.bytes)
    }

    fn dirty_at_most(&self) -> u64 {
        let world = self.shared.enter();
        self.counted.unwrap_or_else(|| world.dirty_at_most())
    }

    fn dirty(&self, volume: VolumeIndex) -> Bitmap {
        let mut world = self.shared.enter();
        let late = world.is(Mutation::NotedTooLate);
        let volume = world.volume_mut(volume);
        let mut dirty = Bitmap::empty(volume.granules);
        dirty.insert_word(0, if late { u64::MAX } else { volume.dirty });
        dirty
    }

    fn begin_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        self.flipped = false;
        let bit = 1 << granule.0;
        let first = world.is(Mutation::ClearedFirst);
        let mut before = 0;
        let clear = |world: &mut World| {
            let dirty = &mut world.volume_mut(volume).dirty;
            let before = *dirty;
            *dirty &= !bit;
            before
        };
        if first {
            before = clear(&mut world);
            world.preempt();
        }
        world.volume_mut(volume).draining |= bit;
        world.preempt();
        if !first && !world.is(Mutation::ClearedAfterRead) {
            before = clear(&mut world);
        }
        world.cleared += u64::from(before & bit != 0);
    }

    fn end_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        let bit = 1 << granule.0;
        if world.is(Mutation::ClearedAfterRead) {
            world.cleared += world.volume_mut(volume).dirty >> granule.0 & 1;
            world.volume_mut(volume).dirty &= !bit;
        }
        world.volume_mut(volume).draining &= !bit;
    }

    fn mark_dirty(&mut self, volume: VolumeIndex, granule: Granule) {
        let mut world = self.shared.enter();
        if world.is(Mutation::AgentMarksIgnored) {
            return;
        }
        let bit = 1 << granule.0;
        let dirty = &mut world.volume_mut(volume).dirty;
        let newly = *dirty & bit == 0;
        *dirty |= bit;
        world.marked_here += u64::from(newly);
    }

    fn phase(&self) -> usize {
        self.shared.enter().phase
    }

    fn flip_phase(&mut self) {
        let mut world = self.shared.enter();
        world.phase = 1 - world.phase;
        self.flipped = true;
    }

    fn drained(&self, phase: usize) -> bool {
        let mut world = self.shared.enter();
        let ignored = if self.flipped { Mutation::InFlightIgnored } else { Mutation::StragglersIgnored };
        let ended = world.ended[phase];
        world.preempt();
        world.is(ignored) || ended == world.begun[phase]
    }

    fn take_loss(&mut self, volume: VolumeIndex) -> Option<LossReason> {
        let mut world = self.shared.enter();
        let lost = &mut world.volume_mut(volume).lost;
        std::mem::take(lost).then_some(LossReason::Passthrough)
    }

    fn skipped_by_all(&self) -> Option<u64> {
        let mut world = self.shared.enter();
        let known = !world.writing || world.config.skipped_completions == 0 || world.rng.percent(90);
        known.then_some(world.skipped)
    }

    fn counters(&self) -> TapCounters {
        TapCounters::default()
    }

    fn data_mode(&self) -> bool {
        self.shared.lock().config.data_mode
    }
}

fn swap_neighbours(world: &mut World) {
    let records = &mut world.ring.records;
    if let (Some(first), Some(second)) = (records.front().copied(), records.get(1).copied())
        && first.state == State::Submitted
        && second.state == State::Submitted
        && (first.lane != second.lane || first.first && first.last && second.first && second.last)
    {
        records[0] = SimRecord { start: first.start, end: first.end, ..second };
        records[1] = SimRecord { start: second.start, end: second.end, ..first };
    }
}

pub(crate) struct SimDisk {
    shared: Shared,
    landing: Arc<Mutex<Option<u64>>>,
}

impl Disk for SimDisk {
    fn submit(&mut self, read: Read) {
        let mut world = self.shared.enter();
        world.begin_read(read);
        world.preempt();
    }

    fn finished(&mut self) -> Option<ReadDone> {
        let mut world = self.shared.enter();
        if world.finished.is_empty() {
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
        let Read { volume, extent } = done.read;
        if world.is(Mutation::EndedBeforeFold) {
            let (first, last) = (extent.offset().granule().0, (extent.end().0 - 1) / block::GRANULE_BYTES);
            for granule in first..=last {
                world.volume_mut(volume).draining &= !(1 << granule);
            }
        }
        if done.failed {
            return Some(ReadDone { read: done.read, data: Err(io::ErrorKind::Other.into()) });
        }
        let base = world.volume_mut(volume).base + (extent.offset().0 / 512) as usize;
        let mut buffer = Buffer::zeroed(extent.length().0 as usize);
        for (index, value) in done.values.iter().enumerate().filter(|(_, value)| **value != 0) {
            write_sector(&mut buffer[index * 512..], *value, base + index);
        }
        Some(ReadDone { read: done.read, data: Ok(buffer) })
    }
}

/// The two sides that a tracker wants.
pub(crate) fn sides(shared: &Shared) -> (SimTap, SimDisk) {
    let landing = Arc::new(Mutex::new(None));
    let tap = SimTap {
        shared: shared.clone(),
        scratch: [0; 4096],
        flipped: false,
        counted: None,
        held: Vec::new(),
        landing: landing.clone(),
    };
    (tap, SimDisk { shared: shared.clone(), landing })
}
