//! What an authentic changeset can still say wrong: a faulty sealer must not harm a replica.

use super::*;
use crate::frame::{DATA_FRAME_BYTES_MAX, TableEntry};
use crate::fuzzing::{check, open_in_chunks, seal_texts, seal_texts_as};
use crate::volume::encode_manifest;
use crate::{ExtentFault, OpenError, Part};

const DATA: u8 = TableEntry::DATA;
const ZERO: u8 = TableEntry::ZERO;

fn entry(volume: u16, kind: u8, sector: u64, sectors: u64) -> [u8; 24] {
    TableEntry { volume, kind, offset: sector * 512, length: sectors * 512 }.encode()
}

fn text(entries: &[[u8; 24]], data_bytes: usize) -> Vec<u8> {
    let mut text = (entries.len() as u32).to_le_bytes().to_vec();
    text.extend((data_bytes as u32).to_le_bytes());
    text.extend(entries.concat());
    text.resize(text.len() + data_bytes, 1);
    text
}

/// Opens frames whose announced sums fit them.
fn open(texts: &[Vec<u8>]) -> Result<crate::Changeset, OpenError> {
    let manifest = encode_manifest(&volumes(), &PointNote::default()).unwrap();
    let number = |text: &[u8], at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
    let extents = texts.iter().map(|text| number(text, 0)).sum();
    let data_bytes = texts.iter().map(|text| u64::from(number(text, 4))).sum();
    let mut all = vec![(&manifest[..], false)];
    all.extend(texts.iter().map(|text| (&text[..], false)));
    open_in_chunks(&seal_texts(&header(texts.len() as u32, extents, data_bytes), &all), 4096, 2)
}

#[test]
fn extents_in_order_are_taken() {
    let first = text(&[entry(0, DATA, 0, 2), entry(0, ZERO, 2, 100), entry(0, DATA, 599, 1)], 1536);
    let second = text(&[entry(1, ZERO, 0, 600)], 0);
    check(&open(&[first, second]).unwrap());
}

#[test]
fn faulty_extents_are_named() {
    let odd = TableEntry { volume: 0, kind: ZERO, offset: 100, length: 512 }.encode();
    let mut reserved = entry(0, ZERO, 0, 1);
    reserved[5] = 1;
    let endless = TableEntry { volume: 0, kind: ZERO, offset: 512, length: u64::MAX - 511 }.encode();
    for (entries, data, index, fault) in [
        (vec![entry(2, ZERO, 0, 1)], 0, 0, ExtentFault::Volume(2)),
        (vec![entry(0, 3, 0, 1)], 0, 0, ExtentFault::Kind(3)),
        (vec![reserved], 0, 0, ExtentFault::Reserved),
        (vec![odd], 0, 0, ExtentFault::Unaligned),
        (vec![entry(0, ZERO, 0, 0)], 0, 0, ExtentFault::Unaligned),
        (vec![entry(0, ZERO, 599, 2)], 0, 0, ExtentFault::Outside),
        (vec![endless], 0, 0, ExtentFault::Outside),
        (vec![entry(0, ZERO, 5, 2), entry(0, ZERO, 6, 2)], 0, 1, ExtentFault::Unsorted),
        (vec![entry(1, ZERO, 5, 2), entry(0, ZERO, 7, 2)], 0, 1, ExtentFault::Unsorted),
        (vec![entry(0, DATA, 0, 1), entry(0, DATA, 1, 2)], 1024, 1, ExtentFault::Data),
    ] {
        match open(&[text(&entries, data)]).unwrap_err() {
            OpenError::Extent { frame: 1, index: i, fault: f } => assert_eq!((i, f), (index, fault)),
            other => panic!("{fault}: {other}"),
        }
    }
}

#[test]
fn frames_that_overlap_are_refused() {
    for second in [entry(0, ZERO, 9, 1), entry(0, ZERO, 0, 1)] {
        let error = open(&[text(&[entry(0, ZERO, 5, 5)], 0), text(&[second], 0)]).unwrap_err();
        assert!(
            matches!(error, OpenError::Extent { frame: 2, index: 0, fault: ExtentFault::Unsorted }),
            "{error}"
        );
    }
    // A frame without extents would hide the end of the one before it.
    assert!(
        open(&[text(&[entry(0, ZERO, 5, 5)], 0), text(&[], 0), text(&[entry(0, ZERO, 0, 1)], 0)]).is_err()
    );
}

#[test]
fn sums_that_do_not_agree_are_refused() {
    let good = text(&[entry(0, DATA, 0, 1)], 512);
    let manifest = encode_manifest(&volumes(), &PointNote::default()).unwrap();
    let open_as = |frames, extents, plain| {
        open_in_chunks(
            &seal_texts(&header(frames, extents, plain), &[(&manifest, false), (&good, false)]),
            4096,
            1,
        )
    };
    assert!(open_as(1, 1, 512).is_ok());
    assert!(matches!(open_as(1, 2, 512), Err(OpenError::Trailer)));
    // The trailer counts right, the header does not; and the other way round.
    for (header, ending) in [(header(1, 2, 512), header(1, 1, 512)), (header(1, 1, 512), header(1, 2, 512))] {
        let bytes = seal_texts_as(&header, &ending, &[(&manifest, false), (&good, false)]);
        assert!(matches!(open_in_chunks(&bytes, 4096, 1), Err(OpenError::Trailer)));
    }
    assert!(matches!(
        open(&[text(&[], 0)]),
        Err(OpenError::Field { field: "the number of extents", value: 0, .. })
    ));
    assert!(matches!(open_as(1, 1, 1024), Err(OpenError::Trailer)));
    assert!(matches!(open_as(1, 1, 0), Err(OpenError::Field { field: "plain bytes", .. })));
    assert!(matches!(open_as(0, 1, 512), Err(OpenError::Field { field: "kind", .. })));
    assert!(matches!(open_as(2, 1, 512), Err(OpenError::Field { field: "kind", .. })));
    let mut more = good.clone();
    more.extend([1; 512]);
    more[4..8].copy_from_slice(&1024_u32.to_le_bytes());
    assert!(matches!(open(&[more]), Err(OpenError::Field { field: "data that no extent holds", .. })));
    let mut short = good;
    short.pop();
    assert!(matches!(open(&[short]), Err(OpenError::Field { field: "the number of extents", .. })));
}

#[test]
fn a_compressed_frame_gives_its_length_and_no_more() {
    let manifest = encode_manifest(&volumes(), &PointNote::default()).unwrap();
    // Unpacks to 16 MiB, while the frame says that it unpacks to its own length and 24.
    let bomb = zstd::bulk::compress(&vec![0; 16 << 20], 19).unwrap();
    let garbage = vec![0xa5; 400];
    // Unpacks to less than the frame says.
    let short = zstd::bulk::compress(&[0; 8], 1).unwrap();
    for packed in [bomb, garbage, short] {
        let texts = [(&manifest[..], false), (&packed[..], true)];
        let error = open_in_chunks(&seal_texts(&header(1, 100, 1 << 20), &texts), 4096, 1).unwrap_err();
        assert!(matches!(error, OpenError::Decompress { part: Part::Frame(1), .. }), "{error}");
    }
}

#[test]
fn a_frame_longer_than_a_frame_can_be_is_refused_before_it_is_read() {
    use crate::frame::{Cipher, FrameHeader, Kind, Packing};
    let manifest = encode_manifest(&volumes(), &PointNote::default()).unwrap();
    let head = header(1, 1 << 20, 128 << 20);
    let mut bytes = seal_texts(&head, &[(&manifest, false)]);
    bytes.truncate(128 + 20 + manifest.len() + 16);
    let length = DATA_FRAME_BYTES_MAX as u32 + 1;
    let frame = FrameHeader {
        number: 1,
        kind: Kind::Data,
        packing: Packing::Stored,
        plain_bytes: length,
        packed_bytes: length,
    };
    bytes.extend(frame.encode());
    let _ = Cipher::new(&key(), head.encode());
    // Only the frame's header has come, and it is refused already.
    let error = open_in_chunks(&bytes, bytes.len(), 1).unwrap_err();
    assert!(matches!(error, OpenError::Field { part: Part::Frame(1), field: "plain bytes", .. }), "{error}");
}

#[test]
fn manifests_that_describe_no_group_are_refused() {
    for manifest in [vec![255, 255, 255, 255], vec![1, 0, 0, 0], vec![0, 0, 0, 0, 0]] {
        let error =
            open_in_chunks(&seal_texts(&header(0, 0, 0), &[(&manifest, false)]), 4096, 1).unwrap_err();
        assert!(matches!(error, OpenError::Manifest(_)), "{error}");
    }
    let mut manifest = encode_manifest(&volumes(), &PointNote::default()).unwrap();
    let name_end = manifest.len() - crate::NOTE_BYTES_MIN;
    manifest[name_end - 1] = 0xff;
    assert!(
        open_in_chunks(&seal_texts(&header(0, 0, 0), &[(&manifest, false)]), 4096, 1).is_err(),
        "not UTF-8"
    );
}
