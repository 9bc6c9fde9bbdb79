use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::fold::tests::{Oracle, read, steps};
use crate::fuzzing::{check, open_in_chunks};
use crate::{Changeset, PLAIN_BYTES_MAX, Payload, SealError};

fn content(changeset: &Changeset) -> Oracle {
    let mut found = Oracle::new();
    for change in changeset.changes() {
        let first = change.extent.offset().0 / 512;
        for sector in 0..change.extent.length().0 / 512 {
            let byte = match change.payload {
                Payload::Zero => None,
                Payload::Data(data) => Some(data[sector as usize * 512]),
            };
            assert!(found.insert((change.volume, first + sector), byte).is_none(), "disjoint");
        }
    }
    found
}

proptest! {
    #[test]
    fn what_was_folded_comes_out(
        steps in steps(),
        level in prop_oneof![Just(Level::Store), Just(Level::Fast), Just(Level::Balanced), Just(Level::Small)],
        threads in 0..4_usize,
        chunk in 1..5000_usize,
        frame_blocks in 1..20_usize,
    ) {
        let (mut fold, mut oracle) = (Fold::new(), Oracle::new());
        for step in &steps {
            step.fold(&mut fold);
            step.oracle(&mut oracle);
        }
        let options = SealOptions { level, threads };
        let choices = Choices { salt: [threads as u8; 32], frame_data_bytes: frame_blocks * 4096 };
        let sealed = seal_with(&stamp(), &note(), &volumes(), &fold, &key(), options, choices).unwrap();
        let opened = open_in_chunks(&bytes_of(&sealed), chunk, threads).unwrap();
        check(&opened);
        prop_assert_eq!(&opened.header, &sealed.header);
        prop_assert_eq!(&opened.volumes, &volumes());
        prop_assert_eq!(&opened.note, &note());
        prop_assert_eq!(read(&content(&opened)), read(&oracle));
        // Whole blocks of zeroes have no data, and zero extents never touch.
        let mut zero_bytes = 0;
        let mut zero_ends = BTreeSet::new();
        let (mut data_end, mut data_parted) = (None, 0);
        for change in opened.changes() {
            match change.payload {
                Payload::Zero => {
                    zero_bytes += change.extent.length().0;
                    prop_assert!(!zero_ends.contains(&(change.volume, change.extent.offset())));
                    zero_ends.insert((change.volume, change.extent.end()));
                }
                Payload::Data(data) => {
                    data_parted += u32::from(data_end == Some((change.volume, change.extent.offset())));
                    data_end = Some((change.volume, change.extent.end()));
                    let lead = change.extent.offset().0.next_multiple_of(4096) - change.extent.offset().0;
                    let blocks = data.get(lead as usize..).unwrap_or_default();
                    prop_assert!(blocks.chunks_exact(4096).all(|block| block.iter().any(|byte| *byte != 0)));
                }
            }
        }
        prop_assert_eq!(sealed.stats.zero_bytes.0, zero_bytes);
        prop_assert!(data_parted < sealed.header.frames.max(1), "data is parted at the ends of frames alone");
    }
}

/// Bytes that look random, the same each time.
fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

fn one_volume(size: ByteCount) -> Vec<VolumeInfo> {
    vec![VolumeInfo { id: VolumeId([1; 16]), name: "disk".into(), size, logical_block: 4096 }]
}

#[test]
fn many_frames_come_out_in_order_whatever_the_threads() {
    let mut fold = Fold::new();
    let text = b"a line of text that compresses\n".repeat(40_000);
    let random = noise(3 << 20, 1);
    fold.write(0, ByteOffset(0), &random);
    fold.write(0, ByteOffset(16 << 20), &text[..text.len() & !511]);
    let volumes = one_volume(ByteCount::mib(32));
    let mut plain = Vec::new();
    for threads in [1, 2, 5] {
        let options = SealOptions { level: Level::Fast, threads };
        let sealed = seal(&stamp(), &volumes, &fold, &key(), options).unwrap();
        assert_eq!(sealed.stats.frames_stored, 3, "random frames are stored, text is not");
        assert!(sealed.total_bytes() < ByteCount((3 << 20) + 100_000));
        let opened = open_in_chunks(&bytes_of(&sealed), 1 << 16, threads).unwrap();
        check(&opened);
        plain.push(
            opened
                .changes()
                .map(|change| (change.extent, format!("{:?}", change.payload)))
                .collect::<Vec<_>>(),
        );
    }
    assert!(plain[0] == plain[1] && plain[1] == plain[2]);
}

#[test]
fn an_empty_epoch_travels() {
    let options = SealOptions { level: Level::Fast, threads: 2 };
    let sealed = seal(&stamp(), &volumes(), &Fold::new(), &key(), options).unwrap();
    let opened = open_in_chunks(&bytes_of(&sealed), 7, 2).unwrap();
    assert_eq!(opened.changes().count(), 0);
    assert_eq!(opened.header.stamp, stamp());
}

#[test]
fn the_same_epoch_sealed_twice_shares_no_key() {
    let mut fold = Fold::new();
    fold.write(0, ByteOffset(0), &noise(65536, 2));
    let options = SealOptions { level: Level::Store, threads: 1 };
    let [first, second] =
        [0, 1].map(|_| bytes_of(&seal(&stamp(), &volumes(), &fold, &key(), options).unwrap()));
    // The same text under the same key and nonce would be the same bytes.
    let same = first.iter().zip(&second).skip(400).filter(|(a, b)| a == b).count();
    assert!(
        first.len() == second.len() && same < first.len() / 100,
        "{same} of {} bytes are the same",
        first.len()
    );
}

#[test]
fn names_of_volumes_are_secret() {
    let bytes = bytes_of(&small(1));
    assert!(!bytes.windows(3).any(|window| window == b"sda"));
}

#[test]
fn a_full_changeset_seals_and_one_more_block_is_refused() {
    let mut fold = Fold::new();
    let volumes = one_volume(ByteCount::gib(1));
    let block = noise(1 << 20, 3);
    for mib in 0..PLAIN_BYTES_MAX.0 >> 20 {
        // One sector off, so that blocks are split and frames part unevenly.
        fold.write(0, ByteOffset(((mib * 3) << 20) + 512), &block);
    }
    let options = SealOptions { level: Level::Fast, threads: 2 };
    let sealed = seal(&stamp(), &volumes, &fold, &key(), options).unwrap();
    assert!(sealed.total_bytes() <= crate::SEALED_BYTES_MAX);
    check(&open_in_chunks(&bytes_of(&sealed), 1 << 20, 2).unwrap());
    assert!(!fold.fits(ByteCount(512)));
    fold.write(0, ByteOffset(2 << 20), &block[..512]);
    assert!(matches!(seal(&stamp(), &volumes, &fold, &key(), options), Err(SealError::Data(_))));
}

#[test]
fn the_most_extents_a_fold_can_have_seal() {
    let mut fold = Fold::new();
    let size = ByteCount::gib(64);
    // Every sector of data parts a zero range and touches no other, and there are as many more zero ranges as fit.
    for index in 0..PLAIN_BYTES_MAX.0 / 512 {
        assert!(fold.fits(ByteCount(512)));
        if index % 2 == 0 {
            fold.zero(0, block::Extent::new(ByteOffset(index * 16384), ByteCount(8192)).unwrap());
        }
        fold.write(0, ByteOffset(index * 16384 + 4096), &[1; 512]);
    }
    let mut at = 32 << 30;
    while fold.fits(ByteCount::ZERO) {
        fold.zero(0, block::Extent::new(ByteOffset(at), ByteCount(512)).unwrap());
        at += 1024;
    }
    let options = SealOptions { level: Level::Fast, threads: 2 };
    let sealed = seal(&stamp(), &one_volume(size), &fold, &key(), options).unwrap();
    assert!(sealed.header.extents <= crate::EXTENTS_MAX && sealed.header.extents > 600_000);
    check(&open_in_chunks(&bytes_of(&sealed), 1 << 20, 2).unwrap());
}

#[test]
fn changes_that_fit_no_volume_are_refused() {
    let options = SealOptions { level: Level::Fast, threads: 1 };
    let seal_one = |volume: u16, sector: u64| {
        let mut fold = Fold::new();
        fold.write(volume, ByteOffset(sector * 512), &[1; 1024]);
        seal(&stamp(), &volumes(), &fold, &key(), options).map(drop)
    };
    assert!(seal_one(1, 598).is_ok());
    assert!(matches!(seal_one(2, 0), Err(SealError::VolumeIndex(2))));
    let error = seal_one(1, 599).unwrap_err().to_string();
    assert!(
        error.contains("volume 02020202020202020202020202020202 lie outside its 307200 bytes"),
        "{error}"
    );
    let none = Stamp { epoch: block::Epoch::NONE, ..stamp() };
    assert!(matches!(seal(&none, &volumes(), &Fold::new(), &key(), options), Err(SealError::EpochNone)));
}

#[test]
fn lists_of_volumes_that_describe_no_group_are_refused() {
    let mut twice = volumes();
    twice[1].id = twice[0].id;
    let mut long = volumes();
    long[0].name = "x".repeat(256);
    let mut odd = volumes();
    odd[0].size = ByteCount(1000);
    let mut strange = volumes();
    strange[0].logical_block = 520;
    let many: Vec<VolumeInfo> = (0..=256_u16)
        .map(|number| VolumeInfo {
            id: VolumeId([[0; 8], [number.to_le_bytes()[0]; 8]].concat().try_into().unwrap()),
            ..volumes()[0].clone()
        })
        .collect();
    for (volumes, why) in [
        (twice, "named twice"),
        (long, "has 256 bytes"),
        (odd, "not a multiple of 512"),
        (strange, "logical blocks of 520 bytes"),
        (many, "257 volumes"),
    ] {
        let options = SealOptions { level: Level::Fast, threads: 1 };
        let error = seal(&stamp(), &volumes, &Fold::new(), &key(), options).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn levels_step_both_ways() {
    let mut level = Level::Small;
    for expected in [Level::Balanced, Level::Fast, Level::Store, Level::Store] {
        level = level.faster();
        assert_eq!(level, expected);
    }
    for expected in [Level::Fast, Level::Balanced, Level::Small, Level::Small] {
        level = level.smaller();
        assert_eq!(level, expected);
    }
    assert_eq!(FRAME_PLAIN_BYTES.0 % 4096, 0);
}
