//! Sorted records of one volume in checksummed pages, found without reading all of them.
//!
//! A tree is a number of pages, one after another: first the leaves, which hold the records in order, then for each page of
//! a level the start of its first record, in pages of their own, until a level is one page. All but the last page of a level are
//! full, so a page's place follows from the number of records, and a tree needs no header. The byte table is in
//! docs/formats/undo-layer.md.

mod read;
mod write;

pub(crate) use read::{Cursor, Pages, Source, Stream, check_whole};
pub(crate) use write::TreeWriter;

/// A page with its checksum is at most this long, in bytes. Only the last page of a level is shorter.
pub(crate) const PAGE_BYTES: usize = 4096;
const CRC_BYTES: usize = 4;
const KEY_BYTES: usize = 8;
const ITEMS_BYTES: usize = PAGE_BYTES - CRC_BYTES;

/// What a tree holds: a range of sectors of a volume, and something about it.
pub(crate) trait Record: Copy + std::fmt::Debug + PartialEq {
    /// Of its encoding.
    const BYTES: usize;
    /// In sectors.
    fn start(&self) -> u64;
    /// In sectors; past the start in a valid record.
    fn end(&self) -> u64;
    fn encode(&self, bytes: &mut [u8]);
    fn decode(bytes: &[u8]) -> Self;
    /// Whether it can be what the file that it was found in holds.
    fn is_valid(&self, limits: &Limits) -> bool;
}

/// What records may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sectors of the volume.
    pub(crate) sectors: u64,
    /// Where the file's data lies, or which epochs it is about.
    pub(crate) values: std::ops::Range<u64>,
}

/// Where a tree lies in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) base: u64,
    pub(crate) records: u64,
    pub(crate) kind: Kind,
    pub(crate) limits: Limits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// As written now.
    Paged,
    /// Nothing but records, as in undo layers of version 2: neither checksums nor upper levels. The whole was checked when
    /// the file was first used.
    Bare,
}

/// One level of a tree.
#[derive(Clone, Copy, Debug)]
struct Level {
    position: u64,
    /// The number of its first page, counted through the tree.
    ordinal: u64,
    items: u64,
    item_bytes: usize,
    crc_bytes: usize,
}

impl Level {
    fn capacity(&self) -> u64 {
        (ITEMS_BYTES / self.item_bytes) as u64
    }

    fn pages(&self) -> u64 {
        self.items.div_ceil(self.capacity())
    }

    /// With the checksums.
    fn bytes(&self) -> u64 {
        self.items * self.item_bytes as u64 + self.pages() * self.crc_bytes as u64
    }

    fn page(&self, index: u64) -> Place {
        let items = (self.items - index * self.capacity()).min(self.capacity()) as usize;
        let full = self.capacity() * self.item_bytes as u64 + self.crc_bytes as u64;
        Place {
            position: self.position + index * full,
            ordinal: self.ordinal + index,
            length: items * self.item_bytes + self.crc_bytes,
        }
    }
}

/// A page.
#[derive(Clone, Copy, Debug)]
struct Place {
    position: u64,
    ordinal: u64,
    /// With the checksum.
    length: usize,
}

impl Shape {
    /// The levels, leaves first. Empty for a tree without records.
    fn levels(&self, record_bytes: usize) -> Vec<Level> {
        let crc_bytes = match self.kind {
            Kind::Paged => CRC_BYTES,
            Kind::Bare => 0,
        };
        let mut levels: Vec<Level> = Vec::new();
        let (mut items, mut item_bytes) = (self.records, record_bytes);
        let (mut position, mut ordinal) = (self.base, 0);
        while items > 0 {
            let level = Level { position, ordinal, items, item_bytes, crc_bytes };
            levels.push(level);
            if level.pages() == 1 || self.kind == Kind::Bare {
                break;
            }
            position += level.bytes();
            ordinal += level.pages();
            (items, item_bytes) = (level.pages(), KEY_BYTES);
        }
        levels
    }

    /// How long it is, in bytes.
    pub(crate) fn bytes<R: Record>(&self) -> u64 {
        self.levels(R::BYTES).iter().map(Level::bytes).sum()
    }
}

/// How long a tree of so many records is, in bytes. The number must be one that a file can have.
pub(crate) fn tree_bytes<R: Record>(records: u64) -> u64 {
    let limits = Limits { sectors: 0, values: 0..0 };
    Shape { base: 0, records, kind: Kind::Paged, limits }.bytes::<R>()
}

/// A page's checksum: over its number in the tree and what it holds, so that a page in another's place is found.
fn page_crc(ordinal: u64, items: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&ordinal.to_le_bytes()), items)
}

/// Gives the pages of a tree in `bytes` (a whole file) the checksums that fit, and the checksum over them all.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn mend<R: Record>(shape: &Shape, bytes: &mut [u8]) -> u32 {
    let mut crc = 0;
    for level in shape.levels(R::BYTES) {
        let mut level_crc = 0;
        for index in 0..level.pages() {
            let place = level.page(index);
            let page = &mut bytes[place.position as usize..][..place.length];
            let (items, end) = page.split_at_mut(place.length - CRC_BYTES);
            end.copy_from_slice(&page_crc(place.ordinal, items).to_le_bytes());
            level_crc = crc32c::crc32c_append(level_crc, end);
        }
        crc = crc32c::crc32c_append(crc, &level_crc.to_le_bytes());
    }
    crc
}

#[cfg(test)]
mod tests;
