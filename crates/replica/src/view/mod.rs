//! A volume as it was at a recovery point.
//!
//! A block at point P is in the oldest layer after P that holds it, else in the image. Apply may run meanwhile: it
//! puts its layer in the list before it touches an image, so a reader that looks at the list again after it read the
//! image sees every layer whose epoch can have changed what it read, and takes the old content from there. An epoch
//! that is taken back leaves the list again; the reader then starts anew.

mod merged;

use std::ops::Range;
use std::sync::Arc;

use block::{ByteCount, ByteOffset, Epoch, Extent, VolumeId};
use durable::StorageFile;
use parking_lot::Mutex;

use crate::error::Context;
use crate::image::{DataCursor, Image};
use crate::recover::check_run;
use crate::shared::Core;
use crate::{ReplicaError, VIEW_LAYERS_MAX};
use merged::{Merged, Segment};

/// A volume at a recovery point, for reading. Keeps the layers it needs from being removed while it is open.
///
/// Any number of threads may read. Memory: 40 bytes for each index entry of the layers after the point, less where they
/// overlap; twice that while it is opened.
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
    /// The newest of the layers; the point itself when there is none.
    last: Epoch,
    /// Oldest first. At most [`VIEW_LAYERS_MAX`]; when there would be more they become one.
    parts: Arc<Vec<Arc<Merged>>>,
}

impl View {
    pub(crate) fn open(core: &Arc<Core>, volume: VolumeId, epoch: Epoch) -> Result<View, ReplicaError> {
        let group = core.group;
        let (image, size) = {
            let mut shared = core.shared.write();
            let point = shared.points().find(|layer| layer.epoch() == epoch);
            let point = point.ok_or(ReplicaError::NoSuchPoint { group, epoch })?;
            let info = point.header.meta.volumes.iter().find(|info| info.id == volume);
            let size = info.ok_or(ReplicaError::NoSuchVolume { group, volume, epoch })?.size.0;
            let image = shared.images.get(&volume).cloned();
            let image = image.ok_or(ReplicaError::NoSuchVolume { group, volume, epoch })?;
            *shared.views.entry(epoch).or_default() += 1;
            (image, size)
        };
        let layers = Layers { rollbacks: 0, last: epoch, parts: Arc::default() };
        let (core, layers, holes) = (core.clone(), Mutex::new(layers), Mutex::default());
        let view = View { core, image, volume, epoch, size, layers, holes };
        view.layers()?;
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
        self.steady(|view, layers| view.read_with(layers, buffer, offset.0..end))
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

    /// Runs `attempt` until no epoch was taken back meanwhile, which can make it read what never was.
    fn steady<T>(
        &self,
        mut attempt: impl FnMut(&View, &mut Layers) -> Result<T, ReplicaError>,
    ) -> Result<T, ReplicaError> {
        loop {
            let mut layers = self.layers()?;
            let rollbacks = layers.rollbacks;
            let outcome = attempt(self, &mut layers);
            if self.core.shared.read().rollbacks == rollbacks && layers.rollbacks == rollbacks {
                return outcome;
            }
        }
    }

    /// What the layers after the point hold, brought up to date.
    fn layers(&self) -> Result<Layers, ReplicaError> {
        let mut held = self.layers.lock();
        loop {
            let added = {
                let shared = self.core.shared.read();
                if shared.rollbacks != held.rollbacks {
                    *held = Layers { rollbacks: shared.rollbacks, last: self.epoch, parts: Arc::default() };
                }
                let first = shared.layers.partition_point(|layer| layer.epoch() <= held.last);
                shared.layers.range(first..).cloned().collect::<Vec<_>>()
            };
            let Some(last) = added.last().map(|layer| layer.epoch()) else {
                return Ok(held.clone());
            };
            let read = added.into_iter().map(|layer| {
                let index = self.core.handle(&layer).and_then(|file| layer.index(&*file))?;
                Ok(Arc::new(Merged::of(self.volume, layer, &index)))
            });
            let read: Result<Vec<_>, ReplicaError> = read.collect();
            if self.core.shared.read().rollbacks != held.rollbacks {
                // A layer may have been taken back while its index was read.
                continue;
            }
            let parts = Arc::make_mut(&mut held.parts);
            parts.extend(read?);
            if parts.len() > VIEW_LAYERS_MAX {
                *parts = vec![Arc::new(Merged::merge(parts.iter().map(|part| &**part)))];
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
    ) -> Result<(), ReplicaError> {
        let gaps = self.read_layers(layers, vec![range.clone()], buffer, range.start)?;
        if gaps.is_empty() {
            return Ok(());
        }
        for gap in &gaps {
            let part = (gap.start - range.start) as usize..(gap.end - range.start) as usize;
            self.image.read(&mut buffer[part], gap.start)?;
        }
        let seen = layers.last;
        *layers = self.layers()?;
        if layers.last != seen {
            // The layers seen before hold nothing of the gaps.
            self.read_layers(layers, gaps, buffer, range.start)?;
        }
        Ok(())
    }

    /// Fills what the layers hold of `gaps`, oldest layer first, and gives the gaps that are left. The buffer begins
    /// at byte `base` of the volume.
    fn read_layers(
        &self,
        layers: &Layers,
        mut gaps: Vec<Range<u64>>,
        buffer: &mut [u8],
        base: u64,
    ) -> Result<Vec<Range<u64>>, ReplicaError> {
        for part in layers.parts.iter() {
            if gaps.is_empty() {
                break;
            }
            let mut left = Vec::new();
            for gap in gaps {
                let place = (gap.start - base) as usize..(gap.end - base) as usize;
                self.read_part(part, gap, &mut buffer[place], &mut left)?;
            }
            gaps = left;
        }
        Ok(gaps)
    }

    /// Fills what one part holds of a range; the rest of it goes to `left`.
    fn read_part(
        &self,
        part: &Merged,
        range: Range<u64>,
        buffer: &mut [u8],
        left: &mut Vec<Range<u64>>,
    ) -> Result<(), ReplicaError> {
        let mut segments = part.from(range.start);
        let mut at = range.start;
        while let Some(segment) = segments.first().filter(|segment| segment.start() < range.end) {
            let (start, mut end) = (segment.start().max(range.start), segment.end().min(range.end));
            if at < start {
                left.push(at..start);
            }
            let from = (start - range.start) as usize;
            let mut count = 1;
            if segment.entry.is_zeroes() {
                buffer[from..(end - range.start) as usize].fill(0);
            } else if end - start < segment.entry.length() {
                self.read_within_run(part, segment, start, &mut buffer[from..(end - range.start) as usize])?;
            } else {
                count = Merged::whole_runs(segments, range.end);
                end = segments[count - 1].end();
                self.read_runs(part, &segments[..count], &mut buffer[from..(end - range.start) as usize])?;
            }
            at = end;
            segments = &segments[count..];
        }
        if at < range.end {
            left.push(at..range.end);
        }
        Ok(())
    }

    /// Reads runs that follow one another in one file, in one call.
    fn read_runs(&self, part: &Merged, runs: &[Segment], buffer: &mut [u8]) -> Result<(), ReplicaError> {
        let layer = part.layer(&runs[0]);
        let file: Arc<dyn StorageFile> = self.core.handle(layer)?;
        file.read_exact_at(buffer, runs[0].entry.position).context("read undo layer", &layer.path)?;
        let mut rest = &*buffer;
        for run in runs {
            let (data, after) = rest.split_at(run.entry.length() as usize);
            check_run(&run.entry, data, &layer.path)?;
            rest = after;
        }
        Ok(())
    }

    /// Reads a part of a run from byte `start` of the volume on. All of the run is read, for its checksum.
    fn read_within_run(
        &self,
        part: &Merged,
        segment: &Segment,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), ReplicaError> {
        let (entry, layer) = (&segment.entry, part.layer(segment));
        let mut run = vec![0; entry.length() as usize];
        let file = self.core.handle(layer)?;
        file.read_exact_at(&mut run, entry.position).context("read undo layer", &layer.path)?;
        check_run(entry, &run, &layer.path)?;
        let skip = (start - entry.start()) as usize;
        buffer.copy_from_slice(&run[skip..skip + buffer.len()]);
        Ok(())
    }

    fn image_data(&self, at: u64, rollbacks: u64) -> Result<Option<(u64, u64)>, ReplicaError> {
        let mut holes = self.holes.lock();
        if holes.0 != rollbacks {
            // What was looked up may be what the epoch that was taken back had made of the image.
            *holes = (rollbacks, DataCursor::default());
        }
        holes.1.data(&self.image, at)
    }

    /// The first stretch from `at` on that comes from data.
    fn find_data(&self, layers: &Layers, mut at: u64) -> Result<Option<Range<u64>>, ReplicaError> {
        while at < self.size {
            // Where the next data of any kind lies.
            let image = self.image_data(at, layers.rollbacks)?.map(|(start, end)| start.max(at)..end);
            let mut next = image.as_ref().map_or(self.size, |range| range.start);
            for part in layers.parts.iter() {
                let before = part.from(at).iter().take_while(|segment| segment.start() < next);
                if let Some(data) = before.into_iter().find(|segment| !segment.entry.is_zeroes()) {
                    next = data.start().max(at);
                }
            }
            if next >= self.size {
                return Ok(None);
            }
            at = next;
            // What a view reads there: the oldest part that holds it, up to where an older one begins.
            let mut end = self.size;
            let mut covering: Option<&Segment> = None;
            for part in layers.parts.iter() {
                match part.from(at).first() {
                    Some(segment) if segment.start() <= at => {
                        end = end.min(segment.end());
                        covering = Some(segment);
                        break;
                    }
                    Some(segment) => end = end.min(segment.start()),
                    None => {}
                }
            }
            match (covering, image) {
                (Some(segment), _) if segment.entry.is_zeroes() => at = end,
                (Some(_), _) => return Ok(Some(at..end)),
                (None, Some(image)) if image.start <= at => return Ok(Some(at..end.min(image.end))),
                // Data of a newer part under older zeroes, or of the image further on.
                (None, _) => at = end,
            }
        }
        Ok(None)
    }
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
