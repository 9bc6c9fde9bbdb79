use block::GroupId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Desired, ResourceId, Revoked, SealFor, UnixMillis};
use crate::{AgentReport, GroupPoints, ProcessServerStatus, StateCode, TargetServerStatus};

/// Disks that one machine may report. More are left out by the agent, and refused by the config server.
pub const DISKS_MAX: usize = 256;
/// Guests of a virtual machine host that one machine may report. More are left out by the agent, and refused by the config
/// server.
pub const GUESTS_MAX: usize = 256;
/// Disks of one guest. More are left out by the agent, and refused by the config server.
pub const GUEST_DISKS_MAX: usize = 32;
/// Tasks of one part that may be under way. More wait.
pub const TASKS_MAX: usize = 16;
/// Groups whose points a target is asked for at once.
pub const POINT_LISTS_MAX: usize = 16;
/// Recovery points of one group that a target shows; of more it chooses some, and says how many it leaves out.
pub const POINTS_SHOWN_MAX: usize = 400;

/// What a part says of itself every few seconds. An unknown field is one of a newer part, and is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckIn {
    /// The part's version.
    #[schema(max_length = 64)]
    pub version: String,
    /// The part's clock.
    pub time: UnixMillis,
    /// Where others reach it, `host:port`; agents say nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 255)]
    pub address: Option<String>,
    /// A target's public key, for which groups' keys are sealed (hexadecimal).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 64)]
    pub sealing_key: Option<String>,
    /// The digest of the desired state that it has taken up; empty for none.
    #[serde(default)]
    #[schema(max_length = 64)]
    pub digest: String,
    /// Why it could not take up what it was told, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2000)]
    pub trouble: Option<String>,
    /// The version of the list of revoked certificates that it has.
    #[serde(default)]
    pub revoked_version: i64,
    /// When its certificate ends.
    #[serde(default)]
    pub certificate_expires: UnixMillis,
    /// How it is; nothing when it does nothing yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub report: Option<PartReport>,
    /// A machine's disks, when they have changed since they were last taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 256)]
    pub disks: Option<Vec<DiskInfo>>,
    /// Virtual machines of a host with libvirt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 256)]
    pub guests: Option<Vec<GuestInfo>>,
    /// Room on the part's own store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
    /// A target's recovery points of the groups that it was asked for, chosen so that they show all of their history.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>, max_items = 16)]
    pub points: Vec<GroupPoints>,
    /// How its tasks go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 16)]
    pub tasks: Vec<TaskUpdate>,
}

/// How a part is, as its own status says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "kebab-case")]
pub enum PartReport {
    /// An agent that protects something.
    Agent(Box<AgentReport>),
    /// A process server.
    ProcessServer(ProcessServerStatus),
    /// A target server.
    TargetServer(TargetServerStatus),
}

impl PartReport {
    /// What it is doing.
    pub fn state(&self) -> StateCode {
        match self {
            PartReport::Agent(report) => report.state,
            PartReport::ProcessServer(status) => status.state,
            PartReport::TargetServer(status) => status.state,
        }
    }

    /// The last thing that went wrong.
    pub fn last_error(&self) -> Option<&str> {
        match self {
            PartReport::Agent(report) => report.last_error.as_deref(),
            PartReport::ProcessServer(status) => status.last_error.as_deref(),
            PartReport::TargetServer(status) => status.last_error.as_deref(),
        }
    }
}

/// A disk of a machine, protected or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskInfo {
    /// Its path now.
    #[schema(max_length = 255)]
    pub device: String,
    /// What it is known by when the kernel numbers it anew; empty when nothing.
    #[serde(default)]
    #[schema(max_length = 1000)]
    pub known_by: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// Written to it, in bytes a second, by the kernel's count over the last minutes; left out until that has been seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written_bytes_per_s: Option<u64>,
    /// What is on it, part by part.
    #[serde(default)]
    #[schema(max_items = 64)]
    pub uses: Vec<DiskUse>,
}

/// A virtual machine, as its host's libvirt knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestInfo {
    /// Its name there.
    #[schema(max_length = 255)]
    pub name: String,
    /// running, shut off, paused, ...
    #[schema(max_length = 64)]
    pub state: String,
    /// Its disks.
    #[serde(default)]
    #[schema(max_items = 32)]
    pub disks: Vec<GuestDisk>,
}

/// A disk of a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestDisk {
    /// What the guest calls it, as in vda.
    #[schema(max_length = 64)]
    pub target: String,
    /// The host's file or device.
    #[schema(max_length = 1000)]
    pub source: String,
}

/// What a part of a disk is used for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskUse {
    /// The partition, or the disk.
    #[schema(max_length = 255)]
    pub device: String,
    /// ext4, xfs, LVM2_member, ...; empty when not known.
    #[schema(max_length = 64)]
    pub kind: String,
    /// Where it is mounted; empty when it is not.
    #[serde(default)]
    #[schema(max_length = 1000)]
    pub mounted: String,
}

/// Room on a part's own store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// All.
    pub bytes_total: u64,
    /// Free.
    pub bytes_free: u64,
}

/// What the config server answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckInReply {
    /// The config server's clock.
    pub time: UnixMillis,
    /// When to come back, in milliseconds.
    pub interval_ms: u64,
    /// The digest of the desired state.
    pub digest: String,
    /// The desired state, when the part does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired: Option<Desired>,
    /// The list of revoked certificates, when the part does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Revoked>,
    /// Groups whose recovery points somebody looks at: a target tells them with its next report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub points_of: Vec<GroupId>,
    /// What to do once. Told again until the part says that it is done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<Task>,
}

/// Something to do once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// Names it; doing the same one twice does no harm.
    pub id: ResourceId,
    /// What to do.
    pub kind: TaskKind,
}

/// What to do once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "task", rename_all = "kebab-case")]
pub enum TaskKind {
    /// Say how these disks' writes would be captured.
    CheckDisks {
        /// As the agent's configuration names disks.
        devices: Vec<String>,
        /// Where the process server listens, to see whether it is reached.
        process_server: String,
    },
    /// Make the group's key if there is none, and seal it for each target.
    SealKey {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// For whom.
        targets: Vec<SealFor>,
    },
    /// Take a recovery point.
    Point {
        /// application, filesystem or crash.
        consistency: String,
        /// What to call it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        label: Option<String>,
    },
    /// Compare with the replica, and send what differs.
    Resync {
        /// All when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        volume: Option<String>,
    },
    /// A task of a newer config server.
    #[serde(other)]
    Unknown,
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// It is being done.
    Running,
    /// It is done.
    Done,
    /// It could not be done.
    Failed,
}

/// How a task goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TaskUpdate {
    /// Which.
    pub id: ResourceId,
    /// How.
    pub state: TaskState,
    /// In words.
    #[serde(default)]
    #[schema(max_length = 2000)]
    pub message: String,
    /// What came out of it, in the form that its kind has; null when nothing did.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub result: serde_json::Value,
}
