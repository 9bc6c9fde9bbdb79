//! The headers of many layers in one file, so that opening a replica need not read each layer's own. The byte table is in
//! docs/formats/catalogue.md.
//!
//! - Consistency: which layers there are is told by the directory alone; the catalogue only spares reading the headers of those that it
//!   knows. A layer's name has one content for ever, so what it knows stays true. A layer that was taken from it is compared with
//!   its file when that is first opened.
//! - Crash consistency: derived; replaced in one step, in the background, every now and then. Missing, damaged, or ahead of the
//!   state: not used.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Epoch, Generation, GroupId};
use durable::{OpenMode, Storage, replace};

use crate::ReplicaError;
use crate::bytes::{get, get_u16, get_u32, get_u64, put};
use crate::error::Context;
use crate::layer::{Header, Layer};
use crate::tree::Kind;

pub(crate) const FILE_NAME: &str = "catalogue";
const MAGIC: [u8; 8] = *b"SEAWCATA";
/// 1: the first.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
/// Of a layer, before its header.
const ROW_BYTES: usize = 8;
const CRC_BYTES: usize = 4;
/// Layers that are added or gone before the catalogue is written anew, at least; and a part of all of them, so that writing it costs
/// each layer a bounded number of times.
const CHANGES_MIN: usize = crate::limits::small_in_tests(1024, 5);
const CHANGES_PART: usize = 8;
/// A longer file is not read.
const FILE_BYTES_MAX: u64 = 1 << 32;

/// Headers by where they lead back to and their epoch.
pub(crate) type Known = HashMap<(Epoch, Epoch), Header>;

pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE_NAME)
}

/// Whether so many layers and changes since it was last written make it worth writing.
pub(crate) fn is_due(layers: usize, changes: usize) -> bool {
    changes >= CHANGES_MIN.max(layers / CHANGES_PART)
}

/// What the catalogue knows; nothing when there is none that can be used.
pub(crate) fn read(
    storage: &dyn Storage,
    dir: &Path,
    group: GroupId,
    generation: Option<Generation>,
    applied: Epoch,
) -> Result<Known, ReplicaError> {
    let path = path(dir);
    let file = match storage.open(&path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::new()),
        other => other.context("open catalogue", &path)?,
    };
    let length = file.len().context("measure catalogue", &path)?;
    let known = match length {
        length if length > FILE_BYTES_MAX => Err(format!("{length} bytes are too long")),
        length => {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, 0).context("read catalogue", &path)?;
            decode(&bytes, group, generation, applied)
        }
    };
    Ok(known.unwrap_or_else(|problem| {
        tracing::warn!(path = %path.display(), problem, "catalogue is not used, and made again");
        Known::new()
    }))
}

/// Checks the file without using it.
pub(crate) fn check(
    storage: &dyn Storage,
    dir: &Path,
    group: GroupId,
    generation: Option<Generation>,
) -> Result<(), ReplicaError> {
    let path = path(dir);
    let file = storage.open(&path, OpenMode::Read).context("open catalogue", &path)?;
    let length = file.len().context("measure catalogue", &path)?.min(FILE_BYTES_MAX);
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).context("read catalogue", &path)?;
    let known = decode(&bytes, group, generation, Epoch(u64::MAX));
    known.map(drop).map_err(|problem| ReplicaError::corrupt(&path, problem))
}

/// Replaces the catalogue.
pub(crate) fn write(
    storage: &dyn Storage,
    dir: &Path,
    group: GroupId,
    generation: Generation,
    layers: &[Arc<Layer>],
) -> Result<(), ReplicaError> {
    let path = path(dir);
    replace(storage, &path, &encode(group, generation, layers)).context("write catalogue", &path)
}

pub(crate) fn encode(group: GroupId, generation: Generation, layers: &[Arc<Layer>]) -> Vec<u8> {
    let usable = |layer: &&Arc<Layer>| layer.header.kind == Kind::Paged && layer.damage().is_none();
    let layers: Vec<&Arc<Layer>> = layers.iter().filter(usable).collect();
    let mut bytes = vec![0; HEADER_BYTES];
    put(&mut bytes, 0, &MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 16, &group.0);
    put(&mut bytes, 32, &generation.0.to_le_bytes());
    put(&mut bytes, 40, &layers.last().map_or(0, |layer| layer.epoch().0).to_le_bytes());
    put(&mut bytes, 48, &(layers.len() as u64).to_le_bytes());
    let mut table_before = Vec::new();
    for layer in layers {
        // The volume table is nearly always that of the layer before, but for the numbers of entries.
        let encoded = layer.header.encode();
        let (head, rest) = encoded.split_at(Header::HEAD_BYTES);
        let (table, note) = rest.split_at(layer.header.entries.len() * Header::ROW_BYTES);
        let plain = Header::table_without_entries(table);
        let same = plain == table_before;
        let at = bytes.len();
        bytes.resize(at + ROW_BYTES, 0);
        put(&mut bytes, at, &(layer.header.entries.len() as u16).to_le_bytes());
        put(&mut bytes, at + 2, &(note.len() as u16).to_le_bytes());
        bytes[at + 4] = u8::from(same);
        bytes.extend_from_slice(head);
        bytes.extend_from_slice(note);
        for entries in &layer.header.entries {
            bytes.extend_from_slice(&entries.to_le_bytes());
        }
        if !same {
            bytes.extend_from_slice(&plain);
            table_before = plain;
        }
    }
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

pub(crate) fn decode(
    bytes: &[u8],
    group: GroupId,
    generation: Option<Generation>,
    applied: Epoch,
) -> Result<Known, String> {
    if bytes.len() < HEADER_BYTES + CRC_BYTES {
        return Err(format!("{} bytes are too short for a catalogue", bytes.len()));
    }
    if bytes[..8] != MAGIC {
        return Err("not a catalogue (wrong magic)".to_owned());
    }
    let version = get_u32(bytes, 8);
    if version != VERSION {
        return Err(format!(
            "catalogue version {version} is not known; this program reads version {VERSION}"
        ));
    }
    let body = bytes.len() - CRC_BYTES;
    if crc32c::crc32c(&bytes[..body]) != get_u32(bytes, body) {
        return Err("checksum does not match (damaged)".to_owned());
    }
    // Of an older generation, it knows the layers from before the failover.
    if GroupId(get(bytes, 16)) != group || Some(Generation(get_u64(bytes, 32))) > generation {
        return Err("it is of another group or generation".to_owned());
    }
    if get_u64(bytes, 40) > applied.0 {
        return Err(format!("it knows epoch {}, and only {applied} is applied", get_u64(bytes, 40)));
    }
    let count = get_u64(bytes, 48);
    let mut known = Known::new();
    let mut rest = &bytes[HEADER_BYTES..body];
    let mut take = |length: usize| -> Result<&[u8], String> {
        let (taken, after) = rest.split_at_checked(length).ok_or("cut short within the layers")?;
        rest = after;
        Ok(taken)
    };
    let mut table: Vec<u8> = Vec::new();
    let mut volumes = Arc::default();
    for _ in 0..count {
        let row = take(ROW_BYTES)?;
        let (rows, note, same) = (usize::from(get_u16(row, 0)), usize::from(get_u16(row, 2)), row[4]);
        let head = get(take(Header::HEAD_BYTES)?, 0);
        let note = take(note)?;
        let entries = take(rows * 8)?;
        match same {
            0 => table = take(rows * Header::ROW_BYTES)?.to_vec(),
            1 if table.len() == rows * Header::ROW_BYTES => {}
            _ => return Err("a layer's volumes are missing".to_owned()),
        }
        let mut header = Header::of_parts(&head, &mut table, entries, note)?;
        // Layers that agree on the volumes share one table.
        match header.meta.volumes == volumes {
            true => header.meta.volumes = Arc::clone(&volumes),
            false => volumes = Arc::clone(&header.meta.volumes),
        }
        known.insert((header.back, header.meta.epoch), header);
    }
    match rest.len() {
        0 => Ok(known),
        left => Err(format!("{left} bytes follow the layers")),
    }
}

#[cfg(test)]
mod tests {
    use block::{ByteCount, Consistency, PointNote, UnixNanos, VolumeId};
    use changeset::VolumeInfo;

    use super::*;
    use crate::layer::Meta;
    use crate::tree::tree_bytes;

    const GROUP: GroupId = GroupId([0x11; 16]);
    const GENERATION: Generation = Generation(2);

    fn layer(epoch: u64, entries: u64, size: u64, label: &str) -> Arc<Layer> {
        let info = VolumeInfo {
            id: VolumeId([0x22; 16]),
            name: "sda".to_owned(),
            size: ByteCount(size),
            logical_block: 512,
        };
        let note = PointNote { label: label.parse().ok(), ..PointNote::default() };
        let mut header = Header::unreadable(GROUP, GENERATION, Epoch(epoch - 1), Epoch(epoch));
        header.meta = Meta {
            cut_time: UnixNanos(epoch * 7),
            consistency: Consistency::Crash,
            volumes: [info].into(),
            note,
            ..header.meta
        };
        header.note_bytes = changeset::encode_note(&header.meta.note).len();
        header.entries = [entries].into();
        header.file_bytes = header.index_position() + tree_bytes::<crate::layer::Entry>(entries);
        Arc::new(Layer::new(header, PathBuf::new()))
    }

    fn layers() -> Vec<Arc<Layer>> {
        vec![layer(5, 3, 1 << 20, ""), layer(6, 400, 1 << 20, "nightly"), layer(7, 0, 1 << 21, "")]
    }

    #[test]
    fn what_was_written_is_known() {
        let bytes = encode(GROUP, GENERATION, &layers());
        let known = decode(&bytes, GROUP, Some(GENERATION), Epoch(7)).unwrap();
        assert_eq!(known.len(), 3);
        for layer in layers() {
            assert_eq!(known[&(layer.back(), layer.epoch())], layer.header);
        }
        // As docs/formats/catalogue.md has it: the second layer has no table of its own.
        let (head, note) = (128, [20 - 6, 20 - 6 + 7, 20 - 6]);
        let expected = 64 + 3 * (8 + head + 8) + note.iter().sum::<usize>() + 2 * 304 + 4;
        assert_eq!(bytes.len(), expected);
        assert_eq!(&bytes[..16], b"SEAWCATA\x01\0\0\0\0\0\0\0");
        assert_eq!(&bytes[40..56], b"\x07\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0");
        assert_eq!(&bytes[64..80], [b"\x01\0\x0e\0\0\0\0\0", b"SEAWUNDO".as_slice()].concat());
    }

    #[test]
    fn what_cannot_be_used_is_not() {
        let bytes = encode(GROUP, GENERATION, &layers());
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(decode(&bytes, GROUP, Some(GENERATION), Epoch(9)).is_err(), "byte {at}");
            assert!(decode(&bytes[..at], GROUP, Some(GENERATION), Epoch(9)).is_err(), "{at} bytes");
        }
        assert!(decode(&bytes, GroupId([1; 16]), Some(GENERATION), Epoch(9)).is_err());
        assert!(decode(&bytes, GROUP, Some(Generation(1)), Epoch(9)).is_err());
        let ahead = decode(&bytes, GROUP, Some(GENERATION), Epoch(6)).unwrap_err();
        assert!(ahead.contains("knows epoch 7"), "{ahead}");
        // Right checksums do not make wrong content acceptable.
        for (at, value, says) in [
            (48, 4, "cut short"),
            (48, 2, "follow the layers"),
            (64 + 4, 1, "volumes are missing"),
            (64, 2, ""),
        ] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let body = bytes.len() - CRC_BYTES;
            let crc = crc32c::crc32c(&bytes[..body]).to_le_bytes();
            bytes[body..].copy_from_slice(&crc);
            let error = decode(&bytes, GROUP, Some(GENERATION), Epoch(9)).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
