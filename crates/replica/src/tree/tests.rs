use std::path::Path;
use std::sync::Arc;

use durable::{CrashStorage, OpenMode, Storage, StorageFile};

use super::*;
use crate::ReplicaError;
use crate::bytes::{get_u64, put};

#[derive(Clone, Copy, Debug, PartialEq)]
struct Range(u64, u64);

impl Record for Range {
    const BYTES: usize = 16;
    fn start(&self) -> u64 {
        self.0
    }
    fn end(&self) -> u64 {
        self.1
    }
    fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 0, &self.0.to_le_bytes());
        put(bytes, 8, &self.1.to_le_bytes());
    }
    fn decode(bytes: &[u8]) -> Range {
        Range(get_u64(bytes, 0), get_u64(bytes, 8))
    }
    fn is_valid(&self, limits: &Limits) -> bool {
        self.0 < self.1 && self.1 <= limits.sectors
    }
}

struct File {
    storage: CrashStorage,
    pages: Pages,
    serial: u64,
}

const PATH: &str = "/tree";

impl Source for File {
    fn pages(&self) -> &Pages {
        &self.pages
    }
    fn serial(&self) -> u64 {
        self.serial
    }
    fn path(&self) -> &Path {
        Path::new(PATH)
    }
    fn open(&self) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        Ok(self.storage.open(self.path(), OpenMode::ReadWrite).unwrap())
    }
}

/// Every record is 3 sectors with 2 free ones before it.
fn record(index: u64) -> Range {
    Range(index * 5 + 2, index * 5 + 5)
}

fn written(records: u64, base: u64) -> (File, Shape, u32) {
    let source = File { storage: CrashStorage::new(), pages: Pages::new(16), serial: 1 };
    let file = source.storage.open(Path::new(PATH), OpenMode::CreateNew).unwrap();
    let limits = Limits { sectors: records * 5, values: 0..0 };
    let shape = Shape { base, records, kind: Kind::Paged, limits };
    let mut sink = |position: u64, bytes: &[u8]| {
        file.write_all_at(bytes, position).unwrap();
        Ok(())
    };
    let mut writer = TreeWriter::new::<Range>(&shape);
    for index in 0..records {
        writer.push(&record(index), &mut sink).unwrap();
    }
    let crc = writer.finish(&mut sink).unwrap();
    assert_eq!(file.len().unwrap(), if records == 0 { 0 } else { base + tree_bytes::<Range>(records) });
    (source, shape, crc)
}

/// Of no pages, one, two levels and three, full and not.
#[test]
fn every_record_is_found_from_every_side() {
    for records in [0, 1, 254, 255, 256, 5000, 255 * 511, 255 * 511 + 1, 140_000] {
        let (source, shape, crc) = written(records, 77);
        let file = source.open().unwrap();
        let all: Vec<Range> =
            Stream::new(shape.clone(), file.clone(), source.path()).map(Result::unwrap).collect();
        assert!(all.iter().copied().eq((0..records).map(record)));
        assert_eq!(check_whole::<Range>(&shape, &file, source.path()).unwrap(), crc);
        let step = (records / 300).max(1) as usize;
        for index in (0..records).step_by(step).chain(records.checked_sub(1)) {
            // Before it, within it, at its last sector: itself. At its end: the next.
            for (at, expected) in [(0, index), (1, index), (2, index), (4, index), (5, index + 1)] {
                let mut cursor = Cursor::<Range>::seek(&shape, &source, index * 5 + at).unwrap();
                for expected in expected..(expected + 300).min(records) {
                    assert_eq!(
                        cursor.next(&source).unwrap(),
                        Some(record(expected)),
                        "{records} {index} {at}"
                    );
                }
            }
        }
        let mut past = Cursor::<Range>::seek(&shape, &source, u64::MAX).unwrap();
        assert_eq!(past.next(&source).unwrap(), None);
    }
}

/// As in undo layers of version 2: nothing but records.
#[test]
fn bare_records_are_found_too() {
    for records in [0, 1, 254, 255, 256, 5000] {
        let source = File { storage: CrashStorage::new(), pages: Pages::new(16), serial: 1 };
        let file = source.storage.open(Path::new(PATH), OpenMode::CreateNew).unwrap();
        let mut bytes = vec![0; 77 + records as usize * Range::BYTES];
        for index in 0..records {
            record(index).encode(&mut bytes[77 + index as usize * Range::BYTES..]);
        }
        file.write_all_at(&bytes, 0).unwrap();
        let limits = Limits { sectors: records * 5, values: 0..0 };
        let shape = Shape { base: 77, records, kind: Kind::Bare, limits };
        let all: Vec<Range> = Stream::new(shape.clone(), file, source.path()).map(Result::unwrap).collect();
        assert!(all.iter().copied().eq((0..records).map(record)));
        for index in 0..records {
            for (at, expected) in [(0, index), (2, index), (4, index), (5, index + 1)] {
                let mut cursor = Cursor::<Range>::seek(&shape, &source, index * 5 + at).unwrap();
                let found = cursor.next(&source).unwrap();
                assert_eq!(found, (expected < records).then(|| record(expected)), "{records} {index} {at}");
            }
        }
    }
}

/// A bit anywhere is noticed by whoever comes by, and a reader never gives a record that is not there.
#[test]
fn a_flipped_bit_is_noticed() {
    let records = 3000;
    let (mut source, shape, _) = written(records, 0);
    let file = source.open().unwrap();
    for at in (0..file.len().unwrap()).step_by(97) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        source.serial += 1;
        assert!(matches!(
            check_whole::<Range>(&shape, &file, source.path()),
            Err(ReplicaError::Corrupt { .. })
        ));
        let mut refused = 0;
        for index in (0..records).step_by(100) {
            let found = Cursor::<Range>::seek(&shape, &source, index * 5 + 2)
                .and_then(|mut cursor| cursor.next(&source));
            match found {
                Ok(found) => assert_eq!(found, Some(record(index))),
                Err(ReplicaError::Corrupt { .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(refused > 0, "byte {at}");
        file.write_all_at(&byte, at).unwrap();
    }
}

/// Pages of the same file in each other's place have right checksums of their own.
#[test]
fn a_page_in_another_place_is_noticed() {
    let (source, shape, _) = written(1000, 0);
    let file = source.open().unwrap();
    let mut page = vec![0; 255 * 16 + 4];
    file.read_exact_at(&mut page, 0).unwrap();
    file.write_all_at(&page, page.len() as u64).unwrap();
    assert!(check_whole::<Range>(&shape, &file, source.path()).is_err());
    assert!(Cursor::<Range>::seek(&shape, &source, 300 * 5).is_err());
}
