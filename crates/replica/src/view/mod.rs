//! A volume as it was at a recovery point.
//!
//! A block at point P is in the oldest layer after P that holds it, else in the image. Which layer that is, spans tell for
//! many layers at once ([`crate::span`]); so opening a view costs as much as the logarithm of the layers after the point.
//!
//! What may go on at the same time, and why the view is right all the same:
//!
//! | meanwhile | what happens | why the view is right |
//! |---|---|---|
//! | apply | a layer is added, then an image changes | a reader looks at the list again after it read the image: it then has every layer whose epoch can have changed what it read, and takes the old content from there |
//! | an epoch is taken back | the newest layer goes | the count of roll backs tells; the reader starts anew |
//! | thin, delete | layers after the point become one | parts name epochs, not files; the layer that leads back over an epoch is looked up when it is read, and holds the same. A file that has gone meanwhile is NotFound; the count of rewrites tells, and the reader starts anew |
//! | thin, delete at this very point | refused, as long as the view is open | without its boundary the point's content is gone; who decides that a point goes looks for views under the lock under which views are counted |
//! | retention moves the floor past the point | layers that the view needs stay until it is closed | [`Shared::retire`] looks at the views |
//! | spans are built or removed | nothing, or the reader starts anew | spans are derived: with or without one the answer is the same |
//! | scrub | reads only; may mark a layer | an open view goes on; what is damaged is refused when it is read, by its checksum |
//!
//! [`Shared::retire`]: crate::shared::Shared::retire

mod data;
mod parts;

use std::ops::Range;
use std::sync::Arc;

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Epoch, Extent, SECTOR_BYTES, VolumeId};
use parking_lot::Mutex;

use crate::error::Context;
use crate::image::{DataCursor, Image};
use crate::layer::{Entry, Layer, blocks, check_run};
use crate::shared::{Core, Shared, Stretch};
use crate::tree::Cursor;
use crate::{Pace, ReplicaError, SPAN_LEVELS, VIEW_PARTS_MAX, VIEW_SEGMENTS_MAX, VIEW_TAIL_LAYERS_MAX};
use parts::{Part, append, assemble, newest};

/// A volume at a recovery point, for reading. Keeps the layers it needs from being removed while it is open.
///
/// Any number of threads may read. Memory: at most [`VIEW_SEGMENTS_MAX`] segments of 32 bytes (twice that while it is put
/// together), and the pages that all views of a group share, [`crate::INDEX_PAGES_MAX`]; however old the point is.
#[derive(Debug)]
pub struct View {
    core: Arc<Core>,
    image: Arc<Image>,
    volume: VolumeId,
    epoch: Epoch,
    size: u64,
    layers: Mutex<Layers>,
    /// Where the image's data lies, as last looked up, and after how many roll backs. It stays true enough while epochs
    /// are applied: what they change in the image is in layers that this view reads first.
    holes: Mutex<(u64, DataCursor)>,
}

/// What the layers after the point hold of the volume, as last looked up.
#[derive(Clone, Debug)]
struct Layers {
    rollbacks: u64,
    rewrites: u64,
    /// The newest of the layers; the point itself when there is none.
    last: Epoch,
    /// Layers added since it was put together.
    tail: usize,
    /// Oldest first.
    parts: Arc<Vec<Arc<Part>>>,
}

impl View {
    pub(crate) fn open(core: &Arc<Core>, volume: VolumeId, epoch: Epoch) -> Result<View, ReplicaError> {
        {
            let shared = core.shared.read();
            if shared.point(epoch).is_none() {
                return Err(no_such_point(core, &shared, epoch));
            }
        }
        View::at(core, volume, epoch, |shared, epoch| shared.point(epoch).is_some())
    }

    /// The volume after an epoch that `offered` says is there, be it a recovery point or not.
    pub(crate) fn at(
        core: &Arc<Core>,
        volume: VolumeId,
        epoch: Epoch,
        offered: fn(&Shared, Epoch) -> bool,
    ) -> Result<View, ReplicaError> {
        let group = core.group;
        let (image, size) = {
            let mut shared = core.shared.write();
            let layer =
                shared.layer_of(epoch).filter(|layer| layer.epoch() == epoch && offered(&shared, epoch));
            let layer = layer.ok_or_else(|| no_such_point(core, &shared, epoch))?;
            if let Some(damaged) = shared.damage_after(epoch) {
                return Err(ReplicaError::UnusablePoint {
                    group,
                    epoch,
                    path: damaged.path.clone(),
                    problem: damaged.damage().unwrap_or_default().to_owned(),
                });
            }
            let info = layer.header.meta.volumes.iter().find(|info| info.id == volume);
            let size = info.ok_or(ReplicaError::NoSuchVolume { group, volume, epoch })?.size.0;
            let image = shared.images.get(&volume).cloned();
            let image = image.ok_or(ReplicaError::NoSuchVolume { group, volume, epoch })?;
            *shared.views.entry(epoch).or_default() += 1;
            (image, size)
        };
        let layers = Layers { rollbacks: 0, rewrites: 0, last: epoch, tail: 0, parts: Arc::default() };
        let (core, layers, holes) = (core.clone(), Mutex::new(layers), Mutex::default());
        let view = View { core, image, volume, epoch, size, layers, holes };
        view.steady(|_, _| Ok(()))?;
        Ok(view)
    }

    /// The volume's size at the point.
    pub fn size(&self) -> ByteCount {
        ByteCount(self.size)
    }

    /// The point.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The volume.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Reads exactly `buffer.len()` bytes.
    ///
    /// # Errors
    /// When the range lies past the end, storage fails, or a layer is damaged. The buffer's content is then undefined.
    pub fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), ReplicaError> {
        let length = buffer.len() as u64;
        let end = offset
            .0
            .checked_add(length)
            .filter(|end| *end <= self.size)
            .ok_or(ReplicaError::PastEnd { offset, length: ByteCount(length), size: ByteCount(self.size) })?;
        self.steady(|view, layers| view.read_with(layers, buffer, offset.0..end, true))
    }

    /// The same, blocks of the image that are known to be damaged among them.
    pub(crate) fn read_unchecked(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), ReplicaError> {
        let end = offset.0 + buffer.len() as u64;
        self.steady(|view, layers| view.read_with(layers, buffer, offset.0..end, false))
    }

    /// The first range at or after `offset` that may hold anything but zeroes; `None` when only zeroes follow. Holes
    /// shorter than 1 MiB may be counted in.
    ///
    /// # Errors
    /// When storage fails.
    pub fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, ReplicaError> {
        const ROUND: u64 = 1 << 20;
        let found = self.steady(|view, layers| {
            loop {
                let found = view.find_data(layers, offset.0)?;
                let now = view.layers()?;
                if now.last == layers.last {
                    return Ok(found);
                }
                // The image was looked at while an epoch was being written to it.
                *layers = now;
            }
        })?;
        Ok(found.map(|range| {
            let end = range.end.next_multiple_of(ROUND).min(self.size);
            Extent::new(ByteOffset(range.start), ByteCount(end - range.start))
                .expect("a range of data is not empty")
        }))
    }

    /// Runs `attempt` until nothing happened meanwhile that can make it read what never was, or miss a file.
    fn steady<T>(
        &self,
        mut attempt: impl FnMut(&View, &mut Layers) -> Result<T, ReplicaError>,
    ) -> Result<T, ReplicaError> {
        loop {
            let rewrites = self.core.shared.read().rewrites;
            let outcome = self.layers().and_then(|mut layers| {
                let rollbacks = layers.rollbacks;
                let outcome = attempt(self, &mut layers);
                let steady = self.core.shared.read().rollbacks == rollbacks && layers.rollbacks == rollbacks;
                if steady { outcome.map(Some) } else { Ok(None) }
            });
            match outcome {
                Ok(Some(outcome)) => return Ok(outcome),
                Ok(None) => {}
                Err(ReplicaError::Corrupt { path, .. }) if self.core.discard_span(&path) => {
                    self.forget_parts()
                }
                Err(ReplicaError::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound && self.missed(rewrites) =>
                {
                    self.forget_parts();
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// Whether a file may be missing because it was replaced: since then, or since the parts were put together.
    fn missed(&self, rewrites: u64) -> bool {
        let now = self.core.shared.read().rewrites;
        now != rewrites || self.layers.lock().rewrites != now
    }

    fn forget_parts(&self) {
        let rewrites = self.core.shared.read().rewrites;
        let mut held = self.layers.lock();
        *held = Layers { rewrites, last: self.epoch, tail: 0, parts: Arc::default(), ..*held };
    }

    /// What the layers after the point hold, brought up to date.
    fn layers(&self) -> Result<Layers, ReplicaError> {
        let mut held = self.layers.lock();
        loop {
            let (rollbacks, rewrites, mut stretch, added) = {
                let shared = self.core.shared.read();
                if shared.rollbacks != held.rollbacks {
                    held.last = self.epoch;
                }
                let newest = shared.layers.back().map_or(Epoch::NONE, |layer| layer.epoch());
                let first = shared.layers.partition_point(|layer| layer.epoch() <= held.last);
                let added = shared.layers.len() - first;
                if added == 0 && held.rollbacks == shared.rollbacks {
                    return Ok(held.clone());
                }
                let anew = held.last == self.epoch || held.tail + added > VIEW_TAIL_LAYERS_MAX;
                let stretch = match anew {
                    true => shared.stretch(self.epoch, newest, SPAN_LEVELS),
                    false => shared.layers.range(first..).cloned().map(Stretch::Layer).collect(),
                };
                (shared.rollbacks, shared.rewrites, stretch, (!anew).then_some(added))
            };
            if stretch.len() > VIEW_PARTS_MAX && added.is_none() {
                // Spans are missing, as after a start without any. Without them it is slower, and right all the same.
                loop {
                    match self.core.build_span(&Pace::unbounded()) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(error) => {
                            tracing::warn!(%error, "build spans; the view does without");
                            break;
                        }
                    }
                }
                let shared = self.core.shared.read();
                let newest = shared.layers.back().map_or(Epoch::NONE, |layer| layer.epoch());
                stretch = shared.stretch(self.epoch, newest, SPAN_LEVELS);
            }
            let budget = if added.is_some() { VIEW_SEGMENTS_MAX / 8 } else { VIEW_SEGMENTS_MAX };
            let made = assemble(&self.core, self.volume, &stretch, budget);
            if self.core.shared.read().rollbacks != rollbacks {
                // A layer may have been taken back while its index was read.
                held.last = self.epoch;
                continue;
            }
            let made = made?;
            let last = newest(&stretch).unwrap_or(self.epoch);
            match added {
                Some(added) => {
                    append(Arc::make_mut(&mut held.parts), made)?;
                    held.tail += added;
                }
                None => *held = Layers { rollbacks, rewrites, last, tail: 0, parts: Arc::new(made) },
            }
            held.last = last;
            return Ok(held.clone());
        }
    }

    fn read_with(
        &self,
        layers: &mut Layers,
        buffer: &mut [u8],
        range: Range<u64>,
        refuse_damaged: bool,
    ) -> Result<(), ReplicaError> {
        let gaps = self.read_layers(layers, vec![range.clone()], buffer, range.start, refuse_damaged)?;
        if gaps.is_empty() {
            return Ok(());
        }
        if refuse_damaged {
            self.check_blocks(&gaps)?;
        }
        for gap in &gaps {
            let part = (gap.start - range.start) as usize..(gap.end - range.start) as usize;
            self.image.read(&mut buffer[part], gap.start)?;
        }
        let seen = layers.last;
        *layers = self.layers()?;
        if layers.last != seen {
            // The layers seen before hold nothing of the gaps.
            self.read_layers(layers, gaps, buffer, range.start, refuse_damaged)?;
        }
        Ok(())
    }

    /// Refuses what scrubbing found damaged.
    fn check_blocks(&self, gaps: &[Range<u64>]) -> Result<(), ReplicaError> {
        let shared = self.core.shared.read();
        let Some(bad) = shared.bad_blocks.get(&self.volume).filter(|bad| !bad.is_empty()) else {
            return Ok(());
        };
        match gaps.iter().find_map(|gap| bad.within(blocks(gap)).next()) {
            None => Ok(()),
            Some(block) => Err(ReplicaError::DamagedImage {
                path: self.image.path.clone(),
                volume: self.volume,
                offset: ByteOffset(block * BLOCK_BYTES),
            }),
        }
    }

    /// Fills what the layers hold of `gaps`, oldest layer first, and gives the gaps that are left. The buffer begins
    /// at byte `base` of the volume.
    fn read_layers(
        &self,
        layers: &Layers,
        mut gaps: Vec<Range<u64>>,
        buffer: &mut [u8],
        base: u64,
        refuse_damaged: bool,
    ) -> Result<Vec<Range<u64>>, ReplicaError> {
        for part in layers.parts.iter() {
            if gaps.is_empty() {
                break;
            }
            let mut left = Vec::new();
            for gap in gaps {
                let place = (gap.start - base) as usize..(gap.end - base) as usize;
                self.read_part(part, gap, &mut buffer[place], &mut left, refuse_damaged)?;
            }
            gaps = left;
        }
        Ok(gaps)
    }

    /// Fills what one part holds of a range; the rest of it goes to `left`.
    fn read_part(
        &self,
        part: &Part,
        range: Range<u64>,
        buffer: &mut [u8],
        left: &mut Vec<Range<u64>>,
        refuse_damaged: bool,
    ) -> Result<(), ReplicaError> {
        let mut cursor = part.seek(&self.core, range.start / SECTOR_BYTES)?;
        let mut at = range.start;
        while let Some(segment) = cursor.next(&self.core)?.filter(|segment| segment.offset() < range.end) {
            let (start, end) = (segment.offset().max(at), segment.end_offset().min(range.end));
            if start >= end {
                continue;
            }
            if at < start {
                left.push(at..start);
            }
            let place = &mut buffer[(start - range.start) as usize..(end - range.start) as usize];
            match segment.zeroes {
                true => place.fill(0),
                false => self.read_epoch(segment.epoch, start..end, place, refuse_damaged)?,
            }
            at = end;
        }
        if at < range.end {
            left.push(at..range.end);
        }
        Ok(())
    }

    /// Reads what an epoch overwrote in a range, all of which it did.
    fn read_epoch(
        &self,
        epoch: Epoch,
        range: Range<u64>,
        buffer: &mut [u8],
        refuse_damaged: bool,
    ) -> Result<(), ReplicaError> {
        let layer = self.core.shared.read().layer_of(epoch).cloned();
        // Layers after a view's point are never removed without another in their place.
        let layer =
            layer.ok_or(ReplicaError::NoSuchPoint { group: self.core.group, epoch, nearest: None })?;
        let missing = || {
            let problem = format!(
                "it has no old content of byte {} of volume {}, which an index says it has",
                range.start, self.volume
            );
            ReplicaError::corrupt(&layer.path, problem)
        };
        let shape = layer.header.tree(self.volume).ok_or_else(missing)?;
        let source = self.core.source(layer.serial, &layer.path);
        let mut cursor = Cursor::<Entry>::seek(&shape, &source, range.start / SECTOR_BYTES)?;
        let mut runs: Vec<Entry> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let entry = cursor.next(&source)?.filter(|entry| entry.offset() <= at).ok_or_else(missing)?;
            let end = (entry.offset() + entry.length()).min(range.end);
            let from = (at - range.start) as usize;
            let place = &mut buffer[from..(end - range.start) as usize];
            if entry.known_bad && refuse_damaged {
                return Err(ReplicaError::DamagedImage {
                    path: self.image.path.clone(),
                    volume: self.volume,
                    offset: ByteOffset(entry.offset()),
                });
            }
            if entry.is_zeroes() {
                place.fill(0);
            } else if end - at < entry.length() {
                self.read_within_run(&layer, &entry, at, place)?;
            } else {
                // Whole runs that follow one another in the file are read in one call.
                runs.clear();
                runs.push(entry);
                let mut end = end;
                while let Some(next) = cursor.peek(&source)?
                    && next.offset() == end
                    && !next.is_zeroes()
                    && !next.known_bad
                    && next.position == entry.position + (end - at)
                    && end + next.length() <= range.end
                {
                    cursor.next(&source)?;
                    runs.push(next);
                    end += next.length();
                }
                self.read_runs(&layer, &runs, &mut buffer[from..(end - range.start) as usize])?;
                at = end;
                continue;
            }
            at = end;
        }
        Ok(())
    }

    fn read_runs(&self, layer: &Layer, runs: &[Entry], buffer: &mut [u8]) -> Result<(), ReplicaError> {
        let file = self.core.handle(layer)?;
        file.read_exact_at(buffer, runs[0].position).context("read undo layer", &layer.path)?;
        let mut rest = &*buffer;
        for run in runs {
            let (data, after) = rest.split_at(run.length() as usize);
            check_run(run, data, &layer.path)?;
            rest = after;
        }
        Ok(())
    }

    /// Reads a part of a run from byte `start` of the volume on. All of the run is read, for its checksum.
    fn read_within_run(
        &self,
        layer: &Layer,
        entry: &Entry,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), ReplicaError> {
        let mut run = vec![0; entry.length() as usize];
        let file = self.core.handle(layer)?;
        file.read_exact_at(&mut run, entry.position).context("read undo layer", &layer.path)?;
        check_run(entry, &run, &layer.path)?;
        let skip = (start - entry.offset()) as usize;
        buffer.copy_from_slice(&run[skip..skip + buffer.len()]);
        Ok(())
    }
}

pub(crate) fn no_such_point(core: &Core, shared: &Shared, epoch: Epoch) -> ReplicaError {
    let usable =
        shared.points().map(|layer| layer.epoch()).filter(|point| shared.damage_after(*point).is_none());
    let nearest = usable.min_by_key(|point| (point.0.abs_diff(epoch.0), *point));
    ReplicaError::NoSuchPoint { group: core.group, epoch, nearest }
}

impl Drop for View {
    fn drop(&mut self) {
        let mut shared = self.core.shared.write();
        if let Some(count) = shared.views.get_mut(&self.epoch) {
            *count -= 1;
            if *count == 0 {
                shared.views.remove(&self.epoch);
            }
        }
    }
}
