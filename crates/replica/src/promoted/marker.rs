//! Whether a group is promoted, and what was written here. The byte table is docs/formats/promoted.md.

use std::io;
use std::path::{Path, PathBuf};

use block::{Epoch, Generation, GroupId, UnixNanos};
use durable::{OpenMode, Storage, replace};

use crate::ReplicaError;
use crate::bytes::{get, get_u32, get_u64, put};
use crate::error::Context;

pub(crate) const FILE_NAME: &str = "promoted";
const MAGIC: [u8; 8] = *b"SEAWPROM";
/// 1: the first.
const VERSION: u32 = 1;
const FILE_BYTES: usize = 64;
const CRC: usize = FILE_BYTES - 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    /// Its volumes are written here, and nothing is taken from a source.
    pub(crate) promoted: bool,
    /// Of the history, when this was written.
    pub(crate) generation: Generation,
    /// Up to here all epochs of that generation were made here.
    pub(crate) own: Epoch,
    /// When it was promoted, by this machine's clock; 0 when it never was.
    pub(crate) since: UnixNanos,
}

pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE_NAME)
}

impl Marker {
    pub(crate) fn encode(&self, group: GroupId) -> [u8; FILE_BYTES] {
        let mut bytes = [0; FILE_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        bytes[12] = u8::from(self.promoted);
        put(&mut bytes, 16, &group.0);
        put(&mut bytes, 32, &self.generation.0.to_le_bytes());
        put(&mut bytes, 40, &self.own.0.to_le_bytes());
        put(&mut bytes, 48, &self.since.0.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..CRC]);
        put(&mut bytes, CRC, &crc.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8], group: GroupId) -> Result<Marker, String> {
        if bytes.len() != FILE_BYTES {
            return Err(format!("{} bytes, and it has {FILE_BYTES}", bytes.len()));
        }
        if bytes[..8] != MAGIC {
            return Err("it does not say whether a group is promoted (wrong magic)".to_owned());
        }
        let version = get_u32(bytes, 8);
        if version != VERSION {
            return Err(format!("version {version} is not known; this program reads version {VERSION}"));
        }
        if crc32c::crc32c(&bytes[..CRC]) != get_u32(bytes, CRC) {
            return Err("checksum does not match (damaged)".to_owned());
        }
        let found = GroupId(get(bytes, 16));
        if found != group {
            return Err(format!("it is of {found:?}; put it back where it belongs"));
        }
        let promoted = match bytes[12] {
            0 => false,
            1 => true,
            byte => return Err(format!("promoted flag {byte} means nothing")),
        };
        Ok(Marker {
            promoted,
            generation: Generation(get_u64(bytes, 32)),
            own: Epoch(get_u64(bytes, 40)),
            since: UnixNanos(get_u64(bytes, 48)),
        })
    }

    /// `None` when there is no file: it never was failed over for good, nor promoted.
    pub(crate) fn read(
        storage: &dyn Storage,
        dir: &Path,
        group: GroupId,
    ) -> Result<Option<Marker>, ReplicaError> {
        let path = path(dir);
        let file = match storage.open(&path, OpenMode::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.context("open", &path)?,
        };
        let mut bytes = [0; FILE_BYTES + 1];
        let length = super::journal::read_up_to(&*file, &mut bytes, 0).context("read", &path)?;
        Marker::decode(&bytes[..length], group)
            .map(Some)
            .map_err(|problem| ReplicaError::corrupt(&path, problem))
    }

    /// Replaces it, durably.
    pub(crate) fn write(
        &self,
        storage: &dyn Storage,
        dir: &Path,
        group: GroupId,
    ) -> Result<(), ReplicaError> {
        let path = path(dir);
        replace(storage, &path, &self.encode(group)).context("write", &path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId([0x11; 16]);

    fn marker() -> Marker {
        Marker {
            promoted: true,
            generation: Generation(2),
            own: Epoch(0x0a0b),
            since: UnixNanos(0x0102_0304),
        }
    }

    /// The bytes of docs/formats/promoted.md. A change here breaks every replica there is.
    #[test]
    fn golden_bytes() {
        let mut golden = b"SEAWPROM\x01\0\0\0\x01\0\0\0".to_vec();
        golden.extend_from_slice(&[0x11; 16]);
        golden.extend_from_slice(b"\x02\0\0\0\0\0\0\0\x0b\x0a\0\0\0\0\0\0\x04\x03\x02\x01\0\0\0\0\0\0\0\0");
        golden.extend_from_slice(&GOLDEN_CRC);
        assert_eq!(marker().encode(GROUP), *golden);
        assert_eq!(Marker::decode(&golden, GROUP), Ok(marker()));
    }

    const GOLDEN_CRC: [u8; 4] = [89, 187, 63, 230];

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let bytes = marker().encode(GROUP);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Marker::decode(&bytes, GROUP).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Marker::decode(&bytes[..length], GROUP).is_err(), "{length} bytes");
        }
        assert!(Marker::decode(&bytes, GroupId([9; 16])).unwrap_err().contains("where it belongs"));
        let mut bytes = bytes;
        bytes[12] = 2;
        let crc = crc32c::crc32c(&bytes[..CRC]);
        put(&mut bytes, CRC, &crc.to_le_bytes());
        assert!(Marker::decode(&bytes, GROUP).unwrap_err().contains("flag 2"));
    }
}
