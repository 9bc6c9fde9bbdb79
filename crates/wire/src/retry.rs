//! When to try a connection again: at once with jitter for a short phase, then at the intervals that the field knows.

use std::time::Duration;

/// How long a lost connection is tried again at once.
pub const QUICK_PHASE: Duration = Duration::from_secs(30);
/// The shortest and the longest wait in the quick phase; where between, chance decides, so that many peers of a server
/// that comes back do not all come at once.
pub const QUICK_WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(1000));
/// The waits after the quick phase, in minutes. The last is repeated for ever.
pub const SLOW_WAIT_MINUTES: [u64; 6] = [1, 2, 4, 8, 10, 30];

/// The state of one connection's retries. Knows no clock: the caller says what time it is.
#[derive(Clone, Debug)]
pub struct Retry {
    since: Option<Duration>,
    slow: usize,
    random: u64,
}

impl Retry {
    /// Nothing has failed yet. `seed` makes the jitter.
    pub fn new(seed: u64) -> Retry {
        Retry { since: None, slow: 0, random: seed | 1 }
    }

    /// The connection works: the next failure begins a quick phase.
    pub fn succeeded(&mut self) {
        self.since = None;
        self.slow = 0;
    }

    /// An attempt failed at `now` (any clock that does not go back): how long to wait before the next.
    pub fn failed(&mut self, now: Duration) -> Duration {
        let since = *self.since.get_or_insert(now);
        // xorshift64 (Marsaglia, 2003): jitter needs no better.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let chance = (self.random >> 40) as f64 / (1_u64 << 24) as f64;
        if now.saturating_sub(since) < QUICK_PHASE {
            return QUICK_WAIT.0 + (QUICK_WAIT.1 - QUICK_WAIT.0).mul_f64(chance);
        }
        let minutes = SLOW_WAIT_MINUTES[self.slow.min(SLOW_WAIT_MINUTES.len() - 1)];
        self.slow += 1;
        // Up to a tenth earlier.
        Duration::from_secs(minutes * 60).mul_f64(1.0 - chance / 10.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quick_then_the_known_intervals() {
        let mut retry = Retry::new(7);
        let mut now = Duration::ZERO;
        let mut quick = 0;
        let mut minutes = Vec::new();
        while minutes.len() < 8 {
            let wait = retry.failed(now);
            now += wait;
            if wait <= QUICK_WAIT.1 {
                assert!(wait >= QUICK_WAIT.0 && minutes.is_empty());
                quick += 1;
            } else {
                minutes.push(wait.as_secs_f64() / 60.0);
            }
        }
        assert!((30..=300).contains(&quick), "{quick} quick attempts");
        for (got, wanted) in minutes.iter().zip([1.0, 2.0, 4.0, 8.0, 10.0, 30.0, 30.0, 30.0]) {
            assert!(*got <= wanted && *got >= wanted * 0.9, "{got} for {wanted}");
        }
        retry.succeeded();
        assert!(retry.failed(now) <= QUICK_WAIT.1);
    }
}
