//! An index entry: which bytes a layer holds, and where.

use block::SECTOR_BYTES;

use crate::RUN_BYTES_MAX;
use crate::bytes::{get_u32, get_u64, put};
use crate::tree::{Limits, Record};

/// Old content of a range of a volume. At position 0 is the header, so that position means zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) start_sector: u64,
    /// In the layer file; 0 for zeroes.
    pub(crate) position: u64,
    /// At least 1. For data at most [`RUN_BYTES_MAX`].
    pub(crate) sectors: u32,
    /// Of the data; 0 for zeroes.
    pub(crate) crc: u32,
    /// Scrubbing had found the block damaged before it was kept: this is what was there, not what should have been.
    pub(crate) known_bad: bool,
}

/// In the sectors of an entry with data: it is known to be bad.
const KNOWN_BAD: u32 = 1 << 31;

impl Entry {
    pub(crate) fn zeroes(start_sector: u64, sectors: u32) -> Entry {
        Entry { start_sector, position: 0, sectors, crc: 0, known_bad: false }
    }

    pub(crate) fn is_zeroes(&self) -> bool {
        self.position == 0
    }

    /// In bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.start_sector * SECTOR_BYTES
    }

    /// In bytes.
    pub(crate) fn length(&self) -> u64 {
        u64::from(self.sectors) * SECTOR_BYTES
    }

    /// How much the file has of it, in bytes.
    pub(crate) fn data_bytes(&self) -> u64 {
        if self.is_zeroes() { 0 } else { self.length() }
    }
}

impl Record for Entry {
    const BYTES: usize = 24;

    fn start(&self) -> u64 {
        self.start_sector
    }

    fn end(&self) -> u64 {
        self.start_sector + u64::from(self.sectors)
    }

    fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 0, &self.start_sector.to_le_bytes());
        put(bytes, 8, &self.position.to_le_bytes());
        let known_bad = if self.known_bad { KNOWN_BAD } else { 0 };
        put(bytes, 16, &(self.sectors | known_bad).to_le_bytes());
        put(bytes, 20, &self.crc.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Entry {
        let (position, sectors) = (get_u64(bytes, 8), get_u32(bytes, 16));
        // Zeroes may be as long as can be counted.
        let known_bad = position != 0 && sectors & KNOWN_BAD != 0;
        Entry {
            start_sector: get_u64(bytes, 0),
            position,
            sectors: if known_bad { sectors & !KNOWN_BAD } else { sectors },
            crc: get_u32(bytes, 20),
            known_bad,
        }
    }

    fn is_valid(&self, limits: &Limits) -> bool {
        let end = self.start_sector.checked_add(self.sectors.into());
        let in_volume = self.sectors > 0 && end.is_some_and(|end| end <= limits.sectors);
        let in_data = || {
            self.length() <= RUN_BYTES_MAX.0
                && self.position >= limits.values.start
                && self.position.checked_add(self.length()).is_some_and(|end| end <= limits.values.end)
        };
        in_volume && (self.is_zeroes() || in_data())
    }
}
