use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use wire::{FINGERPRINT_BYTES, WebTrust, fingerprint};

/// SHA-256 of an authority's certificate: by what a config server is known to whoever has not the certificate itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; FINGERPRINT_BYTES]);

/// A text that is no fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "use the fingerprint {0:?}: expected 64 hexadecimal digits, as `seawall-config-server check-config` prints them"
)]
pub struct FingerprintError(String);

impl Fingerprint {
    /// Of an authority's certificate (the first of the PEM text).
    ///
    /// # Errors
    /// When there is none.
    pub fn of_pem(pem: &str) -> Result<Fingerprint, String> {
        fingerprint(pem).map(Fingerprint)
    }

    /// Believes servers of this authority.
    pub const fn trust(self) -> WebTrust {
        WebTrust::Fingerprint(self.0)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;
    fn from_str(text: &str) -> Result<Fingerprint, FingerprintError> {
        let error = || FingerprintError(text.chars().take(200).collect());
        // A sign is none of its digits, though numbers may have one.
        if text.len() != 2 * FINGERPRINT_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(error());
        }
        let mut bytes = [0; FINGERPRINT_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| error())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
        }
        Ok(Fingerprint(bytes))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_strictly() {
        let text = "0aF".repeat(21) + "9";
        let read: Fingerprint = text.parse().unwrap();
        assert_eq!((read.0[0], read.to_string()), (0x0a, text.to_lowercase()));
        for bad in
            ["", &text[1..], &"+f".repeat(32), &"xy".repeat(32), &"ää".repeat(16), &(text.clone() + "0")]
        {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
