//! Undo layers: what an epoch overwrote, one file for all volumes of the group.
//!
//! Layer N leads from the state after epoch N back to the state after N-1, and says what epoch N is. The byte table is
//! docs/formats/undo-layer.md.
//!
//! - Consistency: the entries of a volume are sorted and disjoint, and cover every byte that the epoch changed in a
//!   volume that the replica had before.
//! - Crash consistency: a layer is written beside its name and renamed when durable, so a layer under its own name is
//!   whole; one that is not was damaged later. [`crate::recover`] says what that costs.
//! - Retries: a layer that failed to be written is removed and written anew.
//! - Cancellation: none, calls run to their end.

mod format;
mod index;
mod write;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use block::{ByteCount, Epoch};
use durable::{OpenMode, Storage, StorageFile};
use parking_lot::Mutex;

use crate::ReplicaError;
use crate::error::Context;
pub(crate) use format::{Header, Meta, check_volumes, decode_name, file_name, parse_file_name};
pub(crate) use index::{Entry, Index};
pub(crate) use write::{LayerWriter, Scratch};

/// What a layer that is being written is called: its own name with this behind it. Leftovers are removed on opening.
pub(crate) const TEMPORARY_SUFFIX: &str = ".new";

/// A layer file known to this process: its header in memory, its index only while someone uses it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) header: Header,
    pub(crate) path: PathBuf,
    /// Tells it from another that had or will have the same name in this process.
    pub(crate) serial: u64,
    index: Mutex<Weak<Index>>,
}

impl Layer {
    /// Reads and checks the header of a layer file.
    pub(crate) fn open(storage: &dyn Storage, path: &Path) -> Result<Layer, ReplicaError> {
        let file = storage.open(path, OpenMode::Read).context("open undo layer", path)?;
        let header = Header::read(&*file, path)?;
        Ok(Layer::new(header, path.to_owned(), Weak::new()))
    }

    fn new(header: Header, path: PathBuf, index: Weak<Index>) -> Layer {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        Layer { header, path, serial: SERIAL.fetch_add(1, Ordering::Relaxed), index: Mutex::new(index) }
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.header.meta.epoch
    }

    /// Bytes of the file.
    pub(crate) fn bytes(&self) -> ByteCount {
        ByteCount(self.header.file_bytes)
    }

    /// The index, read from `file` unless another user has it in memory.
    pub(crate) fn index(&self, file: &dyn StorageFile) -> Result<Arc<Index>, ReplicaError> {
        let mut held = self.index.lock();
        if let Some(index) = held.upgrade() {
            return Ok(index);
        }
        let index = Arc::new(Index::read(file, &self.header, &self.path)?);
        *held = Arc::downgrade(&index);
        Ok(index)
    }
}
