//! A failed-over group whose volumes are written here: what is written stays, and becomes epochs like any other.
//!
//! Writes go into a journal and into a fold in memory. Every second, or when the fold has grown, it is *cut*: journal and fold are closed,
//! new ones begin, and the closed fold is applied as the next epoch, a recovery point of its own. So the images, the undo layers and
//! everything built on them need know nothing of it.
//!
//! The order, and what breaks when it is changed:
//! 1. the marker says promoted, durably, before the first journal is made (else opening would not look at what was written);
//! 2. a write is in the journal before it is in the fold, in the same order (else what a crash leaves is no prefix of what readers saw);
//! 3. the next journal's first bytes say where this one ended (else, when a crash tears this one, later writes would count without
//!    those that they follow);
//! 4. an epoch is applied, with all of apply's order, before its journal goes (else what was flushed is lost);
//! 5. on opening, journals that do not count go, durably, before one that does is applied (else a second crash finds them behind an
//!    applied epoch, where they would count);
//! 6. when it is demoted, everything is applied, and the removal of the journals durable, before the marker says so (else a later
//!    failover, whose generation and epochs may have the same numbers, would find them).
//!
//! - Consistency: a read gives the newest write of each block. Writes of several blocks that overlap in time may interleave by block.
//! - Crash consistency: what was flushed is there, and what is there is a prefix of the order of the writes; a torn journal ends before
//!   its first damaged record.
//! - Retries: without space a write is refused and changes nothing, and an epoch waits in its journal. Any other failure of storage
//!   poisons.
//! - Memory: two folds of [`crate::PROMOTED_FOLD_BYTES_MAX`]. When one is being applied and the other is full, writers wait: they are as fast
//!   as the storage is.

mod fold;
pub(crate) mod journal;
mod load;
pub(crate) mod marker;
mod role;
mod write;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Epoch, Extent, UnixNanos};
use changeset::VolumeInfo;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::group::GroupReplica;
use crate::image::Image;
use crate::shared::Core;
use crate::{JOURNAL_RECORD_BYTES_MAX, ReplicaError};
use fold::{Block, Fold, Found};
use journal::{End, JournalFile, JournalWriter, Payload};

/// How it is with a promoted group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromotedStatus {
    /// Since when, by this machine's clock.
    pub since: UnixNanos,
    /// Written and not yet applied, in memory.
    pub waiting: ByteCount,
    /// Volumes that are open for writing, each as often as it is.
    pub open: usize,
}

/// What is written to a promoted group.
#[derive(Debug)]
pub(crate) struct Promoted {
    core: Arc<Core>,
    since: UnixNanos,
    volumes: Vec<(VolumeInfo, Arc<Image>)>,
    /// Lock order: `applying`, the replica's writer, `flushed`, `writing`, `folds`.
    writing: Mutex<Writing>,
    folds: RwLock<Folds>,
    /// Held by whoever cuts and applies.
    applying: Mutex<()>,
    /// Of the writes, how many are durable.
    flushed: Mutex<u64>,
    handles: AtomicUsize,
    /// Whether a cut is wanted before its time.
    wanted: Mutex<bool>,
    changed: Condvar,
}

#[derive(Debug)]
struct Writing {
    /// Writes so far.
    sequence: u64,
    /// What the open fold becomes.
    next: Epoch,
    /// Where the newest closed journal ended.
    previous: End,
    /// Made with the first write.
    open: Option<JournalWriter>,
    /// Those of the closed folds, oldest first.
    closed: VecDeque<Arc<JournalFile>>,
}

#[derive(Debug, Default)]
struct Folds {
    open: Fold,
    /// Not applied yet, oldest first.
    closed: VecDeque<Arc<Fold>>,
}

impl Folds {
    /// What the newest write says of a block, and up to where it is the same; at most up to `end`.
    fn run(&self, volume: usize, block: u64, end: u64) -> (Option<Found<'_>>, u64) {
        let mut limit = end;
        for fold in std::iter::once(&self.open).chain(self.closed.iter().rev().map(|fold| &**fold)) {
            match fold.run(volume, block, limit) {
                (Some(found), end) => return (Some(found), end),
                (None, end) => limit = end,
            }
        }
        (None, limit)
    }

    fn bytes(&self) -> u64 {
        self.open.bytes() + self.closed.iter().map(|fold| fold.bytes()).sum::<u64>()
    }
}

/// The blocks that a range of bytes touches.
fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

impl Promoted {
    fn new(core: &Arc<Core>, since: UnixNanos) -> Promoted {
        let (volumes, next) = {
            let shared = core.shared.read();
            let image =
                |info: &VolumeInfo| shared.images.get(&info.id).expect("a volume has an image").clone();
            let volumes = shared.volumes.iter().map(|volume| (volume.info.clone(), image(&volume.info)));
            (volumes.collect(), shared.applied.next())
        };
        let writing =
            Writing { sequence: 0, next, previous: End::default(), open: None, closed: VecDeque::new() };
        Promoted {
            core: core.clone(),
            since,
            volumes,
            writing: Mutex::new(writing),
            folds: RwLock::default(),
            applying: Mutex::default(),
            flushed: Mutex::default(),
            handles: AtomicUsize::new(0),
            wanted: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn size(&self, volume: usize) -> u64 {
        self.volumes[volume].0.size.0
    }

    fn check_range(
        &self,
        volume: usize,
        offset: ByteOffset,
        length: u64,
    ) -> Result<Range<u64>, ReplicaError> {
        let size = self.size(volume);
        match offset.0.checked_add(length) {
            Some(end) if end <= size => Ok(offset.0..end),
            _ => Err(ReplicaError::PastEnd { offset, length: ByteCount(length), size: ByteCount(size) }),
        }
    }

    /// Reads what no write covers. A block that scrubbing found damaged is refused until all of it has been written.
    fn read_image(&self, volume: usize, buffer: &mut [u8], at: u64) -> Result<(), ReplicaError> {
        let (info, image) = &self.volumes[volume];
        let bad = {
            let shared = self.core.shared.read();
            let touched = blocks(&(at..at + buffer.len() as u64));
            shared.bad_blocks.get(&info.id).and_then(|bad| bad.within(touched).next())
        };
        match bad {
            Some(block) => Err(ReplicaError::DamagedImage {
                path: image.path.clone(),
                volume: info.id,
                offset: ByteOffset(block * BLOCK_BYTES),
            }),
            None => image.read(buffer, at),
        }
    }

    fn read(&self, volume: usize, buffer: &mut [u8], offset: ByteOffset) -> Result<(), ReplicaError> {
        let range = self.check_range(volume, offset, buffer.len() as u64)?;
        let mut below: Vec<Range<u64>> = Vec::new();
        {
            let folds = self.folds.read();
            let all = blocks(&range);
            let mut block = all.start;
            while block < all.end {
                let (found, end) = folds.run(volume, block, all.end);
                let part = (block * BLOCK_BYTES).max(range.start)..(end * BLOCK_BYTES).min(range.end);
                let place = (part.start - range.start) as usize..(part.end - range.start) as usize;
                match found {
                    None => below.push(part),
                    Some(Found::Zero) => buffer[place].fill(0),
                    Some(Found::Data(data)) => {
                        let from = (part.start - block * BLOCK_BYTES) as usize;
                        let length = place.len();
                        buffer[place].copy_from_slice(&data[from..from + length]);
                    }
                }
                block = end;
            }
        }
        // What of this is written, cut and applied from now on, is written while this reads; either answer is right.
        for part in below {
            let place = (part.start - range.start) as usize..(part.end - range.start) as usize;
            self.read_image(volume, &mut buffer[place], part.start)?;
        }
        Ok(())
    }

    fn next_data(&self, volume: usize, offset: ByteOffset) -> Result<Option<Extent>, ReplicaError> {
        let size = self.size(volume);
        let mut at = offset.0;
        while at < size {
            let block = at / BLOCK_BYTES;
            let (data, end) = {
                let folds = self.folds.read();
                let (found, end) = folds.run(volume, block, size.div_ceil(BLOCK_BYTES));
                (found.map(|found| matches!(found, Found::Data(_))), (end * BLOCK_BYTES).min(size))
            };
            let extent = |start: u64, end: u64| Extent::new(ByteOffset(start), ByteCount(end - start)).ok();
            match data {
                Some(true) => return Ok(extent(at, end)),
                Some(false) => at = end,
                None => match self.volumes[volume].1.next_data(at)? {
                    Some((start, stop)) if start < end => return Ok(extent(start.max(at), stop.min(end))),
                    _ => at = end,
                },
            }
        }
        Ok(None)
    }

    /// What is in the blocks that a write does only in part: the first and the last.
    fn edges(&self, volume: usize, range: &Range<u64>) -> Result<Vec<(u64, Box<Block>)>, ReplicaError> {
        let size = self.size(volume);
        let touched = blocks(range);
        let mut edges: Vec<(u64, Box<Block>)> = Vec::new();
        for block in [touched.start, touched.end - 1] {
            let bytes = block * BLOCK_BYTES..((block + 1) * BLOCK_BYTES).min(size);
            let whole = range.start <= bytes.start && range.end >= bytes.end;
            if whole || edges.iter().any(|(known, _)| *known == block) {
                continue;
            }
            let mut content: Box<Block> = Box::new([0; BLOCK_BYTES as usize]);
            let length = (bytes.end - bytes.start) as usize;
            self.read(volume, &mut content[..length], ByteOffset(bytes.start))?;
            edges.push((block, content));
        }
        Ok(edges)
    }
}

/// A volume of a promoted group, for reading and writing. Any number at the same time, of any number of threads.
#[derive(Debug)]
pub struct PromotedVolume {
    replica: Arc<GroupReplica>,
    promoted: Arc<Promoted>,
    index: usize,
}

impl PromotedVolume {
    /// Its size; never changes.
    pub fn size(&self) -> ByteCount {
        ByteCount(self.promoted.size(self.index))
    }

    /// Which volume it is.
    pub fn info(&self) -> &VolumeInfo {
        &self.promoted.volumes[self.index].0
    }

    /// Reads exactly `buffer.len()` bytes.
    ///
    /// # Errors
    /// When the range lies past the end, or the image cannot be read there.
    pub fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), ReplicaError> {
        self.promoted.read(self.index, buffer, offset)
    }

    /// The first range at or after `offset` that may hold anything but zeroes; `None` when only zeroes follow.
    ///
    /// # Errors
    /// When the image cannot be asked.
    pub fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, ReplicaError> {
        self.promoted.next_data(self.index, offset)
    }

    /// Writes all of `data`; durable after the next flush. May wait for the storage.
    ///
    /// # Errors
    /// When the range lies past the end, or there is no space: nothing of this write's last MiB changed. Anything else poisons the replica.
    pub fn write_at(&self, data: &[u8], offset: ByteOffset) -> Result<(), ReplicaError> {
        self.promoted.check_range(self.index, offset, data.len() as u64)?;
        let pieces = data.chunks(JOURNAL_RECORD_BYTES_MAX as usize);
        for (number, piece) in pieces.enumerate() {
            let at = ByteOffset(offset.0 + number as u64 * JOURNAL_RECORD_BYTES_MAX);
            self.promoted.write(&self.replica, self.index, at, Payload::Data(piece))?;
        }
        Ok(())
    }

    /// Makes a range read as zeroes; durable after the next flush.
    ///
    /// # Errors
    /// As of a write.
    pub fn zero(&self, extent: Extent) -> Result<(), ReplicaError> {
        let payload = Payload::Zeroes(extent.length().0);
        self.promoted.write(&self.replica, self.index, extent.offset(), payload)
    }

    /// Makes everything durable that was written, to any volume of the group, before this was called.
    ///
    /// # Errors
    /// When storage fails, which poisons the replica: nothing is known of what was not flushed before.
    pub fn flush(&self) -> Result<(), ReplicaError> {
        self.promoted.flush()
    }
}

impl Drop for PromotedVolume {
    fn drop(&mut self) {
        self.promoted.handles.fetch_sub(1, Ordering::SeqCst);
    }
}
