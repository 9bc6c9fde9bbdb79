//! The tap on the running kernel: loads the eBPF program, finds out how to read pages, and reads its maps.
//!
//! Rooms: `layout` is what both sides share; `memory` maps the kernel's maps; `ring` reads records; `calibrate` finds
//! where page frames are; this file ties them to [`Tap`].

mod calibrate;
mod layout;
mod memory;
mod ring;
mod skipped;

use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use aya::maps::{HashMap, Map};
use aya::programs::RawTracePoint;
use aya::{Ebpf, EbpfLoader};
use block::{Bitmap, ByteCount, Granule};

use crate::tap::{LossReason, Record, RingPosition, Tap, TapCounters, VolumeIndex};
use crate::{CaptureError, Device};
use layout::{Control, Counters, GranuleWord, VolumeEntry};
use memory::Shared;
use ring::Ring;

/// The compiled capture program, from bpf/capture.bpf.c; `cargo xtask bpf` makes it.
pub const OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/capture.bpf.o"));

/// How the tap is set up.
#[derive(Clone, Copy, Debug)]
pub struct KernelTapOptions {
    /// Size of the ring of write records; rounded up to a power of two, at least one page. Locked kernel memory.
    pub ring: ByteCount,
    /// Capture data if the kernel lets us; else granules only.
    pub data: bool,
}

/// Copies of the programs, in the order in which the kernel runs them (R11).
const COMPLETION_PROGRAMS: [&str; 3] = ["on_complete_0", "on_complete_1", "on_complete_2"];
const ISSUE_PROGRAMS: [&str; 2] = ["on_issue_0", "on_issue_1"];
/// Ring sizes the kernel accepts end here; larger wishes are cut to it.
pub(crate) const RING_BYTES_MAX: u64 = 1 << 30;

/// Write capture by eBPF. Dropping it detaches the programs and frees the ring.
pub struct KernelTap {
    volumes: Vec<VolumeEntry>,
    ring: Ring,
    granules: Shared<GranuleWord>,
    lost: Shared<AtomicU64>,
    control: Shared<Control>,
    counters: Shared<Counters>,
    /// Granules whose dirty bit we cleared, against `marked`.
    cleared: u64,
    /// Dirty bits we set ourselves.
    marked_here: u64,
    data_mode: bool,
    why_not_data: Option<String>,
    completion_programs: Vec<OwnedFd>,
    /// Last, so that the maps are unmapped before the programs go.
    _programs: Ebpf,
}

fn shared<T>(ebpf: &Ebpf, name: &'static str, entries: usize) -> Result<Shared<T>, CaptureError> {
    let map = ebpf.map(name).ok_or_else(|| missing(name))?;
    let (Map::Array(data) | Map::RingBuf(data)) = map else { return Err(missing(name)) };
    Shared::map(data.fd().as_fd(), entries).map_err(|error| CaptureError::Kernel {
        step: "map a shared array",
        detail: format!("{name}: {error}"),
    })
}

fn missing(name: &str) -> CaptureError {
    CaptureError::Kernel { step: "find a part of the program", detail: format!("no {name:?} in the object") }
}

impl KernelTap {
    /// Attaches to the kernel and begins to follow `devices`, in this order, with all granules dirty.
    ///
    /// # Errors
    /// When the kernel refuses: no privilege, no BTF, a verifier's word. Data mode that does not work is no error:
    /// the tap is then in bitmap mode and [`KernelTap::why_not_data`] says why.
    pub fn attach(devices: &[Device], options: KernelTapOptions) -> Result<KernelTap, CaptureError> {
        if devices.is_empty() || devices.len() > layout::VOLUMES_MAX {
            return Err(CaptureError::Kernel {
                step: "count the volumes",
                detail: format!("{} disks; a group has 1 to {}", devices.len(), layout::VOLUMES_MAX),
            });
        }
        let mut words = 0;
        let volumes: Vec<VolumeEntry> = devices
            .iter()
            .enumerate()
            .map(|(index, device)| {
                let granules = device.size().granules();
                let entry = VolumeEntry { first_word: words, granules, index: index as u32, reserved: 0 };
                words += granules.div_ceil(64);
                entry
            })
            .collect();
        let entries = u32::try_from(words).map_err(|_| CaptureError::Kernel {
            step: "size the dirty bitmap",
            detail: "the group's disks have more than 2^38 granules".into(),
        })?;
        let ring_bytes = options.ring.0.clamp(4096, RING_BYTES_MAX).next_power_of_two();

        let mut ebpf = EbpfLoader::new()
            .map_max_entries("ring", ring_bytes as u32)
            .map_max_entries("granules", entries)
            .load(OBJECT)
            .map_err(|error| CaptureError::kernel("create maps and relocate", &error))?;

        let granules: Shared<GranuleWord> = shared(&ebpf, "granules", words as usize)?;
        let lost: Shared<AtomicU64> = shared(&ebpf, "lost", layout::VOLUMES_MAX)?;
        let control: Shared<Control> = shared(&ebpf, "control", 1)?;
        let counters: Shared<Counters> = shared(&ebpf, "counters", layout::CPUS_MAX)?;
        let ring = {
            let Some(Map::RingBuf(data)) = ebpf.map("ring") else { return Err(missing("ring")) };
            Ring::map(data.fd().as_fd(), ring_bytes)
                .map_err(|error| CaptureError::Kernel { step: "map the ring", detail: error.to_string() })?
        };

        let mut why_not_data = (!options.data).then(|| "switched off by configuration".to_owned());
        if options.data {
            match calibrate::calibrate(&mut ebpf, &devices[0]) {
                Ok(found) => {
                    let control = &control[0];
                    control.vmemmap.store(found.vmemmap, Ordering::Relaxed);
                    control.direct_map.store(found.direct_map, Ordering::Relaxed);
                    control.page_struct_shift.store(found.page_struct_shift, Ordering::Relaxed);
                    control.page_shift.store(found.page_shift, Ordering::Relaxed);
                    control.data_mode.store(1, Ordering::SeqCst);
                }
                Err(why) => why_not_data = Some(why),
            }
        }

        // Everything is dirty before the first event can arrive.
        let mut marked_here = 0;
        for volume in &volumes {
            marked_here += volume.granules;
            for word in 0..volume.granules.div_ceil(64) {
                let left = volume.granules - word * 64;
                let mask = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
                granules[(volume.first_word + word) as usize].dirty.store(mask, Ordering::SeqCst);
            }
        }
        {
            let map = ebpf.map_mut("volumes").ok_or_else(|| missing("volumes"))?;
            let mut by_device: HashMap<_, u32, VolumeEntry> = HashMap::try_from(map)
                .map_err(|error| CaptureError::kernel("open the volume table", &error))?;
            for (device, entry) in devices.iter().zip(&volumes) {
                by_device
                    .insert(device.kernel_number(), entry, 0)
                    .map_err(|error| CaptureError::kernel("enter a volume", &error))?;
            }
        }
        // Completion first: a write that is seen completing but was not seen issuing is a missed one (R2); the other
        // way round its slot would wait for a completion that has already happened.
        let mut completion_programs = Vec::new();
        for program in COMPLETION_PROGRAMS {
            completion_programs.push(attach(&mut ebpf, program, "block_rq_complete")?);
        }
        for program in ISSUE_PROGRAMS {
            attach(&mut ebpf, program, "block_rq_issue")?;
        }
        Ok(KernelTap {
            volumes,
            ring,
            granules,
            lost,
            control,
            counters,
            cleared: 0,
            marked_here,
            data_mode: why_not_data.is_none(),
            why_not_data,
            completion_programs,
            _programs: ebpf,
        })
    }

    /// Why only granules are followed; `None` in data mode.
    pub fn why_not_data(&self) -> Option<&str> {
        self.why_not_data.as_deref()
    }

    fn word(&self, volume: VolumeIndex, granule: Granule) -> Option<(&GranuleWord, u64)> {
        let entry = self.volumes.get(usize::from(volume.0))?;
        (granule.0 < entry.granules)
            .then(|| (&self.granules[(entry.first_word + granule.0 / 64) as usize], 1 << (granule.0 % 64)))
    }

    fn sum(&self, of: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.counters.iter().map(|cpu| of(cpu).load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
    }
}

/// Loads and attaches a program, and gives a handle to look at it by.
fn attach(ebpf: &mut Ebpf, program: &'static str, tracepoint: &str) -> Result<OwnedFd, CaptureError> {
    let program: &mut RawTracePoint =
        ebpf.program_mut(program).ok_or_else(|| missing(program))?.try_into().map_err(
            |error: aya::programs::ProgramError| CaptureError::kernel("recognise a program", &error),
        )?;
    program.load().map_err(|error| CaptureError::kernel("pass the verifier", &error))?;
    program.attach(tracepoint).map_err(|error| CaptureError::kernel("attach to a tracepoint", &error))?;
    let fd = program.fd().map_err(|error| CaptureError::kernel("look at a program", &error))?;
    fd.as_fd().try_clone_to_owned().map_err(|error| CaptureError::kernel("look at a program", &error))
}

impl Tap for KernelTap {
    fn granules(&self, volume: VolumeIndex) -> u64 {
        self.volumes.get(usize::from(volume.0)).map_or(0, |entry| entry.granules)
    }

    fn volumes(&self) -> u16 {
        self.volumes.len() as u16
    }

    fn produced(&self) -> RingPosition {
        RingPosition(self.ring.produced())
    }

    fn consumed(&self) -> RingPosition {
        RingPosition(self.ring.consumed())
    }

    fn consume(&mut self, until: RingPosition, sink: &mut dyn FnMut(Record<'_>) -> ControlFlow<()>) {
        let volumes = self.volumes.len();
        let lost = &self.lost;
        self.ring.consume(until.0, |bytes| match layout::decode_record(bytes) {
            Some(record) if usize::from(record.volume.0) < volumes => sink(record),
            // Only a broken program writes such a record. What it meant is unknown: everything is suspect.
            _ => {
                for volume in 0..volumes {
                    lost[volume].fetch_or(layout::LOST_WALK, Ordering::SeqCst);
                }
                ControlFlow::Continue(())
            }
        });
    }

    fn ring_bytes(&self) -> ByteCount {
        ByteCount(self.ring.bytes())
    }

    fn dirty_at_most(&self) -> u64 {
        // `cleared` is ours and exact; `marked` is counted before a bit is set.
        self.sum(|cpu| &cpu.marked).wrapping_add(self.marked_here).wrapping_sub(self.cleared)
    }

    fn dirty(&self, volume: VolumeIndex) -> Bitmap {
        let Some(entry) = self.volumes.get(usize::from(volume.0)) else { return Bitmap::empty(0) };
        let mut dirty = Bitmap::empty(entry.granules);
        for word in 0..entry.granules.div_ceil(64) {
            let bits = self.granules[(entry.first_word + word) as usize].dirty.load(Ordering::SeqCst);
            dirty.insert_word(word, bits);
        }
        dirty
    }

    fn begin_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        let Some((word, bit)) = self.word(volume, granule) else { return };
        word.draining.fetch_or(bit, Ordering::SeqCst);
        let before = word.dirty.fetch_and(!bit, Ordering::SeqCst);
        self.cleared += u64::from(before & bit != 0);
    }

    fn end_drain(&mut self, volume: VolumeIndex, granule: Granule) {
        if let Some((word, bit)) = self.word(volume, granule) {
            word.draining.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    fn mark_dirty(&mut self, volume: VolumeIndex, granule: Granule) {
        self.marked_here += 1;
        let newly = self
            .word(volume, granule)
            .is_some_and(|(word, bit)| word.dirty.fetch_or(bit, Ordering::SeqCst) & bit == 0);
        self.marked_here -= u64::from(!newly);
    }

    fn phase(&self) -> usize {
        (self.control[0].phase.load(Ordering::SeqCst) & 1) as usize
    }

    fn flip_phase(&mut self) {
        self.control[0].phase.fetch_xor(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    fn drained(&self, phase: usize) -> bool {
        // Ended before begun, as in SRCU: a write that begins and ends between the two sums makes begun larger, so
        // equality cannot be an accident of the order of reading.
        let ended = self.sum(|cpu| &cpu.ended[phase]);
        fence(Ordering::SeqCst);
        ended == self.sum(|cpu| &cpu.begun[phase])
    }

    fn take_loss(&mut self, volume: VolumeIndex) -> Option<LossReason> {
        let word = self.lost.get(usize::from(volume.0))?.swap(0, Ordering::SeqCst);
        match word {
            0 => None,
            word if word & layout::LOST_PASSTHROUGH != 0 => Some(LossReason::Passthrough),
            word if word & layout::LOST_RANGE != 0 => Some(LossReason::OutOfRange),
            word if word & layout::LOST_OPERATION != 0 => Some(LossReason::Operation),
            _ => Some(LossReason::Walk),
        }
    }

    fn skipped_by_all(&self) -> Option<u64> {
        // An event that was lost was skipped by each copy, so the least count bounds the lost from above.
        let counts =
            self.completion_programs.iter().map(|program| skipped::recursion_misses(program.as_fd()));
        counts.collect::<Result<Vec<_>, _>>().ok()?.into_iter().min()
    }

    fn counters(&self) -> TapCounters {
        TapCounters {
            data_writes: self.sum(|cpu| &cpu.data_writes),
            data_bytes: self.sum(|cpu| &cpu.data_bytes),
            zero_writes: self.sum(|cpu| &cpu.zero_writes),
            missed_dirty: self.sum(|cpu| &cpu.missed_dirty),
            missed_ring: self.sum(|cpu| &cpu.missed_ring),
            missed_other: self.sum(|cpu| &cpu.missed_slot)
                + self.sum(|cpu| &cpu.missed_copy)
                + self.sum(|cpu| &cpu.missed_requeue),
            failed: self.sum(|cpu| &cpu.failed),
        }
    }

    fn data_mode(&self) -> bool {
        self.data_mode
    }
}
