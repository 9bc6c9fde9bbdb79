//! Where tracking may have a gap: losses, and ends of writes that nobody saw.

use block::{Granule, UnixNanos};

use super::Tracker;
use crate::disk::Disk;
use crate::tap::{LossReason, Tap, VolumeIndex};

/// A disk that has grown must be taken up in its new size within so long; past it, all of it is read again and again.
const OUTGROWN_NS_MAX: u64 = 10_000_000_000;
/// While there are writes, it is looked so often for ends that nobody saw.
const LOOK_NS: u64 = 50_000_000;
/// And so often when nothing was written since all was found well.
const LOOK_IDLE_NS: u64 = 500_000_000;
/// Stale slots are noted in one look and mended in a later one; what is not explained after so many, will not be.
const LOOKS_MAX: u32 = 4;

/// Sectors of a volume that ended unseen, and since when that is known.
#[derive(Clone, Copy)]
pub(super) struct Unseen {
    sectors: u64,
    mended_before: u64,
    looks: u32,
}

impl<T: Tap, D: Disk> Tracker<T, D> {
    /// Tracking of a volume has a gap: all of it is read again. A disk that has grown is left for a while to whoever
    /// takes it up in its new size; until then no epoch is a point.
    pub(super) fn take_losses(&mut self, now: UnixNanos) {
        let since = self.outgrown.take();
        for volume in self.indices() {
            let Some(reason) = self.tap.loss(volume) else { continue };
            let since = since.unwrap_or(now);
            if reason == LossReason::OutOfRange && now.0.saturating_sub(since.0) < OUTGROWN_NS_MAX {
                self.outgrown = Some(since);
                continue;
            }
            self.lose(volume, reason);
            self.tap.forget_loss(volume);
        }
    }

    /// A completion that no copy of the program saw may have been of any write: everything is read again (R11). If it was
    /// of a captured one, its place in flight would be waited for in vain, so none of those in flight is trusted.
    pub(super) fn watch_skipped(&mut self) {
        if self.tap.skipped() {
            for volume in self.indices() {
                self.lose(volume, LossReason::Skipped);
            }
        }
        self.tap.forget_skipped();
    }

    pub(super) fn lose(&mut self, volume: VolumeIndex, reason: LossReason) {
        self.losses += 1;
        let name = &self.volumes[usize::from(volume.0)].name;
        let what = match reason {
            LossReason::Passthrough => "a program sent raw device commands",
            LossReason::OutOfRange => "a write outside its known size",
            LossReason::Operation => "a zone operation, which is not supported",
            LossReason::Walk => "a request that could not be followed",
            LossReason::Unseen => "the completion of a write was not seen",
            LossReason::Skipped => "the kernel may have skipped a completion",
        };
        tracing::warn!(volume = name, reason = what, "tracking had a gap: the volume is read again");
        self.last_error = Some(format!("volume {name}: {what}; reading it all again"));
        self.suspect_all(volume);
        self.tap.miss_in_flight();
    }

    pub(super) fn suspect_all(&mut self, volume: VolumeIndex) {
        for granule in 0..self.tap.granules(volume) {
            // In this order: a granule that is dirty and not suspect would be sent, which is only more work.
            self.tap.mark_dirty(volume, Granule(granule));
            self.tap.suspect(volume, Granule(granule));
        }
    }

    /// Looks for writes that ended unseen, if it is time to.
    pub(super) fn look_at_ends(&mut self, now: UnixNanos) {
        let writes = self.tap.writes();
        let pause = if writes == self.looked_writes { LOOK_IDLE_NS } else { LOOK_NS };
        if now.0.saturating_sub(self.looked_at.0) < pause {
            return;
        }
        self.looked_at = now;
        self.tap.mend_stale();
        // While writes go on, some are always in flight; to look through all of them takes a while.
        let quiet = writes == self.seen_writes;
        self.seen_writes = writes;
        let mut well = !(quiet && self.tap.missed_in_flight());
        for volume in self.indices() {
            let sectors = self.tap.unseen(volume);
            let mended = self.tap.mended(volume);
            let known = &mut self.unseen[usize::from(volume.0)];
            match known {
                _ if sectors == 0 => *known = None,
                Some(before) if before.looks + 1 < LOOKS_MAX => before.looks += 1,
                Some(before) if mended.wrapping_sub(before.mended_before) < before.sectors => {
                    *known = None;
                    self.lose(volume, LossReason::Unseen);
                    self.tap.accept_unseen(volume);
                }
                // Those were found; there are others since.
                _ => *known = Some(Unseen { sectors, mended_before: mended, looks: 0 }),
            }
            well &= sectors == 0;
        }
        if !well {
            self.tap.note_stale();
        } else if quiet {
            self.looked_writes = writes;
        }
    }

    /// Whether all ends of writes were seen, as far as the disks' own counts tell.
    pub(super) fn all_ends_seen(&mut self) -> bool {
        let seen = self.indices().all(|volume| self.tap.unseen(volume) == 0);
        if !seen {
            (self.looked_at, self.looked_writes) = (UnixNanos(0), u64::MAX);
        }
        seen
    }
}
