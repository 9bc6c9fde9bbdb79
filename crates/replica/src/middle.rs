//! Replicas that begin in the middle of a history: those of targets that a group gets later, or whose files were lost.
//!
//! What such a replica is sent are changes of something that it never had. So nothing that it holds counts as a state of the disks until
//! the source has compared every granule of every volume with it since it began: a granule that was the same is right from there on, by
//! the epochs that follow, and of one that differs the source knows that it must be sent, and offers no point before it was.
//! Which granules were compared is known in memory only. When the target ends in between, the source is told that nothing is compared,
//! and compares everything again.
//!
//! The order, and what breaks when it is changed: the state says that the replica is unproven before the first epoch is applied (else a
//! crash leaves epochs that look as if they began with a whole first copy), and that it is proven with the first epoch after the last
//! granule was compared, which the source cut after its comparison began.

use std::collections::HashMap;
use std::ops::Range;

use block::{ByteCount, Epoch, GRANULE_BYTES, Generation, Granule, HistoryId, VolumeId};
use durable::fault_point;
use parking_lot::Mutex;

use crate::delta::{Delta, ranges};
use crate::state::{State, VolumeState};
use crate::{GroupReplica, ReplicaError};

/// Which granules the source has compared, by volume: a bit each.
pub(crate) type Compared = Mutex<HashMap<VolumeId, Vec<u64>>>;

impl GroupReplica {
    /// Whether it has taken in no epoch yet, so that [`GroupReplica::begin_after`] may say where it begins.
    pub fn is_blank(&self) -> bool {
        let shared = self.core.shared.read();
        shared.applied == Epoch::NONE && shared.failover.is_none() && !shared.promoted
    }

    /// Begins after `epoch` of a history that it has nothing of: it takes the epochs that follow, and has no point until
    /// everything was [compared](GroupReplica::compared). Durable when this returns.
    ///
    /// # Errors
    /// When it has taken in epochs, or follows another generation: nothing changed. A failure of storage poisons it.
    pub fn begin_after(
        &self,
        generation: Generation,
        epoch: Epoch,
        history: HistoryId,
    ) -> Result<(), ReplicaError> {
        self.core.check_poison()?;
        let mut writer = self.writer.lock();
        let group = self.core.group;
        if let Some(expected) = writer.state.generation.filter(|known| *known != generation) {
            return Err(ReplicaError::WrongGeneration { group, expected, found: generation, epoch });
        }
        if !self.is_blank() {
            return Err(ReplicaError::Gap { group, epoch: epoch.next(), applied: writer.state.applied });
        }
        if epoch == Epoch::NONE {
            return Ok(());
        }
        let state = State {
            generation: Some(generation),
            history,
            applied: epoch,
            unproven: true,
            ..writer.state.clone()
        };
        if let Err(error) = writer.state_file.write(&state, &self.core.dir) {
            self.core.poison(error.to_string());
            return Err(error);
        }
        fault_point("after-state");
        self.core.compared.lock().clear();
        let mut shared = self.core.shared.write();
        (shared.generation, shared.history) = (state.generation, state.history);
        (shared.applied, shared.unproven) = (state.applied, true);
        drop(shared);
        writer.state = state;
        Ok(())
    }

    /// The source has been told, as of an epoch that is applied, whether these granules are as they are there.
    pub fn compared(&self, volume: VolumeId, granules: Range<Granule>) {
        if self.core.shared.read().unproven {
            self.mark(volume, granules);
        }
    }

    /// An epoch has been applied: what it wrote whole needs no comparison.
    pub(crate) fn overwritten(&self, delta: &Delta<'_>) {
        for (volume, changes) in &delta.changes {
            let info = &delta.volumes[*volume];
            for range in ranges(changes) {
                // The last granule may be a short one.
                let end = if range.end == info.size.0 {
                    range.end.next_multiple_of(GRANULE_BYTES)
                } else {
                    range.end
                };
                let (first, last) = (range.start.div_ceil(GRANULE_BYTES), end / GRANULE_BYTES);
                if first < last {
                    self.mark(info.id, Granule(first)..Granule(last));
                }
            }
        }
    }

    fn mark(&self, volume: VolumeId, granules: Range<Granule>) {
        let mut compared = self.core.compared.lock();
        let words = compared.entry(volume).or_default();
        let needed = granules.end.0.div_ceil(64) as usize;
        if words.len() < needed {
            words.resize(needed, 0);
        }
        for granule in granules.start.0..granules.end.0 {
            words[(granule / 64) as usize] |= 1 << (granule % 64);
        }
    }

    /// Bytes that are still to be compared before it can have a point; 0 when it began with its history.
    pub fn unproven(&self) -> ByteCount {
        let shared = self.core.shared.read();
        if !shared.unproven {
            return ByteCount::ZERO;
        }
        // At least one: before its volumes are known, and until an epoch has been applied on what was compared.
        let left: u64 = shared.volumes.iter().map(|volume| self.left(volume)).sum();
        ByteCount(left.max(1))
    }

    fn left(&self, volume: &VolumeState) -> u64 {
        let granules = volume.info.size.0.div_ceil(GRANULE_BYTES);
        let compared = self.core.compared.lock();
        let words = compared.get(&volume.info.id).map(Vec::as_slice).unwrap_or_default();
        let done: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        granules.saturating_sub(done) * GRANULE_BYTES
    }

    /// Whether the source has compared all of these.
    pub(crate) fn all_compared(&self, volumes: &[VolumeState]) -> bool {
        volumes.iter().all(|volume| self.left(volume) == 0)
    }
}
