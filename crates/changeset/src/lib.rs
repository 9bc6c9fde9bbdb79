//! Folding an epoch, and the sealed format it travels in: docs/formats/changeset.md.
//!
//! [`Fold`] collects the changes of one open epoch; [`seal()`] makes a changeset of them; [`Opener`] checks one that came
//! over the wire and gives its [`Change`]s back. What lies between the two needs only the [`RoutingHeader`].

mod bytes;
mod changes;
mod compare;
mod fold;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod header;
mod key;
mod limits;
mod note;
mod open;
mod plan;
mod seal;
mod slab;
mod volume;
mod workers;

pub use changes::{Change, Changeset, Payload};
pub use compare::{
    COMPARE_MESSAGE_BYTES_MAX, COMPARED_GRANULES_MAX, CONVERSATION_BYTES, CompareAnswer, CompareError,
    CompareQuestion, Conversation, DAMAGED_GRANULES_MAX, Digester, GranuleDigest,
};
pub use fold::Fold;
pub use header::{HeaderError, MAGIC, RoutingHeader, Stamp, VERSION};
pub use key::{GroupKey, KEY_BYTES, KeyError};
pub use limits::{
    EXTENTS_MAX, FRAME_EXTENTS_MAX, FRAME_PLAIN_BYTES, FRAMES_MAX, NAME_BYTES_MAX, PLAIN_BYTES_MAX,
    SEALED_BYTES_MAX, VOLUMES_MAX, ZERO_RANGES_MAX,
};
pub use note::{NOTE_BYTES_MAX, NOTE_BYTES_MIN, decode_note, encode_note};
pub use open::{ExtentFault, OpenError, Opener, Part};
pub use seal::{Level, SealError, SealOptions, SealStats, Sealed, seal, seal_point};
pub use volume::{LOGICAL_BLOCK_BYTES_MAX, VolumeInfo, VolumesError, volume_id};

#[cfg(test)]
mod tests;
