//! Opening a replica: what a crash left is taken back, what was damaged is named.
//!
//! | found | done |
//! |---|---|
//! | files with a `.new` name | removed: they never counted |
//! | a layer that the state does not name | its epoch was being applied: rolled back, then the layer is removed |
//! | the same before the first recovery point | removed: there is nothing to go back to, the epoch is applied again |
//! | layers before the floor | removed: leftovers of retention |
//! | layers that another leads back over | removed: thinning had merged them, durably, and not yet removed them |
//! | a damaged or missing layer between floor and applied epoch | points before it cannot be viewed; named, kept |
//! | a damaged layer that should be rolled back | refused: nobody knows what the images hold |
//! | spans that are useless, or of no such name | removed: they are derived |

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Epoch, Generation, GroupId, VolumeId};
use durable::{OpenMode, REPLACE_SUFFIX, Storage, StorageFile};

use crate::bad::{self, BadByVolume};
use crate::error::Context;
use crate::image::{DataCursor, Image, Place};
use crate::layer::{Header, Layer, TEMPORARY_SUFFIX, file_name, for_each_run, parse_file_name};
use crate::shared::{Core, Shared, image_path, layers_dir, spans_dir, volumes_dir};
use crate::span::{self, Span};
use crate::state::{State, StateFile};
use crate::{Options, ReplicaError, catalogue, pins};

/// What opening found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenReport {
    /// Whose replica it is.
    pub group: GroupId,
    /// The history it follows; `None` until the first changeset.
    pub generation: Option<Generation>,
    /// The last epoch that it holds.
    pub applied: Epoch,
    /// The epoch that a crash had left half-applied and that was taken back.
    pub rolled_back: Option<Epoch>,
    /// Files that a crash or retention had left over and that were removed.
    pub removed: Vec<PathBuf>,
    /// Layers that cannot be read. Points before the newest of them cannot be viewed.
    pub damaged: Vec<DamagedLayer>,
}

/// A layer that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedLayer {
    /// Its epoch.
    pub epoch: Epoch,
    /// What is wrong with it.
    pub problem: String,
}

/// A replica as opened.
pub(crate) struct Opened {
    pub(crate) core: Core,
    pub(crate) state: State,
    pub(crate) state_file: StateFile,
    pub(crate) report: OpenReport,
}

pub(crate) fn open(
    storage: Arc<dyn Storage>,
    dir: &Path,
    group: GroupId,
    options: &Options,
) -> Result<Opened, ReplicaError> {
    let layers = layers_dir(dir);
    let spans = spans_dir(dir);
    for dir in [&layers, &spans, &volumes_dir(dir)] {
        storage.create_dir_all(dir).context("create directory", dir)?;
    }
    let lock = lock(&*storage, dir)?;
    let mut removed = Vec::new();
    for (dir, suffix) in [(dir, REPLACE_SUFFIX), (&layers, TEMPORARY_SUFFIX), (&spans, TEMPORARY_SUFFIX)] {
        for name in storage.list(dir).context("list", dir)? {
            if name.ends_with(suffix) {
                remove(&*storage, dir.join(name), &mut removed)?;
            }
        }
    }
    let (state_file, state) = open_state(&*storage, dir, group)?;
    let images = open_images(&*storage, dir, &state, options)?;
    let mut files = layer_files(&*storage, &layers)?;

    let mut rolled_back = None;
    if let Some((back, last)) = files.last().copied().filter(|(_, last)| *last > state.applied) {
        let path = layers.join(file_name(back, last));
        if (back, last) != (state.applied, state.applied.next()) {
            let problem = format!(
                "undo layer {last} lies past epoch {}, which the state says is applied; the state file is not this \
                 replica's or went back; start a new replica",
                state.applied
            );
            return Err(ReplicaError::unusable(&path, problem));
        }
        if state.floor > Epoch::NONE {
            roll_back_file(&*storage, &path, &state, &images)?;
            rolled_back = Some(last);
        }
        remove(&*storage, path, &mut removed)?;
        files.pop();
    }
    if state.floor == Epoch::NONE && !files.is_empty() {
        let problem = format!("it has {} undo layers before its first recovery point", files.len());
        return Err(ReplicaError::unusable(&layers, problem));
    }
    let mut known = catalogue::read(&*storage, dir, group, state.generation, state.applied)?;
    let catalogued = known.len();
    let chain = read_chain(&*storage, &layers, &state, &files, &mut known)?;
    let uncatalogued = (chain.len() + known.len()).saturating_sub(catalogued - known.len());
    let kept: HashSet<(Epoch, Epoch)> = chain.iter().map(|layer| (layer.back(), layer.epoch())).collect();
    for (back, epoch) in files.iter().filter(|file| !kept.contains(file)) {
        remove(&*storage, layers.join(file_name(*back, *epoch)), &mut removed)?;
    }
    if !removed.is_empty() {
        storage.sync_dir(&layers).context("sync directory", &layers)?;
    }
    let damaged = chain
        .iter()
        .filter_map(|layer| Some(DamagedLayer { epoch: layer.epoch(), problem: layer.damage()?.to_owned() }));
    let report = OpenReport {
        group,
        generation: state.generation,
        applied: state.applied,
        rolled_back,
        damaged: damaged.collect(),
        removed,
    };
    let mut shared = Shared {
        generation: state.generation,
        history: state.history,
        failover: state.failover,
        unproven: state.unproven,
        applied: state.applied,
        cut_time: state.cut_time,
        floor: state.floor,
        layers: chain.into(),
        spans: find_spans(&*storage, &spans, &state)?,
        images,
        volumes: state.volumes.clone(),
        pins: pins::read(&*storage, dir, group)?,
        bad_blocks: bad_blocks(&*storage, dir, group)?,
        ..Shared::default()
    };
    let newest_damaged = shared.layers.iter().rev().find(|layer| layer.damage().is_some()).cloned();
    shared.damaged = newest_damaged;
    let core = Core::new(storage, dir, group, lock, shared);
    core.uncatalogued.store(uncatalogued, Ordering::Relaxed);
    Ok(Opened { core, state, state_file, report })
}

pub(crate) fn lock(storage: &dyn Storage, dir: &Path) -> Result<Arc<dyn StorageFile>, ReplicaError> {
    let path = dir.join("lock");
    let file = storage.open(&path, OpenMode::CreateOrOpen).context("open lock", &path)?;
    match file.try_lock().context("lock", &path)? {
        true => Ok(file),
        false => Err(ReplicaError::unusable(
            dir,
            "another process has it open; stop that process first".to_owned(),
        )),
    }
}

fn remove(storage: &dyn Storage, path: PathBuf, removed: &mut Vec<PathBuf>) -> Result<(), ReplicaError> {
    storage.remove(&path).context("remove leftover", &path)?;
    removed.push(path);
    Ok(())
}

fn open_state(storage: &dyn Storage, dir: &Path, group: GroupId) -> Result<(StateFile, State), ReplicaError> {
    let path = StateFile::path(dir);
    if !storage.exists(&path).context("look for", &path)? {
        // The state is made before anything else, so nothing else can be there.
        for dir in [layers_dir(dir), volumes_dir(dir)] {
            if let Some(name) = storage.list(&dir).context("list", &dir)?.first() {
                let problem = format!(
                    "{name} is there and the state file is not; restore the state file, or remove the directory to \
                     start a new replica"
                );
                return Err(ReplicaError::unusable(&dir, problem));
            }
        }
        let state = State::new(group);
        return Ok((StateFile::create(storage, dir, &state)?, state));
    }
    let (file, state) = StateFile::open(storage, dir)?;
    if state.group != group {
        let problem =
            format!("its state is of {:?}, not of {group:?}; put it back where it belongs", state.group);
        return Err(ReplicaError::unusable(dir, problem));
    }
    Ok((file, state))
}

fn open_images(
    storage: &dyn Storage,
    dir: &Path,
    state: &State,
    options: &Options,
) -> Result<HashMap<VolumeId, Arc<Image>>, ReplicaError> {
    let mut images = HashMap::new();
    for volume in &state.volumes {
        let name = &volume.info.name;
        let path = match (volume.place, options.devices.get(name)) {
            (Place::File, None) => image_path(dir, volume.info.id),
            (Place::Device, Some(device)) => device.clone(),
            (Place::File, Some(device)) => {
                let problem = format!(
                    "volume {name:?} is replicated to a file there, and the configuration names the device {}; \
                     remove the device from the configuration, or start a new replica",
                    device.display()
                );
                return Err(ReplicaError::unusable(dir, problem));
            }
            (Place::Device, None) => {
                let problem = format!(
                    "volume {name:?} is replicated to a block device, and the configuration names none; name it \
                     again, or start a new replica"
                );
                return Err(ReplicaError::unusable(dir, problem));
            }
        };
        let image = Image::open(storage, &path, volume.place)?;
        let length = image.len()?;
        if length < volume.info.size.0 {
            let problem = format!(
                "it has {length} bytes where volume {name:?} has {}; it was cut or is not this volume's; start a \
                 new replica",
                volume.info.size.0
            );
            return Err(ReplicaError::unusable(&path, problem));
        }
        images.insert(volume.info.id, Arc::new(image));
    }
    Ok(images)
}

/// The layer files, by epoch and then by where they lead back to.
pub(crate) fn layer_files(storage: &dyn Storage, layers: &Path) -> Result<Vec<(Epoch, Epoch)>, ReplicaError> {
    let names = storage.list(layers).context("list", layers)?;
    let mut files: Vec<(Epoch, Epoch)> = names.iter().filter_map(|name| parse_file_name(name)).collect();
    files.sort_unstable_by_key(|(back, epoch)| (*epoch, *back));
    Ok(files)
}

/// The layers that lead from the applied epoch back to the floor, oldest first, each to the one before. Of several that begin at the
/// same epoch the one that leads furthest back is taken, for it is what thinning made of the others. What is damaged or
/// missing has something in its place that says so.
fn read_chain(
    storage: &dyn Storage,
    layers: &Path,
    state: &State,
    files: &[(Epoch, Epoch)],
    known: &mut catalogue::Known,
) -> Result<Vec<Arc<Layer>>, ReplicaError> {
    let mut chain: Vec<Arc<Layer>> = Vec::new();
    let Some(generation) = state.generation.filter(|_| state.floor > Epoch::NONE) else { return Ok(chain) };
    let mut at = state.applied;
    while at >= state.floor {
        let first = files.partition_point(|(_, epoch)| *epoch < at);
        let candidates = files[first..].iter().take_while(|(_, epoch)| *epoch == at);
        let mut found = None;
        let mut problem = "the file is missing".to_owned();
        // Where the next older one is, when this one cannot be told from.
        let mut back = files[..first].last().map_or(Epoch(state.floor.0 - 1), |(_, epoch)| *epoch);
        for (candidate, _) in candidates {
            match open_layer(storage, layers, state, (*candidate, at), known)? {
                Ok(layer) => {
                    found = Some(layer);
                    break;
                }
                Err(why) => (problem, back) = (why, *candidate),
            }
        }
        let layer = match found {
            Some(mut layer) => {
                // Layers that agree on the volumes share one table.
                if let Some(newer) = chain.last()
                    && newer.header.meta.volumes == layer.header.meta.volumes
                {
                    layer.header.meta.volumes = newer.header.meta.volumes.clone();
                }
                layer
            }
            None => {
                let header = Header::unreadable(state.group, generation, back, at);
                let layer = Layer::new(header, layers.join(file_name(back, at)));
                layer.mark_damaged(&problem);
                layer
            }
        };
        at = layer.back();
        chain.push(Arc::new(layer));
    }
    chain.reverse();
    Ok(chain)
}

/// A layer, or what is wrong with it.
fn open_layer(
    storage: &dyn Storage,
    layers: &Path,
    state: &State,
    (back, epoch): (Epoch, Epoch),
    known: &mut catalogue::Known,
) -> Result<Result<Layer, String>, ReplicaError> {
    let path = layers.join(file_name(back, epoch));
    let opened = match known.remove(&(back, epoch)) {
        Some(header) => Ok(Layer::of_catalogue(header, path)),
        None => Layer::open(storage, &path),
    };
    match opened {
        Ok(layer) => Ok(check_layer(&layer, state, back, epoch).map(|()| layer)),
        Err(ReplicaError::Corrupt { problem, .. }) => Ok(Err(problem)),
        Err(other) => Err(other),
    }
}

/// What scrubbing found damaged. Without it, the next scrub finds it again.
fn bad_blocks(storage: &dyn Storage, dir: &Path, group: GroupId) -> Result<BadByVolume, ReplicaError> {
    match bad::read(storage, dir, group) {
        Err(error @ ReplicaError::Corrupt { .. }) => {
            tracing::error!(%error, "the list of damaged blocks is not known; scrub the replica");
            Ok(BadByVolume::new())
        }
        other => other,
    }
}

/// The spans that a view may use. The others are removed.
fn find_spans(
    storage: &dyn Storage,
    dir: &Path,
    state: &State,
) -> Result<BTreeMap<(Epoch, u32), Arc<Span>>, ReplicaError> {
    let mut spans = BTreeMap::new();
    for name in storage.list(dir).context("list", dir)? {
        let path = dir.join(&name);
        let useful = |(first, level): &(Epoch, u32)| {
            *first > state.floor && first.0 + span::length(*level) - 1 <= state.applied.0
        };
        match span::parse_file_name(&name).filter(useful) {
            Some((first, level)) => {
                spans.insert((first, level), Arc::new(Span::new(first, level, path)));
            }
            None => storage.remove(&path).context("remove span", &path)?,
        }
    }
    Ok(spans)
}

/// Whether a layer is the one that its name says, of this replica.
pub(crate) fn check_layer(layer: &Layer, state: &State, back: Epoch, epoch: Epoch) -> Result<(), String> {
    let meta = &layer.header.meta;
    let found = (meta.epoch, layer.back());
    // Generations follow one another in one history, whose epochs are numbered through.
    if meta.group != state.group || Some(meta.generation) > state.generation || found != (epoch, back) {
        return Err(format!(
            "it is the layer from epoch {} back to {} of generation {} of {:?}",
            meta.epoch,
            layer.back(),
            meta.generation,
            meta.group
        ));
    }
    Ok(())
}

fn roll_back_file(
    storage: &dyn Storage,
    path: &Path,
    state: &State,
    images: &HashMap<VolumeId, Arc<Image>>,
) -> Result<(), ReplicaError> {
    let refused = |error: ReplicaError| match error {
        ReplicaError::Corrupt { path, problem } => {
            let problem = format!(
                "{problem}; its epoch was being applied and cannot be taken back, so the images are not known to be \
                 any state of the source; start a new replica"
            );
            ReplicaError::unusable(&path, problem)
        }
        other => other,
    };
    let file = storage.open(path, OpenMode::Read).context("open undo layer", path)?;
    let layer = Layer::open(storage, path).map_err(refused)?;
    check_layer(&layer, state, state.applied, state.applied.next())
        .map_err(|problem| refused(ReplicaError::corrupt(path, problem)))?;
    roll_back(&file, &layer, state, images).map_err(refused)
}

/// Puts back what an epoch overwrote, durably. The layer stays, so a crash on the way is repaired by doing it again.
///
/// The order, and what breaks when it is changed:
/// 1. every run of the layer is checked (else a damaged one leaves a mixture of two epochs);
/// 2. the old content is written;
/// 3. file images are cut to the size they had (else a volume would seem to have grown) and synced;
/// 4. only then may the caller remove the layer (else a crash leaves a half-applied epoch that nothing tells of).
pub(crate) fn roll_back(
    file: &Arc<dyn StorageFile>,
    layer: &Layer,
    state: &State,
    images: &HashMap<VolumeId, Arc<Image>>,
) -> Result<(), ReplicaError> {
    let trees: Vec<VolumeId> = layer.header.trees().map(|(volume, _)| volume).collect();
    for volume in &trees {
        for_each_run(&**file, &layer.path, layer.entries(*volume, file.clone()), |_, _| Ok(()))?;
    }
    for volume in &trees {
        let Some(known) = state.volume(*volume) else {
            // New in this epoch: it had no content, and what it has now is dropped when it comes again.
            continue;
        };
        let image = images.get(volume).expect("a volume of the state has an image");
        let mut cursor = DataCursor::default();
        let entries = layer.entries(*volume, file.clone());
        for_each_run(&**file, &layer.path, entries, |entry, data| match data {
            Some(data) => image.write(data, entry.offset()),
            None => image.zero(entry.offset(), entry.length(), &mut cursor),
        })?;
        image.cut(known.info.size.0)?;
        image.sync()?;
    }
    Ok(())
}
