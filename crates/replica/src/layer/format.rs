//! A layer's header and volume table, byte by byte.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use block::{
    ByteCount, Consistency, Epoch, Generation, GroupId, PointNote, SECTOR_BYTES, UnixNanos, VolumeId,
};
use changeset::{NAME_BYTES_MAX, NOTE_BYTES_MAX, VOLUMES_MAX, VolumeInfo, decode_note, encode_note};
use durable::StorageFile;

use super::entry::Entry;
use crate::ReplicaError;
use crate::bytes::{get, get_u16, get_u32, get_u64, put};
use crate::error::Context;
use crate::tree::{Kind, Limits, Record, Shape, tree_bytes};

const MAGIC: [u8; 8] = *b"SEAWUNDO";
/// 1: the first, never released. 2: the point's note follows the volume table. 3: how many epochs it leads back over, volumes
/// that are there for their old content only, and an index in checksummed pages.
const VERSION: u32 = 3;
/// The oldest that is still read.
const VERSION_MIN: u32 = 2;
pub(crate) const HEADER_BYTES: usize = 128;
const VOLUME_BYTES: usize = 304;
const ENTRIES_AT: usize = 24;
const GONE_AT: usize = 38;
const NAME_AT: usize = 48;
const _: () = assert!(NAME_AT + NAME_BYTES_MAX <= VOLUME_BYTES);
/// Data begins at a multiple of this.
const DATA_ALIGNMENT: u64 = 4096;
const FILE_SUFFIX: &str = ".layer";
pub(crate) const EPOCH_DIGITS: usize = 20;
/// The most epochs that one layer leads back over. Thinning merges no more into one.
pub(crate) const EPOCHS_MAX: u64 = u32::MAX as u64;

/// What an epoch is: all that a list of recovery points shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
    pub(crate) epoch: Epoch,
    pub(crate) cut_time: UnixNanos,
    pub(crate) consistency: Consistency,
    /// What more is told of it.
    pub(crate) note: PointNote,
    /// Data bytes that the epoch wrote.
    pub(crate) written: ByteCount,
    /// Bytes that the epoch made read as zeroes.
    pub(crate) zeroed: ByteCount,
    /// The group's volumes at the epoch's cut, shared between layers that agree.
    pub(crate) volumes: Arc<[VolumeInfo]>,
}

/// A layer's header, volume table and note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) meta: Meta,
    /// The epoch whose state it leads back to.
    pub(crate) back: Epoch,
    /// Volumes that had left the group at the cut, and whose old content an older point needs.
    pub(crate) gone: Box<[VolumeInfo]>,
    /// Index entries of each volume, in the order of the table: those at the cut, then those gone.
    pub(crate) entries: Box<[u64]>,
    pub(crate) data_bytes: u64,
    pub(crate) index_crc: u32,
    pub(crate) file_bytes: u64,
    /// Length of the encoded note.
    pub(crate) note_bytes: usize,
    pub(crate) kind: Kind,
}

/// The end of the header, the volume table and the note.
pub(crate) fn head_bytes(volumes: usize, note_bytes: usize) -> u64 {
    (HEADER_BYTES + volumes * VOLUME_BYTES + note_bytes) as u64
}

/// Where a layer's data begins: after the header, the volume table and the note.
pub(crate) fn data_position(volumes: usize, note_bytes: usize) -> u64 {
    head_bytes(volumes, note_bytes).next_multiple_of(DATA_ALIGNMENT)
}

impl Header {
    pub(crate) fn data_position(&self) -> u64 {
        data_position(self.entries.len(), self.note_bytes)
    }

    pub(crate) fn index_position(&self) -> u64 {
        self.data_position() + self.data_bytes
    }

    pub(crate) fn entries_total(&self) -> u64 {
        self.entries.iter().sum()
    }

    /// The rows of the table: those at the cut, then those gone.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &VolumeInfo> {
        self.meta.volumes.iter().chain(&self.gone)
    }

    /// The index of each volume, in the order of the table.
    pub(crate) fn trees(&self) -> impl Iterator<Item = (VolumeId, Shape)> {
        let mut base = self.index_position();
        self.rows().zip(&self.entries).map(move |(info, records)| {
            let limits = Limits {
                sectors: info.size.0 / SECTOR_BYTES,
                values: self.data_position()..self.index_position(),
            };
            let shape = Shape { base, records: *records, kind: self.kind, limits };
            base += shape.bytes::<Entry>();
            (info.id, shape)
        })
    }

    /// The index of a volume; `None` when the layer has nothing of it.
    pub(crate) fn tree(&self, volume: VolumeId) -> Option<Shape> {
        self.trees().find(|(id, shape)| *id == volume && shape.records > 0).map(|(_, shape)| shape)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let note = encode_note(&self.meta.note);
        assert_eq!(note.len(), self.note_bytes, "the place of the data follows from the note's length");
        assert_eq!(self.kind, Kind::Paged, "only the newest version is written");
        let count = self.meta.volumes.len() + self.gone.len();
        let mut bytes = vec![0; HEADER_BYTES + count * VOLUME_BYTES];
        let (head, table) = bytes.split_at_mut(HEADER_BYTES);
        let rows = table.chunks_exact_mut(VOLUME_BYTES).zip(self.rows()).zip(&self.entries);
        for (number, ((row, info), entries)) in rows.enumerate() {
            put(row, 0, &info.id.0);
            put(row, 16, &info.size.0.to_le_bytes());
            put(row, 24, &entries.to_le_bytes());
            put(row, 32, &info.logical_block.to_le_bytes());
            put(row, 36, &(info.name.len() as u16).to_le_bytes());
            row[GONE_AT] = u8::from(number >= self.meta.volumes.len());
            put(row, NAME_AT, info.name.as_bytes());
        }
        let span = self.meta.epoch.0 - self.back.0;
        assert!((1..=EPOCHS_MAX).contains(&span), "a layer leads back over at least one epoch");
        put(head, 0, &MAGIC);
        put(head, 8, &VERSION.to_le_bytes());
        put(head, 12, &(count as u32).to_le_bytes());
        put(head, 16, &self.meta.group.0);
        put(head, 32, &self.meta.generation.0.to_le_bytes());
        put(head, 40, &self.meta.epoch.0.to_le_bytes());
        put(head, 48, &self.meta.cut_time.0.to_le_bytes());
        put(head, 56, &self.meta.written.0.to_le_bytes());
        put(head, 64, &self.meta.zeroed.0.to_le_bytes());
        head[72] = self.meta.consistency as u8;
        put(head, 80, &self.entries_total().to_le_bytes());
        put(head, 88, &self.data_bytes.to_le_bytes());
        put(head, 96, &self.file_bytes.to_le_bytes());
        put(head, 104, &(note.len() as u32).to_le_bytes());
        put(head, 108, &crc32c::crc32c(&note).to_le_bytes());
        put(head, 112, &(span as u32).to_le_bytes());
        put(head, 116, &self.index_crc.to_le_bytes());
        put(head, 120, &crc32c::crc32c(table).to_le_bytes());
        let crc = crc32c::crc32c(&head[..HEADER_BYTES - 4]);
        put(head, HEADER_BYTES - 4, &crc.to_le_bytes());
        bytes.extend_from_slice(&note);
        bytes
    }

    /// Reads the header of a layer file. Nothing is allocated from a length that was not checked.
    pub(crate) fn read(file: &dyn StorageFile, path: &Path) -> Result<Header, ReplicaError> {
        let corrupt = |problem: String| ReplicaError::corrupt(path, problem);
        let length = file.len().context("measure undo layer", path)?;
        if length < HEADER_BYTES as u64 {
            return Err(corrupt(format!("{length} bytes are too short for an undo layer")));
        }
        let mut head = [0; HEADER_BYTES];
        file.read_exact_at(&mut head, 0).context("read undo layer header", path)?;
        let (volumes, note_bytes) = check_head(&head, length).map_err(corrupt)?;
        let mut table = vec![0; volumes * VOLUME_BYTES + note_bytes];
        file.read_exact_at(&mut table, HEADER_BYTES as u64).context("read undo layer volumes", path)?;
        let (table, note) = table.split_at(volumes * VOLUME_BYTES);
        decode(&head, table, note).map_err(corrupt)
    }

    /// Of a header alone.
    pub(crate) const HEAD_BYTES: usize = HEADER_BYTES;
    /// Of a row of the volume table.
    pub(crate) const ROW_BYTES: usize = VOLUME_BYTES;

    /// A volume table with the numbers of entries left out.
    pub(crate) fn table_without_entries(table: &[u8]) -> Vec<u8> {
        let mut table = table.to_vec();
        table.chunks_exact_mut(VOLUME_BYTES).for_each(|row| row[ENTRIES_AT..ENTRIES_AT + 8].fill(0));
        table
    }

    /// Of what an encoded header consists of: the numbers of entries are put into the table.
    pub(crate) fn of_parts(
        head: &[u8; HEADER_BYTES],
        table: &mut [u8],
        entries: &[u8],
        note: &[u8],
    ) -> Result<Header, String> {
        let rows = table.chunks_exact_mut(VOLUME_BYTES).zip(entries.chunks_exact(8));
        rows.for_each(|(row, entries)| put(row, ENTRIES_AT, entries));
        // The file's length is what it says; it is compared when the file is opened.
        let (volumes, note_bytes) = check_head(head, get_u64(head, 96))?;
        if (volumes * VOLUME_BYTES, note_bytes) != (table.len(), note.len()) {
            return Err("a layer's header does not fit its volumes or note".to_owned());
        }
        decode(head, table, note)
    }

    /// What stands for a layer whose header cannot be read.
    pub(crate) fn unreadable(group: GroupId, generation: Generation, back: Epoch, epoch: Epoch) -> Header {
        let meta = Meta {
            group,
            generation,
            epoch,
            cut_time: UnixNanos(0),
            consistency: Consistency::None,
            note: PointNote::default(),
            written: ByteCount::ZERO,
            zeroed: ByteCount::ZERO,
            volumes: Arc::default(),
        };
        Header {
            meta,
            back,
            gone: Box::default(),
            entries: Box::default(),
            data_bytes: 0,
            index_crc: 0,
            file_bytes: 0,
            note_bytes: 0,
            kind: Kind::Paged,
        }
    }
}

/// Checks magic, version, checksum and lengths; gives the number of volumes and the length of the note.
fn check_head(head: &[u8; HEADER_BYTES], length: u64) -> Result<(usize, usize), String> {
    if head[..8] != MAGIC {
        return Err("not an undo layer (wrong magic)".to_owned());
    }
    let version = get_u32(head, 8);
    if !(VERSION_MIN..=VERSION).contains(&version) {
        return Err(format!(
            "undo layer version {version} is not known; this program reads versions {VERSION_MIN} to {VERSION}"
        ));
    }
    if crc32c::crc32c(&head[..HEADER_BYTES - 4]) != get_u32(head, HEADER_BYTES - 4) {
        return Err("header checksum does not match (damaged)".to_owned());
    }
    let volumes = get_u32(head, 12) as usize;
    if volumes > VOLUMES_MAX {
        return Err(format!("{volumes} volumes, at most {VOLUMES_MAX} are possible"));
    }
    let note = get_u32(head, 104) as usize;
    if note > NOTE_BYTES_MAX {
        return Err(format!("a point's note of {note} bytes, at most {NOTE_BYTES_MAX} are possible"));
    }
    let (entries, data, file) = (get_u64(head, 80), get_u64(head, 88), get_u64(head, 96));
    let index = entries.checked_mul(Entry::BYTES as u64);
    let least = index
        .and_then(|index| index.checked_add(data))
        .and_then(|content| content.checked_add(data_position(volumes, note)));
    // No file is longer, and what is reckoned from its length (the catalogue has no file at hand) does not overflow.
    let fits =
        |least: u64| file <= i64::MAX as u64 && if version == 2 { least == file } else { least <= file };
    if !least.is_some_and(fits) {
        return Err(format!("{entries} entries and {data} bytes of data do not make a file of {file} bytes"));
    }
    if file != length {
        return Err(format!("{length} bytes long where its header says {file} (cut short or grown)"));
    }
    Ok((volumes, note))
}

fn decode(head: &[u8; HEADER_BYTES], table: &[u8], note: &[u8]) -> Result<Header, String> {
    if crc32c::crc32c(table) != get_u32(head, 120) {
        return Err("volume table checksum does not match (damaged)".to_owned());
    }
    if crc32c::crc32c(note) != get_u32(head, 108) {
        return Err("note checksum does not match (damaged)".to_owned());
    }
    let version = get_u32(head, 8);
    let mut entries = Vec::new();
    let mut volumes = Vec::new();
    let mut gone = 0;
    for row in table.chunks_exact(VOLUME_BYTES) {
        let name = usize::from(get_u16(row, 36));
        let name = row[NAME_AT..].get(..name).ok_or_else(|| format!("a name of {name} bytes is too long"))?;
        match row[GONE_AT] {
            0 if gone == 0 => {}
            1 => gone += 1,
            _ => return Err("its volumes are out of order".to_owned()),
        }
        entries.push(get_u64(row, 24));
        volumes.push(VolumeInfo {
            id: VolumeId(get(row, 0)),
            name: decode_name(name)?,
            size: ByteCount(get_u64(row, 16)),
            logical_block: get_u32(row, 32),
        });
    }
    check_volumes(&volumes)?;
    let total = entries.iter().try_fold(0_u64, |sum, entries| sum.checked_add(*entries));
    if total != Some(get_u64(head, 80)) {
        return Err("its volumes' entries do not add up".to_owned());
    }
    let consistency =
        Consistency::from_byte(head[72]).ok_or_else(|| format!("consistency {} means nothing", head[72]))?;
    let epoch = get_u64(head, 40);
    let span = if version == 2 { 1 } else { u64::from(get_u32(head, 112)) };
    let back = match epoch.checked_sub(span) {
        Some(back) if span > 0 => back,
        _ => return Err(format!("it leads {span} epochs back from epoch {epoch}")),
    };
    let gone = volumes.split_off(volumes.len() - gone);
    let header = Header {
        back: Epoch(back),
        gone: gone.into(),
        kind: if version == 2 { Kind::Bare } else { Kind::Paged },
        meta: Meta {
            group: GroupId(get(head, 16)),
            generation: Generation(get_u64(head, 32)),
            epoch: Epoch(epoch),
            cut_time: UnixNanos(get_u64(head, 48)),
            consistency,
            note: decode_note(note)?,
            written: ByteCount(get_u64(head, 56)),
            zeroed: ByteCount(get_u64(head, 64)),
            volumes: volumes.into(),
        },
        entries: entries.into(),
        data_bytes: get_u64(head, 88),
        index_crc: get_u32(head, 116),
        file_bytes: get_u64(head, 96),
        note_bytes: note.len(),
    };
    // There are no more entries than the file has bytes, so nothing overflows.
    let index: u64 = match header.kind {
        Kind::Bare => header.entries_total() * Entry::BYTES as u64,
        Kind::Paged => header.entries.iter().map(|records| tree_bytes::<Entry>(*records)).sum(),
    };
    if header.index_position() + index != header.file_bytes {
        return Err(format!("an index of {index} bytes does not end where the file does"));
    }
    Ok(header)
}

pub(crate) fn decode_name(bytes: &[u8]) -> Result<String, String> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(format!("a volume's name of {} bytes is too long", bytes.len()));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) => Ok(name.to_owned()),
        Err(_) => Err("a volume's name is not UTF-8".to_owned()),
    }
}

/// The rules for volumes wherever they are kept.
pub(crate) fn check_volumes<'a>(volumes: impl IntoIterator<Item = &'a VolumeInfo>) -> Result<(), String> {
    let mut ids = HashSet::new();
    for VolumeInfo { id, name, size, .. } in volumes {
        if !ids.insert(*id) {
            return Err(format!("{id:?} stands twice"));
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(format!("the name of {id:?} has {} bytes, at most {NAME_BYTES_MAX} go", name.len()));
        }
        if !size.0.is_multiple_of(SECTOR_BYTES) {
            return Err(format!("the size of {id:?}, {} bytes, is not a multiple of {SECTOR_BYTES}", size.0));
        }
    }
    match ids.len() {
        count if count > VOLUMES_MAX => Err(format!("{count} volumes, at most {VOLUMES_MAX} go")),
        _ => Ok(()),
    }
}

/// A layer file's name: the epoch in 20 digits, so that names sort as epochs do; and where it leads back to, when that is
/// not the epoch before. So no two layers ever have the same name, and a name has one content.
pub(crate) fn file_name(back: Epoch, epoch: Epoch) -> String {
    let digits = |epoch: Epoch| format!("{:0EPOCH_DIGITS$}", epoch.0);
    match back.next() == epoch {
        true => digits(epoch) + FILE_SUFFIX,
        false => digits(epoch) + "-" + &digits(back) + FILE_SUFFIX,
    }
}

/// What a layer file's name says: where it leads back to, and its epoch; `None` when it is no such name.
pub(crate) fn parse_file_name(name: &str) -> Option<(Epoch, Epoch)> {
    let name = name.strip_suffix(FILE_SUFFIX)?;
    match name.split_once('-') {
        None => {
            let epoch = parse_digits(name)?;
            Some((Epoch(epoch.0.checked_sub(1)?), epoch))
        }
        Some((epoch, back)) => {
            let (back, epoch) = (parse_digits(back)?, parse_digits(epoch)?);
            (back.0.checked_add(1)? < epoch.0 && epoch.0 - back.0 <= EPOCHS_MAX).then_some((back, epoch))
        }
    }
}

/// An epoch in as many digits as names of files have.
pub(crate) fn parse_digits(digits: &str) -> Option<Epoch> {
    let plain = digits.len() == EPOCH_DIGITS && digits.bytes().all(|digit| digit.is_ascii_digit());
    digits.parse().ok().filter(|_| plain).map(Epoch)
}
