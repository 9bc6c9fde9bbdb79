//! The bytes of a point's note, the same in a changeset's manifest and in an undo layer: docs/formats/changeset.md.

use std::time::Duration;

use block::{FILESYSTEM_BYTES_MAX, FILESYSTEMS_MAX, LABEL_BYTES_MAX, Label, PointNote, REASON_BYTES_MAX};

use crate::bytes::{u16_at, u64_at};

/// Bytes of an encoded note at most. A reader refuses more.
pub const NOTE_BYTES_MAX: usize =
    8 + 2 + LABEL_BYTES_MAX + 2 + REASON_BYTES_MAX + 2 + FILESYSTEMS_MAX * (2 + FILESYSTEM_BYTES_MAX);
/// Bytes of a note that says nothing.
pub const NOTE_BYTES_MIN: usize = 8 + 2 + 2 + 2;

/// A note's bytes; what passes a limit is cut as [`PointNote::bounded`] says.
pub fn encode_note(note: &PointNote) -> Vec<u8> {
    let note = note.clone().bounded();
    debug_assert_eq!(note.check(), Ok(()));
    let mut bytes = Vec::with_capacity(NOTE_BYTES_MIN);
    let frozen = note.frozen.map_or(0, |frozen| frozen.as_micros() as u64);
    bytes.extend_from_slice(&frozen.to_le_bytes());
    let mut text = |text: &str| {
        bytes.extend_from_slice(&(text.len() as u16).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    };
    text(note.label.as_ref().map_or("", Label::as_str));
    text(note.reason.as_deref().unwrap_or_default());
    bytes.extend_from_slice(&(note.filesystems.len() as u16).to_le_bytes());
    for path in &note.filesystems {
        bytes.extend_from_slice(&(path.len() as u16).to_le_bytes());
        bytes.extend_from_slice(path.as_bytes());
    }
    bytes
}

/// Reads what [`encode_note`] wrote; all of `bytes`.
///
/// # Errors
/// What is wrong with them, in words.
pub fn decode_note(bytes: &[u8]) -> Result<PointNote, &'static str> {
    const SHORT: &str = "a point's note that is cut short";
    if bytes.len() > NOTE_BYTES_MAX {
        return Err("a point's note that is too long");
    }
    let (frozen, mut rest) = bytes.split_at_checked(8).ok_or(SHORT)?;
    let frozen = u64_at(frozen, 0);
    let number = |rest: &mut &[u8]| -> Result<usize, &'static str> {
        let (head, after) = rest.split_at_checked(2).ok_or(SHORT)?;
        *rest = after;
        Ok(usize::from(u16_at(head, 0)))
    };
    let text = |rest: &mut &[u8]| -> Result<String, &'static str> {
        let (text, after) = {
            let length = number(rest)?;
            rest.split_at_checked(length).ok_or(SHORT)?
        };
        *rest = after;
        String::from_utf8(text.to_vec()).map_err(|_| "a point's note that is not UTF-8")
    };
    let label = Some(text(&mut rest)?).filter(|label| !label.is_empty());
    let label = label.map(Label::try_from).transpose().map_err(|_| "a point's label that is none")?;
    let reason = Some(text(&mut rest)?).filter(|reason| !reason.is_empty());
    let (count, after) = rest.split_at_checked(2).ok_or(SHORT)?;
    rest = after;
    // Each takes two bytes at least, so the bytes bound the count before anything is allocated for it.
    let filesystems = (0..u16_at(count, 0)).map(|_| text(&mut rest)).collect::<Result<Vec<_>, _>>()?;
    if !rest.is_empty() {
        return Err("bytes behind a point's note");
    }
    let frozen = (frozen > 0).then(|| Duration::from_micros(frozen));
    let note = PointNote { label, frozen, filesystems, reason };
    note.check().map_err(|_| "a point's note that breaks a limit")?;
    Ok(note)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn note() -> impl Strategy<Value = PointNote> {
        let label =
            proptest::option::of("[^\\p{Cc}]{1,32}").prop_map(|label| label.and_then(|l| l.parse().ok()));
        let frozen = proptest::option::of(any::<u64>().prop_map(Duration::from_micros));
        let filesystems = proptest::collection::vec(".{0,300}", 0..70);
        let reason = proptest::option::of(".{0,1200}");
        (label, frozen, filesystems, reason).prop_map(|(label, frozen, filesystems, reason)| PointNote {
            label,
            frozen,
            filesystems,
            reason,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_note_survives(note in note()) {
            let bytes = encode_note(&note);
            prop_assert!(bytes.len() <= NOTE_BYTES_MAX);
            prop_assert_eq!(decode_note(&bytes).unwrap(), note.bounded());
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(note) = decode_note(&bytes) {
                prop_assert_eq!(encode_note(&note), bytes);
            }
        }

        #[test]
        fn every_cut_is_refused(note in note(), at in any::<prop::sample::Index>()) {
            let bytes = encode_note(&note);
            prop_assert!(decode_note(&bytes[..at.index(bytes.len())]).is_err());
            prop_assert!(decode_note(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    /// The bytes of docs/formats/changeset.md.
    #[test]
    fn golden_bytes() {
        let note = PointNote {
            label: Some("nightly".parse().unwrap()),
            frozen: Some(Duration::from_micros(0x0102)),
            filesystems: vec!["/".into(), "/srv".into()],
            reason: Some("hook".into()),
        };
        let mut golden = vec![2, 1, 0, 0, 0, 0, 0, 0];
        golden.extend_from_slice(b"\x07\0nightly\x04\0hook");
        golden.extend_from_slice(b"\x02\0\x01\0/\x04\0/srv");
        assert_eq!(encode_note(&note), golden);
        assert_eq!(decode_note(&golden).unwrap(), note);
        assert_eq!(encode_note(&PointNote::default()), [0; NOTE_BYTES_MIN]);
    }

    #[test]
    fn limits_are_asked_for() {
        let with = |at: usize, bytes: &[u8]| {
            let mut note = encode_note(&PointNote { reason: Some("ab".into()), ..PointNote::default() });
            note[at..at + bytes.len()].copy_from_slice(bytes);
            decode_note(&note).unwrap_err()
        };
        assert!(with(12, b"\n").contains("limit"));
        assert!(with(12, &[0xff]).contains("UTF-8"));
        assert!(with(14, &[1]).contains("cut short"));
        let many = PointNote { filesystems: vec!["/".into(); 64], ..PointNote::default() };
        let mut bytes = encode_note(&many);
        bytes[12] = 65;
        bytes.extend_from_slice(&[1, 0, b'/']);
        assert!(decode_note(&bytes).unwrap_err().contains("limit"));
        assert!(decode_note(&[0; NOTE_BYTES_MAX + 1]).unwrap_err().contains("too long"));
    }
}
