//! Which recovery points are kept.

use std::time::Duration;

use block::{ByteCount, Epoch, UnixNanos};

use crate::policy::Candidate;
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

/// Gives points whose cut times cannot be right, as after a start without a battery for the clock, the time of the point before
/// them: they would count as old, and go at once. Points are in the order in which they were cut, so the most points whose times
/// do not fall are taken for right: a longest non-decreasing subsequence, by patience sorting (Fredman, "On computing the
/// length of longest increasing subsequences", 1975). A clock that was wrong all the time until it was set is not noticed.
pub(crate) fn settle(points: &mut [Candidate]) {
    if points.is_sorted_by_key(|point| point.cut) {
        return;
    }
    // `ends[n]`: where a subsequence of n + 1 points ends, with the earliest time; `before`: what precedes each in its own.
    let (mut ends, mut before) = (Vec::<usize>::new(), vec![None; points.len()]);
    for index in 0..points.len() {
        let longer = ends.partition_point(|end| points[*end].cut <= points[index].cut);
        before[index] = longer.checked_sub(1).map(|shorter| ends[shorter]);
        match ends.get_mut(longer) {
            Some(end) => *end = index,
            None => ends.push(index),
        }
    }
    let mut right = vec![false; points.len()];
    let mut next = ends.last().copied();
    while let Some(index) = next {
        right[index] = true;
        next = before[index];
    }
    let mut last = UnixNanos(0);
    for (point, right) in points.iter_mut().zip(right) {
        if right {
            last = point.cut;
        } else {
            // Never earlier than they say: in doubt a point stays.
            point.cut = point.cut.max(last);
        }
    }
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

    fn settled(cuts: &[u64]) -> Vec<u64> {
        let candidate = |(epoch, cut)| Candidate { epoch, cut, consistency: block::Consistency::Crash };
        let mut points: Vec<Candidate> = points(cuts).into_iter().map(candidate).collect();
        settle(&mut points);
        points.iter().map(|point| point.cut.0 / SECOND).collect()
    }

    #[test]
    fn a_clock_that_was_behind_makes_no_point_old() {
        assert_eq!(settled(&[]), []);
        assert_eq!(settled(&[10, 20, 20, 30]), [10, 20, 20, 30]);
        assert_eq!(settled(&[100, 110, 115, 1, 2, 120, 130]), [100, 110, 115, 115, 115, 120, 130]);
        assert_eq!(settled(&[1, 2, 100, 110, 120]), [1, 2, 100, 110, 120]);
        assert_eq!(settled(&[500, 100, 110, 120]), [500, 100, 110, 120]);
        assert_eq!(settled(&[100, 110, 9_000, 120, 130, 5]), [100, 110, 9_000, 120, 130, 130]);
        let policy: Policy = "all for 1h".parse().unwrap();
        let candidate = |(epoch, cut)| Candidate { epoch, cut, consistency: block::Consistency::Crash };
        let mut cut: Vec<Candidate> =
            points(&[900_000, 900_001, 900_002, 5, 6, 900_010]).into_iter().map(candidate).collect();
        let kept = |points: &[Candidate]| {
            policy.keep(points, UnixNanos(900_030 * SECOND)).iter().filter(|kept| kept.is_some()).count()
        };
        assert_eq!(kept(&cut), 4, "by their times alone two of them go");
        settle(&mut cut);
        assert_eq!(kept(&cut), 6);
    }

    #[test]
    fn neither_silence_nor_a_clock_ahead_drops_points() {
        assert_eq!(floor(9, Some(15), &[10, 20], 1_000_000), Some(1));
        assert_eq!(floor(9, Some(15), &[10, 20, 1_000_000], 22), Some(1));
        assert_eq!(floor(9, Some(15), &[10, 20, 5], 22), Some(1));
    }
}
