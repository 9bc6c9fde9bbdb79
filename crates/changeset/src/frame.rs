//! What sealing and opening share: the frame header, the table entry, the cipher.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::header::RoutingHeader;
use crate::key::GroupKey;
use crate::limits::{FRAME_EXTENTS_MAX, FRAME_PLAIN_BYTES, NAME_BYTES_MAX, VOLUMES_MAX};
use crate::note::NOTE_BYTES_MAX;
use crate::volume::ENTRY_BYTES as VOLUME_ENTRY_BYTES;

/// Bytes of an authentication tag.
pub(crate) const TAG_BYTES: usize = 16;
/// Bytes before a data frame's table: the number of extents, the number of data bytes.
pub(crate) const TABLE_HEAD_BYTES: usize = 8;
/// Bytes of an extent in a data frame's table.
pub(crate) const TABLE_ENTRY_BYTES: usize = 24;
/// The longest plain text of a data frame: its table and its data.
pub(crate) const DATA_FRAME_BYTES_MAX: usize =
    TABLE_HEAD_BYTES + FRAME_EXTENTS_MAX as usize * TABLE_ENTRY_BYTES + FRAME_PLAIN_BYTES.0 as usize;
/// The longest plain text of a manifest.
pub(crate) const MANIFEST_BYTES_MAX: usize =
    4 + VOLUMES_MAX * (VOLUME_ENTRY_BYTES + NAME_BYTES_MAX) + NOTE_BYTES_MAX;
/// The plain text of a trailer.
pub(crate) const TRAILER_BYTES: usize = 56;

/// What a frame holds. Part of the nonce, so that no frame can stand for one of another kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Manifest = 1,
    Data = 2,
    Trailer = 3,
}

/// How a frame's plain text is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Packing {
    Stored = 0,
    Zstd = 1,
}

/// The readable head of a frame, authenticated with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    /// Its place in the changeset, from 0.
    pub(crate) number: u32,
    pub(crate) kind: Kind,
    pub(crate) packing: Packing,
    pub(crate) plain_bytes: u32,
    /// Sealed bytes that follow, without the tag.
    pub(crate) packed_bytes: u32,
}

/// Why bytes are no frame header.
pub(crate) enum FrameHeaderError {
    Checksum,
    Field(&'static str, u64),
}

impl FrameHeader {
    pub(crate) const BYTES: usize = 20;

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.number.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[5] = self.packing as u8;
        bytes[8..12].copy_from_slice(&self.plain_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.packed_bytes.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..16]);
        bytes[16..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Result<FrameHeader, FrameHeaderError> {
        if crc32c::crc32c(&bytes[..16]) != u32_at(bytes, 16) {
            return Err(FrameHeaderError::Checksum);
        }
        let kind = match bytes[4] {
            1 => Kind::Manifest,
            2 => Kind::Data,
            3 => Kind::Trailer,
            other => return Err(FrameHeaderError::Field("kind", other.into())),
        };
        let packing = match bytes[5] {
            0 => Packing::Stored,
            1 => Packing::Zstd,
            other => return Err(FrameHeaderError::Field("packing", other.into())),
        };
        if u16_at(bytes, 6) != 0 {
            return Err(FrameHeaderError::Field("reserved bytes", u16_at(bytes, 6).into()));
        }
        let header = FrameHeader {
            number: u32_at(bytes, 0),
            kind,
            packing,
            plain_bytes: u32_at(bytes, 8),
            packed_bytes: u32_at(bytes, 12),
        };
        let (least, most) = match kind {
            Kind::Manifest => (4, MANIFEST_BYTES_MAX),
            Kind::Data => (TABLE_HEAD_BYTES, DATA_FRAME_BYTES_MAX),
            Kind::Trailer => (TRAILER_BYTES, TRAILER_BYTES),
        };
        if !(least..=most).contains(&(header.plain_bytes as usize)) {
            return Err(FrameHeaderError::Field("plain bytes", header.plain_bytes.into()));
        }
        // Only data is worth compressing, and only when it gets shorter.
        let sound = match packing {
            Packing::Stored => header.packed_bytes == header.plain_bytes,
            Packing::Zstd => kind == Kind::Data && header.packed_bytes < header.plain_bytes,
        };
        if !sound {
            return Err(FrameHeaderError::Field("packed bytes", header.packed_bytes.into()));
        }
        Ok(header)
    }
}

/// One line of a data frame's table, checked by nobody yet.
#[derive(Clone, Copy)]
pub(crate) struct TableEntry {
    pub(crate) volume: u16,
    /// 1 data, 2 zeroes.
    pub(crate) kind: u8,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl TableEntry {
    pub(crate) const DATA: u8 = 1;
    pub(crate) const ZERO: u8 = 2;

    pub(crate) fn encode(&self) -> [u8; TABLE_ENTRY_BYTES] {
        let mut bytes = [0; TABLE_ENTRY_BYTES];
        bytes[..2].copy_from_slice(&self.volume.to_le_bytes());
        bytes[2] = self.kind;
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// The entry, and whether its reserved bytes are zero.
    pub(crate) fn decode(bytes: &[u8]) -> (TableEntry, bool) {
        let entry = TableEntry {
            volume: u16_at(bytes, 0),
            kind: bytes[2],
            offset: u64_at(bytes, 8),
            length: u64_at(bytes, 16),
        };
        (entry, bytes[3..8] == [0; 5])
    }
}

/// The trailer's plain text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) frames: u32,
    pub(crate) extents: u32,
    pub(crate) plain_bytes: u64,
    /// Bytes of the changeset before the trailer's frame header.
    pub(crate) sealed_bytes: u64,
    /// BLAKE3 of the tags of all frames before it.
    pub(crate) tags: [u8; 32],
}

impl Trailer {
    pub(crate) fn encode(&self) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..4].copy_from_slice(&self.frames.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.extents.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.plain_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sealed_bytes.to_le_bytes());
        bytes[24..].copy_from_slice(&self.tags);
        bytes
    }
}

/// The cipher of one sealing.
///
/// Its key is derived from the group's key and every byte of the routing header, and the header holds 32 random bytes
/// drawn for this sealing. So an epoch that is sealed twice (the agent restarted before the first was acknowledged)
/// has two keys, and a nonce, which is only a frame's kind and number, is never used twice under one key.
pub(crate) struct Cipher {
    key: LessSafeKey,
    header: [u8; RoutingHeader::BYTES],
}

impl Cipher {
    pub(crate) fn new(key: &GroupKey, header: [u8; RoutingHeader::BYTES]) -> Cipher {
        let derived = key.derive("seawall 2026 changeset frame key", &header);
        let key =
            UnboundKey::new(&CHACHA20_POLY1305, &derived[..]).expect("the cipher takes keys of 32 bytes");
        Cipher { key: LessSafeKey::new(key), header }
    }

    /// Seals `text` in place.
    pub(crate) fn seal(&self, frame: &FrameHeader, text: &mut [u8]) -> [u8; TAG_BYTES] {
        let tag = self.key.seal_in_place_separate_tag(nonce(frame), Aad::from(self.associated(frame)), text);
        let tag = tag.expect("a frame is far below the cipher's limit of 256 GiB");
        tag.as_ref().try_into().expect("tags are 16 bytes")
    }

    /// Opens `text` in place. Nothing of it may be used when this is false.
    #[must_use]
    pub(crate) fn open(&self, frame: &FrameHeader, text: &mut [u8], tag: [u8; TAG_BYTES]) -> bool {
        let associated = Aad::from(self.associated(frame));
        self.key.open_in_place_separate_tag(nonce(frame), associated, Tag::from(tag), text, 0..).is_ok()
    }

    fn associated(&self, frame: &FrameHeader) -> [u8; RoutingHeader::BYTES + FrameHeader::BYTES] {
        let mut bytes = [0; RoutingHeader::BYTES + FrameHeader::BYTES];
        bytes[..RoutingHeader::BYTES].copy_from_slice(&self.header);
        bytes[RoutingHeader::BYTES..].copy_from_slice(&frame.encode());
        bytes
    }
}

fn nonce(frame: &FrameHeader) -> Nonce {
    let mut nonce = [0; 12];
    nonce[0] = frame.kind as u8;
    nonce[8..].copy_from_slice(&frame.number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}
