//! Certificates that are not believed any more, though they are valid: a file beside the own credentials, which whoever
//! hears of a revocation replaces. It is read again when it has changed, so nobody need be told.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::credentials::CredentialsError;

/// The file with the serial numbers, in the directory of the credentials. Without it nothing is revoked.
pub const REVOKED_FILE: &str = "revoked";
/// Certificates that the file may name. A list of more is refused.
pub const REVOKED_MAX: usize = 100_000;
/// The longest serial number, in bytes, as RFC 5280 has it.
pub const SERIAL_BYTES_MAX: usize = 20;

const FIRST_LINE: &str = "seawall revoked 1";

/// A certificate's number, given by the authority.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial(String);

impl Serial {
    /// Of the number's bytes, without leading zeroes.
    pub fn from_bytes(bytes: &[u8]) -> Serial {
        let start = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
        Serial(bytes[start..].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Of lower-case hexadecimal digits, as [`Serial::as_str`] gives them.
    pub fn from_hex(text: &str) -> Option<Serial> {
        let digits = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let good =
            digits && !text.is_empty() && text.len().is_multiple_of(2) && text.len() <= 2 * SERIAL_BYTES_MAX;
        (good && !text.starts_with("00")).then(|| Serial(text.to_owned()))
    }

    /// Hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text of [`REVOKED_FILE`]. Its last line counts the others, so that a part of it is not taken for all.
pub fn revoked_text<'a>(serials: impl IntoIterator<Item = &'a Serial>) -> String {
    let mut lines: Vec<&str> = serials.into_iter().map(Serial::as_str).collect();
    lines.sort_unstable();
    lines.dedup();
    let mut text = format!("{FIRST_LINE}\n");
    for line in &lines {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&format!("end {}\n", lines.len()));
    text
}

pub(crate) fn parse(text: &str) -> Result<HashSet<Serial>, String> {
    let mut lines = text.lines();
    if lines.next() != Some(FIRST_LINE) {
        return Err(format!("its first line is not {FIRST_LINE:?}"));
    }
    let mut serials = HashSet::new();
    for line in lines.by_ref() {
        if let Some(count) = line.strip_prefix("end ") {
            let whole = count == serials.len().to_string() && lines.next().is_none();
            return if whole {
                Ok(serials)
            } else {
                Err("its last line does not count the others".to_owned())
            };
        }
        let serial = Serial::from_hex(line).ok_or_else(|| format!("{line:?} is no serial number"))?;
        if serials.len() == REVOKED_MAX {
            return Err(format!("it names more than {REVOKED_MAX} certificates"));
        }
        serials.insert(serial);
    }
    Err("its last line is missing".to_owned())
}

/// What the file said when it was last read, and of when it was.
#[derive(Debug, Default)]
struct Seen {
    file: Option<(SystemTime, u64)>,
    serials: HashSet<Serial>,
}

/// The certificates that are revoked now.
#[derive(Debug)]
pub struct Revocations {
    path: PathBuf,
    seen: Mutex<Seen>,
}

impl Revocations {
    /// Those of the credentials in `dir`.
    ///
    /// # Errors
    /// When there is a file that cannot be read: to believe everybody then would undo revocations.
    pub fn load(dir: &Path) -> Result<Revocations, CredentialsError> {
        let revocations = Revocations { path: dir.join(REVOKED_FILE), seen: Mutex::default() };
        revocations.refresh()?;
        Ok(revocations)
    }

    fn refresh(&self) -> Result<(), CredentialsError> {
        let error = |source| CredentialsError::Read { path: self.path.clone(), source };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match std::fs::metadata(&self.path) {
            Ok(metadata) => Some((metadata.modified().map_err(error)?, metadata.len())),
            Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(error(source)),
        };
        if file == seen.file {
            return Ok(());
        }
        let serials = match file {
            None => HashSet::new(),
            Some((_, length)) if length > (REVOKED_MAX as u64 + 2) * 64 => {
                let reason = format!("{length} bytes are more than {REVOKED_MAX} certificates can take");
                return Err(CredentialsError::Invalid { path: self.path.clone(), reason });
            }
            Some(_) => {
                let text = std::fs::read_to_string(&self.path).map_err(error)?;
                parse(&text)
                    .map_err(|reason| CredentialsError::Invalid { path: self.path.clone(), reason })?
            }
        };
        *seen = Seen { file, serials };
        Ok(())
    }

    /// Whether it is revoked now. When the file cannot be read, everybody counts as revoked.
    pub fn contains(&self, serial: &Serial) -> bool {
        if let Err(error) = self.refresh() {
            tracing::error!(%error, "look whether a certificate is revoked; nobody is believed until this is mended");
            return true;
        }
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).serials.contains(serial)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serial(text: &str) -> Serial {
        Serial::from_hex(text).unwrap()
    }

    #[test]
    fn a_changed_file_is_noticed_and_a_damaged_one_believes_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(REVOKED_FILE);
        let revocations = Revocations::load(dir.path()).unwrap();
        assert!(!revocations.contains(&serial("0a")));
        std::fs::write(&path, revoked_text([&serial("0a"), &serial("ff01"), &serial("0a")])).unwrap();
        assert!(revocations.contains(&serial("0a")) && revocations.contains(&serial("ff01")));
        assert!(!revocations.contains(&serial("0b")));
        let whole = revoked_text([&serial("0a"), &serial("ff01")]);
        for length in 0..whole.len() - 1 {
            assert!(parse(&whole[..length]).is_err(), "{length}");
        }
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert!(revocations.contains(&serial("0b")));
        assert!(Revocations::load(dir.path()).unwrap_err().to_string().contains("revoked"));
        std::fs::remove_file(&path).unwrap();
        assert!(!revocations.contains(&serial("0a")));
    }

    #[test]
    fn serial_numbers_have_one_text() {
        assert_eq!(Serial::from_bytes(&[0, 0, 10, 255]), serial("0aff"));
        for bad in ["", "0", "0A", "zz", "000a", &"11".repeat(21)] {
            assert_eq!(Serial::from_hex(bad), None, "{bad}");
        }
    }
}
