//! Whether every end of a write was seen: our count of sectors against the kernel's own (`/sys/dev/block/*/stat`).
//!
//! The kernel adds to its count after our programs run and before anyone can see the end (blk_account_io_completion). So it
//! is read first, ours after: where it is ahead of ours by more than it was at the beginning, a write ended unseen. That
//! finds whatever keeps programs from running: left out by the kernel, detached by somebody, or an error of ours.
//!
//! A write that was seen issuing has left its slot then; `on_suspects` finds it, for its request does something else by now,
//! or is free. What no slot explains was not seen at all, and the volume is read again: see the tracker.
//!
//! Writes that end between the two readings hide as many sectors. Readings are repeated until nothing ended in between;
//! on a disk that never pauses for [`QUIET_TRIES`] readings, the comparison is as good as its traffic in some
//! microseconds.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::attach::Attached;
use super::layout::{SLOT_DOUBTED, SLOT_FLAGS, SUSPECTS_MAX, VolumeEntry};
use super::maps::{Maps, wait_for_programs};
use super::{PROGRAM_RUN_MAX, sys};

/// How often both counts are read in search of an instant at which nothing ends.
const QUIET_TRIES: usize = 64;
/// How often it is tried to find both counts and the slots of one instant, where what is unseen is accepted.
const ACCEPT_TRIES: usize = 16;
/// A disk whose counts have not moved for so long is idle: no end is between our count and the kernel's.
const IDLE: Duration = Duration::from_millis(20);
/// Fields of `stat`: sectors written, sectors discarded (Documentation/block/stat.rst).
const STAT_FIELDS: [usize; 2] = [6, 13];
/// More than the longest `stat` has.
const STAT_BYTES: usize = 1024;

pub(super) struct Ends {
    volumes: Vec<Count>,
    /// Slots that are doubted.
    stale: Vec<Stale>,
    /// Sectors counted too many, as found on idle disks.
    twice: u64,
}

/// A slot whose request does something else by now, or is free.
struct Stale {
    place: u32,
    value: u64,
    volume: usize,
    /// Of its write, as far as they have ended.
    sectors: u64,
}

struct Count {
    /// `None`: the kernel has no count of this disk.
    stat: Option<File>,
    /// Both counts as last read, and since when they are so.
    last: Option<(u64, u64, Instant)>,
}

/// Both counts.
struct Reading {
    kernel: u64,
    ours: u64,
    /// Nothing ended while they were read.
    quiet: bool,
}

impl Ends {
    pub(super) fn new(volumes: &[VolumeEntry]) -> Ends {
        let count = |entry: &VolumeEntry| {
            let (major, minor) = (entry.dev >> 20, entry.dev & 0xf_ffff);
            let stat = File::open(format!("/sys/dev/block/{major}:{minor}/stat"));
            Count { stat: stat.ok(), last: None }
        };
        Ends { volumes: volumes.iter().map(count).collect(), stale: Vec::new(), twice: 0 }
    }

    /// See [`crate::Tap::ended_twice`].
    pub(super) fn twice(&self) -> u64 {
        self.twice
    }

    /// What the kernel is ahead by now counts for nothing. Not what slots explain: that will be counted as ended yet, and
    /// would then hide as much.
    pub(super) fn accept(&mut self, maps: &Maps, attached: &Attached, volume: usize) {
        let mut accepted = None;
        for _ in 0..ACCEPT_TRIES {
            let Some(before) = self.volumes[volume].read(maps, volume) else { return };
            self.note_stale(maps, attached);
            let Some(after) = self.volumes[volume].read(maps, volume) else { return };
            let stale = self.stale.iter().filter(|stale| stale.volume == volume);
            let explained: u64 = stale.map(|stale| stale.sectors).sum();
            // Rather too low: then something that was seen counts as unseen, and is read again.
            accepted = Some(before.kernel.wrapping_sub(before.ours).wrapping_sub(explained));
            if (before.kernel, before.ours) == (after.kernel, after.ours) {
                break;
            }
        }
        if let Some(accepted) = accepted {
            maps.ledger[volume].base.store(accepted, Ordering::SeqCst);
        }
    }

    pub(super) fn accept_all(&mut self, maps: &Maps, attached: &Attached) {
        for volume in 0..self.volumes.len() {
            self.accept(maps, attached, volume);
        }
    }

    /// See [`crate::Tap::unseen`], in sectors.
    pub(super) fn unseen(&mut self, maps: &Maps, volume: usize) -> u64 {
        let count = &mut self.volumes[volume];
        let Some(reading) = count.read(maps, volume) else { return 0 };
        let base = &maps.ledger[volume].base;
        let ahead = reading.kernel.wrapping_sub(reading.ours);
        let unseen = ahead.wrapping_sub(base.load(Ordering::SeqCst)) as i64;
        match count.last {
            Some((kernel, ours, since)) if (kernel, ours) == (reading.kernel, reading.ours) => {
                // Whatever ended twice for us must not hide what ends unseen later.
                if unseen < 0 && reading.quiet && since.elapsed() >= IDLE {
                    base.store(ahead, Ordering::SeqCst);
                    self.twice += unseen.unsigned_abs();
                }
            }
            _ => count.last = Some((reading.kernel, reading.ours, Instant::now())),
        }
        unseen.max(0) as u64
    }

    /// Whether more ended unseen than all slots together can explain.
    pub(super) fn unseen_beyond_slots(&mut self, maps: &Maps) -> bool {
        let slots: u64 = maps.flights().map(|(_, extent)| extent.length().0 / block::SECTOR_BYTES).sum();
        (0..self.volumes.len()).any(|volume| self.unseen(maps, volume) > slots)
    }

    pub(super) fn note_stale(&mut self, maps: &Maps, attached: &Attached) {
        let taken = maps.slots().enumerate().map(|(at, slot)| (at as u32, slot.load(Ordering::SeqCst)));
        let taken: Vec<(u32, u64)> = taken.filter(|(_, value)| value & !SLOT_FLAGS != 0).collect();
        self.stale = look(maps, attached, &taken, false);
        for stale in &mut self.stale {
            stale.value |= SLOT_DOUBTED;
        }
    }

    pub(super) fn mend_stale(&mut self, maps: &Maps, attached: &Attached) {
        if self.stale.is_empty() {
            return;
        }
        // An issue that was running when its slot was doubted may have taken it over before; from now on it would end the
        // doubt.
        if wait_for_programs().is_err() {
            std::thread::sleep(PROGRAM_RUN_MAX);
        }
        let doubted: Vec<(u32, u64)> = self.stale.drain(..).map(|stale| (stale.place, stale.value)).collect();
        look(maps, attached, &doubted, true);
    }
}

impl Count {
    fn read(&self, maps: &Maps, volume: usize) -> Option<Reading> {
        let stat = self.stat.as_ref()?;
        let mut reading = None;
        for _ in 0..QUIET_TRIES {
            let before = maps.ended(volume);
            let kernel = sectors(stat)?;
            let ours = maps.ended(volume);
            let quiet = before == ours;
            reading = Some(Reading { kernel, ours, quiet });
            if quiet {
                break;
            }
        }
        reading
    }
}

/// Which of the slots are stale; with `mend`, they have been marked and freed.
fn look(maps: &Maps, attached: &Attached, slots: &[(u32, u64)], mend: bool) -> Vec<Stale> {
    let mut stale = Vec::new();
    for slots in slots.chunks(SUSPECTS_MAX) {
        for (suspect, (place, value)) in maps.suspects.iter().zip(slots) {
            suspect.value.store(*value, Ordering::SeqCst);
            suspect.place.store(*place, Ordering::SeqCst);
            suspect.mend.store(u32::from(mend), Ordering::SeqCst);
            suspect.stale.store(0, Ordering::SeqCst);
        }
        if let Some(end) = maps.suspects.get(slots.len()) {
            end.value.store(0, Ordering::SeqCst);
        }
        if let Err(error) = sys::run(attached.suspects_program.as_fd()) {
            // Whatever they stand for stays unexplained.
            tracing::warn!(%error, "run a capture program to look for writes whose end was not seen");
            return Vec::new();
        }
        let found = maps.suspects.iter().zip(slots).filter(|(s, _)| s.stale.load(Ordering::SeqCst) != 0);
        stale.extend(found.map(|(suspect, (place, value))| Stale {
            place: *place,
            value: *value,
            volume: suspect.volume.load(Ordering::SeqCst) as usize,
            sectors: suspect.sectors.load(Ordering::SeqCst),
        }));
    }
    stale
}

fn sectors(stat: &File) -> Option<u64> {
    let mut text = [0; STAT_BYTES];
    let length = stat.read_at(&mut text, 0).ok()?;
    sectors_of(std::str::from_utf8(&text[..length]).ok()?)
}

/// The sectors written and discarded; kernels before 4.18 do not count discards.
fn sectors_of(stat: &str) -> Option<u64> {
    let mut fields = stat.split_ascii_whitespace();
    let written: u64 = fields.nth(STAT_FIELDS[0])?.parse().ok()?;
    let discarded: u64 = match fields.nth(STAT_FIELDS[1] - STAT_FIELDS[0] - 1) {
        Some(field) => field.parse().ok()?,
        None => 0,
    };
    Some(written.wrapping_add(discarded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_discarded_sectors_count() {
        let stat = "  5 1 40 2  7 3 1000 9 0 11 12 4 5 24 6 8 9\n";
        assert_eq!(sectors_of(stat), Some(1024));
        assert_eq!(sectors_of("5 1 40 2 7 3 1000 9 0 11 12"), Some(1000));
        assert_eq!(sectors_of("5 1 40"), None);
        assert_eq!(sectors_of("5 1 40 2 7 3 x 9 0 11 12"), None);
    }
}
