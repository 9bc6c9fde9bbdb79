use block::{ByteCount, ByteOffset, Extent, PointNote};

use crate::bytes::u32_at;
use crate::frame::{TABLE_ENTRY_BYTES, TABLE_HEAD_BYTES, TableEntry};
use crate::header::RoutingHeader;
use crate::limits::FRAME_PLAIN_BYTES;
use crate::slab::{Place, Slab};
use crate::volume::VolumeInfo;

/// An opened changeset. It exists only when all of it was verified.
#[derive(Debug)]
pub struct Changeset {
    /// What it is; proven by the frames sealed with it.
    pub header: RoutingHeader,
    /// The group's volumes at the cut. A change names one by its place here.
    pub volumes: Vec<VolumeInfo>,
    /// What more is told of the epoch.
    pub note: PointNote,
    pub(crate) frames: Vec<Frame>,
    /// What each worker opened.
    pub(crate) slabs: Vec<Vec<Slab>>,
}

/// What happened to one range of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<'a> {
    /// The volume's place in [`Changeset::volumes`].
    pub volume: u16,
    /// The range: whole sectors inside the volume.
    pub extent: Extent,
    /// What it reads as from now on.
    pub payload: Payload<'a>,
}

/// What a range reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload<'a> {
    /// These bytes, as many as the range is long; at most [`FRAME_PLAIN_BYTES`].
    Data(&'a [u8]),
    /// Zeroes.
    Zero,
}

impl Changeset {
    /// All changes, sorted by (volume, offset), disjoint.
    pub fn changes(&self) -> impl Iterator<Item = Change<'_>> {
        self.frames.iter().flat_map(|frame| {
            let Place { slab, start, end } = frame.place;
            let plain = &self.slabs[frame.worker][slab].as_ref()[start..end];
            let (_, table, mut data) = split_plain(plain).expect("checked when it was opened");
            table.chunks_exact(TABLE_ENTRY_BYTES).map(move |bytes| {
                let (entry, _) = TableEntry::decode(bytes);
                let payload = match entry.kind {
                    TableEntry::DATA => {
                        let (this, rest) = data.split_at(entry.length as usize);
                        data = rest;
                        Payload::Data(this)
                    }
                    _ => Payload::Zero,
                };
                let extent = Extent::new(ByteOffset(entry.offset), ByteCount(entry.length));
                Change { volume: entry.volume, extent: extent.expect("checked when it was opened"), payload }
            })
        })
    }

    /// Memory that it holds, at most.
    pub fn memory_bytes(&self) -> ByteCount {
        self.slabs.iter().flatten().map(|slab| ByteCount(slab.capacity() as u64)).sum()
    }
}

/// A data frame whose text was opened and checked.
#[derive(Debug)]
pub(crate) struct Frame {
    /// Whose slabs hold its text, and where.
    pub(crate) worker: usize,
    pub(crate) place: Place,
    pub(crate) extents: u32,
    pub(crate) data_bytes: usize,
    /// The first extent's volume and offset.
    pub(crate) start: (u16, ByteOffset),
    /// The last extent's volume and end.
    pub(crate) end: (u16, ByteOffset),
}

/// The number of extents, the table, the data.
type SplitPlain<'a> = (u32, &'a [u8], &'a [u8]);

/// Splits a frame's text when its lengths add up; else names the field that is wrong and its value.
pub(crate) fn split_plain(plain: &[u8]) -> Result<SplitPlain<'_>, (&'static str, usize)> {
    let (head, rest) = plain.split_at_checked(TABLE_HEAD_BYTES).ok_or(("plain bytes", plain.len()))?;
    let (extents, data_bytes) = (u32_at(head, 0), u32_at(head, 4) as usize);
    if data_bytes > FRAME_PLAIN_BYTES.0 as usize {
        return Err(("data bytes", data_bytes));
    }
    let wrong = ("the number of extents", extents as usize);
    let table_bytes = (extents as usize).checked_mul(TABLE_ENTRY_BYTES).ok_or(wrong)?;
    let (table, data) = rest.split_at_checked(table_bytes).ok_or(wrong)?;
    if data.len() == data_bytes { Ok((extents, table, data)) } else { Err(wrong) }
}
