use std::fmt;
use std::str::FromStr;

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, Label, PointNote, UnixNanos, VolumeId};
use serde::{Deserialize, Serialize};

use crate::{ExportRequest, FailoverStep, PinInfo, ViewRange, VolumeSummary};

/// What an operator asks of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum OperatorRequest {
    /// How it is; the answer is a [`crate::ServerStatus`].
    Status,
    /// The recovery points of a target server; the answer is a [`PointsReply`].
    Points {
        /// Of this group only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<GroupId>,
    },
    /// A volume of a target server as it was at a point; the answer is a [`ViewHead`], the bytes that are not zero,
    /// and a [`ViewTail`].
    ReadView {
        /// Which group.
        group: GroupId,
        /// Which of its volumes.
        volume: VolumeId,
        /// When.
        point: PointSelector,
        /// Only these parts, in order and apart from each other; none for the whole volume.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ranges: Vec<ViewRange>,
    },
    /// Hashes of a volume of a target server as it was at a point, to be compared with what is there already; the answer
    /// is a [`ViewHead`], hashes of [`crate::VIEW_HASH_BYTES`] for each [`crate::VIEW_HASH_UNIT`] (where none is sent, all
    /// is zeroes), and a [`ViewTail`].
    HashView {
        /// Which group.
        group: GroupId,
        /// Which of its volumes.
        volume: VolumeId,
        /// When.
        point: PointSelector,
    },
    /// Serves volumes at a point over NBD; the answer is a [`crate::ExportInfo`]. Detached, that is all; else the export
    /// lasts as long as the connection, and when it is stopped the connection is refused.
    Export(ExportRequest),
    /// The exports of a target server; the answer is a [`crate::ExportsReply`].
    Exports,
    /// Ends an export; the answer is a [`crate::ExportsReply`] with it.
    StopExport {
        /// Which.
        id: u64,
    },
    /// Keeps a point of a target server whatever retention says; the answer is a [`crate::PinReply`].
    Pin {
        /// Which group.
        group: GroupId,
        /// Which point.
        point: PointSelector,
        /// What to call the pin.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        label: Option<Label>,
        /// When it ends, by the target's clock; without it, never.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expires: Option<UnixNanos>,
    },
    /// Leaves a point to retention again; the answer is a [`crate::PinReply`].
    Unpin {
        /// Which group.
        group: GroupId,
        /// Which point.
        point: PointSelector,
    },
    /// Lets a point of a target server go; the answer is a [`crate::DeleteReply`].
    DeletePoint {
        /// Which group.
        group: GroupId,
        /// Which point.
        epoch: Epoch,
    },
    /// Compares everything that a target server holds of a group with its checksums. The answer is a
    /// [`crate::ScrubProgressInfo`], some more of these as its bytes, one in each, and a [`crate::ScrubReply`].
    Scrub {
        /// Which group.
        group: GroupId,
        /// The image of this volume only, and all undo layers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        volume: Option<VolumeId>,
    },
    /// A machine came up from a point; the answer is a [`crate::ProofInfo`], kept as the group's last.
    Proven {
        /// Which group.
        group: GroupId,
        /// Which point.
        epoch: Epoch,
        /// The machine's disks.
        volumes: Vec<VolumeId>,
        /// How long it took, in milliseconds.
        took_ms: u64,
    },
    /// A step of failing a group over; the answer is a [`crate::FailoverReply`].
    Failover {
        /// Which group.
        group: GroupId,
        /// What to do.
        step: FailoverStep,
    },
}

/// Names a recovery point: `latest`, `application`, or an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PointSelector {
    /// The newest there is.
    #[default]
    Latest,
    /// The newest that is application-consistent.
    Application,
    /// The point at the cut that ended this epoch.
    Epoch(Epoch),
}

/// A text that names no point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointSelectorError(String);

impl fmt::Display for PointSelectorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "read recovery point {:?}: expected `latest`, `application` or an epoch's number; `seawall points` lists them",
            self.0
        )
    }
}

impl std::error::Error for PointSelectorError {}

impl fmt::Display for PointSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PointSelector::Latest => f.write_str("latest"),
            PointSelector::Application => f.write_str("application"),
            PointSelector::Epoch(epoch) => epoch.fmt(f),
        }
    }
}

impl FromStr for PointSelector {
    type Err = PointSelectorError;
    fn from_str(text: &str) -> Result<PointSelector, PointSelectorError> {
        match (text, text.parse()) {
            ("latest", _) => Ok(PointSelector::Latest),
            ("application", _) => Ok(PointSelector::Application),
            (_, Ok(epoch)) if epoch > 0 => Ok(PointSelector::Epoch(Epoch(epoch))),
            _ => Err(PointSelectorError(text.chars().take(64).collect())),
        }
    }
}

impl Serialize for PointSelector {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PointSelector {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointInfo {
    /// The epoch that it ends.
    pub epoch: Epoch,
    /// When the cut was taken, by the source's clock.
    pub cut_time: UnixNanos,
    /// What may be said of it; never none.
    pub consistency: Consistency,
    /// Its label, how long what was frozen for it, and why it is less than was asked.
    #[serde(flatten)]
    pub note: PointNote,
    /// What the epoch changed on all volumes together.
    pub changed_bytes: ByteCount,
    /// Why and until when it is kept whatever retention says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<PinInfo>,
    /// Why retention keeps it; without it, it will go. Told in lists only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_for: Option<String>,
    /// Why it cannot be viewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
}

/// The recovery points of a group, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPoints {
    /// Which group.
    pub group: GroupId,
    /// The history that the points belong to.
    pub generation: Generation,
    /// What can be restored at each point.
    pub volumes: Vec<VolumeSummary>,
    /// The points.
    pub points: Vec<PointInfo>,
    /// How many there are that are not listed; operators are told the newest.
    #[serde(default)]
    pub omitted: u64,
}

/// The answer to [`OperatorRequest::Points`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointsReply {
    /// One for each group.
    pub groups: Vec<GroupPoints>,
}

/// What a view is, told before its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewHead {
    /// Which group.
    pub group: GroupId,
    /// Which volume.
    pub volume: VolumeSummary,
    /// At which point.
    pub point: PointInfo,
}

/// What a view was, told after its bytes, to be compared with what arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewTail {
    /// How many bytes were sent; the rest of the volume is zeroes.
    pub sent_bytes: ByteCount,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What operators' scripts send and read; a change here breaks them.
    #[test]
    fn requests_have_a_stable_text() {
        let group = GroupId([0x11; 16]);
        let volume = VolumeId([0x22; 16]);
        let cases = [
            (OperatorRequest::Status, r#"{"request":"status"}"#.to_owned()),
            (OperatorRequest::Points { group: None }, r#"{"request":"points"}"#.to_owned()),
            (
                OperatorRequest::Points { group: Some(group) },
                format!(r#"{{"request":"points","group":"{group}"}}"#),
            ),
            (
                OperatorRequest::ReadView { group, volume, point: PointSelector::Latest, ranges: Vec::new() },
                format!(
                    r#"{{"request":"read-view","group":"{group}","volume":"{volume}","point":"latest"}}"#
                ),
            ),
            (
                OperatorRequest::ReadView {
                    group,
                    volume,
                    point: PointSelector::Epoch(Epoch(7)),
                    ranges: Vec::new(),
                },
                format!(r#"{{"request":"read-view","group":"{group}","volume":"{volume}","point":"7"}}"#),
            ),
            (OperatorRequest::Exports, r#"{"request":"exports"}"#.to_owned()),
            (OperatorRequest::StopExport { id: 3 }, r#"{"request":"stop-export","id":3}"#.to_owned()),
            (
                OperatorRequest::Export(ExportRequest {
                    writable: true,
                    ..ExportRequest::new(
                        group,
                        vec![volume],
                        PointSelector::Latest,
                        crate::ExportPlace::Socket("/run/x".into()),
                    )
                }),
                format!(
                    r#"{{"request":"export","group":"{group}","volumes":["{volume}"],"point":"latest","place":{{"socket":"/run/x"}},"writable":true,"detach":false}}"#
                ),
            ),
            (
                OperatorRequest::Pin {
                    group,
                    point: PointSelector::Latest,
                    label: Some("audit".parse().unwrap()),
                    expires: Some(UnixNanos(5)),
                },
                format!(
                    r#"{{"request":"pin","group":"{group}","point":"latest","label":"audit","expires":5}}"#
                ),
            ),
            (
                OperatorRequest::Unpin { group, point: PointSelector::Epoch(Epoch(7)) },
                format!(r#"{{"request":"unpin","group":"{group}","point":"7"}}"#),
            ),
            (
                OperatorRequest::Proven { group, epoch: Epoch(7), volumes: vec![volume], took_ms: 41_000 },
                format!(
                    r#"{{"request":"proven","group":"{group}","epoch":7,"volumes":["{volume}"],"took_ms":41000}}"#
                ),
            ),
            (
                OperatorRequest::DeletePoint { group, epoch: Epoch(7) },
                format!(r#"{{"request":"delete-point","group":"{group}","epoch":7}}"#),
            ),
            (
                OperatorRequest::Scrub { group, volume: Some(volume) },
                format!(r#"{{"request":"scrub","group":"{group}","volume":"{volume}"}}"#),
            ),
            (
                OperatorRequest::Failover {
                    group,
                    step: FailoverStep::Start(PointSelector::Epoch(Epoch(7))),
                },
                format!(r#"{{"request":"failover","group":"{group}","step":{{"start":"7"}}}}"#),
            ),
            (
                OperatorRequest::Export(ExportRequest {
                    promoted: true,
                    detach: true,
                    ..ExportRequest::new(group, Vec::new(), PointSelector::Latest, crate::ExportPlace::Beside)
                }),
                format!(
                    r#"{{"request":"export","group":"{group}","volumes":[],"point":"latest","place":"beside","writable":false,"promoted":true,"detach":true}}"#
                ),
            ),
            (
                OperatorRequest::Failover { group, step: FailoverStep::Promote },
                format!(r#"{{"request":"failover","group":"{group}","step":"promote"}}"#),
            ),
            (
                OperatorRequest::Failover { group, step: FailoverStep::Demote },
                format!(r#"{{"request":"failover","group":"{group}","step":"demote"}}"#),
            ),
            (
                OperatorRequest::Failover { group, step: FailoverStep::Cancel },
                format!(r#"{{"request":"failover","group":"{group}","step":"cancel"}}"#),
            ),
        ];
        for (request, json) in cases {
            assert_eq!(serde_json::to_string(&request).unwrap(), json);
            assert_eq!(serde_json::from_str::<OperatorRequest>(&json).unwrap(), request);
        }
        assert!(serde_json::from_str::<OperatorRequest>(r#"{"request":"format-disk"}"#).is_err());
    }

    #[test]
    fn points_are_named_by_epoch_or_latest() {
        assert_eq!("latest".parse(), Ok(PointSelector::Latest));
        assert_eq!("application".parse(), Ok(PointSelector::Application));
        assert_eq!("12".parse(), Ok(PointSelector::Epoch(Epoch(12))));
        for bad in ["", "0", "-1", "newest", "1.5"] {
            assert!(bad.parse::<PointSelector>().is_err(), "{bad}");
        }
    }
}
