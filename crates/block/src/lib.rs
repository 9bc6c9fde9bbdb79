//! The words everything else is written in: units, identities, extents, bitmaps, positions.
//!
//! No I/O here. Every public signature in Seawall that means an offset, a length, an epoch or an
//! identity uses one of these types, so that two different things never share `u64`.

mod bitmap;
mod extent;
mod id;
mod note;
mod position;
mod time;
mod units;

pub use bitmap::Bitmap;
pub use extent::{Extent, ExtentError};
pub use id::{Generation, GroupId, HistoryId, IdError, VolumeId};
pub use note::{
    FILESYSTEM_BYTES_MAX, FILESYSTEMS_MAX, LABEL_BYTES_MAX, Label, LabelError, PointNote, REASON_BYTES_MAX,
};
pub use position::{Consistency, Epoch, Ladder, LadderError};
pub use time::UnixNanos;
pub use units::{
    BLOCK_BYTES, BlockIndex, ByteCount, ByteOffset, GRANULE_BYTES, Granule, SECTOR_BYTES, Sector, SizeError,
    size_from_text,
};
