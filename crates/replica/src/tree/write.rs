//! Writing a tree, page by page, in constant memory: how many records there will be is known.

use super::{CRC_BYTES, KEY_BYTES, Level, PAGE_BYTES, Record, Shape, page_crc};
use crate::ReplicaError;

/// Pages of leaves written in one call.
const BATCH_PAGES: usize = 64;

/// Takes records in order, gives bytes with their places in the file.
pub(crate) struct TreeWriter {
    levels: Vec<Filling>,
}

struct Filling {
    level: Level,
    /// Whole pages, then the one being filled.
    buffer: Vec<u8>,
    /// Where the buffer goes.
    position: u64,
    page_start: usize,
    page_items: u64,
    pages: u64,
    /// Of the checksums of the pages so far.
    crc: u32,
}

impl TreeWriter {
    pub(crate) fn new<R: Record>(shape: &Shape) -> TreeWriter {
        let filling = |level: Level| Filling {
            level,
            buffer: Vec::new(),
            position: level.position,
            page_start: 0,
            page_items: 0,
            pages: 0,
            crc: 0,
        };
        TreeWriter { levels: shape.levels(R::BYTES).into_iter().map(filling).collect() }
    }

    /// Takes the next record.
    pub(crate) fn push<R: Record>(
        &mut self,
        record: &R,
        sink: &mut impl FnMut(u64, &[u8]) -> Result<(), ReplicaError>,
    ) -> Result<(), ReplicaError> {
        let mut bytes = [0; 64];
        record.encode(&mut bytes[..R::BYTES]);
        let mut new_page = self.levels[0].push(&bytes[..R::BYTES], sink)?;
        for level in self.levels.iter_mut().skip(1) {
            if !new_page {
                break;
            }
            bytes[..KEY_BYTES].copy_from_slice(&record.start().to_le_bytes());
            new_page = level.push(&bytes[..KEY_BYTES], sink)?;
        }
        Ok(())
    }

    /// Ends the tree, and gives the checksum over all of its pages' checksums, level by level.
    pub(crate) fn finish(
        self,
        sink: &mut impl FnMut(u64, &[u8]) -> Result<(), ReplicaError>,
    ) -> Result<u32, ReplicaError> {
        let mut crc = 0;
        for mut filling in self.levels {
            filling.close_page();
            debug_assert_eq!(filling.pages, filling.level.pages(), "as many records as were announced");
            filling.flush(sink)?;
            crc = crc32c::crc32c_append(crc, &filling.crc.to_le_bytes());
        }
        Ok(crc)
    }
}

impl Filling {
    /// Whether the item is the first of a page.
    fn push(
        &mut self,
        item: &[u8],
        sink: &mut impl FnMut(u64, &[u8]) -> Result<(), ReplicaError>,
    ) -> Result<bool, ReplicaError> {
        if self.page_items == self.level.capacity() {
            self.close_page();
            if self.buffer.len() >= BATCH_PAGES * PAGE_BYTES - PAGE_BYTES {
                self.flush(sink)?;
            }
        }
        self.buffer.extend_from_slice(item);
        self.page_items += 1;
        Ok(self.page_items == 1)
    }

    fn close_page(&mut self) {
        if self.page_items == 0 {
            return;
        }
        let crc = page_crc(self.level.ordinal + self.pages, &self.buffer[self.page_start..]).to_le_bytes();
        self.buffer.extend_from_slice(&crc);
        const { assert!(CRC_BYTES == 4) };
        self.crc = crc32c::crc32c_append(self.crc, &crc);
        self.page_start = self.buffer.len();
        self.page_items = 0;
        self.pages += 1;
    }

    fn flush(
        &mut self,
        sink: &mut impl FnMut(u64, &[u8]) -> Result<(), ReplicaError>,
    ) -> Result<(), ReplicaError> {
        if !self.buffer.is_empty() {
            sink(self.position, &self.buffer)?;
        }
        self.position += self.buffer.len() as u64;
        self.buffer.clear();
        self.page_start = 0;
        Ok(())
    }
}
