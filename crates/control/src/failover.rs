//! Failing over, committing, cancelling.

use block::{ByteCount, Epoch, Generation, GroupId};
use serde::{Deserialize, Serialize};

use crate::{PointInfo, PointSelector};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverStep {
    /// Make the volumes what they were at a point, and take nothing more from the source. Asked again with the same point, it goes on.
    Start(PointSelector),
    /// Keep that, for good: the source's generation is fenced.
    Commit,
    /// Take it back, and take what the source sends again.
    Cancel,
}

/// A failover that is neither committed nor cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverInfo {
    /// The point that was chosen.
    pub point: Epoch,
    /// The generation before.
    pub from: Generation,
    /// Its last epoch that was applied.
    pub ended: Epoch,
    /// Whether the volumes are what they were at the point; if not, start it again or cancel it.
    pub complete: bool,
}

/// The answer to [`crate::OperatorRequest::Failover`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverReply {
    /// Which group.
    pub group: GroupId,
    /// The generation that it follows now.
    pub generation: Generation,
    /// The newest recovery point now.
    pub point: Option<PointInfo>,
    /// What was put back, because it had changed since the point; nothing when committing or cancelling.
    pub changed_bytes: ByteCount,
}
