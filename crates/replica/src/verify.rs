//! Checking a replica's files without opening it for use.

use std::path::{Path, PathBuf};

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, UnixNanos};
use durable::{OpenMode, Storage};

use crate::error::Context;
use crate::layer::{Layer, file_name};
use crate::recover::{check_layer, for_each_run, layer_epochs, lock};
use crate::shared::layers_dir;
use crate::state::{State, StateFile};
use crate::{Place, ReplicaError, shared};

/// What was found in a replica's directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whose replica it is, where its state says so.
    pub group: Option<GroupId>,
    /// The history it follows.
    pub generation: Option<Generation>,
    /// The last epoch it holds.
    pub applied: Epoch,
    /// Its oldest recovery point; 0 when there is none.
    pub floor: Epoch,
    /// Each layer file, oldest first.
    pub layers: Vec<LayerFindings>,
    /// Everything wrong, each naming its file. Empty: state and layers are sound.
    pub problems: Vec<String>,
    /// What opening will take care of: a half-applied epoch, leftovers.
    pub notes: Vec<String>,
}

/// One layer file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerFindings {
    /// By its name.
    pub epoch: Epoch,
    /// The file.
    pub path: PathBuf,
    /// When its epoch was cut.
    pub cut_time: UnixNanos,
    /// What may be said of its epoch.
    pub consistency: Consistency,
    /// Stretches of old content.
    pub entries: u64,
    /// The file's size.
    pub bytes: ByteCount,
}

/// Reads the state and every layer of the replica in `dir` (`<data>/<group id>`) and checks every checksum. Changes
/// nothing.
///
/// # Errors
/// When storage fails, or a process has the replica open. What is damaged is in the report, not an error.
pub fn verify(storage: &dyn Storage, dir: &Path) -> Result<Report, ReplicaError> {
    let mut report = Report::default();
    if !storage.exists(dir).context("look for", dir)? {
        return Err(ReplicaError::unusable(dir, "there is no replica".to_owned()));
    }
    let _lock = lock(storage, dir)?;
    let state = match StateFile::open(storage, dir) {
        Ok((_, state)) => state,
        Err(error @ ReplicaError::Corrupt { .. }) => {
            report.problems.push(error.to_string());
            return Ok(report);
        }
        Err(other) => return Err(other),
    };
    report.group = Some(state.group);
    report.generation = state.generation;
    report.applied = state.applied;
    report.floor = state.floor;
    images(storage, dir, &state, &mut report)?;
    let layers = layers_dir(dir);
    let epochs = layer_epochs(storage, &layers)?;
    for epoch in &epochs {
        let path = layers.join(file_name(*epoch));
        if *epoch < state.floor {
            // It may have been on its way to become another layer.
            report.notes.push(format!("{}: a leftover; opening removes it", path.display()));
            continue;
        }
        match layer(storage, &path, &state, *epoch) {
            Ok(findings) => report.layers.push(findings),
            Err(ReplicaError::Corrupt { path, problem }) => {
                report.problems.push(format!("{}: {problem}", path.display()));
            }
            Err(other) => return Err(other),
        }
        if *epoch == state.applied.next() {
            report.notes.push(format!("epoch {epoch} was being applied; opening takes it back"));
        } else if *epoch > state.applied {
            report.problems.push(format!("{}: past the applied epoch {}", path.display(), state.applied));
        }
    }
    if state.floor > Epoch::NONE {
        let missing =
            (state.floor.0..=state.applied.0).map(Epoch).filter(|epoch| epochs.binary_search(epoch).is_err());
        for epoch in missing {
            report.problems.push(format!("{}: missing", layers.join(file_name(epoch)).display()));
        }
    }
    Ok(report)
}

fn images(storage: &dyn Storage, dir: &Path, state: &State, report: &mut Report) -> Result<(), ReplicaError> {
    for volume in state.volumes.iter().filter(|volume| volume.place == Place::File) {
        let path = shared::image_path(dir, volume.info.id);
        if !storage.exists(&path).context("look for", &path)? {
            report.problems.push(format!("{}: missing", path.display()));
            continue;
        }
        let file = storage.open(&path, OpenMode::Read).context("open replica image", &path)?;
        let length = file.len().context("measure replica image", &path)?;
        if length < volume.info.size.0 {
            let needed = volume.info.size.0;
            report.problems.push(format!("{}: {length} bytes where the volume has {needed}", path.display()));
        }
    }
    Ok(())
}

fn layer(
    storage: &dyn Storage,
    path: &Path,
    state: &State,
    epoch: Epoch,
) -> Result<LayerFindings, ReplicaError> {
    let file = storage.open(path, OpenMode::Read).context("open undo layer", path)?;
    let layer = Layer::open(storage, path)?;
    check_layer(&layer, state, epoch).map_err(|problem| ReplicaError::corrupt(path, problem))?;
    let index = layer.index(&*file)?;
    for (_, entries) in index.volumes() {
        for_each_run(&*file, path, entries, |_, _| Ok(()))?;
    }
    Ok(LayerFindings {
        epoch,
        path: path.to_owned(),
        cut_time: layer.header.meta.cut_time,
        consistency: layer.header.meta.consistency,
        entries: index.entries.len() as u64,
        bytes: layer.bytes(),
    })
}
