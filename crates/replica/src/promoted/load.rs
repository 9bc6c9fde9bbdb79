//! Opening: what a crash or the process's end has left in journals.

use std::sync::Arc;

use block::{ByteOffset, Epoch};
use durable::OpenMode;

use super::Promoted;
use super::journal::{self, Header, JournalFile, Record};
use super::marker::{self, Marker};
use crate::ReplicaError;
use crate::error::Context;
use crate::group::GroupReplica;

impl Promoted {
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
