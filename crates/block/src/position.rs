use std::fmt;

use serde::{Deserialize, Serialize};

/// What changed between two cuts. Numbered from 1 without gaps within a generation; 0 means none yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Before the first.
    pub const NONE: Epoch = Epoch(0);

    /// The one after.
    pub const fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What may be said of the state of the volumes at an epoch's cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Consistency {
    /// Still draining: no recovery point.
    #[default]
    None = 0,
    /// A state that a power cut could have left.
    Crash = 1,
    /// The mounted filesystems were frozen.
    Filesystem = 2,
    /// The applications were quiesced as well.
    Application = 3,
}

impl Consistency {
    /// From its byte in a format; `None` for a byte that means nothing.
    pub const fn from_byte(byte: u8) -> Option<Consistency> {
        match byte {
            0 => Some(Consistency::None),
            1 => Some(Consistency::Crash),
            2 => Some(Consistency::Filesystem),
            3 => Some(Consistency::Application),
            _ => None,
        }
    }

    /// Whether an epoch with it may be offered as a recovery point.
    pub const fn is_point(self) -> bool {
        !matches!(self, Consistency::None)
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Consistency::None => "none",
            Consistency::Crash => "crash",
            Consistency::Filesystem => "filesystem",
            Consistency::Application => "application",
        })
    }
}

/// How far a group has come, the one order of positions in Seawall:
/// `captured >= sealed >= cached >= applied >= oldest_kept`.
///
/// `captured` is the open epoch (its changes may still be arriving); the others are whole epochs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ladder {
    /// The open epoch.
    pub captured: Epoch,
    /// The last epoch sealed as a changeset.
    pub sealed: Epoch,
    /// The last epoch the process server holds durably.
    pub cached: Epoch,
    /// The last epoch the target's replica holds durably.
    pub applied: Epoch,
    /// The oldest recovery point that retention keeps; 0 when there is none.
    pub oldest_kept: Epoch,
}

/// A ladder out of order: a bug, or two sides that do not belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("positions out of order: captured {} >= sealed {} >= cached {} >= applied {} >= oldest kept {}",
    .0.captured, .0.sealed, .0.cached, .0.applied, .0.oldest_kept)]
pub struct LadderError(pub Ladder);

impl Ladder {
    /// The ladder, when in order.
    ///
    /// # Errors
    /// When a later stage claims more than an earlier one has given.
    pub fn checked(self) -> Result<Ladder, LadderError> {
        let ordered = self.captured >= self.sealed
            && self.sealed >= self.cached
            && self.cached >= self.applied
            && self.applied >= self.oldest_kept;
        if ordered { Ok(self) } else { Err(LadderError(self)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_cannot_have_more_than_the_one_before() {
        let mut ladder = Ladder {
            captured: Epoch(5),
            sealed: Epoch(4),
            cached: Epoch(4),
            applied: Epoch(2),
            oldest_kept: Epoch(1),
        };
        assert!(ladder.checked().is_ok());
        ladder.applied = Epoch(5);
        assert!(ladder.checked().unwrap_err().to_string().contains("applied 5"));
    }

    #[test]
    fn consistency_bytes() {
        for byte in 0..=255 {
            assert!(Consistency::from_byte(byte).is_none_or(|consistency| consistency as u8 == byte));
        }
        assert!(!Consistency::None.is_point() && Consistency::Crash.is_point());
    }
}
