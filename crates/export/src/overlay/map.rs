//! Which blocks an overlay has an opinion on.

use std::collections::BTreeMap;
use std::ops::Range;

/// Blocks that one entry of the map speaks for: 4 MiB.
const CHUNK_BLOCKS: u64 = 1024;
const BLOCKS_PER_WORD: u64 = 32;

/// Where a block's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the disk below.
    Base,
    /// In the overlay's file.
    Held,
    /// Nowhere: zeroes.
    Zero,
}

impl Place {
    fn bits(self) -> u64 {
        match self {
            Place::Base => 0,
            Place::Held => 1,
            Place::Zero => 2,
        }
    }

    fn from_bits(bits: u64) -> Place {
        match bits & 3 {
            0 => Place::Base,
            1 => Place::Held,
            _ => Place::Zero,
        }
    }
}

#[derive(Debug)]
enum Chunk {
    All(Place),
    /// Two bits a block.
    Mixed(Box<[u64; (CHUNK_BLOCKS / BLOCKS_PER_WORD) as usize]>),
}

impl Chunk {
    fn place(&self, within: u64) -> Place {
        match self {
            Chunk::All(place) => *place,
            Chunk::Mixed(words) => {
                let word = words[(within / BLOCKS_PER_WORD) as usize];
                Place::from_bits(word >> (within % BLOCKS_PER_WORD * 2))
            }
        }
    }
}

/// Where each block is. Memory: at most 64 bytes for each MiB that was written, zeroed or trimmed, and the tree's own.
#[derive(Debug, Default)]
pub(super) struct Map {
    /// By number; a chunk that is not here is all base.
    chunks: BTreeMap<u64, Chunk>,
    held: u64,
}

impl Map {
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// How many blocks are held.
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// Where block `at` is, and up to which block (at most `end`) the answer holds.
    pub(super) fn run(&self, at: u64, end: u64) -> (Place, u64) {
        let chunk = at / CHUNK_BLOCKS;
        let Some(found) = self.chunks.get(&chunk) else {
            let next = self.chunks.range(chunk..).next().map_or(end, |(next, _)| next * CHUNK_BLOCKS);
            return (Place::Base, next.min(end));
        };
        let place = found.place(at % CHUNK_BLOCKS);
        let chunk_end = ((chunk + 1) * CHUNK_BLOCKS).min(end);
        let mut next = at + 1;
        match found {
            Chunk::All(_) => next = chunk_end,
            Chunk::Mixed(_) => {
                while next < chunk_end && found.place(next % CHUNK_BLOCKS) == place {
                    next += 1;
                }
            }
        }
        (place, next)
    }

    /// The runs of a range, in order.
    pub(super) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Place, Range<u64>)> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < range.end).then(|| {
                let (place, end) = self.run(at, range.end);
                let run = at..end;
                at = end;
                (place, run)
            })
        })
    }

    /// How many blocks of the range are held.
    pub(super) fn held_of(&self, range: Range<u64>) -> u64 {
        let held = self.runs(range).filter(|(place, _)| *place == Place::Held);
        held.map(|(_, run)| run.end - run.start).sum()
    }

    pub(super) fn set(&mut self, range: Range<u64>, place: Place) {
        let before = self.held_of(range.clone());
        let after = if place == Place::Held { range.end - range.start } else { 0 };
        self.held = self.held + after - before;
        let mut at = range.start;
        while at < range.end {
            let number = at / CHUNK_BLOCKS;
            let end = ((number + 1) * CHUNK_BLOCKS).min(range.end);
            if end - at == CHUNK_BLOCKS {
                self.chunks.insert(number, Chunk::All(place));
            } else {
                let chunk = self.chunks.entry(number).or_insert(Chunk::All(Place::Base));
                if let Chunk::All(all) = chunk {
                    // The bits of one block in all places of a word.
                    let word = all.bits() * (u64::MAX / 3);
                    *chunk = Chunk::Mixed(Box::new([word; (CHUNK_BLOCKS / BLOCKS_PER_WORD) as usize]));
                }
                if let Chunk::Mixed(words) = chunk {
                    for block in at..end {
                        let within = block % CHUNK_BLOCKS;
                        let shift = within % BLOCKS_PER_WORD * 2;
                        let word = &mut words[(within / BLOCKS_PER_WORD) as usize];
                        *word = *word & !(3 << shift) | place.bits() << shift;
                    }
                }
            }
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 3 * CHUNK_BLOCKS + 17;

    proptest! {
        /// Against one cell for each block.
        #[test]
        fn the_map_is_what_was_set(
            sets in prop::collection::vec((0..BLOCKS, 1..2 * CHUNK_BLOCKS, 1_u64..3), 0..20),
        ) {
            let mut cells = vec![Place::Base; BLOCKS as usize];
            let mut map = Map::default();
            for (start, length, place) in sets {
                let (end, place) = ((start + length).min(BLOCKS), Place::from_bits(place));
                map.set(start..end, place);
                cells[start as usize..end as usize].fill(place);
            }
            let mut found = Vec::new();
            for (place, run) in map.runs(0..BLOCKS) {
                prop_assert!(run.start < run.end && run.start == found.len() as u64);
                found.resize(run.end as usize, place);
            }
            prop_assert_eq!(map.held(), cells.iter().filter(|place| **place == Place::Held).count() as u64);
            prop_assert!(found == cells);
        }
    }
}
