use block::{Generation, GroupId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Policy, ResourceId};

/// What a part of the fleet is to do. It acts on it until it hears otherwise, whether the config server runs or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "part", rename_all = "kebab-case")]
pub enum Desired {
    /// An agent.
    Agent(DesiredAgent),
    /// A process server.
    ProcessServer(DesiredProcessServer),
    /// A target server.
    TargetServer(DesiredTargetServer),
}

/// What an agent is to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DesiredAgent {
    /// What it protects; nothing when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protection: Option<Box<Protection>>,
}

/// What an agent protects, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Protection {
    /// The group.
    #[schema(value_type = String)]
    pub group: GroupId,
    /// The group's history.
    #[schema(value_type = u64)]
    pub generation: Generation,
    /// Where the process server listens, `host:port`.
    pub process_server: String,
    /// The disks.
    pub volumes: Vec<ProtectedVolume>,
    /// How.
    pub policy: Policy,
}

/// A disk to protect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProtectedVolume {
    /// What people call it; its identity in the group.
    pub name: String,
    /// The disk, as the agent's configuration names disks.
    pub device: String,
}

/// What a process server is to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DesiredProcessServer {
    /// The groups that it accepts.
    pub groups: Vec<ForwardedGroup>,
}

/// A group that a process server forwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForwardedGroup {
    /// Which.
    #[schema(value_type = String)]
    pub id: GroupId,
    /// Where its targets listen, `host:port`.
    pub targets: Vec<String>,
}

/// What a target server is to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DesiredTargetServer {
    /// The groups that it keeps.
    pub groups: Vec<KeptGroup>,
}

/// A group that a target keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct KeptGroup {
    /// Which.
    #[schema(value_type = String)]
    pub id: GroupId,
    /// The group's key, sealed by the agent so that only this target can open it (hexadecimal).
    pub sealed_key: String,
    /// Which points are kept, as in `all for 2h, hourly for 24h`.
    pub retention: String,
    /// The most that undo layers may take, in bytes; without it there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space_bytes_max: Option<u64>,
    /// Disks of this server that the group's volumes have come home to; its others are files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopt: Vec<AdoptedVolume>,
}

/// A disk of a target server that is the starting replica of a volume: what is on it is compared with the source, and stays a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AdoptedVolume {
    /// The volume's name in its group.
    pub name: String,
    /// The disk, a path at the target server.
    pub device: String,
}

/// Somebody to seal a group's key for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SealFor {
    /// The target server.
    pub target: ResourceId,
    /// Its public key (hexadecimal).
    pub key: String,
}
