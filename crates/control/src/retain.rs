//! Pins, deleting, scrubbing.

use block::{ByteCount, Epoch, GroupId, Label, UnixNanos};
use serde::{Deserialize, Serialize};

use crate::{PointInfo, VolumeSummary};

/// Why and until when a point is kept whatever retention says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinInfo {
    /// What a person calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Label>,
    /// When it was set, by the target's clock.
    pub pinned: UnixNanos,
    /// When it ends, by the target's clock; without it, never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<UnixNanos>,
}

/// The answer to [`crate::OperatorRequest::Pin`] and [`crate::OperatorRequest::Unpin`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinReply {
    /// Which group.
    pub group: GroupId,
    /// The point, as it is now.
    pub point: PointInfo,
}

/// The answer to [`crate::OperatorRequest::DeletePoint`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteReply {
    /// Which group.
    pub group: GroupId,
    /// The point that went.
    pub epoch: Epoch,
    /// How many are left.
    pub points: u64,
}

/// Told while a scrub goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubProgressInfo {
    /// Read so far.
    pub done_bytes: ByteCount,
    /// What there is to read.
    pub total_bytes: ByteCount,
}

/// Some bytes of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedRange {
    /// Where they begin.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// Something that scrubbing found damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubFinding {
    /// The file or device, on the target.
    pub file: String,
    /// What is wrong.
    pub problem: String,
    /// Of an image: whose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeSummary>,
    /// Of an image: where. The first of them, where they are many.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<DamagedRange>,
    /// The first and last of the points that it concerns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub points: Option<(Epoch, Epoch)>,
    /// How many these are.
    pub points_count: u64,
}

/// The end of the answer to [`crate::OperatorRequest::Scrub`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReply {
    /// Which group.
    pub group: GroupId,
    /// Undo layers that were read.
    pub layers: u64,
    /// Read from layers and images.
    pub read_bytes: ByteCount,
    /// What had no checksum before, and could not be compared.
    pub new_checksum_bytes: ByteCount,
    /// What is damaged. Empty: all is sound.
    pub findings: Vec<ScrubFinding>,
    /// What was damaged and is made again from the rest.
    pub notes: Vec<String>,
}
