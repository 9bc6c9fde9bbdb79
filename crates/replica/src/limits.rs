use block::{ByteCount, GRANULE_BYTES};

/// Data bytes that one checksum of an undo layer covers. Longer old content is stored as several runs; a small read
/// from a view reads at most this much more than asked.
pub const RUN_BYTES_MAX: ByteCount = ByteCount(GRANULE_BYTES);
/// Bytes gathered before a layer is written on. More old content is written in several calls.
pub const LAYER_BATCH_BYTES: ByteCount = ByteCount::mib(1);
/// Index entries of one layer after which runs of zeroes inside old data are stored as data, so that an epoch that
/// discards a fragmented terabyte cannot grow the index without bound. Holes are still stored as zeroes.
pub const LAYER_SPLITS_MAX: usize = 1024 * 1024;
/// Bytes written to an image in one call. Longer adjacent extents take several.
pub const IMAGE_BATCH_BYTES: ByteCount = ByteCount::mib(4);
/// Slices in one vectored write, the kernel's `IOV_MAX`. More take several calls.
pub const SLICES_MAX: usize = 1024;
/// Images of one group written and synced at the same time. More wait.
pub const IMAGE_THREADS_MAX: usize = 8;
/// Layer files kept open for views of one group. More are closed and opened again as needed.
pub const LAYER_HANDLES_MAX: usize = 128;
/// Layers that a view looks through one after another. When there are more it merges them into one list.
pub const VIEW_LAYERS_MAX: usize = 4;
/// Recovery points of one group, whatever retention is configured. Past it the oldest is dropped.
pub const POINTS_MAX: usize = 65_536;
/// The largest layer file that is kept to be written over after it was dropped. A larger one is removed, and so is any
/// while one is kept.
pub const SPARE_BYTES_MAX: ByteCount = ByteCount::mib(256);
