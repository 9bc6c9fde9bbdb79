use std::fmt;

use block::{ByteCount, Epoch, Generation, GroupId, UnixNanos, VolumeId};
use serde::{Deserialize, Serialize};

use crate::{
    Bottleneck, ExportInfo, FailoverInfo, PointInfo, PromotedInfo, ProofInfo, ResyncStatus, StateCode,
};

/// How the writes of a volume are being captured now, from best to worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureMode {
    /// Each write's bytes are captured.
    Data,
    /// Each interval the whole volume is read and compared.
    Scan,
    /// Only where was written is captured; the bytes are read later.
    Bitmap,
    /// Capture has a gap: the volume is suspect until it is compared.
    #[default]
    Lost,
}

impl fmt::Display for CaptureMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CaptureMode::Data => "data",
            CaptureMode::Scan => "scan",
            CaptureMode::Bitmap => "bitmap",
            CaptureMode::Lost => "lost",
        })
    }
}

/// A volume, as far as operators need to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSummary {
    /// Its identity.
    pub id: VolumeId,
    /// What people call it.
    pub name: String,
    /// Its size.
    pub size: ByteCount,
}

/// How an agent sees one of its volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Which.
    #[serde(flatten)]
    pub volume: VolumeSummary,
    /// The disk or file that it is on the source.
    pub device: String,
    /// How its writes are captured.
    pub mode: CaptureMode,
    /// Waiting to be read from the disk.
    pub dirty_bytes: ByteCount,
    /// Being read now.
    pub draining_bytes: ByteCount,
    /// Read from the disk since the agent started.
    pub drained_total: ByteCount,
}

/// What an agent reports of itself. The process server keeps the last one of each group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentReport {
    /// When it was made, by the source's clock.
    pub time: UnixNanos,
    /// The agent's version.
    pub version: String,
    /// The open epoch.
    pub captured: Epoch,
    /// The last epoch sealed.
    pub sealed: Epoch,
    /// The last epoch that the process server has confirmed.
    pub cached: Epoch,
    /// The last epoch that the target has confirmed.
    pub applied: Epoch,
    /// When the cut of `sealed` was taken.
    pub sealed_cut_time: UnixNanos,
    /// The volumes of the group.
    pub volumes: Vec<VolumeReport>,
    /// What is written to the volumes, per second.
    pub churn_bytes_per_s: f64,
    /// What is sent, per second.
    pub sent_bytes_per_s: f64,
    /// Written to the volumes since the agent started.
    pub written_bytes_total: ByteCount,
    /// Sent since the agent started.
    pub sent_bytes_total: ByteCount,
    /// Captured and not yet consumed.
    pub ring_used: ByteCount,
    /// The ring's size.
    pub ring_bytes: ByteCount,
    /// Writes whose data was not captured, since the agent started.
    pub missed_writes_total: u64,
    /// How often the ring was full, since the agent started.
    pub overflow_total: u64,
    /// Memory of open and unsent epochs.
    pub epoch_memory_used: ByteCount,
    /// Its limit; when reached, the agent stops consuming the ring.
    pub epoch_memory_limit: ByteCount,
    /// Sealed and not yet sent.
    pub unsent_bytes: ByteCount,
    /// Memory of the open epoch.
    #[serde(default)]
    pub open_bytes: ByteCount,
    /// So many epochs wait that the open one is not ended: later writes to the same place replace earlier ones in it.
    #[serde(default)]
    pub coalescing: bool,
    /// What is to be compared with the replica, because it is not known whether it changed.
    #[serde(default)]
    pub suspect_bytes: ByteCount,
    /// What was compared since the agent started.
    #[serde(default)]
    pub compared_bytes: ByteCount,
    /// What of it was different, and was sent.
    #[serde(default)]
    pub different_bytes: ByteCount,
    /// Processors that the agent keeps busy: 0.5 is half of one.
    #[serde(default)]
    pub processors_used: f64,
    /// Memory of the agent that is in use, with the part of the ring that is mapped into it.
    #[serde(default)]
    pub memory_resident: ByteCount,
    /// How writes are captured, and why not better; for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capture_notes: Vec<String>,
    /// What it is doing.
    pub state: StateCode,
    /// The last thing that went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The resync that goes on, or waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync: Option<ResyncStatus>,
    /// When the process server is tried again, if it is not reached. A peer's return is tried earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try: Option<UnixNanos>,
    /// The disks were handed over: nothing can write to them until they are released.
    #[serde(default)]
    pub handed_over: bool,
}

impl AgentReport {
    /// The worst mode of all volumes.
    pub fn mode(&self) -> CaptureMode {
        self.volumes.iter().map(|volume| volume.mode).max().unwrap_or_default()
    }

    /// What is still to be read from all volumes together.
    pub fn remaining_bytes(&self) -> ByteCount {
        self.volumes.iter().map(|volume| volume.dirty_bytes.saturating_add(volume.draining_bytes)).sum()
    }
}

/// A server's answer to [`crate::OperatorRequest::Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "server", rename_all = "kebab-case")]
pub enum ServerStatus {
    /// Of a process server.
    ProcessServer(ProcessServerStatus),
    /// Of a target server.
    TargetServer(TargetServerStatus),
}

/// How a process server is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessServerStatus {
    /// When this was, by the server's clock.
    pub time: UnixNanos,
    /// The name in its certificate.
    pub name: String,
    /// The server's version.
    pub version: String,
    /// What it is doing.
    pub state: StateCode,
    /// The last thing that went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Space that the cache uses.
    pub cache_used: ByteCount,
    /// Space that it may use.
    pub cache_limit: ByteCount,
    /// Half of the fsyncs took no longer, in milliseconds.
    pub fsync_ms_p50: f64,
    /// 99 of 100 fsyncs took no longer, in milliseconds.
    pub fsync_ms_p99: f64,
    /// How many groups compare their disks with their replicas now.
    #[serde(default)]
    pub resyncs: usize,
    /// How many wait for their turn to do so.
    #[serde(default)]
    pub resyncs_waiting: usize,
    /// The groups it serves.
    pub groups: Vec<ProcessGroup>,
}

/// A group at a process server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessGroup {
    /// Which.
    pub group: GroupId,
    /// Its history.
    pub generation: Generation,
    /// The agent's name, when it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The last epoch cached durably.
    pub cached: Epoch,
    /// Cached and not yet applied by every target.
    pub cached_bytes: ByteCount,
    /// Received since the server started.
    pub received_bytes_total: ByteCount,
    /// Received per second.
    pub received_bytes_per_s: f64,
    /// Where it goes.
    pub targets: Vec<TargetLink>,
    /// What the agent last said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<AgentReport>,
    /// What the group is doing here.
    pub state: StateCode,
    /// The last thing that went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The stage that holds the others up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bottleneck: Option<Bottleneck>,
}

/// The way from a process server to one target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetLink {
    /// Its address.
    pub address: String,
    /// Whether it is connected and has accepted.
    pub connected: bool,
    /// The last epoch that it has applied.
    pub applied: Epoch,
    /// Cached and not yet applied there.
    pub backlog_bytes: ByteCount,
    /// Sent since the server started.
    pub sent_bytes_total: ByteCount,
    /// Sent per second.
    pub sent_bytes_per_s: f64,
    /// What it is doing.
    pub state: StateCode,
    /// The last thing that went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// When it is tried again, if it is not reached. A peer's return is tried earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try: Option<UnixNanos>,
}

/// How a target server is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TargetServerStatus {
    /// When this was, by the server's clock.
    pub time: UnixNanos,
    /// The name in its certificate.
    pub name: String,
    /// The server's version.
    pub version: String,
    /// What it is doing.
    pub state: StateCode,
    /// The last thing that went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The groups it keeps.
    pub groups: Vec<TargetGroup>,
    /// The points that it serves over NBD.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<ExportInfo>,
}

/// A group at a target server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetGroup {
    /// Which.
    pub group: GroupId,
    /// Its history.
    pub generation: Generation,
    /// The name of who delivers, when connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sender: Option<String>,
    /// The volumes.
    pub volumes: Vec<VolumeSummary>,
    /// The last epoch applied durably.
    pub applied: Epoch,
    /// When its cut was taken, by the source's clock.
    pub applied_cut_time: UnixNanos,
    /// Failed over, and neither committed nor cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<FailoverInfo>,
    /// Its volumes are written at the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted: Option<PromotedInfo>,
    /// The last proof that a machine comes up from a point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<ProofInfo>,
    /// The newest recovery point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_point: Option<PointInfo>,
    /// The oldest one kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_point: Option<PointInfo>,
    /// How many there are.
    pub points: u64,
    /// When the newest application-consistent one was cut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_application_cut_time: Option<UnixNanos>,
    /// Space that the undo layers use.
    pub undo_bytes: ByteCount,
    /// Applied since the server started.
    pub applied_bytes_total: ByteCount,
    /// Applied per second.
    pub applied_bytes_per_s: f64,
    /// Half of the epochs took no longer to apply, in milliseconds.
    pub apply_ms_p50: f64,
    /// 99 of 100 epochs took no longer to apply, in milliseconds.
    pub apply_ms_p99: f64,
    /// What it is doing.
    pub state: StateCode,
    /// The last thing that went wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// What a person should know of: space that runs out, points that cannot be viewed, work in the background that fails.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use block::{Consistency, PointNote};
    use serde::de::DeserializeOwned;

    use super::*;

    fn survives<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) -> serde_json::Value {
        let json = serde_json::to_string(value).unwrap();
        assert_eq!(serde_json::from_str::<T>(&json).unwrap(), *value);
        serde_json::from_str(&json).unwrap()
    }

    fn summary() -> VolumeSummary {
        VolumeSummary { id: VolumeId([2; 16]), name: "data".into(), size: ByteCount::gib(1) }
    }

    fn report() -> AgentReport {
        let volume = |mode| VolumeReport {
            volume: summary(),
            device: "/dev/vdb".into(),
            mode,
            dirty_bytes: ByteCount::mib(3),
            draining_bytes: ByteCount::mib(1),
            drained_total: ByteCount::mib(9),
        };
        AgentReport {
            volumes: vec![volume(CaptureMode::Data), volume(CaptureMode::Bitmap)],
            churn_bytes_per_s: 1.5,
            state: StateCode::Replicating,
            last_error: Some("read disk".into()),
            ..AgentReport::default()
        }
    }

    #[test]
    fn statuses_survive_json() {
        let point = PointInfo {
            epoch: Epoch(4),
            cut_time: UnixNanos(1),
            consistency: Consistency::Application,
            note: PointNote { label: Some("nightly".parse().unwrap()), ..PointNote::default() },
            changed_bytes: ByteCount(4096),
            pin: None,
            kept_for: None,
            unusable: None,
        };
        let link = TargetLink {
            address: "t:7441".into(),
            connected: true,
            applied: Epoch(3),
            backlog_bytes: ByteCount(1),
            sent_bytes_total: ByteCount(2),
            sent_bytes_per_s: 3.0,
            state: StateCode::Unreachable,
            last_error: None,
            next_try: Some(UnixNanos(9)),
        };
        let group = ProcessGroup {
            group: GroupId([1; 16]),
            generation: Generation(1),
            agent: Some("web".into()),
            cached: Epoch(4),
            cached_bytes: ByteCount(1),
            received_bytes_total: ByteCount(1),
            received_bytes_per_s: 0.0,
            targets: vec![link],
            report: Some(report()),
            state: StateCode::Replicating,
            last_error: None,
            bottleneck: None,
        };
        let process = ProcessServerStatus { groups: vec![group], ..ProcessServerStatus::default() };
        let json = survives(&ServerStatus::ProcessServer(process));
        assert_eq!(json["server"], "process-server");
        assert_eq!(json["groups"][0]["report"]["volumes"][0]["mode"], "data");
        assert_eq!(json["groups"][0]["targets"][0]["state"], "unreachable");

        let group = TargetGroup {
            group: GroupId([1; 16]),
            generation: Generation(1),
            sender: None,
            volumes: vec![summary()],
            applied: Epoch(4),
            applied_cut_time: UnixNanos(1),
            failover: None,
            promoted: None,
            proof: None,
            newest_point: Some(point),
            oldest_point: None,
            points: 1,
            newest_application_cut_time: Some(UnixNanos(1)),
            undo_bytes: ByteCount(5),
            applied_bytes_total: ByteCount(6),
            applied_bytes_per_s: 7.5,
            apply_ms_p50: 1.0,
            apply_ms_p99: 2.0,
            state: StateCode::CatchingUp,
            last_error: None,
            warnings: vec!["space runs out".into()],
        };
        let target = TargetServerStatus { groups: vec![group], ..TargetServerStatus::default() };
        let json = survives(&ServerStatus::TargetServer(target));
        assert_eq!(json["groups"][0]["newest_point"]["consistency"], "application");
        assert_eq!(json["groups"][0]["newest_point"]["label"], "nightly");
    }

    #[test]
    fn a_report_says_the_worst_mode_and_the_sum() {
        assert_eq!(report().mode(), CaptureMode::Bitmap);
        assert_eq!(report().remaining_bytes(), ByteCount::mib(8));
        assert_eq!(AgentReport::default().mode(), CaptureMode::Lost);
    }

    #[test]
    fn fields_of_newer_parts_are_ignored() {
        let mut json = serde_json::to_value(report()).unwrap();
        json["of_the_future"] = 1.into();
        assert_eq!(serde_json::from_value::<AgentReport>(json).unwrap(), report());
    }
}
