//! What operators and Seawall's parts tell each other about work and state, as JSON.
//!
//! Types only. Unknown fields are ignored and missing ones are empty, so that a report of an older or newer part can
//! still be read; names and codes never change their meaning.

mod agent;
mod bottleneck;
mod export;
mod failover;
pub mod fleet;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod metrics;
mod proof;
mod request;
mod resync;
mod retain;
mod state;
mod status;

pub use agent::{
    AGENT_REQUEST_BYTES_MAX, AGENT_SOCKET_DIR, AgentAnswer, AgentRefusal, AgentRequest, TakenPoint,
};
pub use bottleneck::{Bottleneck, BottleneckStage, TARGET_BEHIND_BYTES, WAY_BEHIND_BYTES};
pub use export::{
    ExportInfo, ExportPlace, ExportRequest, ExportsReply, VIEW_HASH_BYTES, VIEW_HASH_UNIT, VIEW_RANGES_MAX,
    ViewRange,
};
pub use failover::{FailoverInfo, FailoverReply, FailoverStep, PromotedInfo};
pub use proof::ProofInfo;
pub use request::{GroupPoints, OperatorRequest, PointInfo, PointSelector, PointsReply, ViewHead, ViewTail};
pub use resync::{ResyncReason, ResyncStage, ResyncStatus, ResyncWhen};
pub use retain::{DamagedRange, DeleteReply, PinInfo, PinReply, ScrubFinding, ScrubProgressInfo, ScrubReply};
pub use state::{Severity, StateCode};
pub use status::{
    AgentReport, CaptureMode, ProcessGroup, ProcessServerStatus, ServerStatus, TargetGroup, TargetLink,
    TargetServerStatus, VolumeReport, VolumeSummary,
};
