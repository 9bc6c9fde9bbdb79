use block::{ByteCount, Consistency, Epoch, Granule, UnixNanos};
use changeset::{Fold, VolumeInfo};

use crate::CaptureError;

/// How a volume is followed just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every write's data is captured.
    Data,
    /// Only which granules were written; they are read from the disk.
    Bitmap,
    /// Checksums of the whole volume, again and again.
    Scan,
}

/// Whether a step found something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Call again at once.
    Busy,
    /// Nothing to do at the moment.
    Idle,
    /// The open epoch is full: cut it to go on.
    Full,
}

/// The end of an epoch.
pub struct Cut {
    /// What changed since the cut before.
    pub fold: Fold,
    /// What may be said of the state at this cut.
    pub consistency: Consistency,
    /// When the disks were in this state; never later than they were.
    pub time: UnixNanos,
}

/// A place in a source's order of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub(crate) u64);

/// What a source says of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// How it is followed.
    pub mode: Mode,
    /// Its size.
    pub size: ByteCount,
    /// Bytes in dirty granules, not yet being read.
    pub dirty: ByteCount,
}

/// What a source says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceStatus {
    /// By volume.
    pub volumes: Vec<VolumeStatus>,
    /// Bytes that applications wrote, as far as captured.
    pub written: ByteCount,
    /// Bytes read from the disks by drains so far.
    pub drained: ByteCount,
    /// Bytes being drained now.
    pub draining: ByteCount,
    /// Ring size; 0 without a ring.
    pub ring: ByteCount,
    /// Ring bytes waiting to be consumed.
    pub ring_used: ByteCount,
    /// Writes missed because the ring was full.
    pub missed_ring: u64,
    /// Writes missed for any reason; each is or was a dirty granule.
    pub missed: u64,
    /// Bytes of granules that are to be compared with the replica, because it is not known whether they changed.
    pub suspect: ByteCount,
    /// Bytes of those that have been compared, and how much of it was different.
    pub compared: ByteCount,
    /// See `compared`.
    pub different: ByteCount,
    /// How often tracking was lost and everything became dirty.
    pub losses: u64,
    /// Sectors whose end was counted twice, as found when the disk was idle; until then they could hide as many that
    /// nobody saw end.
    pub ended_twice: u64,
    /// The last thing that went wrong, in words.
    pub last_error: Option<String>,
}

/// Something that turns a group's disks into epochs.
pub trait Source: Send {
    /// The group's volumes as they are now.
    fn volumes(&self) -> Vec<VolumeInfo>;
    /// Does a bounded piece of work, folding into the open epoch until its memory reaches `limit`.
    ///
    /// # Errors
    /// When the source cannot go on. What can be repaired by reading again is not an error.
    fn advance(&mut self, now: UnixNanos, limit: ByteCount) -> Result<Progress, CaptureError>;
    /// Memory of the open epoch.
    fn open_bytes(&self) -> ByteCount;
    /// Whether an epoch cut now would be worth offering, or only the epoch's own bytes force a cut.
    fn consistency(&self) -> Consistency;
    /// How far the disks' writes have come.
    fn position(&self) -> Position;
    /// Whether everything that was written before `position` was given is in the open epoch or an earlier one; what was
    /// missed is known to be: it makes the epoch's consistency none.
    fn reached(&self, position: Position) -> bool;
    /// Ends the open epoch, gives it a number, and begins the next in `reuse` (an emptied fold). Numbers have no gaps.
    fn cut(&mut self, reuse: Fold, epoch: Epoch) -> Cut;
    /// Epochs up to this one are held durably elsewhere.
    fn acknowledged(&mut self, held: Epoch);
    /// Compares all of a volume with the replica again, by its place in [`Source::volumes`]. False when it is compared all the
    /// time.
    fn suspect(&mut self, volume: usize) -> bool {
        let _ = volume;
        false
    }
    /// Sends all of a volume again, where it is compared all the time.
    fn send_again(&mut self, volume: usize) {
        let _ = volume;
    }
    /// Compares these granules of a volume with the replica again. False when they are compared all the time.
    fn suspect_granules(&mut self, volume: usize, granules: &mut dyn Iterator<Item = Granule>) -> bool {
        let _ = (volume, granules);
        false
    }
    /// Lets another source of the same volumes take over what is kept of this one, which is not used any more.
    fn release(&mut self) {}
    /// What it says of itself.
    fn status(&self) -> SourceStatus;
}
