//! The bytes of version 2, as written when it was new. Version 1 was never used outside of its tests; it is refused by name.
//! docs/formats/changeset.md lays out what stands here.

use super::*;
use crate::fuzzing::{check, open_in_chunks};
use crate::{Change, Payload, RoutingHeader};

/// Version 1, without a note.
const OLD: &[u8] = include_bytes!("golden/v1-stored.changeset");
/// One volume, a note; one sector of data at 512 and zeroes behind it to 8192; stored.
const STORED: &[u8] = include_bytes!("golden/v2-stored.changeset");
/// The same with a block of text at 8192, compressed.
const ZSTD: &[u8] = include_bytes!("golden/v2-zstd.changeset");

const DATA: &str = "the last write to a block wins. ";

fn volumes() -> Vec<VolumeInfo> {
    vec![VolumeInfo {
        id: VolumeId([0x11; 16]),
        name: "sda".into(),
        size: ByteCount(65536),
        logical_block: 512,
    }]
}

fn sealed(level: Level) -> Vec<u8> {
    let mut fold = Fold::new();
    fold.zero(0, block::Extent::new(ByteOffset(0), ByteCount(8192)).unwrap());
    fold.zero(0, block::Extent::new(ByteOffset(512), ByteCount(512)).unwrap());
    fold.write(0, ByteOffset(512), DATA.repeat(16).as_bytes());
    if level != Level::Store {
        fold.write(0, ByteOffset(8192), DATA.repeat(128).as_bytes());
    }
    let choices = Choices { salt: [0x22; 32], frame_data_bytes: FRAME_PLAIN_BYTES.0 as usize };
    bytes_of(
        &seal_with(&stamp(), &note(), &volumes(), &fold, &key(), SealOptions { level, threads: 1 }, choices)
            .unwrap(),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn version_2_is_written_byte_for_byte() {
    let bytes = sealed(Level::Store);
    assert_eq!(
        hex(&bytes[..RoutingHeader::BYTES]),
        concat!(
            "53574348414e4745",
            "0200",
            "01",
            "00",
            "01000000",                         // SWCHANGE, version, consistency, reserved, frames
            "07070707070707070707070707070707", // group
            "0100000000000000",
            "0200000000000000",
            "0300000000000000", // generation, epoch, cut time
            "0002000000000000",
            "03000000",
            "00000000",                         // plain bytes, extents, reserved
            "28152a1f9fc59b187208853bf8ef9ad7", // key id
            "2222222222222222222222222222222222222222222222222222222222222222", // salt
            "00000000",
            "f01f36ef", // reserved, CRC-32C
        )
    );
    assert_eq!(
        hex(&bytes[128..148]),
        "00000000010000006e0000006e00000070a6dddb",
        "the manifest's frame header"
    );
    assert_eq!(hex(&bytes[274..294]), "01000000020000005002000050020000b5184291", "the data frame's header");
    assert_eq!(
        hex(&bytes[bytes.len() - 92..bytes.len() - 72]),
        "0200000003000000380000003800000010255ef3",
        "the trailer's frame header"
    );
    assert_eq!(hex(&bytes), hex(STORED));
}

#[test]
fn version_2_is_read() {
    for (bytes, extents) in [(STORED, 3), (ZSTD, 4)] {
        let changeset = open_in_chunks(bytes, 100, 1).unwrap();
        check(&changeset);
        assert_eq!(changeset.header.stamp, stamp());
        assert_eq!(changeset.volumes, volumes());
        assert_eq!(changeset.note, note());
        let changes: Vec<Change<'_>> = changeset.changes().collect();
        let range = |change: &Change<'_>| (change.extent.offset().0, change.extent.length().0);
        assert_eq!(
            changes.iter().map(range).collect::<Vec<_>>(),
            [(0, 512), (512, 512), (1024, 7168), (8192, 4096)][..extents]
        );
        assert_eq!([changes[0].payload, changes[2].payload], [Payload::Zero; 2]);
        assert_eq!(changes[1].payload, Payload::Data(DATA.repeat(16).as_bytes()));
        if extents == 4 {
            assert_eq!(changes[3].payload, Payload::Data(DATA.repeat(128).as_bytes()));
        }
    }
}

#[test]
fn version_1_is_refused_by_name() {
    match open_in_chunks(OLD, 100, 1) {
        Err(crate::OpenError::Header(crate::HeaderError::Version(1))) => {}
        other => panic!("{other:?}"),
    }
}
