//! Several sorted lists of pieces of a volume as one, in constant memory: where several hold a sector, the first list's
//! piece wins.

use crate::ReplicaError;

/// A range of sectors of a volume, with something that belongs to it.
pub(crate) trait Piece: Copy {
    /// In sectors.
    fn start(&self) -> u64;
    /// In sectors.
    fn end(&self) -> u64;
    /// The part of it between two sectors within it.
    fn cut(&self, start: u64, end: u64) -> Self;
}

/// Walks over lists that are each sorted and disjoint, the most important (for old content: the oldest) first.
pub(crate) struct Sweep<P, I> {
    lists: Vec<I>,
    /// The piece at hand of each list, without what was passed.
    heads: Vec<Option<P>>,
    started: bool,
}

impl<P: Piece, I: Iterator<Item = Result<P, ReplicaError>>> Sweep<P, I> {
    pub(crate) fn new(lists: Vec<I>) -> Sweep<P, I> {
        Sweep { heads: lists.iter().map(|_| None).collect(), lists, started: false }
    }

    fn step(&mut self) -> Result<Option<P>, ReplicaError> {
        if !self.started {
            for (head, list) in self.heads.iter_mut().zip(&mut self.lists) {
                *head = list.next().transpose()?;
            }
            self.started = true;
        }
        let heads = || self.heads.iter().enumerate().filter_map(|(list, head)| Some((list, head.as_ref()?)));
        // The first of those that begin soonest; it holds until its end, or until one of a list before it begins.
        let Some((winner, piece)) = heads().min_by_key(|(list, head)| (head.start(), *list)) else {
            return Ok(None);
        };
        let before = heads().take_while(|(list, _)| *list < winner).map(|(_, head)| head.start());
        let end = before.min().map_or(piece.end(), |start| start.min(piece.end()));
        let found = piece.cut(piece.start(), end);
        for (head, list) in self.heads.iter_mut().zip(&mut self.lists) {
            while let Some(piece) = head {
                if piece.start() >= end {
                    break;
                }
                if piece.end() > end {
                    *piece = piece.cut(end, piece.end());
                    break;
                }
                *head = list.next().transpose()?;
            }
        }
        Ok(Some(found))
    }
}

impl<P: Piece, I: Iterator<Item = Result<P, ReplicaError>>> Iterator for Sweep<P, I> {
    type Item = Result<P, ReplicaError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    struct Tagged {
        list: usize,
        origin: u64,
        start: u64,
        end: u64,
    }

    impl Piece for Tagged {
        fn start(&self) -> u64 {
            self.start
        }
        fn end(&self) -> u64 {
            self.end
        }
        fn cut(&self, start: u64, end: u64) -> Tagged {
            assert!(self.start <= start && start < end && end <= self.end);
            Tagged { start, end, ..*self }
        }
    }

    proptest! {
        /// Against an array of one cell for each sector.
        #[test]
        fn the_first_list_wins(
            lists in prop::collection::vec(prop::collection::vec((0_u64..12, 1_u64..9), 0..6), 0..7),
        ) {
            let mut cells = [None; 200];
            let mut pieces = Vec::new();
            for (list, gaps) in lists.iter().enumerate() {
                let mut at = 0;
                let mut all = Vec::new();
                for (gap, length) in gaps {
                    at += gap;
                    all.push(Ok(Tagged { list, origin: at, start: at, end: at + length }));
                    for cell in &mut cells[at as usize..(at + length) as usize] {
                        cell.get_or_insert((list, at));
                    }
                    at += length;
                }
                pieces.push(all.into_iter());
            }
            let mut found = [None; 200];
            let mut end = 0;
            for piece in Sweep::new(pieces) {
                let piece = piece.unwrap();
                prop_assert!(piece.start >= end);
                end = piece.end;
                found[piece.start as usize..end as usize].fill(Some((piece.list, piece.origin)));
            }
            prop_assert_eq!(found, cells);
        }
    }
}
