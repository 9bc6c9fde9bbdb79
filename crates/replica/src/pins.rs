//! Points that do not go, whatever retention says. The byte table is docs/formats/pins.md.
//!
//! - Consistency: a pin names a point that was there when it was set; while it is there the point does not go, neither by retention
//!   nor by command, until the pin is taken away or has expired.
//! - Crash consistency: the file is replaced in one step. A pin counts from when it is in memory, so that thinning sees it at
//!   once, and is acknowledged when it is durable.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use block::{Epoch, GroupId, Label, UnixNanos};
use durable::{OpenMode, Storage, replace};

use crate::bytes::{get, get_u16, get_u32, get_u64, put};
use crate::error::Context;
use crate::{PINS_MAX, ReplicaError};

pub(crate) const FILE_NAME: &str = "pins";
const MAGIC: [u8; 8] = *b"SEAWPINS";
/// 1: the first.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
/// Of a pin, before its label.
const PIN_BYTES: usize = 32;
const CRC_BYTES: usize = 4;
const FILE_BYTES_MAX: usize = HEADER_BYTES + PINS_MAX * (PIN_BYTES + block::LABEL_BYTES_MAX) + CRC_BYTES;

/// Why and how long a point is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// What a person calls it.
    pub label: Option<Label>,
    /// When it was set, by this machine's clock.
    pub pinned: UnixNanos,
    /// When it ends, by this machine's clock; `None`: never.
    pub expires: Option<UnixNanos>,
}

impl Pin {
    pub(crate) fn is_expired(&self, now: UnixNanos) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE_NAME)
}

/// The pins of a group; none when there is no file.
pub(crate) fn read(
    storage: &dyn Storage,
    dir: &Path,
    group: GroupId,
) -> Result<BTreeMap<Epoch, Pin>, ReplicaError> {
    let path = path(dir);
    let file = match storage.open(&path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        other => other.context("open pins", &path)?,
    };
    let length = file.len().context("measure pins", &path)?;
    if length > FILE_BYTES_MAX as u64 {
        return Err(ReplicaError::corrupt(&path, format!("{length} bytes are too long for pins")));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).context("read pins", &path)?;
    decode(&bytes, group).map_err(|problem| ReplicaError::corrupt(&path, problem))
}

/// Replaces the pins of a group, durably.
pub(crate) fn write(
    storage: &dyn Storage,
    dir: &Path,
    group: GroupId,
    pins: &BTreeMap<Epoch, Pin>,
) -> Result<(), ReplicaError> {
    let path = path(dir);
    replace(storage, &path, &encode(group, pins)).context("write pins", &path)
}

pub(crate) fn encode(group: GroupId, pins: &BTreeMap<Epoch, Pin>) -> Vec<u8> {
    assert!(pins.len() <= PINS_MAX, "limited when they are set");
    let mut bytes = vec![0; HEADER_BYTES];
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 12, &(pins.len() as u32).to_le_bytes());
    put(&mut bytes, 16, &group.0);
    for (epoch, pin) in pins {
        let label = pin.label.as_ref().map_or("", Label::as_str);
        let at = bytes.len();
        bytes.resize(at + PIN_BYTES, 0);
        put(&mut bytes, at, &epoch.0.to_le_bytes());
        put(&mut bytes, at + 8, &pin.pinned.0.to_le_bytes());
        put(&mut bytes, at + 16, &pin.expires.map_or(0, |expires| expires.0).to_le_bytes());
        put(&mut bytes, at + 24, &(label.len() as u16).to_le_bytes());
        bytes.extend_from_slice(label.as_bytes());
    }
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

pub(crate) fn decode(bytes: &[u8], group: GroupId) -> Result<BTreeMap<Epoch, Pin>, String> {
    if bytes.len() < HEADER_BYTES + CRC_BYTES {
        return Err(format!("{} bytes are too short for pins", bytes.len()));
    }
    if bytes[..8] != MAGIC {
        return Err("not pins (wrong magic)".to_owned());
    }
    let version = get_u32(bytes, 8);
    if version != VERSION {
        return Err(format!("pins version {version} is not known; this program reads version {VERSION}"));
    }
    let body = bytes.len() - CRC_BYTES;
    if crc32c::crc32c(&bytes[..body]) != get_u32(bytes, body) {
        return Err("checksum does not match (damaged)".to_owned());
    }
    let found = GroupId(get(bytes, 16));
    if found != group {
        return Err(format!("they are of {found:?}; put them back where they belong"));
    }
    let count = get_u32(bytes, 12);
    if count as usize > PINS_MAX {
        return Err(format!("{count} pins, at most {PINS_MAX} are possible"));
    }
    let mut rest = &bytes[HEADER_BYTES..body];
    let mut pins = BTreeMap::new();
    for _ in 0..count {
        let short = || "cut short within the pins".to_owned();
        let (pin, after) = rest.split_at_checked(PIN_BYTES).ok_or_else(short)?;
        let (label, after) = after.split_at_checked(get_u16(pin, 24).into()).ok_or_else(short)?;
        let label = std::str::from_utf8(label).map_err(|_| "a pin's label is not UTF-8".to_owned())?;
        let label = match label {
            "" => None,
            label => Some(label.parse().map_err(|error| format!("a pin's label: {error}"))?),
        };
        let (epoch, expires) = (Epoch(get_u64(pin, 0)), get_u64(pin, 16));
        let expires = (expires != 0).then_some(UnixNanos(expires));
        if pins.last_key_value().is_some_and(|(last, _)| *last >= epoch) {
            return Err("its pins are out of order".to_owned());
        }
        pins.insert(epoch, Pin { label, pinned: UnixNanos(get_u64(pin, 8)), expires });
        rest = after;
    }
    match rest.len() {
        0 => Ok(pins),
        left => Err(format!("{left} bytes follow the pins")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId([0x11; 16]);

    fn pins() -> BTreeMap<Epoch, Pin> {
        let nightly = Pin {
            label: Some("audit".parse().unwrap()),
            pinned: UnixNanos(0x0102_0304_0506_0708),
            expires: Some(UnixNanos(9)),
        };
        let other = Pin { label: None, pinned: UnixNanos(1), expires: None };
        [(Epoch(0x0a0b), nightly), (Epoch(0x0a0c), other)].into()
    }

    /// The bytes of docs/formats/pins.md. A change here breaks every replica there is.
    #[test]
    fn golden_bytes() {
        let mut golden = b"SEAWPINS\x01\0\0\0\x02\0\0\0".to_vec();
        golden.extend_from_slice(&[0x11; 16]);
        golden.extend_from_slice(b"\x0b\x0a\0\0\0\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
        golden.extend_from_slice(b"\x09\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0audit");
        golden.extend_from_slice(b"\x0c\x0a\0\0\0\0\0\0\x01\0\0\0\0\0\0\0");
        golden.extend_from_slice(&[0; 16]);
        golden.extend_from_slice(&GOLDEN_CRC);
        assert_eq!(encode(GROUP, &pins()), golden);
        assert_eq!(decode(&golden, GROUP).unwrap(), pins());
    }

    const GOLDEN_CRC: [u8; 4] = [128, 95, 106, 66];

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let bytes = encode(GROUP, &pins());
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, GROUP).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length], GROUP).is_err(), "{length} bytes");
        }
        assert!(decode(&bytes, GroupId([9; 16])).unwrap_err().contains("where they belong"));
    }

    #[test]
    fn contradictions_are_refused_although_the_checksum_is_right() {
        let with = |at: usize, value: u8| {
            let mut bytes = encode(GROUP, &pins());
            bytes[at] = value;
            let body = bytes.len() - CRC_BYTES;
            let crc = crc32c::crc32c(&bytes[..body]);
            put(&mut bytes, body, &crc.to_le_bytes());
            decode(&bytes, GROUP).unwrap_err()
        };
        assert!(with(8, 2).contains("version 2"));
        assert!(with(12, 3).contains("cut short"));
        assert!(with(13, 5).contains("at most 1024"));
        assert!(with(12, 1).contains("follow the pins"));
        assert!(with(HEADER_BYTES + 24, 255).contains("cut short"));
        assert!(with(HEADER_BYTES + PIN_BYTES, 0xff).contains("UTF-8"));
        assert!(with(HEADER_BYTES + PIN_BYTES, b'\n').contains("label"));
        assert!(with(HEADER_BYTES + PIN_BYTES + 5, 1).contains("out of order"));
    }
}
