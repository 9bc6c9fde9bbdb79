//! From a fold to the bytes that travel.
//!
//! - Consistency: a changeset holds what the fold held when [`seal`] was called; the fold is only read.
//! - Crash consistency: none, it is memory. An epoch may be sealed again after a crash; see [`crate::frame::Cipher`]
//!   for why that is safe.
//! - Retries: sealing the same fold again gives another, equally valid changeset of the same content.
//! - Cancellation: runs to its end; its threads end with it.

use std::io::{self, Cursor};

use ::bytes::Bytes;
use block::{ByteCount, ByteOffset, Epoch, PointNote, SECTOR_BYTES, VolumeId};
use zstd::bulk::Compressor;

use crate::fold::Fold;
use crate::frame::{Cipher, FrameHeader, Kind, Packing, TAG_BYTES, Trailer};
use crate::header::{RoutingHeader, SALT_BYTES, Stamp};
use crate::key::{GroupKey, NoEntropy, fill_random};
use crate::limits::{EXTENTS_MAX, FRAME_PLAIN_BYTES, FRAMES_MAX, PLAIN_BYTES_MAX};
use crate::plan::{FramePlan, Plan};
use crate::slab::{Place, Slabs};
use crate::volume::{VolumeInfo, VolumesError, encode_manifest};
use crate::workers::spread;

/// A compressed frame longer than this share of its plain text is stored instead.
const PACKED_PERCENT_MAX: usize = 97;
/// Bytes of a frame that are looked at to tell whether compressing it is worth trying.
const PROBE_BYTES: usize = 16 * 1024;
/// Runs of pages that the probe is taken from, evenly spread.
const PROBE_RUNS: usize = 8;
/// Bits of entropy in a byte of the probe from which on compression is tried on the probe alone first.
/// Random bytes give 7.99, already compressed files 7.9 and more, machine code 6 to 7, text 4 to 5.
const PROBE_ENTROPY_BITS: f32 = 7.8;

/// How hard to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Not at all.
    Store,
    /// zstd 1: about 450 MB/s a core.
    #[default]
    Fast,
    /// zstd 3: a third slower, a tenth smaller.
    Balanced,
    /// zstd 9: for links that are far slower than the processor.
    Small,
}

impl Level {
    /// The next level that takes less time: for when changes wait to be sealed.
    #[must_use]
    pub fn faster(self) -> Level {
        match self {
            Level::Store | Level::Fast => Level::Store,
            Level::Balanced => Level::Fast,
            Level::Small => Level::Balanced,
        }
    }

    /// The next level that takes fewer bytes: for when sealed changesets wait for the link.
    #[must_use]
    pub fn smaller(self) -> Level {
        match self {
            Level::Store => Level::Fast,
            Level::Fast => Level::Balanced,
            Level::Balanced | Level::Small => Level::Small,
        }
    }

    fn zstd(self) -> Option<i32> {
        match self {
            Level::Store => None,
            Level::Fast => Some(1),
            Level::Balanced => Some(3),
            Level::Small => Some(9),
        }
    }
}

/// How to seal.
#[derive(Clone, Copy, Debug)]
pub struct SealOptions {
    /// How hard to compress.
    pub level: Level,
    /// Threads that compress and seal, the caller's among them; 0 counts as 1.
    pub threads: usize,
}

/// A changeset as it travels.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// Its readable head, which is also in the first piece.
    pub header: RoutingHeader,
    /// Its bytes. Where one piece ends and the next begins means nothing to the reader.
    pub pieces: Vec<Bytes>,
    /// What sealing did.
    pub stats: SealStats,
}

/// What sealing did, beside what the header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SealStats {
    /// Frames that were stored because compressing them gains nothing.
    pub frames_stored: u32,
    /// Bytes in zero extents, which travel without data.
    pub zero_bytes: ByteCount,
}

impl Sealed {
    /// The length of all pieces.
    pub fn total_bytes(&self) -> ByteCount {
        self.pieces.iter().map(|piece| ByteCount(piece.len() as u64)).sum()
    }
}

/// Why an epoch cannot be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Epoch 0 means none.
    #[error("seal epoch 0: epochs are numbered from 1")]
    EpochNone,
    /// The volumes cannot describe a group.
    #[error("seal changeset: {0}")]
    Volumes(#[from] VolumesError),
    /// The fold holds a volume that is not in the list.
    #[error("seal changeset: changes of volume {0} (by index), which is not in the list of volumes")]
    VolumeIndex(u16),
    /// A change lies outside its volume.
    #[error("seal changeset: {} bytes at {offset} of volume {volume} lie outside its {} bytes", .length.0, .size.0)]
    Outside {
        /// The volume.
        volume: VolumeId,
        /// Where the change begins.
        offset: ByteOffset,
        /// How long it is.
        length: ByteCount,
        /// How large the volume is.
        size: ByteCount,
    },
    /// More data than a changeset may hold.
    #[error("seal changeset: {0} of data, at most {PLAIN_BYTES_MAX} are allowed; cut the epoch earlier")]
    Data(ByteCount),
    /// More extents than a changeset may hold.
    #[error("seal changeset: {0} extents, at most {EXTENTS_MAX} are allowed; cut the epoch earlier")]
    Extents(usize),
    /// More frames than a changeset may hold.
    #[error("seal changeset: {0} frames, at most {FRAMES_MAX} are allowed; cut the epoch earlier")]
    Frames(usize),
    /// The operating system gave no random bytes.
    #[error("seal changeset: the operating system gives no random bytes")]
    Entropy,
    /// The compressor failed, which it does only without memory.
    #[error("seal changeset: compress a frame")]
    Compress(#[source] io::Error),
}

/// Seals an epoch of which no more is to be told. See [`seal_point`].
///
/// # Errors
/// As [`seal_point`].
pub fn seal(
    stamp: &Stamp,
    volumes: &[VolumeInfo],
    fold: &Fold,
    key: &GroupKey,
    options: SealOptions,
) -> Result<Sealed, SealError> {
    seal_point(stamp, &PointNote::default(), volumes, fold, key, options)
}

/// Seals an epoch with what is to be told of it: only who has the key can read the note.
///
/// Memory: the result, in buffers that are at most a quarter longer, and about 4 MiB for each thread.
///
/// # Errors
/// When the fold passes a limit or does not fit the volumes, or the system is out of random bytes or memory.
pub fn seal_point(
    stamp: &Stamp,
    note: &PointNote,
    volumes: &[VolumeInfo],
    fold: &Fold,
    key: &GroupKey,
    options: SealOptions,
) -> Result<Sealed, SealError> {
    let mut salt = [0; SALT_BYTES];
    fill_random(&mut salt).map_err(|NoEntropy| SealError::Entropy)?;
    seal_with(
        stamp,
        note,
        volumes,
        fold,
        key,
        options,
        Choices { salt, frame_data_bytes: FRAME_PLAIN_BYTES.0 as usize },
    )
}

/// What [`seal`] chooses itself and tests choose for it.
pub(crate) struct Choices {
    /// Random, and never used before.
    pub(crate) salt: [u8; SALT_BYTES],
    /// Where a frame ends: a multiple of 512, at most [`FRAME_PLAIN_BYTES`].
    pub(crate) frame_data_bytes: usize,
}

pub(crate) fn seal_with(
    stamp: &Stamp,
    note: &PointNote,
    volumes: &[VolumeInfo],
    fold: &Fold,
    key: &GroupKey,
    options: SealOptions,
    choices: Choices,
) -> Result<Sealed, SealError> {
    if stamp.epoch == Epoch::NONE {
        return Err(SealError::EpochNone);
    }
    let manifest = encode_manifest(volumes, note)?;
    let plan = Plan::new(fold, volumes, choices.frame_data_bytes)?;
    let header = RoutingHeader {
        stamp: *stamp,
        frames: plan.frames.len() as u32,
        extents: plan.extents.len() as u32,
        plain_bytes: ByteCount(plan.plain_bytes),
        key_id: key.id(),
        salt: choices.salt,
    };
    let cipher = Cipher::new(key, header.encode());

    let total = plan.frames.iter().map(FramePlan::sealed_bytes_max).sum();
    let threads = options.threads.clamp(1, plan.frames.len().max(1));
    let mut packers = (0..threads)
        .map(|worker| Packer::new(worker, options.level, total))
        .collect::<io::Result<Vec<_>>>()
        .map_err(SealError::Compress)?;
    let numbered = plan.frames.iter().zip(1..).collect();
    let packed = spread(&mut packers, numbered, |packer, (frame, number)| {
        packer
            .pack(&plan, fold, &cipher, frame, number)
            .map(|(packing, place)| (packing, packer.worker, place))
    });
    let slabs: Vec<Vec<Bytes>> = packers
        .into_iter()
        .map(|packer| packer.slabs.finish().into_iter().map(Bytes::from_owner).collect())
        .collect();

    let mut pieces = Vec::with_capacity(plan.frames.len() + 2);
    let mut stats = SealStats { frames_stored: 0, zero_bytes: ByteCount(plan.zero_bytes) };
    let mut tags = blake3::Hasher::new();
    let mut first = header.encode().to_vec();
    let manifest = stored_frame(&cipher, Kind::Manifest, 0, &manifest);
    tags.update(&manifest[manifest.len() - TAG_BYTES..]);
    first.extend_from_slice(&manifest);
    pieces.push(Bytes::from(first));
    for frame in packed {
        let (packing, worker, place) = frame?;
        let bytes = slabs[worker][place.slab].slice(place.start..place.end);
        stats.frames_stored += u32::from(packing == Packing::Stored);
        tags.update(&bytes[bytes.len() - TAG_BYTES..]);
        pieces.push(bytes);
    }
    let trailer = Trailer {
        frames: header.frames,
        extents: header.extents,
        plain_bytes: header.plain_bytes.0,
        sealed_bytes: pieces.iter().map(|piece| piece.len() as u64).sum(),
        tags: *tags.finalize().as_bytes(),
    };
    pieces.push(Bytes::from(stored_frame(&cipher, Kind::Trailer, header.frames + 1, &trailer.encode())));
    Ok(Sealed { header, pieces, stats })
}

fn stored_frame(cipher: &Cipher, kind: Kind, number: u32, text: &[u8]) -> Vec<u8> {
    let length = text.len() as u32;
    let frame =
        FrameHeader { number, kind, packing: Packing::Stored, plain_bytes: length, packed_bytes: length };
    let mut bytes = Vec::with_capacity(FrameHeader::BYTES + text.len() + TAG_BYTES);
    bytes.resize(FrameHeader::BYTES, 0);
    bytes.extend_from_slice(text);
    finish_frame(cipher, &frame, &mut bytes, 0);
    bytes
}

/// Puts header and tag around the packed text that lies at the end of `bytes`, behind the header's place at `start`,
/// and seals it there.
fn finish_frame(cipher: &Cipher, frame: &FrameHeader, bytes: &mut Vec<u8>, start: usize) {
    let (head, text) = bytes[start..].split_at_mut(FrameHeader::BYTES);
    head.copy_from_slice(&frame.encode());
    let tag = cipher.seal(frame, text);
    bytes.extend_from_slice(&tag);
}

/// One thread's means of packing frames, and what it has packed.
struct Packer {
    worker: usize,
    compressor: Option<Compressor<'static>>,
    /// Plain text on its way into the compressor.
    plain: Vec<u8>,
    sample: Vec<u8>,
    slabs: Slabs,
    /// The most that all frames together can need.
    total: usize,
}

impl Packer {
    fn new(worker: usize, level: Level, total: usize) -> io::Result<Packer> {
        let compressor = level.zstd().map(Compressor::new).transpose()?;
        let (plain, sample) = (Vec::new(), Vec::with_capacity(PROBE_BYTES));
        Ok(Packer { worker, compressor, plain, sample, slabs: Slabs::default(), total })
    }

    fn pack(
        &mut self,
        plan: &Plan,
        fold: &Fold,
        cipher: &Cipher,
        frame: &FramePlan,
        number: u32,
    ) -> Result<(Packing, Place), SealError> {
        let compress = self.is_worth_compressing(plan, fold, frame);
        let plain_bytes = frame.plain_bytes();
        let length = plain_bytes as u32;
        let mut header = FrameHeader {
            number,
            kind: Kind::Data,
            packing: Packing::Stored,
            plain_bytes: length,
            packed_bytes: length,
        };
        let (slab, bytes) = self.slabs.room(frame.sealed_bytes_max(), self.total);
        let start = bytes.len();
        let text = start + FrameHeader::BYTES;
        bytes.resize(text, 0);
        if compress && let Some(compressor) = &mut self.compressor {
            self.plain.clear();
            write_plain(plan, fold, frame, &mut self.plain);
            let mut rest = Cursor::new(&mut *bytes);
            rest.set_position(text as u64);
            let packed =
                compressor.compress_to_buffer(&self.plain, &mut rest).map_err(SealError::Compress)?;
            if packed * 100 <= plain_bytes * PACKED_PERCENT_MAX {
                header.packing = Packing::Zstd;
                header.packed_bytes = packed as u32;
            }
        }
        if header.packing == Packing::Stored {
            bytes.truncate(text);
            write_plain(plan, fold, frame, bytes);
        }
        finish_frame(cipher, &header, bytes, start);
        Ok((header.packing, Place { slab, start, end: bytes.len() }))
    }

    /// Whether a frame is likely to get shorter. Costs about a hundredth of compressing it, and when its bytes look
    /// random a few hundredths more.
    fn is_worth_compressing(&mut self, plan: &Plan, fold: &Fold, frame: &FramePlan) -> bool {
        let Some(compressor) = &mut self.compressor else { return false };
        let runs = &plan.runs[frame.runs.clone()];
        if frame.data_bytes < PROBE_BYTES {
            return true;
        }
        self.sample.clear();
        for run in runs.iter().step_by(runs.len().div_ceil(PROBE_RUNS)) {
            let bytes = run_bytes(fold, run);
            self.sample.extend_from_slice(&bytes[..bytes.len().min(PROBE_BYTES / PROBE_RUNS)]);
        }
        if entropy_bits(&self.sample) < PROBE_ENTROPY_BITS {
            return true;
        }
        self.plain.clear();
        self.plain.reserve(zstd::zstd_safe::compress_bound(self.sample.len()));
        let packed = compressor.compress_to_buffer(&self.sample, &mut self.plain);
        packed.is_ok_and(|packed| packed * 100 <= self.sample.len() * PACKED_PERCENT_MAX)
    }
}

/// The table and the data of a frame.
fn write_plain(plan: &Plan, fold: &Fold, frame: &FramePlan, plain: &mut Vec<u8>) {
    plain.extend_from_slice(&(frame.extents.len() as u32).to_le_bytes());
    plain.extend_from_slice(&(frame.data_bytes as u32).to_le_bytes());
    for extent in &plan.extents[frame.extents.clone()] {
        plain.extend_from_slice(&extent.encode());
    }
    for run in &plan.runs[frame.runs.clone()] {
        plain.extend_from_slice(run_bytes(fold, run));
    }
}

fn run_bytes<'a>(fold: &'a Fold, run: &crate::plan::PageRun) -> &'a [u8] {
    let at = usize::from(run.first) * SECTOR_BYTES as usize;
    &fold.page(run.page)[at..at + usize::from(run.sectors) * SECTOR_BYTES as usize]
}

/// Shannon's entropy of single bytes.
fn entropy_bits(sample: &[u8]) -> f32 {
    let mut counts = [0_u32; 256];
    for byte in sample {
        counts[usize::from(*byte)] += 1;
    }
    let total = sample.len() as f32;
    counts.iter().filter(|count| **count > 0).map(|count| *count as f32 / total).map(|p| -p * p.log2()).sum()
}
