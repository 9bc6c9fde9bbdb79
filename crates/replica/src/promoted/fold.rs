//! What was written since the last cut, by block: the last write wins.

use std::collections::BTreeMap;
use std::ops::Range;

use block::BLOCK_BYTES;

use crate::delta::{Change, Content, Delta};

pub(crate) type Block = [u8; BLOCK_BYTES as usize];

/// What a block or a run of zeroes takes beside its data, about.
const ENTRY_BYTES: u64 = 96;

/// What a fold says of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found<'a> {
    Data(&'a Block),
    Zero,
}

/// Invariant: no block is both data and within a run of zeroes; runs are disjoint and none is empty.
#[derive(Clone, Debug, Default)]
struct VolumeFold {
    data: BTreeMap<u64, Box<Block>>,
    /// First block, and the one behind the last.
    zeroes: BTreeMap<u64, u64>,
}

/// Writes to volumes, by their index. Memory: [`Fold::bytes`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Fold {
    volumes: BTreeMap<usize, VolumeFold>,
    blocks: u64,
    runs: u64,
}

/// What of memory a change may take, at most.
pub(crate) fn cost(data_blocks: u64) -> u64 {
    // A write within a run of zeroes makes two of it, at each edge and in between.
    data_blocks * (BLOCK_BYTES + ENTRY_BYTES) + 2 * ENTRY_BYTES
}

impl VolumeFold {
    /// Takes a range out of the runs of zeroes.
    fn unzero(&mut self, range: &Range<u64>) {
        let last = self.zeroes.range(..range.end).next_back().map(|(start, end)| (*start, *end));
        let first = self.zeroes.range(..range.start).next_back().map(|(start, end)| (*start, *end));
        if let Some((start, end)) = last
            && end > range.end
        {
            self.zeroes.remove(&start);
            self.zeroes.insert(range.end, end);
            if start < range.start {
                self.zeroes.insert(start, range.start);
            }
        }
        if let Some((start, end)) = first
            && end > range.start
        {
            self.zeroes.insert(start, range.start);
        }
        let within: Vec<u64> = self.zeroes.range(range.clone()).map(|(start, _)| *start).collect();
        for start in within {
            self.zeroes.remove(&start);
        }
    }

    /// The run of zeroes that a block is in.
    fn zeroes_at(&self, block: u64) -> Option<u64> {
        let (_, end) = self.zeroes.range(..=block).next_back()?;
        (*end > block).then_some(*end)
    }
}

impl Fold {
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks == 0 && self.runs == 0
    }

    /// Of memory, about.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks * (BLOCK_BYTES + ENTRY_BYTES) + self.runs * ENTRY_BYTES
    }

    fn change(&mut self, volume: usize, change: impl FnOnce(&mut VolumeFold)) {
        let of = self.volumes.entry(volume).or_default();
        let before = (of.data.len() as u64, of.zeroes.len() as u64);
        change(of);
        self.blocks = self.blocks - before.0 + of.data.len() as u64;
        self.runs = self.runs - before.1 + of.zeroes.len() as u64;
    }

    pub(crate) fn set_data(&mut self, volume: usize, block: u64, data: Box<Block>) {
        self.change(volume, |of| {
            of.unzero(&(block..block + 1));
            of.data.insert(block, data);
        });
    }

    pub(crate) fn set_zero(&mut self, volume: usize, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        self.change(volume, |of| {
            of.unzero(&blocks);
            let mut behind = of.data.split_off(&blocks.start);
            of.data.append(&mut behind.split_off(&blocks.end));
            // One run with what it touches, so that a disk that is zeroed bit by bit takes one.
            let mut run = blocks;
            if let Some((start, end)) = of.zeroes.range(..run.start).next_back().map(|(s, e)| (*s, *e))
                && end == run.start
            {
                run.start = start;
            }
            if let Some(end) = of.zeroes.remove(&run.end) {
                run.end = end;
            }
            of.zeroes.insert(run.start, run.end);
        });
    }

    pub(crate) fn find(&self, volume: usize, block: u64) -> Option<Found<'_>> {
        let of = self.volumes.get(&volume)?;
        match of.data.get(&block) {
            Some(data) => Some(Found::Data(data)),
            None => of.zeroes_at(block).map(|_| Found::Zero),
        }
    }

    /// What is said of a block, and up to where nothing is or the same; at most up to `end`.
    pub(crate) fn run(&self, volume: usize, block: u64, end: u64) -> (Option<Found<'_>>, u64) {
        let Some(of) = self.volumes.get(&volume) else { return (None, end) };
        if let Some(data) = of.data.get(&block) {
            return (Some(Found::Data(data)), end.min(block + 1));
        }
        if let Some(zeroes_end) = of.zeroes_at(block) {
            return (Some(Found::Zero), end.min(zeroes_end));
        }
        let data = of.data.range(block..).next().map_or(end, |(at, _)| *at);
        let zeroes = of.zeroes.range(block..).next().map_or(end, |(at, _)| *at);
        (None, end.min(data).min(zeroes))
    }

    /// Whole blocks that were written, of a volume.
    pub(crate) fn contains(&self, volume: usize, block: u64) -> bool {
        self.find(volume, block).is_some()
    }

    /// Puts all of it into a delta. `size`: of a volume; its last block may be short.
    pub(crate) fn fill<'a>(
        &'a self,
        delta: &mut Delta<'a>,
        size: impl Fn(usize) -> u64,
    ) -> Result<(), String> {
        for (volume, of) in &self.volumes {
            let size = size(*volume);
            let mut zeroes = of.zeroes.iter().peekable();
            let mut data = of.data.iter().peekable();
            loop {
                let zero_first = match (zeroes.peek(), data.peek()) {
                    (None, None) => break,
                    (Some((zero, _)), Some((block, _))) => zero < block,
                    (Some(_), None) => true,
                    (None, Some(_)) => false,
                };
                let (start, end, content) = if zero_first {
                    let (start, end) = zeroes.next().expect("peeked");
                    (*start, *end, Content::Zeroes)
                } else {
                    let (block, data) = data.next().expect("peeked");
                    (*block, block + 1, Content::Data(&data[..]))
                };
                let start = start * BLOCK_BYTES;
                let length = (end * BLOCK_BYTES).min(size) - start;
                let content = match content {
                    Content::Data(data) => Content::Data(&data[..length as usize]),
                    Content::Zeroes => Content::Zeroes,
                };
                delta.push(*volume, Change { start, length, content })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Data(u64, u8),
        Zero(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..40_u64, 1..255_u8).prop_map(|(block, byte)| Step::Data(block, byte)),
            (0..40_u64, 0..12_u64).prop_map(|(block, length)| Step::Zero(block, length)),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// Against a plain list of blocks.
        #[test]
        fn the_last_write_of_a_block_wins(steps in steps()) {
            let mut fold = Fold::default();
            let mut blocks: Vec<Option<u8>> = vec![None; 60];
            for step in steps {
                match step {
                    Step::Data(block, byte) => {
                        fold.set_data(1, block, Box::new([byte; 4096]));
                        blocks[block as usize] = Some(byte);
                    }
                    Step::Zero(block, length) => {
                        fold.set_zero(1, block..block + length);
                        blocks[block as usize..(block + length) as usize].fill(Some(0));
                    }
                }
            }
            for (block, expected) in blocks.iter().enumerate() {
                let found = match fold.find(1, block as u64) {
                    Some(Found::Data(data)) => Some(data[0]),
                    Some(Found::Zero) => Some(0),
                    None => None,
                };
                prop_assert_eq!(found, *expected, "block {}", block);
                prop_assert!(fold.find(0, block as u64).is_none());
            }
            let mut at = 0;
            while at < 60 {
                let (found, end) = fold.run(1, at, 60);
                prop_assert!(end > at && end <= 60);
                for block in at..end {
                    prop_assert_eq!(found.is_some(), blocks[block as usize].is_some());
                }
                at = end;
            }
            let data = blocks.iter().filter(|block| block.is_some_and(|byte| byte > 0)).count() as u64;
            prop_assert_eq!(fold.blocks, data);
            prop_assert_eq!(fold.is_empty(), blocks.iter().all(Option::is_none));
            let zeroes: u64 = fold.volumes.get(&1).map_or(0, |of| of.zeroes.iter().map(|(start, end)| end - start).sum());
            prop_assert_eq!(zeroes, blocks.iter().filter(|block| **block == Some(0)).count() as u64);
        }
    }
}
