use std::io::Cursor;

use block::{ByteOffset, SECTOR_BYTES};
use zstd::bulk::Decompressor;

use super::rope::Rope;
use super::{ExtentFault, OpenError, Part};
use crate::changes::{Frame, split_plain};
use crate::frame::{Cipher, FrameHeader, Packing, TABLE_ENTRY_BYTES, TAG_BYTES, TableEntry};
use crate::limits::FRAME_EXTENTS_MAX;
use crate::slab::{Place, Slabs};
use crate::volume::VolumeInfo;

/// Opens the frame that lies in `bytes` from `start` to the end, in place, and takes its tag off.
pub(super) fn open_frame(
    cipher: &Cipher,
    frame: &FrameHeader,
    bytes: &mut Vec<u8>,
    start: usize,
    part: Part,
) -> Result<[u8; TAG_BYTES], OpenError> {
    let tag: [u8; TAG_BYTES] = *bytes.last_chunk().expect("a whole frame was read");
    bytes.truncate(bytes.len() - TAG_BYTES);
    if cipher.open(frame, &mut bytes[start..], tag) { Ok(tag) } else { Err(OpenError::Forged(part)) }
}

/// One thread's means of opening frames, and what it has opened.
pub(super) struct Worker {
    number: usize,
    /// The most that all frames together can need.
    total: usize,
    decompressor: Option<Decompressor<'static>>,
    /// Compressed text.
    packed: Vec<u8>,
    pub(super) slabs: Slabs,
}

impl Worker {
    pub(super) fn new(number: usize, total: u64) -> Worker {
        // The header's fields are in range, so that this fits and an allocation of it is bounded.
        let total = total as usize;
        Worker { number, total, decompressor: None, packed: Vec::new(), slabs: Slabs::default() }
    }

    /// Opens a data frame and checks all that it says. Nothing is allocated for what it would unpack to before it is
    /// known to be authentic.
    pub(super) fn open(
        &mut self,
        cipher: &Cipher,
        volumes: &[VolumeInfo],
        header: &FrameHeader,
        text: &Rope,
    ) -> Result<(Frame, [u8; TAG_BYTES]), OpenError> {
        let part = Part::Frame(header.number);
        let plain_bytes = header.plain_bytes;
        let (tag, slab, start, bytes) = match header.packing {
            Packing::Stored => {
                let (slab, bytes) = self.slabs.room(text.len, self.total);
                let start = bytes.len();
                text.append_to(bytes);
                (open_frame(cipher, header, bytes, start, part)?, slab, start, bytes)
            }
            Packing::Zstd => {
                self.packed.clear();
                text.append_to(&mut self.packed);
                let tag = open_frame(cipher, header, &mut self.packed, 0, part)?;
                let refused = |source| OpenError::Decompress { part, plain_bytes, source };
                let decompressor = match &mut self.decompressor {
                    Some(decompressor) => decompressor,
                    none => none.insert(Decompressor::new().map_err(|error| refused(Some(error)))?),
                };
                let (slab, bytes) = self.slabs.room(plain_bytes as usize, self.total);
                let start = bytes.len();
                let mut rest = Cursor::new(&mut *bytes);
                rest.set_position(start as u64);
                // The buffer may have more room than this frame may fill: a longer text is refused by its length.
                decompressor
                    .decompress_to_buffer(&self.packed, &mut rest)
                    .map_err(|error| refused(Some(error)))?;
                if bytes.len() - start != plain_bytes as usize {
                    return Err(refused(None));
                }
                (tag, slab, start, bytes)
            }
        };
        let place = Place { slab, start, end: bytes.len() };
        Ok((check_extents(header.number, &bytes[start..], (self.number, place), volumes)?, tag))
    }
}

/// Checks everything that a frame can say wrong although it is authentic: a faulty sealer must not harm a replica.
fn check_extents(
    number: u32,
    plain: &[u8],
    place: (usize, Place),
    volumes: &[VolumeInfo],
) -> Result<Frame, OpenError> {
    let field =
        |field, value: usize| OpenError::Field { part: Part::Frame(number), field, value: value as u64 };
    let (extents, table, data) = split_plain(plain).map_err(|(name, value)| field(name, value))?;
    // A frame of no extents would have no end to hold the next one against.
    if extents == 0 || extents > FRAME_EXTENTS_MAX {
        return Err(field("the number of extents", extents as usize));
    }
    let mut start = None;
    let mut end = (0, ByteOffset(0));
    let mut data_left = data.len() as u64;
    for (index, bytes) in table.chunks_exact(TABLE_ENTRY_BYTES).enumerate() {
        let refused = |fault| Err(OpenError::Extent { frame: number, index: index as u32, fault });
        let (entry, reserved_zero) = TableEntry::decode(bytes);
        let Some(volume) = volumes.get(usize::from(entry.volume)) else {
            return refused(ExtentFault::Volume(entry.volume));
        };
        if !reserved_zero {
            return refused(ExtentFault::Reserved);
        }
        if entry.length == 0
            || !entry.length.is_multiple_of(SECTOR_BYTES)
            || !entry.offset.is_multiple_of(SECTOR_BYTES)
        {
            return refused(ExtentFault::Unaligned);
        }
        let Some(extent_end) = entry.offset.checked_add(entry.length).filter(|end| *end <= volume.size.0)
        else {
            return refused(ExtentFault::Outside);
        };
        let first = (entry.volume, ByteOffset(entry.offset));
        if first < end {
            return refused(ExtentFault::Unsorted);
        }
        start.get_or_insert(first);
        end = (entry.volume, ByteOffset(extent_end));
        match entry.kind {
            TableEntry::DATA => match data_left.checked_sub(entry.length) {
                Some(left) => data_left = left,
                None => return refused(ExtentFault::Data),
            },
            TableEntry::ZERO => {}
            kind => return refused(ExtentFault::Kind(kind)),
        }
    }
    if data_left != 0 {
        return Err(field("data that no extent holds", data_left as usize));
    }
    let (worker, place) = place;
    let start = start.unwrap_or_default();
    Ok(Frame { worker, place, extents, data_bytes: data.len(), start, end })
}
