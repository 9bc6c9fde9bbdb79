use std::ops::ControlFlow;

use block::{Bitmap, ByteCount, Epoch, Extent, Granule};

/// A volume's place in the group, as the tap and the changeset number it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// A request was used again although its last completion was not seen.
    Unseen,
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

/// The kernel side of capture, or a simulated disk: records in issue order, dirty and draining bits, writes in flight.
///
/// What the tracker relies on:
/// 1. A write that is not wholly in the ring has its granules dirty before anyone can see it complete.
/// 2. While a granule is dirty or draining, no new write to it enters the ring.
/// 3. A captured write counts as in flight before it looks at the bits, and until it completes; its records are in the
///    ring by then.
/// 4. What it knows outlives the tracker: see [`Tap::unfinished`].
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
    /// taken) or when the next record is still being written. What is handed out is touched first.
    fn consume(&mut self, until: RingPosition, sink: &mut dyn FnMut(Record<'_>) -> ControlFlow<()>);
    /// The ring's size.
    fn ring_bytes(&self) -> ByteCount;

    /// At least as many granules as are dirty: 0 means that none is.
    fn dirty_at_most(&self) -> u64;
    /// Counts dirty granules anew, when the count has proven too high. Takes milliseconds.
    fn count_again(&mut self);
    /// The volume's dirty granules.
    fn dirty(&self, volume: VolumeIndex) -> Bitmap;
    /// Sets the draining bit, then clears the dirty one: at no instant is neither set.
    fn begin_drain(&mut self, volume: VolumeIndex, granule: Granule);
    /// Touches the granule, then clears the draining bit.
    fn end_drain(&mut self, volume: VolumeIndex, granule: Granule);
    /// Clears the draining bit of a granule of which nothing was taken.
    fn leave_drain(&mut self, volume: VolumeIndex, granule: Granule);
    /// Sets the dirty bit.
    fn mark_dirty(&mut self, volume: VolumeIndex, granule: Granule);

    /// Granules that are compared before they are sent; each is dirty or draining.
    fn suspects(&self, volume: VolumeIndex) -> Bitmap;
    /// Sets the suspect bit.
    fn suspect(&mut self, volume: VolumeIndex, granule: Granule);
    /// Clears it.
    fn trust(&mut self, volume: VolumeIndex, granule: Granule);

    /// Notes which captured writes are in flight.
    fn begin_grace(&mut self);
    /// Whether all of those have completed, or count as missed.
    fn grace_over(&mut self) -> bool;
    /// Those that have not count as missed from now on.
    fn miss_waited(&mut self);
    /// Every captured write in flight counts as missed from now on.
    fn miss_in_flight(&mut self);

    /// Adds to the granules that are not held durably by anyone else yet.
    fn touch(&mut self, volume: VolumeIndex, extent: Extent);
    /// Everything touched before the last call is held durably elsewhere.
    fn age_touched(&mut self);
    /// Granules that are touched or draining: what a tracker that is gone had taken and nobody has.
    fn unfinished(&self, volume: VolumeIndex) -> Bitmap;
    /// They have been marked dirty.
    fn forget_unfinished(&mut self);
    /// Another tap may take over what is kept of this one.
    fn release(&mut self) {}
    /// Remembers the last epoch that was given a number.
    fn keep_numbered(&mut self, epoch: Epoch);
    /// Remembers the last epoch that is held durably elsewhere.
    fn keep_acknowledged(&mut self, epoch: Epoch);

    /// The volume's loss, if any.
    fn loss(&self, volume: VolumeIndex) -> Option<LossReason>;
    /// All of the volume has been marked dirty.
    fn forget_loss(&mut self, volume: VolumeIndex);
    /// Whether a completion may have been skipped by every copy of the program (R11) since the last
    /// [`Tap::forget_skipped`]; also when that cannot be told.
    fn skipped(&mut self) -> bool;
    /// What [`Tap::skipped`] last saw has been acted on.
    fn forget_skipped(&mut self);

    /// Whether a write that counts as missed is in flight: it may have ended, unseen by the programs.
    fn missed_in_flight(&self) -> bool;
    /// How many sectors of writes the disk has ended and the programs have not seen ending, as far as that can be told:
    /// never too many.
    fn unseen(&mut self, volume: VolumeIndex) -> u64;
    /// All of the volume has been marked dirty.
    fn accept_unseen(&mut self, volume: VolumeIndex);
    /// Notes which places in flight are left of writes that are not there any more.
    fn note_stale(&mut self);
    /// Of those that were noted, such as still are: marks what they wrote, and frees them.
    fn mend_stale(&mut self);
    /// How many sectors were counted as ended because their place was found stale, since the tap began.
    fn mended(&self, volume: VolumeIndex) -> u64;

    /// Writes seen since the tap began, captured or not.
    fn writes(&self) -> u64;
    /// Counts since the tap began.
    fn counters(&self) -> TapCounters;
    /// See [`crate::SourceStatus::ended_twice`].
    fn ended_twice(&self) -> u64 {
        0
    }
    /// Whether data is captured, not only granules.
    fn data_mode(&self) -> bool;
}
