//! Every limit of a changeset, with its unit and what happens past it.

use block::ByteCount;

use crate::frame::{
    FrameHeader, MANIFEST_BYTES_MAX, TABLE_ENTRY_BYTES, TABLE_HEAD_BYTES, TAG_BYTES, TRAILER_BYTES,
};
use crate::header::RoutingHeader;

/// Data bytes in one changeset. An agent cuts an epoch before it would pass this; `seal` and `Opener` refuse more.
pub const PLAIN_BYTES_MAX: ByteCount = ByteCount::mib(128);
/// Data bytes in one frame. `seal` begins another frame past it; `Opener` refuses more.
pub const FRAME_PLAIN_BYTES: ByteCount = ByteCount::mib(1);
/// Volumes in one group. `seal` and `Opener` refuse more.
pub const VOLUMES_MAX: usize = 256;
/// Bytes of a volume's name in UTF-8. `seal` and `Opener` refuse more.
pub const NAME_BYTES_MAX: usize = 255;
/// Merged zero ranges in one [`crate::Fold`]. [`crate::Fold::fits`] answers no past it.
pub const ZERO_RANGES_MAX: usize = 256 * 1024;
/// Extents in one changeset. A fold for which [`crate::Fold::fits`] held before each addition never has more:
/// one for each data sector, one for each block that splits a zero range, one for each zero range, and the splits at
/// the ends of frames. `seal` and `Opener` refuse more.
pub const EXTENTS_MAX: u32 = 1024 * 1024;
/// Extents in one frame. `seal` begins another frame past it; `Opener` refuses more.
pub const FRAME_EXTENTS_MAX: u32 = 32 * 1024;
/// Frames of data in one changeset: one for each full [`FRAME_PLAIN_BYTES`] but the block that did not fit, one for each
/// full table, and room. `seal` and `Opener` refuse more.
pub const FRAMES_MAX: u32 = 1024;
/// Bytes of a sealed changeset, so that whoever stores one can refuse a longer one by its announced length.
pub const SEALED_BYTES_MAX: ByteCount = ByteCount(
    RoutingHeader::BYTES as u64
        + (MANIFEST_BYTES_MAX + TRAILER_BYTES) as u64
        + PLAIN_BYTES_MAX.0
        + EXTENTS_MAX as u64 * TABLE_ENTRY_BYTES as u64
        + FRAMES_MAX as u64 * TABLE_HEAD_BYTES as u64
        + (FRAMES_MAX as u64 + 2) * (FrameHeader::BYTES + TAG_BYTES) as u64,
);
