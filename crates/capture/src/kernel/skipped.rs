//! R11's watch: whether a completion may have been skipped by every copy of its program.
//!
//! Such an event was skipped by each copy, so each count of skipped runs has grown; and it came on top of three others, of
//! which the topmost had found both other copies busy (`deep`). The counts alone grow harmlessly wherever completions
//! nest: one event is skipped by one copy, another by another.

use std::sync::atomic::Ordering;

use super::maps::Maps;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Skipped {
    /// The least count of skipped runs of the completion program's copies.
    pub(super) by_all: u64,
    /// Completions that found all other copies busy.
    pub(super) deep: u64,
}

impl Skipped {
    /// What has been acted on.
    pub(super) fn seen(maps: &Maps) -> Skipped {
        let kept = &maps.kept[0];
        Skipped {
            by_all: kept.skipped_seen.load(Ordering::SeqCst),
            deep: kept.deep_seen.load(Ordering::SeqCst),
        }
    }

    pub(super) fn store(self, maps: &Maps) {
        let kept = &maps.kept[0];
        kept.skipped_seen.store(self.by_all, Ordering::SeqCst);
        kept.deep_seen.store(self.deep, Ordering::SeqCst);
    }

    /// Whether an event may have been lost since then.
    pub(super) fn lost_since(self, before: Skipped) -> bool {
        self.by_all > before.by_all && self.deep > before.deep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_both_together_are_a_loss() {
        let before = Skipped { by_all: 4, deep: 1 };
        assert!(!before.lost_since(before));
        assert!(!Skipped { by_all: 9, deep: 1 }.lost_since(before));
        assert!(!Skipped { by_all: 4, deep: 2 }.lost_since(before));
        assert!(Skipped { by_all: 5, deep: 2 }.lost_since(before));
    }
}
