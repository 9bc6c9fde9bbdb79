//! What apply, views and work in the background share: the list of layers, the images, who looks at what.
//!
//! Lock order: the promoted volumes', [`Core::upkeep`], [`Core::checksums`], [`Core::pinning`], the writer's, a view's, [`Core::building`], [`Shared`], [`Core::arrived`]. [`Shared`] is never held
//! across I/O.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};

use block::{Epoch, Generation, GroupId, HistoryId, UnixNanos, VolumeId};
use durable::{OpenMode, Storage, StorageFile};
use parking_lot::{Mutex, RwLock};

use crate::bad::{self, BadByVolume};
use crate::error::Context;
use crate::failover::Failover;
use crate::image::Image;
use crate::layer::Layer;
use crate::middle::Arrived;
use crate::pins::Pin;
use crate::recent::Recent;
use crate::scrub::Checksums;
use crate::segment::Segment;
use crate::span::{self, Builder, Span};
use crate::state::VolumeState;
use crate::tree::{Pages, Source};
use crate::{FILE_HANDLES_MAX, INDEX_PAGES_MAX, Pace, ReplicaError, SPAN_LEVELS};

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) dir: PathBuf,
    pub(crate) group: GroupId,
    pub(crate) shared: RwLock<Shared>,
    /// One thing at a time of thinning, deleting and scrubbing.
    pub(crate) upkeep: Mutex<()>,
    /// Of the images.
    pub(crate) checksums: Mutex<Checksums>,
    /// One change of pins at a time.
    pub(crate) pinning: Mutex<()>,
    /// Layers that were added or merged since the catalogue was written.
    pub(crate) uncatalogued: AtomicUsize,
    /// One span at a time is built.
    pub(crate) building: Mutex<Builder>,
    /// Of a replica that began in the middle of a history.
    pub(crate) arrived: Arrived,
    /// By the file's serial number: a name of a span may come again.
    handles: Recent<u64, Arc<dyn StorageFile>>,
    pages: Pages,
    poison: OnceLock<String>,
    /// Keeps other processes out while it is open.
    pub(crate) _lock: Arc<dyn StorageFile>,
}

/// Invariant: `layers` lead, each back to the one before, from the newest to the first: `layers[i].back == layers[i-1].epoch`. The
/// newest is of the applied epoch, or of the one after while that is applied.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) generation: Option<Generation>,
    /// Which history of it.
    pub(crate) history: HistoryId,
    /// Neither committed nor cancelled.
    pub(crate) failover: Option<Failover>,
    /// It began in the middle of a history, and not everything has come since.
    pub(crate) unproven: bool,
    /// Its volumes are written here. Changed with the writer's lock held.
    pub(crate) promoted: bool,
    pub(crate) applied: Epoch,
    pub(crate) cut_time: UnixNanos,
    pub(crate) floor: Epoch,
    /// Oldest first. Begins before the floor while a view needs that.
    pub(crate) layers: VecDeque<Arc<Layer>>,
    /// By their first epoch and level.
    pub(crate) spans: BTreeMap<(Epoch, u32), Arc<Span>>,
    pub(crate) images: HashMap<VolumeId, Arc<Image>>,
    /// The volumes that have an image, as of the applied epoch.
    pub(crate) volumes: Vec<VolumeState>,
    /// How often the newest layer was taken back. A reader that sees it grow starts anew.
    pub(crate) rollbacks: u64,
    /// How often layers were merged or spans removed. A reader that misses a file sees it grow.
    pub(crate) rewrites: u64,
    /// The epochs of open views, each with how many.
    pub(crate) views: BTreeMap<Epoch, usize>,
    /// Points that do not go.
    pub(crate) pins: BTreeMap<Epoch, Pin>,
    /// Points of epochs after the first and before the second are about to go, and are offered no more.
    pub(crate) going: Option<(Epoch, Epoch)>,
    /// Blocks of images that are known to be damaged.
    pub(crate) bad_blocks: BadByVolume,
    /// The newest layer that is damaged: points before it cannot be viewed.
    pub(crate) damaged: Option<Arc<Layer>>,
}

/// A part of a stretch of epochs.
#[derive(Clone, Debug)]
pub(crate) enum Stretch {
    Layer(Arc<Layer>),
    Span(Arc<Span>),
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
            upkeep: Mutex::default(),
            checksums: Mutex::default(),
            pinning: Mutex::default(),
            uncatalogued: AtomicUsize::new(0),
            building: Mutex::default(),
            arrived: Mutex::default(),
            handles: Recent::new(FILE_HANDLES_MAX),
            pages: Recent::new(INDEX_PAGES_MAX),
            poison: OnceLock::new(),
            _lock: lock,
        }
    }

    pub(crate) fn layers_dir(&self) -> PathBuf {
        layers_dir(&self.dir)
    }

    pub(crate) fn spans_dir(&self) -> PathBuf {
        spans_dir(&self.dir)
    }

    /// A handle of a layer's file, one of a few kept open.
    pub(crate) fn handle(&self, layer: &Layer) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        let file = self.open_file(layer.serial, &layer.path)?;
        layer.check_unread(&*file)?;
        Ok(file)
    }

    /// A handle of a span's file, one of a few kept open.
    pub(crate) fn span_handle(&self, span: &Span) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        self.open_file(span.serial, &span.path)
    }

    fn open_file(&self, serial: u64, path: &Path) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        if let Some(file) = self.handles.get(&serial) {
            return Ok(file);
        }
        let file = self.storage.open(path, OpenMode::Read).context("open", path)?;
        self.handles.insert(serial, file.clone());
        Ok(file)
    }

    pub(crate) fn forget_handle(&self, serial: u64) {
        self.handles.remove(&serial);
    }

    /// A layer or span whose trees are looked at, page by page.
    pub(crate) fn source<'a>(&'a self, serial: u64, path: &'a Path) -> FileSource<'a> {
        FileSource { core: self, serial, path }
    }

    /// What a part of a stretch says of a volume, in order; `None` when nothing.
    pub(crate) fn segments(
        &self,
        part: &Stretch,
        volume: VolumeId,
    ) -> Result<Option<SegmentList>, ReplicaError> {
        Ok(match part {
            Stretch::Layer(layer) if layer.header.tree(volume).is_none() => None,
            Stretch::Layer(layer) => {
                let epoch = layer.epoch();
                let entries = layer.entries(volume, self.handle(layer)?);
                Some(Box::new(entries.map(move |entry| Ok(Segment::of(&entry?, epoch)))))
            }
            Stretch::Span(span) => match span.tree(volume, || self.span_handle(span))? {
                None => None,
                Some(shape) => Some(Box::new(span.segments(shape, self.span_handle(span)?))),
            },
        })
    }

    /// How many segments a part of a stretch may have of a volume.
    pub(crate) fn segments_of(&self, part: &Stretch, volume: VolumeId) -> Result<u64, ReplicaError> {
        let shape = match part {
            Stretch::Layer(layer) => layer.header.tree(volume),
            Stretch::Span(span) => span.tree(volume, || self.span_handle(span))?,
        };
        Ok(shape.map_or(0, |shape| shape.records))
    }

    /// Builds the next span that is missing; `false` when none is.
    ///
    /// # Errors
    /// When storage fails, a layer or span is damaged, or the pace says stop. A damaged span is removed and built again the
    /// next time.
    pub(crate) fn build_span(&self, pace: &Pace) -> Result<bool, ReplicaError> {
        let mut builder = self.building.lock();
        let Some(needed) = builder.next(&self.shared.read()) else { return Ok(false) };
        let rewrites = self.shared.read().rewrites;
        match span::build(self, needed, pace) {
            Ok(_) => {}
            // Its parts were merged meanwhile.
            Err(ReplicaError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound
                    && self.shared.read().rewrites != rewrites =>
            {
                return Ok(true);
            }
            Err(ReplicaError::Corrupt { path, problem }) => {
                if self.discard_span(&path) {
                    builder.look_again();
                    return Ok(true);
                }
                // The layer's trouble is told by whoever reads it; no view reaches over it.
                tracing::error!(path = %path.display(), problem, "undo layer is damaged; scrub the replica");
                builder.pass(needed);
                return Ok(true);
            }
            Err(other) => return Err(other),
        }
        builder.pass(needed);
        Ok(true)
    }

    /// Removes a span that is damaged; `false` when the path is of none.
    pub(crate) fn discard_span(&self, path: &Path) -> bool {
        if path.parent() != Some(&self.spans_dir()) {
            return false;
        }
        tracing::warn!(path = %path.display(), "span is damaged: removed, and made again");
        let found: Vec<Arc<Span>> = {
            let shared = self.shared.read();
            shared.spans.values().filter(|span| span.path == path).cloned().collect()
        };
        self.remove_spans(&found);
        true
    }

    /// Makes the list of damaged blocks durable.
    pub(crate) fn save_bad_blocks(&self) -> Result<(), ReplicaError> {
        let bad = self.shared.read().bad_blocks.clone();
        bad::write(&*self.storage, &self.dir, self.group, &bad)
    }

    /// Takes spans out of the list and removes their files.
    pub(crate) fn remove_spans(&self, spans: &[Arc<Span>]) {
        {
            let mut shared = self.shared.write();
            for span in spans {
                shared.spans.remove(&(span.first, span.level));
            }
            shared.rewrites += 1;
        }
        for span in spans {
            self.forget_handle(span.serial);
            if let Err(error) = self.storage.remove(&span.path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %span.path.display(), %error, "remove span; opening does it");
            }
        }
    }

    /// Takes note that a layer, if that is what the path is of, cannot be read; so that work in the background goes round it.
    pub(crate) fn note_damage(&self, path: &Path, problem: &str) {
        let mut shared = self.shared.write();
        let Some(layer) = shared.layers.iter().find(|layer| layer.path == path).cloned() else { return };
        tracing::error!(path = %path.display(), problem, "undo layer is damaged: points before it cannot be viewed");
        layer.mark_damaged(problem);
        shared.note_damage(&layer);
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

/// What a layer or span says of a volume, in order.
pub(crate) type SegmentList = Box<dyn Iterator<Item = Result<Segment, ReplicaError>>>;

/// A file whose pages are kept with those of others.
pub(crate) struct FileSource<'a> {
    core: &'a Core,
    serial: u64,
    path: &'a Path,
}

impl Source for FileSource<'_> {
    fn pages(&self) -> &Pages {
        &self.core.pages
    }

    fn serial(&self) -> u64 {
        self.serial
    }

    fn path(&self) -> &Path {
        self.path
    }

    fn open(&self) -> Result<Arc<dyn StorageFile>, ReplicaError> {
        self.core.open_file(self.serial, self.path)
    }
}

impl Shared {
    /// The layers of the recovery points, those that cannot be viewed among them, oldest first.
    pub(crate) fn points(&self) -> impl DoubleEndedIterator<Item = &Arc<Layer>> + Clone {
        let first = self.layers.partition_point(|layer| layer.epoch() < self.floor);
        self.layers.range(first..).filter(|layer| self.is_point(layer))
    }

    /// The point of an epoch.
    pub(crate) fn point(&self, epoch: Epoch) -> Option<&Arc<Layer>> {
        let layer = self.layer_of(epoch)?;
        (layer.epoch() == epoch && self.is_point(layer)).then_some(layer)
    }

    fn is_point(&self, layer: &Layer) -> bool {
        let epoch = layer.epoch();
        layer.header.meta.consistency.is_point()
            && epoch >= self.floor
            && epoch <= self.applied
            && !self.going.is_some_and(|(after, before)| epoch > after && epoch < before)
    }

    /// The layer that leads back over an epoch.
    pub(crate) fn layer_of(&self, epoch: Epoch) -> Option<&Arc<Layer>> {
        let index = self.layers.partition_point(|layer| layer.epoch() < epoch);
        self.layers.get(index).filter(|layer| layer.back() < epoch)
    }

    /// What is wrong with the way back to an epoch; `None` when nothing is known.
    pub(crate) fn damage_after(&self, epoch: Epoch) -> Option<&Layer> {
        self.damaged.as_deref().filter(|layer| layer.epoch() > epoch)
    }

    /// Takes note of a damaged layer.
    pub(crate) fn note_damage(&mut self, layer: &Arc<Layer>) {
        if self.damaged.as_ref().is_none_or(|newest| newest.epoch() < layer.epoch()) {
            self.damaged = Some(layer.clone());
        }
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
        if let Some(damaged) = &self.damaged
            && self.layers.front().is_none_or(|first| first.epoch() > damaged.epoch())
        {
            self.damaged = None;
        }
        retired
    }

    /// Whether a span would spare a view more than one layer.
    pub(crate) fn wants_span(&self, first: Epoch, level: u32) -> bool {
        let last = first.0 + span::length(level) - 1;
        self.layer_of(first).is_some_and(|layer| layer.epoch().0 < last)
    }

    /// The epochs after `after` up to `upto` as few layers and spans of at most a level. A layer that leads back over `upto` from
    /// beyond it is left out.
    pub(crate) fn stretch(&self, after: Epoch, upto: Epoch, level_max: u32) -> Vec<Stretch> {
        let mut parts = Vec::new();
        let mut at = after.next();
        while at <= upto {
            let Some(layer) = self.layer_of(at) else { break };
            let fits = (layer.epoch() <= upto).then(|| layer.epoch());
            let level = span::levels_at(at).skip_while(|level| *level > level_max.min(SPAN_LEVELS));
            let spans = level.filter_map(|level| self.spans.get(&(at, level)));
            let mut spans =
                spans.filter(|span| span.last() <= upto && fits.is_none_or(|end| span.last() > end));
            match (spans.next(), fits) {
                (Some(span), _) => {
                    parts.push(Stretch::Span(span.clone()));
                    at = span.last().next();
                }
                (None, Some(end)) => {
                    parts.push(Stretch::Layer(layer.clone()));
                    at = end.next();
                }
                (None, None) => break,
            }
        }
        parts
    }
}

pub(crate) fn layers_dir(dir: &Path) -> PathBuf {
    dir.join("layers")
}

pub(crate) fn spans_dir(dir: &Path) -> PathBuf {
    dir.join("spans")
}

pub(crate) fn volumes_dir(dir: &Path) -> PathBuf {
    dir.join("volumes")
}

pub(crate) fn volume_dir(dir: &Path, volume: VolumeId) -> PathBuf {
    volumes_dir(dir).join(volume.to_string())
}

pub(crate) fn image_path(dir: &Path, volume: VolumeId) -> PathBuf {
    volume_dir(dir, volume).join("replica.img")
}
