//! A small state that changes often, kept whole with one sync a change.
//!
//! The file has two slots; a change overwrites the older one. The byte table is in docs/formats/record.md.
//!
//! Consistency: the state is the valid slot with the higher sequence number. Crash consistency: while one slot is
//! written the other is durable and untouched, and the two never share a 4 KiB page; so a torn write costs the
//! change at hand, never the one before. Retries: none; after a failed write or sync the file is poisoned and says so
//! until it is opened again. Cancellation: a call runs to its end.
//!
//! What tells a crash from damage: one invalid slot is what a crash leaves, and its change was never acknowledged.
//! A slot that rotted later looks the same; the state then goes back by one change. Whoever keeps something that
//! must not go back checks it against what it describes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{OpenMode, Storage, StorageFile};

/// The largest payload, in bytes. More is refused when it is written.
pub const RECORD_PAYLOAD_BYTES_MAX: usize = 64 * 1024;

const MAGIC: &[u8; 8] = b"SWRECORD";
/// 1: first.
const VERSION: u16 = 1;
const HEADER: usize = 32;
/// The payload may grow in place up to the slot; the header is counted in.
const SLOT: usize = 68 * 1024;
/// Nobody writes so often: a number past it is damage.
const SEQUENCE_MAX: u64 = u64::MAX / 2;
const _: () = assert!(SLOT >= HEADER + RECORD_PAYLOAD_BYTES_MAX && SLOT.is_multiple_of(4096));

/// Why a record file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file is not there.
    #[error("open record file {0}: it does not exist")]
    Missing(PathBuf),
    /// Neither slot is whole.
    #[error(
        "read record file {path}: neither slot is valid ({reason}); restore the file from a copy or recreate it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the better slot lacks.
        reason: &'static str,
    },
    /// Written by a later version.
    #[error(
        "read record file {path}: version {version} is newer than this program's {VERSION}; update the program"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// What was found.
        version: u16,
    },
    /// More than [`RECORD_PAYLOAD_BYTES_MAX`].
    #[error("write record file {0}: {1} bytes are more than {RECORD_PAYLOAD_BYTES_MAX}")]
    TooLarge(PathBuf, usize),
    /// An earlier write failed; nothing more is written until the file is opened again.
    #[error("write record file {0}: an earlier write failed; open the file again")]
    Poisoned(PathBuf),
    /// The storage failed.
    #[error("{action} record file {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the storage said.
        source: io::Error,
    },
}

/// An open record file.
#[derive(Debug)]
pub struct RecordFile {
    file: Arc<dyn StorageFile>,
    path: PathBuf,
    sequence: u64,
    poisoned: bool,
}

impl RecordFile {
    /// Makes a new file with a first payload, durable when this returns. An existing file is replaced whole.
    ///
    /// # Errors
    /// When the payload is too large or the storage fails.
    pub fn create(storage: &dyn Storage, path: &Path, payload: &[u8]) -> Result<RecordFile, RecordError> {
        let mut bytes = slot(path, 1, payload)?;
        bytes.resize(2 * SLOT, 0);
        let io = |action| move |source| RecordError::Io { action, path: path.to_owned(), source };
        crate::replace(storage, path, &bytes).map_err(io("create"))?;
        let file = storage.open(path, OpenMode::ReadWrite).map_err(io("open"))?;
        Ok(RecordFile { file, path: path.to_owned(), sequence: 1, poisoned: false })
    }

    /// Opens a file and gives the newest durable payload.
    ///
    /// # Errors
    /// When it is missing, damaged or of a later version, or the storage fails.
    pub fn open(storage: &dyn Storage, path: &Path) -> Result<(RecordFile, Vec<u8>), RecordError> {
        let io = |action| move |source| RecordError::Io { action, path: path.to_owned(), source };
        let file = match storage.open(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RecordError::Missing(path.to_owned()));
            }
            other => other.map_err(io("open"))?,
        };
        let mut newest: Option<(u64, Vec<u8>)> = None;
        let mut reason = "too short";
        for index in 0..2 {
            let mut bytes = vec![0; SLOT];
            let got = read_up_to(&*file, &mut bytes, index * SLOT as u64).map_err(io("read"))?;
            match decode(&bytes[..got]) {
                // Else the next write would overwrite the newest payload and not the older one.
                Ok((sequence, _)) if sequence % 2 == index => reason = "in the other one's place",
                Ok((sequence, payload)) => {
                    if newest.as_ref().is_none_or(|(newest, _)| sequence > *newest) {
                        newest = Some((sequence, payload.to_vec()));
                    }
                }
                Err(Flaw::Version(version)) => {
                    return Err(RecordError::Version { path: path.to_owned(), version });
                }
                Err(Flaw::Other(what)) => reason = what,
            }
        }
        match newest {
            Some((sequence, payload)) => {
                // The newest may only be in the page cache, when this process did not crash with the machine; it is
                // about to be acted on, so it must not go back.
                file.sync_data().map_err(io("sync"))?;
                Ok((RecordFile { file, path: path.to_owned(), sequence, poisoned: false }, payload))
            }
            None => Err(RecordError::Damaged { path: path.to_owned(), reason }),
        }
    }

    /// Replaces the payload, durable when this returns. One write, one sync.
    ///
    /// # Errors
    /// When it is too large (nothing changes), or the storage fails: then either payload may be found when the file
    /// is opened again, and every further write is refused until it is.
    pub fn write(&mut self, payload: &[u8]) -> Result<(), RecordError> {
        if self.poisoned {
            return Err(RecordError::Poisoned(self.path.clone()));
        }
        if self.sequence == SEQUENCE_MAX {
            return Err(RecordError::Damaged { path: self.path.clone(), reason: "no number is left" });
        }
        let sequence = self.sequence + 1;
        let bytes = slot(&self.path, sequence, payload)?;
        // The slot that does not hold the newest payload: sequence 1 is in slot 0.
        let offset = (sequence + 1) % 2 * SLOT as u64;
        let written = self.file.write_all_at(&bytes, offset).map_err(|source| ("write", source));
        if let Err((action, source)) =
            written.and_then(|()| self.file.sync_data().map_err(|source| ("sync", source)))
        {
            self.poisoned = true;
            return Err(RecordError::Io { action, path: self.path.clone(), source });
        }
        self.sequence = sequence;
        Ok(())
    }
}

pub(crate) fn slot(path: &Path, sequence: u64, payload: &[u8]) -> Result<Vec<u8>, RecordError> {
    if payload.len() > RECORD_PAYLOAD_BYTES_MAX {
        return Err(RecordError::TooLarge(path.to_owned(), payload.len()));
    }
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&sequence.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes), payload);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Gives what may be a slot the magic, version and checksum of one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn mend(bytes: &mut [u8]) {
    let Some((header, rest)) = bytes.split_first_chunk_mut::<HEADER>() else { return };
    header[..8].copy_from_slice(MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    let length = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
    let payload = &rest[..length.min(rest.len())];
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&header[..28]), payload);
    header[28..].copy_from_slice(&checksum.to_le_bytes());
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) const RECORD_SLOT_BYTES: usize = SLOT;

enum Flaw {
    Version(u16),
    Other(&'static str),
}

fn decode(bytes: &[u8]) -> Result<(u64, &[u8]), Flaw> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(Flaw::Other("too short"));
    };
    if header[..8] != *MAGIC {
        return Err(Flaw::Other("wrong magic"));
    }
    let version = u16::from_le_bytes([header[8], header[9]]);
    if version != VERSION {
        return Err(if version > VERSION { Flaw::Version(version) } else { Flaw::Other("version 0") });
    }
    let field = |at: usize| -> [u8; 4] { [header[at], header[at + 1], header[at + 2], header[at + 3]] };
    let length = u32::from_le_bytes(field(12)) as usize;
    if length > RECORD_PAYLOAD_BYTES_MAX || length > rest.len() {
        return Err(Flaw::Other("payload cut short"));
    }
    let payload = &rest[..length];
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&header[..28]), payload);
    if checksum != u32::from_le_bytes(field(28)) {
        return Err(Flaw::Other("wrong checksum"));
    }
    let [low, high] = [field(16), field(20)];
    let sequence = u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32;
    if sequence == 0 || sequence > SEQUENCE_MAX {
        return Err(Flaw::Other("sequence out of range"));
    }
    Ok((sequence, payload))
}

fn read_up_to(file: &dyn StorageFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64)? {
            0 => break,
            count => got += count,
        }
    }
    Ok(got)
}

#[cfg(test)]
pub(crate) fn read_whole(storage: &dyn Storage, path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let file = storage.open(path, OpenMode::Read)?;
    let mut bytes = vec![0; max];
    let got = read_up_to(&*file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CrashStorage, Fault};

    fn path() -> &'static Path {
        Path::new("/state")
    }

    #[test]
    fn golden_bytes() {
        let bytes = slot(path(), 0x0102_0304_0506_0708, b"seawall").unwrap();
        let mut expected = b"SWRECORD\x01\0\0\0\x07\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01\0\0\0\0".to_vec();
        let checksum = crc32c::crc32c(&[&expected[..], b"seawall"].concat());
        expected.extend_from_slice(&checksum.to_le_bytes());
        expected.extend_from_slice(b"seawall");
        assert_eq!(bytes, expected);
        assert_eq!(checksum, GOLDEN_CHECKSUM);
    }

    /// Written down, so that a change of the checksum's definition shows.
    const GOLDEN_CHECKSUM: u32 = 0x8739_affc;

    #[test]
    fn a_crash_in_a_write_costs_that_write_alone() {
        for stop in 0..7 {
            let storage = CrashStorage::new();
            let mut record = RecordFile::create(&storage, path(), b"payload 0").unwrap();
            storage.stop_at(storage.operations() + stop);
            let mut acknowledged = 0;
            while record.write(format!("payload {}", acknowledged + 1).repeat(100).as_bytes()).is_ok() {
                acknowledged += 1;
            }
            for seed in 0..100 {
                let (_, payload) = RecordFile::open(&storage.crash(seed), path()).unwrap();
                let text = String::from_utf8(payload).unwrap();
                let number: u64 = text.split_at(8).1.split('p').next().unwrap().parse().unwrap();
                assert!(
                    number == acknowledged || number == acknowledged + 1,
                    "stop {stop} seed {seed}: {number}"
                );
            }
        }
    }

    #[test]
    fn a_failed_sync_poisons() {
        let storage = CrashStorage::new();
        let mut record = RecordFile::create(&storage, path(), b"a").unwrap();
        storage.fail_at(storage.operations() + 1, Fault::InputOutput);
        assert!(matches!(record.write(b"b"), Err(RecordError::Io { action: "sync", .. })));
        assert!(matches!(record.write(b"c"), Err(RecordError::Poisoned(_))));
        let (mut record, _) = RecordFile::open(&storage, path()).unwrap();
        record.write(b"d").unwrap();
        assert_eq!(RecordFile::open(&storage.crash(0), path()).unwrap().1, b"d");
    }

    #[test]
    fn damage_is_named() {
        let storage = CrashStorage::new();
        assert!(matches!(RecordFile::open(&storage, path()), Err(RecordError::Missing(_))));
        RecordFile::create(&storage, path(), b"payload").unwrap();
        let file = storage.open(path(), OpenMode::ReadWrite).unwrap();
        file.write_all_at(b"P", HEADER as u64).unwrap();
        let error = RecordFile::open(&storage, path()).unwrap_err().to_string();
        assert!(error.contains("wrong magic") || error.contains("wrong checksum"), "{error}");
        file.write_all_at(b"p", HEADER as u64).unwrap();
        assert_eq!(RecordFile::open(&storage, path()).unwrap().1, b"payload");
        file.write_all_at(&2u16.to_le_bytes(), 8).unwrap();
        assert!(matches!(RecordFile::open(&storage, path()), Err(RecordError::Version { version: 2, .. })));
        file.set_len(20).unwrap();
        assert!(matches!(RecordFile::open(&storage, path()), Err(RecordError::Damaged { .. })));
    }

    /// A slot in the other's place would be taken for the newest, and the next write would overwrite it: torn, nothing is left.
    #[test]
    fn a_slot_in_the_wrong_place_is_refused() {
        let storage = CrashStorage::new();
        RecordFile::create(&storage, path(), b"first").unwrap();
        let file = storage.open(path(), OpenMode::ReadWrite).unwrap();
        file.write_all_at(&slot(path(), 3, b"misplaced").unwrap(), SLOT as u64).unwrap();
        assert_eq!(RecordFile::open(&storage, path()).unwrap().1, b"first");
        file.write_all_at(&slot(path(), 2, b"second").unwrap(), SLOT as u64).unwrap();
        assert_eq!(RecordFile::open(&storage, path()).unwrap().1, b"second");
        for sequence in [SEQUENCE_MAX + 2, u64::MAX] {
            file.write_all_at(&slot(path(), sequence, b"last").unwrap(), 0).unwrap();
            assert_eq!(RecordFile::open(&storage, path()).unwrap().1, b"second");
        }
    }

    #[test]
    fn too_large_changes_nothing() {
        let storage = CrashStorage::new();
        let mut record = RecordFile::create(&storage, path(), b"a").unwrap();
        let refused = record.write(&vec![1; RECORD_PAYLOAD_BYTES_MAX + 1]);
        assert!(matches!(refused, Err(RecordError::TooLarge(..))));
        record.write(&vec![2; RECORD_PAYLOAD_BYTES_MAX]).unwrap();
        assert_eq!(RecordFile::open(&storage, path()).unwrap().1, vec![2; RECORD_PAYLOAD_BYTES_MAX]);
    }

    #[test]
    fn any_bytes_decode_without_panic() {
        proptest::proptest!(|(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), cut in 0usize..60)| {
            let _ = decode(&bytes);
            let whole = slot(path(), 3, &bytes).unwrap();
            assert!(decode(&whole[..whole.len().saturating_sub(cut + 1)]).is_err());
            assert!(matches!(decode(&whole), Ok((3, payload)) if payload == bytes));
        });
    }
}
