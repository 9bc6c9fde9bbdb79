//! Secrets: made at random, kept as digests; passwords kept with argon2id.

use std::sync::OnceLock;

use argon2::{Algorithm, Argon2, Params, Version};
use control::fleet::ResourceId;
use ring::rand::{SecureRandom, SystemRandom};

/// The shortest and the longest password, in bytes.
pub(crate) const PASSWORD_BYTES: std::ops::RangeInclusive<usize> = 12..=1024;
/// Memory of one password's check, in KiB (OWASP's figures for argon2id, with one pass more).
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 3;
const HASH_BYTES: usize = 32;
const SALT_BYTES: usize = 16;

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system has randomness");
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// A new id.
pub(crate) fn new_id() -> ResourceId {
    ResourceId::from_bytes(random())
}

/// A new secret of 256 bits, as text.
pub(crate) fn new_secret() -> String {
    hex(&random::<32>())
}

/// A password for a person to type, of 100 bits: letters and digits that are not mistaken for each other.
pub fn new_password() -> String {
    const LETTERS: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz123456789";
    let letters = random::<20>().map(|byte| char::from(LETTERS[usize::from(byte % 32)]));
    let groups: Vec<String> = letters.chunks(5).map(|group| group.iter().collect()).collect();
    groups.join("-")
}

/// What is kept of a secret. Secrets are random, so one fast hash is enough.
pub(crate) fn digest(secret: &str) -> String {
    hex(&blake3::derive_key("seawall 2026 config server secret", secret.as_bytes()))
}

/// Whether two texts are the same, in a time that does not tell where they differ.
pub(crate) fn same(a: &str, b: &str) -> bool {
    let differ = a.bytes().zip(b.bytes()).fold(0, |differ, (a, b)| differ | (a ^ b));
    a.len() == b.len() && differ == 0
}

fn argon2id() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, Some(HASH_BYTES)).expect("the figures are in range");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// What is kept of a password: `argon2id$MEMORY$PASSES$SALT$HASH`. Takes tens of milliseconds; not for async tasks.
pub(crate) fn hash_password(password: &str) -> String {
    let salt = random::<SALT_BYTES>();
    let mut hash = [0; HASH_BYTES];
    argon2id().hash_password_into(password.as_bytes(), &salt, &mut hash).expect("the figures are in range");
    format!("argon2id${MEMORY_KIB}${PASSES}${}${}", hex(&salt), hex(&hash))
}

/// Whether it is the password. Without something kept it takes as long, and is not. Not for async tasks.
pub(crate) fn is_password(password: &str, kept: Option<&str>) -> bool {
    static NOBODY: OnceLock<String> = OnceLock::new();
    let against = kept.unwrap_or_else(|| NOBODY.get_or_init(|| hash_password(&new_secret())));
    let check = || -> Option<bool> {
        let mut parts = against.split('$');
        if parts.next()? != "argon2id" {
            return None;
        }
        let memory = parts.next()?.parse().ok()?;
        let passes = parts.next()?.parse().ok()?;
        let (salt, hash) = (unhex(parts.next()?)?, parts.next()?);
        let params = Params::new(memory, passes, 1, Some(HASH_BYTES)).ok()?;
        let mut found = [0; HASH_BYTES];
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        argon2.hash_password_into(password.as_bytes(), &salt, &mut found).ok()?;
        Some(same(&hex(&found), hash))
    };
    let is = check();
    if is.is_none() {
        tracing::error!("a password in the store is damaged; an administrator must give a new one");
    }
    kept.is_some() && is == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_kept_so_that_only_they_fit() {
        let kept = hash_password("correct horse");
        assert!(is_password("correct horse", Some(&kept)));
        assert!(!is_password("correct horsf", Some(&kept)));
        assert!(!is_password("correct horse", None));
        assert!(!is_password("correct horse", Some("argon2id$x")));
        assert_ne!(kept, hash_password("correct horse"));
        assert!(!kept.contains("correct"));
    }

    #[test]
    fn secrets_are_compared_whole() {
        assert!(same("abc", "abc"));
        for other in ["abd", "ab", "abcd", ""] {
            assert!(!same("abc", other));
        }
        assert_ne!(new_secret(), new_secret());
        assert_ne!(digest("a"), digest("b"));
    }
}
