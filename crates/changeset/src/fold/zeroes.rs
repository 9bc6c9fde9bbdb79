use std::collections::BTreeMap;
use std::collections::btree_map::Iter;

/// Disjoint ranges of sectors that do not touch, start to end.
#[derive(Default)]
pub(super) struct ZeroSet {
    ranges: BTreeMap<u64, u64>,
}

impl ZeroSet {
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Adds `start..end`, merging what it overlaps or touches.
    pub(super) fn insert(&mut self, mut start: u64, mut end: u64) {
        while let Some((&from, &to)) = self.ranges.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.ranges.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.ranges.insert(start, end);
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.ranges.iter().map(|(start, end)| (*start, *end))
    }

    pub(super) fn walk(&self) -> Walk<'_> {
        let mut ranges = self.ranges.iter();
        let current = next(&mut ranges);
        Walk { ranges, current }
    }
}

/// The ranges in order, without what the caller skips.
pub(super) struct Walk<'a> {
    ranges: Iter<'a, u64, u64>,
    current: Option<(u64, u64)>,
}

impl Walk<'_> {
    /// Calls `emit(start, sectors)` for what lies before `end` and is then done with it.
    pub(super) fn before(&mut self, end: u64, mut emit: impl FnMut(u64, u64)) {
        while let Some((start, to)) = self.current
            && start < end
        {
            emit(start, to.min(end) - start);
            self.skip_to(to.min(end));
        }
    }

    /// Leaves out everything before `sector`.
    pub(super) fn skip_to(&mut self, sector: u64) {
        while let Some((start, to)) = self.current {
            if to > sector {
                self.current = Some((start.max(sector), to));
                break;
            }
            self.current = next(&mut self.ranges);
        }
    }
}

fn next(ranges: &mut Iter<'_, u64, u64>) -> Option<(u64, u64)> {
    ranges.next().map(|(start, end)| (*start, *end))
}
