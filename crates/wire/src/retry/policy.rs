use std::time::Duration;

use serde::Deserialize;

/// The shortest and the longest wait in the quick phase; where between, chance decides, so that many peers of a server
/// that comes back do not all come at once.
pub const QUICK_WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(1000));
/// The longest quick phase that may be configured, in seconds.
pub const QUICK_S_MAX: u64 = 3600;
/// The longest wait that may be configured, in minutes.
pub const SLOW_MINUTES_MAX: u64 = 24 * 60;
/// How many waits may be configured.
pub const SLOW_WAITS_MAX: usize = 32;
/// The least and the most seconds between two looks that may be configured.
pub const LOOK_S: (u64, u64) = (1, 3600);

/// `[retry]`: when a lost connection is tried again.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryPolicy {
    /// How long it is tried again at once, in seconds.
    pub quick_s: u64,
    /// The waits after that, in minutes. The last is repeated for ever.
    pub minutes: Vec<u64>,
    /// Seconds between two looks whether a peer that was away is there again.
    pub look_s: u64,
}

/// Why a policy cannot be followed; names the value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RetryPolicyError(String);

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy { quick_s: 30, minutes: vec![1, 2, 4, 8, 10, 30], look_s: 10 }
    }
}

impl RetryPolicy {
    /// Looks at the values.
    ///
    /// # Errors
    /// When one is out of range.
    pub fn check(&self) -> Result<(), RetryPolicyError> {
        let refuse = |reason: String| Err(RetryPolicyError(reason));
        if self.quick_s > QUICK_S_MAX {
            return refuse(format!("quick_s = {}: at most {QUICK_S_MAX}", self.quick_s));
        }
        if self.minutes.is_empty() || self.minutes.len() > SLOW_WAITS_MAX {
            return refuse(format!("minutes has {} waits: give 1 to {SLOW_WAITS_MAX}", self.minutes.len()));
        }
        if let Some(bad) = self.minutes.iter().find(|minutes| !(1..=SLOW_MINUTES_MAX).contains(*minutes)) {
            return refuse(format!("minutes has {bad}: must be 1 to {SLOW_MINUTES_MAX}"));
        }
        if !(LOOK_S.0..=LOOK_S.1).contains(&self.look_s) {
            return refuse(format!("look_s = {}: must be {} to {}", self.look_s, LOOK_S.0, LOOK_S.1));
        }
        Ok(())
    }

    /// How long it is tried again at once.
    pub fn quick(&self) -> Duration {
        Duration::from_secs(self.quick_s)
    }

    /// Between two looks at a peer.
    pub(super) fn look(&self) -> Duration {
        Duration::from_secs(self.look_s.max(LOOK_S.0))
    }

    pub(super) fn slow_wait(&self, index: usize) -> Duration {
        self.minutes.get(index).map_or_else(|| self.last_wait(), |minutes| Duration::from_secs(minutes * 60))
    }

    pub(super) fn last_wait(&self) -> Duration {
        Duration::from_secs(self.minutes.last().copied().unwrap_or(SLOW_MINUTES_MAX) * 60)
    }
}
