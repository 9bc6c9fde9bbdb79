//! The process server's durable, bounded cache: one log of segments for all groups, so that one sync serves many sources.
//!
//! A changeset is opaque bytes with an identity: group, generation, epoch, size. It arrives in parts ([`Appender`]),
//! among those of others; it is *held* once all of it and its end are durable ([`Event::Held`]), and only then can be
//! read ([`Cache::next_after`]). Each target of a group has a cursor ([`Cache::applied`]); what all targets have applied is
//! freed. The bytes are in docs/formats/cache-segment.md.
//!
//! Consistency: a group's changesets follow each other without gaps ([`Position::is_followed_by`]). One that is held is
//! refused as a replay, one that leaves a gap as a gap, an older generation as fenced; nothing changes then. A new
//! generation begins at epoch 1, and only it may follow a loss: what was acknowledged and then lost to damage can not
//! be sent again, so going on in the same history would be silently wrong.
//!
//! Crash consistency: nothing acknowledged is lost, nothing half-received is ever offered, the order is kept. The steps
//! are above the code: [`Cache::open`], `log.rs`, `keeper.rs`. What is assumed of the medium is written at
//! [`durable::Storage`].
//!
//! Failures: EIO stops the cache until it is opened again (what is held stays readable); a full file system or the
//! cache's own limit makes sources wait; a torn tail is cut off; damage is named in the [`Report`], costs the groups it
//! hits their changesets from there on, and leaves the others alone.
//!
//! Retries: only writes that found the medium full. Cancellation: dropping an [`Appender`] discards its unfinished
//! changeset.
//!
//! Memory: about 100 bytes per held changeset and 24 per MiB of it; what was pushed and not written; nothing else grows.

mod append;
mod cache;
mod cursors;
mod error;
mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod keeper;
mod log;
mod position;
mod read;
mod recover;
mod scan;
mod state;

pub use append::Appender;
pub use cache::{
    Cache, CacheGroup, CacheStatus, CacheTarget, Options, SEGMENT_BYTES, SEGMENT_BYTES_MIN, TargetsOf,
};
pub use cursors::TARGET_NAME_BYTES_MAX;
pub use error::{AppendError, CacheError, ReadError};
pub use format::CHUNK_BYTES;
pub use keeper::CURSORS_EVERY;
pub use position::Position;
pub use read::HeldChangeset;
pub use recover::{Damage, GroupReport, Report, verify};
pub use state::{Closed, Event, Observer};
