use block::{Generation, GroupId, Ladder};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Capacity, DiskInfo, GroupDrill, GroupFailover, GuestInfo, Name, PartRole, ResourceId, UnixMillis,
};
use crate::{Bottleneck, CaptureMode, PointInfo, ProofInfo, Severity, StateCode};

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The entries, in order.
    pub items: Vec<T>,
    /// What to give as `after` for the next part; left out at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A machine: one agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MachineInfo {
    /// Names it for ever.
    pub id: ResourceId,
    /// What people call it.
    pub name: Name,
    /// Its group.
    #[schema(value_type = String)]
    pub group: GroupId,
    /// Whether the group is protected.
    pub protected: bool,
    /// The agent's version; empty before its first report.
    pub version: String,
    /// What it is doing.
    #[schema(value_type = String)]
    pub state: StateCode,
    /// What that means.
    pub meaning: String,
    /// What to do.
    pub what_to_do: String,
    /// Why it could not take up what it was told, or what went wrong last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// When it last reported; left out before the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<UnixMillis>,
    /// How far its clock is ahead, in milliseconds.
    pub clock_ahead_ms: i64,
    /// When its certificate ends.
    pub certificate_expires: UnixMillis,
    /// Its disks; left out in lists.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskInfo>,
    /// Virtual machines that it is the host of, where libvirt is there; left out in lists.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<GuestInfo>,
}

/// A process or target server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServerInfo {
    /// Names it for ever.
    pub id: ResourceId,
    /// What it is.
    pub role: PartRole,
    /// What people call it.
    pub name: Name,
    /// Where others reach it; empty before its first report.
    pub address: String,
    /// Its version; empty before its first report.
    pub version: String,
    /// What it is doing.
    #[schema(value_type = String)]
    pub state: StateCode,
    /// What that means.
    pub meaning: String,
    /// What to do.
    pub what_to_do: String,
    /// Why it could not take up what it was told, or what went wrong last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// When it last reported; left out before the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<UnixMillis>,
    /// How far its clock is ahead, in milliseconds.
    pub clock_ahead_ms: i64,
    /// When its certificate ends.
    pub certificate_expires: UnixMillis,
    /// Room on its store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// Groups that it serves.
    pub groups: i64,
}

/// A group: volumes that share one cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupInfo {
    /// Names it for ever.
    #[schema(value_type = String)]
    pub id: GroupId,
    /// The machine's id.
    pub machine: ResourceId,
    /// The machine's name, by which people call the group too.
    pub name: Name,
    /// Whether its disks are captured; when not, its points are kept.
    #[serde(default)]
    pub protected: bool,
    /// Its history.
    #[schema(value_type = u64)]
    pub generation: Generation,
    /// The policy that it follows.
    pub policy: ResourceId,
    /// That policy's name.
    pub policy_name: Name,
    /// The process server that it goes through.
    pub process_server: ResourceId,
    /// The target servers that keep it.
    pub target_servers: Vec<ResourceId>,
    /// Its volumes.
    pub volumes: Vec<VolumeInfo>,
    /// The state that matters most, over all stages.
    #[schema(value_type = String)]
    pub state: StateCode,
    /// What that means.
    pub meaning: String,
    /// What to do.
    pub what_to_do: String,
    /// How much it matters.
    #[schema(value_type = String)]
    pub severity: Severity,
    /// Positions in order: captured, sealed, cached, applied, oldest kept.
    #[schema(value_type = Object)]
    pub ladder: Ladder,
    /// How old the newest recovery point is, in milliseconds; left out when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_ms: Option<i64>,
    /// How old it may be by the group's policy, in milliseconds.
    #[serde(default)]
    pub rpo_ms_max: i64,
    /// Where this comes from, stage by stage.
    pub rpo_stages: Vec<RpoStage>,
    /// The stage that holds the others up, and what waits; left out when everything keeps up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub bottleneck: Option<Bottleneck>,
    /// The newest recovery point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub newest_point: Option<PointInfo>,
    /// The oldest one kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub oldest_point: Option<PointInfo>,
    /// How many there are.
    pub points: u64,
    /// Written, in bytes a second.
    pub churn_bytes_per_s: f64,
    /// Sent, in bytes a second.
    pub sent_bytes_per_s: f64,
    /// Not applied yet, in bytes.
    pub lag_bytes: u64,
    /// What a person should know of it.
    pub warnings: Vec<String>,
    /// Its disks were handed over: nothing can write to them at the machine.
    #[serde(default)]
    pub handed_over: bool,
    /// Where it stands between source and target; left out as long as no failover has come between them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<GroupFailover>,
    /// After a failover: the group that protects what runs in its place, on the way home; left out when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub reversed_by: Option<GroupId>,
    /// The last proof that a machine comes up from one of its points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub proof: Option<ProofInfo>,
    /// Drills that are running, as the target servers said last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drills: Vec<GroupDrill>,
}

impl GroupInfo {
    /// How much it needs a look: also a group whose every stage works is in trouble while nothing, or nothing new enough, can be
    /// recovered.
    pub fn attention(&self) -> Severity {
        match self.rpo_ms {
            None => Severity::Trouble,
            Some(_) if !self.protected => Severity::Notice,
            Some(age) if age > self.rpo_ms_max => Severity::Trouble,
            Some(_) => self.severity,
        }
    }
}

/// Recovery points of a group, as a target told them last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointList {
    /// When they were told; left out before the first time. Whoever looks makes the target tell them anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<UnixMillis>,
    /// Which target told them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_server: Option<ResourceId>,
    /// The points, the oldest first: the newest ones, those that people have named or pinned, and of the others some.
    #[schema(value_type = Vec<Object>)]
    pub points: Vec<PointInfo>,
    /// How many there are that are not listed.
    pub omitted: u64,
}

/// A part of the age of the newest recovery point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RpoStage {
    /// capture, seal, send, apply, and report, in the order of the way.
    pub stage: String,
    /// Its part, in milliseconds; left out when not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<i64>,
    /// What it does, and what it waits for.
    pub explanation: String,
    /// What it does.
    #[schema(value_type = String)]
    pub state: StateCode,
    /// The last thing that went wrong there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// A volume of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeInfo {
    /// What people call it.
    pub name: String,
    /// The disk, as it was named when it was protected.
    pub device: String,
    /// Its size in bytes, as the agent or the target reports; 0 before.
    pub bytes: u64,
    /// How its writes are captured; left out before the first report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub mode: Option<CaptureMode>,
    /// Waiting to be read from the disk, in bytes.
    pub dirty_bytes: u64,
}

/// Disks to protect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Protect {
    /// The machine's disks that share one cut.
    #[schema(min_items = 1, max_items = 64)]
    pub volumes: Vec<VolumeChoice>,
    /// Which policy; the one named `default` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<ResourceId>,
    /// Which process server; the one with the fewest groups when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_server: Option<ResourceId>,
    /// Which target servers; the one with the most free space when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8)]
    pub target_servers: Vec<ResourceId>,
    /// Go on although checks warn.
    #[serde(default)]
    pub despite_warnings: bool,
    /// The group, whose failover is committed, in whose place these disks are in use; all of them adopt disks at its original site then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    pub reverses: Option<GroupId>,
}

/// A disk to protect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeChoice {
    /// A path, or serial:..., wwn:..., ptuuid:..., fsuuid:...
    #[schema(min_length = 1, max_length = 255)]
    pub device: String,
    /// What to call it; the last part of the device when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// A disk at the target server, by its path, that becomes the volume's replica: what is on it is compared, and only what differs is
    /// sent. What was on it stays a recovery point. For all disks of a machine or for none; the target server's configuration must allow it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 255)]
    pub adopt: Option<String>,
}

impl VolumeChoice {
    /// A disk by its device, called as that is.
    pub fn of(device: impl Into<String>) -> VolumeChoice {
        VolumeChoice { device: device.into(), name: None, adopt: None }
    }
}

/// What to change of a group; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeGroup {
    /// Another policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<ResourceId>,
    /// Another process server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_server: Option<ResourceId>,
}

/// The targets that a protected group is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeTargets {
    /// All of them: those that it has and that are not named are left when every new one has a recovery point.
    #[schema(min_items = 1, max_items = 8)]
    pub target_servers: Vec<ResourceId>,
    /// Go on although checks warn.
    #[serde(default)]
    pub despite_warnings: bool,
}

/// Ends a protection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Unprotect {
    /// The group's name, typed.
    #[schema(max_length = 64)]
    pub confirm: String,
}

/// Confirms that something is to be destroyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Confirm {
    /// The thing's name, typed.
    #[schema(max_length = 64)]
    pub confirm: String,
}

/// A recovery point to take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PointNow {
    /// application, filesystem or crash.
    #[schema(value_type = String, pattern = "^(application|filesystem|crash)$")]
    pub consistency: block::Consistency,
    /// What to call it, at most 128 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 128)]
    pub label: Option<block::Label>,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A part enrolled.
    Enrolled,
    /// A part was removed, and its certificates revoked.
    Removed,
    /// A part or group has another state.
    State,
    /// A job began, went on, or ended.
    Job,
    /// What is declared has changed: policies, groups, placement, settings.
    Declared,
    /// Something about access: users, tokens, approvals.
    Access,
    /// An alert was raised, or is over.
    Alert,
}

impl EventKind {
    /// The name used in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            EventKind::Enrolled => "enrolled",
            EventKind::Removed => "removed",
            EventKind::State => "state",
            EventKind::Job => "job",
            EventKind::Declared => "declared",
            EventKind::Access => "access",
            EventKind::Alert => "alert",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventInfo {
    /// In order, without gaps.
    pub id: i64,
    /// When.
    pub time: UnixMillis,
    /// What, for programs.
    pub kind: String,
    /// How much it matters: good, notice or trouble.
    pub severity: String,
    /// Of what, as in `machines/ID`; programs fetch it again.
    pub subject: String,
    /// What, for people.
    pub message: String,
}

/// Figures of a group at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SampleInfo {
    /// When.
    pub time: UnixMillis,
    /// How old the newest recovery point was, in milliseconds; negative when there was none.
    pub rpo_ms: i64,
    /// Written, in bytes a second.
    pub churn_bytes_per_s: i64,
    /// Sent, in bytes a second.
    pub sent_bytes_per_s: i64,
    /// Waiting to be read from disks, in bytes.
    pub dirty_bytes: i64,
    /// Sealed and not yet sent, in bytes.
    pub unsent_bytes: i64,
}

/// The fleet at a glance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Overview {
    /// The config server's clock.
    pub time: UnixMillis,
    /// Machines.
    pub machines: i64,
    /// Protected groups.
    pub groups: i64,
    /// Of these, those whose state needs a person.
    pub groups_in_trouble: i64,
    /// Of these, those that have a recovery point.
    pub groups_recoverable: i64,
    /// Of these, those that need a look: in trouble, without a recovery point, or with one that is older than allowed.
    #[serde(default)]
    pub groups_to_look_at: i64,
    /// Parts that have not reported for longer than they should.
    pub silent_parts: i64,
    /// The oldest newest-point of all groups, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_rpo_ms: Option<i64>,
    /// Jobs under way.
    pub jobs: i64,
    /// Acts that wait for a second person.
    pub approvals: i64,
}
