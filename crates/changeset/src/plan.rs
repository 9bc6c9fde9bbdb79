//! Which extents and which pages go into which frame, before any byte is copied.

use std::ops::Range;

use block::{ByteCount, ByteOffset, SECTOR_BYTES};

use crate::fold::{Fold, Run};
use crate::frame::{FrameHeader, TABLE_ENTRY_BYTES, TABLE_HEAD_BYTES, TAG_BYTES, TableEntry};
use crate::limits::{EXTENTS_MAX, FRAME_EXTENTS_MAX, FRAMES_MAX, PLAIN_BYTES_MAX};
use crate::seal::SealError;
use crate::volume::VolumeInfo;

/// Sectors of one page, in the order of the changeset.
#[derive(Clone, Copy)]
pub(crate) struct PageRun {
    pub(crate) page: u32,
    pub(crate) first: u8,
    pub(crate) sectors: u8,
}

/// What one frame holds, as ranges of the plan's lists.
#[derive(Clone)]
pub(crate) struct FramePlan {
    pub(crate) extents: Range<usize>,
    pub(crate) runs: Range<usize>,
    pub(crate) data_bytes: usize,
}

impl FramePlan {
    pub(crate) fn plain_bytes(&self) -> usize {
        TABLE_HEAD_BYTES + self.extents.len() * TABLE_ENTRY_BYTES + self.data_bytes
    }

    /// Room to compress and seal it in, whatever comes of it.
    pub(crate) fn sealed_bytes_max(&self) -> usize {
        FrameHeader::BYTES + zstd::zstd_safe::compress_bound(self.plain_bytes()) + TAG_BYTES
    }
}

/// A changeset before it is sealed.
#[derive(Default)]
pub(crate) struct Plan {
    pub(crate) extents: Vec<TableEntry>,
    pub(crate) runs: Vec<PageRun>,
    pub(crate) frames: Vec<FramePlan>,
    pub(crate) plain_bytes: u64,
    pub(crate) zero_bytes: u64,
    frame_data_bytes: usize,
}

impl Plan {
    /// Sorts out a fold into frames of at most `frame_data_bytes`.
    pub(crate) fn new(
        fold: &Fold,
        volumes: &[VolumeInfo],
        frame_data_bytes: usize,
    ) -> Result<Plan, SealError> {
        if fold.plain_bytes() > PLAIN_BYTES_MAX {
            return Err(SealError::Data(fold.plain_bytes()));
        }
        let mut plan = Plan { frame_data_bytes, ..Plan::default() };
        let mut outside = None;
        fold.for_each_run(|volume, sector, sectors, run| {
            let (offset, length) = (sector * SECTOR_BYTES, sectors * SECTOR_BYTES);
            let size = volumes.get(usize::from(volume)).map_or(0, |volume| volume.size.0);
            if offset.checked_add(length).is_none_or(|end| end > size) {
                outside.get_or_insert((volume, offset, length));
                return;
            }
            match run {
                Run::Data { page, first } => {
                    plan.data(volume, offset, PageRun { page, first, sectors: sectors as u8 });
                }
                Run::Zero => plan.zero(volume, offset, length),
            }
        });
        if let Some((volume, offset, length)) = outside {
            return Err(match volumes.get(usize::from(volume)) {
                None => SealError::VolumeIndex(volume),
                Some(info) => SealError::Outside {
                    volume: info.id,
                    offset: ByteOffset(offset),
                    length: ByteCount(length),
                    size: info.size,
                },
            });
        }
        if plan.extents.len() > EXTENTS_MAX as usize {
            return Err(SealError::Extents(plan.extents.len()));
        }
        if plan.frames.len() > FRAMES_MAX as usize {
            return Err(SealError::Frames(plan.frames.len()));
        }
        Ok(plan)
    }

    fn zero(&mut self, volume: u16, offset: u64, length: u64) {
        self.zero_bytes += length;
        self.extent(0, TableEntry { volume, kind: TableEntry::ZERO, offset, length });
    }

    /// A run is never split between frames, so that frames part at block boundaries.
    fn data(&mut self, volume: u16, offset: u64, run: PageRun) {
        let length = u64::from(run.sectors) * SECTOR_BYTES;
        self.plain_bytes += length;
        self.extent(length as usize, TableEntry { volume, kind: TableEntry::DATA, offset, length });
        self.runs.push(run);
        let frame = self.frames.last_mut().expect("an extent is in a frame");
        frame.runs.end = self.runs.len();
        frame.data_bytes += length as usize;
    }

    /// Lengthens the last extent or adds one, in this frame or, when it is full, in the next.
    fn extent(&mut self, data_bytes: usize, entry: TableEntry) {
        if let Some(frame) = self.frames.last_mut()
            && frame.data_bytes + data_bytes <= self.frame_data_bytes
        {
            let last = &mut self.extents[frame.extents.end - 1];
            if last.volume == entry.volume
                && last.kind == entry.kind
                && last.offset + last.length == entry.offset
            {
                last.length += entry.length;
                return;
            }
            if frame.extents.len() < FRAME_EXTENTS_MAX as usize {
                self.extents.push(entry);
                frame.extents.end += 1;
                return;
            }
        }
        let (extents, runs) = (self.extents.len(), self.runs.len());
        self.extents.push(entry);
        self.frames.push(FramePlan { extents: extents..extents + 1, runs: runs..runs, data_bytes: 0 });
    }
}
