//! Which recovery points are kept.

use std::time::Duration;

use block::{ByteCount, Epoch, UnixNanos};

use crate::{POINTS_MAX, Policy};

/// Which recovery points are kept. The newest always is, and so are pinned ones.
///
/// What goes at the old end is forgotten: the next point becomes the *floor*, the state file says so, and layers before it are
/// leftovers that are removed when no view needs them. Apply does that for number and age. What goes in the middle is merged with
/// the layer after it, by [`crate::GroupReplica::maintain`], which does all else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// At most this many points besides pinned ones, the newest; at least 1 is kept, and never more than [`POINTS_MAX`].
    pub points_max: usize,
    /// Points older than this go. Age is measured from the newest point's cut, or from this machine's clock where
    /// that is earlier: neither a source that stays silent nor one whose clock jumps ahead drops what can be kept.
    pub age_max: Option<Duration>,
    /// Which are kept for how long; `None`: all.
    pub policy: Option<Policy>,
    /// The most that undo layers may take. Past it the oldest point that is not pinned goes, and so on; so what goes first does not
    /// depend on the policy. What pinned points and the newest need stays, even when it is more.
    pub space_max: Option<ByteCount>,
}

/// How much of the space limit is used when there is a warning, in percent.
pub const SPACE_WARNING_PERCENT: u64 = 90;

impl Default for Retention {
    /// 1000 points, of any age and size.
    fn default() -> Retention {
        Retention { points_max: 1000, age_max: None, policy: None, space_max: None }
    }
}

/// From when age is measured.
pub(crate) fn reference(newest: UnixNanos, now: UnixNanos) -> UnixNanos {
    newest.min(now)
}

impl Retention {
    /// The oldest of the points (in order, with their cut times) to keep by number and age; `None` when there is no point.
    /// There are at most so many.
    pub(crate) fn floor(
        &self,
        points: impl DoubleEndedIterator<Item = (Epoch, UnixNanos)> + Clone,
        at_most: usize,
        now: UnixNanos,
    ) -> Option<Epoch> {
        let (newest, newest_cut) = points.clone().next_back()?;
        let reference = reference(newest_cut, now);
        let limit = self.points_max.clamp(1, POINTS_MAX);
        // Counting looks at every layer, which each epoch should not.
        let excess = if at_most > limit { points.clone().count().saturating_sub(limit) } else { 0 };
        let young = |cut| self.age_max.is_none_or(|age_max| reference.since(cut) <= age_max);
        let kept = points.skip(excess).find(|(_, cut)| young(*cut));
        Some(kept.map_or(newest, |(epoch, _)| epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn points(cuts: &[u64]) -> Vec<(Epoch, UnixNanos)> {
        cuts.iter()
            .enumerate()
            .map(|(index, cut)| (Epoch(index as u64 + 1), UnixNanos(cut * SECOND)))
            .collect()
    }

    fn floor(points_max: usize, age_max: Option<u64>, cuts: &[u64], now: u64) -> Option<u64> {
        let retention =
            Retention { points_max, age_max: age_max.map(Duration::from_secs), ..Retention::default() };
        let points = points(cuts);
        retention.floor(points.iter().copied(), points.len(), UnixNanos(now * SECOND)).map(|epoch| epoch.0)
    }

    #[test]
    fn the_oldest_go_first_and_the_newest_never() {
        assert_eq!(floor(3, None, &[], 100), None);
        assert_eq!(floor(3, None, &[10, 20, 30], 100), Some(1));
        assert_eq!(floor(3, None, &[10, 20, 30, 40], 100), Some(2));
        assert_eq!(floor(0, None, &[10, 20], 100), Some(2));
        assert_eq!(floor(9, Some(10), &[10, 20, 30], 100), Some(2));
        assert_eq!(floor(9, Some(0), &[10, 20, 30], 100), Some(3));
    }

    #[test]
    fn neither_silence_nor_a_clock_ahead_drops_points() {
        assert_eq!(floor(9, Some(15), &[10, 20], 1_000_000), Some(1));
        assert_eq!(floor(9, Some(15), &[10, 20, 1_000_000], 22), Some(1));
        assert_eq!(floor(9, Some(15), &[10, 20, 5], 22), Some(1));
    }
}
