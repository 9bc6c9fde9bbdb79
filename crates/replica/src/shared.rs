//! What apply and views share: the list of layers, the images, who looks at what.
//!
//! Lock order: the writer's, then [`Shared`], then a layer's index. [`Shared`] is never held across I/O.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use block::{Epoch, Generation, GroupId, UnixNanos, VolumeId};
use durable::{OpenMode, Storage, StorageFile};
use parking_lot::{Mutex, RwLock};

use crate::error::Context;
use crate::image::Image;
use crate::layer::Layer;
use crate::state::VolumeState;
use crate::{LAYER_HANDLES_MAX, ReplicaError};

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) dir: PathBuf,
    pub(crate) group: GroupId,
    pub(crate) shared: RwLock<Shared>,
    /// By the layer's serial number: a name may come again with other content.
    handles: Mutex<HashMap<u64, Arc<dyn StorageFile>>>,
    poison: OnceLock<String>,
    /// Keeps other processes out while it is open.
    pub(crate) _lock: Arc<dyn StorageFile>,
}

/// Invariant: `layers` are consecutive epochs up to `applied`, or `applied + 1` while that is applied.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) generation: Option<Generation>,
    pub(crate) applied: Epoch,
    pub(crate) cut_time: UnixNanos,
    pub(crate) floor: Epoch,
    /// Oldest first. Begins before the floor while a view needs that.
    pub(crate) layers: VecDeque<Arc<Layer>>,
    pub(crate) images: HashMap<VolumeId, Arc<Image>>,
    /// The volumes that have an image, as of the applied epoch.
    pub(crate) volumes: Vec<VolumeState>,
    /// How often the newest layer was taken back. A reader that sees it grow starts anew.
    pub(crate) rollbacks: u64,
    /// The epochs of open views, each with how many.
    pub(crate) views: BTreeMap<Epoch, usize>,
}

impl Core {
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        dir: &Path,
        group: GroupId,
        lock: Arc<dyn StorageFile>,
        shared: Shared,
    ) -> Core {
        Core {
            storage,
            dir: dir.to_owned(),
            group,
            shared: RwLock::new(shared),
            handles: Mutex::default(),
            poison: OnceLock::new(),
            _lock: lock,
        }
    }

    pub(crate) fn layers_dir(&self) -> PathBuf {
        layers_dir(&self.dir)
    }

    /// A handle of a layer's file, one of a few kept open.
    pub(crate) fn handle(&self, layer: &Layer) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        if let Some(file) = self.handles.lock().get(&layer.serial) {
            return Ok(file.clone());
        }
        let file = self.storage.open(&layer.path, OpenMode::Read).context("open undo layer", &layer.path)?;
        let mut handles = self.handles.lock();
        if handles.len() >= LAYER_HANDLES_MAX {
            handles.clear();
        }
        handles.insert(layer.serial, file.clone());
        Ok(file)
    }

    pub(crate) fn forget_handle(&self, layer: &Layer) {
        self.handles.lock().remove(&layer.serial);
    }

    pub(crate) fn poison(&self, reason: String) {
        // The first failure is the one to mend.
        let _ = self.poison.set(reason);
    }

    pub(crate) fn poison_reason(&self) -> Option<&str> {
        self.poison.get().map(String::as_str)
    }

    pub(crate) fn check_poison(&self) -> Result<(), ReplicaError> {
        match self.poison_reason() {
            None => Ok(()),
            Some(reason) => Err(ReplicaError::Poisoned { group: self.group, reason: reason.to_owned() }),
        }
    }
}

impl Shared {
    /// The layers of the recovery points that may be viewed, oldest first.
    pub(crate) fn points(&self) -> impl DoubleEndedIterator<Item = &Arc<Layer>> {
        self.layers.iter().filter(|layer| {
            let epoch = layer.epoch();
            layer.header.meta.consistency.is_point() && epoch >= self.floor && epoch <= self.applied
        })
    }

    /// Takes out the layers that no point and no open view needs. A view at P needs those after P.
    pub(crate) fn retire(&mut self) -> Vec<Arc<Layer>> {
        let oldest_view = self.views.keys().next().copied();
        let mut retired = Vec::new();
        while let Some(layer) = self.layers.front()
            && layer.epoch() < self.floor
            && oldest_view.is_none_or(|view| layer.epoch() <= view)
        {
            retired.extend(self.layers.pop_front());
        }
        retired
    }
}

pub(crate) fn layers_dir(dir: &Path) -> PathBuf {
    dir.join("layers")
}

pub(crate) fn volumes_dir(dir: &Path) -> PathBuf {
    dir.join("volumes")
}

pub(crate) fn image_path(dir: &Path, volume: VolumeId) -> PathBuf {
    volumes_dir(dir).join(volume.to_string()).join("replica.img")
}
