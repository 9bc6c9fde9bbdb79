use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ResourceId, UnixMillis};

super::names! {
    /// What a job does.
    JobKind {
        /// Looks whether disks can be protected, and protects them.
        Protect "protect"
        /// Ends the protection of a group.
        Unprotect "unprotect"
        /// Takes a recovery point.
        Point "point"
        /// Compares with the replica, and sends what differs.
        Resync "resync"
        /// Fails a group over to a point.
        Failover "failover"
        /// Keeps a failover, for good.
        CommitFailover "commit-failover"
        /// Takes a failover back.
        CancelFailover "cancel-failover"
        /// Takes writes to a failed-over group's volumes.
        Promote "promote"
        /// Ends that.
        Demote "demote"
        /// Lets a machine write to disks that it has handed over.
        Release "release"
        /// Ends a failover by going back to the original site, with everything that was written since.
        FailBack "fail-back"
        /// Serves a group's volumes at a point, for writing, for a while.
        Drill "drill"
        /// Ends that.
        EndDrill "end-drill"
        /// Starts a machine on a point and looks whether it comes up.
        Prove "prove"
        /// Runs a recovery plan, step by step.
        Plan "plan"
    }
}

super::names! {
    /// Where a job stands.
    JobState {
        /// Nobody has begun.
        Waiting "waiting"
        /// It is being done.
        Running "running"
        /// It is done.
        Done "done"
        /// It could not be done.
        Failed "failed"
        /// Somebody ended it.
        Cancelled "cancelled"
    }
}

super::names! {
    /// Where a step of a job stands.
    StepState {
        /// Its turn has not come.
        Waiting "waiting"
        /// It is being done.
        Running "running"
        /// It is done, and as it should be.
        Passed "passed"
        /// It is done; somebody should know something.
        Warned "warned"
        /// It could not be done.
        Failed "failed"
        /// It was not needed, or not reached.
        Skipped "skipped"
    }
}

impl JobState {
    /// Whether it will not change any more.
    pub const fn ended(self) -> bool {
        matches!(self, JobState::Done | JobState::Failed | JobState::Cancelled)
    }
}

/// Something long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobInfo {
    /// Names it.
    pub id: ResourceId,
    /// What it does.
    pub kind: JobKind,
    /// On what: a machine or a group, as people call it.
    pub subject: String,
    /// How it stands.
    pub state: JobState,
    /// 0 to 100.
    pub percent: u8,
    /// What is being done, or how it ended, in a sentence.
    pub message: String,
    /// Who asked for it.
    pub created_by: String,
    /// When.
    pub created: UnixMillis,
    /// When something last changed.
    pub changed: UnixMillis,
    /// What it consists of; left out in lists.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepInfo>,
}

/// A step of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StepInfo {
    /// For programs.
    pub code: String,
    /// For people.
    pub title: String,
    /// How it stands.
    pub state: StepState,
    /// What was found.
    pub message: String,
    /// What to do about it; empty when nothing need be done.
    pub mend: String,
}
