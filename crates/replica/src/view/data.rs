//! Where a view has data.

use std::ops::Range;

use block::SECTOR_BYTES;

use super::{Layers, View};
use crate::ReplicaError;
use crate::image::DataCursor;
use crate::segment::Segment;

impl View {
    fn image_data(&self, at: u64, rollbacks: u64) -> Result<Option<(u64, u64)>, ReplicaError> {
        let mut holes = self.holes.lock();
        if holes.0 != rollbacks {
            // What was looked up may be what the epoch that was taken back had made of the image.
            *holes = (rollbacks, DataCursor::default());
        }
        holes.1.data(&self.image, at)
    }

    /// The first stretch from `at` on that comes from data.
    pub(super) fn find_data(&self, layers: &Layers, mut at: u64) -> Result<Option<Range<u64>>, ReplicaError> {
        while at < self.size {
            // Where the next data of any kind lies.
            let image = self.image_data(at, layers.rollbacks)?.map(|(start, end)| start.max(at)..end);
            let mut next = image.as_ref().map_or(self.size, |range| range.start);
            for part in layers.parts.iter() {
                let mut cursor = part.seek(&self.core, at / SECTOR_BYTES)?;
                while let Some(segment) = cursor.next(&self.core)?.filter(|segment| segment.offset() < next) {
                    if !segment.zeroes {
                        next = segment.offset().max(at);
                        break;
                    }
                }
            }
            if next >= self.size {
                return Ok(None);
            }
            at = next;
            // What a view reads there: the oldest part that holds it, up to where an older one begins.
            let mut end = self.size;
            let mut covering: Option<Segment> = None;
            for part in layers.parts.iter() {
                match part.seek(&self.core, at / SECTOR_BYTES)?.next(&self.core)? {
                    Some(segment) if segment.offset() <= at => {
                        end = end.min(segment.end_offset());
                        covering = Some(segment);
                        break;
                    }
                    Some(segment) => end = end.min(segment.offset()),
                    None => {}
                }
            }
            match (covering, image) {
                (Some(segment), _) if segment.zeroes => at = end,
                (Some(_), _) => return Ok(Some(at..end)),
                (None, Some(image)) if image.start <= at => return Ok(Some(at..end.min(image.end))),
                // Data of a newer part under older zeroes, or of the image further on.
                (None, _) => at = end,
            }
        }
        Ok(None)
    }
}
