//! Writing to a disk that must not change: copy on write, in blocks of 4 KiB.
//!
//! What was written lies in a sparse file at its own offset; a map in memory says which blocks it holds and which read
//! as zeroes. The rest is read from the disk below.
//!
//! - Consistency: a block changes from base to held only when all of it is in the file, under the map's lock alone; a
//!   write to blocks that are held takes the lock shared. So a reader sees a block before or after its first write.
//! - Crash consistency: none is wanted. The file loses its name when it is made, so that it ends with the process,
//!   however that ends; [`Overlay::sweep`] takes away what a crash between the two left.
//! - Space: bounded by a limit, and by what the file system must keep free for replication. Past either a write fails
//!   as out of space and changes nothing but, at most, held blocks of its own range.

mod map;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Extent};
use durable::{OpenMode, Storage, StorageFile};
use parking_lot::{Mutex, RwLock};

use crate::disk::check_range;
use crate::{Disk, DiskError, RESERVE_BYTES_MAX, RESERVE_PART, SPACE_CHECK_BYTES};
use map::{Map, Place};

/// How the name of an overlay's file ends, while it has one.
pub const OVERLAY_SUFFIX: &str = ".overlay";

/// What an overlay may use.
pub struct Space {
    /// At most so much in its file.
    pub limit: ByteCount,
    /// Tells how much is free on the file's file system, beyond what must stay free.
    pub spare: Box<dyn Fn() -> std::io::Result<ByteCount> + Send + Sync>,
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Space {
    /// Up to `limit` on the file system of `dir`, leaving free a part of [`RESERVE_PART`] of it, at most
    /// [`RESERVE_BYTES_MAX`].
    pub fn in_dir(dir: &Path, limit: ByteCount) -> Space {
        let dir = dir.to_owned();
        let spare = move || {
            let found = rustix::fs::statvfs(&dir)?;
            let reserve = (found.f_blocks * found.f_frsize / RESERVE_PART).min(RESERVE_BYTES_MAX.0);
            Ok(ByteCount((found.f_bavail * found.f_frsize).saturating_sub(reserve)))
        };
        Space { limit, spare: Box::new(spare) }
    }
}

/// A disk that can be written to, above one that does not change.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<dyn Disk>,
    size: u64,
    file: Arc<dyn StorageFile>,
    map: RwLock<Map>,
    space: Space,
    /// What may still be taken before the file system is looked at again.
    granted: Mutex<u64>,
}

impl Overlay {
    /// Makes one whose file lies in `dir`, which is made if need be; `name` is unique there.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(
        storage: &dyn Storage,
        dir: &Path,
        name: &str,
        base: Arc<dyn Disk>,
        space: Space,
    ) -> Result<Overlay, DiskError> {
        let failed = |doing| move |source| DiskError::Overlay { doing, source };
        storage.create_dir_all(dir).map_err(failed("make the directory of"))?;
        let path = dir.join(format!("{name}{OVERLAY_SUFFIX}"));
        let file = storage.open(&path, OpenMode::CreateNew).map_err(failed("create"))?;
        storage.remove(&path).map_err(failed("unlink"))?;
        let size = base.size().0;
        file.set_len(size).map_err(failed("size"))?;
        Ok(Overlay { base, size, file, map: RwLock::default(), space, granted: Mutex::new(0) })
    }

    /// Removes overlays that a crash left in `dir`, and says how many there were.
    ///
    /// # Errors
    /// When the directory is there and cannot be read, or a file cannot be removed.
    pub fn sweep(storage: &dyn Storage, dir: &Path) -> std::io::Result<usize> {
        if !storage.exists(dir)? {
            return Ok(0);
        }
        let mut removed = 0;
        for name in storage.list(dir)?.iter().filter(|name| name.ends_with(OVERLAY_SUFFIX)) {
            storage.remove(&dir.join(name))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// How much it holds.
    pub fn held(&self) -> ByteCount {
        ByteCount(self.map.read().held() * BLOCK_BYTES)
    }

    /// How much it may hold.
    pub fn limit(&self) -> ByteCount {
        self.space.limit
    }

    /// The blocks that a range of bytes touches.
    fn blocks(range: &Range<u64>) -> Range<u64> {
        range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
    }

    /// The bytes of a range of blocks; the disk's last block may be short.
    fn bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(self.size)
    }

    /// The blocks that lie wholly within a range of bytes.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.div_ceil(BLOCK_BYTES);
        let end =
            if range.end == self.size { range.end.div_ceil(BLOCK_BYTES) } else { range.end / BLOCK_BYTES };
        start..end.max(start)
    }

    /// Makes sure that `blocks` more may be held.
    fn take_space(&self, map: &Map, blocks: u64) -> Result<(), DiskError> {
        let wanted = blocks * BLOCK_BYTES;
        if (map.held() * BLOCK_BYTES).saturating_add(wanted) > self.space.limit.0 {
            return Err(DiskError::NoSpace(format!(
                "it holds {} of at most {}; export again with a higher limit",
                ByteCount(map.held() * BLOCK_BYTES),
                self.space.limit
            )));
        }
        let mut granted = self.granted.lock();
        if *granted < wanted {
            let spare = (self.space.spare)()
                .map_err(|source| DiskError::Overlay { doing: "ask for the free space of", source })?;
            if spare.0 < wanted {
                return Err(DiskError::NoSpace(
                    "the target's file system has no more to spare beyond what replication may need"
                        .to_owned(),
                ));
            }
            *granted = spare.0.min(wanted.max(SPACE_CHECK_BYTES.0));
        }
        *granted -= wanted;
        Ok(())
    }

    fn read_block(&self, map: &Map, block: u64, buffer: &mut [u8]) -> Result<(), DiskError> {
        match map.run(block, block + 1).0 {
            Place::Base => self.base.read_at(buffer, ByteOffset(block * BLOCK_BYTES)),
            Place::Zero => {
                buffer.fill(0);
                Ok(())
            }
            Place::Held => read_file(&*self.file, buffer, block * BLOCK_BYTES),
        }
    }

    /// Writes to blocks of which some are not held. What of the first and last block is not written comes from below.
    fn write_new(&self, map: &mut Map, data: &[u8], range: Range<u64>) -> Result<(), DiskError> {
        let blocks = Overlay::blocks(&range);
        let new = blocks.end - blocks.start - map.held_of(blocks.clone());
        self.take_space(map, new)?;
        let whole = self.whole_blocks(&range);
        let mut block_buffer = [0; BLOCK_BYTES as usize];
        let edges = [blocks.start, blocks.end - 1];
        let distinct = if edges[0] == edges[1] { &edges[..1] } else { &edges[..] };
        for &edge in distinct.iter().filter(|edge| !whole.contains(edge)) {
            let place = self.bytes(&(edge..edge + 1));
            let buffer = &mut block_buffer[..(place.end - place.start) as usize];
            if map.run(edge, edge + 1).0 == Place::Held {
                continue;
            }
            self.read_block(map, edge, buffer)?;
            self.write_file(buffer, place.start)?;
        }
        self.write_file(data, range.start)?;
        map.set(blocks, Place::Held);
        Ok(())
    }

    fn write_file(&self, data: &[u8], offset: u64) -> Result<(), DiskError> {
        self.file.write_all_at(data, offset).map_err(|source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                DiskError::NoSpace("the target's file system is full".to_owned())
            }
            _ => DiskError::Overlay { doing: "write to", source },
        })
    }

    /// Makes whole blocks zeroes.
    fn zero_blocks(&self, blocks: Range<u64>, reserve: bool) -> Result<(), DiskError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let mut map = self.map.write();
        if reserve {
            let new = blocks.end - blocks.start - map.held_of(blocks.clone());
            self.take_space(&map, new)?;
        }
        let failed = |doing| move |source| DiskError::Overlay { doing, source };
        let held: Vec<_> = map.runs(blocks.clone()).filter(|(place, _)| *place == Place::Held).collect();
        for (_, run) in held {
            let bytes = self.bytes(&run);
            // First the map, so that a failure half-way leaves zeroes and not a part of them.
            map.set(run, Place::Zero);
            self.file.zero_range(bytes.start, bytes.end - bytes.start).map_err(failed("zero"))?;
        }
        if reserve {
            let bytes = self.bytes(&blocks);
            // Blocks that are not held may have been written to by a write that failed.
            self.file.zero_range(bytes.start, bytes.end - bytes.start).map_err(failed("zero"))?;
            match self.file.allocate(bytes.start, bytes.end - bytes.start) {
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                    return Err(DiskError::NoSpace("the target's file system is full".to_owned()));
                }
                other => other.map_err(failed("reserve space of"))?,
            }
        }
        map.set(blocks, if reserve { Place::Held } else { Place::Zero });
        Ok(())
    }
}

fn read_file(file: &dyn StorageFile, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
    file.read_exact_at(buffer, offset).map_err(|source| DiskError::Overlay { doing: "read", source })
}

impl Disk for Overlay {
    fn size(&self) -> ByteCount {
        ByteCount(self.size)
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError> {
        check_range(ByteCount(self.size), offset, buffer.len() as u64)?;
        let range = offset.0..offset.0 + buffer.len() as u64;
        let runs: Vec<_> = {
            let map = self.map.read();
            if map.is_empty() {
                drop(map);
                return self.base.read_at(buffer, offset);
            }
            map.runs(Overlay::blocks(&range)).collect()
        };
        for (place, run) in runs {
            let bytes = self.bytes(&run);
            let (start, end) = (bytes.start.max(range.start), bytes.end.min(range.end));
            let part = &mut buffer[(start - range.start) as usize..(end - range.start) as usize];
            match place {
                Place::Base => self.base.read_at(part, ByteOffset(start))?,
                Place::Held => read_file(&*self.file, part, start)?,
                Place::Zero => part.fill(0),
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError> {
        let mut at = offset.0;
        while at < self.size {
            let (place, run_end) = {
                let map = self.map.read();
                map.run(at / BLOCK_BYTES, self.size.div_ceil(BLOCK_BYTES))
            };
            let end = (run_end * BLOCK_BYTES).min(self.size);
            let extent = |start: u64, end: u64| Extent::new(ByteOffset(start), ByteCount(end - start)).ok();
            match place {
                Place::Held => return Ok(extent(at, end)),
                Place::Zero => {}
                Place::Base => match self.base.next_data(ByteOffset(at))? {
                    Some(found) if found.offset().0 < end => {
                        return Ok(extent(found.offset().0.max(at), found.end().0.min(end)));
                    }
                    _ => {}
                },
            }
            at = end;
        }
        Ok(None)
    }

    fn write_at(&self, data: &[u8], offset: ByteOffset) -> Result<(), DiskError> {
        check_range(ByteCount(self.size), offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let range = offset.0..offset.0 + data.len() as u64;
        let blocks = Overlay::blocks(&range);
        {
            let map = self.map.read();
            if map.held_of(blocks.clone()) == blocks.end - blocks.start {
                return self.write_file(data, range.start);
            }
        }
        let mut map = self.map.write();
        self.write_new(&mut map, data, range)
    }

    fn zero(&self, extent: Extent, reserve: bool) -> Result<(), DiskError> {
        check_range(ByteCount(self.size), extent.offset(), extent.length().0)?;
        let range = extent.offset().0..extent.end().0;
        let whole = self.whole_blocks(&range);
        let zeroes = [0; BLOCK_BYTES as usize];
        if whole.is_empty() {
            // Within one block, or the end of one and the beginning of the next.
            let mut at = range.start;
            while at < range.end {
                let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(range.end);
                self.write_at(&zeroes[..(end - at) as usize], ByteOffset(at))?;
                at = end;
            }
            return Ok(());
        }
        let bytes = self.bytes(&whole);
        self.write_at(&zeroes[..(bytes.start - range.start) as usize], ByteOffset(range.start))?;
        self.write_at(&zeroes[..(range.end - bytes.end) as usize], ByteOffset(bytes.end))?;
        self.zero_blocks(whole, reserve)
    }

    fn trim(&self, extent: Extent) -> Result<(), DiskError> {
        check_range(ByteCount(self.size), extent.offset(), extent.length().0)?;
        self.zero_blocks(self.whole_blocks(&(extent.offset().0..extent.end().0)), false)
    }

    /// Nothing to do: what is written is in the file for as long as the overlay lives.
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
