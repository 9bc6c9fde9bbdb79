//! The target's side of replication: replica images, undo layers, recovery points, views.
//!
//! ```text
//! <data>/<group id>/state                          where the replica stands (two slots, see docs/formats)
//! <data>/<group id>/layers/<epoch>.layer           what an epoch overwrote, and what the epoch is
//! <data>/<group id>/volumes/<volume id>/replica.img  the newest state, a sparse raw image
//! ```
//!
//! A volume's image may be a block device that the operator names instead. The list of recovery points *is* the list
//! of layer files, so the two cannot disagree. Everything on disk goes through [`durable::Storage`].

mod bytes;
mod delta;
mod error;
mod group;
mod image;
mod layer;
mod limits;
mod recover;
mod retention;
mod shared;
mod state;
#[cfg(test)]
mod tests;
mod verify;
mod view;

pub use error::{ReplicaError, VolumeProblem};
pub use group::{Applied, GroupReplica, Options, Point, VolumeStatus};
pub use image::Place;
pub use limits::*;
pub use recover::{DamagedLayer, OpenReport};
pub use retention::Retention;
pub use verify::{LayerFindings, Report, verify};
pub use view::View;
