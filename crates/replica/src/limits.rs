use block::{ByteCount, GRANULE_BYTES};

/// This crate's own tests have a few dozen epochs, and must come past these limits all the same.
pub(crate) const fn small_in_tests(limit: usize, in_tests: usize) -> usize {
    if cfg!(test) { in_tests } else { limit }
}

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
/// Layer and span files of one group kept open for views. More are closed and opened again as needed.
pub const FILE_HANDLES_MAX: usize = 256;
/// Index pages of one group kept in memory for views, of 4 KiB each: 32 MiB. The least used are read again as needed.
pub const INDEX_PAGES_MAX: usize = 8192;
/// Segments of one view kept in memory, of 32 bytes each: 8 MiB. What is more is looked up in index files.
pub const VIEW_SEGMENTS_MAX: usize = small_in_tests(256 * 1024, 48);
/// Layers applied since a view was last put together, after which it is put together anew.
pub const VIEW_TAIL_LAYERS_MAX: usize = small_in_tests(32, 3);
/// Parts of a view. When there are more, because spans are missing, they are built first.
pub const VIEW_PARTS_MAX: usize = small_in_tests(256, 8);
/// Epochs of a span of the first level, and spans of one level in one of the next.
pub const SPAN_FAN: u64 = small_in_tests(16, 2) as u64;
/// Levels of spans: the highest has 16 777 216 epochs, a year of one every two seconds. Older ones take one part of a view each.
pub const SPAN_LEVELS: u32 = 6;
/// Layers merged into one at once. More take several rounds.
pub const MERGE_LAYERS_MAX: usize = small_in_tests(64, 3);
/// Read at once of a layer that is being merged.
pub const MERGE_WINDOW_BYTES: ByteCount = ByteCount::kib(256);
/// Written to a merged layer between two syncs.
pub const MERGE_SYNC_BYTES: ByteCount = ByteCount::mib(16);
/// Recovery points of one group, whatever retention is configured. Past it the oldest is dropped. Each takes about half a KiB
/// of memory.
pub const POINTS_MAX: usize = 262_144;
/// Epochs applied since checksums of images were last brought up to date, after which that is done again.
pub const CHECKSUM_EPOCHS: u64 = 16;
/// Put back by one epoch of a failover, and held in memory meanwhile.
pub const FAILOVER_EPOCH_BYTES: ByteCount = ByteCount(small_in_tests(64 << 20, 8 << 10) as u64);
/// Written to a promoted group and held in memory until it is applied. There are two of them; when both are full, writes wait.
pub const PROMOTED_FOLD_BYTES_MAX: ByteCount = ByteCount(small_in_tests(64 << 20, 64 << 10) as u64);
/// From this much on it is applied without waiting for its time.
pub const PROMOTED_CUT_BYTES: ByteCount = ByteCount(small_in_tests(16 << 20, 48 << 10) as u64);
/// The longest journal of what was written. Past it, it is applied, though memory would hold more.
pub const PROMOTED_JOURNAL_BYTES_MAX: ByteCount = ByteCount(small_in_tests(256 << 20, 256 << 10) as u64);
/// Data of one record of such a journal. A longer write takes several.
pub const JOURNAL_RECORD_BYTES_MAX: u64 = small_in_tests(1 << 20, 16 << 10) as u64;
/// Read at once of an image that is scrubbed.
pub const SCRUB_CHUNK_BYTES: ByteCount = ByteCount::mib(1);
/// Damaged blocks of one image that are listed. Where there are more, all behind them count as damaged.
pub const BAD_BLOCKS_MAX: usize = 65_536;
/// Points of one group that are pinned. More are refused.
pub const PINS_MAX: usize = 1024;
/// The largest layer file that is kept to be written over after it was dropped. A larger one is removed, and so is any
/// while one is kept.
pub const SPARE_BYTES_MAX: ByteCount = ByteCount::mib(256);
