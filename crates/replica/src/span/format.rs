//! A span file, byte by byte.

use std::path::Path;

use block::{Epoch, Generation, GroupId, VolumeId};
use changeset::VOLUMES_MAX;
use durable::StorageFile;

use super::length;
use crate::bytes::{get, get_u32, get_u64, put};
use crate::error::Context;
use crate::layer::{EPOCH_DIGITS, parse_digits};
use crate::segment::Segment;
use crate::sweep::Piece;
use crate::tree::{Kind, Limits, Record, Shape, tree_bytes};
use crate::{ReplicaError, SPAN_LEVELS};

const MAGIC: [u8; 8] = *b"SEAWSPAN";
/// 1: the first.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 80;
const ROW_BYTES: usize = 24;
const FILE_SUFFIX: &str = ".span";
/// In a record's sectors: all of it is zeroes.
const ZEROES: u32 = 1 << 31;
/// The most sectors of one record. Longer segments take several.
pub(crate) const SECTORS_MAX: u64 = ZEROES as u64 - 1;

/// A segment as a span has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpanRecord {
    start_sector: u64,
    sectors: u32,
    /// The epoch, counted from the span's first.
    epoch: u32,
}

impl SpanRecord {
    /// Of a segment of at most [`SECTORS_MAX`].
    pub(crate) fn of(segment: &Segment, first: Epoch) -> SpanRecord {
        debug_assert!((1..=SECTORS_MAX).contains(&segment.sectors));
        let zeroes = if segment.zeroes { ZEROES } else { 0 };
        SpanRecord {
            start_sector: segment.start_sector,
            sectors: segment.sectors as u32 | zeroes,
            epoch: (segment.epoch.0 - first.0) as u32,
        }
    }

    pub(crate) fn segment(&self, first: Epoch) -> Segment {
        Segment {
            start_sector: self.start_sector,
            sectors: u64::from(self.sectors & !ZEROES),
            epoch: Epoch(first.0 + u64::from(self.epoch)),
            zeroes: self.sectors & ZEROES != 0,
        }
    }
}

impl Record for SpanRecord {
    const BYTES: usize = 16;

    fn start(&self) -> u64 {
        self.start_sector
    }

    fn end(&self) -> u64 {
        self.segment(Epoch::NONE).end()
    }

    fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 0, &self.start_sector.to_le_bytes());
        put(bytes, 8, &self.sectors.to_le_bytes());
        put(bytes, 12, &self.epoch.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> SpanRecord {
        SpanRecord { start_sector: get_u64(bytes, 0), sectors: get_u32(bytes, 8), epoch: get_u32(bytes, 12) }
    }

    fn is_valid(&self, limits: &Limits) -> bool {
        let sectors = u64::from(self.sectors & !ZEROES);
        let end = self.start_sector.checked_add(sectors);
        sectors > 0
            && end.is_some_and(|end| end <= limits.sectors)
            && limits.values.contains(&u64::from(self.epoch))
    }
}

/// A span file's header and table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpanHeader {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
    pub(crate) first: Epoch,
    pub(crate) last: Epoch,
    /// Each volume with its number of records.
    pub(crate) volumes: Box<[(VolumeId, u64)]>,
    pub(crate) index_crc: u32,
}

impl SpanHeader {
    /// Where the records of each volume lie.
    pub(crate) fn trees(&self) -> impl Iterator<Item = (VolumeId, Shape)> {
        let mut base = (HEADER_BYTES + self.volumes.len() * ROW_BYTES) as u64;
        self.volumes.iter().map(move |(volume, records)| {
            // A span does not know how large volumes are. No byte of one is past what 64 bits can count.
            let limits =
                Limits { sectors: u64::MAX / block::SECTOR_BYTES, values: 0..self.last.0 - self.first.0 + 1 };
            let shape = Shape { base, records: *records, kind: Kind::Paged, limits };
            base += shape.bytes::<SpanRecord>();
            (*volume, shape)
        })
    }

    pub(crate) fn tree(&self, volume: VolumeId) -> Option<Shape> {
        self.trees().find(|(id, _)| *id == volume).map(|(_, shape)| shape)
    }

    /// Of the whole file.
    pub(crate) fn file_bytes(&self) -> u64 {
        let trees: u64 = self.volumes.iter().map(|(_, records)| tree_bytes::<SpanRecord>(*records)).sum();
        (HEADER_BYTES + self.volumes.len() * ROW_BYTES) as u64 + trees
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES + self.volumes.len() * ROW_BYTES];
        let file_bytes = self.file_bytes();
        let (head, table) = bytes.split_at_mut(HEADER_BYTES);
        for (row, (volume, records)) in table.chunks_exact_mut(ROW_BYTES).zip(&self.volumes) {
            put(row, 0, &volume.0);
            put(row, 16, &records.to_le_bytes());
        }
        put(head, 0, &MAGIC);
        put(head, 8, &VERSION.to_le_bytes());
        put(head, 12, &(self.volumes.len() as u32).to_le_bytes());
        put(head, 16, &self.group.0);
        put(head, 32, &self.generation.0.to_le_bytes());
        put(head, 40, &self.first.0.to_le_bytes());
        put(head, 48, &self.last.0.to_le_bytes());
        put(head, 56, &file_bytes.to_le_bytes());
        put(head, 64, &self.index_crc.to_le_bytes());
        put(head, 68, &crc32c::crc32c(table).to_le_bytes());
        let crc = crc32c::crc32c(&head[..HEADER_BYTES - 4]);
        put(head, HEADER_BYTES - 4, &crc.to_le_bytes());
        bytes
    }

    pub(crate) fn read(file: &dyn StorageFile, path: &Path) -> Result<SpanHeader, ReplicaError> {
        let corrupt = |problem: String| ReplicaError::corrupt(path, problem);
        let length = file.len().context("measure span", path)?;
        if length < HEADER_BYTES as u64 {
            return Err(corrupt(format!("{length} bytes are too short for a span")));
        }
        let mut head = [0; HEADER_BYTES];
        file.read_exact_at(&mut head, 0).context("read span", path)?;
        let volumes = check_head(&head, length).map_err(corrupt)?;
        let mut table = vec![0; volumes * ROW_BYTES];
        file.read_exact_at(&mut table, HEADER_BYTES as u64).context("read span", path)?;
        decode(&head, &table, length).map_err(corrupt)
    }
}

/// Checks all but the table; gives the number of volumes.
fn check_head(head: &[u8; HEADER_BYTES], length: u64) -> Result<usize, String> {
    if head[..8] != MAGIC {
        return Err("not a span (wrong magic)".to_owned());
    }
    let version = get_u32(head, 8);
    if version != VERSION {
        return Err(format!("span version {version} is not known; this program reads version {VERSION}"));
    }
    if crc32c::crc32c(&head[..HEADER_BYTES - 4]) != get_u32(head, HEADER_BYTES - 4) {
        return Err("header checksum does not match (damaged)".to_owned());
    }
    let volumes = get_u32(head, 12) as usize;
    if volumes > VOLUMES_MAX || length < (HEADER_BYTES + volumes * ROW_BYTES) as u64 {
        return Err(format!("{volumes} volumes do not fit"));
    }
    let file = get_u64(head, 56);
    if file != length {
        return Err(format!("{length} bytes long where its header says {file} (cut short or grown)"));
    }
    Ok(volumes)
}

fn decode(head: &[u8; HEADER_BYTES], table: &[u8], length: u64) -> Result<SpanHeader, String> {
    if crc32c::crc32c(table) != get_u32(head, 68) {
        return Err("volume table checksum does not match (damaged)".to_owned());
    }
    let volumes: Vec<(VolumeId, u64)> =
        table.chunks_exact(ROW_BYTES).map(|row| (VolumeId(get(row, 0)), get_u64(row, 16))).collect();
    let header = SpanHeader {
        group: GroupId(get(head, 16)),
        generation: Generation(get_u64(head, 32)),
        first: Epoch(get_u64(head, 40)),
        last: Epoch(get_u64(head, 48)),
        volumes: volumes.into(),
        index_crc: get_u32(head, 64),
    };
    let span = header.last.0.checked_sub(header.first.0);
    if header.first == Epoch::NONE || span.is_none_or(|span| span >= length_max()) {
        return Err(format!("epochs {} to {} are no span", header.first, header.last));
    }
    let records = header.volumes.iter().try_fold(0_u64, |sum, (_, records)| sum.checked_add(*records));
    if records.is_none_or(|records| records > length / SpanRecord::BYTES as u64)
        || header.file_bytes() != length
    {
        return Err("its volumes' records do not make its length".to_owned());
    }
    Ok(header)
}

fn length_max() -> u64 {
    length(SPAN_LEVELS)
}

/// A span file's name.
pub(crate) fn file_name(first: Epoch, last: Epoch) -> String {
    format!("{:0EPOCH_DIGITS$}-{:0EPOCH_DIGITS$}{FILE_SUFFIX}", first.0, last.0)
}

/// The first epoch and the level that a span file's name says; `None` when it is no such name.
pub(crate) fn parse_file_name(name: &str) -> Option<(Epoch, u32)> {
    let (first, last) = name.strip_suffix(FILE_SUFFIX)?.split_once('-')?;
    let (first, last) = (parse_digits(first)?, parse_digits(last)?);
    let epochs = last.0.checked_sub(first.0)?.checked_add(1)?;
    let level = (1..=SPAN_LEVELS).find(|level| length(*level) == epochs)?;
    (first.0 > 0 && (first.0 - 1).is_multiple_of(epochs)).then_some((first, level))
}
