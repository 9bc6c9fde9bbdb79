//! Replicas that begin in the middle of a history: those of targets that a group gets later, or whose files were lost.
//!
//! What such a replica is sent are changes of something that it never had. So nothing that it holds counts as a state of the disks until
//! every granule of every volume has come whole since it began: it is right from there on, by the epochs that follow. The source is asked to
//! send everything again: whatever it wants to compare is not known here, and so is sent, to all targets. That a granule were the same here would
//! not do: the source takes what is the same for the same at all targets, of which another may lack what this one has not.
//! Which granules have come is known in memory only. When the target ends in between, everything is sent again.
//!
//! The order, and what breaks when it is changed: the state says that the replica is unproven before the first epoch is applied (else a
//! crash leaves epochs that look as if they began with a whole first copy), and that it is proven with the first epoch after the one
//! that brought the last granule.

use std::collections::HashMap;
use std::ops::Range;

use block::{ByteCount, Epoch, GRANULE_BYTES, Generation, Granule, HistoryId, VolumeId};
use durable::fault_point;
use parking_lot::Mutex;

use crate::delta::{Delta, ranges};
use crate::state::{State, VolumeState};
use crate::{GroupReplica, ReplicaError};

/// Which granules have come whole, by volume: a bit each.
pub(crate) type Arrived = Mutex<HashMap<VolumeId, Vec<u64>>>;

impl GroupReplica {
    /// Whether it has taken in no epoch yet, so that [`GroupReplica::begin_after`] may say where it begins.
    pub fn is_blank(&self) -> bool {
        let shared = self.core.shared.read();
        shared.applied == Epoch::NONE && shared.failover.is_none() && !shared.promoted
    }

    /// Begins after `epoch` of a history that it has nothing of: it takes the epochs that follow, and has no point until
    /// everything has come whole. Durable when this returns.
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
        self.core.arrived.lock().clear();
        let mut shared = self.core.shared.write();
        (shared.generation, shared.history) = (state.generation, state.history);
        (shared.applied, shared.unproven) = (state.applied, true);
        drop(shared);
        writer.state = state;
        Ok(())
    }

    /// An epoch has been applied: what it wrote whole is right.
    pub(crate) fn arrived(&self, delta: &Delta<'_>) {
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
        let mut arrived = self.core.arrived.lock();
        let words = arrived.entry(volume).or_default();
        let needed = granules.end.0.div_ceil(64) as usize;
        if words.len() < needed {
            words.resize(needed, 0);
        }
        for granule in granules.start.0..granules.end.0 {
            words[(granule / 64) as usize] |= 1 << (granule % 64);
        }
    }

    /// Bytes that are still to come before it can have a point; 0 when it began with its history.
    pub fn unproven(&self) -> ByteCount {
        let shared = self.core.shared.read();
        if !shared.unproven {
            return ByteCount::ZERO;
        }
        // At least one: before its volumes are known, and until an epoch has been applied after them.
        let left: u64 = shared.volumes.iter().map(|volume| self.left(volume)).sum();
        ByteCount(left.max(1))
    }

    fn left(&self, volume: &VolumeState) -> u64 {
        let granules = volume.info.size.0.div_ceil(GRANULE_BYTES);
        let arrived = self.core.arrived.lock();
        let words = arrived.get(&volume.info.id).map(Vec::as_slice).unwrap_or_default();
        let done: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        granules.saturating_sub(done) * GRANULE_BYTES
    }

    /// Whether all of these have come.
    pub(crate) fn all_arrived(&self, volumes: &[VolumeState]) -> bool {
        volumes.iter().all(|volume| self.left(volume) == 0)
    }
}
