//! Comparing suspect granules with the replica before they are sent: resync as a drain that asks first.

use block::{Epoch, Granule};
use changeset::GranuleDigest;

use crate::tap::VolumeIndex;

/// Whether the replica holds the same as the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Tells answers apart.
    pub number: u64,
    /// Which disk.
    pub volume: VolumeIndex,
    /// The replica must have applied this epoch before it looks: later ones do not touch these granules.
    pub as_of: Epoch,
    /// Granules in rising order, all within [`changeset::COMPARED_GRANULES_MAX`] from a multiple of it, and what the disk holds there.
    pub granules: Vec<(Granule, GranuleDigest)>,
}

/// What the replica says of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The question's.
    pub number: u64,
    /// What it says.
    pub verdict: Verdict,
}

/// What the replica holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The same in all granules of the question.
    Same,
    /// The same but for these.
    Differs(Vec<Granule>),
    /// Nothing that could be compared.
    Unknown,
}

/// The way to the replica. What it is asked, it answers some time, or never: then nothing is trusted.
pub trait Comparer: Send {
    /// Whether there is a replica to compare with; `None` while that is not known.
    fn is_wanted(&mut self) -> Option<bool>;
    /// The checksum of a granule's data.
    fn digest(&self, volume: VolumeIndex, granule: Granule, data: &[u8]) -> GranuleDigest;
    /// Asks.
    fn ask(&mut self, question: Question);
    /// The next answer that has come, in any order.
    fn answer(&mut self) -> Option<Answer>;
    /// Questions that may be open at the same time.
    fn questions_max(&self) -> usize;
}
