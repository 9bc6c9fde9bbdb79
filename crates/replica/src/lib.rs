//! The target's side of replication: replica images, undo layers, recovery points, views.
//!
//! ```text
//! <data>/<group id>/state                          where the replica stands (two slots, see docs/formats)
//! <data>/<group id>/layers/<epoch>.layer           what an epoch overwrote, and what the epoch is
//! <data>/<group id>/layers/<epoch>-<epoch>.layer   the same of several epochs, back to the second
//! <data>/<group id>/spans/<first>-<last>.span      which of several epochs overwrote what first; derived
//! <data>/<group id>/catalogue                      what the layers' headers say; derived
//! <data>/<group id>/damaged                        blocks of images that scrubbing found damaged
//! <data>/<group id>/pins                           points that do not go
//! <data>/<group id>/promoted                       whether its volumes are written here
//! <data>/<group id>/journal/<epoch>.journal        what was written here and is not applied yet
//! <data>/<group id>/checksums                      as of which epoch the following are; derived
//! <data>/<group id>/volumes/<volume id>/checksums  of the image's blocks; derived
//! <data>/<group id>/volumes/<volume id>/replica.img  the newest state, a sparse raw image
//! ```
//!
//! A volume's image may be a block device that the operator names instead. The list of recovery points *is* the list
//! of layer files, so the two cannot disagree. Everything on disk goes through [`durable::Storage`].

mod adopt;
mod bad;
mod bytes;
mod catalogue;
mod delta;
mod error;
mod failover;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod group;
mod image;
mod layer;
mod limits;
mod middle;
mod pace;
mod pins;
mod points;
mod policy;
mod promoted;
mod recent;
mod recover;
mod retention;
mod scrub;
mod segment;
mod shared;
mod span;
mod state;
mod sums;
mod sweep;
#[cfg(test)]
mod tests;
mod thin;
mod tree;
mod verify;
mod view;

pub use error::{ReplicaError, VolumeProblem};
pub use failover::{FailedOver, Failover};
pub use group::{Applied, GroupReplica, Options, Standing};
pub use image::Place;
pub use limits::*;
pub use pace::Pace;
pub use pins::Pin;
pub use points::{Point, PointsSummary, VolumeStatus};
pub use policy::{Policy, PolicyError, RULES_MAX, parse_span};
pub use promoted::{PromotedStatus, PromotedVolume};
pub use recover::{DamagedLayer, OpenReport};
pub use retention::{Retention, SPACE_WARNING_PERCENT};
pub use scrub::{Finding, ScrubProgress, ScrubReport};
pub use thin::{Maintained, Space};
pub use verify::{LayerFindings, Report, Unusable, verify};
pub use view::View;
