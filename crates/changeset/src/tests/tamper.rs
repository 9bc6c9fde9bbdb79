use ::bytes::Bytes;
use block::GroupId;

use super::*;
use crate::fuzzing::open_in_chunks;
use crate::{HeaderError, OpenError, Opener, Part, RoutingHeader};

fn refusal(bytes: &[u8]) -> OpenError {
    open_in_chunks(bytes, bytes.len().max(1), 1).expect_err("an altered changeset must be refused")
}

/// The small changeset as parts: routing header, manifest, three frames, trailer.
fn parts(salt: u8) -> Vec<Vec<u8>> {
    let sealed = small(salt);
    let (head, manifest) = sealed.pieces[0].split_at(RoutingHeader::BYTES);
    let mut parts = vec![head.to_vec(), manifest.to_vec()];
    parts.extend(sealed.pieces[1..].iter().map(|piece| piece.to_vec()));
    assert_eq!(parts.len(), 6);
    parts
}

#[test]
fn every_flipped_bit_is_refused() {
    let bytes = bytes_of(&small(1));
    assert!(open_in_chunks(&bytes, 100, 1).is_ok());
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut altered = bytes.clone();
            altered[at] ^= 1 << bit;
            assert!(open_in_chunks(&altered, 999, 1).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn every_truncation_is_refused_as_one() {
    let bytes = bytes_of(&small(1));
    for length in 0..bytes.len() {
        let error = open_in_chunks(&bytes[..length], 64, 2).unwrap_err();
        assert!(error.is_retryable(), "{error}");
        assert!(error.to_string().contains(&format!("truncated after {length} bytes")), "{error}");
    }
    let error = refusal(&bytes[..bytes.len() - 1]).to_string();
    assert_eq!(error, format!("open changeset: truncated after {} bytes, in the trailer", bytes.len() - 1));
}

#[test]
fn frames_in_another_order_are_refused_as_that() {
    let parts = parts(1);
    for first in 1..parts.len() {
        for second in first + 1..parts.len() {
            let mut swapped = parts.clone();
            swapped.swap(first, second);
            let expected = first as u32 - 1;
            let found = second as u32 - 1;
            match refusal(&swapped.concat()) {
                OpenError::OutOfOrder { expected: e, found: f } => assert_eq!((e, f), (expected, found)),
                other => panic!("{other}"),
            }
        }
        let mut repeated = parts.clone();
        repeated.insert(first, parts[first].clone());
        assert!(matches!(
            refusal(&repeated.concat()),
            OpenError::OutOfOrder { .. } | OpenError::TrailingBytes(_)
        ));
        let mut dropped = parts.clone();
        dropped.remove(first);
        assert!(matches!(
            refusal(&dropped.concat()),
            OpenError::OutOfOrder { .. } | OpenError::Truncated { .. }
        ));
    }
}

#[test]
fn frames_of_another_sealing_are_refused() {
    let (parts, others) = (parts(1), parts(2));
    for (index, part) in
        [Part::Manifest, Part::Frame(1), Part::Frame(2), Part::Frame(3), Part::Trailer].iter().enumerate()
    {
        let mut spliced = parts.clone();
        spliced[index + 1] = others[index + 1].clone();
        let error = refusal(&spliced.concat());
        assert!(matches!(&error, OpenError::Forged(found) if found == part), "{error}");
    }
    // The routing header is sealed with the frames: one that is itself in order but not theirs is refused too.
    let mut header = RoutingHeader::decode(&parts[0]).unwrap();
    header.stamp.epoch = header.stamp.epoch.next();
    let mut renumbered = parts.clone();
    renumbered[0] = header.encode().to_vec();
    let error = refusal(&renumbered.concat());
    assert!(error.to_string().contains("manifest does not authenticate"), "{error}");
}

#[test]
fn bytes_after_the_trailer_are_refused() {
    let mut bytes = bytes_of(&small(1));
    bytes.push(0);
    assert!(matches!(refusal(&bytes), OpenError::TrailingBytes(1)));
}

#[test]
fn the_wrong_key_and_the_wrong_group_are_named() {
    let bytes = Bytes::from(bytes_of(&small(1)));
    let mut opener = Opener::new(GroupKey::from_bytes([8; 32]), GROUP, 1);
    assert!(matches!(opener.push(bytes.clone()), Err(OpenError::WrongKey(_))));
    // What was refused stays refused.
    assert!(matches!(opener.push(bytes.clone()), Err(OpenError::Refused)));
    assert!(matches!(opener.finish(), Err(OpenError::Refused)));
    let mut opener = Opener::new(key(), GroupId([6; 16]), 1);
    let error = opener.push(bytes).unwrap_err();
    assert!(
        error.to_string().contains(&format!("belongs to group {GROUP}, not to {}", GroupId([6; 16]))),
        "{error}"
    );
    assert!(!error.is_retryable());
}

#[test]
fn versions_and_foreign_bytes_are_named() {
    let mut bytes = bytes_of(&small(1));
    bytes[8] = 3;
    assert!(matches!(refusal(&bytes), OpenError::Header(HeaderError::Version(3))));
    bytes[0] = 0;
    assert!(matches!(refusal(&bytes), OpenError::Header(HeaderError::Magic(_))));
    let mut bytes = bytes_of(&small(1));
    bytes[50] ^= 1;
    assert!(matches!(refusal(&bytes), OpenError::Header(HeaderError::Checksum { .. })));
    let mut bytes = bytes_of(&small(1));
    bytes[RoutingHeader::BYTES + 9] ^= 1;
    assert!(matches!(refusal(&bytes), OpenError::FrameChecksum(Part::Manifest)));
}
