//! The bytes of a segment: a header, then records. The byte tables are in docs/formats/cache-segment.md.

use block::{Epoch, Generation, GroupId};

use crate::Position;

/// The most data one record holds, in bytes. A changeset is stored in records of exactly this much, the last shorter.
pub const CHUNK_BYTES: usize = 1 << 20;

/// A segment's header, and a record's; records start at multiples of it.
pub(crate) const HEADER_BYTES: usize = 128;
pub(crate) const SEGMENT_MAGIC: &[u8; 8] = b"SWSEGMNT";
pub(crate) const RECORD_MAGIC: &[u8; 4] = b"SWCR";
/// 1: first.
const VERSION: u16 = 1;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Flaw {
    #[error("it is too short")]
    Short,
    #[error("the magic is wrong")]
    Magic,
    #[error("version {0} is not known to this program, which knows version {VERSION}")]
    Version(u16),
    #[error("the checksum is wrong")]
    Checksum,
    #[error("{0} is out of range")]
    Range(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) number: u64,
    /// Unguessable, so that bytes a sender chose are never taken for a record of ours when a damaged place is skipped.
    pub(crate) salt: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Part of a changeset, not its end.
    Chunk = 1,
    /// The end of a changeset. When it is durable, so is all of the changeset.
    Last = 2,
    /// Only says what was durable.
    Mark = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) kind: Kind,
    pub(crate) segment: SegmentHeader,
    /// Of the record in its segment.
    pub(crate) offset: u64,
    /// All of the segment before this offset was durable when the record was written.
    pub(crate) durable: u64,
    /// Numbers the receptions of changesets, so that parts of two tries are never put together.
    pub(crate) arrival: u64,
    pub(crate) group: GroupId,
    pub(crate) position: Position,
    /// Bytes of the whole changeset.
    pub(crate) total: u64,
    /// Of the record's data in the changeset.
    pub(crate) chunk_offset: u64,
    pub(crate) length: u32,
    pub(crate) checksum: u32,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(SEGMENT_MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.salt.to_le_bytes());
        seal(bytes)
    }

    pub(crate) fn decode(bytes: &[u8], number: u64) -> Result<SegmentHeader, Flaw> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(Flaw::Short)?;
        if bytes[..8] != *SEGMENT_MAGIC {
            return Err(Flaw::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            return Err(Flaw::Version(version));
        }
        check(bytes)?;
        let header = SegmentHeader { number: word(bytes, 16), salt: word(bytes, 24) };
        if header.number == number { Ok(header) } else { Err(Flaw::Range("the segment number")) }
    }
}

impl RecordHeader {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(RECORD_MAGIC);
        bytes[4] = self.kind as u8;
        let words = [
            (8, self.segment.salt),
            (16, self.segment.number),
            (24, self.offset),
            (32, self.durable),
            (40, self.arrival),
            (64, self.position.generation.0),
            (72, self.position.epoch.0),
            (80, self.total),
            (88, self.chunk_offset),
        ];
        for (at, value) in words {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[48..64].copy_from_slice(&self.group.0);
        bytes[96..100].copy_from_slice(&self.length.to_le_bytes());
        bytes[100..104].copy_from_slice(&self.checksum.to_le_bytes());
        seal(bytes)
    }

    /// Reads the header of the record that starts at `offset` of `segment`.
    pub(crate) fn decode(bytes: &[u8], segment: SegmentHeader, offset: u64) -> Result<RecordHeader, Flaw> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(Flaw::Short)?;
        if bytes[..4] != *RECORD_MAGIC {
            return Err(Flaw::Magic);
        }
        check(bytes)?;
        let kind = match bytes[4] {
            1 => Kind::Chunk,
            2 => Kind::Last,
            3 => Kind::Mark,
            _ => return Err(Flaw::Range("the kind")),
        };
        let mut group = [0; 16];
        group.copy_from_slice(&bytes[48..64]);
        let header = RecordHeader {
            kind,
            segment: SegmentHeader { salt: word(bytes, 8), number: word(bytes, 16) },
            offset: word(bytes, 24),
            durable: word(bytes, 32),
            arrival: word(bytes, 40),
            group: GroupId(group),
            position: Position { generation: Generation(word(bytes, 64)), epoch: Epoch(word(bytes, 72)) },
            total: word(bytes, 80),
            chunk_offset: word(bytes, 88),
            length: half(bytes, 96),
            checksum: half(bytes, 100),
        };
        if header.segment != segment || header.offset != offset {
            return Err(Flaw::Range("the place"));
        }
        if header.durable > offset {
            return Err(Flaw::Range("the durable offset"));
        }
        let end =
            header.chunk_offset.checked_add(u64::from(header.length)).ok_or(Flaw::Range("the offset"))?;
        let fits = match kind {
            Kind::Chunk => end < header.total && header.length as usize == CHUNK_BYTES,
            Kind::Last => end == header.total && header.length as usize <= CHUNK_BYTES,
            Kind::Mark => end == 0 && header.total == 0,
        };
        if fits { Ok(header) } else { Err(Flaw::Range("the length")) }
    }

    /// Where the next record starts.
    pub(crate) fn end(&self) -> u64 {
        self.offset + record_bytes(self.length as usize)
    }

    pub(crate) fn payload_offset(&self) -> u64 {
        self.offset + HEADER_BYTES as u64
    }
}

/// How many bytes of a segment a record with this much data takes.
pub(crate) fn record_bytes(data: usize) -> u64 {
    (HEADER_BYTES + data).next_multiple_of(HEADER_BYTES) as u64
}

pub(crate) fn seal(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    let checksum = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn check(bytes: &[u8; HEADER_BYTES]) -> Result<(), Flaw> {
    let checksum = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    if checksum == half(bytes, HEADER_BYTES - 4) { Ok(()) } else { Err(Flaw::Checksum) }
}

fn word(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(half(bytes, at)) | u64::from(half(bytes, at + 4)) << 32
}

fn half(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEGMENT: SegmentHeader = SegmentHeader { number: 7, salt: 0x1122_3344_5566_7788 };

    fn record() -> RecordHeader {
        RecordHeader {
            kind: Kind::Last,
            segment: SEGMENT,
            offset: 0x1080,
            durable: 0x1000,
            arrival: 0x99,
            group: GroupId(*b"0123456789abcdef"),
            position: Position { generation: Generation(2), epoch: Epoch(0x0a0b) },
            total: 0x10_0005,
            chunk_offset: 0x10_0000,
            length: 5,
            checksum: 0xdead_beef,
        }
    }

    /// The tables of docs/formats/cache-segment.md, byte for byte.
    #[test]
    fn golden_bytes() {
        let mut segment =
            b"SWSEGMNT\x01\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x88\x77\x66\x55\x44\x33\x22\x11".to_vec();
        segment.resize(124, 0);
        segment.extend_from_slice(&SEGMENT_CHECKSUM.to_le_bytes());
        assert_eq!(SEGMENT.encode().as_slice(), segment);
        assert_eq!(SegmentHeader::decode(&segment, 7), Ok(SEGMENT));

        let mut bytes = b"SWCR\x02\0\0\0\x88\x77\x66\x55\x44\x33\x22\x11".to_vec();
        bytes
            .extend_from_slice(b"\x07\0\0\0\0\0\0\0\x80\x10\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\x99\0\0\0\0\0\0\0");
        bytes.extend_from_slice(b"0123456789abcdef\x02\0\0\0\0\0\0\0\x0b\x0a\0\0\0\0\0\0");
        bytes.extend_from_slice(b"\x05\0\x10\0\0\0\0\0\0\0\x10\0\0\0\0\0\x05\0\0\0\xef\xbe\xad\xde");
        bytes.resize(124, 0);
        bytes.extend_from_slice(&RECORD_CHECKSUM.to_le_bytes());
        assert_eq!(record().encode().as_slice(), bytes);
        assert_eq!(RecordHeader::decode(&bytes, SEGMENT, 0x1080), Ok(record()));
        assert_eq!(record().end(), 0x1180);
    }

    const SEGMENT_CHECKSUM: u32 = 0xa18d_4196;
    const RECORD_CHECKSUM: u32 = 0x9036_e379;

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = record().encode();
        for bit in 0..good.len() * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(RecordHeader::decode(&bytes, SEGMENT, 0x1080).is_err(), "bit {bit}");
        }
        let good = SEGMENT.encode();
        for bit in 0..good.len() * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&bytes, 7).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_record_is_only_valid_where_it_was_written() {
        let bytes = record().encode();
        let place = Err(Flaw::Range("the place"));
        assert_eq!(RecordHeader::decode(&bytes, SEGMENT, 0x1100), place);
        assert_eq!(RecordHeader::decode(&bytes, SegmentHeader { number: 8, ..SEGMENT }, 0x1080), place);
        assert_eq!(RecordHeader::decode(&bytes, SegmentHeader { salt: 1, ..SEGMENT }, 0x1080), place);
        assert_eq!(SegmentHeader::decode(&SEGMENT.encode(), 8), Err(Flaw::Range("the segment number")));
    }

    #[test]
    fn lengths_are_checked_whatever_the_checksum_says() {
        for wrong in [
            RecordHeader { length: 6, ..record() },
            RecordHeader { length: u32::MAX, total: u64::from(u32::MAX), chunk_offset: 0, ..record() },
            RecordHeader { chunk_offset: u64::MAX, total: 4, ..record() },
            RecordHeader { kind: Kind::Chunk, ..record() },
            RecordHeader { kind: Kind::Mark, ..record() },
            RecordHeader { durable: 0x1081, ..record() },
        ] {
            assert!(matches!(RecordHeader::decode(&wrong.encode(), SEGMENT, 0x1080), Err(Flaw::Range(_))));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = SegmentHeader::decode(&bytes, 1);
            let _ = RecordHeader::decode(&bytes, SEGMENT, 0);
            if bytes.len() >= HEADER_BYTES {
                bytes[..4].copy_from_slice(RECORD_MAGIC);
                let checksum = crc32c::crc32c(&bytes[..124]);
                bytes[124..128].copy_from_slice(&checksum.to_le_bytes());
                let _ = RecordHeader::decode(&bytes, SEGMENT, 0);
            }
        }
    }
}
