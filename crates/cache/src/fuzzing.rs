//! What the fuzzer throws at the decoders of the cache's files. Built for it alone.
//!
//! The lowest bit of the first byte says whether what any forger can get right is mended: magic, version, checksums.

use std::path::Path;

use block::{Epoch, Generation, GroupId, HistoryId};
use durable::{CrashStorage, OpenMode, Storage};

use crate::Position;
use crate::cursors::{Cursors, GroupCursor};
use crate::format::{
    HEADER_BYTES, Kind, RECORD_MAGIC, RecordHeader, SEGMENT_MAGIC, SegmentHeader, record_bytes, seal,
};
use crate::scan::{Depth, scan};

const SEGMENT: SegmentHeader = SegmentHeader { number: 7, salt: 0x1122_3344_5566_7788 };

/// A segment, read as when a cache is opened and when it is verified.
pub fn segment(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let mut bytes = data.to_vec();
    if way & 1 == 1 {
        mend(&mut bytes);
    }
    let storage = CrashStorage::new();
    let file = storage.open(Path::new("/7"), OpenMode::CreateNew).expect("a new file");
    file.write_all_at(&bytes, 0).expect("room");
    let depth = Depth { last: way & 2 == 2, durable: u64::from(way >> 4) * 128, data: way & 4 == 4 };
    let scan = scan(&*file, SEGMENT.number, depth).expect("a file can be read");
    let mut end = 0;
    for record in &scan.records {
        assert!(record.header.offset >= end && record.header.end() <= bytes.len() as u64, "records overlap");
        end = record.header.end();
    }
    for range in &scan.damaged {
        assert!(range.start < range.end || range.start == 0, "{range:?}");
        assert!(
            scan.records
                .iter()
                .all(|record| record.header.end() <= range.start || record.header.offset >= range.end)
        );
    }
}

/// The segment's header and every record's: magic, place and checksum.
fn mend(bytes: &mut [u8]) {
    for (number, chunk) in bytes.chunks_exact_mut(HEADER_BYTES).enumerate() {
        let chunk: &mut [u8; HEADER_BYTES] = chunk.try_into().expect("of this length");
        if number == 0 {
            chunk[..8].copy_from_slice(SEGMENT_MAGIC);
            chunk[8..10].copy_from_slice(&1_u16.to_le_bytes());
            chunk[16..24].copy_from_slice(&SEGMENT.number.to_le_bytes());
            chunk[24..32].copy_from_slice(&SEGMENT.salt.to_le_bytes());
        } else if chunk[..4] == *RECORD_MAGIC {
            chunk[8..16].copy_from_slice(&SEGMENT.salt.to_le_bytes());
            chunk[16..24].copy_from_slice(&SEGMENT.number.to_le_bytes());
            chunk[24..32].copy_from_slice(&((number * HEADER_BYTES) as u64).to_le_bytes());
        } else {
            continue;
        }
        *chunk = seal(*chunk);
    }
}

/// What [`segment`] begins with: two changesets and a mark.
pub fn segment_seeds() -> Vec<Vec<u8>> {
    let mut bytes = SEGMENT.encode().to_vec();
    for (epoch, data) in [(1, &b"one"[..]), (2, &[5; 200])] {
        let header = RecordHeader {
            kind: Kind::Last,
            segment: SEGMENT,
            offset: bytes.len() as u64,
            durable: 128,
            arrival: epoch,
            group: GroupId([1; 16]),
            position: Position { generation: Generation(1), epoch: Epoch(epoch) },
            total: data.len() as u64,
            chunk_offset: 0,
            length: data.len() as u32,
            checksum: crc32c::crc32c(data),
        };
        let end = header.offset + record_bytes(data.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(data);
        bytes.resize(end as usize, 0);
    }
    let mark = RecordHeader {
        kind: Kind::Mark,
        segment: SEGMENT,
        offset: bytes.len() as u64,
        durable: bytes.len() as u64,
        arrival: 0,
        group: GroupId([0; 16]),
        position: Position::NONE,
        total: 0,
        chunk_offset: 0,
        length: 0,
        checksum: crc32c::crc32c(&[]),
    };
    bytes.extend_from_slice(&mark.encode());
    [0, 1, 6, 7, 0x21, 0x27].map(|way| [&[way][..], &bytes].concat()).to_vec()
}

/// The file of cursors.
pub fn cursors(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let mut bytes = data.to_vec();
    if way & 1 == 1 && bytes.len() > 16 {
        let version = 1 + (way >> 1 & 1);
        bytes[..10].copy_from_slice(&[&b"SWCURSOR"[..], &[version, 0]].concat());
        let body = bytes.len() - 4;
        let checksum = crc32c::crc32c(&bytes[..body]);
        bytes[body..].copy_from_slice(&checksum.to_le_bytes());
    }
    if let Ok(found) = Cursors::decode(&bytes) {
        assert_eq!(Cursors::decode(&found.encode()), Ok(found));
    }
}

/// What [`cursors`] begins with.
pub fn cursors_seeds() -> Vec<Vec<u8>> {
    let at = |epoch| Position { generation: Generation(1), epoch: Epoch(epoch) };
    let targets = [("site-b".to_owned(), at(6)), ("site-c".to_owned(), at(4))].into();
    let group = GroupCursor {
        base: at(4),
        held: at(9),
        lost: Some(at(8)),
        history: Some((Generation(1), HistoryId(9))),
        targets,
    };
    let groups = [(GroupId([1; 16]), group), (GroupId([2; 16]), GroupCursor::default())].into();
    let bytes = Cursors { segment: 7, durable: 4096, groups }.encode();
    [0, 1, 3].map(|way| [&[way][..], &bytes].concat()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sound_stays_so_when_mended() {
        for seed in segment_seeds() {
            segment(&seed);
            let mut bytes = seed[1..].to_vec();
            mend(&mut bytes);
            assert!(bytes == seed[1..]);
        }
        cursors_seeds().iter().for_each(|seed| cursors(seed));
    }
}
