//! Adopting disks: what is on the devices of a new replica becomes its first recovery point.
//!
//! So a source that was somewhere else meanwhile is compared with the disks that are here, and only what differs moves; what they held
//! before stays a point, under its name, until somebody unpins it.
//!
//! The order, and what breaks when it is changed:
//! 1. the point is pinned (else what the disks held could go before anybody has looked at it);
//! 2. its layer is durable, and then the state says that epoch 1 is applied, as for any epoch. It changes no image.
//!
//! A crash before the state leaves a replica that follows nothing yet, which may be adopted again.

use block::{Consistency, Epoch, Generation, HistoryId, Label, PointNote};
use changeset::{Stamp, VolumeInfo};

use crate::delta::Delta;
use crate::{Applied, GroupReplica, Pin, ReplicaError, pins};

/// The epoch that stands for what was found.
const FOUND: Epoch = Epoch(1);

impl GroupReplica {
    /// Makes what is on the devices of these volumes the first point of a history, named `label` and pinned. Their devices are
    /// those of [`crate::Options::devices`]; nothing is written to them.
    ///
    /// # Errors
    /// When the replica has a history already, a volume has no device or does not fit it: nothing changed.
    pub fn adopt(
        &self,
        generation: Generation,
        volumes: &[VolumeInfo],
        label: Label,
    ) -> Result<Applied, ReplicaError> {
        let group = self.core.group;
        let refused = |problem: String| Err(ReplicaError::Invalid { group, epoch: FOUND, problem });
        if let Some(other) = volumes.iter().find(|info| !self.options.devices.contains_key(&info.name)) {
            return refused(format!("volume {:?} has no device that could be adopted", other.name));
        }
        let now = (self.options.clock)();
        {
            let mut writer = self.writer.lock();
            if writer.state.generation.is_some() || writer.state.applied > Epoch::NONE {
                return refused(
                    "the replica has a history already, and nothing can come before it".to_owned(),
                );
            }
            let found = [(FOUND, Pin { label: Some(label.clone()), pinned: now, expires: None })].into();
            pins::write(&*self.core.storage, &self.core.dir, group, &found)?;
            self.core.shared.write().pins = found;
            // With the state, when the epoch is applied.
            writer.state.history = HistoryId::SOURCE.begun_by(&[generation.0, now.0]);
        }
        let stamp = Stamp { group, generation, epoch: FOUND, consistency: Consistency::Crash, cut_time: now };
        let mut delta = Delta::new(stamp, volumes);
        delta.note = PointNote { label: Some(label), ..PointNote::default() };
        self.apply_delta(&delta)
    }
}
