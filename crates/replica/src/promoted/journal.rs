//! What was written to a promoted group and is not applied yet, on disk. The byte table is docs/formats/write-journal.md.
//!
//! One file for each epoch that is to come. Its records are in the order of the writes. Each one's checksum goes on from the one before,
//! and the first from the header, so a record counts only behind all that come before it: what is read is always a prefix.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Epoch, Generation, GroupId, VolumeId};
use durable::{OpenMode, Storage, StorageFile};

use crate::bytes::{get, get_u32, get_u64, put};
use crate::error::Context;
use crate::{JOURNAL_RECORD_BYTES_MAX, ReplicaError};

const MAGIC: [u8; 8] = *b"SEAWJRNL";
/// 1: the first.
pub(crate) const VERSION: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 64;
/// Of a record, before its data.
pub(crate) const RECORD_BYTES: usize = 40;
/// Where a record's checksum is; it covers what is before, and the data.
const RECORD_CRC: usize = 36;
const SUFFIX: &str = ".journal";

/// Where a journal ends, and what the next record's checksum goes on from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) length: u64,
    pub(crate) chain: u32,
}

/// Whose journal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
    /// What it becomes.
    pub(crate) epoch: Epoch,
    /// Where the journal of the epoch before ended. This one counts only behind all of that.
    pub(crate) previous: End,
}

/// A write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Payload<'a> {
    Data(&'a [u8]),
    /// So many bytes.
    Zeroes(u64),
}

impl Payload<'_> {
    pub(crate) fn length(&self) -> u64 {
        match self {
            Payload::Data(data) => data.len() as u64,
            Payload::Zeroes(length) => *length,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    pub(crate) volume: VolumeId,
    pub(crate) offset: u64,
    pub(crate) payload: Payload<'a>,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 16, &self.group.0);
        put(&mut bytes, 32, &self.generation.0.to_le_bytes());
        put(&mut bytes, 40, &self.epoch.0.to_le_bytes());
        put(&mut bytes, 48, &self.previous.length.to_le_bytes());
        put(&mut bytes, 56, &self.previous.chain.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        put(&mut bytes, 60, &crc.to_le_bytes());
        bytes
    }

    /// `None`: it never became durable, so nothing behind it was either.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Option<Header>, String> {
        if bytes.len() < HEADER_BYTES || bytes[..8] != MAGIC {
            return Ok(None);
        }
        let version = get_u32(bytes, 8);
        if version != VERSION {
            return Err(format!(
                "journal version {version} is not known; this program reads version {VERSION}"
            ));
        }
        if crc32c::crc32c(&bytes[..60]) != get_u32(bytes, 60) {
            return Ok(None);
        }
        Ok(Some(Header {
            group: GroupId(get(bytes, 16)),
            generation: Generation(get_u64(bytes, 32)),
            epoch: Epoch(get_u64(bytes, 40)),
            previous: End { length: get_u64(bytes, 48), chain: get_u32(bytes, 56) },
        }))
    }

    /// Where the first record goes.
    pub(crate) fn end(&self) -> End {
        End { length: HEADER_BYTES as u64, chain: crc32c::crc32c(&self.encode()) }
    }
}

/// A record's head, and where the journal ends behind it.
pub(crate) fn encode_record(record: &Record<'_>, before: End) -> ([u8; RECORD_BYTES], End) {
    let mut head = [0; RECORD_BYTES];
    put(&mut head, 0, &record.volume.0);
    put(&mut head, 16, &record.offset.to_le_bytes());
    put(&mut head, 24, &record.payload.length().to_le_bytes());
    let (kind, data) = match record.payload {
        Payload::Data(data) => (1, data),
        Payload::Zeroes(_) => (2, &[][..]),
    };
    head[32] = kind;
    let chain = crc32c::crc32c_append(crc32c::crc32c_append(before.chain, &head[..RECORD_CRC]), data);
    put(&mut head, RECORD_CRC, &chain.to_le_bytes());
    (head, End { length: before.length + (RECORD_BYTES + data.len()) as u64, chain })
}

/// How many bytes of data follow a record's head; `None` when this is none.
fn data_bytes(head: &[u8; RECORD_BYTES]) -> Option<usize> {
    let length = get_u64(head, 24);
    match (head[32], length) {
        (1, 1..=JOURNAL_RECORD_BYTES_MAX) => Some(length as usize),
        (2, 1..) => Some(0),
        _ => None,
    }
}

/// Reads records until one does not count: the end, or what a crash has torn. Gives where those before it end.
///
/// # Errors
/// When reading fails, or `each` does.
pub(crate) fn read_records<E>(
    header: &Header,
    mut read: impl FnMut(&mut [u8], u64) -> Result<usize, E>,
    mut each: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<End, E> {
    let mut end = header.end();
    let mut data = Vec::new();
    loop {
        let mut head = [0; RECORD_BYTES];
        if read(&mut head, end.length)? < RECORD_BYTES {
            return Ok(end);
        }
        let Some(length) = data_bytes(&head) else { return Ok(end) };
        data.resize(length, 0);
        if read(&mut data, end.length + RECORD_BYTES as u64)? < length {
            return Ok(end);
        }
        let payload = match head[32] {
            1 => Payload::Data(&data),
            _ => Payload::Zeroes(get_u64(&head, 24)),
        };
        let record = Record { volume: VolumeId(get(&head, 0)), offset: get_u64(&head, 16), payload };
        let (expected, behind) = encode_record(&record, end);
        if expected != head {
            return Ok(end);
        }
        each(record)?;
        end = behind;
    }
}

/// How many writes of a journal count, and how many bytes behind them do not; or what is wrong with it.
pub(crate) fn check(storage: &dyn Storage, path: &Path) -> Result<Result<(u64, u64), String>, ReplicaError> {
    let file = storage.open(path, OpenMode::Read).context("open write journal", path)?;
    let length = file.len().context("measure write journal", path)?;
    let mut bytes = [0; HEADER_BYTES];
    let read = read_up_to(&*file, &mut bytes, 0).context("read write journal", path)?;
    let header = match Header::decode(&bytes[..read]) {
        Ok(Some(header)) => header,
        Ok(None) => return Ok(Ok((0, length))),
        Err(problem) => return Ok(Err(problem)),
    };
    let mut writes = 0;
    let read = |buffer: &mut [u8], at| read_up_to(&*file, buffer, at).context("read write journal", path);
    let end = read_records(&header, read, |_| {
        writes += 1;
        Ok::<_, ReplicaError>(())
    })?;
    Ok(Ok((writes, length.saturating_sub(end.length))))
}

/// As much as there is of a file.
pub(crate) fn read_up_to(file: &dyn StorageFile, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

pub(crate) fn dir(replica: &Path) -> PathBuf {
    replica.join("journal")
}

pub(crate) fn path(dir: &Path, epoch: Epoch) -> PathBuf {
    dir.join(format!("{:020}{SUFFIX}", epoch.0))
}

/// The journals in a directory, oldest first; none when there is no such directory.
pub(crate) fn list(storage: &dyn Storage, dir: &Path) -> Result<Vec<Epoch>, ReplicaError> {
    if !storage.exists(dir).context("look for", dir)? {
        return Ok(Vec::new());
    }
    let names = storage.list(dir).context("list", dir)?;
    let epoch = |name: &String| name.strip_suffix(SUFFIX).filter(|digits| digits.len() == 20)?.parse().ok();
    let mut epochs: Vec<Epoch> = names.iter().filter_map(epoch).map(Epoch).collect();
    epochs.sort_unstable();
    Ok(epochs)
}

/// A journal's file, and what of it is durable.
#[derive(Debug)]
pub(crate) struct JournalFile {
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) path: PathBuf,
    pub(crate) epoch: Epoch,
    /// Its name is durable.
    named: AtomicBool,
    /// No more is written to it, and all that was is durable.
    done: AtomicBool,
}

impl JournalFile {
    /// One that was found when opening, made durable.
    pub(crate) fn found(file: Arc<dyn StorageFile>, path: PathBuf, epoch: Epoch) -> JournalFile {
        JournalFile { file, path, epoch, named: AtomicBool::new(true), done: AtomicBool::new(true) }
    }

    /// Makes what was written to it until now durable. `closed`: nothing more will be.
    pub(crate) fn sync(&self, storage: &dyn Storage, closed: bool) -> Result<(), ReplicaError> {
        if self.done.load(Ordering::Acquire) {
            return Ok(());
        }
        if !self.named.load(Ordering::Acquire) {
            let dir = self.path.parent().expect("a journal lies in a directory");
            storage.sync_dir(dir).context("sync directory", dir)?;
            self.named.store(true, Ordering::Release);
        }
        self.file.sync_data().context("sync write journal", &self.path)?;
        if closed {
            self.done.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// A journal that takes records.
#[derive(Debug)]
pub(crate) struct JournalWriter {
    pub(crate) journal: Arc<JournalFile>,
    pub(crate) end: End,
}

impl JournalWriter {
    /// Makes one, with its header; nothing of it is durable yet.
    pub(crate) fn create(
        storage: &dyn Storage,
        dir: &Path,
        header: &Header,
    ) -> Result<JournalWriter, ReplicaError> {
        let path = path(dir, header.epoch);
        let file = storage.open(&path, OpenMode::CreateOrOpen).context("create write journal", &path)?;
        // One that could not be written to before may have left something.
        file.set_len(0).context("cut write journal", &path)?;
        file.write_all_at(&header.encode(), 0).context("write to write journal", &path)?;
        let journal = JournalFile {
            file,
            path,
            epoch: header.epoch,
            named: AtomicBool::new(false),
            done: AtomicBool::new(false),
        };
        Ok(JournalWriter { journal: Arc::new(journal), end: header.end() })
    }

    /// Adds a record. When that fails the journal is as it was, or (told by the flag) in an unknown state.
    pub(crate) fn append(&mut self, record: &Record<'_>) -> Result<(), (ReplicaError, bool)> {
        let (head, end) = encode_record(record, self.end);
        let data = match record.payload {
            Payload::Data(data) => data,
            Payload::Zeroes(_) => &[],
        };
        let slices = [IoSlice::new(&head), IoSlice::new(data)];
        let slices = if data.is_empty() { &slices[..1] } else { &slices[..] };
        let JournalFile { file, path, .. } = &*self.journal;
        if let Err(error) = file.write_all_vectored_at(slices, self.end.length) {
            let error = ReplicaError::io("write to write journal", path, error);
            // A part of it may be there, and would lie behind the next, shorter one.
            let cut = file.set_len(self.end.length);
            let lasting = !error.is_retryable() || cut.is_err();
            return Err((error, lasting));
        }
        self.end = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            group: GroupId([0x11; 16]),
            generation: Generation(2),
            epoch: Epoch(0x0a0b),
            previous: End { length: 0x0102, chain: 0x0304_0506 },
        }
    }

    fn records() -> [Record<'static>; 2] {
        let volume = VolumeId([0x22; 16]);
        [
            Record { volume, offset: 4097, payload: Payload::Data(b"tide") },
            Record { volume, offset: 0x1_0000_0000, payload: Payload::Zeroes(1 << 33) },
        ]
    }

    fn journal() -> Vec<u8> {
        let mut bytes = header().encode().to_vec();
        let mut end = header().end();
        for record in records() {
            let (head, behind) = encode_record(&record, end);
            bytes.extend_from_slice(&head);
            if let Payload::Data(data) = record.payload {
                bytes.extend_from_slice(data);
            }
            end = behind;
        }
        assert_eq!(end.length, bytes.len() as u64);
        bytes
    }

    /// How many records count, and where they end.
    fn read(bytes: &[u8]) -> (usize, End) {
        let header = Header::decode(bytes).unwrap().unwrap();
        let mut count = 0;
        let fill = |buffer: &mut [u8], at: u64| {
            let rest = bytes.get(at as usize..).unwrap_or_default();
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            Ok::<_, ()>(length)
        };
        let end = read_records(&header, fill, |record| {
            assert_eq!(record, records()[count]);
            count += 1;
            Ok(())
        });
        (count, end.unwrap())
    }

    /// The bytes of docs/formats/write-journal.md. A change here breaks what was written before.
    #[test]
    fn golden_bytes() {
        let mut golden = b"SEAWJRNL\x01\0\0\0\0\0\0\0".to_vec();
        golden.extend_from_slice(&[0x11; 16]);
        golden.extend_from_slice(b"\x02\0\0\0\0\0\0\0\x0b\x0a\0\0\0\0\0\0");
        golden.extend_from_slice(b"\x02\x01\0\0\0\0\0\0\x06\x05\x04\x03");
        golden.extend_from_slice(&GOLDEN_CRCS[0]);
        golden.extend_from_slice(&[0x22; 16]);
        golden.extend_from_slice(b"\x01\x10\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x01\0\0\0");
        golden.extend_from_slice(&GOLDEN_CRCS[1]);
        golden.extend_from_slice(b"tide");
        golden.extend_from_slice(&[0x22; 16]);
        golden.extend_from_slice(b"\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\x02\0\0\0");
        golden.extend_from_slice(&GOLDEN_CRCS[2]);
        assert_eq!(journal(), golden);
        assert_eq!(Header::decode(&golden), Ok(Some(header())));
        assert_eq!(read(&golden).0, 2);
    }

    const GOLDEN_CRCS: [[u8; 4]; 3] = [[124, 132, 31, 98], [248, 205, 140, 99], [202, 18, 2, 137]];

    /// Whatever is torn off or changed, what is read is a beginning of what was written.
    #[test]
    fn what_is_torn_ends_it() {
        let bytes = journal();
        let first = HEADER_BYTES + RECORD_BYTES + 4;
        for length in HEADER_BYTES..bytes.len() {
            let (count, end) = read(&bytes[..length]);
            assert_eq!(count, usize::from(length >= first));
            assert_eq!(end.length as usize, if count == 1 { first } else { HEADER_BYTES });
        }
        for length in 0..HEADER_BYTES {
            assert_eq!(Header::decode(&bytes[..length]), Ok(None));
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match bit / 8 {
                8..12 => assert!(Header::decode(&bytes).unwrap_err().contains("is not known")),
                at if at < HEADER_BYTES => assert_eq!(Header::decode(&bytes), Ok(None), "bit {bit}"),
                at => assert_eq!(read(&bytes).0, usize::from(at >= first), "bit {bit}"),
            }
        }
        // The second record alone, as a write that overtook the first one.
        let mut bytes = bytes;
        bytes[HEADER_BYTES..first].fill(0);
        assert_eq!(read(&bytes).0, 0);
    }
}
