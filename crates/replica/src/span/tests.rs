use std::path::Path;

use block::{Epoch, Generation, GroupId, VolumeId};
use durable::{CrashStorage, OpenMode, Storage};

use super::*;
use crate::tree::{Record, TreeWriter};

fn header() -> SpanHeader {
    SpanHeader {
        group: GroupId([0x11; 16]),
        generation: Generation(2),
        first: Epoch(5),
        last: Epoch(6),
        volumes: [(VolumeId([0x22; 16]), 2)].into(),
        index_crc: u32::from_le_bytes(GOLDEN_INDEX_CRC),
    }
}

fn segments() -> [Segment; 2] {
    [
        Segment { start_sector: 0x0102, sectors: 3, epoch: Epoch(6), zeroes: false },
        Segment { start_sector: 0x0200, sectors: 4, epoch: Epoch(5), zeroes: true },
    ]
}

fn written() -> Vec<u8> {
    let mut header = header();
    let mut bytes = header.encode();
    for (_, shape) in header.trees().collect::<Vec<_>>() {
        let mut tree = TreeWriter::new::<SpanRecord>(&shape);
        let mut sink = |position: u64, page: &[u8]| {
            assert_eq!(position, bytes.len() as u64);
            bytes.extend_from_slice(page);
            Ok(())
        };
        for segment in segments() {
            tree.push(&SpanRecord::of(&segment, header.first), &mut sink).unwrap();
        }
        let crc = tree.finish(&mut sink).unwrap();
        header.index_crc = crc32c::crc32c(&crc.to_le_bytes());
    }
    let head = header.encode();
    bytes[..head.len()].copy_from_slice(&head);
    bytes
}

/// The bytes of docs/formats/span.md.
#[test]
fn golden_bytes() {
    let mut golden = b"SEAWSPAN\x01\0\0\0\x01\0\0\0".to_vec();
    golden.extend_from_slice(&[0x11; 16]);
    golden.extend_from_slice(b"\x02\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x8c\0\0\0\0\0\0\0");
    golden.extend_from_slice(&GOLDEN_INDEX_CRC);
    golden.extend_from_slice(&GOLDEN_TABLE_CRC);
    golden.extend_from_slice(&[0; 4]);
    golden.extend_from_slice(&GOLDEN_HEADER_CRC);
    golden.extend_from_slice(&[0x22; 16]);
    golden.extend_from_slice(b"\x02\0\0\0\0\0\0\0");
    golden.extend_from_slice(b"\x02\x01\0\0\0\0\0\0\x03\0\0\0\x01\0\0\0");
    golden.extend_from_slice(b"\0\x02\0\0\0\0\0\0\x04\0\0\x80\0\0\0\0");
    golden.extend_from_slice(&GOLDEN_PAGE_CRC);
    assert_eq!(written(), golden);
}

const GOLDEN_INDEX_CRC: [u8; 4] = [0x61, 0x08, 0x18, 0x48];
const GOLDEN_TABLE_CRC: [u8; 4] = [0xb7, 0xf5, 0x77, 0x5d];
const GOLDEN_HEADER_CRC: [u8; 4] = [0xc4, 0x0d, 0xd7, 0x49];
const GOLDEN_PAGE_CRC: [u8; 4] = [0x2b, 0x1d, 0x68, 0x26];

fn read(bytes: &[u8]) -> Result<(), ReplicaError> {
    let storage = CrashStorage::new();
    let path = Path::new("/").join(file_name(Epoch(5), Epoch(6)));
    storage.open(&path, OpenMode::CreateNew).unwrap().write_all_at(bytes, 0).unwrap();
    check(&storage, &path)
}

#[test]
fn damage_is_refused() {
    let bytes = written();
    read(&bytes).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(read(&bytes), Err(ReplicaError::Corrupt { .. })), "bit {bit}");
    }
    for length in 0..bytes.len() {
        assert!(matches!(read(&bytes[..length]), Err(ReplicaError::Corrupt { .. })), "{length} bytes");
    }
}

/// Right checksums do not make wrong content acceptable, and nothing panics or allocates for it.
#[test]
fn contradictions_under_a_right_checksum_are_refused() {
    let refused = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = written();
        change(&mut bytes);
        let table = crc32c::crc32c(&bytes[80..104]).to_le_bytes();
        bytes[68..72].copy_from_slice(&table);
        let head = crc32c::crc32c(&bytes[..76]).to_le_bytes();
        bytes[76..80].copy_from_slice(&head);
        read(&bytes).unwrap_err().to_string()
    };
    assert!(refused(&|bytes| bytes[8] = 2).contains("version 2 is not known"));
    assert!(refused(&|bytes| bytes[12..16].fill(0xff)).contains("do not fit"));
    assert!(refused(&|bytes| bytes[40..48].fill(0)).contains("are no span"));
    assert!(refused(&|bytes| bytes[48..56].fill(0xff)).contains("are no span"));
    assert!(refused(&|bytes| bytes[48] = 4).contains("are no span"));
    assert!(refused(&|bytes| bytes[48] = 7).contains("other epochs than its name"));
    assert!(refused(&|bytes| bytes[96..104].fill(0xff)).contains("do not make its length"));
    assert!(refused(&|bytes| bytes[96] = 1).contains("do not make its length"));
    for (start, sectors, epoch) in
        [(u64::MAX, 1, 0), (u64::MAX / 512, 1, 0), (0, 0, 0), (0, 1 << 31, 0), (0, 1, 2)]
    {
        let mut record = [0; 16];
        record[..8].copy_from_slice(&u64::to_le_bytes(start));
        record[8..12].copy_from_slice(&u32::to_le_bytes(sectors));
        record[12..].copy_from_slice(&u32::to_le_bytes(epoch));
        let shape = header().tree(VolumeId([0x22; 16])).unwrap();
        assert!(!SpanRecord::decode(&record).is_valid(&shape.limits), "{start} {sectors} {epoch}");
    }
}

#[test]
fn span_names() {
    let name = file_name(Epoch(5), Epoch(6));
    assert_eq!(name, "00000000000000000005-00000000000000000006.span");
    assert_eq!(parse_file_name(&name), Some((Epoch(5), 1)));
    for (first, last) in [(0, 1), (4, 5), (5, 7), (6, 5), (1, u64::MAX)] {
        assert_eq!(parse_file_name(&file_name(Epoch(first), Epoch(last))), None);
    }
    assert_eq!(parse_file_name("5-6.span"), None);
}
