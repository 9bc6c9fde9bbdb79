use crate::{ByteCount, ByteOffset};

/// A range of bytes of a volume. Never empty, never past 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    offset: ByteOffset,
    length: ByteCount,
}

/// Why a range is not an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentError {
    /// An extent of no bytes.
    #[error("extent at {0} is empty")]
    Empty(ByteOffset),
    /// The end does not fit in 64 bits.
    #[error("extent at {} of {} bytes ends past 2^64", .0, .1.0)]
    Overflow(ByteOffset, ByteCount),
}

impl Extent {
    /// The range of `length` bytes from `offset`.
    ///
    /// # Errors
    /// When it is empty or its end does not fit in 64 bits.
    pub fn new(offset: ByteOffset, length: ByteCount) -> Result<Extent, ExtentError> {
        if length.0 == 0 {
            return Err(ExtentError::Empty(offset));
        }
        if offset.checked_add(length).is_none() {
            return Err(ExtentError::Overflow(offset, length));
        }
        Ok(Extent { offset, length })
    }

    /// The first byte.
    pub fn offset(self) -> ByteOffset {
        self.offset
    }

    /// How many bytes; at least one.
    pub fn length(self) -> ByteCount {
        self.length
    }

    /// The byte after the last.
    pub fn end(self) -> ByteOffset {
        ByteOffset(self.offset.0 + self.length.0)
    }

    /// The part that both ranges hold.
    pub fn intersection(self, other: Extent) -> Option<Extent> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Extent { offset: start, length: ByteCount(end.0 - start.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent::new(ByteOffset(offset), ByteCount(length)).unwrap()
    }

    #[test]
    fn intersections() {
        assert_eq!(extent(0, 10).intersection(extent(5, 10)), Some(extent(5, 5)));
        assert_eq!(extent(0, 10).intersection(extent(10, 10)), None);
        assert_eq!(extent(0, 100).intersection(extent(5, 10)), Some(extent(5, 10)));
    }

    #[test]
    fn no_empty_and_no_endless_extents() {
        assert!(Extent::new(ByteOffset(1), ByteCount(0)).is_err());
        assert!(Extent::new(ByteOffset(u64::MAX), ByteCount(1)).is_err());
    }
}
