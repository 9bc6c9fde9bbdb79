//! Writing, flushing, cutting. The order and its reasons are in the head of the module above.

use std::ops::Range;
use std::sync::Arc;

use block::{BLOCK_BYTES, ByteOffset, Consistency};
use changeset::{Stamp, VolumeInfo};
use durable::fault_point;

use super::fold::{self, Block, Fold};
use super::journal::{self, Header, JournalWriter, Payload, Record};
use super::{Promoted, Writing, blocks};
use crate::bytes::is_zero;
use crate::delta::Delta;
use crate::group::GroupReplica;
use crate::{PROMOTED_CUT_BYTES, PROMOTED_FOLD_BYTES_MAX, PROMOTED_JOURNAL_BYTES_MAX, ReplicaError};

impl Promoted {
    /// Puts a write into the open fold.
    pub(super) fn insert(
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

    pub(super) fn write(
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

    pub(super) fn has_room(&self, writing: &Writing, cost: u64, journal_bytes: u64) -> bool {
        let journal = writing.open.as_ref().map_or(0, |journal| journal.end.length);
        self.folds.read().open.bytes() + cost <= PROMOTED_FOLD_BYTES_MAX.0
            && journal + journal_bytes <= PROMOTED_JOURNAL_BYTES_MAX.0
    }

    /// Closes what is open, once what is closed has been applied. Whoever cuts next applies it.
    pub(super) fn make_room(
        &self,
        replica: &GroupReplica,
        cost: u64,
        journal_bytes: u64,
    ) -> Result<(), ReplicaError> {
        let _applying = self.applying.lock();
        if !self.has_room(&self.writing.lock(), cost, journal_bytes) {
            self.apply_closed(replica)?;
            self.close();
            self.want_cut();
        }
        Ok(())
    }

    /// The open journal; made when there is none.
    pub(super) fn journal<'a>(
        &self,
        writing: &'a mut Writing,
    ) -> Result<&'a mut JournalWriter, ReplicaError> {
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

    pub(super) fn flush(&self) -> Result<(), ReplicaError> {
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

    pub(super) fn want_cut(&self) {
        *self.wanted.lock() = true;
        self.changed.notify_all();
    }

    /// Closes the open journal and fold, when anything was written. Called with `applying` held.
    pub(super) fn close(&self) {
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
    pub(super) fn cut(&self, replica: &GroupReplica) -> Result<(), ReplicaError> {
        let _applying = self.applying.lock();
        *self.wanted.lock() = false;
        self.core.check_poison()?;
        self.apply_closed(replica)?;
        self.close();
        fault_point("after-journal-close");
        self.apply_closed(replica)
    }

    /// Applies the closed folds. Called with `applying` held.
    pub(super) fn apply_closed(&self, replica: &GroupReplica) -> Result<(), ReplicaError> {
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
    pub(super) fn heal(&self, fold: &Fold) {
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
}
