use std::fmt;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The kernel's sector: 512 bytes whatever the disk's logical block size is.
pub const SECTOR_BYTES: u64 = 512;
/// The unit on which an epoch is folded: the last write to a block wins.
pub const BLOCK_BYTES: u64 = 4096;
/// The dirty bitmap's unit.
pub const GRANULE_BYTES: u64 = 64 * 1024;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The bare number, for arithmetic at the edge of a format or a system call.
            pub const fn get(self) -> u64 {
                self.0
            }
        }
    };
}

unit!(
    /// A distance from the start of a volume or file, in bytes.
    ByteOffset
);
unit!(
    /// A length, in bytes.
    ByteCount
);
unit!(
    /// A position on a disk in 512-byte sectors, as the kernel's block layer counts.
    Sector
);
unit!(
    /// The index of a 4 KiB block of a volume.
    BlockIndex
);
unit!(
    /// The index of a 64 KiB granule of a volume.
    Granule
);

impl ByteOffset {
    /// The offset `length` further on; `None` when it does not fit in 64 bits.
    pub const fn checked_add(self, length: ByteCount) -> Option<ByteOffset> {
        match self.0.checked_add(length.0) {
            Some(sum) => Some(ByteOffset(sum)),
            None => None,
        }
    }

    /// The block that holds this byte.
    pub const fn block(self) -> BlockIndex {
        BlockIndex(self.0 / BLOCK_BYTES)
    }

    /// The granule that holds this byte.
    pub const fn granule(self) -> Granule {
        Granule(self.0 / GRANULE_BYTES)
    }
}

impl ByteCount {
    /// Nothing.
    pub const ZERO: ByteCount = ByteCount(0);

    /// `n` KiB.
    pub const fn kib(n: u64) -> ByteCount {
        ByteCount(n << 10)
    }

    /// `n` MiB.
    pub const fn mib(n: u64) -> ByteCount {
        ByteCount(n << 20)
    }

    /// `n` GiB.
    pub const fn gib(n: u64) -> ByteCount {
        ByteCount(n << 30)
    }

    /// The sum, or the largest count when it does not fit.
    pub const fn saturating_add(self, other: ByteCount) -> ByteCount {
        ByteCount(self.0.saturating_add(other.0))
    }

    /// The difference, or zero when `other` is larger.
    pub const fn saturating_sub(self, other: ByteCount) -> ByteCount {
        ByteCount(self.0.saturating_sub(other.0))
    }

    /// How many granules a volume of this size has; the last may be short.
    pub const fn granules(self) -> u64 {
        self.0.div_ceil(GRANULE_BYTES)
    }
}

impl Sector {
    /// The byte offset of the sector's first byte.
    ///
    /// # Panics
    /// Never for a sector a kernel can name (below 2^55).
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * SECTOR_BYTES)
    }
}

impl BlockIndex {
    /// The byte offset of the block's first byte.
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * BLOCK_BYTES)
    }
}

impl Granule {
    /// The byte offset of the granule's first byte.
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * GRANULE_BYTES)
    }
}

impl Add for ByteCount {
    type Output = ByteCount;
    fn add(self, other: ByteCount) -> ByteCount {
        ByteCount(self.0 + other.0)
    }
}

impl AddAssign for ByteCount {
    fn add_assign(&mut self, other: ByteCount) {
        self.0 += other.0;
    }
}

impl Sub for ByteCount {
    type Output = ByteCount;
    fn sub(self, other: ByteCount) -> ByteCount {
        ByteCount(self.0 - other.0)
    }
}

impl std::iter::Sum for ByteCount {
    fn sum<I: Iterator<Item = ByteCount>>(items: I) -> ByteCount {
        items.fold(ByteCount::ZERO, |total, item| total + item)
    }
}

impl fmt::Display for ByteCount {
    /// Binary units with one decimal: `512 B`, `1.5 MiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1023.95 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        write!(f, "{value:.1} {}", UNITS[unit])
    }
}

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read size {0:?}: expected a number and a unit, such as 4096, 512KiB, 128MiB or 10GiB")]
pub struct SizeError(String);

impl FromStr for ByteCount {
    type Err = SizeError;

    /// Whole numbers of bytes, KiB, MiB, GiB or TiB; as configuration files write sizes.
    fn from_str(text: &str) -> Result<ByteCount, SizeError> {
        let error = || SizeError(text.chars().take(64).collect());
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim() {
            "" | "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return Err(error()),
        };
        let number: u64 = number.parse().map_err(|_| error())?;
        number.checked_mul(1 << shift).map(ByteCount).ok_or_else(error)
    }
}

/// Reads a size from a configuration file: `#[serde(deserialize_with = "block::size_from_text")]`.
///
/// # Errors
/// When the value is not a text that [`ByteCount::from_str`] takes.
pub fn size_from_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ByteCount, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_read_in_binary_units() {
        assert_eq!(ByteCount(1023).to_string(), "1023 B");
        assert_eq!(ByteCount::kib(1).to_string(), "1.0 KiB");
        assert_eq!(ByteCount((1 << 20) - 1).to_string(), "1.0 MiB");
        assert_eq!(ByteCount(1_610_612_736).to_string(), "1.5 GiB");
        assert_eq!(ByteCount(u64::MAX).to_string(), "16.0 EiB");
    }

    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!("4096".parse(), Ok(ByteCount(4096)));
        assert_eq!("128MiB".parse(), Ok(ByteCount::mib(128)));
        assert_eq!("1 TiB".parse(), Ok(ByteCount::gib(1024)));
        for bad in ["", "MiB", "-1", "1.5GiB", "1MB", "99999999TiB"] {
            assert!(bad.parse::<ByteCount>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_short_last_granule_counts() {
        assert_eq!(ByteCount(0).granules(), 0);
        assert_eq!(ByteCount(1).granules(), 1);
        assert_eq!(ByteCount(GRANULE_BYTES).granules(), 1);
        assert_eq!(ByteCount(GRANULE_BYTES + 512).granules(), 2);
    }
}
