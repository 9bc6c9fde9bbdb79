use block::{Generation, Label};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ResourceId;
use crate::{ExportInfo, FailoverInfo, PointSelector, PromotedInfo};

/// How long a drill lasts when nobody says otherwise, in seconds.
pub const DRILL_LASTS_S: u64 = 4 * 3600;
/// The longest that one may last, in seconds.
pub const DRILL_LASTS_S_MAX: u64 = 30 * 86_400;

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

/// A drill that is to begin: all volumes of a group at a point, writable at its target; nothing else changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartDrill {
    /// What to call it, at most 128 bytes; one of a name at a time.
    #[serde(default = "drill_name")]
    #[schema(value_type = String, min_length = 1, max_length = 128, default = "drill")]
    pub name: Label,
    /// latest, application (the newest that is application-consistent), or an epoch's number.
    #[serde(default)]
    #[schema(value_type = String, pattern = "^(latest|application|[1-9][0-9]{0,18})$", default = "latest")]
    pub point: PointSelector,
    /// It ends by itself after so long, in seconds.
    #[serde(default = "drill_lasts_s")]
    #[schema(minimum = 60, maximum = 2_592_000)]
    pub lasts_s: u64,
    /// Which of its target servers; may be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_server: Option<ResourceId>,
}

/// A drill that is to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EndDrill {
    /// Its name.
    #[serde(default = "drill_name")]
    #[schema(value_type = String, min_length = 1, max_length = 128, default = "drill")]
    pub name: Label,
}

fn drill_name() -> Label {
    "drill".parse().expect("a label")
}

fn drill_lasts_s() -> u64 {
    DRILL_LASTS_S
}

/// A drill that is running.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupDrill {
    /// Where.
    pub target_server: ResourceId,
    /// Its name, point, volumes, where they are served, and when it ends.
    #[schema(value_type = Object)]
    pub export: ExportInfo,
}
