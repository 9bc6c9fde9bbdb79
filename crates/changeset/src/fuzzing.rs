//! What the fuzzer and the decoder's property tests throw at [`Opener`]. Built for them alone.

use ::bytes::Bytes;
use block::{ByteCount, Consistency, Epoch, Generation, GroupId, UnixNanos};

use crate::frame::{
    Cipher, FrameHeader, Kind, Packing, TABLE_ENTRY_BYTES, TAG_BYTES, TRAILER_BYTES, TableEntry, Trailer,
};
use crate::header::{RoutingHeader, Stamp};
use crate::key::GroupKey;
use crate::open::{OpenError, Opener};
use crate::{Changeset, Payload};

/// The group that everything here belongs to.
pub const GROUP: GroupId = GroupId([7; 16]);
/// The bytes of the key that everything here is sealed with.
pub const KEY: [u8; 32] = [9; 32];

/// Opens arbitrary bytes in three ways: as they are; with the checksums mended, so that what lies behind them is
/// reached; and sealed as if by a faulty sealer, so that what lies behind the cipher is reached. Panics on a fault.
pub fn open_arbitrary(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    let chunk = usize::from(way >> 2) * 8 + 1;
    let bytes = match way & 3 {
        0 => data.to_vec(),
        1 => mended(data),
        _ => sealed_by_a_faulty_sealer(data),
    };
    if let Ok(changeset) = open_in_chunks(&bytes, chunk, 1 + usize::from(way >> 7)) {
        check(&changeset);
    }
}

/// Opens `bytes` in chunks of `chunk` bytes.
///
/// # Errors
/// What [`Opener`] says.
pub fn open_in_chunks(bytes: &[u8], chunk: usize, threads: usize) -> Result<Changeset, OpenError> {
    let mut opener = Opener::new(GroupKey::from_bytes(KEY), GROUP, threads);
    for piece in bytes.chunks(chunk) {
        opener.push(Bytes::copy_from_slice(piece))?;
    }
    opener.finish()
}

/// Panics when an opened changeset breaks a promise.
pub fn check(changeset: &Changeset) {
    let mut last = (0, 0);
    let (mut extents, mut data_bytes) = (0, 0);
    for change in changeset.changes() {
        let size = changeset.volumes[usize::from(change.volume)].size;
        let (start, end) = (change.extent.offset().0, change.extent.end().0);
        assert!((change.volume, start) >= last && end <= size.0 && start % 512 == 0 && end % 512 == 0);
        if let Payload::Data(data) = change.payload {
            assert_eq!(data.len() as u64, end - start);
            data_bytes += end - start;
        }
        last = (change.volume, end);
        extents += 1;
    }
    assert_eq!((extents, ByteCount(data_bytes)), (changeset.header.extents, changeset.header.plain_bytes));
}

/// What [`open_arbitrary`] begins with: texts for a faulty sealer, and a changeset that is whole.
pub fn open_seeds() -> Vec<Vec<u8>> {
    let manifest = manifest();
    let mut table = 1_u32.to_le_bytes().to_vec();
    table.extend_from_slice(&512_u32.to_le_bytes());
    table.extend_from_slice(
        &TableEntry { volume: 0, kind: TableEntry::DATA, offset: 4096, length: 512 }.encode(),
    );
    table.extend_from_slice(&[7; 512]);
    let text = |text: &[u8]| [&(text.len() as u16).to_le_bytes()[..], text].concat();
    let texts = [text(&manifest), text(&table)].concat();
    let whole = seal_texts(&header(1, 1, 512), &[(&manifest, false), (&table, false)]);
    vec![[&[2][..], &texts].concat(), [&[0][..], &whole].concat(), [&[0xfd][..], &whole].concat()]
}

fn manifest() -> Vec<u8> {
    let volume = crate::VolumeInfo {
        id: block::VolumeId([3; 16]),
        name: "sda".to_owned(),
        size: ByteCount(1 << 20),
        logical_block: 512,
    };
    let note = block::PointNote { label: "nightly".parse().ok(), ..Default::default() };
    crate::volume::encode_manifest(&[volume], &note).expect("a sound manifest")
}

/// What is told of a point.
pub fn note(data: &[u8]) {
    if let Ok(note) = crate::decode_note(data) {
        assert_eq!(crate::decode_note(&crate::encode_note(&note)), Ok(note));
    }
}

/// What [`note`] begins with.
pub fn note_seeds() -> Vec<Vec<u8>> {
    let note = block::PointNote {
        label: "nightly".parse().ok(),
        frozen: Some(std::time::Duration::from_millis(3)),
        filesystems: vec!["/".to_owned(), "/var".to_owned()],
        reason: Some("a hook failed".to_owned()),
    };
    vec![crate::encode_note(&note), crate::encode_note(&block::PointNote::default())]
}

/// Volumes and what is told of a point, as they are sealed.
pub fn volumes(data: &[u8]) {
    if let Ok((volumes, note)) = crate::volume::decode_manifest(data) {
        let again = crate::volume::encode_manifest(&volumes, &note).expect("what was read can be written");
        assert_eq!(crate::volume::decode_manifest(&again).expect("as before"), (volumes, note));
    }
}

/// What [`volumes`] begins with.
pub fn volumes_seeds() -> Vec<Vec<u8>> {
    vec![manifest()]
}

/// Messages of a comparison: as they are, and sealed as if by a faulty sealer.
pub fn compare(data: &[u8]) {
    let Some(([way, granules], data)) = data.split_first_chunk::<2>() else { return };
    let key = GroupKey::from_bytes(KEY);
    let conversation = crate::Conversation::new(&key, GROUP, Generation(1), &[4; 16]);
    let message = match way & 1 {
        0 => data.to_vec(),
        _ => conversation.seal_arbitrary(way & 2 == 2, 5, data.to_vec()),
    };
    if let Ok(question) = conversation.open_question(5, &message) {
        assert_eq!(
            conversation.open_question(5, &conversation.seal_question(5, &question)),
            Ok(question.clone())
        );
        assert!(question.granules().count() <= crate::COMPARED_GRANULES_MAX as usize);
    }
    let granules = usize::from(*granules);
    if let Ok(answer) = conversation.open_answer(5, granules, &message) {
        let again = conversation.seal_answer(5, &answer);
        assert_eq!(conversation.open_answer(5, granules, &again), Ok(answer));
    }
}

/// What [`compare`] begins with: a question and answers, not sealed yet.
pub fn compare_seeds() -> Vec<Vec<u8>> {
    let question =
        [&9_u64.to_le_bytes()[..], &[3; 16], &256_u64.to_le_bytes(), &[0x81; 32], &[5; 16]].concat();
    vec![
        [&[3, 64][..], &question].concat(),
        vec![1, 0, 0],
        [&[1, 2, 1][..], &[7; 32]].concat(),
        vec![1, 0, 2],
        [&[1, 0, 3][..], &5_u64.to_le_bytes(), &9_u64.to_le_bytes()].concat(),
    ]
}

/// A header of the test's group and key.
pub(crate) fn header(frames: u32, extents: u32, plain_bytes: u64) -> RoutingHeader {
    RoutingHeader {
        stamp: Stamp {
            group: GROUP,
            generation: Generation(1),
            epoch: Epoch(2),
            consistency: Consistency::Crash,
            cut_time: UnixNanos(3),
        },
        frames,
        extents,
        plain_bytes: ByteCount(plain_bytes),
        key_id: GroupKey::from_bytes(KEY).id(),
        salt: [5; 32],
    }
}

/// Arbitrary bytes with what any forger without the key can get right: magic, version, key id, group, checksums.
fn mended(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    if let Some(head) = bytes.get_mut(..RoutingHeader::BYTES) {
        let good = header(1, 1, 512).encode();
        head[..12].copy_from_slice(&good[..12]);
        head[16..32].copy_from_slice(&good[16..32]);
        head[68..88].copy_from_slice(&good[68..88]);
        head[120..124].copy_from_slice(&good[120..124]);
        let checksum = crc32c::crc32c(&head[..124]);
        head[124..].copy_from_slice(&checksum.to_le_bytes());
    }
    if let Some(frame) = bytes.get_mut(RoutingHeader::BYTES..RoutingHeader::BYTES + FrameHeader::BYTES) {
        let checksum = crc32c::crc32c(&frame[..16]);
        frame[16..].copy_from_slice(&checksum.to_le_bytes());
    }
    bytes
}

/// An authentic changeset of arbitrary texts: the manifest and then data frames, each a length of two bytes (the highest
/// bit says that the text is named compressed) and that many bytes.
fn sealed_by_a_faulty_sealer(mut data: &[u8]) -> Vec<u8> {
    let mut texts = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = u16::from_le_bytes(*length);
        let (text, rest) = rest.split_at(rest.len().min(usize::from(length & 0x7fff)));
        texts.push((text, length & 0x8000 != 0));
        data = rest;
    }
    // The announced sums are made to fit, so that they are not what is refused.
    let data_texts = texts.get(1..).unwrap_or_default();
    let (mut extents, mut plain_bytes) = (0, 0);
    for (text, _) in data_texts {
        if let Some((head, _)) = text.split_first_chunk::<8>() {
            extents += u32::from_le_bytes(*head.first_chunk().expect("4 of 8 bytes")) % 4096;
            plain_bytes += u64::from(u32::from_le_bytes(*head.last_chunk().expect("4 of 8 bytes")) % 65536);
        }
    }
    seal_texts(&header(data_texts.len() as u32, extents, plain_bytes), &texts)
}

/// Seals texts as they are, manifest first, with a trailer that agrees with the header.
pub(crate) fn seal_texts(header: &RoutingHeader, texts: &[(&[u8], bool)]) -> Vec<u8> {
    seal_texts_as(header, header, texts)
}

/// Seals texts as they are, manifest first, with a trailer that agrees with another header.
pub(crate) fn seal_texts_as(
    header: &RoutingHeader,
    ending: &RoutingHeader,
    texts: &[(&[u8], bool)],
) -> Vec<u8> {
    let cipher = Cipher::new(&GroupKey::from_bytes(KEY), header.encode());
    let mut bytes = header.encode().to_vec();
    let mut tags = blake3::Hasher::new();
    for ((text, compressed), number) in texts.iter().zip(0..) {
        let plain_bytes = text.len() as u32;
        let mut frame = FrameHeader {
            number,
            kind: if number == 0 { Kind::Manifest } else { Kind::Data },
            packing: Packing::Stored,
            plain_bytes,
            packed_bytes: plain_bytes,
        };
        if *compressed {
            // Whatever the text is, zstd or not, the frame says that it unpacks to a little more.
            frame.packing = Packing::Zstd;
            frame.plain_bytes += TABLE_ENTRY_BYTES as u32;
        }
        tags.update(&seal_frame(&mut bytes, &cipher, &frame, text));
    }
    let trailer = Trailer {
        frames: ending.frames,
        extents: ending.extents,
        plain_bytes: ending.plain_bytes.0,
        sealed_bytes: bytes.len() as u64,
        tags: *tags.finalize().as_bytes(),
    };
    let frame = FrameHeader {
        number: texts.len() as u32,
        kind: Kind::Trailer,
        packing: Packing::Stored,
        plain_bytes: TRAILER_BYTES as u32,
        packed_bytes: TRAILER_BYTES as u32,
    };
    seal_frame(&mut bytes, &cipher, &frame, &trailer.encode());
    bytes
}

pub(crate) fn seal_frame(
    bytes: &mut Vec<u8>,
    cipher: &Cipher,
    frame: &FrameHeader,
    text: &[u8],
) -> [u8; TAG_BYTES] {
    bytes.extend_from_slice(&frame.encode());
    let at = bytes.len();
    bytes.extend_from_slice(text);
    let tag = cipher.seal(frame, &mut bytes[at..]);
    bytes.extend_from_slice(&tag);
    tag
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mount point with a blank at its end was written without it.
    #[test]
    fn what_broke_once_does_not_again() {
        note(include_bytes!("../../../fuzz/regressions/changeset-note/blank-at-the-end"));
    }

    /// The seeds are what they are meant to be, so that the fuzzer begins behind the first checks.
    #[test]
    fn seeds_are_read() {
        let whole = &open_seeds()[1][1..];
        assert_eq!(open_in_chunks(whole, 100, 1).unwrap().header.extents, 1);
        let texts = sealed_by_a_faulty_sealer(&open_seeds()[0][1..]);
        assert_eq!(open_in_chunks(&texts, 100, 1).unwrap().header.extents, 1);
        open_seeds().iter().for_each(|seed| open_arbitrary(seed));
        assert!(note_seeds().iter().all(|seed| crate::decode_note(seed).is_ok()));
        assert!(crate::volume::decode_manifest(&volumes_seeds()[0]).is_ok());
        let conversation =
            crate::Conversation::new(&GroupKey::from_bytes(KEY), GROUP, Generation(1), &[4; 16]);
        for (seed, number) in compare_seeds().iter().zip(0..) {
            compare(seed);
            let sealed = conversation.seal_arbitrary(number == 0, 5, seed[2..].to_vec());
            match number {
                0 => assert!(conversation.open_question(5, &sealed).is_ok()),
                _ => assert!(conversation.open_answer(5, seed[1].into(), &sealed).is_ok(), "{number}"),
            }
        }
    }
}
