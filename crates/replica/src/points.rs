//! The recovery points, and what a person does with them: look, pin, delete.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use block::{ByteCount, Consistency, Epoch, Label, PointNote, UnixNanos, VolumeId};
use changeset::VolumeInfo;

use crate::group::GroupReplica;
use crate::image::Place;
use crate::layer::Layer;
use crate::pins::{self, Pin};
use crate::shared::Shared;
use crate::state::VolumeState;
use crate::view::View;
use crate::{PINS_MAX, ReplicaError};

/// A recovery point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its epoch.
    pub epoch: Epoch,
    /// When the source cut it.
    pub cut_time: UnixNanos,
    /// What may be said of it.
    pub consistency: Consistency,
    /// What more is told of it.
    pub note: PointNote,
    /// Data written since the point before it.
    pub written: ByteCount,
    /// What was made to read as zeroes since the point before it.
    pub zeroed: ByteCount,
    /// The size of its undo layer.
    pub layer: ByteCount,
    /// The volumes it has.
    pub volumes: Arc<[VolumeInfo]>,
    /// Why and until when it is kept whatever retention says.
    pub pin: Option<Pin>,
    /// Why it cannot be viewed; `None` when nothing is known against it.
    pub unusable: Option<String>,
}

/// A volume that has an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStatus {
    /// As of the applied epoch.
    pub info: VolumeInfo,
    /// Whether the image is a file or a device.
    pub place: Place,
    /// The image.
    pub path: PathBuf,
}

/// How many points there are, and the ends of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PointsSummary {
    /// All of them.
    pub count: u64,
    /// Those of them that cannot be viewed.
    pub unusable: u64,
    /// The oldest that can be viewed.
    pub oldest: Option<Point>,
    /// The newest.
    pub newest: Option<Point>,
    /// The newest application-consistent one that can be viewed.
    pub newest_application: Option<Point>,
}

fn point(shared: &Shared, layer: &Layer) -> Point {
    let meta = &layer.header.meta;
    let unusable = shared.damage_after(meta.epoch).map(|damaged| {
        format!("{} is damaged: {}", damaged.path.display(), damaged.damage().unwrap_or_default())
    });
    Point {
        epoch: meta.epoch,
        cut_time: meta.cut_time,
        consistency: meta.consistency,
        note: meta.note.clone(),
        written: meta.written,
        zeroed: meta.zeroed,
        layer: layer.bytes(),
        volumes: meta.volumes.clone(),
        pin: shared.pins.get(&meta.epoch).cloned(),
        unusable,
    }
}

impl GroupReplica {
    /// The recovery points, oldest first, those that cannot be viewed among them.
    pub fn points(&self) -> Vec<Point> {
        let shared = self.core.shared.read();
        shared.points().map(|layer| point(&shared, layer)).collect()
    }

    /// The ends of the list of recovery points. Costs less than the list.
    pub fn points_summary(&self) -> PointsSummary {
        let shared = self.core.shared.read();
        let usable = |layer: &&Arc<Layer>| shared.damage_after(layer.epoch()).is_none();
        let (mut count, mut unusable) = (0, 0);
        let mut newest_application = None;
        for layer in shared.points() {
            count += 1;
            unusable += u64::from(!usable(&layer));
            if layer.header.meta.consistency == Consistency::Application && usable(&layer) {
                newest_application = Some(layer);
            }
        }
        PointsSummary {
            count,
            unusable,
            oldest: shared.points().find(usable).map(|layer| point(&shared, layer)),
            newest: shared.points().next_back().map(|layer| point(&shared, layer)),
            newest_application: newest_application.map(|layer| point(&shared, layer)),
        }
    }

    /// The recovery point of an epoch.
    ///
    /// # Errors
    /// When there is none; the nearest is named.
    pub fn point(&self, epoch: Epoch) -> Result<Point, ReplicaError> {
        let shared = self.core.shared.read();
        match shared.point(epoch) {
            Some(layer) => Ok(point(&shared, layer)),
            None => Err(self.no_such_point(&shared, epoch)),
        }
    }

    /// The size of all undo layers, those that only an open view still needs among them.
    pub fn layer_bytes(&self) -> ByteCount {
        self.core.shared.read().layers.iter().map(|layer| layer.bytes()).sum()
    }

    /// The volumes that have an image.
    pub fn volumes(&self) -> Vec<VolumeStatus> {
        let shared = self.core.shared.read();
        let status = |volume: &VolumeState| {
            let path = shared.images.get(&volume.info.id)?.path.clone();
            Some(VolumeStatus { info: volume.info.clone(), place: volume.place, path })
        };
        shared.volumes.iter().filter_map(status).collect()
    }

    /// A volume as it was at a recovery point. While the view is open nothing that it needs is removed.
    ///
    /// # Errors
    /// When there is no such point, the point has no such volume, or a layer after the point cannot be read.
    pub fn view(&self, volume: VolumeId, epoch: Epoch) -> Result<View, ReplicaError> {
        View::open(&self.core, volume, epoch)
    }

    /// Keeps a point whatever retention says, until the pin expires or is taken away. A point that is pinned already gets
    /// the new label and expiry. When this returns it is durable.
    ///
    /// # Errors
    /// When there is no such point, the expiry has passed, [`PINS_MAX`] are pinned, or storage fails; nothing changed then.
    pub fn pin(
        &self,
        epoch: Epoch,
        label: Option<Label>,
        expires: Option<UnixNanos>,
    ) -> Result<Point, ReplicaError> {
        let group = self.core.group;
        let now = (self.options.clock)();
        let refuse = |problem: String| Err(ReplicaError::Pin { group, epoch, problem });
        if expires.is_some_and(|expires| expires <= now) {
            return refuse("its expiry lies in the past; name a later one, or none".to_owned());
        }
        let _pinning = self.core.pinning.lock();
        let before = {
            let mut shared = self.core.shared.write();
            if shared.point(epoch).is_none() {
                return Err(self.no_such_point(&shared, epoch));
            }
            if shared.pins.len() >= PINS_MAX && !shared.pins.contains_key(&epoch) {
                return refuse(format!("{PINS_MAX} points are pinned already; unpin one first"));
            }
            // From here on the point does not go.
            let before = shared.pins.clone();
            shared.pins.insert(epoch, Pin { label, pinned: now, expires });
            before
        };
        let pins = self.core.shared.read().pins.clone();
        if let Err(error) = self.write_pins(pins) {
            self.core.shared.write().pins = before;
            return Err(error);
        }
        self.point(epoch)
    }

    /// Leaves a point to retention again. When this returns it is durable.
    ///
    /// # Errors
    /// When the point is not pinned, or storage fails; nothing changed then.
    pub fn unpin(&self, epoch: Epoch) -> Result<Pin, ReplicaError> {
        let _pinning = self.core.pinning.lock();
        let mut pins = self.core.shared.read().pins.clone();
        let Some(pin) = pins.remove(&epoch) else {
            let problem = "it is not pinned; `seawall points` shows which are".to_owned();
            return Err(ReplicaError::Pin { group: self.core.group, epoch, problem });
        };
        self.write_pins(pins)?;
        Ok(pin)
    }

    /// Makes these the pins, durably. Who calls it has [`Core::pinning`].
    ///
    /// [`Core::pinning`]: crate::shared::Core::pinning
    pub(crate) fn write_pins(&self, pins: BTreeMap<Epoch, Pin>) -> Result<(), ReplicaError> {
        pins::write(&*self.core.storage, &self.core.dir, self.core.group, &pins)?;
        self.core.shared.write().pins = pins;
        Ok(())
    }

    pub(crate) fn no_such_point(&self, shared: &Shared, epoch: Epoch) -> ReplicaError {
        crate::view::no_such_point(&self.core, shared, epoch)
    }
}
