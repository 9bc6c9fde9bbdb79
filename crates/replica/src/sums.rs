//! Checksums of what the images hold, block by block. The byte tables are in docs/formats/checksums.md.
//!
//! They are as of an epoch, which a small record file says; work in the background brings them up to date from what apply has just
//! written, so apply has nothing to do with them. That leaves a window: what rots between apply and the next update, some epochs
//! later, is taken for what was written. Computing them within apply would close it, but costs apply a second random write for each
//! first one, since a block's checksum lies elsewhere; an undo layer's data, the larger part of the store, is checked from the
//! start.
//!
//! - Consistency: a checksum is that of the block as of the epoch, or not known (0). The last block of a volume counts as filled
//!   with zeroes, so a volume that grows changes none.
//! - Crash consistency: (1) checksums are written and synced, (2) the record says the new epoch. After a crash between, those of
//!   blocks that changed since the old epoch may be either; they are brought up to date before any is used. If it were the other
//!   way round, old checksums would count as new.
//! - A page of checksums that is torn or damaged counts as not known, and is told.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Epoch, Generation, GroupId, VolumeId};
use durable::{OpenMode, RecordError, RecordFile, Storage, StorageFile};

use crate::bytes::{get, get_u32, get_u64, put};
use crate::error::Context;
use crate::{ReplicaError, shared};

pub(crate) const RECORD_NAME: &str = "checksums";
const RECORD_MAGIC: [u8; 8] = *b"SEAWSUMR";
const FILE_MAGIC: [u8; 8] = *b"SEAWSUMS";
/// 1: the first. Of both files.
const VERSION: u32 = 1;
const RECORD_BYTES: usize = 48;
const HEADER_BYTES: usize = 64;
const PAGE_BYTES: usize = 4096;
/// Checksums of one page; its own follows them.
pub(crate) const PAGE_SUMS: u64 = (PAGE_BYTES / 4 - 1) as u64;

/// A block's checksum. Never 0.
pub(crate) fn sum(block: &[u8]) -> u32 {
    let crc = crc32c::crc32c(block);
    // Short at the end of a volume: as if filled with zeroes.
    let crc = match block.len() as u64 {
        block::BLOCK_BYTES => crc,
        length => crc32c::crc32c_append(crc, &[0; block::BLOCK_BYTES as usize][length as usize..]),
    };
    crc.max(1)
}

/// As of which epoch the checksums are.
#[derive(Debug)]
pub(crate) struct SumsRecord {
    file: RecordFile,
    pub(crate) epoch: Epoch,
}

pub(crate) fn record_path(dir: &Path) -> PathBuf {
    dir.join(RECORD_NAME)
}

fn failed(error: RecordError, path: &Path) -> ReplicaError {
    match error {
        RecordError::Io { action, source, .. } => ReplicaError::io(action, path, source),
        other => ReplicaError::corrupt(path, other.to_string()),
    }
}

pub(crate) fn encode_record(group: GroupId, generation: Generation, epoch: Epoch) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    put(&mut bytes, 0, &RECORD_MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 16, &group.0);
    put(&mut bytes, 32, &generation.0.to_le_bytes());
    put(&mut bytes, 40, &epoch.0.to_le_bytes());
    bytes
}

fn decode_record(bytes: &[u8], group: GroupId, generation: Generation) -> Result<Epoch, String> {
    if bytes.len() != RECORD_BYTES || bytes[..8] != RECORD_MAGIC {
        return Err("not a record of checksums (wrong length or magic)".to_owned());
    }
    let version = get_u32(bytes, 8);
    if version != VERSION {
        return Err(format!("version {version} is not known; this program reads version {VERSION}"));
    }
    // Of an older generation, they are from before the failover; what changed since is told by layers as ever.
    if GroupId(get(bytes, 16)) != group || Generation(get_u64(bytes, 32)) > generation {
        return Err("it is of another group or generation".to_owned());
    }
    Ok(Epoch(get_u64(bytes, 40)))
}

impl SumsRecord {
    /// What the record says; `None` when there is none, or none that can be used: nothing is known then. That file is derived, so it is
    /// made again.
    pub(crate) fn read(
        storage: &dyn Storage,
        dir: &Path,
        group: GroupId,
        generation: Generation,
    ) -> Result<Option<SumsRecord>, ReplicaError> {
        let path = record_path(dir);
        let (file, payload) = match RecordFile::open(storage, &path) {
            Ok(found) => found,
            Err(error @ RecordError::Io { .. }) => return Err(failed(error, &path)),
            Err(RecordError::Missing(_)) => return Ok(None),
            Err(other) => {
                tracing::warn!(path = %path.display(), error = %other, "checksums of images are made again");
                return Ok(None);
            }
        };
        match decode_record(&payload, group, generation) {
            Ok(epoch) => Ok(Some(SumsRecord { file, epoch })),
            Err(problem) => {
                tracing::warn!(path = %path.display(), problem, "checksums of images are made again");
                Ok(None)
            }
        }
    }

    pub(crate) fn create(
        storage: &dyn Storage,
        dir: &Path,
        group: GroupId,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<SumsRecord, ReplicaError> {
        let path = record_path(dir);
        let file = RecordFile::create(storage, &path, &encode_record(group, generation, epoch));
        Ok(SumsRecord { file: file.map_err(|error| failed(error, &path))?, epoch })
    }

    pub(crate) fn write(
        &mut self,
        dir: &Path,
        group: GroupId,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<(), ReplicaError> {
        let path = record_path(dir);
        self.file.write(&encode_record(group, generation, epoch)).map_err(|error| failed(error, &path))?;
        self.epoch = epoch;
        Ok(())
    }
}

/// The checksums of one volume's blocks.
#[derive(Debug)]
pub(crate) struct Sums {
    file: Arc<dyn StorageFile>,
    pub(crate) path: PathBuf,
    /// The page at hand.
    page: Option<Page>,
    /// Pages that were damaged.
    pub(crate) damaged: u64,
}

#[derive(Debug)]
struct Page {
    number: u64,
    bytes: Box<[u8; PAGE_BYTES]>,
    changed: bool,
}

pub(crate) fn path(dir: &Path, volume: VolumeId) -> PathBuf {
    shared::volume_dir(dir, volume).join("checksums")
}

pub(crate) fn header(group: GroupId, volume: VolumeId) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    put(&mut bytes, 0, &FILE_MAGIC);
    put(&mut bytes, 8, &VERSION.to_le_bytes());
    put(&mut bytes, 16, &group.0);
    put(&mut bytes, 32, &volume.0);
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    put(&mut bytes, HEADER_BYTES - 4, &crc.to_le_bytes());
    bytes
}

pub(crate) fn page_crc(number: u64, bytes: &[u8; PAGE_BYTES]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), &bytes[..PAGE_BYTES - 4])
}

fn page_position(number: u64) -> u64 {
    PAGE_BYTES as u64 * (number + 1)
}

impl Sums {
    /// Opens the checksums of a volume, or makes a file in which none is known when `fresh` or there is none that can be used.
    pub(crate) fn open(
        storage: &dyn Storage,
        dir: &Path,
        group: GroupId,
        volume: VolumeId,
        fresh: bool,
    ) -> Result<Sums, ReplicaError> {
        let path = path(dir, volume);
        let parent = &shared::volume_dir(dir, volume);
        storage.create_dir_all(parent).context("create directory", parent)?;
        let file = storage.open(&path, OpenMode::CreateOrOpen).context("open checksums", &path)?;
        let mut sums = Sums { file, path, page: None, damaged: 0 };
        let expected = header(group, volume);
        let mut found = [0; HEADER_BYTES];
        let known = sums.file.len().context("measure checksums", &sums.path)? >= HEADER_BYTES as u64 && {
            sums.file.read_exact_at(&mut found, 0).context("read checksums", &sums.path)?;
            found == expected
        };
        if fresh || !known {
            sums.damaged += u64::from(!fresh && found != [0; HEADER_BYTES]);
            sums.file.set_len(0).context("cut checksums", &sums.path)?;
            sums.file.write_all_at(&expected, 0).context("write checksums", &sums.path)?;
            // The name is made durable with the first sync of what it holds.
            storage.sync_dir(parent).context("sync directory", parent)?;
        }
        Ok(sums)
    }

    fn page(&mut self, number: u64) -> Result<&mut Page, ReplicaError> {
        if self.page.as_ref().is_none_or(|page| page.number != number) {
            self.flush()?;
            let mut bytes = Box::new([0; PAGE_BYTES]);
            let position = page_position(number);
            if self.file.len().context("measure checksums", &self.path)? >= position + PAGE_BYTES as u64 {
                self.file.read_exact_at(&mut *bytes, position).context("read checksums", &self.path)?;
            }
            // A page that was never written is a hole.
            if bytes.iter().any(|byte| *byte != 0)
                && page_crc(number, &bytes) != get_u32(&*bytes, PAGE_BYTES - 4)
            {
                self.damaged += 1;
                bytes.fill(0);
            }
            self.page = Some(Page { number, bytes, changed: false });
        }
        Ok(self.page.as_mut().expect("just loaded"))
    }

    /// A block's checksum; 0 when it is not known.
    pub(crate) fn get(&mut self, block: u64) -> Result<u32, ReplicaError> {
        let page = self.page(block / PAGE_SUMS)?;
        Ok(get_u32(&*page.bytes, (block % PAGE_SUMS) as usize * 4))
    }

    pub(crate) fn set(&mut self, block: u64, sum: u32) -> Result<(), ReplicaError> {
        let page = self.page(block / PAGE_SUMS)?;
        put(&mut *page.bytes, (block % PAGE_SUMS) as usize * 4, &sum.to_le_bytes());
        page.changed = true;
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), ReplicaError> {
        if let Some(page) = &mut self.page
            && page.changed
        {
            let crc = page_crc(page.number, &page.bytes);
            put(&mut *page.bytes, PAGE_BYTES - 4, &crc.to_le_bytes());
            let position = page_position(page.number);
            self.file.write_all_at(&*page.bytes, position).context("write checksums", &self.path)?;
            page.changed = false;
        }
        Ok(())
    }

    pub(crate) fn sync(&mut self) -> Result<(), ReplicaError> {
        self.flush()?;
        self.file.sync_data().context("sync checksums", &self.path)
    }
}

/// Checks the file of a volume's checksums, without changing it.
pub(crate) fn check(
    storage: &dyn Storage,
    path: &Path,
    group: GroupId,
    volume: VolumeId,
) -> Result<(), ReplicaError> {
    let file = storage.open(path, OpenMode::Read).context("open checksums", path)?;
    let length = file.len().context("measure checksums", path)?;
    let mut found = [0; HEADER_BYTES];
    if length < HEADER_BYTES as u64 {
        return Err(ReplicaError::corrupt(path, format!("{length} bytes are too short for checksums")));
    }
    file.read_exact_at(&mut found, 0).context("read checksums", path)?;
    if found != header(group, volume) {
        return Err(ReplicaError::corrupt(path, "not the checksums of this volume (damaged)"));
    }
    let mut bytes = Box::new([0; PAGE_BYTES]);
    for number in 0..(length / PAGE_BYTES as u64).saturating_sub(1) {
        file.read_exact_at(&mut *bytes, page_position(number)).context("read checksums", path)?;
        if bytes.iter().any(|byte| *byte != 0) && page_crc(number, &bytes) != get_u32(&*bytes, PAGE_BYTES - 4)
        {
            return Err(ReplicaError::corrupt(
                path,
                format!("checksum of page {number} does not match (damaged)"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use durable::CrashStorage;

    use super::*;

    const GROUP: GroupId = GroupId([0x11; 16]);
    const VOLUME: VolumeId = VolumeId([0x22; 16]);

    /// The bytes of docs/formats/checksums.md.
    #[test]
    fn golden_bytes() {
        let storage = CrashStorage::new();
        let dir = Path::new("/r");
        let mut sums = Sums::open(&storage, dir, GROUP, VOLUME, false).unwrap();
        sums.set(PAGE_SUMS + 2, 0x0102_0304).unwrap();
        sums.sync().unwrap();
        let mut bytes = vec![0; sums.file.len().unwrap() as usize];
        sums.file.read_exact_at(&mut bytes, 0).unwrap();
        let mut golden = b"SEAWSUMS\x01\0\0\0\0\0\0\0".to_vec();
        golden.extend_from_slice(&[0x11; 16]);
        golden.extend_from_slice(&[0x22; 16]);
        golden.extend_from_slice(&[0; 12]);
        golden.extend_from_slice(&GOLDEN_HEADER_CRC);
        golden.resize(2 * 4096 + 8, 0);
        golden.extend_from_slice(&[4, 3, 2, 1]);
        golden.resize(3 * 4096 - 4, 0);
        golden.extend_from_slice(&GOLDEN_PAGE_CRC);
        assert!(bytes == golden, "{:x?} {:x?}", &bytes[..64], &bytes[3 * 4096 - 4..]);
        let mut record = b"SEAWSUMR\x01\0\0\0\0\0\0\0".to_vec();
        record.extend_from_slice(&[0x11; 16]);
        record.extend_from_slice(b"\x02\0\0\0\0\0\0\0\x0b\x0a\0\0\0\0\0\0");
        assert_eq!(encode_record(GROUP, Generation(2), Epoch(0x0a0b))[..], record);
        assert_eq!(decode_record(&record, GROUP, Generation(2)), Ok(Epoch(0x0a0b)));
        for (at, says) in [(0, "magic"), (8, "version"), (16, "another group"), (32, "another group")] {
            let mut record = record.clone();
            record[at] |= 4;
            assert!(decode_record(&record, GROUP, Generation(2)).unwrap_err().contains(says));
        }
    }

    const GOLDEN_HEADER_CRC: [u8; 4] = [0xdf, 0x4f, 0x87, 0x76];
    const GOLDEN_PAGE_CRC: [u8; 4] = [0x0a, 0x74, 0x2f, 0x20];

    #[test]
    fn a_damaged_page_is_not_known_and_told() {
        let storage = CrashStorage::new();
        let dir = Path::new("/r");
        let mut sums = Sums::open(&storage, dir, GROUP, VOLUME, false).unwrap();
        for block in [0, 5, PAGE_SUMS - 1, PAGE_SUMS, 3 * PAGE_SUMS] {
            sums.set(block, block as u32 + 7).unwrap();
        }
        sums.sync().unwrap();
        let file = storage.open(&path(dir, VOLUME), OpenMode::ReadWrite).unwrap();
        check(&storage, &path(dir, VOLUME), GROUP, VOLUME).unwrap();
        for at in (0..HEADER_BYTES as u64).chain([4096, 4096 + 20, 2 * 4096 - 1]) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 8], at).unwrap();
            assert!(check(&storage, &path(dir, VOLUME), GROUP, VOLUME).is_err(), "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        file.write_all_at(&[9], 4096 + 20).unwrap();
        let mut sums = Sums::open(&storage, dir, GROUP, VOLUME, false).unwrap();
        assert_eq!((sums.get(0).unwrap(), sums.get(5).unwrap(), sums.damaged), (0, 0, 1));
        assert_eq!(sums.get(PAGE_SUMS).unwrap(), PAGE_SUMS as u32 + 7);
        assert_eq!(sums.get(2 * PAGE_SUMS).unwrap(), 0);
        assert_eq!(sums.get(3 * PAGE_SUMS).unwrap(), 3 * PAGE_SUMS as u32 + 7);
    }

    #[test]
    fn a_short_block_counts_as_filled_with_zeroes() {
        let mut block = [0; 4096];
        block[..512].fill(7);
        assert_eq!(sum(&block[..512]), sum(&block));
        assert_ne!(sum(&block[..511]), sum(&block));
    }
}
