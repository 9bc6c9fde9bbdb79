use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Each power of two is divided into so many buckets: a figure is at most one sixteenth too large.
const PARTS: u64 = 16;
const BUCKETS: usize = (PARTS * 61) as usize;

/// How long things took, in bounded memory (8 KiB): how many, the median, the 99th percentile and the longest.
/// Percentiles are rounded up by at most one sixteenth.
#[derive(Debug)]
pub struct Latencies {
    buckets: Box<[AtomicU64]>,
    longest: AtomicU64,
}

/// What [`Latencies`] have come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencySummary {
    /// How many were recorded.
    pub count: u64,
    /// Half took no longer.
    pub p50: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
    /// None took longer; exact.
    pub max: Duration,
}

impl Default for Latencies {
    fn default() -> Latencies {
        Latencies::new()
    }
}

impl Latencies {
    /// None yet.
    pub fn new() -> Latencies {
        Latencies { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), longest: AtomicU64::new(0) }
    }

    /// Records one.
    pub fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(nanos)].fetch_add(1, Relaxed);
        self.longest.fetch_max(nanos, Relaxed);
    }

    /// What they have come to.
    pub fn summary(&self) -> LatencySummary {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let longest = self.longest.load(Relaxed);
        let percentile = |percent: u64| {
            let rank = u128::from(count) * u128::from(percent);
            let mut seen = 0;
            let bucket = counts.iter().position(|bucket| {
                seen += bucket;
                *bucket > 0 && u128::from(seen) * 100 >= rank
            });
            Duration::from_nanos(bucket.map_or(0, largest_of).min(longest))
        };
        LatencySummary { count, p50: percentile(50), p99: percentile(99), max: Duration::from_nanos(longest) }
    }
}

/// Values below [`PARTS`] have a bucket each; above, the four bits after the highest choose.
fn bucket_of(nanos: u64) -> usize {
    if nanos < PARTS {
        return nanos as usize;
    }
    let power = u64::from(nanos.ilog2());
    ((power - 3) * PARTS + (nanos >> (power - 4)) - PARTS) as usize
}

/// The largest value of a bucket.
fn largest_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PARTS {
        return bucket;
    }
    let power = bucket / PARTS + 3;
    let start = u128::from(PARTS + bucket % PARTS) << (power - 4);
    u64::try_from(start + (1 << (power - 4)) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_without_gaps() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(largest_of(BUCKETS - 1), u64::MAX);
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(largest_of(bucket)), bucket);
            assert_eq!(bucket_of(largest_of(bucket) + 1), bucket + 1);
        }
    }

    #[test]
    fn percentiles_are_close() {
        let latencies = Latencies::new();
        for ms in 1..=1000 {
            latencies.record(Duration::from_millis(ms));
        }
        let summary = latencies.summary();
        assert_eq!(summary.count, 1000);
        assert_eq!(summary.max, Duration::from_millis(1000));
        let near = |found: Duration, ms: u128| (ms..=ms * 17 / 16).contains(&found.as_millis());
        assert!(near(summary.p50, 500), "{summary:?}");
        assert!(near(summary.p99, 990) && summary.p99 <= summary.max, "{summary:?}");
        assert_eq!(Latencies::new().summary(), LatencySummary::default());
    }
}
