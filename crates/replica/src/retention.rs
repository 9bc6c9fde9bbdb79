use std::time::Duration;

use block::{Epoch, UnixNanos};

use crate::POINTS_MAX;

/// Which recovery points are kept. The newest always is.
///
/// Points go from the oldest on: the next point becomes the *floor*, the state file says so, and layers before it are
/// leftovers that are removed when no view needs them. Nothing is rewritten, the floor's own old content is merely
/// not used any more.
///
/// Thinning in the middle will drop point k by merging layers k and k+1 into one that leads from k+1 to k-1: for a
/// block in both, layer k's content wins, for it is the older. The merged layer takes the name and the meaning of k+1,
/// so it is written beside that name, made durable and renamed over it; only then is layer k removed. A crash between
/// the two leaves a layer k that k+1 no longer needs, which its header must say (a "leads back to" epoch, now always
/// the one before), and opening removes it. A view between k-1 and k+1 must hold the old files until it ends, as it
/// does now for a dropped floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// At most this many points; at least 1 is kept, and never more than [`POINTS_MAX`].
    pub points_max: usize,
    /// Points older than this go. Age is measured from the newest point's cut, or from this machine's clock where
    /// that is earlier: neither a source that stays silent nor one whose clock jumps ahead drops what can be kept.
    pub age_max: Option<Duration>,
}

impl Default for Retention {
    /// 1000 points, of any age.
    fn default() -> Retention {
        Retention { points_max: 1000, age_max: None }
    }
}

impl Retention {
    /// The oldest of the points (in order, with their cut times) to keep; `None` when there is no point.
    pub(crate) fn floor(&self, points: &[(Epoch, UnixNanos)], now: UnixNanos) -> Option<Epoch> {
        let (_, newest) = *points.last()?;
        let reference = newest.min(now);
        let excess = points.len().saturating_sub(self.points_max.clamp(1, POINTS_MAX));
        let kept = points[excess..]
            .iter()
            .find(|(_, cut)| self.age_max.is_none_or(|age_max| reference.since(*cut) <= age_max));
        kept.or(points.last()).map(|(epoch, _)| *epoch)
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
        let retention = Retention { points_max, age_max: age_max.map(Duration::from_secs) };
        retention.floor(&points(cuts), UnixNanos(now * SECOND)).map(|epoch| epoch.0)
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
