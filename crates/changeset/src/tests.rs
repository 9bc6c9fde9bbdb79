//! Tests that need more than one room.

mod authentic;
mod decoder;
mod golden;
mod round_trip;
mod tamper;

use std::time::Duration;

use block::{ByteCount, ByteOffset, PointNote, SECTOR_BYTES, VolumeId};

use crate::fuzzing::{GROUP, KEY, header};
use crate::seal::{Choices, seal_with};
use crate::{FRAME_PLAIN_BYTES, Fold, GroupKey, Level, SealOptions, Sealed, Stamp, VolumeInfo, seal};

fn stamp() -> Stamp {
    header(0, 0, 0).stamp
}

/// Every field of it says something.
fn note() -> PointNote {
    PointNote {
        label: Some("before the upgrade".parse().unwrap()),
        frozen: Some(Duration::from_micros(0x1234)),
        filesystems: vec!["/".into(), "/srv/Grüße".into()],
        reason: Some("hook 50-x: exit status 1".into()),
    }
}

fn key() -> GroupKey {
    GroupKey::from_bytes(KEY)
}

/// Two volumes of 600 sectors.
fn volumes() -> Vec<VolumeInfo> {
    let volume = |number: u8, name: &str| VolumeInfo {
        id: VolumeId([number; 16]),
        name: name.to_owned(),
        size: ByteCount(600 * SECTOR_BYTES),
        logical_block: 512,
    };
    vec![volume(1, "sda"), volume(2, "Grüße")]
}

fn bytes_of(sealed: &Sealed) -> Vec<u8> {
    sealed.pieces.concat()
}

/// Three frames of one sector each and a zero extent, about 2 KiB sealed: one stored, two compressed.
fn small(salt: u8) -> Sealed {
    let mut fold = Fold::new();
    fold.write(0, ByteOffset(512), &[1; 512]);
    let noise: Vec<u8> = blake3::hash(b"noise")
        .as_bytes()
        .iter()
        .cycle()
        .take(512)
        .enumerate()
        .map(|(i, byte)| byte.wrapping_mul(i as u8 | 1) ^ (i / 7) as u8)
        .collect();
    fold.write(0, ByteOffset(8192), &noise);
    fold.write(1, ByteOffset(512 * 599), &[3; 512]);
    fold.zero(1, block::Extent::new(ByteOffset(0), ByteCount(65536)).unwrap());
    let options = SealOptions { level: Level::Fast, threads: 1 };
    let choices = Choices { salt: [salt; 32], frame_data_bytes: 512 };
    seal_with(&stamp(), &note(), &volumes(), &fold, &key(), options, choices).unwrap()
}
