//! One open epoch: the last write to each block wins.
//!
//! - Consistency: the fold holds exactly what a replay of its writes and zero ranges in the order they were added
//!   leaves. Invariant: data held for a sector is newer than any zero range that covers the sector. A write therefore
//!   does not touch the zero ranges; a zero range removes the data under it.
//! - Crash consistency: none, it is memory. What was folded and not acknowledged is known as a bitmap elsewhere.
//! - Retries and cancellation: every call completes; nothing blocks, nothing can fail but the caller's arithmetic.
//!
//! Data is copied once, into 4 KiB pages from large chunks that [`Fold::clear`] keeps. The index has one cell for each
//! 64 KiB granule touched, so that a large write costs one lookup per 64 KiB and sealing sorts granules, not blocks.

mod arena;
mod zeroes;

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Extent, GRANULE_BYTES, SECTOR_BYTES};
use hashbrown::HashMap;

use crate::limits::{PLAIN_BYTES_MAX, VOLUMES_MAX, ZERO_RANGES_MAX};
use arena::Arena;
use zeroes::ZeroSet;

pub(crate) const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;
const GRANULE_BLOCKS: usize = (GRANULE_BYTES / BLOCK_BYTES) as usize;
const GRANULE_SECTORS: u64 = GRANULE_BYTES / SECTOR_BYTES;
/// What a cell costs: itself, its key, and the free slots of the table around it.
const CELL_BYTES: u64 = 128;
/// What a merged zero range costs in its tree.
const ZERO_RANGE_BYTES: u64 = 48;

/// The blocks of one granule. A block with an empty mask has no page.
#[derive(Clone, Copy, Default)]
struct Cell {
    pages: [u32; GRANULE_BLOCKS],
    /// One bit for each sector of the block that holds data.
    masks: [u8; GRANULE_BLOCKS],
}

/// The changes of one open epoch over up to [`VOLUMES_MAX`] volumes, addressed by their index in the group.
#[derive(Default)]
pub struct Fold {
    arena: Arena,
    cells: HashMap<u64, Cell>,
    zeroes: Vec<ZeroSet>,
    zero_ranges: usize,
    sectors: u64,
}

/// A run of sectors of one volume in the order of a changeset.
pub(crate) enum Run {
    /// Sectors `first..first + sectors` of a page. Never crosses a block.
    Data { page: u32, first: u8 },
    /// Zeroes, of any length.
    Zero,
}

impl Fold {
    /// An empty epoch.
    pub fn new() -> Fold {
        Fold::default()
    }

    /// Writes `data` at `offset` of a volume.
    ///
    /// # Panics
    /// When offset or length is not a multiple of 512, the end does not fit in 64 bits, or the volume's index is not
    /// below [`VOLUMES_MAX`]. Storing such a write anywhere would be silently wrong.
    pub fn write(&mut self, volume: u16, offset: ByteOffset, mut data: &[u8]) {
        let extent = ByteCount(data.len() as u64);
        assert!(usize::from(volume) < VOLUMES_MAX, "fold a write: volume index {volume}");
        assert!(
            offset.0.is_multiple_of(SECTOR_BYTES)
                && extent.0.is_multiple_of(SECTOR_BYTES)
                && offset.checked_add(extent).is_some(),
            "fold a write: {} bytes at {offset} are not whole sectors of a volume",
            extent.0
        );
        let mut at = offset.0;
        while !data.is_empty() {
            let (kind, length) = first_piece(at, data);
            let (piece, rest) = data.split_at(length);
            match kind {
                Piece::Zeroes => {
                    self.zero_sectors(volume, at / SECTOR_BYTES, (at + length as u64) / SECTOR_BYTES)
                }
                Piece::Blocks => self.write_blocks(volume, at, piece),
                Piece::Part => {
                    self.write_blocks(volume, at, piece);
                    self.drop_zero_block(volume, at, piece);
                }
            }
            at += length as u64;
            data = rest;
        }
    }

    /// Makes a range of a volume read as zeroes (discard, write-zeroes). Its cost does not grow with the range, only
    /// with what the epoch holds.
    ///
    /// # Panics
    /// When offset or length is not a multiple of 512, or the volume's index is not below [`VOLUMES_MAX`].
    pub fn zero(&mut self, volume: u16, extent: Extent) {
        let (start, end) = (extent.offset().0, extent.end().0);
        assert!(usize::from(volume) < VOLUMES_MAX, "fold zeroes: volume index {volume}");
        assert!(
            start.is_multiple_of(SECTOR_BYTES) && end.is_multiple_of(SECTOR_BYTES),
            "fold zeroes: bytes {start} to {end} are not whole sectors"
        );
        self.zero_sectors(volume, start / SECTOR_BYTES, end / SECTOR_BYTES);
    }

    fn zero_sectors(&mut self, volume: u16, start: u64, end: u64) {
        self.remove_data(volume, start, end);
        if self.zeroes.len() <= usize::from(volume) {
            self.zeroes.resize_with(usize::from(volume) + 1, ZeroSet::default);
        }
        let set = &mut self.zeroes[usize::from(volume)];
        self.zero_ranges -= set.len();
        set.insert(start, end);
        self.zero_ranges += set.len();
    }

    /// Whether a write of `data` bytes, or (with no bytes) a zero range, may be added without passing a limit of a
    /// changeset. When not, the epoch must be cut first.
    pub fn fits(&self, data: ByteCount) -> bool {
        // A write can hold a block of zeroes for each two blocks, and each may stay a range of its own.
        let zero_ranges = self.zero_ranges as u64 + data.0 / (2 * BLOCK_BYTES) + 1;
        zero_ranges <= ZERO_RANGES_MAX as u64 && self.plain_bytes().saturating_add(data) <= PLAIN_BYTES_MAX
    }

    /// Memory that this epoch holds. Chunks kept for the next one are not counted.
    pub fn memory_bytes(&self) -> ByteCount {
        ByteCount(
            self.arena.pages_used() * BLOCK_BYTES
                + self.cells.len() as u64 * CELL_BYTES
                + self.zero_ranges as u64 * ZERO_RANGE_BYTES,
        )
    }

    /// Data bytes held. A write of `n` bytes adds at most `n`; whole blocks of zeroes add none.
    pub fn plain_bytes(&self) -> ByteCount {
        ByteCount(self.sectors * SECTOR_BYTES)
    }

    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.sectors == 0 && self.zero_ranges == 0
    }

    /// Empties it for the next epoch and keeps its memory.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.cells.clear();
        self.zeroes.clear();
        self.zero_ranges = 0;
        self.sectors = 0;
    }

    /// The page that a run of data names.
    pub(crate) fn page(&self, page: u32) -> &[u8; BLOCK_BYTES as usize] {
        self.arena.page(page)
    }

    /// Calls `emit(volume, first sector, sectors, run)` for everything held, sorted by (volume, sector), disjoint.
    pub(crate) fn for_each_run(&self, mut emit: impl FnMut(u16, u64, u64, Run)) {
        let mut cells: Vec<(u64, &Cell)> = self.cells.iter().map(|(key, cell)| (*key, cell)).collect();
        cells.sort_unstable_by_key(|(key, _)| *key);
        let mut cells = cells.into_iter().peekable();
        let none = ZeroSet::default();
        for volume in 0..VOLUMES_MAX as u16 {
            let zeroes = self.zeroes.get(usize::from(volume)).unwrap_or(&none);
            let mut gaps = zeroes.walk();
            while let Some((key, cell)) = cells.next_if(|(key, _)| key >> 48 == u64::from(volume)) {
                let first_sector = (key & GRANULE_MASK) * GRANULE_SECTORS;
                for index in 0..GRANULE_BLOCKS {
                    let (page, mut mask) = (cell.pages[index], u32::from(cell.masks[index]));
                    let block_sector = first_sector + index as u64 * BLOCK_SECTORS;
                    while mask != 0 {
                        let first = mask.trailing_zeros();
                        let sectors = (mask >> first).trailing_ones();
                        mask &= !(((1 << sectors) - 1) << first);
                        let start = block_sector + u64::from(first);
                        gaps.before(start, |start, sectors| emit(volume, start, sectors, Run::Zero));
                        emit(volume, start, u64::from(sectors), Run::Data { page, first: first as u8 });
                        gaps.skip_to(start + u64::from(sectors));
                    }
                }
            }
            gaps.before(u64::MAX, |start, sectors| emit(volume, start, sectors, Run::Zero));
        }
    }

    /// Copies sectors that may lie in several granules.
    fn write_blocks(&mut self, volume: u16, mut at: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let within = (at % GRANULE_BYTES) as usize;
            let (part, rest) = data.split_at(data.len().min(GRANULE_BYTES as usize - within));
            let cell = self.cells.entry(cell_key(volume, at / GRANULE_BYTES)).or_default();
            self.sectors += write_cell(cell, &mut self.arena, within, part);
            at += part.len() as u64;
            data = rest;
        }
    }

    /// Makes a zero range of the block at `at` when a write of zeroes to a part of it has made it all zeroes.
    fn drop_zero_block(&mut self, volume: u16, at: u64, part: &[u8]) {
        let index = (at % GRANULE_BYTES / BLOCK_BYTES) as usize;
        if is_zero(part)
            && let Some(cell) = self.cells.get(&cell_key(volume, at / GRANULE_BYTES))
            && cell.masks[index] == u8::MAX
            && is_zero(self.arena.page(cell.pages[index]))
        {
            let block = at / BLOCK_BYTES;
            self.zero_sectors(volume, block * BLOCK_SECTORS, (block + 1) * BLOCK_SECTORS);
        }
    }

    /// Drops the data of sectors `start..end`, looking at whichever is fewer: the granules there, or all held.
    fn remove_data(&mut self, volume: u16, start: u64, end: u64) {
        let (first, last) = (start / GRANULE_SECTORS, (end - 1) / GRANULE_SECTORS);
        let Fold { arena, cells, sectors, .. } = self;
        if last - first < cells.len() as u64 {
            for granule in first..=last {
                let key = cell_key(volume, granule);
                if let Some(cell) = cells.get_mut(&key) {
                    *sectors -= remove_from_cell(cell, arena, granule, start, end);
                    if cell.masks == [0; GRANULE_BLOCKS] {
                        cells.remove(&key);
                    }
                }
            }
        } else {
            cells.retain(|key, cell| {
                let granule = key & GRANULE_MASK;
                if key >> 48 == u64::from(volume) && (first..=last).contains(&granule) {
                    *sectors -= remove_from_cell(cell, arena, granule, start, end);
                }
                cell.masks != [0; GRANULE_BLOCKS]
            });
        }
    }
}

/// How the next bytes of a write are folded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Whole blocks of zeroes: a zero range, without data.
    Zeroes,
    /// Whole blocks.
    Blocks,
    /// Less than a block.
    Part,
}

/// What the bytes for `at` begin with, and for how many bytes. Zeroes are looked for here, while the bytes are on
/// their way through the cache anyway; most blocks tell by their first bytes.
fn first_piece(at: u64, data: &[u8]) -> (Piece, usize) {
    const BLOCK: usize = BLOCK_BYTES as usize;
    let lead = (at % BLOCK_BYTES) as usize;
    if lead != 0 || data.len() < BLOCK {
        return (Piece::Part, data.len().min(BLOCK - lead));
    }
    let mut zeroes = data.chunks_exact(BLOCK).map(is_zero);
    let first = zeroes.next().expect("there is a block");
    let blocks = 1 + zeroes.take_while(|zero| *zero == first).count();
    (if first { Piece::Zeroes } else { Piece::Blocks }, blocks * BLOCK)
}

/// `bytes` are whole sectors.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.as_chunks::<64>().0.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

const GRANULE_MASK: u64 = (1 << 48) - 1;

/// A granule's index has 48 bits, for offsets have 64.
fn cell_key(volume: u16, granule: u64) -> u64 {
    u64::from(volume) << 48 | granule
}

/// The mask of sectors `first..end` of a block, both at most 8.
fn sector_mask(first: u64, end: u64) -> u8 {
    (((1_u32 << end) - 1) & !((1_u32 << first) - 1)) as u8
}

/// Copies `data` to byte `within` of a granule and returns how many sectors are held that were not before.
fn write_cell(cell: &mut Cell, arena: &mut Arena, mut within: usize, mut data: &[u8]) -> u64 {
    const BLOCK: usize = BLOCK_BYTES as usize;
    let mut added = 0;
    while !data.is_empty() {
        let (index, from) = (within / BLOCK, within % BLOCK);
        let (part, rest) = data.split_at(data.len().min(BLOCK - from));
        let mask = sector_mask(from as u64 / SECTOR_BYTES, (from + part.len()) as u64 / SECTOR_BYTES);
        let held = &mut cell.masks[index];
        if *held == 0 {
            cell.pages[index] = arena.allocate();
        }
        arena.page_mut(cell.pages[index])[from..from + part.len()].copy_from_slice(part);
        added += u64::from((mask & !*held).count_ones());
        *held |= mask;
        within += part.len();
        data = rest;
    }
    added
}

/// Drops the part of sectors `start..end` that lies in a granule and returns how many sectors were held there.
fn remove_from_cell(cell: &mut Cell, arena: &mut Arena, granule: u64, start: u64, end: u64) -> u64 {
    let mut removed = 0;
    for index in 0..GRANULE_BLOCKS {
        let block = granule * GRANULE_SECTORS + index as u64 * BLOCK_SECTORS;
        let first = start.clamp(block, block + BLOCK_SECTORS) - block;
        let last = end.clamp(block, block + BLOCK_SECTORS) - block;
        let held = &mut cell.masks[index];
        let mask = *held & sector_mask(first, last.max(first));
        if mask != 0 {
            removed += u64::from(mask.count_ones());
            *held &= !mask;
            if *held == 0 {
                arena.free(cell.pages[index]);
            }
        }
    }
    removed
}

#[cfg(test)]
pub(crate) mod tests;
