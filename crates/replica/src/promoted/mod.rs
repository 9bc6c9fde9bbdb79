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
//! - Memory: two folds of [`PROMOTED_FOLD_BYTES_MAX`]. When one is being applied and the other is full, writers wait: they are as fast
//!   as the storage is.

mod fold;
pub(crate) mod journal;
pub(crate) mod marker;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use block::{
    BLOCK_BYTES, ByteCount, ByteOffset, Consistency, Epoch, Extent, Generation, UnixNanos, VolumeId,
};
use changeset::{Stamp, VolumeInfo};
use durable::{OpenMode, fault_point};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::bytes::is_zero;
use crate::delta::Delta;
use crate::error::Context;
use crate::group::GroupReplica;
use crate::image::Image;
use crate::shared::Core;
use crate::state::State;
use crate::{
    JOURNAL_RECORD_BYTES_MAX, PROMOTED_CUT_BYTES, PROMOTED_FOLD_BYTES_MAX, PROMOTED_JOURNAL_BYTES_MAX,
    ReplicaError,
};
use fold::{Block, Fold, Found};
use journal::{End, Header, JournalFile, JournalWriter, Payload, Record};
use marker::Marker;

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

    /// Puts a write into the open fold.
    fn insert(
        &self,
        fold: &mut Fold,
        volume: usize,
        range: &Range<u64>,
        payload: Payload<'_>,
        edges: Vec<(u64, Box<Block>)>,
    ) {
        let touched = blocks(range);
        let known: Vec<u64> = edges.iter().map(|(block, _)| *block).collect();
        let put = |fold: &mut Fold, block: u64, mut content: Box<Block>| {
            let start = (block * BLOCK_BYTES).max(range.start);
            let end = ((block + 1) * BLOCK_BYTES).min(range.end);
            let place = (start % BLOCK_BYTES) as usize..(start % BLOCK_BYTES + end - start) as usize;
            match payload {
                Payload::Data(data) => {
                    content[place]
                        .copy_from_slice(&data[(start - range.start) as usize..(end - range.start) as usize]);
                }
                Payload::Zeroes(_) => content[place].fill(0),
            }
            match is_zero(&content[..]) {
                true => fold.set_zero(volume, block..block + 1),
                false => fold.set_data(volume, block, content),
            }
        };
        match payload {
            Payload::Data(_) => {
                for block in touched.filter(|block| !known.contains(block)) {
                    put(fold, block, Box::new([0; BLOCK_BYTES as usize]));
                }
            }
            Payload::Zeroes(_) => {
                let first = touched.start + u64::from(known.contains(&touched.start));
                let last = touched.end - u64::from(known.contains(&(touched.end - 1)));
                fold.set_zero(volume, first..last.max(first));
            }
        }
        for (block, content) in edges {
            put(fold, block, content);
        }
    }

    fn write(
        &self,
        replica: &GroupReplica,
        volume: usize,
        offset: ByteOffset,
        payload: Payload<'_>,
    ) -> Result<(), ReplicaError> {
        let range = self.check_range(volume, offset, payload.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let touched = blocks(&range);
        let (cost, journal_bytes) = match payload {
            Payload::Data(data) => (fold::cost(touched.end - touched.start), data.len() as u64),
            Payload::Zeroes(_) => (fold::cost(2), 0),
        };
        let mut writing = loop {
            let writing = self.writing.lock();
            self.core.check_poison()?;
            if self.has_room(&writing, cost, journal_bytes) {
                break writing;
            }
            drop(writing);
            self.make_room(replica, cost, journal_bytes)?;
        };
        let edges = self.edges(volume, &range)?;
        let record = Record { volume: self.volumes[volume].0.id, offset: range.start, payload };
        let journal = self.journal(&mut writing)?;
        if let Err((error, lasting)) = journal.append(&record) {
            if lasting {
                self.core.poison(error.to_string());
            }
            return Err(error);
        }
        writing.sequence += 1;
        let bytes = {
            let mut folds = self.folds.write();
            self.insert(&mut folds.open, volume, &range, payload, edges);
            folds.open.bytes()
        };
        drop(writing);
        if bytes >= PROMOTED_CUT_BYTES.0 {
            self.want_cut();
        }
        Ok(())
    }

    fn has_room(&self, writing: &Writing, cost: u64, journal_bytes: u64) -> bool {
        let journal = writing.open.as_ref().map_or(0, |journal| journal.end.length);
        self.folds.read().open.bytes() + cost <= PROMOTED_FOLD_BYTES_MAX.0
            && journal + journal_bytes <= PROMOTED_JOURNAL_BYTES_MAX.0
    }

    /// Closes what is open, once what is closed has been applied. Whoever cuts next applies it.
    fn make_room(&self, replica: &GroupReplica, cost: u64, journal_bytes: u64) -> Result<(), ReplicaError> {
        let _applying = self.applying.lock();
        if !self.has_room(&self.writing.lock(), cost, journal_bytes) {
            self.apply_closed(replica)?;
            self.close();
            self.want_cut();
        }
        Ok(())
    }

    /// The open journal; made when there is none.
    fn journal<'a>(&self, writing: &'a mut Writing) -> Result<&'a mut JournalWriter, ReplicaError> {
        if writing.open.is_none() {
            let header = Header {
                group: self.core.group,
                generation: self.core.shared.read().generation.unwrap_or_default(),
                epoch: writing.next,
                previous: writing.previous,
            };
            let dir = journal::dir(&self.core.dir);
            let made = JournalWriter::create(&*self.core.storage, &dir, &header);
            if let Err(error) = &made
                && !error.is_retryable()
            {
                self.core.poison(error.to_string());
            }
            writing.open = Some(made?);
        }
        Ok(writing.open.as_mut().expect("just made"))
    }

    fn flush(&self) -> Result<(), ReplicaError> {
        // Who comes while another flushes waits for it, and mostly finds his writes among what was flushed.
        let wanted = self.writing.lock().sequence;
        let mut flushed = self.flushed.lock();
        self.core.check_poison()?;
        if *flushed >= wanted {
            return Ok(());
        }
        let (sequence, closed, open) = {
            let writing = self.writing.lock();
            let open = writing.open.as_ref().map(|journal| journal.journal.clone());
            (writing.sequence, writing.closed.clone(), open)
        };
        let all =
            closed.iter().map(|journal| (journal, true)).chain(open.iter().map(|journal| (journal, false)));
        for (journal, closed) in all {
            if let Err(error) = journal.sync(&*self.core.storage, closed) {
                // What the kernel could not write it has forgotten; nothing after this may be called durable.
                self.core.poison(error.to_string());
                return Err(error);
            }
        }
        *flushed = sequence;
        Ok(())
    }

    fn want_cut(&self) {
        *self.wanted.lock() = true;
        self.changed.notify_all();
    }

    /// Closes the open journal and fold, when anything was written. Called with `applying` held.
    fn close(&self) {
        let mut writing = self.writing.lock();
        if self.folds.read().open.is_empty() {
            return;
        }
        let Some(open) = writing.open.take() else { return };
        writing.previous = open.end;
        writing.next = writing.next.next();
        writing.closed.push_back(open.journal);
        let mut folds = self.folds.write();
        let fold = std::mem::take(&mut folds.open);
        folds.closed.push_back(Arc::new(fold));
    }

    /// Applies everything written so far.
    fn cut(&self, replica: &GroupReplica) -> Result<(), ReplicaError> {
        let _applying = self.applying.lock();
        *self.wanted.lock() = false;
        self.core.check_poison()?;
        self.apply_closed(replica)?;
        self.close();
        fault_point("after-journal-close");
        self.apply_closed(replica)
    }

    /// Applies the closed folds. Called with `applying` held.
    fn apply_closed(&self, replica: &GroupReplica) -> Result<(), ReplicaError> {
        loop {
            let next =
                (self.writing.lock().closed.front().cloned(), self.folds.read().closed.front().cloned());
            let (Some(journal), Some(fold)) = next else { return Ok(()) };
            let infos: Vec<VolumeInfo> = self.volumes.iter().map(|(info, _)| info.clone()).collect();
            let (generation, _) = replica.applied();
            let stamp = Stamp {
                group: self.core.group,
                generation: generation.expect("a promoted group has a generation"),
                epoch: journal.epoch,
                consistency: Consistency::Crash,
                cut_time: (replica.options.clock)().max(replica.applied_cut_time().unwrap_or_default()),
            };
            let mut delta = Delta::new(stamp, &infos);
            fold.fill(&mut delta, |volume| self.size(volume)).map_err(|problem| ReplicaError::Invalid {
                group: stamp.group,
                epoch: stamp.epoch,
                problem,
            })?;
            replica.apply_own(&delta)?;
            self.heal(&fold);
            fault_point("before-journal-remove");
            self.folds.write().closed.pop_front();
            self.writing.lock().closed.pop_front();
            if let Err(error) = self.core.storage.remove(&journal.path) {
                tracing::warn!(path = %journal.path.display(), %error, "remove write journal; opening does it");
            }
        }
    }

    /// Damaged blocks that were written whole are so no more.
    fn heal(&self, fold: &Fold) {
        let mut healed = false;
        for (index, (info, _)) in self.volumes.iter().enumerate() {
            let all = blocks(&(0..info.size.0));
            let mut shared = self.core.shared.write();
            let Some(bad) = shared.bad_blocks.get_mut(&info.id) else { continue };
            let written: Vec<u64> =
                bad.listed().filter(|block| all.contains(block) && fold.contains(index, *block)).collect();
            for block in written {
                healed |= bad.remove(block);
            }
            if bad.is_empty() {
                shared.bad_blocks.remove(&info.id);
            }
        }
        if healed && let Err(error) = self.core.save_bad_blocks() {
            tracing::warn!(%error, "write the list of damaged blocks; a scrub makes it right");
        }
    }

    /// Takes in a record of a journal that is found when opening.
    fn replay(&self, path: &std::path::Path, record: &Record<'_>) -> Result<(), ReplicaError> {
        let volume = self.volumes.iter().position(|(info, _)| info.id == record.volume);
        let volume = volume.ok_or_else(|| {
            ReplicaError::corrupt(
                path,
                format!("a write to volume {}, which the group has not", record.volume),
            )
        })?;
        let range = self
            .check_range(volume, ByteOffset(record.offset), record.payload.length())
            .map_err(|error| ReplicaError::corrupt(path, error.to_string()))?;
        let edges = self.edges(volume, &range)?;
        self.insert(&mut self.folds.write().open, volume, &range, record.payload, edges);
        Ok(())
    }

    /// Takes in the journals that are found when opening, and removes those that do not count.
    fn load(&self, found: Vec<Epoch>) -> Result<(), ReplicaError> {
        let storage = &*self.core.storage;
        let (generation, applied) = {
            let shared = self.core.shared.read();
            (shared.generation.unwrap_or_default(), shared.applied)
        };
        let dir = journal::dir(&self.core.dir);
        let (mut doomed, mut whole) = (Vec::new(), true);
        for epoch in found {
            let path = journal::path(&dir, epoch);
            if epoch <= applied {
                doomed.push(path);
                continue;
            }
            let mut writing = self.writing.lock();
            let file = storage.open(&path, OpenMode::ReadWrite).context("open write journal", &path)?;
            let mut header = [0; journal::HEADER_BYTES];
            let length = journal::read_up_to(&*file, &mut header, 0).context("read write journal", &path)?;
            let header =
                Header::decode(&header[..length]).map_err(|problem| ReplicaError::corrupt(&path, problem))?;
            let follows = |header: &Header| epoch == applied.next() || header.previous == writing.previous;
            let Some(header) = header.filter(|header| whole && epoch == writing.next && follows(header))
            else {
                tracing::warn!(path = %path.display(), "writes that were not flushed and of which a crash has lost the beginning: dropped");
                whole = false;
                doomed.push(path);
                continue;
            };
            if (header.group, header.generation, header.epoch) != (self.core.group, generation, epoch) {
                let problem = format!(
                    "it is of epoch {} of generation {} of {:?}; put it back where it belongs",
                    header.epoch, header.generation, header.group
                );
                return Err(ReplicaError::corrupt(&path, problem));
            }
            let read = |buffer: &mut [u8], at| {
                journal::read_up_to(&*file, buffer, at).context("read write journal", &path)
            };
            let end = journal::read_records(&header, read, |record| self.replay(&path, &record))?;
            let length = file.len().context("measure write journal", &path)?;
            if length > end.length {
                let bytes = length - end.length;
                tracing::warn!(path = %path.display(), bytes, "the journal's end is torn: writes that were not flushed are dropped");
                file.set_len(end.length).context("cut write journal", &path)?;
            }
            // A process that was killed leaves what was not flushed in the system's cache; it counts from now on.
            file.sync_data().context("sync write journal", &path)?;
            writing.closed.push_back(Arc::new(JournalFile::found(file, path, epoch)));
            (writing.previous, writing.next) = (end, epoch.next());
            let mut folds = self.folds.write();
            let fold = std::mem::take(&mut folds.open);
            folds.closed.push_back(Arc::new(fold));
        }
        for path in doomed.iter().rev() {
            storage.remove(path).context("remove write journal", path)?;
        }
        storage.sync_dir(&dir).context("sync directory", &dir)
    }
}

impl GroupReplica {
    /// Serves its volumes for writing from now on; nothing is taken from a source meanwhile. Asked again, it stays as it is.
    ///
    /// A group whose failover was committed begins a new generation, since a source may have begun that one, and numbers its epochs alike.
    ///
    /// # Errors
    /// When it is not failed over, or a source has sent something since it was: nothing changed. When storage fails: it may be
    /// asked again.
    pub fn promote(&self) -> Result<Generation, ReplicaError> {
        let group = self.core.group;
        let mut slot = self.promoted.write();
        if slot.is_some() {
            return Ok(self.applied().0.unwrap_or_default());
        }
        // A failover that goes on holds it, and applies epochs.
        let _upkeep = self.core.upkeep.lock();
        let mut writer = self.writer.lock();
        self.core.check_poison()?;
        self.roll_back_unfinished(&mut writer)?;
        let storage = &*self.core.storage;
        let generation = writer.state.generation.unwrap_or_default();
        match self.failover() {
            Some((_, true)) => {}
            Some((failover, false)) => {
                return Err(ReplicaError::FailoverPending { group, point: failover.point });
            }
            None => {
                let marker = Marker::read(storage, &self.core.dir, group)?;
                let own = marker
                    .filter(|marker| marker.generation <= generation && marker.own == writer.state.applied);
                if own.is_none() {
                    return Err(ReplicaError::NotFailedOver { group });
                }
                let state = State { generation: Some(Generation(generation.0 + 1)), ..writer.state.clone() };
                self.write_state(&mut writer, state)?;
            }
        }
        let dir = journal::dir(&self.core.dir);
        storage.create_dir_all(&dir).context("create directory", &dir)?;
        let since = (self.options.clock)();
        let generation = writer.state.generation.unwrap_or_default();
        let marker = Marker { promoted: true, generation, own: writer.state.applied, since };
        self.write_marker(&marker)?;
        self.core.shared.write().promoted = true;
        *slot = Some(Arc::new(Promoted::new(&self.core, since)));
        Ok(generation)
    }

    /// Ends it: everything that was written is applied, and the newest state is a recovery point.
    ///
    /// # Errors
    /// When it is not promoted, or a volume of it is open: nothing changed. When there is no space: it stays promoted, and may be asked
    /// again.
    pub fn demote(&self) -> Result<(), ReplicaError> {
        let group = self.core.group;
        let mut slot = self.promoted.write();
        let promoted = slot.clone().ok_or(ReplicaError::NotPromoted { group })?;
        let open = promoted.handles.load(Ordering::SeqCst);
        if open > 0 {
            return Err(ReplicaError::PromotedInUse { group, open });
        }
        promoted.cut(self)?;
        let dir = journal::dir(&self.core.dir);
        self.core.storage.sync_dir(&dir).context("sync directory", &dir)?;
        fault_point("before-demoted");
        let writer = self.writer.lock();
        let generation = writer.state.generation.unwrap_or_default();
        let since = promoted.since;
        let marker = Marker { promoted: false, generation, own: writer.state.applied, since };
        self.write_marker(&marker)?;
        self.core.shared.write().promoted = false;
        *slot = None;
        promoted.want_cut();
        Ok(())
    }

    /// Called with the writer's lock held. A failure that leaves open what is on disk poisons.
    fn write_marker(&self, marker: &Marker) -> Result<(), ReplicaError> {
        let written = marker.write(&*self.core.storage, &self.core.dir, self.core.group);
        if let Err(error) = &written
            && !error.is_retryable()
        {
            self.core.poison(error.to_string());
        }
        written
    }

    /// Before a failover is committed: everything up to here was made here.
    pub(crate) fn mark_own(&self, state: &State) -> Result<(), ReplicaError> {
        if self.core.shared.read().promoted {
            return Ok(());
        }
        let generation = state.generation.unwrap_or_default();
        let marker = Marker { promoted: false, generation, own: state.applied, since: UnixNanos(0) };
        marker.write(&*self.core.storage, &self.core.dir, self.core.group)
    }

    /// How it is while it is promoted; else `None`.
    pub fn promoted(&self) -> Option<PromotedStatus> {
        let promoted = self.promoted.read().clone()?;
        let waiting = ByteCount(promoted.folds.read().bytes());
        Some(PromotedStatus { since: promoted.since, waiting, open: promoted.handles.load(Ordering::SeqCst) })
    }

    /// Applies what was written until now; each cut is a recovery point. Without writes, or when it is not promoted, nothing is done.
    ///
    /// # Errors
    /// When there is no space, which leaves the writes in their journal; or the replica is poisoned.
    pub fn cut_promoted(&self) -> Result<(), ReplicaError> {
        let promoted = self.promoted.read().clone();
        promoted.map_or(Ok(()), |promoted| promoted.cut(self))
    }

    /// Ends the waiting of [`GroupReplica::wait_to_cut`].
    pub fn want_cut(&self) {
        if let Some(promoted) = &*self.promoted.read() {
            promoted.want_cut();
        }
    }

    /// Waits until a cut is wanted, because much has been written, or for a time at most; `false` when it is not promoted any more.
    pub fn wait_to_cut(&self, time: Duration) -> bool {
        let Some(promoted) = self.promoted.read().clone() else { return false };
        let mut wanted = promoted.wanted.lock();
        if !*wanted {
            promoted.changed.wait_for(&mut wanted, time);
        }
        drop(wanted);
        self.core.shared.read().promoted
    }

    /// Opens a volume of a promoted group. While it is open the group is not demoted.
    ///
    /// # Errors
    /// When the group is not promoted or has no such volume.
    pub fn promoted_volume(self: &Arc<Self>, volume: VolumeId) -> Result<PromotedVolume, ReplicaError> {
        let group = self.core.group;
        let slot = self.promoted.read();
        let promoted = slot.clone().ok_or(ReplicaError::NotPromoted { group })?;
        let index = promoted.volumes.iter().position(|(info, _)| info.id == volume);
        let index = index.ok_or(ReplicaError::NoSuchVolume { group, volume, epoch: self.applied().1 })?;
        promoted.handles.fetch_add(1, Ordering::SeqCst);
        Ok(PromotedVolume { replica: self.clone(), promoted, index })
    }

    /// The first half of a cut.
    #[cfg(test)]
    pub(crate) fn close_promoted(&self) {
        if let Some(promoted) = &*self.promoted.read() {
            let _applying = promoted.applying.lock();
            promoted.close();
        }
    }

    /// What the open fold becomes.
    #[cfg(test)]
    pub(crate) fn next_promoted(&self) -> Option<Epoch> {
        Some(self.promoted.read().as_ref()?.writing.lock().next)
    }

    /// What opening does, once the replica itself is open.
    pub(crate) fn open_promoted(&self) -> Result<(), ReplicaError> {
        let (storage, group) = (&*self.core.storage, self.core.group);
        let dir = journal::dir(&self.core.dir);
        let found = journal::list(storage, &dir)?;
        let marker = Marker::read(storage, &self.core.dir, group)?;
        let (generation, applied) = self.applied();
        let Some(marker) = marker.filter(|marker| marker.promoted) else {
            for epoch in found {
                let path = journal::path(&dir, epoch);
                if epoch > applied {
                    let problem = format!(
                        "it holds writes behind epoch {applied}, and the group is not promoted; restore the file `{}` beside \
                         it, or move this one away to give the writes up",
                        marker::FILE_NAME
                    );
                    return Err(ReplicaError::unusable(&path, problem));
                }
                storage.remove(&path).context("remove write journal", &path)?;
            }
            return Ok(());
        };
        if Some(marker.generation) != generation {
            let problem = format!(
                "it says that generation {} is promoted, and the replica follows {}; put both back as they were together",
                marker.generation,
                generation.unwrap_or_default()
            );
            return Err(ReplicaError::unusable(&marker::path(&self.core.dir), problem));
        }
        let promoted = Promoted::new(&self.core, marker.since);
        self.core.shared.write().promoted = true;
        promoted.load(found)?;
        {
            let _applying = promoted.applying.lock();
            match promoted.apply_closed(self) {
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%group, %error, "apply what was written before; it stays in its journal");
                }
                other => other?,
            }
        }
        *self.promoted.write() = Some(Arc::new(promoted));
        Ok(())
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
