//! TLS for HTTPS, with Seawall's identities: the config server proves its role, and parts prove theirs; people prove who
//! they are in another way, so a certificate is asked for and not needed.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};

use crate::credentials::{Credentials, identity_of, serial_of};
use crate::identity::{Identity, Role};
use crate::revoked::Serial;
use crate::tls::{provider, web_server_config};

/// The application protocol that both sides name.
pub const WEB_ALPN: &[u8] = b"http/1.1";
/// Bytes of an authority's fingerprint.
pub const FINGERPRINT_BYTES: usize = 32;

/// Whom a client of the config server believes.
#[derive(Clone)]
pub enum WebTrust {
    /// Servers of this authority (PEM).
    Authority(String),
    /// Servers of an authority that is known by its fingerprint only, and shown by the server.
    Fingerprint([u8; FINGERPRINT_BYTES]),
}

/// The server's side of HTTPS.
///
/// # Errors
/// When the credentials do not fit together.
pub fn web_server(credentials: &Credentials) -> Result<Arc<rustls::ServerConfig>, String> {
    let mut config = web_server_config(credentials)?;
    config.alpn_protocols = vec![WEB_ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The client's side of HTTPS, and the name that the config server proves. With credentials it can prove who it is.
///
/// # Errors
/// When the authority's certificate cannot be read.
pub fn web_client(
    trust: &WebTrust,
    credentials: Option<&Credentials>,
) -> Result<(Arc<ClientConfig>, ServerName<'static>), String> {
    let name = ServerName::try_from(Role::ConfigServer.dns_name()).map_err(|error| error.to_string())?;
    let mut config = match (credentials, trust) {
        (Some(credentials), WebTrust::Authority(_)) => (*credentials.client).clone(),
        (Some(_), WebTrust::Fingerprint(_)) => {
            return Err("who has credentials has the authority's certificate too".to_owned());
        }
        (None, trust) => {
            let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(|error| error.to_string())?;
            match trust {
                WebTrust::Authority(pem) => builder.with_root_certificates(roots(pem)?).with_no_client_auth(),
                WebTrust::Fingerprint(fingerprint) => builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(Pinned { fingerprint: *fingerprint }))
                    .with_no_client_auth(),
            }
        }
    };
    config.alpn_protocols = vec![WEB_ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok((Arc::new(config), name))
}

fn roots(pem: &str) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate =
            certificate.map_err(|error| format!("read the authority's certificate: {error}"))?;
        roots.add(certificate).map_err(|error| format!("use the authority's certificate: {error}"))?;
    }
    if roots.is_empty() {
        Err("there is no certificate in the authority's file".to_owned())
    } else {
        Ok(roots)
    }
}

/// SHA-256 of an authority's certificate (the first of the PEM text), by which it is known before one has it.
///
/// # Errors
/// When there is none.
pub fn fingerprint(pem: &str) -> Result<[u8; FINGERPRINT_BYTES], String> {
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| error.to_string())?;
    Ok(digest(&certificate))
}

fn digest(certificate: &CertificateDer<'_>) -> [u8; FINGERPRINT_BYTES] {
    let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Why a client's certificate is not believed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotFromHere(String);

/// Who a client of HTTPS has proven to be; `None` when it showed no certificate.
///
/// # Errors
/// When it showed one that names nobody, or that is revoked.
pub fn web_peer(
    connection: &rustls::CommonState,
    credentials: &Credentials,
) -> Result<Option<(Identity, Serial)>, NotFromHere> {
    let Some(certificate) = connection.peer_certificates().and_then(|chain| chain.first()) else {
        return Ok(None);
    };
    let identity = identity_of(certificate).map_err(NotFromHere)?;
    let serial = serial_of(certificate).map_err(NotFromHere)?;
    if credentials.revoked(&serial) {
        return Err(NotFromHere(format!("the certificate {} of {identity} was revoked", serial.as_str())));
    }
    Ok(Some((identity, serial)))
}

/// Believes one authority, which the server shows at the end of its chain.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; FINGERPRINT_BYTES],
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates.iter().find(|certificate| digest(certificate) == self.fingerprint);
        let authority = authority.ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], now, algorithms.all)?;
        rustls::client::verify_server_name(&parsed, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}
