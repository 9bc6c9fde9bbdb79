//! Finding what has rotted: reads everything and compares checksums.
//!
//! Undo layers carry checksums of all that they hold. Images have theirs in files of their own ([`crate::sums`]), as of an epoch; a view
//! at that epoch is compared with them, so that apply may go on meanwhile. Spans are derived, and made again.
//!
//! What a damaged layer means: points before it cannot be viewed, and say why; the rest can. What a damaged block of an image means:
//! a view that comes to it there is refused that block, by name, and reads all else. Which points that concerns, the findings say.
//! A block is whole again when an epoch has written all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Epoch, Extent, SECTOR_BYTES, VolumeId};

use crate::bad::BadBlocks;
use crate::group::GroupReplica;
use crate::layer::{Entry, Layer};
use crate::segment::joined;
use crate::shared::{Core, Shared};
use crate::sums::{Sums, SumsRecord, sum};
use crate::sweep::Sweep;
use crate::tree::{Cursor, Record};
use crate::view::View;
use crate::{BAD_BLOCKS_MAX, CHECKSUM_EPOCHS, Pace, ReplicaError, SCRUB_CHUNK_BYTES, SPAN_LEVELS};

/// Damaged blocks of which it is looked up what points they concern. More concern all points.
const BLOCKS_TRACED_MAX: usize = 64;

const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

/// What a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Undo layers that were read.
    pub layers: u64,
    /// Read from layers and images.
    pub read: ByteCount,
    /// Of images, what had no checksum yet and has one now: the first copy of a volume, or after checksums were lost.
    pub new_checksums: ByteCount,
    /// What is damaged. Empty: all is sound.
    pub findings: Vec<Finding>,
    /// What was damaged, and is made again from the rest.
    pub notes: Vec<String>,
}

/// Something that is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file or device.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: String,
    /// Of an image: which volume, and which granules or parts of them. What a resync has to read again.
    pub blocks: Option<(VolumeId, Vec<Extent>)>,
    /// The first and last of the points that it concerns; `None`: none that there is.
    pub points: Option<(Epoch, Epoch)>,
    /// How many these are.
    pub points_count: u64,
}

/// How far a scrub is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Read so far.
    pub done: ByteCount,
    /// What there is to be read, as known when it began.
    pub total: ByteCount,
}

/// The checksums of a group's images.
#[derive(Debug, Default)]
pub(crate) struct Checksums {
    record: Option<SumsRecord>,
    volumes: BTreeMap<VolumeId, Sums>,
    /// All of them are as of the record's epoch.
    sound: bool,
}

impl Checksums {
    fn volume(&mut self, core: &Core, volume: VolumeId, fresh: bool) -> Result<&mut Sums, ReplicaError> {
        if fresh || !self.volumes.contains_key(&volume) {
            let sums = Sums::open(&*core.storage, &core.dir, core.group, volume, fresh)?;
            self.volumes.insert(volume, sums);
        }
        Ok(self.volumes.get_mut(&volume).expect("just opened"))
    }

    /// Brings all checksums to the applied epoch; `false` when they are, or there is nothing to know yet.
    pub(crate) fn catch_up(&mut self, core: &Arc<Core>, pace: &Pace) -> Result<bool, ReplicaError> {
        let (generation, applied, first, volumes, damaged) = {
            let shared = core.shared.read();
            let first = shared.layers.front().map(|layer| layer.back());
            let volumes: Vec<VolumeId> = shared.volumes.iter().map(|volume| volume.info.id).collect();
            let damaged = shared.damaged.as_ref().map_or(Epoch::NONE, |layer| layer.epoch());
            (shared.generation, shared.applied, first, volumes, damaged)
        };
        let (Some(generation), Some(first)) = (generation, first) else { return Ok(false) };
        if self.record.is_none() {
            self.record = SumsRecord::read(&*core.storage, &core.dir, core.group, generation)?;
        }
        let known = self.record.as_ref().map(|record| record.epoch);
        if self.sound && known == Some(applied) {
            return Ok(false);
        }
        self.sound = false;
        // What changed since is told by layers, as long as there are those, and sound ones.
        let since = known.filter(|known| *known >= first.max(damaged) && *known <= applied);
        for volume in volumes {
            match since {
                None => self.volume(core, volume, true)?.sync()?,
                Some(since) => self.catch_up_volume(core, volume, since, applied, pace)?,
            }
        }
        match &mut self.record {
            Some(record) => record.write(&core.dir, core.group, generation, applied)?,
            none => {
                *none = Some(SumsRecord::create(&*core.storage, &core.dir, core.group, generation, applied)?);
            }
        }
        self.sound = true;
        Ok(true)
    }

    fn catch_up_volume(
        &mut self,
        core: &Arc<Core>,
        volume: VolumeId,
        since: Epoch,
        applied: Epoch,
        pace: &Pace,
    ) -> Result<(), ReplicaError> {
        let view = match View::at(core, volume, applied, |shared, epoch| epoch <= shared.applied) {
            Ok(view) => view,
            // It has left the group, so nothing of it has changed.
            Err(ReplicaError::NoSuchVolume { .. }) => return Ok(()),
            Err(other) => return Err(other),
        };
        let mut lists = Vec::new();
        for part in core.shared.read().stretch(since, applied, SPAN_LEVELS) {
            lists.extend(core.segments(&part, volume)?);
        }
        let sums = self.volume(core, volume, false)?;
        let mut buffer = vec![0; SCRUB_CHUNK_BYTES.0 as usize];
        let mut next = 0;
        let mut healed = false;
        for segment in joined(Sweep::new(lists), u64::MAX) {
            let segment = segment?;
            // Several segments may lie in one block.
            let mut block = (segment.offset() / BLOCK_BYTES).max(next);
            let end = segment.end_offset().div_ceil(BLOCK_BYTES);
            next = end.max(next);
            while block < end {
                let start = block * BLOCK_BYTES;
                let length =
                    (end * BLOCK_BYTES).min(view.size().0).saturating_sub(start).min(SCRUB_CHUNK_BYTES.0);
                if length == 0 {
                    break;
                }
                let data = &mut buffer[..length as usize];
                pace.spend(length)?;
                view.read_unchecked(data, ByteOffset(start))?;
                let whole = segment.offset().div_ceil(BLOCK_BYTES)..segment.end_offset() / BLOCK_BYTES;
                for content in data.chunks(BLOCK_BYTES as usize) {
                    // A damaged block keeps the checksum that tells so, unless all of it was written since.
                    match core.is_bad(volume, block) {
                        true if whole.contains(&block) && core.is_whole_again(volume, block) => healed = true,
                        true => {
                            block += 1;
                            continue;
                        }
                        false => {}
                    }
                    sums.set(block, sum(content))?;
                    block += 1;
                }
            }
        }
        sums.sync()?;
        // Only now: before, a crash would bring back the old checksum of a block that is not in the list any more.
        if healed { core.save_bad_blocks() } else { Ok(()) }
    }
}

impl Core {
    fn is_bad(&self, volume: VolumeId, block: u64) -> bool {
        self.shared.read().bad_blocks.get(&volume).is_some_and(|bad| bad.contains(block))
    }

    /// Takes a block that was written from the list; `false` when it is one of too many to list.
    fn is_whole_again(&self, volume: VolumeId, block: u64) -> bool {
        self.shared.write().bad_blocks.get_mut(&volume).is_none_or(|bad| bad.remove(block))
    }
}

impl GroupReplica {
    /// Brings the checksums of the images up to date when enough epochs were applied since, or `now`; `false` when there was nothing to
    /// do.
    pub(crate) fn update_checksums(&self, now: bool, pace: &Pace) -> Result<bool, ReplicaError> {
        let mut checksums = self.core.checksums.lock();
        let (applied, failover) = {
            let shared = self.core.shared.read();
            (shared.applied, shared.failover)
        };
        // They must not be as of an epoch that cancelling takes back.
        if failover.is_some() {
            return Ok(false);
        }
        let behind = checksums.record.as_ref().map_or(u64::MAX, |record| applied.0.abs_diff(record.epoch.0));
        if !now && behind < CHECKSUM_EPOCHS {
            return Ok(false);
        }
        let outcome = checksums.catch_up(&self.core, pace);
        if outcome.is_err() {
            // Opened again the next time: where their files stand is not known.
            *checksums = Checksums::default();
        }
        outcome
    }

    /// Reads every undo layer and every image (of one volume, or all), and compares their checksums. Damaged layers and blocks are
    /// marked, see the head of this module. Apply, views and thinning go on.
    ///
    /// # Errors
    /// When storage fails or the pace says stop. What is damaged is in the report, not an error.
    pub fn scrub(
        &self,
        only: Option<VolumeId>,
        pace: &Pace,
        progress: &dyn Fn(ScrubProgress),
    ) -> Result<ScrubReport, ReplicaError> {
        let mut report = ScrubReport::default();
        let (layers, volumes) = {
            let shared = self.core.shared.read();
            if let Some(failover) = shared.failover {
                return Err(ReplicaError::FailoverPending { group: self.core.group, point: failover.point });
            }
            // Nothing reads the data of layers that lead back past the oldest point, but they are the store's all the same.
            let layers: Vec<Arc<Layer>> =
                shared.layers.iter().filter(|layer| layer.epoch() <= shared.applied).cloned().collect();
            let volumes = shared.volumes.iter().map(|volume| (volume.info.id, volume.info.size));
            let volumes: Vec<_> = volumes.filter(|(id, _)| only.is_none_or(|only| only == *id)).collect();
            (layers, volumes)
        };
        let layer_bytes: ByteCount = layers.iter().map(|layer| layer.bytes()).sum();
        let total = layer_bytes + volumes.iter().map(|(_, size)| *size).sum();
        for layer in layers {
            self.scrub_layer(&layer, pace, &mut report)?;
            progress(ScrubProgress { done: report.read, total });
        }
        self.scrub_spans(&mut report)?;
        self.update_checksums(true, pace)?;
        for (volume, _) in volumes {
            self.scrub_image(volume, pace, &mut report, &|done| progress(ScrubProgress { done, total }))?;
        }
        let sums = self.core.checksums.lock();
        for (path, damaged) in
            sums.volumes.values().map(|sums| (&sums.path, sums.damaged)).filter(|(_, n)| *n > 0)
        {
            report.notes.push(format!(
                "{}: {damaged} pages of checksums were damaged; what they covered has new checksums now, and was not checked",
                path.display()
            ));
        }
        Ok(report)
    }

    fn scrub_layer(
        &self,
        layer: &Arc<Layer>,
        pace: &Pace,
        report: &mut ScrubReport,
    ) -> Result<(), ReplicaError> {
        let outcome = match layer.damage() {
            Some(problem) => Err(ReplicaError::corrupt(&layer.path, problem)),
            None => layer.check(&*self.core.storage, pace),
        };
        report.layers += 1;
        report.read += layer.bytes();
        match outcome {
            Ok(()) => Ok(()),
            Err(ReplicaError::Corrupt { path, problem }) => {
                layer.mark_damaged(&problem);
                let mut shared = self.core.shared.write();
                shared.note_damage(layer);
                let points = |point: Epoch| point < layer.epoch();
                report.findings.push(finding(&shared, path, problem, None, points));
                Ok(())
            }
            // It was merged or dropped meanwhile.
            Err(_)
                if self
                    .core
                    .shared
                    .read()
                    .layer_of(layer.epoch())
                    .is_none_or(|now| now.serial != layer.serial) =>
            {
                Ok(())
            }
            Err(ReplicaError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let problem = "the file is missing".to_owned();
                layer.mark_damaged(&problem);
                let mut shared = self.core.shared.write();
                shared.note_damage(layer);
                let points = |point: Epoch| point < layer.epoch();
                report.findings.push(finding(&shared, layer.path.clone(), problem, None, points));
                Ok(())
            }
            Err(other) => Err(other),
        }
    }

    fn scrub_spans(&self, report: &mut ScrubReport) -> Result<(), ReplicaError> {
        let spans: Vec<_> = self.core.shared.read().spans.values().cloned().collect();
        for span in spans {
            match crate::span::check(&*self.core.storage, &span.path) {
                Err(ReplicaError::Corrupt { path, problem }) => {
                    self.core.discard_span(&path);
                    self.core.building.lock().look_again();
                    report.notes.push(format!("{}: {problem}; it is derived and made again", path.display()));
                }
                Err(ReplicaError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn scrub_image(
        &self,
        volume: VolumeId,
        pace: &Pace,
        report: &mut ScrubReport,
        progress: &dyn Fn(ByteCount),
    ) -> Result<(), ReplicaError> {
        let mut bad = BadBlocks::default();
        let mut buffer = vec![0; SCRUB_CHUNK_BYTES.0 as usize];
        let mut view: Option<View> = None;
        let mut at = 0;
        let mut too_many = false;
        while !too_many {
            // In the hands of one: else checksums could be brought to another epoch between reading and comparing.
            let mut checksums = self.core.checksums.lock();
            let Some(epoch) =
                checksums.record.as_ref().filter(|_| checksums.sound).map(|record| record.epoch)
            else {
                drop(checksums);
                if !self.update_checksums(true, pace)? {
                    return Ok(());
                }
                continue;
            };
            if view.as_ref().is_none_or(|view| view.epoch() != epoch) {
                view = match View::at(&self.core, volume, epoch, |shared, epoch| epoch <= shared.applied) {
                    Ok(view) => Some(view),
                    Err(ReplicaError::NoSuchVolume { .. } | ReplicaError::UnusablePoint { .. }) => {
                        return Ok(());
                    }
                    // Merged into a later one meanwhile.
                    Err(ReplicaError::NoSuchPoint { .. }) => {
                        drop(checksums);
                        self.update_checksums(true, pace)?;
                        continue;
                    }
                    Err(other) => return Err(other),
                };
            }
            let view = view.as_ref().expect("just opened");
            let length = view.size().0.saturating_sub(at).min(SCRUB_CHUNK_BYTES.0);
            if length == 0 {
                break;
            }
            let data = &mut buffer[..length as usize];
            // A block that is known to be bad is not refused here: it may be whole again.
            view.read_unchecked(data, ByteOffset(at))?;
            let sums = checksums.volume(&self.core, volume, false)?;
            for (index, content) in data.chunks(BLOCK_BYTES as usize).enumerate() {
                let block = at / BLOCK_BYTES + index as u64;
                match sums.get(block)? {
                    0 => {
                        sums.set(block, sum(content))?;
                        report.new_checksums += ByteCount(content.len() as u64);
                    }
                    expected if expected != sum(content) => {
                        too_many |= !bad.push(block);
                    }
                    _ => {}
                }
            }
            sums.flush()?;
            drop(checksums);
            pace.spend(length)?;
            report.read += ByteCount(length);
            progress(report.read);
            at += length;
        }
        if let Some(sums) = self.core.checksums.lock().volumes.get_mut(&volume) {
            sums.sync()?;
        }
        drop(view);
        self.report_bad(volume, bad, report)
    }

    /// Marks blocks that are still bad, and tells of them.
    fn report_bad(
        &self,
        volume: VolumeId,
        found: BadBlocks,
        report: &mut ScrubReport,
    ) -> Result<(), ReplicaError> {
        let (path, bad, size) = {
            let mut checksums = self.core.checksums.lock();
            checksums.catch_up(&self.core, &Pace::unbounded())?;
            let epoch = checksums.record.as_ref().map_or(Epoch::NONE, |record| record.epoch);
            let view = View::at(&self.core, volume, epoch, |shared, epoch| epoch <= shared.applied)?;
            let sums = checksums.volume(&self.core, volume, false)?;
            let mut bad = found.without_listed();
            for block in found.listed() {
                // It may have been written since it was compared.
                let length = (view.size().0 - block * BLOCK_BYTES).min(BLOCK_BYTES);
                let mut content = vec![0; length as usize];
                view.read_unchecked(&mut content, ByteOffset(block * BLOCK_BYTES))?;
                if sums.get(block)? != sum(&content) {
                    bad.push(block);
                }
            }
            let mut shared = self.core.shared.write();
            match bad.is_empty() {
                true => shared.bad_blocks.remove(&volume),
                false => shared.bad_blocks.insert(volume, bad.clone()),
            };
            let path = shared.images.get(&volume).map(|image| image.path.clone()).unwrap_or_default();
            (path, bad, view.size())
        };
        self.core.save_bad_blocks()?;
        if bad.is_empty() {
            return Ok(());
        }
        // A point before the newest layer that holds a bad block has the block's content from layers.
        let listed = bad.listed();
        let many = bad.is_too_many() || listed.len() > BLOCKS_TRACED_MAX;
        let mut from = if many { Epoch::NONE } else { Epoch(u64::MAX) };
        for block in listed.take(BLOCKS_TRACED_MAX) {
            from = from.min(self.last_write(volume, size, block)?);
        }
        let shared = self.core.shared.read();
        let problem = match bad.is_too_many() {
            false => format!("{} blocks of {BLOCK_BYTES} bytes are not what was written", bad.listed().len()),
            true => format!(
                "more than {BAD_BLOCKS_MAX} blocks of {BLOCK_BYTES} bytes are not what was written; from there on it was not \
                 compared, and counts as damaged"
            ),
        };
        let blocks = Some((volume, bad.extents(size)));
        report.findings.push(finding(&shared, path, problem, blocks, |point| point >= from));
        Ok(())
    }

    /// The epoch before which all of a block's old content is in layers; 0 when some of it is in none.
    fn last_write(&self, volume: VolumeId, size: ByteCount, block: u64) -> Result<Epoch, ReplicaError> {
        let layers: Vec<Arc<Layer>> = self.core.shared.read().layers.iter().rev().cloned().collect();
        let sectors = block * BLOCK_SECTORS..((block + 1) * BLOCK_SECTORS).min(size.0 / SECTOR_BYTES);
        // What is not in the layers seen so far.
        let mut left: BTreeSet<u64> = sectors.clone().collect();
        for layer in layers {
            let Some(shape) = layer.header.tree(volume) else { continue };
            let source = self.core.source(layer.serial, &layer.path);
            let mut held = || {
                let mut cursor = Cursor::<Entry>::seek(&shape, &source, sectors.start)?;
                while let Some(entry) = cursor.next(&source)?.filter(|entry| entry.start() < sectors.end) {
                    left.retain(|sector| entry.known_bad || !(entry.start()..entry.end()).contains(sector));
                }
                Ok(left.is_empty())
            };
            match held() {
                Ok(true) => return Ok(layer.epoch()),
                Ok(false) => {}
                // What cannot be read may have written to it.
                Err(ReplicaError::Corrupt { .. } | ReplicaError::Io { .. }) => return Ok(Epoch::NONE),
                Err(other) => return Err(other),
            }
        }
        Ok(Epoch::NONE)
    }

    /// The parts of a volume's image that are known to be damaged. A resync of these repairs them.
    pub fn damaged_blocks(&self, volume: VolumeId) -> Vec<Extent> {
        let shared = self.core.shared.read();
        let size = shared.volumes.iter().find(|known| known.info.id == volume).map(|known| known.info.size);
        shared.bad_blocks.get(&volume).map(|bad| bad.extents(size.unwrap_or_default())).unwrap_or_default()
    }
}

fn finding(
    shared: &Shared,
    path: PathBuf,
    problem: String,
    blocks: Option<(VolumeId, Vec<Extent>)>,
    concerns: impl Fn(Epoch) -> bool,
) -> Finding {
    let mut points = None;
    let mut count = 0;
    for epoch in shared.points().map(|layer| layer.epoch()).filter(|epoch| concerns(*epoch)) {
        count += 1;
        points = Some((points.map_or(epoch, |(first, _)| first), epoch));
    }
    Finding { path, problem, blocks, points, points_count: count }
}
