use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of a group's key.
pub const KEY_BYTES: usize = 32;
/// Bytes read from a key file; a longer one is refused.
const KEY_FILE_BYTES_MAX: u64 = 256;
/// Bytes that name a key in a routing header.
pub(crate) const KEY_ID_BYTES: usize = 16;

/// The secret that source and target of a group share and the process server never sees.
///
/// Wiped when dropped; printing it shows nothing.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct GroupKey([u8; KEY_BYTES]);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The text is not 64 hexadecimal digits.
    #[error("read group key: expected 64 hexadecimal digits")]
    Text,
    /// The file does not hold 64 hexadecimal digits.
    #[error("read group key {}: expected 64 hexadecimal digits and nothing else", .0.display())]
    File(PathBuf),
    /// Others may read or write the file.
    #[error("read group key {}: mode {mode:04o} lets others than its owner use it; chmod 0600 it, and make a new key if others had access", .path.display())]
    Permissions {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file cannot be read.
    #[error("read group key {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
    /// The operating system gave no random bytes.
    #[error("make group key: the operating system gives no random bytes")]
    Entropy,
}

impl GroupKey {
    /// A new key from the operating system's random source.
    ///
    /// # Errors
    /// When the operating system gives no random bytes.
    pub fn generate() -> Result<GroupKey, KeyError> {
        let mut key = GroupKey([0; KEY_BYTES]);
        fill_random(&mut key.0).map_err(|NoEntropy| KeyError::Entropy)?;
        Ok(key)
    }

    /// The key with these bytes.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> GroupKey {
        GroupKey(bytes)
    }

    /// From 64 hexadecimal digits, with or without white space around them.
    ///
    /// # Errors
    /// [`KeyError::Text`] for anything else.
    pub fn from_hex(text: &str) -> Result<GroupKey, KeyError> {
        let digits = text.trim().as_bytes();
        if digits.len() != KEY_BYTES * 2 {
            return Err(KeyError::Text);
        }
        let mut key = GroupKey([0; KEY_BYTES]);
        for (byte, pair) in key.0.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(KeyError::Text);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(key)
    }

    /// 64 hexadecimal digits, for a key file. The text is wiped when dropped.
    pub fn to_hex(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(KEY_BYTES * 2));
        for byte in self.0 {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
            }
        }
        text
    }

    /// Reads a key file: 64 hexadecimal digits in a file that only its owner can use.
    ///
    /// # Errors
    /// When the file cannot be read, others than its owner can use it, or it holds anything else.
    pub fn load(path: &Path) -> Result<GroupKey, KeyError> {
        let failed = |error| KeyError::Io(path.to_owned(), error);
        let file = std::fs::File::open(path).map_err(failed)?;
        // The mode of the open file, so that it cannot be exchanged in between.
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Permissions { path: path.to_owned(), mode });
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_FILE_BYTES_MAX as usize + 1));
        file.take(KEY_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        std::str::from_utf8(&bytes)
            .ok()
            .and_then(|text| GroupKey::from_hex(text).ok())
            .ok_or_else(|| KeyError::File(path.to_owned()))
    }

    /// A key for one purpose. `context` names the purpose, `material` what it is bound to.
    pub(crate) fn derive(&self, context: &str, material: &[u8]) -> Zeroizing<[u8; 32]> {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(&self.0).update(material);
        let key = Zeroizing::new(*hasher.finalize().as_bytes());
        hasher.zeroize();
        key
    }

    /// Names the key without telling anything else of it, so that a wrong key is told from altered bytes.
    pub(crate) fn id(&self) -> [u8; KEY_ID_BYTES] {
        *self.derive("seawall 2026 changeset key id", &[]).first_chunk().expect("16 of 32 bytes")
    }
}

impl fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupKey(secret)")
    }
}

/// The operating system gave no random bytes.
#[derive(Debug)]
pub(crate) struct NoEntropy;

pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), NoEntropy> {
    SystemRandom::new().fill(bytes).map_err(|_| NoEntropy)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_survive_their_text_and_show_nothing() {
        let key = GroupKey::generate().unwrap();
        assert!(GroupKey::from_hex(&format!(" {}\n", *key.to_hex())).unwrap() == key);
        assert!(GroupKey::generate().unwrap() != key);
        assert_eq!(format!("{key:?}"), "GroupKey(secret)");
        assert_eq!(*GroupKey::from_bytes([0xa7; 32]).to_hex(), "a7".repeat(32));
        for bad in ["", "a7", &"g0".repeat(32), &"a7".repeat(33), &"+7".repeat(32), &"é".repeat(32)] {
            assert!(matches!(GroupKey::from_hex(bad), Err(KeyError::Text)), "{bad}");
        }
    }

    #[test]
    fn key_files_that_others_can_use_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("group.key");
        let key = GroupKey::generate().unwrap();
        let write = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        assert!(matches!(GroupKey::load(&path), Err(KeyError::Io(..))));
        write(&key.to_hex(), 0o600);
        assert!(GroupKey::load(&path).unwrap() == key);
        for mode in [0o640, 0o604, 0o620, 0o601] {
            write(&key.to_hex(), mode);
            let error = GroupKey::load(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {mode:04o}")) && error.contains("group.key"), "{error}");
        }
        for text in ["", "short", &"ab".repeat(1000)] {
            write(text, 0o600);
            assert!(matches!(GroupKey::load(&path), Err(KeyError::File(_))), "{text}");
        }
    }
}
