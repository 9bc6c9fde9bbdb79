//! Checking a replica's files without opening it for use.

use std::ops::Range;
use std::path::{Path, PathBuf};

use block::{
    BLOCK_BYTES, ByteCount, Consistency, Epoch, Generation, GroupId, SECTOR_BYTES, UnixNanos, VolumeId,
};
use changeset::VolumeInfo;
use durable::{OpenMode, Storage, StorageFile};

use crate::error::Context;
use crate::layer::{Entry, Layer, file_name};
use crate::promoted::journal;
use crate::promoted::marker::Marker;
use crate::recover::{check_layer, layer_files, lock};
use crate::shared::{layers_dir, spans_dir};
use crate::state::{State, StateFile};
use crate::sums::{Sums, SumsRecord};
use crate::{Pace, Place, ReplicaError, SCRUB_CHUNK_BYTES, bad, catalogue, pins, shared, span, sums};

/// Damaged blocks of which it is looked up what points they concern; more concern all of them.
const PROBLEMS_MAX: usize = 64;

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
    /// What the replica has.
    pub volumes: Vec<VolumeInfo>,
    /// Each layer file, oldest first.
    pub layers: Vec<LayerFindings>,
    /// Of images, what was read and compared with its checksum.
    pub compared: ByteCount,
    /// Which points the problems concern.
    pub unusable: Vec<Unusable>,
    /// Sound files that make old points open fast.
    pub spans: u64,
    /// Everything wrong, each naming its file. Empty: state and layers are sound.
    pub problems: Vec<String>,
    /// What opening will take care of: a half-applied epoch, leftovers.
    pub notes: Vec<String>,
}

/// Points that cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unusable {
    /// The first and the last of their epochs.
    pub epochs: (Epoch, Epoch),
    /// Of this volume only.
    pub volume: Option<VolumeId>,
    /// Naming the file.
    pub problem: String,
}

impl Report {
    fn problem(&mut self, epochs: (Epoch, Epoch), volume: Option<VolumeId>, problem: String) {
        self.problems.push(problem.clone());
        if epochs.0 <= epochs.1 {
            self.unusable.push(Unusable { epochs, volume, problem });
        }
    }

    /// Whether there is a recovery point at an epoch. What one needs is sound when nothing in [`Report::unusable`] names it.
    pub fn is_point(&self, epoch: Epoch) -> bool {
        self.layers
            .iter()
            .any(|layer| layer.epoch == epoch && epoch <= self.applied && layer.consistency.is_point())
    }

    /// The newest recovery point.
    pub fn newest(&self) -> Option<Epoch> {
        self.layers.iter().map(|layer| layer.epoch).filter(|epoch| self.is_point(*epoch)).max()
    }

    /// The recovery points on either side of an epoch.
    pub fn nearest(&self, epoch: Epoch) -> (Option<Epoch>, Option<Epoch>) {
        let points = || self.layers.iter().map(|layer| layer.epoch).filter(|epoch| self.is_point(*epoch));
        (points().filter(|point| *point < epoch).max(), points().filter(|point| *point > epoch).min())
    }

    /// What is wrong with a volume, or any of them, at a point.
    pub fn wrong_at(&self, epoch: Epoch, volume: Option<VolumeId>) -> impl Iterator<Item = &str> {
        let concerns = move |found: &&Unusable| {
            (found.epochs.0..=found.epochs.1).contains(&epoch)
                && (volume.is_none() || found.volume.is_none() || found.volume == volume)
        };
        self.unusable.iter().filter(concerns).map(|found| found.problem.as_str())
    }
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

/// Whether it is promoted, and what was written and is not applied yet.
fn promoted(
    storage: &dyn Storage,
    dir: &Path,
    state: &State,
    report: &mut Report,
) -> Result<(), ReplicaError> {
    let promoted = match Marker::read(storage, dir, state.group) {
        Ok(marker) => marker.is_some_and(|marker| marker.promoted),
        Err(error @ ReplicaError::Corrupt { .. }) => {
            report.problems.push(error.to_string());
            return Ok(());
        }
        Err(other) => return Err(other),
    };
    let journals = journal::dir(dir);
    for epoch in journal::list(storage, &journals)? {
        let path = journal::path(&journals, epoch);
        if epoch <= state.applied {
            report.notes.push(format!("{}: a leftover; opening removes it", path.display()));
            continue;
        }
        if !promoted {
            report.problems.push(format!("{}: of a group that is not promoted", path.display()));
            continue;
        }
        match journal::check(storage, &path)? {
            Ok((writes, torn)) => report.notes.push(format!(
                "{}: {writes} writes that are not applied yet, and {torn} bytes that a crash has torn; opening applies what counts",
                path.display()
            )),
            Err(problem) => report.problems.push(format!("{}: {problem}", path.display())),
        }
    }
    Ok(())
}

/// Reads the state, every layer and every image of the replica in `dir` (`<data>/<group id>`) and checks every checksum.
/// Changes nothing.
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
    report.volumes = state.volumes.iter().map(|volume| volume.info.clone()).collect();
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
                // What its own point is, is told by its header.
                let own = Layer::open(storage, &path).is_err();
                let last = if own { *epoch } else { Epoch(epoch.0 - 1) };
                report.problem((state.floor, last), None, format!("{}: {problem}", path.display()));
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
                let before = (state.floor, Epoch(expected.0 - 1));
                report.problem(before, None, format!("{}: missing", path.display()));
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
    promoted(storage, dir, &state, &mut report)?;
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
    images(storage, dir, &state, &files, &mut report)?;
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

/// Images have checksums as of an epoch. Blocks that changed since are told by the layers after it, and not compared.
fn images(
    storage: &dyn Storage,
    dir: &Path,
    state: &State,
    files: &[(Epoch, Epoch)],
    report: &mut Report,
) -> Result<(), ReplicaError> {
    let all = (state.floor, state.applied);
    let record = match state.generation {
        Some(generation) => SumsRecord::read(storage, dir, state.group, generation)?,
        None => None,
    };
    for volume in &state.volumes {
        let id = volume.info.id;
        // Where a device is, only the server's configuration says.
        if volume.place == Place::Device {
            report
                .notes
                .push(format!("volume {}: its image is a device, which was not read", volume.info.name));
            continue;
        }
        let path = shared::image_path(dir, id);
        if !storage.exists(&path).context("look for", &path)? {
            report.problem(all, Some(id), format!("{}: missing", path.display()));
            continue;
        }
        let file = storage.open(&path, OpenMode::Read).context("open replica image", &path)?;
        let (length, size) = (file.len().context("measure replica image", &path)?, volume.info.size.0);
        if length < size {
            let problem = format!("{}: {length} bytes where the volume has {size}", path.display());
            report.problem(all, Some(id), problem);
            continue;
        }
        let sums = sums::path(dir, id);
        if !storage.exists(&sums).context("look for", &sums)? {
            report.notes.push(format!("{}: has no checksums yet", path.display()));
            continue;
        }
        match sums::check(storage, &sums, state.group, id) {
            Ok(()) => {}
            Err(ReplicaError::Corrupt { path, problem }) => {
                report.notes.push(format!("{}: {problem}; it is derived and made again", path.display()));
                continue;
            }
            Err(other) => return Err(other),
        }
        let since = record.as_ref().map(|record| record.epoch);
        let Some(since) = since.filter(|since| *since >= state.floor) else {
            report.notes.push(format!("{}: its checksums are not of this history", path.display()));
            continue;
        };
        image(storage, dir, state, &volume.info, &*file, (since, files), report)?;
    }
    Ok(())
}

/// Compares an image's blocks with their checksums.
fn image(
    storage: &dyn Storage,
    dir: &Path,
    state: &State,
    info: &VolumeInfo,
    file: &dyn StorageFile,
    (since, files): (Epoch, &[(Epoch, Epoch)]),
    report: &mut Report,
) -> Result<(), ReplicaError> {
    let mut changed = Vec::new();
    let layers = layers_dir(dir);
    let path = |(back, epoch): &(Epoch, Epoch)| layers.join(file_name(*back, *epoch));
    // With whether what was kept is sound.
    let entries = |layer: &(Epoch, Epoch)| -> Result<Vec<(Range<u64>, bool)>, ReplicaError> {
        let opened = Layer::open(storage, &path(layer))?;
        let file = storage.open(&path(layer), OpenMode::Read).context("open undo layer", &path(layer))?;
        let found = opened.entries(info.id, file);
        let range = |entry: Entry| (entry.offset()..entry.offset() + entry.length(), !entry.known_bad);
        found.map(|entry| entry.map(range)).collect()
    };
    for layer in files.iter().filter(|(_, epoch)| *epoch > since) {
        match entries(layer) {
            Ok(ranges) => changed.extend(ranges.iter().map(|(range, _)| blocks_of(range))),
            // It was told already. Without it, nothing says which blocks are as old as their checksums.
            Err(ReplicaError::Corrupt { .. }) => return Ok(()),
            Err(other) => return Err(other),
        }
    }
    changed.sort_by_key(|range| range.start);
    let mut changed = changed.into_iter().peekable();
    let mut changed_until = 0;
    let mut sums = Sums::open(storage, dir, state.group, info.id, false)?;
    let mut buffer = vec![0; SCRUB_CHUNK_BYTES.0 as usize];
    let image = shared::image_path(dir, info.id);
    for start in (0..info.size.0).step_by(buffer.len()) {
        let data = &mut buffer[..(info.size.0 - start).min(SCRUB_CHUNK_BYTES.0) as usize];
        file.read_exact_at(data, start).context("read replica image", &image)?;
        for (block, content) in (start / BLOCK_BYTES..).zip(data.chunks(BLOCK_BYTES as usize)) {
            while let Some(range) = changed.next_if(|range| range.start <= block) {
                changed_until = changed_until.max(range.end);
            }
            let known = sums.get(block)?;
            if known == 0 || block < changed_until {
                continue;
            }
            report.compared += ByteCount(content.len() as u64);
            if known == sums::sum(content) {
                continue;
            }
            // Older points have this block from the layers that kept it, once these have all of its sectors.
            let mut first = state.floor;
            let mut kept = !sectors_of(&(0..info.size.0), block);
            for layer in files.iter().rev().filter(|(_, epoch)| *epoch > state.floor && *epoch <= since) {
                match entries(layer) {
                    Ok(ranges) => {
                        let sound = ranges.iter().filter(|(_, sound)| *sound);
                        kept |= sound.fold(0, |kept, (range, _)| kept | sectors_of(range, block));
                    }
                    Err(ReplicaError::Corrupt { .. }) => {}
                    Err(other) => return Err(other),
                }
                if kept == u8::MAX {
                    first = layer.1;
                    break;
                }
            }
            let problem = format!(
                "{}: checksum of the block at byte {} does not match (damaged)",
                image.display(),
                block * BLOCK_BYTES
            );
            report.problem((first, state.applied), Some(info.id), problem);
            if report.unusable.len() >= PROBLEMS_MAX {
                report.problem(
                    (state.floor, state.applied),
                    Some(info.id),
                    format!("{}: more than that; the rest was not read", image.display()),
                );
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Which sectors of a block lie in a range of bytes, as bits.
fn sectors_of(range: &Range<u64>, block: u64) -> u8 {
    let sectors = (block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES).step_by(SECTOR_BYTES as usize);
    sectors.enumerate().fold(0, |bits, (sector, at)| bits | u8::from(range.contains(&at)) << sector)
}

fn blocks_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
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
