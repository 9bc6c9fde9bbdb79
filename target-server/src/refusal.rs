//! What a failure means to the sender, and to the group's state.

use changeset::{HeaderError, OpenError};
use control::StateCode;
use replica::{ReplicaError, VolumeProblem};
use wire::RefusalCode;

/// Why a delivery is refused.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) code: RefusalCode,
    pub(crate) message: String,
    /// What it makes of the group's state, until an epoch is applied again.
    pub(crate) state: Option<StateCode>,
}

impl Refusal {
    pub(crate) fn new(code: RefusalCode, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into(), state: None }
    }
}

impl From<OpenError> for Refusal {
    fn from(error: OpenError) -> Refusal {
        let (code, state) = match &error {
            OpenError::WrongGroup { .. } => (RefusalCode::WrongGroup, None),
            OpenError::WrongKey(_) => (RefusalCode::Unauthorised, Some(StateCode::Misconfigured)),
            OpenError::Header(HeaderError::Version(_)) => {
                (RefusalCode::Version, Some(StateCode::VersionMismatch))
            }
            _ => (RefusalCode::Corrupt, Some(StateCode::Corrupt)),
        };
        Refusal { code, message: error.to_string(), state }
    }
}

impl From<ReplicaError> for Refusal {
    fn from(error: ReplicaError) -> Refusal {
        let (code, state) = match &error {
            ReplicaError::WrongGroup { .. } => (RefusalCode::WrongGroup, None),
            ReplicaError::WrongGeneration { .. } | ReplicaError::OtherGeneration { .. } => {
                (RefusalCode::Generation, None)
            }
            // It may be cancelled, so the sender asks again.
            ReplicaError::FailoverPending { .. } => (RefusalCode::Busy, Some(StateCode::FailedOver)),
            ReplicaError::Promoted { .. } => (RefusalCode::Busy, Some(StateCode::Promoted)),
            ReplicaError::NotPromoted { .. }
            | ReplicaError::PromotedInUse { .. }
            | ReplicaError::NotFailedOver { .. } => (RefusalCode::BadRequest, None),
            ReplicaError::NoFailover { .. } | ReplicaError::NotNewer { .. } | ReplicaError::InUse { .. } => {
                (RefusalCode::BadRequest, None)
            }
            ReplicaError::Replayed { .. } => (RefusalCode::Replayed, None),
            ReplicaError::Gap { .. } => (RefusalCode::Gap, Some(StateCode::Gap)),
            ReplicaError::Volume { problem: VolumeProblem::DeviceTooSmall { .. }, .. } => {
                (RefusalCode::Limit, Some(StateCode::Misconfigured))
            }
            ReplicaError::Volume { .. } | ReplicaError::Unusable { .. } => {
                (RefusalCode::Failed, Some(StateCode::Misconfigured))
            }
            ReplicaError::Invalid { .. } => (RefusalCode::BadRequest, Some(StateCode::Corrupt)),
            ReplicaError::NoSpace { .. } => (RefusalCode::Full, Some(StateCode::TargetFull)),
            ReplicaError::Io { .. } | ReplicaError::Poisoned { .. } => {
                (RefusalCode::Failed, Some(StateCode::StoreFailed))
            }
            ReplicaError::Corrupt { .. } => (RefusalCode::Failed, Some(StateCode::Corrupt)),
            ReplicaError::NoSuchPoint { .. } | ReplicaError::NoSuchVolume { .. } => {
                (RefusalCode::NotFound, None)
            }
            ReplicaError::UnusablePoint { .. } | ReplicaError::DamagedImage { .. } => {
                (RefusalCode::Corrupt, None)
            }
            ReplicaError::PointStays { .. } | ReplicaError::Pin { .. } => (RefusalCode::BadRequest, None),
            ReplicaError::Stopped => (RefusalCode::Stopping, None),
            ReplicaError::PastEnd { .. } => (RefusalCode::Internal, None),
        };
        Refusal { code, message: error.to_string(), state }
    }
}
