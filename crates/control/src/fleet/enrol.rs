use std::fmt;
use std::str::FromStr;

use block::GroupId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Name, ResourceId, UnixMillis};

/// What a part of the fleet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PartRole {
    /// Captures a machine's disks.
    Agent,
    /// Holds changes and forwards them.
    ProcessServer,
    /// Applies changes and keeps recovery points.
    TargetServer,
}

impl PartRole {
    /// The name used in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            PartRole::Agent => "agent",
            PartRole::ProcessServer => "process-server",
            PartRole::TargetServer => "target-server",
        }
    }
}

impl fmt::Display for PartRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PartRole {
    type Err = String;
    fn from_str(text: &str) -> Result<PartRole, String> {
        [PartRole::Agent, PartRole::ProcessServer, PartRole::TargetServer]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no part; there are agent, process-server and target-server"))
    }
}

/// A token with which one part can enrol, to be made.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewEnrolToken {
    /// What enrols.
    pub role: PartRole,
    /// Its name; without it, it says one itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// How long the token is good, in minutes: 1 to 10080 (a week).
    #[schema(minimum = 1, maximum = 10080)]
    pub minutes: u32,
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EnrolTokenInfo {
    /// Names it.
    pub id: ResourceId,
    /// What enrols.
    pub role: PartRole,
    /// Its name, when the token says one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// When it was made.
    pub created: UnixMillis,
    /// When it ends.
    pub expires: UnixMillis,
    /// Who made it.
    pub created_by: String,
    /// What enrolled with it; it is good for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<Name>,
}

/// A token with its secret, which is told this once.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct MadeEnrolToken {
    /// The secret, and by what the config server is known.
    pub token: String,
    /// The rest.
    #[serde(flatten)]
    pub info: EnrolTokenInfo,
}

/// What a part says when it enrols.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Enrol {
    /// The token's secret.
    #[schema(max_length = 256)]
    pub token: String,
    /// What it is.
    pub role: PartRole,
    /// What it calls itself; the token's name counts more.
    pub name: Name,
    /// A request for a certificate (PKCS #10, PEM), signed by a key that stays where it is.
    #[schema(max_length = 16384)]
    pub request: String,
}

/// What a part gets.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Enrolled {
    /// What the fleet calls it for ever.
    pub id: ResourceId,
    /// Its name.
    pub name: Name,
    /// An agent's group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub group: Option<GroupId>,
    /// Its certificate (PEM).
    pub certificate: String,
    /// The authority's (PEM).
    pub authority: String,
    /// When the certificate ends.
    pub expires: UnixMillis,
}

/// Asks for another certificate.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// A request for a certificate (PKCS #10, PEM), signed by a new key.
    #[schema(max_length = 16384)]
    pub request: String,
}

/// Another certificate. The one before stays good until it ends.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Renewed {
    /// The certificate (PEM).
    pub certificate: String,
    /// The authority's (PEM).
    pub authority: String,
    /// When it ends.
    pub expires: UnixMillis,
}

/// Certificates that nobody should believe any more, though they have not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Revoked {
    /// Grows with each revocation.
    pub version: i64,
    /// Their numbers.
    pub serials: Vec<String>,
}
