//! What the fuzzer and the decoder's property tests throw at [`Opener`]. Built for them alone.

use ::bytes::Bytes;
use block::{ByteCount, Consistency, Epoch, Generation, GroupId, UnixNanos};

use crate::frame::{
    Cipher, FrameHeader, Kind, Packing, TABLE_ENTRY_BYTES, TAG_BYTES, TRAILER_BYTES, Trailer,
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
