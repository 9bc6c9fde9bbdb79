use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Name, ResourceId, UnixMillis};

/// What a person or a program may do; each may do all that the one before may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Sees everything but users, tokens and the audit log.
    Viewer,
    /// Protects machines, changes policies, takes points, drills.
    Operator,
    /// Users, tokens, settings; removes machines and servers.
    Administrator,
}

impl Role {
    /// The name used in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Administrator => "administrator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Role, String> {
        [Role::Viewer, Role::Operator, Role::Administrator]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no role; there are viewer, operator and administrator"))
    }
}

/// Who asks to be let in.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// The user's name.
    pub name: Name,
    /// At most 1024 bytes.
    #[schema(max_length = 1024)]
    pub password: String,
}

/// A session that began. Its secret is in a cookie that pages cannot read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Who.
    pub user: UserInfo,
    /// To be sent as `X-Seawall-CSRF` with everything that changes something.
    pub csrf: String,
    /// When it ends at the latest.
    pub expires: UnixMillis,
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserInfo {
    /// Names the user for ever.
    pub id: ResourceId,
    /// What people call the user.
    pub name: Name,
    /// What the user may do.
    pub role: Role,
    /// Cannot log in.
    pub disabled: bool,
    /// When it was made.
    pub created: UnixMillis,
}

/// A user to make.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewUser {
    /// Not taken yet.
    pub name: Name,
    /// What the user may do.
    pub role: Role,
    /// 12 to 1024 bytes.
    #[schema(min_length = 12, max_length = 1024)]
    pub password: String,
}

/// What to change of a user; what is left out stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeUser {
    /// What the user may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Ends all sessions, and lets none begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
    /// A new password, given by an administrator; ends all sessions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 12, max_length = 1024)]
    pub password: Option<String>,
}

/// The own password.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangePassword {
    /// As it is.
    #[schema(max_length = 1024)]
    pub old: String,
    /// As it is to be: 12 to 1024 bytes.
    #[schema(min_length = 12, max_length = 1024)]
    pub new: String,
}

/// What a token may be used for, within its user's role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// See.
    Read,
    /// Protect, take points, change policies.
    Operate,
    /// Make tokens with which machines enrol.
    Enrol,
    /// Users, tokens, settings, removal.
    Administer,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 4] = [Scope::Read, Scope::Operate, Scope::Enrol, Scope::Administer];

    /// The name used in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Scope::Read => "read",
            Scope::Operate => "operate",
            Scope::Enrol => "enrol",
            Scope::Administer => "administer",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = String;
    fn from_str(text: &str) -> Result<Scope, String> {
        Scope::ALL
            .into_iter()
            .find(|scope| scope.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no scope; there are read, operate, enrol and administer"))
    }
}

/// A token to make, for programs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewApiToken {
    /// What it is for.
    pub name: Name,
    /// What it may be used for.
    #[schema(min_items = 1, max_items = 4)]
    pub scopes: Vec<Scope>,
    /// How long, in days: 1 to 366.
    #[schema(minimum = 1, maximum = 366)]
    pub days: u32,
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiTokenInfo {
    /// Names it.
    pub id: ResourceId,
    /// What it is for.
    pub name: Name,
    /// Whose it is.
    pub user: Name,
    /// What it may be used for.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created: UnixMillis,
    /// When it ends.
    pub expires: UnixMillis,
}

/// A token with its secret, which is told this once.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct MadeToken {
    /// The secret: to be sent as `Authorization: Bearer ...`.
    pub token: String,
    /// The rest.
    #[serde(flatten)]
    pub info: ApiTokenInfo,
}

/// Something that somebody did, or tried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// In order.
    pub id: i64,
    /// When.
    pub time: UnixMillis,
    /// Who: `user NAME`, `token NAME of NAME`, `agent NAME`, or `nobody`.
    pub who: String,
    /// From where.
    pub address: String,
    /// What, as in `POST /api/v1/users`.
    pub act: String,
    /// On what, as far as the act tells.
    pub what: String,
    /// HTTP's status of the answer.
    pub status: u16,
    /// The problem's code; empty when it was done.
    pub problem: String,
}

/// Where an approval stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ApprovalState {
    /// Nobody has answered.
    Waiting,
    /// It was approved, and done.
    Approved,
    /// It will not be done.
    Rejected,
    /// Nobody answered in time.
    Expired,
}

impl ApprovalState {
    /// The name used in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            ApprovalState::Waiting => "waiting",
            ApprovalState::Approved => "approved",
            ApprovalState::Rejected => "rejected",
            ApprovalState::Expired => "expired",
        }
    }
}

/// An act that waits for a second person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Approval {
    /// Names it.
    pub id: ResourceId,
    /// What is to be done, in a sentence.
    pub what: String,
    /// Who asked.
    pub asked_by: String,
    /// When.
    pub asked: UnixMillis,
    /// Until when it may be answered.
    pub expires: UnixMillis,
    /// How it stands.
    pub state: ApprovalState,
    /// Who answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_by: Option<String>,
}

/// The second person's answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApprovalAnswer {
    /// Do it, or let it be.
    pub approve: bool,
}

/// Settings of the whole fleet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Deleting and shortening retention need a second person.
    pub second_person: bool,
}
