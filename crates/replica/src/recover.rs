//! Opening a replica: what a crash left is taken back, what was damaged is named.
//!
//! | found | done |
//! |---|---|
//! | files with a `.new` name | removed: they never counted |
//! | a layer that the state does not name | its epoch was being applied: rolled back, then the layer is removed |
//! | the same before the first recovery point | removed: there is nothing to go back to, the epoch is applied again |
//! | layers before the floor | removed: leftovers of retention |
//! | a damaged or missing layer between floor and applied epoch | points before it cannot be viewed; named, kept |
//! | a damaged layer that should be rolled back | refused: nobody knows what the images hold |

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Epoch, Generation, GroupId, VolumeId};
use durable::{OpenMode, REPLACE_SUFFIX, Storage, StorageFile};

use crate::error::Context;
use crate::image::{DataCursor, Image, Place};
use crate::layer::{Entry, Index, Layer, TEMPORARY_SUFFIX, parse_file_name};
use crate::shared::{Core, Shared, image_path, layers_dir, volumes_dir};
use crate::state::{State, StateFile};
use crate::{IMAGE_BATCH_BYTES, Options, ReplicaError};

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
    /// Files of layers before the readable ones.
    pub(crate) leftovers: Vec<(Epoch, PathBuf)>,
    pub(crate) report: OpenReport,
}

pub(crate) fn open(
    storage: Arc<dyn Storage>,
    dir: &Path,
    group: GroupId,
    options: &Options,
) -> Result<Opened, ReplicaError> {
    let layers = layers_dir(dir);
    for dir in [&layers, &volumes_dir(dir)] {
        storage.create_dir_all(dir).context("create directory", dir)?;
    }
    let lock = lock(&*storage, dir)?;
    let mut removed = Vec::new();
    for (dir, suffix) in [(dir, REPLACE_SUFFIX), (&layers, TEMPORARY_SUFFIX)] {
        for name in storage.list(dir).context("list", dir)? {
            if name.ends_with(suffix) {
                remove(&*storage, dir.join(name), &mut removed)?;
            }
        }
    }
    let (state_file, state) = open_state(&*storage, dir, group)?;
    let images = open_images(&*storage, dir, &state, options)?;
    let mut epochs = layer_epochs(&*storage, &layers)?;

    let mut rolled_back = None;
    if let Some(last) = epochs.last().copied().filter(|last| *last > state.applied) {
        let path = layers.join(crate::layer::file_name(last));
        if last != state.applied.next() {
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
        epochs.pop();
    }
    while let Some(epoch) = epochs.first().copied().filter(|epoch| *epoch < state.floor) {
        remove(&*storage, layers.join(crate::layer::file_name(epoch)), &mut removed)?;
        epochs.remove(0);
    }
    if !removed.is_empty() {
        storage.sync_dir(&layers).context("sync directory", &layers)?;
    }
    if state.floor == Epoch::NONE && !epochs.is_empty() {
        let problem = format!("it has {} undo layers before its first recovery point", epochs.len());
        return Err(ReplicaError::unusable(&layers, problem));
    }

    let (readable, damaged) = read_layers(&*storage, &layers, &state)?;
    let first = readable.first().map_or(state.applied.next(), Layer::epoch);
    let leftovers = epochs.into_iter().filter(|epoch| *epoch < first);
    let leftovers = leftovers.map(|epoch| (epoch, layers.join(crate::layer::file_name(epoch)))).collect();
    let report = OpenReport {
        group,
        generation: state.generation,
        applied: state.applied,
        rolled_back,
        removed,
        damaged,
    };
    let shared = Shared {
        generation: state.generation,
        applied: state.applied,
        cut_time: state.cut_time,
        floor: state.floor,
        layers: readable.into_iter().map(Arc::new).collect(),
        images,
        volumes: state.volumes.clone(),
        ..Shared::default()
    };
    let core = Core::new(storage, dir, group, lock, shared);
    Ok(Opened { core, state, state_file, leftovers, report })
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

/// The epochs that have a layer file, in order.
pub(crate) fn layer_epochs(storage: &dyn Storage, layers: &Path) -> Result<Vec<Epoch>, ReplicaError> {
    let names = storage.list(layers).context("list", layers)?;
    let mut epochs: Vec<Epoch> = names.iter().filter_map(|name| parse_file_name(name)).collect();
    epochs.sort_unstable();
    Ok(epochs)
}

/// The readable layers up to the applied epoch, oldest first, and what is wrong with those before them.
fn read_layers(
    storage: &dyn Storage,
    layers: &Path,
    state: &State,
) -> Result<(Vec<Layer>, Vec<DamagedLayer>), ReplicaError> {
    let mut readable: Vec<Layer> = Vec::new();
    let mut damaged = Vec::new();
    if state.floor == Epoch::NONE {
        return Ok((readable, damaged));
    }
    for epoch in (state.floor.0..=state.applied.0).rev().map(Epoch) {
        let path = layers.join(crate::layer::file_name(epoch));
        let problem = match Layer::open(storage, &path) {
            Ok(mut layer) => match check_layer(&layer, state, epoch) {
                Ok(()) => {
                    // Layers that agree on the volumes share one table.
                    if let Some(newer) = readable.last()
                        && newer.header.meta.volumes == layer.header.meta.volumes
                    {
                        layer.header.meta.volumes = newer.header.meta.volumes.clone();
                    }
                    readable.push(layer);
                    continue;
                }
                Err(problem) => problem,
            },
            Err(ReplicaError::Corrupt { problem, .. }) => problem,
            Err(ReplicaError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                "the file is missing".to_owned()
            }
            Err(other) => return Err(other),
        };
        damaged.push(DamagedLayer { epoch, problem });
        break;
    }
    readable.reverse();
    Ok((readable, damaged))
}

/// Whether a layer is the one that its name says, of this replica.
pub(crate) fn check_layer(layer: &Layer, state: &State, epoch: Epoch) -> Result<(), String> {
    let meta = &layer.header.meta;
    if meta.group != state.group || Some(meta.generation) != state.generation || meta.epoch != epoch {
        return Err(format!(
            "it is the layer of epoch {} of generation {} of {:?}",
            meta.epoch, meta.generation, meta.group
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
    check_layer(&layer, state, state.applied.next())
        .map_err(|problem| refused(ReplicaError::corrupt(path, problem)))?;
    let index = layer.index(&*file).map_err(refused)?;
    roll_back(&*file, &layer, &index, state, images).map_err(refused)
}

/// Puts back what an epoch overwrote, durably. The layer stays, so a crash on the way is repaired by doing it again.
///
/// The order, and what breaks when it is changed:
/// 1. every run of the layer is checked (else a damaged one leaves a mixture of two epochs);
/// 2. the old content is written;
/// 3. file images are cut to the size they had (else a volume would seem to have grown) and synced;
/// 4. only then may the caller remove the layer (else a crash leaves a half-applied epoch that nothing tells of).
pub(crate) fn roll_back(
    file: &dyn StorageFile,
    layer: &Layer,
    index: &Index,
    state: &State,
    images: &HashMap<VolumeId, Arc<Image>>,
) -> Result<(), ReplicaError> {
    for (_, entries) in index.volumes() {
        for_each_run(file, &layer.path, entries, |_, _| Ok(()))?;
    }
    for (volume, entries) in index.volumes() {
        let Some(known) = state.volume(volume) else {
            // New in this epoch: it had no content, and what it has now is dropped when it comes again.
            continue;
        };
        let image = images.get(&volume).expect("a volume of the state has an image");
        let mut cursor = DataCursor::default();
        for_each_run(file, &layer.path, entries, |entry, data| match data {
            Some(data) => image.write(data, entry.start()),
            None => image.zero(entry.start(), entry.length(), &mut cursor),
        })?;
        image.cut(known.info.size.0)?;
        image.sync()?;
    }
    Ok(())
}

/// Calls `each` with every entry and its data, checked; `None` for zeroes.
pub(crate) fn for_each_run(
    file: &dyn StorageFile,
    path: &Path,
    entries: &[Entry],
    mut each: impl FnMut(&Entry, Option<&[u8]>) -> Result<(), ReplicaError>,
) -> Result<(), ReplicaError> {
    let mut buffer = Vec::new();
    let mut rest = entries;
    while let Some(first) = rest.first() {
        if first.is_zeroes() {
            each(first, None)?;
            rest = &rest[1..];
            continue;
        }
        let mut count = 1;
        let mut length = first.length();
        while let Some(next) = rest.get(count)
            && next.position == first.position + length
            && length + next.length() <= IMAGE_BATCH_BYTES.0
        {
            length += next.length();
            count += 1;
        }
        buffer.resize(length as usize, 0);
        file.read_exact_at(&mut buffer, first.position).context("read undo layer", path)?;
        let mut data = &buffer[..];
        for entry in &rest[..count] {
            let (run, after) = data.split_at(entry.length() as usize);
            check_run(entry, run, path)?;
            each(entry, Some(run))?;
            data = after;
        }
        rest = &rest[count..];
    }
    Ok(())
}

pub(crate) fn check_run(entry: &Entry, data: &[u8], path: &Path) -> Result<(), ReplicaError> {
    if crc32c::crc32c(data) == entry.crc {
        return Ok(());
    }
    let problem = format!(
        "checksum of the {} bytes at byte {} does not match (damaged)",
        entry.length(),
        entry.position
    );
    Err(ReplicaError::corrupt(path, problem))
}
