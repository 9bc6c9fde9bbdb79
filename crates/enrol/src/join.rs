use std::path::Path;

use block::GroupId;
use control::fleet::{Enrol, Enrolled, Name, PartRole};
use wire::new_request;

use crate::client::Client;
use crate::credentials::{CURRENT, install};
use crate::fingerprint::Fingerprint;
use crate::url::ServerUrl;
use crate::{EnrolError, credentials};

/// A part that has enrolled.
#[derive(Clone, Debug)]
pub struct Joined {
    /// Its name in the fleet.
    pub name: Name,
    /// An agent's group.
    pub group: Option<GroupId>,
}

/// Enrols with a token: makes a key in `state`, has it signed, and keeps the certificate there. The key never leaves the
/// machine. The token says by which fingerprint the config server is known, so that nobody else can answer in its place.
///
/// # Errors
/// When `state` has credentials already, the token is none, or the config server is not reached or refuses; then nothing was
/// written.
pub async fn join(
    server: ServerUrl,
    token: &str,
    role: PartRole,
    name: Name,
    state: &Path,
) -> Result<Joined, EnrolError> {
    if state.join(CURRENT).exists() {
        return Err(EnrolError::Credentials(format!(
            "enrol: {} has credentials of a fleet already; remove the directory to enrol anew",
            state.display()
        )));
    }
    let (_, known_by) = token.trim().split_once('.').ok_or(EnrolError::Token("it has no fingerprint"))?;
    let expected: Fingerprint =
        known_by.parse().map_err(|_| EnrolError::Token("its fingerprint is damaged"))?;
    let (key, request) = new_request().map_err(|error| EnrolError::Credentials(error.to_string()))?;
    let client = Client::new(server, &expected.trust(), None, None)?;
    let asked = Enrol { token: token.trim().to_owned(), role, name, request };
    let enrolled: Enrolled = client.post("/enrol", &asked).await?;
    let shown = Fingerprint::of_pem(&enrolled.authority).map_err(EnrolError::Credentials)?;
    if shown != expected {
        return Err(EnrolError::Credentials(
            "enrol: the config server gave another authority than the token names".into(),
        ));
    }
    install(state, &key, &enrolled.certificate, &enrolled.authority)?;
    tracing::info!(name = %enrolled.name, state = %state.display(), "enrolled; credentials are in {}", credentials::CURRENT);
    Ok(Joined { name: enrolled.name, group: enrolled.group })
}
