//! The routing header: all that whoever has no key may know of a changeset.

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, UnixNanos};

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::key::KEY_ID_BYTES;
use crate::limits::{EXTENTS_MAX, FRAMES_MAX, PLAIN_BYTES_MAX};

/// The first bytes of every changeset.
pub const MAGIC: [u8; 8] = *b"SWCHANGE";
/// The version that `seal` writes and the only one there is.
///
/// History: 1, the first. 2, the manifest ends with the point's note.
pub const VERSION: u16 = 2;
/// Random bytes that make each sealing's key its own.
pub(crate) const SALT_BYTES: usize = 32;

/// What an epoch is: whose, which, and what may be said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The volumes that were cut together.
    pub group: GroupId,
    /// The history it belongs to.
    pub generation: Generation,
    /// Its number in that history; never 0.
    pub epoch: Epoch,
    /// What may be said of the volumes at its cut.
    pub consistency: Consistency,
    /// When it was cut.
    pub cut_time: UnixNanos,
}

/// The readable head of a changeset.
///
/// Readable is not trusted: without the key only its checksum is known to be right. [`crate::Opener`] proves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutingHeader {
    /// Whose epoch, which, and what may be said of it.
    pub stamp: Stamp,
    /// Frames of data that follow the manifest.
    pub frames: u32,
    /// Extents in all frames.
    pub extents: u32,
    /// Data bytes in all frames, before compression.
    pub plain_bytes: ByteCount,
    /// Names the group's key.
    pub(crate) key_id: [u8; KEY_ID_BYTES],
    /// Makes the key of this sealing its own.
    pub(crate) salt: [u8; SALT_BYTES],
}

/// Why bytes are not a routing header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Too few bytes.
    #[error("read changeset header: {0} bytes of {bytes}", bytes = RoutingHeader::BYTES)]
    Short(usize),
    /// Not a changeset.
    #[error("read changeset header: this is not a changeset (its first bytes are {0:02x?})")]
    Magic([u8; 8]),
    /// A version this program does not know.
    #[error(
        "read changeset header: version {0} is unknown, this program reads version {VERSION}; upgrade the reader"
    )]
    Version(u16),
    /// The checksum does not match.
    #[error("read changeset header: checksum {computed:08x} where {stored:08x} is stored: damaged bytes")]
    Checksum {
        /// What the header says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// A field has a value that it cannot have.
    #[error("read changeset header: {field} is {value}, which is out of range")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

impl RoutingHeader {
    /// Its length in bytes.
    pub const BYTES: usize = 128;

    /// Reads the header at the start of `bytes`.
    ///
    /// # Errors
    /// When there are too few bytes, or they are no header of a known version, damaged, or out of range.
    pub fn decode(bytes: &[u8]) -> Result<RoutingHeader, HeaderError> {
        let bytes: &[u8; Self::BYTES] = bytes.first_chunk().ok_or(HeaderError::Short(bytes.len()))?;
        if bytes[..8] != MAGIC {
            return Err(HeaderError::Magic(*bytes.first_chunk().expect("8 of 128 bytes")));
        }
        let version = u16_at(bytes, 8);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let (stored, computed) = (u32_at(bytes, 124), crc32c::crc32c(&bytes[..124]));
        if stored != computed {
            return Err(HeaderError::Checksum { stored, computed });
        }
        let field = |field, value| HeaderError::Field { field, value };
        let consistency = Consistency::from_byte(bytes[10]).ok_or(field("consistency", bytes[10].into()))?;
        for reserved in [11, 68, 69, 70, 71, 120, 121, 122, 123] {
            if bytes[reserved] != 0 {
                return Err(field("a reserved byte", bytes[reserved].into()));
            }
        }
        let in_range = |name, value: u64, least: u64, most: u64| match value {
            value if value < least || value > most => Err(field(name, value)),
            value => Ok(value),
        };
        Ok(RoutingHeader {
            stamp: Stamp {
                group: GroupId(bytes[16..32].try_into().expect("16 bytes")),
                generation: Generation(u64_at(bytes, 32)),
                epoch: Epoch(in_range("epoch", u64_at(bytes, 40), 1, u64::MAX)?),
                consistency,
                cut_time: UnixNanos(u64_at(bytes, 48)),
            },
            frames: in_range("the number of frames", u32_at(bytes, 12).into(), 0, FRAMES_MAX.into())? as u32,
            plain_bytes: ByteCount(in_range("plain bytes", u64_at(bytes, 56), 0, PLAIN_BYTES_MAX.0)?),
            extents: in_range("the number of extents", u32_at(bytes, 64).into(), 0, EXTENTS_MAX.into())?
                as u32,
            key_id: bytes[72..88].try_into().expect("16 bytes"),
            salt: bytes[88..120].try_into().expect("32 bytes"),
        })
    }

    /// Its bytes, as docs/formats/changeset.md lays them out.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = self.stamp.consistency as u8;
        bytes[12..16].copy_from_slice(&self.frames.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.stamp.group.0);
        bytes[32..40].copy_from_slice(&self.stamp.generation.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.stamp.epoch.0.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.stamp.cut_time.0.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.plain_bytes.0.to_le_bytes());
        bytes[64..68].copy_from_slice(&self.extents.to_le_bytes());
        bytes[72..88].copy_from_slice(&self.key_id);
        bytes[88..120].copy_from_slice(&self.salt);
        let checksum = crc32c::crc32c(&bytes[..124]);
        bytes[124..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }
}
