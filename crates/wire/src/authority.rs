//! The local certificate authority: it decides who takes part. Its key never leaves its directory and is needed only
//! to issue; keep it off the servers.
//!
//! Crash consistency: files are created, never overwritten; a creation that is cut short leaves files that a second
//! attempt names and refuses to touch.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::UnixNanos;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use ring::rand::SecureRandom;

use crate::credentials::{CA_FILE, CERT_FILE, CredentialsError, KEY_FILE, read_private};
use crate::identity::Identity;
use crate::revoked::Serial;

/// How long an authority is valid, in days. Past it every identity it issued is refused.
pub const AUTHORITY_DAYS: u64 = 20 * 365;
/// How long an identity is valid, in days. Past it the peer is refused until a new one is issued.
pub const IDENTITY_DAYS: u64 = 5 * 365;
/// Bytes of a certificate's number, all random.
const SERIAL_BYTES: usize = 16;
/// How far validity begins in the past, so that a peer whose clock is behind accepts a new certificate.
pub const BACKDATED_DAYS: u64 = 2;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

// An instant so long after 1970, in the type that rcgen takes. A macro, because that type belongs to a crate that is
// not otherwise needed.
macro_rules! date {
    ($since:expr) => {
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs($since.as_secs())
    };
}

/// Why an authority could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file could not be read, or one that is there already would have been overwritten.
    #[error("{action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The authority's own files cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// A key or certificate could not be made.
    #[error("{action}: {source}")]
    Certificate {
        /// What was tried.
        action: &'static str,
        /// What the library said.
        source: rcgen::Error,
    },
}

/// Issues identities.
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// Makes a new authority in `dir` (`ca.pem`, and `key.pem` with mode 0600), with a new ECDSA P-256 key.
    ///
    /// # Errors
    /// When a file is there already, or cannot be written.
    pub fn create(dir: &Path) -> Result<Authority, AuthorityError> {
        create_dir(dir)?;
        let key = new_key()?;
        let mut params = authority_params();
        let now = Duration::from_nanos(UnixNanos::now().0);
        params.not_before = date!(now.saturating_sub(DAY * BACKDATED_DAYS as u32));
        params.not_after = date!(now + DAY * AUTHORITY_DAYS as u32);
        let certificate = params.self_signed(&key).map_err(|source| AuthorityError::Certificate {
            action: "sign the authority's certificate",
            source,
        })?;
        let certificate_pem = certificate.pem();
        // The key first: a certificate without its key would look like an authority that works.
        write_new(&dir.join(KEY_FILE), key.serialize_pem().as_bytes(), 0o600)?;
        write_new(&dir.join(CA_FILE), certificate_pem.as_bytes(), 0o644)?;
        sync_dir(dir)?;
        Ok(Authority { certificate_pem, issuer: Issuer::new(authority_params(), key) })
    }

    /// Opens the authority that [`Authority::create`] made in `dir`.
    ///
    /// # Errors
    /// When a file is missing or damaged, or others may read the key.
    pub fn load(dir: &Path) -> Result<Authority, AuthorityError> {
        let path = dir.join(CA_FILE);
        let certificate_pem = std::fs::read_to_string(&path).map_err(|source| AuthorityError::File {
            action: "read the authority's certificate",
            path,
            source,
        })?;
        let key = KeyPair::from_pem(&read_private(&dir.join(KEY_FILE))?)
            .map_err(|source| AuthorityError::Certificate { action: "read the authority's key", source })?;
        Ok(Authority { certificate_pem, issuer: Issuer::new(authority_params(), key) })
    }

    /// Issues a certificate and a new key for `identity` in `dir`: `ca.pem`, `cert.pem`, and `key.pem` with mode 0600.
    ///
    /// # Errors
    /// When a file is there already, or cannot be written.
    pub fn issue(&self, identity: &Identity, dir: &Path) -> Result<(), AuthorityError> {
        let now = Duration::from_nanos(UnixNanos::now().0);
        let from = now.saturating_sub(DAY * BACKDATED_DAYS as u32);
        self.issue_between(identity, dir, from, now + DAY * IDENTITY_DAYS as u32)
    }

    pub(crate) fn issue_between(
        &self,
        identity: &Identity,
        dir: &Path,
        from: Duration,
        until: Duration,
    ) -> Result<(), AuthorityError> {
        create_dir(dir)?;
        let error = |source| AuthorityError::Certificate { action: "sign a certificate", source };
        let key = new_key()?;
        let (params, _) = params(identity, &ServerNames::default(), from, until).map_err(error)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(error)?;
        write_new(&dir.join(KEY_FILE), key.serialize_pem().as_bytes(), 0o600)?;
        write_new(&dir.join(CERT_FILE), certificate.pem().as_bytes(), 0o644)?;
        write_new(&dir.join(CA_FILE), self.certificate_pem.as_bytes(), 0o644)?;
        sync_dir(dir)
    }

    /// Signs the key of a request (PEM) for `identity`; nothing else of the request is believed. The request proves that
    /// whoever made it has the key.
    ///
    /// # Errors
    /// When the request is none, or is not signed by its key.
    pub fn sign(
        &self,
        request: &str,
        identity: &Identity,
        names: &ServerNames,
        valid: Duration,
    ) -> Result<Signed, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(request).map_err(|source| {
            AuthorityError::Certificate { action: "read the request for a certificate", source }
        })?;
        let error = |source| AuthorityError::Certificate { action: "sign a certificate", source };
        let now = Duration::from_nanos(UnixNanos::now().0);
        let (from, until) = (now.saturating_sub(DAY * BACKDATED_DAYS as u32), now + valid);
        let (params, serial) = params(identity, names, from, until).map_err(error)?;
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(error)?;
        let expires = UnixNanos(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX));
        Ok(Signed { certificate_pem: certificate.pem(), serial, expires })
    }

    /// The authority's certificate (PEM), by which others verify what it has signed.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }
}

/// Names by which people reach a server, beside those that Seawall's parts verify.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerNames {
    /// Names of hosts.
    pub hosts: Vec<String>,
    /// Addresses.
    pub addresses: Vec<std::net::IpAddr>,
}

/// A certificate for a key that was made elsewhere.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The certificate.
    pub certificate_pem: String,
    /// Its number.
    pub serial: Serial,
    /// When it ends.
    pub expires: UnixNanos,
}

/// A new key (PEM), and a request for a certificate for it (PEM). The key stays where it was made.
///
/// # Errors
/// When the system has no randomness.
pub fn new_request() -> Result<(String, String), AuthorityError> {
    let key = new_key()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let request = params.serialize_request(&key).and_then(|request| request.pem());
    let request = request.map_err(|source| AuthorityError::Certificate {
        action: "make a request for a certificate",
        source,
    })?;
    Ok((key.serialize_pem(), request))
}

fn params(
    identity: &Identity,
    names: &ServerNames,
    from: Duration,
    until: Duration,
) -> Result<(CertificateParams, Serial), rcgen::Error> {
    let mut serial = [0; SERIAL_BYTES];
    ring::rand::SystemRandom::new().fill(&mut serial).map_err(|_| rcgen::Error::RingUnspecified)?;
    // Positive and of full length, whatever was drawn.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(rcgen::SerialNumber::from_slice(&serial));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, identity.to_string());
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.subject_alt_names.push(SanType::URI(identity.to_uri().try_into()?));
    for host in &names.hosts {
        params.subject_alt_names.push(SanType::DnsName(host.as_str().try_into()?));
    }
    params.subject_alt_names.extend(names.addresses.iter().copied().map(SanType::IpAddress));
    if identity.role.is_server() {
        params.subject_alt_names.push(SanType::DnsName(identity.role.dns_name().try_into()?));
        params.insert_extended_key_usage(ExtendedKeyUsagePurpose::ServerAuth);
    }
    if identity.role.is_client() {
        params.insert_extended_key_usage(ExtendedKeyUsagePurpose::ClientAuth);
    }
    params.not_before = date!(from);
    params.not_after = date!(until);
    Ok((params, Serial::from_bytes(&serial)))
}

fn new_key() -> Result<KeyPair, AuthorityError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|source| AuthorityError::Certificate { action: "make a key", source })
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Seawall authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn create_dir(dir: &Path) -> Result<(), AuthorityError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| AuthorityError::File {
        action: "create directory",
        path: dir.to_owned(),
        source,
    })
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> Result<(), AuthorityError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().map_err(|source| AuthorityError::File { action: "create", path: path.to_owned(), source })
}

fn sync_dir(dir: &Path) -> Result<(), AuthorityError> {
    std::fs::File::open(dir).and_then(|handle| handle.sync_all()).map_err(|source| AuthorityError::File {
        action: "sync directory",
        path: dir.to_owned(),
        source,
    })
}
