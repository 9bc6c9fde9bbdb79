use block::{Generation, GroupId, Label};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Desired, ProofPolicy, ResourceId, Revoked, SealFor, UnixMillis};
use crate::{AgentReport, GroupPoints, PointSelector, ProcessServerStatus, StateCode, TargetServerStatus};

/// Disks that one machine may report. More are left out by the agent, and refused by the config server.
pub const DISKS_MAX: usize = 256;
/// Parts of one disk. More are left out by the agent, and refused by the config server.
pub const DISK_USES_MAX: usize = 64;
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
    /// The answer may wait until there is something to do, as long as it would be until the next report: what people ask of this part
    /// is to begin at once.
    #[serde(default)]
    pub patient: bool,
}

impl CheckIn {
    /// Every text, with the most characters that it may have (as in the schemas above).
    fn texts(&mut self) -> impl Iterator<Item = (&'static str, &mut String, usize)> {
        let Self { version, address, sealing_key, digest, trouble, disks, guests, .. } = self;
        let disks = disks.iter_mut().flatten().flat_map(|disk| {
            let uses = disk.uses.iter_mut().flat_map(|part| {
                [
                    ("the device of a disk's part", &mut part.device, 255),
                    ("the kind of a disk's part", &mut part.kind, 64),
                    ("where a disk's part is mounted", &mut part.mounted, 1000),
                ]
            });
            [
                ("a disk's device", &mut disk.device, 255),
                ("what a disk is known by", &mut disk.known_by, 1000),
            ]
            .into_iter()
            .chain(uses)
        });
        let guests = guests.iter_mut().flatten().flat_map(|guest| {
            let disks = guest.disks.iter_mut().flat_map(|disk| {
                [("a guest's disk", &mut disk.target, 64), ("a guest disk's source", &mut disk.source, 1000)]
            });
            [("a guest's name", &mut guest.name, 255), ("a guest's state", &mut guest.state, 64)]
                .into_iter()
                .chain(disks)
        });
        let of_all = [("version", version, 64), ("digest", digest, 64)];
        let of_some =
            [("address", address, 255), ("sealing_key", sealing_key, 64), ("trouble", trouble, 2000)];
        let of_some = of_some.into_iter().filter_map(|(name, text, most)| Some((name, text.as_mut()?, most)));
        of_all.into_iter().chain(of_some).chain(disks).chain(guests)
    }

    /// Shortens what is longer than a config server takes, so that a machine with an odd mount or guest is still heard.
    pub fn shorten(&mut self) {
        for (_, text, most) in self.texts() {
            if let Some((end, _)) = text.char_indices().nth(most) {
                text.truncate(end);
            }
        }
        self.disks.iter_mut().for_each(|disks| disks.truncate(DISKS_MAX));
        for disk in self.disks.iter_mut().flatten() {
            disk.uses.truncate(DISK_USES_MAX);
        }
        self.guests.iter_mut().for_each(|guests| guests.truncate(GUESTS_MAX));
        for guest in self.guests.iter_mut().flatten() {
            guest.disks.truncate(GUEST_DISKS_MAX);
        }
    }

    /// What in it is longer than a config server takes.
    pub fn excess(&mut self) -> Option<String> {
        let long = self.texts().find_map(|(name, text, most)| {
            let count = text.chars().count();
            (count > most).then(|| format!("{name} has {count} characters, at most {most} go"))
        });
        let of_disks =
            self.disks.iter().flatten().map(|disk| ("parts of a disk", disk.uses.len(), DISK_USES_MAX));
        let of_guests = self
            .guests
            .iter()
            .flatten()
            .map(|guest| ("disks of a guest", guest.disks.len(), GUEST_DISKS_MAX));
        let lists = [
            ("disks", self.disks.as_ref().map_or(0, Vec::len), DISKS_MAX),
            ("guests", self.guests.as_ref().map_or(0, Vec::len), GUESTS_MAX),
            ("tasks", self.tasks.len(), TASKS_MAX),
            ("lists of recovery points", self.points.len(), POINT_LISTS_MAX),
        ];
        long.or_else(|| {
            let mut lists = lists.into_iter().chain(of_disks).chain(of_guests);
            lists.find_map(|(name, count, most)| {
                (count > most).then(|| format!("{count} {name} were told, at most {most} go"))
            })
        })
    }
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
    /// To an agent: keep everybody from writing to the disks, send what they hold, and prove that the target holds the same.
    HandOver,
    /// To an agent: let everybody write to disks that were handed over.
    Release {
        /// As the agent's configuration names disks.
        devices: Vec<String>,
    },
    /// To a target server: make the volumes what they were at a point, and take nothing more from the source.
    FailOver {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// Which point.
        #[schema(value_type = String)]
        point: PointSelector,
    },
    /// To a target server: keep a failover, for good.
    CommitFailover {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// The history that the failover began: what is done already is not done to another one.
        #[schema(value_type = u64)]
        generation: Generation,
    },
    /// To a target server: take a failover back.
    CancelFailover {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// The history that the failover began.
        #[schema(value_type = u64)]
        generation: Generation,
    },
    /// To a target server: take writes to the volumes of a failed-over group.
    Promote {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
    },
    /// To a target server: end that; what was written is applied.
    Demote {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
    },
    /// To a target server: serve all volumes of the group at a point, writable, for a while.
    Drill {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// Which point.
        #[schema(value_type = String)]
        point: PointSelector,
        /// What it is called.
        #[schema(value_type = String)]
        name: Label,
        /// It ends by itself after so long.
        lasts_s: u64,
    },
    /// To a target server: end that; what was written is dropped.
    EndDrill {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// What it is called.
        #[schema(value_type = String)]
        name: Label,
    },
    /// To a target server: start a machine on a point of the group, and look whether it comes up. The result is the proof.
    Prove {
        /// Which group.
        #[schema(value_type = String)]
        group: GroupId,
        /// Which point.
        #[schema(value_type = String)]
        point: PointSelector,
        /// The machine's disks, by name; it starts from the first.
        volumes: Vec<String>,
        /// What it is, and what it must say.
        proof: ProofPolicy,
    },
    /// To an agent: run a script of the agent's own directory of scripts; what it prints is told with the result.
    Script {
        /// The file's name there.
        command: String,
        /// What it is given.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        arguments: Vec<String>,
        /// More of its environment.
        #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
        environment: std::collections::BTreeMap<String, String>,
        /// After so long it is killed.
        timeout_s: u64,
    },
    /// To an agent: say whether a script is there and would be run.
    CheckScript {
        /// The file's name.
        command: String,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_refused_and_can_be_shortened() {
        let text = |count: usize| "\u{e4}".repeat(count);
        let part = DiskUse { device: text(256), kind: text(65), mounted: text(4096) };
        let disk = DiskInfo {
            device: text(3000),
            known_by: text(1001),
            bytes: 1,
            written_bytes_per_s: None,
            uses: vec![part; DISK_USES_MAX + 1],
        };
        let held = GuestDisk { target: text(70), source: text(4096) };
        let guest = GuestInfo { name: text(300), state: text(100), disks: vec![held; GUEST_DISKS_MAX + 1] };
        let mut said = CheckIn {
            version: text(65),
            address: Some(text(256)),
            trouble: Some(text(2001)),
            disks: Some(vec![disk; DISKS_MAX + 1]),
            guests: Some(vec![guest; GUESTS_MAX + 1]),
            ..CheckIn::default()
        };
        assert!(
            said.excess().is_some_and(|why| why.contains("version has 65 characters")),
            "{:?}",
            said.excess()
        );
        said.shorten();
        assert_eq!(said.excess(), None);
        let disks = said.disks.as_ref().unwrap();
        assert_eq!((disks.len(), disks[0].uses.len()), (DISKS_MAX, DISK_USES_MAX));
        assert_eq!(disks[0].uses[0].mounted, text(1000));
        let before = said.clone();
        said.shorten();
        assert_eq!(said, before, "what fits is left alone");
    }
}
