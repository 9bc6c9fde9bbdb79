//! Spans: for a stretch of epochs, which of them first overwrote which sectors.
//!
//! A view at an old point would have to look into every layer after it. Spans bound that: one of level 1 covers
//! [`SPAN_FAN`] epochs, one of level 2 as many of those, and so on up to [`SPAN_LEVELS`]; each begins at a multiple of its length. So
//! any stretch of n epochs is a number of layers and spans that grows with the logarithm of n. A span names epochs, not files, and
//! stays true when thinning merges the layers of its epochs.
//!
//! - Consistency: a span covers every layer whose epoch it covers; where several hold a sector, it names the oldest. It
//!   is only made of applied epochs, which are never taken back.
//! - Crash consistency: spans are derived. One that is missing, torn or damaged is removed and made again from the layers; none is
//!   needed to open a replica. A span is written beside its name, synced and renamed.
//! - Concurrency: built one at a time, under [`crate::shared::Core::building`]; read by any number of views. One that is removed while
//!   a view uses it makes that view put itself together anew.
//!
//! The byte table is docs/formats/span.md.

mod build;
mod format;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use block::{Epoch, VolumeId};
use durable::{OpenMode, Storage, StorageFile};

use crate::error::Context;
use crate::layer::next_serial;
use crate::segment::Segment;
use crate::tree::{Shape, Stream, check_whole};
use crate::{ReplicaError, SPAN_FAN, SPAN_LEVELS};
pub(crate) use build::{Builder, build};
pub(crate) use format::{SpanHeader, SpanRecord, file_name, parse_file_name};

/// A span file known to this process.
#[derive(Debug)]
pub(crate) struct Span {
    pub(crate) first: Epoch,
    pub(crate) level: u32,
    pub(crate) path: PathBuf,
    pub(crate) serial: u64,
    header: OnceLock<SpanHeader>,
}

/// How many epochs a span of a level covers.
pub(crate) fn length(level: u32) -> u64 {
    SPAN_FAN.pow(level)
}

impl Span {
    pub(crate) fn new(first: Epoch, level: u32, path: PathBuf) -> Span {
        Span { first, level, path, serial: next_serial(), header: OnceLock::new() }
    }

    pub(crate) fn last(&self) -> Epoch {
        Epoch(self.first.0 + length(self.level) - 1)
    }

    /// The header, read and checked when it is first asked for.
    pub(crate) fn header(
        &self,
        open: impl FnOnce() -> Result<Arc<dyn StorageFile>, ReplicaError>,
    ) -> Result<&SpanHeader, ReplicaError> {
        if let Some(header) = self.header.get() {
            return Ok(header);
        }
        let header = SpanHeader::read(&*open()?, &self.path)?;
        if (header.first, header.last) != (self.first, self.last()) {
            return Err(ReplicaError::corrupt(&self.path, "it is of other epochs than its name says"));
        }
        Ok(self.header.get_or_init(|| header))
    }

    /// What it says of a volume, in order.
    pub(crate) fn segments(
        &self,
        shape: Shape,
        file: Arc<dyn StorageFile>,
    ) -> impl Iterator<Item = Result<Segment, ReplicaError>> + use<> {
        let first = self.first;
        Stream::<SpanRecord>::new(shape, file, &self.path).map(move |record| Ok(record?.segment(first)))
    }

    pub(crate) fn tree(
        &self,
        volume: VolumeId,
        open: impl FnOnce() -> Result<Arc<dyn StorageFile>, ReplicaError>,
    ) -> Result<Option<Shape>, ReplicaError> {
        Ok(self.header(open)?.tree(volume))
    }
}

/// The levels whose spans may begin at an epoch, highest first.
pub(crate) fn levels_at(first: Epoch) -> impl Iterator<Item = u32> {
    (1..=SPAN_LEVELS).rev().filter(move |level| (first.0 - 1).is_multiple_of(length(*level)))
}

/// Reads all of a span's file and checks every checksum in it.
pub(crate) fn check(storage: &dyn Storage, path: &Path) -> Result<(), ReplicaError> {
    let file = storage.open(path, OpenMode::Read).context("open span", path)?;
    let header = SpanHeader::read(&*file, path)?;
    if path.file_name() != Some(file_name(header.first, header.last).as_ref()) {
        return Err(ReplicaError::corrupt(path, "it is of other epochs than its name says"));
    }
    let mut crc = 0;
    for (_, shape) in header.trees() {
        let tree = check_whole::<SpanRecord>(&shape, &file, path)?;
        crc = crc32c::crc32c_append(crc, &tree.to_le_bytes());
    }
    match crc == header.index_crc {
        true => Ok(()),
        false => Err(ReplicaError::corrupt(path, "index checksum does not match (damaged)")),
    }
}

#[cfg(test)]
mod tests;
