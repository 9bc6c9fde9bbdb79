use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use block::{ByteCount, Epoch, Generation, GroupId};

use crate::Position;

/// Why a cache was not opened, or a change of it not made.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Another process has the directory.
    #[error("open cache {0}: another process has it open; stop that one first")]
    Locked(PathBuf),
    /// A file was written by another version of this program.
    #[error("open cache file {path}: {reason}; run the version that wrote it")]
    Version {
        /// The file.
        path: PathBuf,
        /// Which versions.
        reason: String,
    },
    /// The storage failed.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the storage said.
        source: io::Error,
    },
    /// The storage failed earlier; nothing is accepted until the cache is opened again. What is held stays readable.
    #[error("the cache has stopped: {0}; mend the disk, then restart the process server")]
    Poisoned(Arc<str>),
    /// The cache is being closed.
    #[error("the cache is closing")]
    Closing,
}

/// Why a changeset was not accepted. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// It is already held: a replay.
    #[error("epoch {epoch} is already held (held: {held}); go on after that")]
    Replayed {
        /// What was offered.
        epoch: Epoch,
        /// The last that is held or accepted.
        held: Epoch,
    },
    /// The ones between are missing.
    #[error("epoch {epoch} would leave a gap; epoch {expected} comes next")]
    Gap {
        /// What was offered.
        epoch: Epoch,
        /// What would be accepted.
        expected: Epoch,
    },
    /// The group has a later history.
    #[error("generation {generation} of the group was superseded by {current}; this source is fenced")]
    OldGeneration {
        /// What was offered.
        generation: Generation,
        /// The group's.
        current: Generation,
    },
    /// Held changesets of this generation were lost, so the next one must not follow.
    #[error(
        "the cache lost changesets of group {group} from {from} on ({reason}); resync with a new generation"
    )]
    Lost {
        /// Whose.
        group: GroupId,
        /// The first that is missing.
        from: Position,
        /// What happened.
        reason: Arc<str>,
    },
    /// No room now. [`Event::Room`](crate::Event::Room) tells when to try again.
    #[error("the cache is full: {needed} needed, {free} free; waiting for targets to apply what it holds")]
    Full {
        /// What the changeset needs.
        needed: ByteCount,
        /// What is free.
        free: ByteCount,
    },
    /// Larger than the cache can ever hold.
    #[error("a changeset of {total} does not fit a cache of {bytes_max}; raise cache_bytes_max")]
    TooLarge {
        /// The changeset's size.
        total: ByteCount,
        /// The limit.
        bytes_max: ByteCount,
    },
    /// Another appender of the same group was opened.
    #[error("another connection of this group took over")]
    Superseded,
    /// Bytes came without a beginning, past the announced total, or ended before it.
    #[error("the changeset's bytes do not match its announced size: {0}")]
    Protocol(&'static str),
    /// The cache takes nothing more.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Why a changeset was not read for a target.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It was applied by all targets and freed meanwhile.
    #[error("{0} is no longer held: all targets have applied it")]
    Freed(Position),
    /// The target needs changesets that are freed already.
    #[error(
        "the target holds {holds}, but the oldest changeset still held is {oldest}; the volumes must be resynced"
    )]
    TooLate {
        /// The target's position.
        holds: Position,
        /// The cache's oldest.
        oldest: Position,
    },
    /// The target holds more than the cache ever had, so the two do not speak of the same history.
    #[error(
        "the target holds {holds}, the cache only {held}: not the same history; resync with a new generation"
    )]
    Ahead {
        /// The target's position.
        holds: Position,
        /// The cache's.
        held: Position,
    },
    /// The target, new to this cache, holds changesets that only this cache could have sent.
    #[error(
        "the target holds {0}, which it did not get from this cache: another history; resync with a new generation"
    )]
    OtherHistory(Position),
    /// The group has no target of this name.
    #[error("group {group} has no target named {target:?}")]
    UnknownTarget {
        /// The group.
        group: GroupId,
        /// The name.
        target: String,
    },
    /// Bytes on the medium are not those that were written. The group's changesets from there on are dropped.
    #[error("{position} is damaged in segment {segment} at byte {offset}; resync with a new generation")]
    Damaged {
        /// Which changeset.
        position: Position,
        /// Where: the segment.
        segment: u64,
        /// Where: the byte in it.
        offset: u64,
    },
    /// The storage failed. Trying again may help.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl ReadError {
    /// Whether the same call may succeed later without anyone mending something.
    pub fn is_retryable(&self) -> bool {
        matches!(self, ReadError::Freed(_) | ReadError::Cache(_))
    }
}

impl AppendError {
    /// Whether the same changeset may be accepted later without anyone mending something.
    pub fn is_retryable(&self) -> bool {
        matches!(self, AppendError::Full { .. } | AppendError::Superseded | AppendError::Cache(_))
    }
}
