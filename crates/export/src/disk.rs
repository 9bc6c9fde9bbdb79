use std::fmt;

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Extent};
use replica::{PromotedVolume, ReplicaError, View};

/// Why a disk did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The replica cannot be read.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The overlay's file failed.
    #[error("{doing} the overlay: {source}")]
    Overlay {
        /// What was tried.
        doing: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The overlay may not grow any more.
    #[error("write to the overlay: {0}")]
    NoSpace(String),
    /// It cannot be written to.
    #[error("write to a disk that is exported for reading only")]
    ReadOnly,
    /// The range lies past the end.
    #[error("use {} bytes at {offset} of a disk of {} bytes: past its end", length.0, size.0)]
    PastEnd {
        /// Where.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
        /// The disk's size.
        size: ByteCount,
    },
}

/// What is exported. Any number of threads may call at the same time; calls that overlap may take effect in any order,
/// bytes of others are never touched.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Its size; never changes.
    fn size(&self) -> ByteCount;
    /// Whether it takes writes.
    fn is_writable(&self) -> bool;
    /// Reads exactly `buffer.len()` bytes. On failure the buffer's content is undefined.
    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError>;
    /// The first range at or after `offset` that may hold anything but zeroes; `None` when only zeroes follow.
    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError>;
    /// Writes all of `data`.
    fn write_at(&self, _data: &[u8], _offset: ByteOffset) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }
    /// Makes a range read as zeroes. With `reserve` its space is taken now, so that later writes to it find room.
    fn zero(&self, _extent: Extent, _reserve: bool) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }
    /// Gives back what the range's whole blocks use; they read as zeroes. The rest of it may stay as it is.
    fn trim(&self, _extent: Extent) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }
    /// Makes everything written so far as lasting as it gets.
    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

/// A view is a disk for reading.
impl Disk for View {
    fn size(&self) -> ByteCount {
        View::size(self)
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError> {
        Ok(View::read_at(self, buffer, offset)?)
    }

    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError> {
        Ok(View::next_data(self, offset)?)
    }
}

/// A promoted group's volume is a disk whose writes stay.
impl Disk for PromotedVolume {
    fn size(&self) -> ByteCount {
        PromotedVolume::size(self)
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError> {
        Ok(PromotedVolume::read_at(self, buffer, offset)?)
    }

    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError> {
        Ok(PromotedVolume::next_data(self, offset)?)
    }

    fn write_at(&self, data: &[u8], offset: ByteOffset) -> Result<(), DiskError> {
        Ok(PromotedVolume::write_at(self, data, offset)?)
    }

    /// Space is not reserved: every write takes room in the journal anyway, and is refused when there is none.
    fn zero(&self, extent: Extent, _reserve: bool) -> Result<(), DiskError> {
        Ok(PromotedVolume::zero(self, extent)?)
    }

    fn trim(&self, extent: Extent) -> Result<(), DiskError> {
        let start = extent.offset().0.next_multiple_of(BLOCK_BYTES);
        let end = match extent.end().0 {
            end if end == PromotedVolume::size(self).0 => end,
            end => end / BLOCK_BYTES * BLOCK_BYTES,
        };
        match Extent::new(ByteOffset(start), ByteCount(end.saturating_sub(start))) {
            Ok(whole) => Ok(PromotedVolume::zero(self, whole)?),
            // No whole block lies in it.
            Err(_) => Ok(()),
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(PromotedVolume::flush(self)?)
    }
}

/// Checks a range against a disk's end.
pub(crate) fn check_range(size: ByteCount, offset: ByteOffset, length: u64) -> Result<(), DiskError> {
    match offset.0.checked_add(length) {
        Some(end) if end <= size.0 => Ok(()),
        _ => Err(DiskError::PastEnd { offset, length: ByteCount(length), size }),
    }
}
