//! A layer's index: which bytes it holds, and where.

use std::ops::Range;
use std::path::Path;

use block::{SECTOR_BYTES, VolumeId};
use durable::StorageFile;

use super::format::Header;
use crate::bytes::{get_u32, get_u64, put};
use crate::error::Context;
use crate::{RUN_BYTES_MAX, ReplicaError};

pub(crate) const ENTRY_BYTES: usize = 24;

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
}

impl Entry {
    pub(crate) fn zeroes(start_sector: u64, sectors: u32) -> Entry {
        Entry { start_sector, position: 0, sectors, crc: 0 }
    }

    pub(crate) fn is_zeroes(&self) -> bool {
        self.position == 0
    }

    /// In bytes.
    pub(crate) fn start(&self) -> u64 {
        self.start_sector * SECTOR_BYTES
    }

    /// In bytes.
    pub(crate) fn length(&self) -> u64 {
        u64::from(self.sectors) * SECTOR_BYTES
    }

    pub(crate) fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 0, &self.start_sector.to_le_bytes());
        put(bytes, 8, &self.position.to_le_bytes());
        put(bytes, 16, &self.sectors.to_le_bytes());
        put(bytes, 20, &self.crc.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Entry {
        Entry {
            start_sector: get_u64(bytes, 0),
            position: get_u64(bytes, 8),
            sectors: get_u32(bytes, 16),
            crc: get_u32(bytes, 20),
        }
    }
}

/// All entries of a layer, those of a volume together, sorted and disjoint. 24 bytes of memory each.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) entries: Vec<Entry>,
    volumes: Vec<(VolumeId, Range<usize>)>,
}

impl Index {
    pub(crate) fn new(header: &Header, entries: Vec<Entry>) -> Index {
        let mut first = 0;
        let volumes = header.meta.volumes.iter().zip(&header.entries).map(|(info, count)| {
            let range = first..first + *count as usize;
            first = range.end;
            (info.id, range)
        });
        let volumes = volumes.collect();
        Index { entries, volumes }
    }

    pub(crate) fn read(file: &dyn StorageFile, header: &Header, path: &Path) -> Result<Index, ReplicaError> {
        let corrupt = |problem: String| ReplicaError::corrupt(path, problem);
        // Bounded by the file's length, which the header was checked against.
        let length = header.entries_total() as usize * ENTRY_BYTES;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, header.index_position()).context("read undo layer index", path)?;
        if crc32c::crc32c(&bytes) != header.index_crc {
            return Err(corrupt("index checksum does not match (damaged)".to_owned()));
        }
        let entries = bytes.chunks_exact(ENTRY_BYTES).map(Entry::decode).collect();
        let index = Index::new(header, entries);
        index.check(header).map_err(corrupt)?;
        Ok(index)
    }

    fn check(&self, header: &Header) -> Result<(), String> {
        let data = header.data_position()..header.index_position();
        for (info, (_, range)) in header.meta.volumes.iter().zip(&self.volumes) {
            let mut end = 0;
            for entry in &self.entries[range.clone()] {
                let next = entry.start_sector.checked_add(entry.sectors.into());
                let in_volume = next.is_some_and(|next| next <= info.size.0 / SECTOR_BYTES);
                if entry.sectors == 0 || entry.start_sector < end || !in_volume {
                    return Err(format!(
                        "entry at sector {} of {:?} is out of range",
                        entry.start_sector, info.id
                    ));
                }
                let in_data = entry.length() <= RUN_BYTES_MAX.0
                    && entry.position >= data.start
                    && entry.position.checked_add(entry.length()).is_some_and(|end| end <= data.end);
                if !entry.is_zeroes() && !in_data {
                    return Err(format!(
                        "data of sector {} of {:?} is out of range",
                        entry.start_sector, info.id
                    ));
                }
                end = entry.start_sector + u64::from(entry.sectors);
            }
        }
        Ok(())
    }

    /// The entries of a volume, in order.
    pub(crate) fn of(&self, volume: VolumeId) -> &[Entry] {
        let range = self.volumes.iter().find(|(id, _)| *id == volume).map(|(_, range)| range.clone());
        &self.entries[range.unwrap_or(0..0)]
    }

    /// Each volume with its entries.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = (VolumeId, &[Entry])> {
        self.volumes.iter().map(|(id, range)| (*id, &self.entries[range.clone()]))
    }
}
