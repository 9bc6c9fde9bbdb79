//! The program's maps, opened: from a program that was just loaded, or from where they are pinned.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData};
use block::{ByteCount, Extent, Sector};

use super::layout::{
    self, Bucket, Control, Counters, Flight, GranuleWord, Kept, Ledger, Suspect, VolumeEntry,
};
use super::memory::Shared;
use super::ring::Ring;
use super::touched::Touched;
use crate::CaptureError;

/// All maps that outlive the agent, in the order in which they are pinned.
const PINNED: [&str; 12] = [
    "ring", "volumes", "granules", "touched", "lost", "control", "counters", "inflight", "kept", "ended",
    "ledger", "suspects",
];

pub(super) struct Maps {
    pub(super) ring: Ring,
    pub(super) volumes: HashMap<MapData, u32, VolumeEntry>,
    pub(super) granules: Shared<GranuleWord>,
    pub(super) touched: Touched,
    pub(super) lost: Shared<AtomicU64>,
    pub(super) control: Shared<Control>,
    pub(super) counters: Shared<Counters>,
    pub(super) inflight: Shared<Bucket>,
    pub(super) kept: Shared<Kept>,
    /// [`layout::VOLUMES_MAX`] of each CPU.
    pub(super) ended: Shared<AtomicU64>,
    pub(super) ledger: Shared<Ledger>,
    pub(super) suspects: Shared<Suspect>,
}

fn missing(name: &str) -> CaptureError {
    CaptureError::Kernel { step: "find a part of the program", detail: format!("no {name:?} in the object") }
}

fn shared<T>(data: &MapData, name: &'static str, entries: usize) -> Result<Shared<T>, CaptureError> {
    Shared::map(data.fd().as_fd(), entries).map_err(|error| CaptureError::Kernel {
        step: "map a shared array",
        detail: format!("{name}: {error}"),
    })
}

impl Maps {
    /// Pins what a loaded program uses in a folder of the BPF file system.
    pub(super) fn pin(ebpf: &Ebpf, folder: &Path) -> Result<(), CaptureError> {
        for name in PINNED {
            let map = ebpf.map(name).ok_or_else(|| missing(name))?;
            map.pin(folder.join(name)).map_err(|error| CaptureError::kernel("pin a map", &error))?;
        }
        Ok(())
    }

    /// Opens the maps of a loaded program.
    pub(super) fn loaded(ebpf: &Ebpf, ring_bytes: u64, words: u64) -> Result<Maps, CaptureError> {
        let maps =
            Maps::open(ring_bytes, words, |name| match ebpf.map(name).ok_or_else(|| missing(name))? {
                Map::Array(data) | Map::RingBuf(data) | Map::HashMap(data) => {
                    let fd = data.fd().as_fd().try_clone_to_owned();
                    let fd = fd.map_err(|error| CaptureError::kernel("duplicate a handle", &error))?;
                    MapData::from_fd(fd).map_err(|error| CaptureError::kernel("look at a map", &error))
                }
                _ => Err(missing(name)),
            })?;
        maps.kept[0].ring_bytes.store(ring_bytes, Ordering::SeqCst);
        Ok(maps)
    }

    /// Opens pinned maps; `None` when they are not whole, as after a removal that was interrupted, or of another layout.
    pub(super) fn pinned(folder: &Path) -> Option<Maps> {
        let open = |name: &str| {
            MapData::from_pin(folder.join(name))
                .map_err(|error| CaptureError::kernel("open a pinned map", &error))
        };
        let kept: Shared<Kept> = shared(&open("kept").ok()?, "kept", 1).ok()?;
        if kept[0].layout.load(Ordering::SeqCst) != layout::LAYOUT {
            return None;
        }
        let ring_bytes = kept[0].ring_bytes.load(Ordering::SeqCst);
        let words = open("granules").ok()?.info().ok()?.max_entries();
        Maps::open(ring_bytes, u64::from(words), open).ok()
    }

    fn open(
        ring_bytes: u64,
        words: u64,
        open: impl Fn(&str) -> Result<MapData, CaptureError>,
    ) -> Result<Maps, CaptureError> {
        let ring = Ring::map(open("ring")?.fd().as_fd(), ring_bytes)
            .map_err(|error| CaptureError::Kernel { step: "map the ring", detail: error.to_string() })?;
        let volumes = HashMap::try_from(Map::HashMap(open("volumes")?))
            .map_err(|error| CaptureError::kernel("open the volume table", &error))?;
        let kept: Shared<Kept> = shared(&open("kept")?, "kept", 1)?;
        let touched = Touched::new(shared(&open("touched")?, "touched", words as usize)?, &kept[0]);
        Ok(Maps {
            ring,
            volumes,
            granules: shared(&open("granules")?, "granules", words as usize)?,
            touched,
            lost: shared(&open("lost")?, "lost", layout::VOLUMES_MAX)?,
            control: shared(&open("control")?, "control", 1)?,
            counters: shared(&open("counters")?, "counters", possible_cpus()?)?,
            inflight: shared(&open("inflight")?, "inflight", layout::BUCKETS)?,
            kept,
            ended: shared(&open("ended")?, "ended", possible_cpus()? * layout::VOLUMES_MAX)?,
            ledger: shared(&open("ledger")?, "ledger", layout::VOLUMES_MAX)?,
            suspects: shared(&open("suspects")?, "suspects", layout::SUSPECTS_MAX)?,
        })
    }

    /// The volumes as they were entered, by index.
    pub(super) fn entries(&self) -> Result<Vec<VolumeEntry>, CaptureError> {
        let mut entries = self
            .volumes
            .iter()
            .map(|entry| entry.map(|(_, entry)| entry))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| CaptureError::kernel("read the volume table", &error))?;
        entries.sort_by_key(|entry| entry.index);
        Ok(entries)
    }

    /// Granules of a word that are draining, or that nobody has said are held durably.
    pub(super) fn unfinished(&self, entry: &VolumeEntry, word: u64) -> u64 {
        let at = (entry.first_word + word) as usize;
        self.granules[at].draining.load(Ordering::SeqCst) | self.touched.word(at)
    }

    /// And those that are dirty.
    pub(super) fn known(&self, entry: &VolumeEntry, word: u64) -> u64 {
        let at = (entry.first_word + word) as usize;
        self.granules[at].dirty.load(Ordering::SeqCst) | self.unfinished(entry, word)
    }

    /// The places of requests in flight.
    pub(super) fn slots(&self) -> impl Iterator<Item = &AtomicU64> {
        self.inflight.iter().flat_map(|bucket| &bucket.slots)
    }

    /// One of them, by its number in [`Maps::slots`].
    pub(super) fn slot(&self, at: usize) -> &AtomicU64 {
        &self.inflight[at / 8].slots[at % 8]
    }

    /// What the request of a slot writes.
    pub(super) fn flight(&self, at: usize) -> &Flight {
        &self.inflight[at / 8].flights[at % 8]
    }

    /// What all slots' requests write, by the number of the disk; what is not told is a range of no sectors' end.
    pub(super) fn flights(&self) -> impl Iterator<Item = (u32, Extent)> {
        self.slots().enumerate().filter(|(_, slot)| slot.load(Ordering::SeqCst) != 0).filter_map(|(at, _)| {
            let flight = self.flight(at);
            let bytes = ByteCount(u64::from(flight.bytes.load(Ordering::SeqCst)));
            let offset = Sector(flight.sector.load(Ordering::SeqCst)).offset();
            Some((flight.dev.load(Ordering::SeqCst), Extent::new(offset, bytes).ok()?))
        })
    }

    /// Sectors of a volume whose end was seen.
    pub(super) fn ended(&self, volume: usize) -> u64 {
        let counts = self.ended.iter().skip(volume).step_by(layout::VOLUMES_MAX);
        counts.map(|count| count.load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
    }

    /// A count of all CPUs together.
    pub(super) fn sum(&self, of: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        self.counters.iter().map(|cpu| of(cpu).load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
    }
}

/// One more than the highest CPU number that this machine may ever have: each has counters of its own.
pub(super) fn possible_cpus() -> Result<usize, CaptureError> {
    const FILE: &str = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(FILE).map_err(CaptureError::io("read", FILE))?;
    let highest = text.trim().rsplit([',', '-']).next().and_then(|number| number.parse::<usize>().ok());
    match highest.map(|highest| highest + 1) {
        Some(cpus) if cpus <= layout::CPUS_MAX => Ok(cpus),
        _ => Err(CaptureError::Kernel {
            step: "count the CPUs",
            detail: format!("{FILE} says {:?}; at most {} are supported", text.trim(), layout::CPUS_MAX),
        }),
    }
}

/// Waits until every program that is running now has ended, on any CPU: programs run inside a read-side critical section,
/// and the kernel waits for those.
///
/// # Errors
/// When the kernel cannot tell (it then has CPUs without a tick); the caller must assume the worst.
pub(super) fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    #[expect(unsafe_code, reason = "the system call has no safe wrapper")]
    // SAFETY: the call has no pointers; it returns when all CPUs have passed a quiescent state (synchronize_rcu).
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
