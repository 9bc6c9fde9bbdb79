//! Undo layers: what epochs overwrote, one file for all volumes of the group.
//!
//! A layer leads from the state after its epoch back to an older state: that of the epoch before, as apply writes it, or
//! further, when thinning merged several. It says what its epoch is. The byte table is docs/formats/undo-layer.md.
//!
//! - Consistency: the entries of a volume are sorted and disjoint, and cover every byte that the epochs changed in a
//!   volume that the replica had before. A name has one content for ever: another layer of the same epoch leads elsewhere and is
//!   called otherwise.
//! - Crash consistency: a layer is written beside its name and renamed when durable, so a layer under its own name is
//!   whole; one that is not was damaged later. [`crate::recover`] says what that costs.
//! - Retries: a layer that failed to be written is removed and written anew.
//! - Cancellation: apply's run to their end; merging stops when its pace is told to, and leaves nothing.

mod entry;
mod format;
mod merge;
mod run;
mod write;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use block::{ByteCount, Epoch, VolumeId};
use durable::{OpenMode, Storage, StorageFile};

use crate::error::Context;
use crate::tree::{Kind, Stream, check_whole};
use crate::{Pace, ReplicaError};
pub(crate) use entry::Entry;
pub(crate) use format::{
    EPOCH_DIGITS, EPOCHS_MAX, Header, Meta, check_volumes, decode_name, file_name, parse_digits,
    parse_file_name,
};
pub(crate) use merge::merge;
pub(crate) use run::{check_run, for_each_run};
pub(crate) use write::{LayerWriter, Scratch, blocks};

/// What a layer that is being written is called: its own name with this behind it. Leftovers are removed on opening.
pub(crate) const TEMPORARY_SUFFIX: &str = ".new";

/// Tells a file from another that had or will have the same name in this process.
pub(crate) fn next_serial() -> u64 {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    SERIAL.fetch_add(1, Ordering::Relaxed)
}

/// A layer file known to this process: its header in memory, all else read when it is needed.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) header: Header,
    pub(crate) path: PathBuf,
    pub(crate) serial: u64,
    /// The header was taken from the catalogue, and not compared with the file yet.
    unread: AtomicBool,
    /// What is wrong with it. Nothing can be read through it, so points before it cannot be viewed.
    damage: OnceLock<String>,
}

impl Layer {
    /// Reads and checks the header of a layer file.
    pub(crate) fn open(storage: &dyn Storage, path: &Path) -> Result<Layer, ReplicaError> {
        let file = storage.open(path, OpenMode::Read).context("open undo layer", path)?;
        let layer = Layer::new(Header::read(&*file, path)?, path.to_owned());
        layer.check_bare(&*file)?;
        Ok(layer)
    }

    pub(crate) fn new(header: Header, path: PathBuf) -> Layer {
        Layer { header, path, serial: next_serial(), unread: AtomicBool::new(false), damage: OnceLock::new() }
    }

    /// One whose header the catalogue knows.
    pub(crate) fn of_catalogue(header: Header, path: PathBuf) -> Layer {
        Layer { unread: AtomicBool::new(true), ..Layer::new(header, path) }
    }

    /// Compares the header with the file's, when that was not done yet.
    pub(crate) fn check_unread(&self, file: &dyn StorageFile) -> Result<(), ReplicaError> {
        if self.unread.load(Ordering::Relaxed) {
            if Header::read(file, &self.path)? != self.header {
                return Err(ReplicaError::corrupt(&self.path, "its header is not the one that it had"));
            }
            self.unread.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.header.meta.epoch
    }

    /// The epoch whose state it leads back to.
    pub(crate) fn back(&self) -> Epoch {
        self.header.back
    }

    /// Bytes of the file.
    pub(crate) fn bytes(&self) -> ByteCount {
        ByteCount(self.header.file_bytes)
    }

    pub(crate) fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    pub(crate) fn mark_damaged(&self, problem: &str) {
        // The first finding says enough.
        let _ = self.damage.set(problem.to_owned());
    }

    /// All entries of a volume, in order.
    pub(crate) fn entries(
        &self,
        volume: VolumeId,
        file: Arc<dyn StorageFile>,
    ) -> impl Iterator<Item = Result<Entry, ReplicaError>> + use<> {
        let stream = self.header.tree(volume).map(|shape| Stream::new(shape, file, &self.path));
        stream.into_iter().flatten()
    }

    /// An index of version 2 has one checksum over all of it, so it is read whole, once. Such layers come from one
    /// epoch, which bounds it.
    fn check_bare(&self, file: &dyn StorageFile) -> Result<(), ReplicaError> {
        if self.header.kind != Kind::Bare {
            return Ok(());
        }
        let mut bytes = vec![0; self.header.entries_total() as usize * 24];
        file.read_exact_at(&mut bytes, self.header.index_position())
            .context("read undo layer index", &self.path)?;
        match crc32c::crc32c(&bytes) == self.header.index_crc {
            true => Ok(()),
            false => Err(ReplicaError::corrupt(&self.path, "index checksum does not match (damaged)")),
        }
    }

    /// Reads all of the file and checks every checksum in it.
    pub(crate) fn check(&self, storage: &dyn Storage, pace: &Pace) -> Result<(), ReplicaError> {
        let file = storage.open(&self.path, OpenMode::Read).context("open undo layer", &self.path)?;
        let found = Header::read(&*file, &self.path)?;
        if found != self.header {
            return Err(ReplicaError::corrupt(&self.path, "its header is not the one that it had"));
        }
        self.check_bare(&*file)?;
        let mut crc = 0;
        for (_, shape) in self.header.trees() {
            if self.header.kind == Kind::Paged && shape.records > 0 {
                let tree = check_whole::<Entry>(&shape, &file, &self.path)?;
                crc = crc32c::crc32c_append(crc, &tree.to_le_bytes());
            }
            let entries = Stream::new(shape, file.clone(), &self.path);
            for_each_run(&*file, &self.path, entries, |entry, _| pace.spend(entry.data_bytes()))?;
        }
        if self.header.kind == Kind::Paged && crc != self.header.index_crc {
            return Err(ReplicaError::corrupt(&self.path, "index checksum does not match (damaged)"));
        }
        self.check_gap(&*file)
    }

    /// What lies between the note and the data is written as zeroes; other bytes there are damage too.
    fn check_gap(&self, file: &dyn StorageFile) -> Result<(), ReplicaError> {
        let start = format::head_bytes(self.header.entries.len(), self.header.note_bytes);
        let mut gap = vec![0; (self.header.data_position() - start) as usize];
        file.read_exact_at(&mut gap, start).context("read undo layer", &self.path)?;
        match crate::bytes::is_zero(&gap) {
            true => Ok(()),
            false => {
                Err(ReplicaError::corrupt(&self.path, "what lies before its data is not zero (damaged)"))
            }
        }
    }
}
