//! Checking a replica's files without opening it for use.

use std::path::{Path, PathBuf};

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, UnixNanos};
use durable::{OpenMode, Storage};

use crate::error::Context;
use crate::layer::{Layer, file_name};
use crate::recover::{check_layer, layer_files, lock};
use crate::shared::{layers_dir, spans_dir};
use crate::state::{State, StateFile};
use crate::{Pace, Place, ReplicaError, bad, catalogue, pins, shared, span, sums};

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
    /// Sound files that make old points open fast.
    pub spans: u64,
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
    /// The epoch whose state it leads back to.
    pub back: Epoch,
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
    let files = layer_files(storage, &layers)?;
    // Each layer's way back ends where the next older one begins.
    let mut expected = state.applied;
    for (back, epoch) in files.iter().rev() {
        let path = layers.join(file_name(*back, *epoch));
        if *epoch < state.floor {
            // It may have been on its way to become another layer.
            report.notes.push(format!("{}: a leftover; opening removes it", path.display()));
            continue;
        }
        match layer(storage, &path, &state, *back, *epoch) {
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
    report.layers.reverse();
    while state.floor > Epoch::NONE && expected >= state.floor {
        // Of several the one that leads furthest back is used.
        let next = files.iter().find(|(_, epoch)| *epoch == expected);
        match next {
            Some((back, epoch)) => {
                for (covered, inner) in files.iter().filter(|file| file.1 < *epoch && file.0 >= *back) {
                    let path = layers.join(file_name(*covered, *inner));
                    report.notes.push(format!("{}: merged into another; opening removes it", path.display()));
                }
                expected = *back;
            }
            None => {
                let older = files.iter().rev().find(|(_, epoch)| *epoch < expected);
                let older = older.map_or(Epoch::NONE, |(_, epoch)| *epoch);
                let path = layers.join(file_name(Epoch(expected.0 - 1), expected));
                report.problems.push(format!("{}: missing", path.display()));
                expected = older;
            }
        }
    }
    if let Err(error) = bad::read(storage, dir, state.group) {
        report.problems.push(format!("{error}; the next scrub makes it again"));
    }
    if let Err(error) = pins::read(storage, dir, state.group) {
        report.problems.push(error.to_string());
    }
    spans(storage, dir, &mut report)?;
    if storage.exists(&catalogue::path(dir)).context("look for", &catalogue::path(dir))? {
        match catalogue::check(storage, dir, state.group, state.generation) {
            Ok(()) => {}
            Err(ReplicaError::Corrupt { path, problem }) => {
                report.notes.push(format!("{}: {problem}; it is derived and made again", path.display()));
            }
            Err(other) => return Err(other),
        }
    }
    for volume in &state.volumes {
        let path = sums::path(dir, volume.info.id);
        if !storage.exists(&path).context("look for", &path)? {
            continue;
        }
        match sums::check(storage, &path, state.group, volume.info.id) {
            Ok(()) => {}
            Err(ReplicaError::Corrupt { path, problem }) => {
                report.notes.push(format!("{}: {problem}; it is derived and made again", path.display()));
            }
            Err(other) => return Err(other),
        }
    }
    Ok(report)
}

/// Spans are derived, so one that is damaged is noted and not a problem.
fn spans(storage: &dyn Storage, dir: &Path, report: &mut Report) -> Result<(), ReplicaError> {
    let dir = spans_dir(dir);
    if !storage.exists(&dir).context("look for", &dir)? {
        return Ok(());
    }
    for name in storage.list(&dir).context("list", &dir)? {
        let path = dir.join(&name);
        if span::parse_file_name(&name).is_none() {
            report.notes.push(format!("{}: a leftover; opening removes it", path.display()));
            continue;
        }
        match span::check(storage, &path) {
            Ok(()) => report.spans += 1,
            Err(ReplicaError::Corrupt { path, problem }) => {
                report.notes.push(format!("{}: {problem}; it is derived and made again", path.display()));
            }
            Err(other) => return Err(other),
        }
    }
    Ok(())
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
    back: Epoch,
    epoch: Epoch,
) -> Result<LayerFindings, ReplicaError> {
    let layer = Layer::open(storage, path)?;
    check_layer(&layer, state, back, epoch).map_err(|problem| ReplicaError::corrupt(path, problem))?;
    layer.check(storage, &Pace::unbounded())?;
    Ok(LayerFindings {
        epoch,
        back,
        path: path.to_owned(),
        cut_time: layer.header.meta.cut_time,
        consistency: layer.header.meta.consistency,
        entries: layer.header.entries_total(),
        bytes: layer.bytes(),
    })
}
