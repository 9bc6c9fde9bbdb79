//! TLS 1.3 only, both sides proven by the local authority, no resumption (a resumed session would outlive its
//! certificate), no early data.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::credentials::Credentials;

/// The application protocol that both sides must name.
pub const ALPN: &[u8] = b"seawall/1";

/// How much sealed data TLS may hold back before it is written out, in bytes.
pub(crate) const TLS_BUFFER_BYTES: usize = 256 * 1024;

/// AES-128-GCM where the processor has instructions for it, else ChaCha20-Poly1305, which is fast without.
pub(crate) fn provider() -> CryptoProvider {
    let aes = cipher_suite::TLS13_AES_128_GCM_SHA256;
    let chacha = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
    let cipher_suites = if has_aes() { vec![aes, chacha] } else { vec![chacha, aes] };
    CryptoProvider { cipher_suites, ..default_provider() }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// The two sides' configurations for one identity.
pub(crate) fn configs(
    authority: &[CertificateDer<'static>],
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<(ClientConfig, ServerConfig), String> {
    let provider = Arc::new(provider());
    let mut roots = RootCertStore::empty();
    for certificate in authority {
        roots.add(certificate.clone()).map_err(|error| format!("authority: {error}"))?;
    }
    let roots = Arc::new(roots);

    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(|error| error.to_string())?;
    client.alpn_protocols = vec![ALPN.to_vec()];
    client.resumption = rustls::client::Resumption::disabled();
    client.enable_sni = false;

    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| error.to_string())?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| error.to_string())?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    server.send_tls13_tickets = 0;
    server.max_early_data_size = 0;
    Ok((client, server))
}

/// The server's side for clients that may have no certificate.
pub(crate) fn web_server_config(credentials: &Credentials) -> Result<ServerConfig, String> {
    let provider = Arc::new(provider());
    let mut roots = RootCertStore::empty();
    for certificate in &credentials.authority {
        roots.add(certificate.clone()).map_err(|error| format!("authority: {error}"))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| error.to_string())?;
    // The authority's certificate is shown too: who enrols knows only its fingerprint.
    let mut chain = credentials.chain.clone();
    chain.extend(credentials.authority.iter().cloned());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, credentials.key.clone_key())
        .map_err(|error| error.to_string())?;
    server.send_tls13_tickets = 0;
    server.max_early_data_size = 0;
    Ok(server)
}

/// The certificate of a peer with which TLS succeeded.
pub(crate) fn peer_certificate(connection: &rustls::CommonState) -> Result<CertificateDer<'static>, String> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err("it does not name the protocol seawall/1".to_owned());
    }
    let chain = connection.peer_certificates().ok_or("it showed no certificate")?;
    Ok(chain.first().ok_or("it showed no certificate")?.clone().into_owned())
}
