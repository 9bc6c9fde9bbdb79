//! Failing over, committing, cancelling.

use block::{ByteCount, Epoch, Generation, GroupId, UnixNanos};
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
    /// Take it back, and take what the source sends again. What was written while it was promoted goes with it.
    Cancel,
    /// Serve the volumes for writing from now on; what is written stays. Asked again, nothing happens.
    Promote,
    /// End that: what was written is applied, and is the newest point.
    Demote,
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
    /// What has changed since it was complete, because the group was promoted: cancelling gives it up.
    #[serde(default)]
    pub written_bytes: ByteCount,
}

/// A group whose volumes are written at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromotedInfo {
    /// Since when, by the target's clock.
    pub since: UnixNanos,
    /// Written and not yet applied; in the journal.
    pub waiting_bytes: ByteCount,
    /// Volumes that are exported for writing, each as often as it is.
    pub open: u64,
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
    /// What was put back, because it had changed since the point; nothing but when it is started.
    pub changed_bytes: ByteCount,
}
