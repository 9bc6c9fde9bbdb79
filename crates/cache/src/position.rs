use std::fmt;

use block::{Epoch, Generation};

/// A place in a group's history: first by generation, then by epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Which history.
    pub generation: Generation,
    /// Which changeset of it; [`Epoch::NONE`] is before the first.
    pub epoch: Epoch,
}

impl Position {
    /// Before every changeset.
    pub const NONE: Position = Position { generation: Generation(0), epoch: Epoch::NONE };

    /// Whether `next` may directly follow: the next epoch of the same generation, or epoch 1 of a later one. A history
    /// has no gaps, so nothing else may.
    pub fn is_followed_by(self, next: Position) -> bool {
        if next.generation == self.generation {
            next.epoch == self.epoch.next()
        } else {
            next.generation > self.generation && next.epoch == Epoch(1)
        }
    }

    /// The last epoch of `generation` at or before this position, as a sender of that generation is told.
    pub fn epoch_in(self, generation: Generation) -> Epoch {
        if self.generation == generation { self.epoch } else { Epoch::NONE }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {} of generation {}", self.epoch, self.generation)
    }
}
