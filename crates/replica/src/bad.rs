//! Blocks of images that scrubbing found damaged. The byte table is in docs/formats/damaged.md.
//!
//! - Consistency: a block that is in the list is refused to views, and what an epoch overwrites of it is marked in its layer. It leaves
//!   the list when an epoch has written all of it.
//! - Crash consistency: the file is replaced in one step, when a scrub ends and when blocks have left. A crash before that leaves more
//!   in the list than need be, or what the next scrub finds again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Extent, GroupId, VolumeId};
use durable::{OpenMode, Storage, replace};

use crate::bytes::{get, get_u32, get_u64, put};
use crate::error::Context;
use crate::{BAD_BLOCKS_MAX, ReplicaError};

pub(crate) const FILE_NAME: &str = "damaged";
const MAGIC: [u8; 8] = *b"SEAWBADB";
/// 1: the first.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const ROW_BYTES: usize = 32;
const CRC_BYTES: usize = 4;
/// A longer file is not read.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// The damaged blocks of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadBlocks {
    /// At most [`BAD_BLOCKS_MAX`].
    blocks: BTreeSet<u64>,
    /// From here on all count as damaged: there were too many to list.
    from: u64,
}

impl Default for BadBlocks {
    fn default() -> BadBlocks {
        BadBlocks { blocks: BTreeSet::new(), from: u64::MAX }
    }
}

/// Of each volume that has some.
pub(crate) type BadByVolume = BTreeMap<VolumeId, BadBlocks>;

impl BadBlocks {
    /// Adds a block, behind those that are there; `false` when there are too many, so that it and all after it count as damaged.
    pub(crate) fn push(&mut self, block: u64) -> bool {
        if self.blocks.len() >= BAD_BLOCKS_MAX {
            self.from = self.from.min(block);
            return false;
        }
        self.blocks.insert(block);
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.from == u64::MAX
    }

    pub(crate) fn contains(&self, block: u64) -> bool {
        block >= self.from || self.blocks.contains(&block)
    }

    /// Takes a block out that is whole again; `false` when it is one of too many.
    pub(crate) fn remove(&mut self, block: u64) -> bool {
        self.blocks.remove(&block);
        block < self.from
    }

    /// The same, but for those that are listed.
    pub(crate) fn without_listed(&self) -> BadBlocks {
        BadBlocks { blocks: BTreeSet::new(), from: self.from }
    }

    /// Those in a range, in order.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        let listed = self.blocks.range(range.start..range.end.min(self.from).max(range.start)).copied();
        listed.chain(range.start.max(self.from)..range.end)
    }

    /// Those that are listed.
    pub(crate) fn listed(&self) -> impl ExactSizeIterator<Item = u64> {
        self.blocks.iter().copied().collect::<Vec<_>>().into_iter()
    }

    /// Whether there were too many to list.
    pub(crate) fn is_too_many(&self) -> bool {
        self.from != u64::MAX
    }

    fn ranges(&self, end: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for block in &self.blocks {
            match ranges.last_mut() {
                Some(last) if last.end == *block => last.end += 1,
                _ => ranges.push(*block..block + 1),
            }
        }
        if self.from < end {
            ranges.push(self.from..end);
        }
        ranges
    }

    /// The same as bytes of a volume of a size.
    pub(crate) fn extents(&self, size: ByteCount) -> Vec<Extent> {
        let extent = |range: Range<u64>| {
            let length = ByteCount((range.end - range.start) * BLOCK_BYTES);
            Extent::new(ByteOffset(range.start * BLOCK_BYTES), length).ok()
        };
        self.ranges(size.0.div_ceil(BLOCK_BYTES)).into_iter().filter_map(extent).collect()
    }
}

pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE_NAME)
}

/// What is known to be damaged; nothing when there is no file.
///
/// # Errors
/// When storage fails, or the file is damaged itself.
pub(crate) fn read(storage: &dyn Storage, dir: &Path, group: GroupId) -> Result<BadByVolume, ReplicaError> {
    let path = path(dir);
    let file = match storage.open(&path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BadByVolume::new()),
        other => other.context("open list of damaged blocks", &path)?,
    };
    let length = file.len().context("measure list of damaged blocks", &path)?;
    if length > FILE_BYTES_MAX {
        return Err(ReplicaError::corrupt(&path, format!("{length} bytes are too long")));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).context("read list of damaged blocks", &path)?;
    decode(&bytes, group).map_err(|problem| ReplicaError::corrupt(&path, problem))
}

/// Replaces the list, durably.
pub(crate) fn write(
    storage: &dyn Storage,
    dir: &Path,
    group: GroupId,
    bad: &BadByVolume,
) -> Result<(), ReplicaError> {
    let path = path(dir);
    replace(storage, &path, &encode(group, bad)).context("write list of damaged blocks", &path)
}

pub(crate) fn encode(group: GroupId, bad: &BadByVolume) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    let mut count = 0_u32;
    for (volume, bad) in bad {
        for range in bad.ranges(u64::MAX) {
            let at = bytes.len();
            bytes.resize(at + ROW_BYTES, 0);
            put(&mut bytes, at, &volume.0);
            put(&mut bytes, at + 16, &range.start.to_le_bytes());
            put(&mut bytes, at + 24, &range.end.to_le_bytes());
            count += 1;
        }
    }
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 12, &count.to_le_bytes());
    put(&mut bytes, 16, &group.0);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

pub(crate) fn decode(bytes: &[u8], group: GroupId) -> Result<BadByVolume, String> {
    if bytes.len() < HEADER_BYTES + CRC_BYTES {
        return Err(format!("{} bytes are too short for a list of damaged blocks", bytes.len()));
    }
    if bytes[..8] != MAGIC {
        return Err("not a list of damaged blocks (wrong magic)".to_owned());
    }
    let version = get_u32(bytes, 8);
    if version != VERSION {
        return Err(format!("version {version} is not known; this program reads version {VERSION}"));
    }
    let body = bytes.len() - CRC_BYTES;
    if crc32c::crc32c(&bytes[..body]) != get_u32(bytes, body) {
        return Err("checksum does not match (damaged)".to_owned());
    }
    if GroupId(get(bytes, 16)) != group {
        return Err("it is of another group; put it back where it belongs".to_owned());
    }
    let rows = &bytes[HEADER_BYTES..body];
    if rows.len() != get_u32(bytes, 12) as usize * ROW_BYTES {
        return Err("its rows do not make its length".to_owned());
    }
    let mut all = BadByVolume::new();
    for row in rows.chunks_exact(ROW_BYTES) {
        let bad: &mut BadBlocks = all.entry(VolumeId(get(row, 0))).or_default();
        let (start, end) = (get_u64(row, 16), get_u64(row, 24));
        if start >= end || bad.blocks.last().is_some_and(|last| *last >= start) || bad.is_too_many() {
            return Err("its rows are out of order".to_owned());
        }
        match end {
            u64::MAX => bad.from = start,
            end if bad.blocks.len() as u64 + (end - start) > BAD_BLOCKS_MAX as u64 => {
                return Err(format!("it names more than {BAD_BLOCKS_MAX} blocks of a volume"));
            }
            end => bad.blocks.extend(start..end),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId([0x11; 16]);

    fn bad() -> BadByVolume {
        let mut bad = BadBlocks::default();
        for block in [3, 4, 0x0102] {
            assert!(bad.push(block));
        }
        let many = BadBlocks { blocks: BTreeSet::new(), from: 7 };
        [(VolumeId([0x22; 16]), bad), (VolumeId([0x33; 16]), many)].into()
    }

    /// The bytes of docs/formats/damaged.md.
    #[test]
    fn golden_bytes() {
        let mut golden = b"SEAWBADB\x01\0\0\0\x03\0\0\0".to_vec();
        golden.extend_from_slice(&[0x11; 16]);
        golden.extend_from_slice(&[0x22; 16]);
        golden.extend_from_slice(b"\x03\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
        golden.extend_from_slice(&[0x22; 16]);
        golden.extend_from_slice(b"\x02\x01\0\0\0\0\0\0\x03\x01\0\0\0\0\0\0");
        golden.extend_from_slice(&[0x33; 16]);
        golden.extend_from_slice(b"\x07\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff");
        golden.extend_from_slice(&GOLDEN_CRC);
        assert_eq!(encode(GROUP, &bad()), golden);
        assert_eq!(decode(&golden, GROUP).unwrap(), bad());
    }

    const GOLDEN_CRC: [u8; 4] = [0x7b, 0x04, 0xe1, 0x4e];

    #[test]
    fn damage_and_contradictions_are_refused() {
        let bytes = encode(GROUP, &bad());
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(decode(&flipped, GROUP).is_err(), "byte {at}");
            assert!(decode(&bytes[..at], GROUP).is_err(), "{at} bytes");
        }
        let with = |at: usize, value: u8| {
            let mut bytes = encode(GROUP, &bad());
            bytes[at] = value;
            let body = bytes.len() - CRC_BYTES;
            let crc = crc32c::crc32c(&bytes[..body]);
            put(&mut bytes, body, &crc.to_le_bytes());
            decode(&bytes, GROUP).unwrap_err()
        };
        assert!(with(8, 2).contains("version 2"));
        assert!(with(12, 2).contains("do not make its length"));
        assert!(with(16, 2).contains("another group"));
        assert!(with(32 + 16, 5).contains("out of order"));
        assert!(with(64 + 16 + 1, 0).contains("out of order"));
        assert!(with(32 + 24 + 6, 1).contains("names more than"));
    }

    /// Too many to list: all behind them count.
    #[test]
    fn past_the_limit_all_that_follows_counts() {
        let mut bad = BadBlocks::default();
        assert!((0..BAD_BLOCKS_MAX as u64).all(|block| bad.push(block * 2)));
        let next = BAD_BLOCKS_MAX as u64 * 2;
        assert!(!bad.is_too_many() && !bad.push(next) && bad.is_too_many());
        assert!(bad.contains(0) && !bad.contains(1) && bad.contains(next) && bad.contains(next + 1));
        assert_eq!(bad.within(next - 3..next + 2).collect::<Vec<_>>(), [next - 2, next, next + 1]);
        assert_eq!(bad.within(1..2).count(), 0);
        assert!(bad.remove(0) && !bad.contains(0) && !bad.remove(next + 5));
        let last = bad.extents(ByteCount((next + 10) * BLOCK_BYTES)).pop().unwrap();
        assert_eq!((last.offset().0, last.length().0), (next * BLOCK_BYTES, 10 * BLOCK_BYTES));
        let all: BadByVolume = [(VolumeId([1; 16]), bad)].into();
        assert_eq!(decode(&encode(GROUP, &all), GROUP).unwrap(), all);
    }
}
