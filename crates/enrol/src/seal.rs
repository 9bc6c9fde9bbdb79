//! Giving a group's key from the agent, which makes it, to a target, so that nobody between them can read it: the agent seals
//! it for the target's public key (X25519, XSalsa20-Poly1305: libsodium's sealed box), and the config server carries what it
//! cannot open.
//!
//! This keeps keys out of the config server's database and its backups. It does not keep out a config server that lies about
//! which public key is the target's: the authority that says who is a target lives there as well.

use std::path::Path;

use block::GroupId;
use crypto_box::aead::OsRng;
use crypto_box::{PublicKey, SecretKey};
use durable::{OpenMode, RealStorage, Storage};
use zeroize::Zeroizing;

use crate::EnrolError;
use crate::error::file;

/// The file with a target's secret key.
const KEY_FILE: &str = "sealing.key";
const KEY_BYTES: usize = 32;
/// What is sealed: the group, so that a box of one group is not taken for another's, and its key.
const SEALED_BYTES: usize = 16 + KEY_BYTES;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    // A sign is none of its digits, though numbers may have one.
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pairs = text.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> =
        pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
    bytes.map(Zeroizing::new)
}

/// A target's pair of keys.
pub struct Opener {
    secret: SecretKey,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener")
    }
}

impl Opener {
    /// The pair that is kept in `dir`; made when there is none.
    ///
    /// # Errors
    /// When the file is damaged, or cannot be read or written. A damaged one is not replaced: what was sealed for it could
    /// never be opened.
    pub fn open(dir: &Path) -> Result<Opener, EnrolError> {
        let path = dir.join(KEY_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let text = Zeroizing::new(text);
                let bytes =
                    unhex(text.trim()).and_then(|bytes| <[u8; KEY_BYTES]>::try_from(bytes.as_slice()).ok());
                let bytes = bytes.ok_or_else(|| {
                    EnrolError::Credentials(format!("read the sealing key {}: it is damaged", path.display()))
                })?;
                Ok(Opener { secret: SecretKey::from(bytes) })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let secret = SecretKey::generate(&mut OsRng);
                let text = Zeroizing::new(format!("{}\n", hex(&secret.to_bytes())));
                let write = || {
                    let file = RealStorage.open(&path, OpenMode::CreateNew)?;
                    file.write_all_at(text.as_bytes(), 0)?;
                    file.sync_data()?;
                    RealStorage.sync_dir(dir)
                };
                write().map_err(file("write the sealing key", &path))?;
                Ok(Opener { secret })
            }
            Err(source) => Err(file("read the sealing key", &path)(source)),
        }
    }

    /// What others seal for (hexadecimal).
    pub fn public_key(&self) -> String {
        hex(self.secret.public_key().as_bytes())
    }

    /// The key (hexadecimal) of a group that was sealed for this pair.
    ///
    /// # Errors
    /// When it was sealed for another pair or another group, or was changed.
    pub fn open_key(&self, group: GroupId, sealed: &str) -> Result<Zeroizing<String>, EnrolError> {
        let refuse = |why: &str| {
            EnrolError::Credentials(format!(
                "open the key of group {group}: {why}; protect the machine again"
            ))
        };
        let sealed = unhex(sealed).ok_or_else(|| refuse("it is not hexadecimal"))?;
        let opened = self
            .secret
            .unseal(&sealed)
            .map_err(|_| refuse("it was sealed for another target, or changed"))?;
        let opened = Zeroizing::new(opened);
        if opened.len() != SEALED_BYTES || opened[..16] != group.0 {
            return Err(refuse("it is of another group"));
        }
        Ok(Zeroizing::new(hex(&opened[16..])))
    }
}

/// Seals a group's key (hexadecimal) for a target's public key (hexadecimal).
///
/// # Errors
/// When either is not what it should be.
pub fn seal_key(group: GroupId, key: &str, for_target: &str) -> Result<String, EnrolError> {
    let wrong = |what: &str| EnrolError::Credentials(format!("seal the key of group {group}: {what}"));
    let key =
        unhex(key.trim()).filter(|key| key.len() == KEY_BYTES).ok_or_else(|| wrong("the key is not one"))?;
    let public = unhex(for_target).and_then(|bytes| <[u8; KEY_BYTES]>::try_from(bytes.as_slice()).ok());
    let public = PublicKey::from(public.ok_or_else(|| wrong("the target's public key is not one"))?);
    let mut plain = Zeroizing::new(Vec::with_capacity(SEALED_BYTES));
    plain.extend_from_slice(&group.0);
    plain.extend_from_slice(&key);
    let sealed =
        public.seal(&mut OsRng, &plain).map_err(|_| wrong("the target's public key cannot be used"))?;
    Ok(hex(&sealed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_target_can_open_it_and_only_for_the_group() {
        let dir = tempfile::tempdir().unwrap();
        let target = Opener::open(dir.path()).unwrap();
        let (group, key) = (GroupId([7; 16]), "5a".repeat(32));
        let sealed = seal_key(group, &key, &target.public_key()).unwrap();
        assert!(!sealed.contains(&key));
        // Found by fuzzing: a sign was taken for a digit.
        crate::fuzzing::texts(include_bytes!("../../../fuzz/regressions/enrol-texts/sign-in-hexadecimal"));
        assert!(unhex("+a").is_none() && unhex("0a").is_some());
        // The pair is the same after a restart.
        let again = Opener::open(dir.path()).unwrap();
        assert_eq!(*again.open_key(group, &sealed).unwrap(), key);
        assert!(again.open_key(GroupId([8; 16]), &sealed).is_err());
        let other_dir = tempfile::tempdir().unwrap();
        assert!(Opener::open(other_dir.path()).unwrap().open_key(group, &sealed).is_err());
        for place in [0, sealed.len() / 2, sealed.len() - 1] {
            let mut changed = sealed.clone().into_bytes();
            changed[place] = if changed[place] == b'0' { b'1' } else { b'0' };
            assert!(target.open_key(group, std::str::from_utf8(&changed).unwrap()).is_err());
        }
        for bad in ["", "0", "zz", &"00".repeat(20)] {
            assert!(target.open_key(group, bad).is_err());
        }
        assert!(seal_key(group, "00", &target.public_key()).is_err());
        assert!(seal_key(group, &key, "00").is_err());
    }

    #[test]
    fn a_damaged_pair_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(KEY_FILE), "00").unwrap();
        assert!(Opener::open(dir.path()).unwrap_err().to_string().contains("damaged"));
        assert_eq!(std::fs::read(dir.path().join(KEY_FILE)).unwrap(), b"00");
    }
}
