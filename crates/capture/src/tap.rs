use std::ops::ControlFlow;

use block::{Bitmap, ByteCount, Extent, Granule};

/// A volume's place in the group, as the tap and the changeset number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeIndex(pub u16);

/// How far the ring of write records has come, in bytes since the tap began. Issue order is ring order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RingPosition(pub u64);

/// What a record does to its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind<'a> {
    /// The bytes that were written.
    Data(&'a [u8]),
    /// Reads as zeroes from now on: write-zeroes, and discard (whose content the device need not define).
    Zeroes,
}

/// One captured write or a part of it, in the order in which the kernel issued them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Which disk.
    pub volume: VolumeIndex,
    /// Where.
    pub extent: Extent,
    /// What.
    pub kind: RecordKind<'a>,
    /// Parts of one request share a lane; between its first and its last no other request uses the lane.
    pub lane: u32,
    /// The request's first part. An unfinished request in the lane was missed and is dropped.
    pub first: bool,
    /// The request's last part.
    pub last: bool,
}

/// Why tracking of a volume has a gap. The volume is suspect: all of it becomes dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossReason {
    /// A program wrote with raw SCSI, NVMe or similar commands.
    Passthrough,
    /// A write outside the disk as it was when protection began.
    OutOfRange,
    /// An operation whose range the request does not tell (a zone append or reset).
    Operation,
    /// The capture program met a request it could not walk.
    Walk,
    /// The kernel may have skipped a completion (R11).
    Skipped,
}

/// What the tap has counted since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapCounters {
    /// Writes whose data went into the ring.
    pub data_writes: u64,
    /// Their bytes.
    pub data_bytes: u64,
    /// Discards and write-zeroes captured.
    pub zero_writes: u64,
    /// Writes missed because their granule was dirty or being drained.
    pub missed_dirty: u64,
    /// Writes missed because the ring was full.
    pub missed_ring: u64,
    /// Writes missed for any other reason (no data mode, data not readable, requeued, too many in flight).
    pub missed_other: u64,
    /// Writes that completed with an error.
    pub failed: u64,
}

/// The kernel side of capture, or a simulated disk: records in issue order, dirty and draining bits, in-flight counts.
///
/// What the tracker relies on:
/// 1. A write that is not wholly in the ring has its granules dirty before anyone can see it complete.
/// 2. While a granule is dirty or draining, no new write to it enters the ring.
/// 3. A captured write joins the in-flight count of the current phase before it looks at the bits, and leaves it
///    when it completes, after its records are in the ring.
pub trait Tap: Send {
    /// Granules of each volume, by index.
    fn granules(&self, volume: VolumeIndex) -> u64;
    /// How many volumes.
    fn volumes(&self) -> u16;

    /// Everything recorded so far lies before this position.
    fn produced(&self) -> RingPosition;
    /// Everything before this position has been handed out.
    fn consumed(&self) -> RingPosition;
    /// Hands out the records before `until` in order; ends early when the sink breaks (that record has been
    /// taken) or when the next record is still being written.
    fn consume(&mut self, until: RingPosition, sink: &mut dyn FnMut(Record<'_>) -> ControlFlow<()>);
    /// The ring's size.
    fn ring_bytes(&self) -> ByteCount;

    /// At least as many granules as are dirty: 0 means that none is.
    fn dirty_at_most(&self) -> u64;
    /// The volume's dirty granules.
    fn dirty(&self, volume: VolumeIndex) -> Bitmap;
    /// Sets the draining bit, then clears the dirty one: at no instant is neither set.
    fn begin_drain(&mut self, volume: VolumeIndex, granule: Granule);
    /// Clears the draining bit.
    fn end_drain(&mut self, volume: VolumeIndex, granule: Granule);
    /// Sets the dirty bit.
    fn mark_dirty(&mut self, volume: VolumeIndex, granule: Granule);

    /// The in-flight count that new captured writes join: 0 or 1.
    fn phase(&self) -> usize;
    /// Lets new captured writes join the other count.
    fn flip_phase(&mut self);
    /// Whether no captured write of that phase was in flight at some instant during the call.
    fn drained(&self, phase: usize) -> bool;

    /// Takes the volume's loss, if any, and forgets it.
    fn take_loss(&mut self, volume: VolumeIndex) -> Option<LossReason>;
    /// At least as many completions as were skipped by every copy of the program since the tap began (R11); `None`
    /// when that cannot be told.
    fn skipped_by_all(&self) -> Option<u64> {
        Some(0)
    }
    /// Counts since the tap began.
    fn counters(&self) -> TapCounters;
    /// Whether data is captured, not only granules.
    fn data_mode(&self) -> bool;
}
