//! Which layer holds the old content of which sectors.

use block::{Epoch, SECTOR_BYTES};

use crate::ReplicaError;
use crate::layer::Entry;
use crate::sweep::Piece;

/// Sectors of a volume whose content at an older point is what an epoch overwrote. 32 bytes.
///
/// It names an epoch and no file: whichever layer leads back over that epoch has the content. So it stays true when
/// thinning merges layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) start_sector: u64,
    pub(crate) sectors: u64,
    pub(crate) epoch: Epoch,
    /// All of it is zeroes.
    pub(crate) zeroes: bool,
}

impl Segment {
    pub(crate) fn of(entry: &Entry, epoch: Epoch) -> Segment {
        Segment {
            start_sector: entry.start_sector,
            sectors: entry.sectors.into(),
            epoch,
            zeroes: entry.is_zeroes(),
        }
    }

    /// In bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.start_sector * SECTOR_BYTES
    }

    /// In bytes.
    pub(crate) fn end_offset(&self) -> u64 {
        self.end() * SECTOR_BYTES
    }

    fn extends(&self, before: &Segment) -> bool {
        before.end() == self.start_sector && before.epoch == self.epoch && before.zeroes == self.zeroes
    }
}

impl Piece for Segment {
    fn start(&self) -> u64 {
        self.start_sector
    }

    fn end(&self) -> u64 {
        self.start_sector + self.sectors
    }

    fn cut(&self, start: u64, end: u64) -> Segment {
        Segment { start_sector: start, sectors: end - start, ..*self }
    }
}

/// Joins segments that follow one another and say the same, and cuts those longer than `sectors_max`.
pub(crate) fn joined(
    segments: impl Iterator<Item = Result<Segment, ReplicaError>>,
    sectors_max: u64,
) -> impl Iterator<Item = Result<Segment, ReplicaError>> {
    let mut segments = segments.fuse();
    let mut held: Option<Segment> = None;
    std::iter::from_fn(move || {
        loop {
            if let Some(long) = held.filter(|held| held.sectors > sectors_max) {
                let cut = long.start_sector + sectors_max;
                held = Some(long.cut(cut, long.end()));
                return Some(Ok(long.cut(long.start_sector, cut)));
            }
            match segments.next() {
                Some(Ok(next)) => match &mut held {
                    Some(held) if next.extends(held) => held.sectors += next.sectors,
                    _ => {
                        if let Some(done) = held.replace(next) {
                            return Some(Ok(done));
                        }
                    }
                },
                Some(Err(error)) => return Some(Err(error)),
                None => return held.take().map(Ok),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_the_long_are_cut() {
        let segment = |start_sector, sectors, epoch, zeroes| Segment {
            start_sector,
            sectors,
            epoch: Epoch(epoch),
            zeroes,
        };
        let given = [
            segment(0, 3, 1, false),
            segment(3, 4, 1, false),
            segment(7, 1, 2, false),
            segment(8, 1, 2, true),
            segment(10, 25, 2, true),
        ];
        let found: Vec<Segment> = joined(given.into_iter().map(Ok), 10).map(Result::unwrap).collect();
        let expected = [
            segment(0, 7, 1, false),
            segment(7, 1, 2, false),
            segment(8, 1, 2, true),
            segment(10, 10, 2, true),
            segment(20, 10, 2, true),
            segment(30, 5, 2, true),
        ];
        assert_eq!(found, expected);
    }
}
