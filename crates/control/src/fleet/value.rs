use std::fmt;
use std::str::FromStr;

use block::UnixNanos;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

/// An instant in milliseconds since 1970-01-01 UTC: what browsers count in, and exact in JSON.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// The machine's clock.
    pub fn now() -> UnixMillis {
        UnixNanos::now().into()
    }

    /// So much later.
    #[must_use]
    pub fn plus(self, time: std::time::Duration) -> UnixMillis {
        UnixMillis(self.0.saturating_add(i64::try_from(time.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long after `earlier`, in milliseconds; negative when before.
    pub fn since(self, earlier: UnixMillis) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl From<UnixNanos> for UnixMillis {
    fn from(time: UnixNanos) -> UnixMillis {
        UnixMillis(i64::try_from(time.0 / 1_000_000).unwrap_or(i64::MAX))
    }
}

/// The longest name of a machine, user, policy or token, in bytes. A longer one is refused.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a text is no name or id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameError {
    text: String,
    expected: &'static str,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not {}", self.text, self.expected)
    }
}

impl std::error::Error for NameError {}

macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $expected:literal, $pattern:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ToSchema)]
        #[schema(value_type = String, pattern = $pattern)]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                match valid(text) {
                    true => Ok($name(text.to_owned())),
                    false => {
                        Err(NameError { text: text.chars().take(80).collect(), expected: $expected })
                    }
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

text!(
    /// What the config server calls a resource: 32 hexadecimal digits.
    ResourceId,
    "an id: 32 hexadecimal digits",
    "^[0-9a-f]{32}$",
    |text| text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
);

text!(
    /// What people call a machine, user, policy or token.
    Name,
    "a name: 1 to 64 letters, digits, dots, underscores and hyphens, the first a letter or digit",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    |text| text.len() <= NAME_BYTES_MAX
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
);

impl ResourceId {
    /// Of 16 random bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> ResourceId {
        ResourceId(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_what_they_say() {
        for bad in ["", ".hidden", "-x", "a b", "ä", &"x".repeat(65), "a/b"] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
        assert_eq!("web-1.example".parse::<Name>().unwrap().as_str(), "web-1.example");
        assert!("AB".repeat(16).parse::<ResourceId>().is_err());
        assert_eq!(ResourceId::from_bytes([0xab; 16]).as_str(), "ab".repeat(16));
        let error = serde_json::from_str::<Name>("\"a b\"").unwrap_err().to_string();
        assert!(error.contains("letters, digits"), "{error}");
    }
}
