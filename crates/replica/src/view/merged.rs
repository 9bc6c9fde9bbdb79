//! Many layers as one sorted list, so that a view's cost does not grow with the number of points after it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use block::{SECTOR_BYTES, VolumeId};

use crate::layer::{Entry, Index, Layer};

/// A part of an entry that no older layer covers. 40 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    start_sector: u64,
    sectors: u32,
    /// Which of the merged layers holds it.
    layer: u32,
    /// Whole, since its checksum is.
    pub(super) entry: Entry,
}

impl Segment {
    /// In bytes.
    pub(super) fn start(&self) -> u64 {
        self.start_sector * SECTOR_BYTES
    }

    /// In bytes.
    pub(super) fn end(&self) -> u64 {
        self.end_sector() * SECTOR_BYTES
    }

    fn end_sector(&self) -> u64 {
        self.start_sector + u64::from(self.sectors)
    }

    fn cut(&self, start_sector: u64, end_sector: u64) -> Segment {
        // No longer than it was.
        Segment { start_sector, sectors: (end_sector - start_sector) as u32, ..*self }
    }
}

/// What some successive layers hold of one volume: sorted and disjoint, where several hold a byte, the oldest's.
#[derive(Debug, Default)]
pub(super) struct Merged {
    segments: Vec<Segment>,
    layers: Vec<Arc<Layer>>,
}

impl Merged {
    /// One layer.
    pub(super) fn of(volume: VolumeId, layer: Arc<Layer>, index: &Index) -> Merged {
        let segment = |entry: &Entry| Segment {
            start_sector: entry.start_sector,
            sectors: entry.sectors,
            layer: 0,
            entry: *entry,
        };
        Merged { segments: index.of(volume).iter().map(segment).collect(), layers: vec![layer] }
    }

    /// Several, the oldest first.
    pub(super) fn merge<'a>(parts: impl Iterator<Item = &'a Merged>) -> Merged {
        let mut all: Vec<Segment> = Vec::new();
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for part in parts {
            let first = layers.len() as u32;
            all.extend(
                part.segments.iter().map(|segment| Segment { layer: segment.layer + first, ..*segment }),
            );
            layers.extend(part.layers.iter().cloned());
        }
        // Layers are numbered from the oldest on, so the least number wins.
        all.sort_unstable_by_key(|segment| (segment.start_sector, segment.layer));
        Merged { segments: oldest_of(&all), layers }
    }

    /// The segments that end after byte `at`.
    pub(super) fn from(&self, at: u64) -> &[Segment] {
        &self.segments[self.segments.partition_point(|segment| segment.end() <= at)..]
    }

    pub(super) fn layer(&self, segment: &Segment) -> &Arc<Layer> {
        &self.layers[segment.layer as usize]
    }

    /// How many of the segments from the first on are whole runs before byte `end` that follow one another in the
    /// volume and in the same file. At least 1.
    pub(super) fn whole_runs(segments: &[Segment], end: u64) -> usize {
        let follows = |pair: &[Segment]| {
            let (before, next) = (&pair[0], &pair[1]);
            next.layer == before.layer
                && !next.entry.is_zeroes()
                && next.is_whole()
                && next.start() == before.end()
                && next.entry.position == before.entry.position + before.entry.length()
                && next.end() <= end
        };
        1 + segments.windows(2).take_while(|pair| follows(pair)).count()
    }
}

impl Segment {
    pub(super) fn is_whole(&self) -> bool {
        self.sectors == self.entry.sectors
    }
}

/// Takes segments sorted by (start, layer) and leaves of each what no older layer covers.
fn oldest_of(all: &[Segment]) -> Vec<Segment> {
    let mut merged = Vec::with_capacity(all.len());
    // The segments that begin at or before `at`, by layer.
    let mut open: BinaryHeap<Reverse<(u32, usize)>> = BinaryHeap::new();
    let mut at = 0;
    let mut next = 0;
    loop {
        let Some(Reverse((layer, index))) = open.peek().copied() else {
            let Some(segment) = all.get(next) else { return merged };
            at = segment.start_sector;
            open.push(Reverse((segment.layer, next)));
            next += 1;
            continue;
        };
        let segment = &all[index];
        if segment.end_sector() <= at {
            open.pop();
            continue;
        }
        // It holds until its end, or until an older one begins.
        let mut end = segment.end_sector();
        while let Some(other) = all.get(next).filter(|other| other.start_sector < end) {
            if other.layer < layer {
                end = other.start_sector.max(at);
                break;
            }
            open.push(Reverse((other.layer, next)));
            next += 1;
        }
        if at < end {
            merged.push(segment.cut(at, end));
            at = end;
        }
        if let Some(other) = all.get(next).filter(|other| other.start_sector <= at) {
            open.push(Reverse((other.layer, next)));
            next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(layer: u32, start_sector: u64, sectors: u32) -> Segment {
        // The position tells which layer and where, whatever is cut off.
        let position = 1 + u64::from(layer) * 1000;
        Segment { start_sector, sectors, layer, entry: Entry { start_sector, position, sectors, crc: 0 } }
    }

    proptest! {
        /// Against an array of one cell for each sector.
        #[test]
        fn the_oldest_layer_wins(
            layers in prop::collection::vec(prop::collection::vec((0_u64..12, 1_u32..9), 0..6), 0..7),
        ) {
            let mut cells = [None; 200];
            let mut all = Vec::new();
            for (layer, gaps) in layers.iter().enumerate() {
                let mut at = 0;
                for (gap, sectors) in gaps {
                    at += gap;
                    all.push(segment(layer as u32, at, *sectors));
                    for cell in &mut cells[at as usize..at as usize + *sectors as usize] {
                        cell.get_or_insert((layer as u32, at));
                    }
                    at += u64::from(*sectors);
                }
            }
            all.sort_unstable_by_key(|segment| (segment.start_sector, segment.layer));
            let mut found = [None; 200];
            let mut end = 0;
            for segment in oldest_of(&all) {
                prop_assert!(segment.sectors > 0 && segment.start_sector >= end);
                end = segment.end_sector();
                prop_assert!(segment.start_sector >= segment.entry.start_sector);
                prop_assert!(end <= segment.entry.start_sector + u64::from(segment.entry.sectors));
                found[segment.start_sector as usize..end as usize].fill(Some((segment.layer, segment.entry.start_sector)));
            }
            prop_assert_eq!(found, cells);
        }
    }
}
