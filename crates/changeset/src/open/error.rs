use std::io;

use block::GroupId;

use crate::header::HeaderError;
use crate::volume::VolumesError;

/// Why a changeset is refused. Nothing of it may be applied.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The routing header is none, damaged, or of an unknown version.
    #[error("open changeset: {0}")]
    Header(#[from] HeaderError),
    /// It belongs to another group.
    #[error(
        "open changeset: it belongs to group {found}, not to {expected}; the sender is set up for another target"
    )]
    WrongGroup {
        /// The group that was asked for.
        expected: GroupId,
        /// The group it names.
        found: GroupId,
    },
    /// It was sealed with another key.
    #[error(
        "open changeset: it was sealed with another key of group {0}; give source and target the same key file"
    )]
    WrongKey(GroupId),
    /// It ends early.
    #[error("open changeset: truncated after {received} bytes, in {part}")]
    Truncated {
        /// Bytes that came.
        received: u64,
        /// What was being read.
        part: Part,
    },
    /// Bytes follow its trailer.
    #[error("open changeset: {0} bytes follow its trailer")]
    TrailingBytes(usize),
    /// A frame's header is damaged.
    #[error("open changeset: the header of {0} is damaged: its checksum does not match")]
    FrameChecksum(Part),
    /// A field has a value that it cannot have.
    #[error("open changeset: {field} of {part} is {value}, which is out of range")]
    Field {
        /// Where.
        part: Part,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A frame is not where it belongs.
    #[error("open changeset: frame {found} where frame {expected} belongs: reordered, repeated or left out")]
    OutOfOrder {
        /// The frame that belongs here.
        expected: u32,
        /// The frame that is here.
        found: u32,
    },
    /// A frame does not authenticate.
    #[error(
        "open changeset: {0} does not authenticate: its bytes or the routing header were altered, or it belongs to another changeset"
    )]
    Forged(Part),
    /// A frame does not decompress to the length it names.
    #[error("open changeset: {part} does not decompress to its {plain_bytes} bytes")]
    Decompress {
        /// The frame.
        part: Part,
        /// The length it names.
        plain_bytes: u32,
        /// What the decompressor said, when it failed.
        #[source]
        source: Option<io::Error>,
    },
    /// The manifest does not describe a group.
    #[error("open changeset: its manifest is refused: {0}")]
    Manifest(VolumesError),
    /// An extent is not what an extent must be.
    #[error("open changeset: extent {index} of frame {frame} {fault}")]
    Extent {
        /// The frame.
        frame: u32,
        /// Its place in the frame's table.
        index: u32,
        /// What is wrong.
        fault: ExtentFault,
    },
    /// The trailer does not agree with what came before it.
    #[error("open changeset: its trailer does not agree with its frames")]
    Trailer,
    /// It was refused by an earlier call.
    #[error("open changeset: it was already refused")]
    Refused,
}

impl OpenError {
    /// Whether the same changeset may open when it is fetched again: only when bytes are missing. Everything else is
    /// the same next time, or an attack.
    pub fn is_retryable(&self) -> bool {
        matches!(self, OpenError::Truncated { .. })
    }
}

/// A part of a changeset, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The routing header.
    Header,
    /// Frame 0: the volumes.
    Manifest,
    /// A frame of data, from 1.
    Frame(u32),
    /// The last frame.
    Trailer,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Part::Header => f.write_str("the routing header"),
            Part::Manifest => f.write_str("the manifest"),
            Part::Frame(number) => write!(f, "frame {number}"),
            Part::Trailer => f.write_str("the trailer"),
        }
    }
}

/// What is wrong with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentFault {
    /// Its volume is not in the manifest.
    #[error("is of volume {0} (by index), which the manifest does not name")]
    Volume(u16),
    /// Its kind means nothing.
    #[error("has the unknown kind {0}")]
    Kind(u8),
    /// Its reserved bytes are not zero.
    #[error("has reserved bytes that are not zero")]
    Reserved,
    /// It is empty, or not whole sectors.
    #[error("is not a number of whole sectors")]
    Unaligned,
    /// It ends behind its volume.
    #[error("ends behind its volume")]
    Outside,
    /// It lies before the end of the one before it.
    #[error("is not behind the one before it")]
    Unsorted,
    /// It has more data than its frame.
    #[error("has more data than its frame")]
    Data,
}
