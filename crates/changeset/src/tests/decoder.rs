//! The fuzz target's work on the stable toolchain: arbitrary bytes, and valid ones that were altered.

use proptest::prelude::*;

use super::*;
use crate::fuzzing::{check, open_arbitrary, open_in_chunks, seal_texts};
use crate::volume::encode_manifest;

#[derive(Clone, Debug)]
enum Edit {
    Set(usize, u8),
    Remove(usize, usize),
    Repeat(usize, usize),
    Insert(usize, Vec<u8>),
}

fn edit() -> impl Strategy<Value = Edit> {
    let place = 0..3000_usize;
    prop_oneof![
        (place.clone(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        (place.clone(), 1..600_usize).prop_map(|(at, length)| Edit::Remove(at, length)),
        (place.clone(), 1..600_usize).prop_map(|(at, length)| Edit::Repeat(at, length)),
        (place, proptest::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    let clamp = |at: usize| at % (bytes.len() + 1);
    match edit {
        Edit::Set(at, byte) => {
            let at = clamp(*at);
            if let Some(place) = bytes.get_mut(at) {
                *place = *byte;
            }
        }
        Edit::Remove(at, length) => {
            let at = clamp(*at);
            bytes.drain(at..(at + length).min(bytes.len()));
        }
        Edit::Repeat(at, length) => {
            let at = clamp(*at);
            let part = bytes[at..(at + length).min(bytes.len())].to_vec();
            bytes.splice(at..at, part);
        }
        Edit::Insert(at, part) => {
            let at = clamp(*at);
            bytes.splice(at..at, part.iter().copied());
        }
    }
}

/// A table entry that is nearly right.
fn entry() -> impl Strategy<Value = Vec<u8>> {
    (0..3_u16, 0..4_u8, 0..620_u64, 0..40_u64, prop::bool::weighted(0.05)).prop_map(
        |(volume, kind, sector, sectors, odd)| {
            let offset = sector * 512 + u64::from(odd);
            crate::frame::TableEntry { volume, kind, offset, length: sectors * 512 }.encode().to_vec()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn arbitrary_bytes_do_no_harm(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        open_arbitrary(&data);
    }

    #[test]
    fn an_altered_changeset_is_refused(edits in proptest::collection::vec(edit(), 1..4), chunk in 1..3000_usize) {
        let original = bytes_of(&small(1));
        let mut altered = original.clone();
        for edit in &edits {
            apply(&mut altered, edit);
        }
        prop_assert_eq!(open_in_chunks(&altered, chunk, 1).is_ok(), altered == original);
    }

    #[test]
    fn authentic_nonsense_does_no_harm(
        frames in proptest::collection::vec((proptest::collection::vec(entry(), 0..6), 0..40_u32, any::<bool>()), 0..4),
    ) {
        let manifest = encode_manifest(&volumes(), &PointNote::default()).unwrap();
        let (mut extents, mut plain_bytes) = (0, 0);
        let texts: Vec<(Vec<u8>, bool)> = frames
            .iter()
            .map(|(entries, sectors, fit)| {
                // Half of the frames have as much data as their extents say.
                let said = entries.iter().filter(|entry| entry[2] == 1);
                let said: u64 = said.map(|entry| u64::from_le_bytes(entry[16..].try_into().unwrap())).sum();
                let data_bytes = if *fit { said as u32 } else { sectors * 512 };
                let mut text = (entries.len() as u32).to_le_bytes().to_vec();
                text.extend(data_bytes.to_le_bytes());
                text.extend(entries.concat());
                text.resize(text.len() + data_bytes as usize, 1);
                extents += entries.len() as u32;
                plain_bytes += u64::from(data_bytes);
                (text, false)
            })
            .collect();
        let mut all = vec![(&manifest[..], false)];
        all.extend(texts.iter().map(|(text, packed)| (&text[..], *packed)));
        let bytes = seal_texts(&header(texts.len() as u32, extents, plain_bytes), &all);
        if let Ok(changeset) = open_in_chunks(&bytes, 1000, 1) {
            check(&changeset);
        }
    }
}
