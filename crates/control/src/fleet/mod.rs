//! What the config server's API carries: everything that one config server knows is a fleet.
//!
//! What people and programs send is read strictly: unknown fields are refused by name. What the config server and the
//! fleet's parts answer each other may grow, and is read leniently.

/// Names that the API has for one of several things.
macro_rules! names {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant:meta])* $name:ident $text:literal)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
        #[serde(rename_all = "kebab-case")]
        pub enum $type { $($(#[$variant])* $name,)* }

        impl $type {
            /// All of them.
            pub const ALL: &[$type] = &[$($type::$name),*];

            /// The name used in the API.
            pub const fn as_str(self) -> &'static str {
                match self { $($type::$name => $text,)* }
            }
        }

        impl std::str::FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<$type, String> {
                match text {
                    $($text => Ok($type::$name),)*
                    _ => Err(format!("{text:?} is not known")),
                }
            }
        }
    };
}
use names;

mod access;
mod alert;
mod checkin;
mod desired;
mod enrol;
mod job;
mod lifecycle;
pub mod plan;
mod policy;
mod problem;
mod proof;
mod resource;
mod value;

pub use access::{
    ApiTokenInfo, Approval, ApprovalAnswer, ApprovalState, AuditEntry, ChangePassword, ChangeUser, Login,
    MadeToken, NewApiToken, NewUser, Role, Scope, Session, Settings, UserInfo,
};
pub use alert::{AlertInfo, AlertKind, AlertSettings, Mail, MailSecurity, RECEIVERS_MAX, Webhook};
pub use checkin::{
    Capacity, CheckIn, CheckInReply, DISK_USES_MAX, DISKS_MAX, DiskInfo, DiskUse, GUEST_DISKS_MAX,
    GUESTS_MAX, GuestDisk, GuestInfo, POINT_LISTS_MAX, POINTS_SHOWN_MAX, PartReport, TASKS_MAX, Task,
    TaskKind, TaskState, TaskUpdate,
};
pub use desired::{
    AdoptedVolume, Desired, DesiredAgent, DesiredProcessServer, DesiredTargetServer, ForwardedGroup,
    KeptGroup, ProtectedVolume, Protection, SealFor,
};
pub use enrol::{
    Enrol, EnrolTokenInfo, Enrolled, MadeEnrolToken, NewEnrolToken, PartRole, Renew, Renewed, Revoked,
};
pub use job::{JobInfo, JobKind, JobState, StepInfo, StepState};
pub use lifecycle::{
    DRILL_LASTS_S, DRILL_LASTS_S_MAX, EndDrill, GroupDrill, GroupFailover, StartDrill, StartFailover,
};
pub use plan::{NewPlan, Plan, PlanInfo, PlanRun, RunMode};
pub use policy::{
    BandwidthWindow, NewPolicy, Policy, PolicyError, PolicyInfo, RETENTION_RULES_MAX, RPO_S_MAX,
    ResyncWindow, RetentionRule, WINDOWS_MAX,
};
pub use problem::{Problem, ProblemCode};
pub use proof::{BootBus, BootFirmware, PROOF_TEXT_CHARS_MAX, PROOF_TEXTS_MAX, ProofPolicy, StartProof};
pub use resource::{
    ChangeGroup, ChangeTargets, Confirm, EventInfo, EventKind, GroupInfo, MachineInfo, Overview, Page,
    PointList, PointNow, Protect, RpoStage, SampleInfo, ServerInfo, Unprotect, VolumeChoice, VolumeInfo,
};
pub use value::{NAME_BYTES_MAX, Name, NameError, ResourceId, UnixMillis};
