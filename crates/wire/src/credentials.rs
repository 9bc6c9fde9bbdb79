use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::UnixNanos;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::identity::{Identity, IdentityError};
use crate::revoked::{Revocations, Serial};
use crate::tls;

/// The authority's certificate.
pub const CA_FILE: &str = "ca.pem";
/// The own certificate.
pub const CERT_FILE: &str = "cert.pem";
/// The own private key, readable by its owner only.
pub const KEY_FILE: &str = "key.pem";
/// The largest file of these, in bytes. A larger one is refused unread.
pub const CREDENTIAL_BYTES_MAX: u64 = 64 * 1024;

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("read credentials {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The key can be read by others.
    #[error("read private key {path}: mode {mode:04o} lets others read it; run: chmod 600 {path}")]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The file is there, but is not what it should be.
    #[error("read credentials {path}: {reason}")]
    Invalid {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The certificate's time is over, or has not come.
    #[error(
        "use certificate {path}: {when}; check this machine's clock, else issue a new one with `seawall init`"
    )]
    Expired {
        /// Which.
        path: PathBuf,
        /// When it was valid.
        when: String,
    },
}

/// An identity with what proves it, and the authority that others must prove theirs by.
#[derive(Clone)]
pub struct Credentials {
    identity: Identity,
    expires: UnixNanos,
    serial: Serial,
    revocations: Arc<Revocations>,
    pub(crate) authority: Vec<CertificateDer<'static>>,
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: Arc<PrivateKeyDer<'static>>,
    pub(crate) client: Arc<rustls::ClientConfig>,
    pub(crate) server: Arc<rustls::ServerConfig>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials of {}", self.identity)
    }
}

impl Credentials {
    /// Reads [`CA_FILE`], [`CERT_FILE`] and [`KEY_FILE`] of `dir`.
    ///
    /// # Errors
    /// When one is missing or damaged, others may read the key, or the certificate is not valid now.
    pub fn load(dir: &Path) -> Result<Credentials, CredentialsError> {
        let credentials = Credentials::load_expired(dir)?;
        let path = dir.join(CERT_FILE);
        let der = certificates(&path)?;
        let certificate =
            parse(&der[0]).map_err(|reason| CredentialsError::Invalid { path: path.clone(), reason })?;
        let validity = certificate.validity();
        if !validity.is_valid() {
            let when = format!("it is valid from {} to {} only", validity.not_before, validity.not_after);
            return Err(CredentialsError::Expired { path, when });
        }
        Ok(credentials)
    }

    /// As [`Credentials::load`], without looking at the time.
    pub(crate) fn load_expired(dir: &Path) -> Result<Credentials, CredentialsError> {
        let authority = certificates(&dir.join(CA_FILE))?;
        let path = dir.join(CERT_FILE);
        let chain = certificates(&path)?;
        let invalid = |reason: String| CredentialsError::Invalid { path: path.clone(), reason };
        let (identity, expires) = {
            let certificate = parse(&chain[0]).map_err(invalid)?;
            let seconds = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
            (identity_of(&chain[0]).map_err(invalid)?, UnixNanos(seconds.saturating_mul(1_000_000_000)))
        };
        let key_path = dir.join(KEY_FILE);
        let key = PrivateKeyDer::from_pem_slice(read_private(&key_path)?.as_bytes())
            .map_err(|error| CredentialsError::Invalid { path: key_path, reason: error.to_string() })?;
        let serial = serial_of(&chain[0]).map_err(invalid)?;
        let (client, server) = tls::configs(&authority, chain.clone(), key.clone_key())
            .map_err(|reason| CredentialsError::Invalid { path: dir.to_owned(), reason })?;
        Ok(Credentials {
            identity,
            expires,
            serial,
            revocations: Arc::new(Revocations::load(dir)?),
            authority,
            chain,
            key: Arc::new(key),
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// Who these credentials prove.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The own certificate's number.
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// Whether a certificate is not believed any more.
    pub fn revoked(&self, serial: &Serial) -> bool {
        self.revocations.contains(serial)
    }

    pub(crate) fn revocations(&self) -> Arc<Revocations> {
        self.revocations.clone()
    }

    /// When the certificate stops being valid.
    pub fn expires(&self) -> UnixNanos {
        self.expires
    }
}

/// Who a certificate names. The chain must have been verified before this is believed.
pub(crate) fn identity_of(der: &CertificateDer<'_>) -> Result<Identity, String> {
    let certificate = parse(der)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| format!("the alternative names cannot be read: {error}"))?
        .ok_or("the certificate has no alternative names")?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or("the certificate names no identity")?;
    if uris.next().is_some() {
        return Err("the certificate names more than one identity".to_owned());
    }
    Identity::from_uri(uri).map_err(|error: IdentityError| error.to_string())
}

/// The number of a certificate.
pub(crate) fn serial_of(der: &CertificateDer<'_>) -> Result<Serial, String> {
    let certificate = parse(der)?;
    Ok(Serial::from_bytes(certificate.raw_serial()))
}

/// Reads a private file of text.
///
/// # Errors
/// When it cannot be read, or others may.
pub(crate) fn read_private(path: &Path) -> Result<String, CredentialsError> {
    let error = |source| CredentialsError::Read { path: path.to_owned(), source };
    let mut file = std::fs::File::open(path).map_err(error)?;
    let mode = file.metadata().map_err(error)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(CredentialsError::Exposed { path: path.to_owned(), mode });
    }
    read_text(&mut file, path)
}

fn read_text(file: &mut std::fs::File, path: &Path) -> Result<String, CredentialsError> {
    let mut text = String::new();
    file.take(CREDENTIAL_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|source| CredentialsError::Read { path: path.to_owned(), source })?;
    if text.len() as u64 > CREDENTIAL_BYTES_MAX {
        let reason = format!("larger than {CREDENTIAL_BYTES_MAX} bytes");
        return Err(CredentialsError::Invalid { path: path.to_owned(), reason });
    }
    Ok(text)
}

/// The certificates of a PEM file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let mut file = std::fs::File::open(path)
        .map_err(|source| CredentialsError::Read { path: path.to_owned(), source })?;
    let text = read_text(&mut file, path)?;
    let invalid = |reason| CredentialsError::Invalid { path: path.to_owned(), reason };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let found = found.map_err(|error| invalid(error.to_string()))?;
    if found.is_empty() { Err(invalid("no certificate in it".to_owned())) } else { Ok(found) }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|error| format!("not a certificate: {error}"))?;
    if rest.is_empty() { Ok(certificate) } else { Err("bytes after the certificate".to_owned()) }
}
