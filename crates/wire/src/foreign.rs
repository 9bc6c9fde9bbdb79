//! TLS for protocols that are not Seawall's own, with Seawall's identities: NBD has its own way to begin TLS and names no
//! application protocol.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};

use crate::credentials::{Credentials, identity_of};
use crate::identity::Role;

/// The side that is connected to. Clients must show a certificate of the authority; what it names must be looked at, as
/// with [`operator_of`].
pub fn foreign_server(credentials: &Credentials) -> Arc<rustls::ServerConfig> {
    let mut config = (*credentials.server).clone();
    config.alpn_protocols.clear();
    Arc::new(config)
}

/// The side that connects, and the name that a server of the role proves.
///
/// # Panics
/// Never for the roles there are: their names are DNS names.
pub fn foreign_client(
    credentials: &Credentials,
    expected: Role,
) -> (Arc<rustls::ClientConfig>, ServerName<'static>) {
    let mut config = (*credentials.client).clone();
    config.alpn_protocols.clear();
    let name = ServerName::try_from(expected.dns_name()).expect("a role's name is a DNS name");
    (Arc::new(config), name)
}

/// The operator whom a verified certificate names.
///
/// # Errors
/// When it names somebody else.
pub fn operator_of(certificate: &CertificateDer<'_>) -> Result<String, String> {
    let identity = identity_of(certificate)?;
    match identity.role {
        Role::Operator => Ok(identity.to_string()),
        _ => Err(format!("{identity} is not an operator")),
    }
}
