use std::path::Path;

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, PointNote, UnixNanos, VolumeId};
use changeset::VolumeInfo;
use durable::{CrashStorage, OpenMode, Storage};

use crate::image::{DataCursor, Image};
use crate::layer::{Layer, LayerWriter, Meta, Scratch, file_name, for_each_run, parse_file_name};
use crate::{Place, ReplicaError};

fn meta() -> Meta {
    let volumes = [VolumeInfo {
        id: VolumeId([0x22; 16]),
        name: "sda".to_owned(),
        size: ByteCount(0x10_0000),
        logical_block: 512,
    }];
    Meta {
        group: GroupId([0x11; 16]),
        generation: Generation(2),
        epoch: Epoch(0x0a0b),
        cut_time: UnixNanos(0x0102_0304_0506_0708),
        consistency: Consistency::Filesystem,
        note: PointNote { label: Some("nightly".parse().unwrap()), ..PointNote::default() },
        written: ByteCount(0x2200),
        zeroed: ByteCount(0x600),
        volumes: volumes.into(),
    }
}

/// A layer over an image with one block of `5a`, a block of zeroes, a sector of `a5`, and a hole.
fn written(storage: &CrashStorage) -> Vec<u8> {
    let path = Path::new("/image");
    let file = storage.open(path, OpenMode::CreateNew).unwrap();
    file.set_len(0x10_0000).unwrap();
    file.write_all_at(&[0x5a; 4096], 0x1000).unwrap();
    file.write_all_at(&[0; 4096], 0x2000).unwrap();
    file.write_all_at(&[0xa5; 512], 0x3000).unwrap();
    let image = Image::open(storage, path, Place::File).unwrap();
    let mut scratch = Scratch::default();
    let mut layer = LayerWriter::create(storage, Path::new("/"), meta(), &mut scratch).unwrap();
    let mut cursor = DataCursor::default();
    layer.keep(0, 0x1000..0x3200, &image, &mut cursor, None).unwrap();
    layer.keep(0, 0x8_0000..0x8_0600, &image, &mut cursor, None).unwrap();
    layer.finish().unwrap();
    let file =
        storage.open(&Path::new("/").join(file_name(Epoch(0x0a0a), Epoch(0x0a0b))), OpenMode::Read).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Header, volume table, note and data, as far as versions 2 and 3 agree.
fn golden_until_index(version: u8, span: u8, file_bytes: u64, crcs: [[u8; 4]; 2]) -> Vec<u8> {
    let mut golden = Vec::new();
    golden.extend_from_slice(b"SEAWUNDO");
    golden.extend_from_slice(&[version, 0, 0, 0, 1, 0, 0, 0]);
    golden.extend_from_slice(&[0x11; 16]);
    golden.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0x0b, 0x0a, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
    golden.extend_from_slice(&[0, 0x22, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0, 6, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0, 0x12, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&file_bytes.to_le_bytes());
    golden.extend_from_slice(&[21, 0, 0, 0]);
    golden.extend_from_slice(&GOLDEN_NOTE_CRC);
    golden.extend_from_slice(&[span, 0, 0, 0]);
    golden.extend_from_slice(&crcs[0]);
    golden.extend_from_slice(&GOLDEN_TABLE_CRC);
    golden.extend_from_slice(&crcs[1]);
    assert_eq!(golden.len(), 128);
    golden.extend_from_slice(&[0x22; 16]);
    golden.extend_from_slice(&[0, 0, 0x10, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0, 2, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(b"sda");
    golden.resize(128 + 304, 0);
    golden.extend_from_slice(b"\0\0\0\0\0\0\0\0\x07\0nightly\0\0\0\0");
    golden.resize(4096, 0);
    golden.extend_from_slice(&[0x5a; 4096]);
    golden.extend_from_slice(&[0xa5; 512]);
    golden
}

/// Block 1: data. Block 2: zeroes. Sector 0x18: data. Sectors 0x400 to 0x403: a hole.
fn golden_entries() -> Vec<u8> {
    let mut golden = Vec::new();
    golden.extend_from_slice(&[8, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0]);
    golden.extend_from_slice(&GOLDEN_BLOCK_CRC);
    golden.extend_from_slice(&[0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0x18, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    golden.extend_from_slice(&GOLDEN_SECTOR_CRC);
    golden.extend_from_slice(&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    golden
}

/// The bytes of docs/formats/undo-layer.md. A change here breaks every layer there is.
#[test]
fn golden_bytes() {
    let mut golden = golden_until_index(3, 1, 0x2264, [GOLDEN_INDEX_CRC, GOLDEN_HEADER_CRC]);
    golden.extend_from_slice(&golden_entries());
    golden.extend_from_slice(&GOLDEN_PAGE_CRC);
    let bytes = written(&CrashStorage::new());
    if let Some(at) = golden.iter().zip(&bytes).position(|(a, b)| a != b) {
        panic!("byte {at}: {:02x?} and not {:02x?}", &bytes[at..at + 4], &golden[at..at + 4]);
    }
    assert_eq!(bytes.len(), golden.len());
}

/// What version 2 wrote is read as before: one epoch, an index with one checksum.
#[test]
fn version_2_is_read() {
    let mut bytes = golden_until_index(2, 0, 0x2260, [VERSION_2_INDEX_CRC, VERSION_2_HEADER_CRC]);
    bytes.extend_from_slice(&golden_entries());
    assert_eq!(read(&bytes).unwrap(), 0x2200 + 0x600);
    for at in (0..128 + 304 + 21).chain(4096..bytes.len()) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        assert!(matches!(read(&bytes), Err(ReplicaError::Corrupt { .. })), "byte {at}");
    }
}

const VERSION_2_INDEX_CRC: [u8; 4] = [0x9e, 0xf4, 0x41, 0x11];
const VERSION_2_HEADER_CRC: [u8; 4] = [0xe2, 0x39, 0x1b, 0x1d];
const GOLDEN_PAGE_CRC: [u8; 4] = [0xbc, 0xf9, 0x1f, 0xc5];

const GOLDEN_NOTE_CRC: [u8; 4] = [0x75, 0x78, 0xb6, 0x3b];
const GOLDEN_INDEX_CRC: [u8; 4] = [0x9e, 0xd0, 0xb3, 0x26];
const GOLDEN_TABLE_CRC: [u8; 4] = [0x3b, 0xa3, 0x56, 0x1a];
const GOLDEN_HEADER_CRC: [u8; 4] = [0xb7, 0xa8, 0x4f, 0x91];
const GOLDEN_BLOCK_CRC: [u8; 4] = [0x49, 0x8c, 0xf1, 0x37];
const GOLDEN_SECTOR_CRC: [u8; 4] = [0x7d, 0x15, 0xe5, 0x7b];

fn read(bytes: &[u8]) -> Result<u64, ReplicaError> {
    let storage = CrashStorage::new();
    let path = Path::new("/layer");
    let file = storage.open(path, OpenMode::CreateNew).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let layer = Layer::open(&storage, path)?;
    layer.check(&storage, &crate::Pace::unbounded())?;
    let mut total = 0;
    for (volume, _) in layer.header.trees() {
        for_each_run(&*file, path, layer.entries(volume, file.clone()), |entry, _| {
            total += entry.length();
            Ok(())
        })?;
    }
    Ok(total)
}

/// Every single flipped bit is found, and every cut.
#[test]
fn damage_is_refused() {
    let bytes = written(&CrashStorage::new());
    assert_eq!(read(&bytes).unwrap(), 0x2200 + 0x600);
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        let error = read(&bytes).expect_err("a flipped bit");
        assert!(matches!(error, ReplicaError::Corrupt { .. }), "byte {at}: {error}");
    }
    for length in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
        assert!(matches!(read(&bytes[..length]), Err(ReplicaError::Corrupt { .. })), "{length} bytes");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(read(&longer), Err(ReplicaError::Corrupt { .. })));
}

/// Right checksums do not make wrong content acceptable, and nothing panics or allocates for it.
#[test]
fn contradictions_under_a_right_checksum_are_refused() {
    let bytes = written(&CrashStorage::new());
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        let put =
            |bytes: &mut [u8], at: usize, crc: u32| bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        let entries = bytes.len() - 4;
        let page = crc32c::crc32c_append(crc32c::crc32c(&[0; 8]), &bytes[0x2200..entries]).to_le_bytes();
        bytes[entries..].copy_from_slice(&page);
        let level = crc32c::crc32c(&page).to_le_bytes();
        let tree = crc32c::crc32c(&level).to_le_bytes();
        put(bytes.as_mut_slice(), 116, crc32c::crc32c(&tree));
        let table = crc32c::crc32c(&bytes[128..128 + 304]);
        put(&mut bytes, 120, table);
        let note = crc32c::crc32c(&bytes[432..432 + 21]);
        put(&mut bytes, 108, note);
        let head = crc32c::crc32c(&bytes[..124]);
        put(&mut bytes, 124, head);
        match read(&bytes) {
            Err(ReplicaError::Corrupt { problem, .. }) => problem,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(&|bytes| bytes[12] = 0).contains("volume table checksum"));
    assert!(refused(&|bytes| bytes[12] = 100).contains("do not make a file"));
    assert!(refused(&|bytes| bytes[14] = 1).contains("volumes, at most"));
    assert!(refused(&|bytes| bytes[104] = 20).contains("note checksum"));
    assert!(refused(&|bytes| bytes[106] = 1).contains("note of"));
    assert!(refused(&|bytes| bytes[432 + 10] = b'\n').contains("label"));
    assert!(refused(&|bytes| bytes[72] = 9).contains("consistency 9"));
    assert!(refused(&|bytes| bytes[112] = 0).contains("leads 0 epochs back"));
    assert!(refused(&|bytes| bytes[112..116].fill(0xff)).contains("epochs back from epoch 2571"));
    assert!(refused(&|bytes| bytes[128 + 38] = 2).contains("out of order"));
    assert!(refused(&|bytes| bytes[8] = 1).contains("version 1 is not known"));
    assert!(refused(&|bytes| bytes[8] = 4).contains("version 4 is not known"));
    assert!(refused(&|bytes| bytes[80..88].fill(0xff)).contains("do not make a file"));
    assert!(refused(&|bytes| bytes[128 + 24] = 3).contains("do not add up"));
    assert!(refused(&|bytes| bytes[128 + 24..128 + 32].fill(0xff)).contains("do not add up"));
    assert!(refused(&|bytes| bytes[128 + 36..128 + 38].fill(0xff)).contains("too long"));
    assert!(refused(&|bytes| bytes[128 + 48] = 0xff).contains("UTF-8"));
    assert!(refused(&|bytes| bytes[128 + 16] = 1).contains("multiple of 512"));
    let entry = 0x2200;
    assert!(refused(&|bytes| bytes[entry..entry + 8].fill(0xff)).contains("out of range"));
    assert!(refused(&|bytes| bytes[entry + 8..entry + 16].fill(0xff)).contains("out of range"));
    assert!(refused(&|bytes| bytes[entry + 16..entry + 20].fill(0)).contains("out of range"));
    assert!(refused(&|bytes| bytes[entry + 24] = 8).contains("out of range"));
}

#[test]
fn layer_names() {
    assert_eq!(file_name(Epoch(41), Epoch(42)), "00000000000000000042.layer");
    assert_eq!(file_name(Epoch(39), Epoch(42)), "00000000000000000042-00000000000000000039.layer");
    for (back, epoch) in [(0, 1), (41, 42), (0, 42), (u64::MAX - 1, u64::MAX), (u64::MAX - 9, u64::MAX)] {
        let name = file_name(Epoch(back), Epoch(epoch));
        assert_eq!(parse_file_name(&name), Some((Epoch(back), Epoch(epoch))));
    }
    for name in [
        "",
        "42.layer",
        "00000000000000000000.layer",
        "00000000000000000042.layer.new",
        "+0000000000000000042.layer",
        "99999999999999999999.layer",
        "00000000000000000042-00000000000000000041.layer",
        "00000000000000000042-00000000000000000042.layer",
        "00000000000000000042-00000000000000000043.layer",
        "09999999999999999999-00000000000000000000.layer",
        "00000000000000000042-39.layer",
    ] {
        assert_eq!(parse_file_name(name), None, "{name}");
    }
}
