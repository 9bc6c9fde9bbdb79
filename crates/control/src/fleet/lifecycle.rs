use block::Generation;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ResourceId;
use crate::{FailoverInfo, PointSelector, PromotedInfo};

/// A group that is to fail over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartFailover {
    /// The group's name, typed.
    #[schema(max_length = 64)]
    pub confirm: String,
    /// latest, application (the newest that is application-consistent), or an epoch's number. A planned failover goes to the point
    /// that the hand-over makes, and takes no other.
    #[serde(default)]
    #[schema(value_type = String, pattern = "^(latest|application|[1-9][0-9]{0,18})$", default = "latest")]
    pub point: PointSelector,
    /// Have the machine hand over its disks first: nothing is lost.
    #[serde(default)]
    pub planned: bool,
    /// Then take writes to the volumes at the target.
    #[serde(default)]
    pub promote: bool,
    /// Which of its target servers; may be left out where one keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_server: Option<ResourceId>,
}

/// Where a group stands between its source and its target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupFailover {
    /// The target server that says so.
    pub target_server: ResourceId,
    /// The history that this target follows.
    #[schema(value_type = u64)]
    pub generation: Generation,
    /// The failover that is neither committed nor cancelled; left out when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub failover: Option<FailoverInfo>,
    /// Its volumes are written at the target; left out when not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub promoted: Option<PromotedInfo>,
    /// A failover was committed there, and the group's source is of an older history.
    #[serde(default)]
    pub committed: bool,
}
