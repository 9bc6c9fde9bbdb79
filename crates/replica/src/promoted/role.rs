//! Beginning and ending it, and what others ask of a promoted group.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{ByteCount, Generation, UnixNanos, VolumeId};
use durable::fault_point;

use super::marker::Marker;
use super::{Promoted, PromotedStatus, PromotedVolume, journal};
use crate::ReplicaError;
use crate::error::Context;
use crate::group::GroupReplica;
use crate::state::State;

impl GroupReplica {
    /// Serves its volumes for writing from now on; nothing is taken from a source meanwhile. Asked again, it stays as it is.
    ///
    /// A group whose failover was committed begins a new generation, since a source may have begun that one, and numbers its epochs alike.
    ///
    /// # Errors
    /// When it is not failed over, or a source has sent something since it was: nothing changed. When storage fails: it may be
    /// asked again.
    pub fn promote(&self) -> Result<Generation, ReplicaError> {
        let group = self.core.group;
        let mut slot = self.promoted.write();
        if slot.is_some() {
            return Ok(self.applied().0.unwrap_or_default());
        }
        // A failover that goes on holds it, and applies epochs.
        let _upkeep = self.core.upkeep.lock();
        let mut writer = self.writer.lock();
        self.core.check_poison()?;
        self.roll_back_unfinished(&mut writer)?;
        let storage = &*self.core.storage;
        let generation = writer.state.generation.unwrap_or_default();
        match self.failover() {
            Some((_, true)) => {
                // What is written here from now on is written nowhere else.
                let history = writer.state.history.begun_by(&[(self.options.clock)().0]);
                let state = State { history, ..writer.state.clone() };
                self.write_state(&mut writer, state)?;
            }
            Some((failover, false)) => {
                return Err(ReplicaError::FailoverPending { group, point: failover.point });
            }
            None => {
                let marker = Marker::read(storage, &self.core.dir, group)?;
                let own = marker
                    .filter(|marker| marker.generation <= generation && marker.own == writer.state.applied);
                if own.is_none() {
                    return Err(ReplicaError::NotFailedOver { group });
                }
                let next = Generation(generation.0 + 1);
                let history = writer.state.history.begun_by(&[next.0, (self.options.clock)().0]);
                let state = State { generation: Some(next), history, ..writer.state.clone() };
                self.write_state(&mut writer, state)?;
            }
        }
        let dir = journal::dir(&self.core.dir);
        storage.create_dir_all(&dir).context("create directory", &dir)?;
        let since = (self.options.clock)();
        let generation = writer.state.generation.unwrap_or_default();
        let marker = Marker { promoted: true, generation, own: writer.state.applied, since };
        self.write_marker(&marker)?;
        self.core.shared.write().promoted = true;
        *slot = Some(Arc::new(Promoted::new(&self.core, since)));
        Ok(generation)
    }

    /// Ends it: everything that was written is applied, and the newest state is a recovery point.
    ///
    /// # Errors
    /// When it is not promoted, or a volume of it is open: nothing changed. When there is no space: it stays promoted, and may be asked
    /// again.
    pub fn demote(&self) -> Result<(), ReplicaError> {
        let group = self.core.group;
        let mut slot = self.promoted.write();
        let promoted = slot.clone().ok_or(ReplicaError::NotPromoted { group })?;
        let open = promoted.handles.load(Ordering::SeqCst);
        if open > 0 {
            return Err(ReplicaError::PromotedInUse { group, open });
        }
        promoted.cut(self)?;
        let dir = journal::dir(&self.core.dir);
        self.core.storage.sync_dir(&dir).context("sync directory", &dir)?;
        fault_point("before-demoted");
        let writer = self.writer.lock();
        let generation = writer.state.generation.unwrap_or_default();
        let since = promoted.since;
        let marker = Marker { promoted: false, generation, own: writer.state.applied, since };
        self.write_marker(&marker)?;
        self.core.shared.write().promoted = false;
        *slot = None;
        promoted.want_cut();
        Ok(())
    }

    /// Called with the writer's lock held. A failure that leaves open what is on disk poisons.
    fn write_marker(&self, marker: &Marker) -> Result<(), ReplicaError> {
        let written = marker.write(&*self.core.storage, &self.core.dir, self.core.group);
        if let Err(error) = &written
            && !error.is_retryable()
        {
            self.core.poison(error.to_string());
        }
        written
    }

    /// Before a failover is committed: everything up to here was made here.
    pub(crate) fn mark_own(&self, state: &State) -> Result<(), ReplicaError> {
        if self.core.shared.read().promoted {
            return Ok(());
        }
        let generation = state.generation.unwrap_or_default();
        let marker = Marker { promoted: false, generation, own: state.applied, since: UnixNanos(0) };
        marker.write(&*self.core.storage, &self.core.dir, self.core.group)
    }

    /// How it is while it is promoted; else `None`.
    pub fn promoted(&self) -> Option<PromotedStatus> {
        let promoted = self.promoted.read().clone()?;
        let waiting = ByteCount(promoted.folds.read().bytes());
        Some(PromotedStatus { since: promoted.since, waiting, open: promoted.handles.load(Ordering::SeqCst) })
    }

    /// Applies what was written until now; each cut is a recovery point. Without writes, or when it is not promoted, nothing is done.
    ///
    /// # Errors
    /// When there is no space, which leaves the writes in their journal; or the replica is poisoned.
    pub fn cut_promoted(&self) -> Result<(), ReplicaError> {
        let promoted = self.promoted.read().clone();
        promoted.map_or(Ok(()), |promoted| promoted.cut(self))
    }

    /// Ends the waiting of [`GroupReplica::wait_to_cut`].
    pub fn want_cut(&self) {
        if let Some(promoted) = &*self.promoted.read() {
            promoted.want_cut();
        }
    }

    /// Waits until a cut is wanted, because much has been written, or for a time at most; `false` when it is not promoted any more.
    pub fn wait_to_cut(&self, time: Duration) -> bool {
        let Some(promoted) = self.promoted.read().clone() else { return false };
        let mut wanted = promoted.wanted.lock();
        if !*wanted {
            promoted.changed.wait_for(&mut wanted, time);
        }
        drop(wanted);
        self.core.shared.read().promoted
    }

    /// Opens a volume of a promoted group. While it is open the group is not demoted.
    ///
    /// # Errors
    /// When the group is not promoted or has no such volume.
    pub fn promoted_volume(self: &Arc<Self>, volume: VolumeId) -> Result<PromotedVolume, ReplicaError> {
        let group = self.core.group;
        let slot = self.promoted.read();
        let promoted = slot.clone().ok_or(ReplicaError::NotPromoted { group })?;
        let index = promoted.volumes.iter().position(|(info, _)| info.id == volume);
        let index = index.ok_or(ReplicaError::NoSuchVolume { group, volume, epoch: self.applied().1 })?;
        promoted.handles.fetch_add(1, Ordering::SeqCst);
        Ok(PromotedVolume { replica: self.clone(), promoted, index })
    }

    /// The first half of a cut.
    #[cfg(test)]
    pub(crate) fn close_promoted(&self) {
        if let Some(promoted) = &*self.promoted.read() {
            let _applying = promoted.applying.lock();
            promoted.close();
        }
    }

    /// What the open fold becomes.
    #[cfg(test)]
    pub(crate) fn next_promoted(&self) -> Option<block::Epoch> {
        Some(self.promoted.read().as_ref()?.writing.lock().next)
    }
}
