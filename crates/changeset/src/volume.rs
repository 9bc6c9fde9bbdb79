use std::fmt;

use block::{ByteCount, GroupId, PointNote, SECTOR_BYTES, VolumeId};

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::limits::{NAME_BYTES_MAX, VOLUMES_MAX};
use crate::note::{decode_note, encode_note};

/// The largest logical block size of a volume, in bytes.
pub const LOGICAL_BLOCK_BYTES_MAX: u32 = 65536;
/// Fixed bytes of a volume in the manifest; its name follows.
pub(crate) const ENTRY_BYTES: usize = 30;

/// One volume of a group, as its changesets describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its identity.
    pub id: VolumeId,
    /// What people call it; at most [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Its size at the cut; a multiple of 512.
    pub size: ByteCount,
    /// Its logical block size in bytes: a power of two from 512 to [`LOGICAL_BLOCK_BYTES_MAX`].
    pub logical_block: u32,
}

/// A volume's identity: of its group and name, so that it stays when the device is renamed.
pub fn volume_id(group: GroupId, name: &str) -> VolumeId {
    let mut hasher = blake3::Hasher::new_derive_key("seawall 2026 volume id");
    hasher.update(&group.0).update(name.as_bytes());
    VolumeId(hasher.finalize().as_bytes()[..16].try_into().expect("16 of 32 bytes"))
}

/// Why a list of volumes cannot describe a group, or a manifest is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumesError {
    /// More than [`VOLUMES_MAX`].
    TooMany(usize),
    /// A name longer than [`NAME_BYTES_MAX`] bytes.
    Name(VolumeId, usize),
    /// A size that is not whole sectors.
    Size(VolumeId, ByteCount),
    /// A logical block size that no disk has.
    LogicalBlock(VolumeId, u32),
    /// The same volume twice.
    Twice(VolumeId),
    /// Bytes that are no list of volumes.
    Bytes,
    /// What follows the volumes is no note.
    Note(&'static str),
}

impl fmt::Display for VolumesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany(count) => write!(f, "{count} volumes, a group has at most {VOLUMES_MAX}"),
            Self::Name(id, length) => {
                write!(f, "the name of volume {id} has {length} bytes, at most {NAME_BYTES_MAX} are allowed")
            }
            Self::Size(id, size) => {
                write!(f, "the size of volume {id}, {} bytes, is not a multiple of {SECTOR_BYTES}", size.0)
            }
            Self::LogicalBlock(id, bytes) => {
                write!(f, "volume {id} cannot have logical blocks of {bytes} bytes")
            }
            Self::Twice(id) => write!(f, "volume {id} is named twice"),
            Self::Bytes => f.write_str("its bytes are no list of volumes"),
            Self::Note(fault) => write!(f, "it has {fault}"),
        }
    }
}

impl std::error::Error for VolumesError {}

/// Checks the rules that sealing keeps and opening asks for.
fn check(volumes: &[VolumeInfo]) -> Result<(), VolumesError> {
    if volumes.len() > VOLUMES_MAX {
        return Err(VolumesError::TooMany(volumes.len()));
    }
    for (index, volume) in volumes.iter().enumerate() {
        if volume.name.len() > NAME_BYTES_MAX {
            return Err(VolumesError::Name(volume.id, volume.name.len()));
        }
        if !volume.size.0.is_multiple_of(SECTOR_BYTES) {
            return Err(VolumesError::Size(volume.id, volume.size));
        }
        let block = volume.logical_block;
        if !block.is_power_of_two() || u64::from(block) < SECTOR_BYTES || block > LOGICAL_BLOCK_BYTES_MAX {
            return Err(VolumesError::LogicalBlock(volume.id, block));
        }
        if volumes[..index].iter().any(|other| other.id == volume.id) {
            return Err(VolumesError::Twice(volume.id));
        }
    }
    Ok(())
}

/// The manifest's plain bytes.
pub(crate) fn encode_manifest(volumes: &[VolumeInfo], note: &PointNote) -> Result<Vec<u8>, VolumesError> {
    check(volumes)?;
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(volumes.len() as u32).to_le_bytes());
    for volume in volumes {
        bytes.extend_from_slice(&volume.id.0);
        bytes.extend_from_slice(&volume.size.0.to_le_bytes());
        bytes.extend_from_slice(&volume.logical_block.to_le_bytes());
        bytes.extend_from_slice(&(volume.name.len() as u16).to_le_bytes());
        bytes.extend_from_slice(volume.name.as_bytes());
    }
    bytes.extend_from_slice(&encode_note(note));
    Ok(bytes)
}

/// Reads what [`encode_manifest`] wrote.
pub(crate) fn decode_manifest(bytes: &[u8]) -> Result<(Vec<VolumeInfo>, PointNote), VolumesError> {
    let (count, mut rest) = bytes.split_at_checked(4).ok_or(VolumesError::Bytes)?;
    let count = u32_at(count, 0) as usize;
    if count > VOLUMES_MAX {
        return Err(VolumesError::TooMany(count));
    }
    let mut volumes = Vec::with_capacity(count);
    for _ in 0..count {
        let (entry, after) = rest.split_at_checked(ENTRY_BYTES).ok_or(VolumesError::Bytes)?;
        let (name, after) = after.split_at_checked(u16_at(entry, 28).into()).ok_or(VolumesError::Bytes)?;
        volumes.push(VolumeInfo {
            id: VolumeId(entry[..16].try_into().expect("16 bytes")),
            name: std::str::from_utf8(name).map_err(|_| VolumesError::Bytes)?.to_owned(),
            size: ByteCount(u64_at(entry, 16)),
            logical_block: u32_at(entry, 24),
        });
        rest = after;
    }
    check(&volumes)?;
    let note = decode_note(rest).map_err(VolumesError::Note)?;
    Ok((volumes, note))
}
