//! What bpf/capture.bpf.c shares with user space. Sizes are asserted here and fixed by explicit padding there.

use std::sync::atomic::{AtomicU32, AtomicU64};

use block::{ByteCount, Extent, Sector};

use crate::tap::{Record, RecordKind, VolumeIndex};

/// Grows when any of this changes, so that what another version has left pinned is not misread.
pub(super) const LAYOUT: u64 = 5;
/// Volumes of one group; more are refused.
pub(super) const VOLUMES_MAX: usize = 64;
/// CPUs of a machine; on one with more, capture is refused.
pub(super) const CPUS_MAX: usize = 8192;
/// Buckets of requests in flight.
pub(super) const BUCKETS: usize = 8192;
pub(super) const SLOT_MISSED: u64 = 2;
pub(super) const SLOT_DOUBTED: u64 = 8;
/// The rest is the request's address.
pub(super) const SLOT_FLAGS: u64 = 15;
/// Slots that are looked at in one run of `on_suspects`; more take several.
pub(super) const SUSPECTS_MAX: usize = 256;

pub(super) const LOST_PASSTHROUGH: u64 = 1;
pub(super) const LOST_RANGE: u64 = 2;
pub(super) const LOST_WALK: u64 = 4;
pub(super) const LOST_OPERATION: u64 = 8;
pub(super) const LOST_STALE: u64 = 16;

/// `struct volume`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VolumeEntry {
    pub(super) first_word: u64,
    pub(super) granules: u64,
    pub(super) index: u32,
    pub(super) dev: u32,
    pub(super) id: [u8; 16],
    pub(super) disk_sequence: u64,
    pub(super) bytes: u64,
}
const _: () = assert!(size_of::<VolumeEntry>() == 56);

impl VolumeEntry {
    /// Words of its bits.
    pub(super) fn words(&self) -> u64 {
        self.granules.div_ceil(64)
    }

    /// The bits of a word that are granules of the volume.
    pub(super) fn mask(&self, word: u64) -> u64 {
        match self.granules - word * 64 {
            64.. => u64::MAX,
            left => (1 << left) - 1,
        }
    }
}

/// `struct granule_word`.
#[repr(C)]
pub(super) struct GranuleWord {
    pub(super) dirty: AtomicU64,
    pub(super) draining: AtomicU64,
    pub(super) suspect: AtomicU64,
}
const _: () = assert!(size_of::<GranuleWord>() == 24);

/// `struct bucket`: requests in flight, and what they write.
#[repr(C)]
pub(super) struct Bucket {
    pub(super) slots: [AtomicU64; 8],
    pub(super) flights: [Flight; 8],
}
const _: () = assert!(size_of::<Bucket>() == 192);

/// `struct flight`.
#[repr(C)]
pub(super) struct Flight {
    pub(super) sector: AtomicU64,
    pub(super) bytes: AtomicU32,
    pub(super) dev: AtomicU32,
}

/// `struct suspect`.
#[repr(C)]
pub(super) struct Suspect {
    pub(super) value: AtomicU64,
    pub(super) place: AtomicU32,
    pub(super) mend: AtomicU32,
    pub(super) stale: AtomicU32,
    pub(super) volume: AtomicU32,
    pub(super) sectors: AtomicU64,
}
const _: () = assert!(size_of::<Suspect>() == 32);

/// `struct ledger`, one a volume.
#[repr(C)]
pub(super) struct Ledger {
    pub(super) base: AtomicU64,
    pub(super) mended: AtomicU64,
}
const _: () = assert!(size_of::<Ledger>() == 16);

/// `struct touched_word`.
#[repr(C)]
pub(super) struct TouchedWord {
    pub(super) bits: [AtomicU64; 2],
}
const _: () = assert!(size_of::<TouchedWord>() == 16);

/// `struct control`.
#[repr(C)]
pub(super) struct Control {
    pub(super) phase: AtomicU64,
    pub(super) data_mode: AtomicU64,
    pub(super) vmemmap: AtomicU64,
    pub(super) direct_map: AtomicU64,
    pub(super) page_struct_shift: AtomicU64,
    pub(super) page_shift: AtomicU64,
}
const _: () = assert!(size_of::<Control>() == 48);

/// `struct kept`.
#[repr(C)]
pub(super) struct Kept {
    pub(super) layout: AtomicU64,
    pub(super) object: AtomicU64,
    pub(super) ring_bytes: AtomicU64,
    pub(super) generation: AtomicU64,
    pub(super) numbered: AtomicU64,
    pub(super) acknowledged: AtomicU64,
    pub(super) skipped_seen: AtomicU64,
    pub(super) deep_seen: AtomicU64,
    pub(super) young: AtomicU64,
    reserved: [u64; 7],
}
const _: () = assert!(size_of::<Kept>() == 128);

/// `struct counters`, one a CPU.
#[repr(C)]
pub(super) struct Counters {
    pub(super) marked: AtomicU64,
    pub(super) marked_again: AtomicU64,
    pub(super) data_writes: AtomicU64,
    pub(super) data_bytes: AtomicU64,
    pub(super) zero_writes: AtomicU64,
    pub(super) missed_dirty: AtomicU64,
    pub(super) missed_ring: AtomicU64,
    pub(super) missed_slot: AtomicU64,
    pub(super) missed_copy: AtomicU64,
    pub(super) missed_requeue: AtomicU64,
    pub(super) unseen: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) complete_handled: AtomicU64,
    pub(super) complete_passed: AtomicU64,
    pub(super) complete_busy: AtomicU64,
    reserved0: u64,
    pub(super) rescued: AtomicU64,
    pub(super) deep: AtomicU64,
    address: [AtomicU64; 8],
    reserved: [u64; 5],
}
const _: () = assert!(size_of::<Counters>() == 256);

/// `struct calibration`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Calibration {
    pub(super) dev: u64,
    pub(super) sector: u64,
    pub(super) pfn: u64,
    pub(super) magic: [u64; 2],
    pub(super) page: u64,
    pub(super) page_offset: u64,
    pub(super) direct_map: u64,
    pub(super) page_struct_bytes: u64,
    pub(super) found: u64,
    pub(super) page_shift: u64,
    pub(super) request: u64,
}
const _: () = assert!(size_of::<Calibration>() == 96);

#[expect(unsafe_code, reason = "aya asks for a promise that these are plain bytes")]
mod plain {
    // SAFETY: repr(C), only integers, no padding (sizes asserted above).
    unsafe impl aya::Pod for super::VolumeEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Calibration {}
}

const RECORD_HEADER_BYTES: usize = 24;
const KIND_DATA: u8 = 1;
const KIND_ZEROES: u8 = 2;
const KIND_DISCARD: u8 = 3;
const FLAG_FIRST: u8 = 1;
const FLAG_LAST: u8 = 2;

/// A record from its bytes in the ring; `None` when they are none.
pub(crate) fn decode_record(bytes: &[u8]) -> Option<Record<'_>> {
    let (header, data) = bytes.split_at_checked(RECORD_HEADER_BYTES)?;
    let sector = u64::from_le_bytes(header[0..8].try_into().ok()?);
    let length = u32::from_le_bytes(header[8..12].try_into().ok()?);
    let volume = u16::from_le_bytes(header[12..14].try_into().ok()?);
    let (kind, flags) = (header[14], header[15]);
    let lane = u32::from_le_bytes(header[16..20].try_into().ok()?);
    if sector >= 1 << 55 {
        return None;
    }
    let kind = match kind {
        KIND_DATA => RecordKind::Data(data.get(..length as usize)?),
        KIND_ZEROES | KIND_DISCARD => RecordKind::Zeroes,
        _ => return None,
    };
    Some(Record {
        volume: VolumeIndex(volume),
        extent: Extent::new(Sector(sector).offset(), ByteCount(u64::from(length))).ok()?,
        kind,
        lane,
        first: flags & FLAG_FIRST != 0,
        last: flags & FLAG_LAST != 0,
    })
}
