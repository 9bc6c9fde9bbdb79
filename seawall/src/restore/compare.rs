//! What is there already, compared with the hashes of a view.

use std::ops::Range;

use anyhow::ensure;
use block::{Bitmap, ByteCount, ByteOffset, Granule};
use control::{VIEW_HASH_BYTES, VIEW_HASH_UNIT, VIEW_RANGES_MAX, ViewRange};
use seawall_target_server::unit_hash;

use super::target::Output;

const UNIT: u64 = VIEW_HASH_UNIT.0;

/// Takes hashes in the order in which they come. Units without a hash are zeroes.
pub(super) struct Comparison<'a> {
    output: &'a Output,
    size: u64,
    differing: Bitmap,
    next: u64,
    content: Vec<u8>,
}

impl Comparison<'_> {
    pub(super) fn new(output: &Output, size: ByteCount) -> Comparison<'_> {
        let differing = Bitmap::empty(size.0.div_ceil(UNIT));
        Comparison { output, size: size.0, differing, next: 0, content: vec![0; UNIT as usize] }
    }

    /// Compares what the hashes at `offset` of all hashes are over; how far of the volume it has come.
    pub(super) fn take(&mut self, offset: u64, hashes: &[u8]) -> anyhow::Result<u64> {
        let first = offset / VIEW_HASH_BYTES as u64;
        let units = hashes.len() / VIEW_HASH_BYTES;
        ensure!(
            offset.is_multiple_of(VIEW_HASH_BYTES as u64)
                && hashes.len().is_multiple_of(VIEW_HASH_BYTES)
                && first >= self.next
                && first + units as u64 <= self.differing.granules(),
            "compare with the view: its hashes came out of place"
        );
        self.skip(first)?;
        for hash in hashes.chunks_exact(VIEW_HASH_BYTES) {
            self.unit(hash)?;
        }
        Ok((self.next * UNIT).min(self.size))
    }

    pub(super) fn finish(mut self) -> anyhow::Result<Bitmap> {
        self.skip(self.differing.granules())?;
        Ok(self.differing)
    }

    /// Units up to here are zeroes in the view.
    fn skip(&mut self, until: u64) -> anyhow::Result<()> {
        while self.next < until {
            // Holes need not be read.
            match self.output.next_data(self.next * UNIT)? {
                Some(data) if data / UNIT < until => {
                    self.next = (data / UNIT).max(self.next);
                    self.unit(&[0; VIEW_HASH_BYTES])?;
                }
                _ => self.next = until,
            }
        }
        Ok(())
    }

    fn unit(&mut self, hash: &[u8]) -> anyhow::Result<()> {
        let (start, end) = (self.next * UNIT, ((self.next + 1) * UNIT).min(self.size));
        let content = &mut self.content[..(end - start) as usize];
        self.output.read(start, content)?;
        if unit_hash(content) != *hash {
            self.differing.insert(Granule(self.next));
        }
        self.next += 1;
        Ok(())
    }
}

/// The differing units as ranges, as many together as one request takes.
pub(super) fn batches(differing: &Bitmap, size: ByteCount) -> Vec<Vec<ViewRange>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for unit in differing.iter() {
        let (start, end) = (unit.0 * UNIT, ((unit.0 + 1) * UNIT).min(size.0));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    let range = |range: &Range<u64>| ViewRange {
        offset: ByteOffset(range.start),
        length: ByteCount(range.end - range.start),
    };
    ranges.chunks(VIEW_RANGES_MAX).map(|chunk| chunk.iter().map(range).collect()).collect()
}

/// What lies between the pieces that come of some ranges.
pub(super) struct Gaps {
    left: std::collections::VecDeque<Range<u64>>,
}

impl Gaps {
    pub(super) fn new(ranges: &[ViewRange]) -> Gaps {
        let range = |range: &ViewRange| range.offset.0..range.offset.0 + range.length.0;
        Gaps { left: ranges.iter().map(range).collect() }
    }

    /// The gaps before a piece, which itself is none.
    pub(super) fn before(&mut self, offset: u64, length: u64) -> anyhow::Result<Vec<Range<u64>>> {
        let mut gaps = Vec::new();
        while let Some(first) = self.left.front_mut() {
            if first.end <= offset {
                gaps.extend(self.left.pop_front());
                continue;
            }
            ensure!(
                first.start <= offset && offset + length <= first.end,
                "write {length} bytes at {offset}: they were not asked for, or came out of order"
            );
            if first.start < offset {
                gaps.push(first.start..offset);
            }
            first.start = offset + length;
            if first.is_empty() {
                self.left.pop_front();
            }
            return Ok(gaps);
        }
        anyhow::bail!("write {length} bytes at {offset}: they were not asked for");
    }

    pub(super) fn rest(self) -> Vec<Range<u64>> {
        self.left.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> ViewRange {
        ViewRange { offset: ByteOffset(offset), length: ByteCount(length) }
    }

    #[test]
    fn differing_units_become_few_ranges() {
        let mut differing = Bitmap::empty(2000);
        assert!(batches(&differing, ByteCount(2000 * UNIT)).is_empty());
        for unit in [0, 1, 2, 7, 1999] {
            differing.insert(Granule(unit));
        }
        let expected = vec![range(0, 3 * UNIT), range(7 * UNIT, UNIT), range(1999 * UNIT, 512)];
        assert_eq!(batches(&differing, ByteCount(1999 * UNIT + 512)), [expected]);
        for unit in (0..2000).step_by(2) {
            differing.insert(Granule(unit));
        }
        let batches = batches(&differing, ByteCount(2000 * UNIT));
        assert!(batches.len() == 2 && batches[0].len() == VIEW_RANGES_MAX);
    }

    #[test]
    fn gaps_are_what_no_piece_covers() {
        let mut gaps = Gaps::new(&[range(0, 100), range(200, 100), range(400, 100)]);
        assert_eq!(gaps.before(10, 20).unwrap(), vec![0..10; 1]);
        assert_eq!(gaps.before(30, 20).unwrap(), vec![0..0; 0]);
        assert_eq!(gaps.before(290, 10).unwrap(), vec![50..100, 200..290]);
        assert_eq!(gaps.rest(), vec![400..500; 1]);
        assert!(Gaps::new(&[range(0, 100)]).before(90, 20).is_err());
        assert!(Gaps::new(&[range(10, 100)]).before(0, 5).is_err());
        assert!(Gaps::new(&[]).before(0, 5).is_err());
    }
}
