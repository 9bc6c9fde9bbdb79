//! How hard drains may read while applications write.

use block::UnixNanos;

/// Applications count as writing for so long after a write was seen.
const WRITING_NS: u64 = 20_000_000;

/// Leaves the disks to the applications while they write.
#[derive(Default)]
pub(super) struct Pace {
    writes: u64,
    written: UnixNanos,
    share: u32,
    next: UnixNanos,
}

impl Pace {
    pub(super) fn look(&mut self, now: UnixNanos, writes: u64, share: u32) {
        if writes != self.writes {
            (self.writes, self.written) = (writes, now);
        }
        self.share = share.clamp(1, 100);
    }

    pub(super) fn writing(&self, now: UnixNanos) -> bool {
        self.share < 100 && now.0.saturating_sub(self.written.0) < WRITING_NS
    }

    pub(super) fn may_read(&self, now: UnixNanos, reads: usize) -> bool {
        !self.writing(now) || reads == 0 && now >= self.next
    }

    pub(super) fn ended(&mut self, now: UnixNanos, took_ns: u64) {
        let rest =
            (took_ns / u64::from(self.share.max(1))).saturating_mul(u64::from(100 - self.share.min(100)));
        self.next = UnixNanos(now.0.saturating_add(rest));
    }
}
