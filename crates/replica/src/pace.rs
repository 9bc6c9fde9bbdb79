//! How fast work in the background may go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::ByteCount;
use parking_lot::Mutex;

use crate::ReplicaError;

/// How long a pause lasts at most before it is looked whether to stop.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Bounds the bytes that work in the background reads and writes, and stops it when asked to.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    bytes_per_s: Option<u64>,
    stop: Arc<AtomicBool>,
    /// When what was spent so far is paid for.
    paid: Arc<Mutex<Option<Instant>>>,
}

impl Pace {
    /// As fast as it goes.
    pub fn unbounded() -> Pace {
        Pace::default()
    }

    /// At most so many bytes a second, read and written together, at least one; on the average, in bursts of a few MiB.
    pub fn bounded(bytes_per_s: ByteCount) -> Pace {
        Pace { bytes_per_s: Some(bytes_per_s.0.max(1)), ..Pace::default() }
    }

    /// Makes all work at this pace, and its clones', end with [`ReplicaError::Stopped`] soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Accounts for bytes read or written, and waits as long as they cost.
    pub(crate) fn spend(&self, bytes: u64) -> Result<(), ReplicaError> {
        if let Some(rate) = self.bytes_per_s {
            let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
            let paid = {
                let mut paid = self.paid.lock();
                let now = Instant::now();
                let at = paid.map_or(now, |paid| paid.max(now)) + cost;
                *paid = Some(at);
                at
            };
            loop {
                self.check()?;
                let left = paid.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(());
                }
                std::thread::sleep(left.min(PAUSE_MAX));
            }
        }
        self.check()
    }

    fn check(&self) -> Result<(), ReplicaError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(ReplicaError::Stopped),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_one_stops_its_clones_at_once() {
        let pace = Pace::bounded(ByteCount(1));
        let clone = pace.clone();
        pace.stop();
        assert!(matches!(clone.spend(1 << 40), Err(ReplicaError::Stopped)));
        assert!(Pace::unbounded().spend(u64::MAX).is_ok());
    }

    #[test]
    fn what_is_spent_is_waited_for() {
        let pace = Pace::bounded(ByteCount(1 << 20));
        let begun = Instant::now();
        pace.spend(1 << 15).unwrap();
        pace.spend(1 << 15).unwrap();
        assert!(begun.elapsed() >= Duration::from_micros(62_000));
    }
}
