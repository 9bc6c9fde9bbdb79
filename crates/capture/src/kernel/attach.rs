//! How a tap comes to be: loaded afresh, taken over as the last agent left it, or loaded beside an older installation
//! whose knowledge is carried over.
//!
//! Carrying over, and what breaks if the order is changed:
//! 1. The new maps know which volumes are wholly dirty. 2. The new programs are attached, completion before issue. From
//!    now on every event is seen by both. 3. Wait until every program that was running has ended: an event that began
//!    before 2 has left its trace in the old maps by then. 4. What the old maps know is set in the new ones: dirty,
//!    draining and touched granules, losses, and everything that is left in the old ring. 5. The new installation counts
//!    (`kept.layout`). 6. The old one is removed.
//!    A captured write that is in flight over all this has a slot in the old table only: when it completes, the new
//!    programs do not find it and mark it.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use aya::programs::{BtfTracePoint, RawTracePoint};
use aya::{Btf, Ebpf, EbpfLoader};
use block::{Epoch, GRANULE_BYTES, VolumeId};

use super::ends::Ends;
use super::layout::{self, VolumeEntry};
use super::maps::{Maps, possible_cpus, wait_for_programs};
use super::pins::{self, Installation, Pins};
use super::skipped::Skipped;
use super::{KernelTap, KernelTapOptions, calibrate, sys};
use crate::tap::Tap;
use crate::{CaptureError, Device};

/// The compiled capture program, from bpf/capture.bpf.c; `cargo xtask bpf` makes it.
pub const OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/capture.bpf.o"));

/// Copies of the completion program, in the order in which the kernel runs them (R11).
const COMPLETION_PROGRAMS: [&str; 3] = ["on_complete_0", "on_complete_1", "on_complete_2"];
/// Programs and their tracepoints, in the order of attaching. Completion first: a write that is seen completing but was
/// not seen issuing is a missed one (R2); the other way round its slot would wait for a completion that has passed.
const PROGRAMS: [(&str, &str); 5] = [
    ("on_complete_0", "block_rq_complete"),
    ("on_complete_1", "block_rq_complete"),
    ("on_complete_2", "block_rq_complete"),
    ("on_requeue", "block_rq_requeue"),
    ("on_issue", "block_rq_issue"),
];
/// Where the programs are attached.
pub(crate) fn tracepoints() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().map(|(_, tracepoint)| *tracepoint)
}

/// Not attached, but run when slots are suspect; see `ends`.
const SUSPECTS_PROGRAM: &str = "on_suspects";
/// Ring sizes the kernel accepts end here; larger wishes are cut to it.
pub(crate) const RING_BYTES_MAX: u64 = 1 << 30;
/// A record that the old programs are still writing is waited for so long; past it, everything is dirty.
const BUSY_RECORD_WAIT: Duration = Duration::from_secs(1);

fn refuse(step: &'static str, detail: impl Into<String>) -> CaptureError {
    CaptureError::Kernel { step, detail: detail.into() }
}

/// Where each volume's bits are.
fn lay_out(volumes: &[(VolumeId, &Device)]) -> Result<Vec<VolumeEntry>, CaptureError> {
    if volumes.is_empty() || volumes.len() > layout::VOLUMES_MAX {
        let detail = format!("{} disks; a group has 1 to {}", volumes.len(), layout::VOLUMES_MAX);
        return Err(refuse("count the volumes", detail));
    }
    let mut words = 0;
    let entry = |(index, (id, device)): (usize, &(VolumeId, &Device))| {
        let entry = VolumeEntry {
            first_word: words,
            granules: device.size().granules(),
            index: index as u32,
            dev: device.kernel_number(),
            id: id.0,
            disk_sequence: device.disk_sequence(),
            bytes: device.size().0,
        };
        words += entry.words();
        entry
    };
    let entries: Vec<VolumeEntry> = volumes.iter().enumerate().map(entry).collect();
    if words > u64::from(u32::MAX) {
        return Err(refuse("size the dirty bitmap", "the group's disks have more than 2^38 granules"));
    }
    Ok(entries)
}

fn object_hash() -> u64 {
    u64::from_le_bytes(blake3::hash(OBJECT).as_bytes()[..8].try_into().expect("8 of 32 bytes"))
}

fn switched_off() -> String {
    "switched off by configuration".into()
}

/// Whether every program is attached: a removal may have been interrupted, or somebody have removed a pin by hand.
fn all_linked(folder: &Path) -> bool {
    PROGRAMS.iter().all(|(program, _)| folder.join(format!("link_{program}")).exists())
}

/// See [`KernelTap::attach`].
pub(super) fn attach(
    volumes: &[(VolumeId, &Device)],
    options: &KernelTapOptions,
) -> Result<KernelTap, CaptureError> {
    let entries = lay_out(volumes)?;
    let ring_bytes = options.ring.0.clamp(4096, RING_BYTES_MAX).next_power_of_two();
    let Some(keep) = &options.keep else {
        let mut loaded = Loaded::new(volumes[0].1, &entries, ring_bytes, options.data)?;
        loaded.fill(&entries, |_| None)?;
        let attached = loaded.attach(None)?;
        let mut tap = KernelTap::new(entries, loaded.maps, attached, loaded.why_not_data, None);
        tap.count_again();
        tap.ends.accept_all(&tap.maps, &tap.attached);
        return Ok(tap);
    };

    let pins = Pins::open(&keep.folder, &keep.group.to_string())?;
    let mut old = None;
    for Installation { folder, maps } in pins.installations()? {
        match maps {
            // Without all of its links there was a time that nobody followed: what it knows has a gap.
            Some(maps) if old.is_none() && all_linked(&folder) => {
                old = Some(Old { entries: maps.entries()?, folder, maps });
            }
            _ => pins::remove(&folder)?,
        }
    }
    let same_history = old.as_ref().is_some_and(|old| old.generation() == keep.generation.0);
    let fits = old.as_ref().is_some_and(|old: &Old| old.fits(&entries, ring_bytes, options.data));
    match (old, fits) {
        (Some(Old { folder, maps, .. }), true) => {
            let attached = Attached::pinned(&folder)?;
            let why_not_data = (!options.data).then(switched_off);
            let mut tap = KernelTap::new(entries, maps, attached, why_not_data, Some(pins));
            if !same_history {
                // Another generation numbers its epochs anew.
                tap.keep_numbered(Epoch::NONE);
                tap.keep_acknowledged(Epoch::NONE);
                tap.mark_all();
                tap.why_all = Some("the group has a new generation".into());
            }

            tap.count_again();
            tap.maps.kept[0].generation.store(keep.generation.0, Ordering::SeqCst);
            tap.resumed = same_history;
            Ok(tap)
        }
        (old, _) => install(volumes[0].1, &entries, ring_bytes, options.data, keep.generation.0, pins, old),
    }
}

/// A new installation, with what an older one knows of the same history.
fn install(
    first: &Device,
    entries: &[VolumeEntry],
    ring_bytes: u64,
    data: bool,
    generation: u64,
    pins: Pins,
    mut old: Option<Old>,
) -> Result<KernelTap, CaptureError> {
    let same_history = old.as_ref().is_some_and(|old| old.generation() == generation);
    let known = |entry: &VolumeEntry| old.as_ref().filter(|_| same_history)?.same_disk(entry);
    let mut loaded = Loaded::new(first, entries, ring_bytes, data)?;
    let folder = pins.create(old.as_ref().map(|old| old.folder.as_path()))?;
    let made = loaded.fill(entries, known).and_then(|()| {
        Maps::pin(&loaded.ebpf, &folder)?;
        loaded.attach(Some(&folder))
    });
    let attached = match made {
        Ok(attached) => attached,
        Err(error) => {
            // What is half made must not stay attached; the old installation goes on.
            let _ = pins::remove(&folder);
            return Err(error);
        }
    };
    let pairs: Vec<_> = entries.iter().filter_map(|new| Some((known(new)?, *new))).collect();
    let mut tap = KernelTap::new(entries.to_vec(), loaded.maps, attached, loaded.why_not_data, Some(pins));
    tap.resumed = same_history;
    if pairs.len() < tap.volumes.len() {
        tap.why_all = Some("tracking begins for some of the disks".into());
    }
    let kept = &tap.maps.kept[0];
    kept.object.store(object_hash(), Ordering::SeqCst);
    kept.generation.store(generation, Ordering::SeqCst);
    tap.ends.accept_all(&tap.maps, &tap.attached);
    if let Some(old) = old.as_mut().filter(|_| same_history) {
        let was = &old.maps.kept[0];
        kept.numbered.store(was.numbered.load(Ordering::SeqCst), Ordering::SeqCst);
        kept.acknowledged.store(was.acknowledged.load(Ordering::SeqCst), Ordering::SeqCst);
        old.carry_over(&mut tap, &pairs);
    }
    tap.count_again();
    tap.maps.kept[0].layout.store(layout::LAYOUT, Ordering::SeqCst);
    if let Some(old) = old {
        pins::remove(&old.folder)?;
    }
    Ok(tap)
}

/// An installation that an agent left behind.
struct Old {
    folder: PathBuf,
    maps: Maps,
    entries: Vec<VolumeEntry>,
}

impl Old {
    fn generation(&self) -> u64 {
        self.maps.kept[0].generation.load(Ordering::SeqCst)
    }

    /// Whether it is just what is wanted now.
    fn fits(&self, entries: &[VolumeEntry], ring_bytes: u64, data: bool) -> bool {
        self.entries == entries
            && self.maps.kept[0].object.load(Ordering::SeqCst) == object_hash()
            && self.maps.kept[0].ring_bytes.load(Ordering::SeqCst) == ring_bytes
            && self.maps.control[0].data_mode.load(Ordering::SeqCst) == u64::from(data)
    }

    /// What it knows as this volume: on the same medium, which may have grown.
    fn same_disk(&self, new: &VolumeEntry) -> Option<VolumeEntry> {
        let same = |old: &&VolumeEntry| {
            let medium = match new.disk_sequence {
                0 => old.bytes == new.bytes, // before 5.15 the kernel does not say
                sequence => old.disk_sequence == sequence && old.bytes <= new.bytes,
            };
            old.id == new.id && old.dev == new.dev && medium
        };
        self.entries.iter().find(same).copied()
    }

    /// Marks in `tap` what is known of the volumes that are still the same. What cannot be told is dirty.
    fn carry_over(&mut self, tap: &mut KernelTap, pairs: &[(VolumeEntry, VolumeEntry)]) {
        let before = Skipped::seen(&self.maps);
        let skipped = Attached::pinned(&self.folder)
            .ok()
            .and_then(|attached| attached.skipped(&self.maps))
            .is_none_or(|now| now.lost_since(before));
        let unseen = Ends::new(&self.entries).unseen_beyond_slots(&self.maps);
        let why = if skipped {
            Some("the kernel may have skipped a completion")
        } else if unseen {
            Some("the kernel counts more writes than were seen")
        } else if wait_for_programs().is_err() {
            Some("the kernel does not say when its programs have ended")
        } else if !self.mark_ring(tap, pairs) {
            Some("what is left in the old ring cannot be read")
        } else {
            None
        };
        if let Some(why) = why {
            tap.mark_all();
            tap.why_all = Some(why.into());
            return;
        }
        // Whatever has a slot may have ended unseen.
        for (volume, extent) in self.maps.flights() {
            if let Some((_, new)) = pairs.iter().find(|(was, _)| was.dev == volume) {
                tap.mark_extent(new, extent);
            }
        }
        for (was, new) in pairs {
            let lost = self.maps.lost[was.index as usize].load(Ordering::SeqCst);
            // Writes past the end of a disk that has grown are in its new part, which is dirty.
            let lost = if new.bytes > was.bytes { lost & !layout::LOST_RANGE } else { lost };
            if lost != 0 {
                tap.why_all = Some(format!("a volume had a gap (reason {lost:#x})"));
            }
            for word in 0..was.words() {
                let bits = self.maps.known(was, word);
                let suspect =
                    self.maps.granules[(was.first_word + word) as usize].suspect.load(Ordering::SeqCst);
                tap.mark_word(new, word, bits & was.mask(word));
                tap.mark_suspect(
                    new,
                    word,
                    if lost == 0 { suspect & was.mask(word) } else { was.mask(word) },
                );
            }
        }
    }

    /// Marks what is left in its ring; false when it cannot be told.
    fn mark_ring(&mut self, tap: &mut KernelTap, pairs: &[(VolumeEntry, VolumeEntry)]) -> bool {
        let until = self.maps.ring.produced();
        let limit = Instant::now() + BUSY_RECORD_WAIT;
        let mut known = true;
        while self.maps.ring.consumed() < until {
            self.maps.ring.consume(until, |bytes| {
                let record = layout::decode_record(bytes);
                known &= record.is_some();
                let pair = record.and_then(|record| {
                    let pair = pairs.iter().find(|(was, _)| was.index == u32::from(record.volume.0))?;
                    Some((record.extent, pair.1))
                });
                if let Some((extent, new)) = pair {
                    tap.mark_extent(&new, extent);
                }
                ControlFlow::Continue(())
            });
            if Instant::now() > limit {
                return false;
            }
            std::thread::yield_now();
        }
        known
    }
}

/// The programs that are attached, and what holds them so.
pub(super) struct Attached {
    completion_programs: Vec<OwnedFd>,
    pub(super) suspects_program: OwnedFd,
    /// Without pins, the links live as long as this.
    links: Vec<OwnedFd>,
}

impl Attached {
    /// Of an installation, whose pins hold it.
    fn pinned(folder: &Path) -> Result<Attached, CaptureError> {
        let open = |name: &&str| {
            let path = folder.join(format!("program_{name}"));
            sys::open(&path).map_err(CaptureError::io("open the pinned program", path))
        };
        let completion_programs = COMPLETION_PROGRAMS.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Attached { completion_programs, suspects_program: open(&SUSPECTS_PROGRAM)?, links: Vec::new() })
    }

    /// How often the kernel has skipped runs; `None` when that cannot be told.
    pub(super) fn skipped(&self, maps: &Maps) -> Option<Skipped> {
        let counts =
            self.completion_programs.iter().map(|program| sys::recursion_misses(program.as_fd()).ok());
        Some(Skipped {
            by_all: counts.collect::<Option<Vec<u64>>>()?.into_iter().min()?,
            deep: maps.sum(|cpu| &cpu.deep),
        })
    }
}

/// Programs and maps in the kernel, not attached yet.
struct Loaded {
    ebpf: Ebpf,
    btf: Btf,
    maps: Maps,
    why_not_data: Option<String>,
}

impl Loaded {
    fn new(
        first: &Device,
        entries: &[VolumeEntry],
        ring_bytes: u64,
        data: bool,
    ) -> Result<Loaded, CaptureError> {
        let words: u64 = entries.iter().map(VolumeEntry::words).sum();
        let btf = Btf::from_sys_fs().map_err(|error| {
            CaptureError::kernel("read the kernel's types from /sys/kernel/btf/vmlinux", &error)
        })?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .map_max_entries("ring", ring_bytes as u32)
            .map_max_entries("granules", words as u32)
            .map_max_entries("touched", words as u32)
            .map_max_entries("counters", possible_cpus()? as u32)
            .map_max_entries("walks", possible_cpus()? as u32)
            .map_max_entries("ended", (possible_cpus()? * layout::VOLUMES_MAX) as u32)
            .load(OBJECT)
            .map_err(|error| CaptureError::kernel("create maps and relocate", &error))?;
        let maps = Maps::loaded(&ebpf, ring_bytes, words)?;
        let mut why_not_data = (!data).then(switched_off);
        if data {
            match calibrate::calibrate(&mut ebpf, &btf, first) {
                Ok(found) => {
                    let control = &maps.control[0];
                    control.vmemmap.store(found.vmemmap, Ordering::Relaxed);
                    control.direct_map.store(found.direct_map, Ordering::Relaxed);
                    control.page_struct_shift.store(found.page_struct_shift, Ordering::Relaxed);
                    control.page_shift.store(found.page_shift, Ordering::Relaxed);
                    control.data_mode.store(1, Ordering::SeqCst);
                }
                Err(why) => why_not_data = Some(why),
            }
        }
        Ok(Loaded { ebpf, btf, maps, why_not_data })
    }

    /// Enters the volumes. What is not known of them is dirty before the first event can arrive.
    fn fill(
        &mut self,
        entries: &[VolumeEntry],
        known: impl Fn(&VolumeEntry) -> Option<VolumeEntry>,
    ) -> Result<(), CaptureError> {
        for entry in entries {
            let known = known(entry).map_or(0, |old| old.bytes / GRANULE_BYTES);
            for word in 0..entry.words() {
                let unknown = match known.saturating_sub(word * 64) {
                    64.. => 0,
                    known => u64::MAX << known,
                };
                let bits = &self.maps.granules[(entry.first_word + word) as usize];
                bits.suspect.store(entry.mask(word) & unknown, Ordering::SeqCst);
                bits.dirty.store(entry.mask(word) & unknown, Ordering::SeqCst);
            }
            self.maps
                .volumes
                .insert(entry.dev, entry, 0)
                .map_err(|error| CaptureError::kernel("enter a volume", &error))?;
        }
        Ok(())
    }

    fn load_suspects_program(&mut self, folder: Option<&Path>) -> Result<OwnedFd, CaptureError> {
        let program = self.ebpf.program_mut(SUSPECTS_PROGRAM);
        let program: &mut RawTracePoint = program
            .ok_or_else(|| {
                refuse("find a part of the program", format!("no {SUSPECTS_PROGRAM:?} in the object"))
            })?
            .try_into()
            .map_err(|error: aya::programs::ProgramError| {
                CaptureError::kernel("recognise a program", &error)
            })?;
        program.load().map_err(|error| CaptureError::kernel("pass the verifier", &error))?;
        let fd = program.fd().map_err(|error| CaptureError::kernel("look at a program", &error))?.as_fd();
        if let Some(folder) = folder {
            let path = folder.join(format!("program_{SUSPECTS_PROGRAM}"));
            sys::pin(fd, &path).map_err(CaptureError::io("pin", path))?;
        }
        fd.try_clone_to_owned().map_err(|error| CaptureError::kernel("duplicate a handle", &error))
    }

    /// Attaches all programs, and pins them and their links in `folder`, if there is one.
    fn attach(&mut self, folder: Option<&Path>) -> Result<Attached, CaptureError> {
        let suspects_program = self.load_suspects_program(folder)?;
        let mut attached = Attached { completion_programs: Vec::new(), suspects_program, links: Vec::new() };
        for (name, tracepoint) in PROGRAMS {
            let program = program(&mut self.ebpf, name)?;
            program
                .load(tracepoint, &self.btf)
                .map_err(|error| CaptureError::kernel("pass the verifier", &error))?;
            let fd = program.fd().map_err(|error| CaptureError::kernel("look at a program", &error))?.as_fd();
            let link = sys::attach_to_tracepoint(fd)
                .map_err(|error| CaptureError::kernel("attach to a tracepoint", &error))?;
            if let Some(folder) = folder {
                for (object, kind) in [(fd, "program"), (link.as_fd(), "link")] {
                    let path = folder.join(format!("{kind}_{name}"));
                    sys::pin(object, &path).map_err(CaptureError::io("pin", path))?;
                }
            } else {
                attached.links.push(link);
            }
            if COMPLETION_PROGRAMS.contains(&name) {
                let program = fd.try_clone_to_owned();
                attached
                    .completion_programs
                    .push(program.map_err(|error| CaptureError::kernel("duplicate a handle", &error))?);
            }
        }
        Ok(attached)
    }
}

/// A program of the object, by its name.
pub(super) fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut BtfTracePoint, CaptureError> {
    ebpf.program_mut(name)
        .ok_or_else(|| refuse("find a part of the program", format!("no {name:?} in the object")))?
        .try_into()
        .map_err(|error: aya::programs::ProgramError| CaptureError::kernel("recognise a program", &error))
}
