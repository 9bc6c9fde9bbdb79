use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read {what} id {text:?}: expected 32 hexadecimal digits")]
pub struct IdError {
    what: &'static str,
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, " {}"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let error = || IdError { what: $what, text: text.chars().take(64).collect() };
                if text.len() != 32 || !text.is_ascii() {
                    return Err(error());
                }
                let mut bytes = [0; 16];
                for (index, byte) in bytes.iter_mut().enumerate() {
                    let digits = &text[index * 2..index * 2 + 2];
                    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                        return Err(error());
                    }
                    *byte = u8::from_str_radix(digits, 16).map_err(|_| error())?;
                }
                Ok($name(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// The volumes that share one cut: by default all volumes of a machine.
    GroupId,
    "group"
);
id!(
    /// One protected disk.
    VolumeId,
    "volume"
);

/// Numbers a group's history; grows at each failover, so that the old side can be fenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Tells histories apart that have the same generation: two sides may begin a generation of the same number without knowing of each
/// other, as when a target is given back from an older copy and fails over again. Its epochs then follow by number, and not by content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HistoryId(pub u64);

impl HistoryId {
    /// Of a generation that its source began, or of which nobody knows how it began.
    pub const SOURCE: HistoryId = HistoryId(0);

    /// Of a generation that begins after this one: the same wherever it begins by the same.
    #[must_use]
    pub fn begun_by(self, what: &[u64]) -> HistoryId {
        let mixed = what.iter().fold(self.0, |before, part| {
            // The finalizer of splitmix64: every bit of what went in touches every bit of what comes out.
            let sum = (before ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            let first = (sum ^ (sum >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let second = (first ^ (first >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            second ^ (second >> 31)
        });
        HistoryId(mixed.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_their_text() {
        let id = GroupId([0xa5; 16]);
        assert_eq!(id.to_string().parse::<GroupId>().unwrap(), id);
    }

    #[test]
    fn bad_ids_are_named() {
        for bad in ["", "a5", "+5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5", "éé345678901234567890123456789012"] {
            assert!(bad.parse::<VolumeId>().unwrap_err().to_string().contains("volume id"), "{bad}");
        }
    }
}
