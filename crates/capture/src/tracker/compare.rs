//! Suspect granules are compared with the replica before they are sent.

use std::collections::BTreeMap;

use block::{ByteCount, Extent, GRANULE_BYTES, Granule};
use changeset::{COMPARED_GRANULES_MAX, GranuleDigest};

use super::{Round, Tracker, granules_of};
use crate::compare::{Answer, Question, Verdict};
use crate::disk::Disk;
use crate::tap::{Tap, VolumeIndex};

/// Regions of [`COMPARED_GRANULES_MAX`] granules for which reads may still be on the way; past it, the first is asked about.
const REGIONS_GATHERED_MAX: usize = 2;

/// Suspect granules that were read, and what becomes of them.
#[derive(Default)]
pub(super) struct Comparing {
    /// To be asked, by volume and region.
    gathered: BTreeMap<(VolumeIndex, u64), Vec<(Granule, GranuleDigest)>>,
    /// Asked and not answered.
    pub(super) asked: BTreeMap<u64, (VolumeIndex, Vec<Granule>)>,
    next: u64,
    pub(super) compared: ByteCount,
    pub(super) different: ByteCount,
}

impl Comparing {
    pub(super) fn is_over(&self) -> bool {
        self.gathered.is_empty() && self.asked.is_empty()
    }
}

impl<T: Tap, D: Disk> Tracker<T, D> {
    /// What was read of suspect granules goes into questions.
    pub(super) fn gather(&mut self, volume: VolumeIndex, extent: Extent, data: &[u8]) {
        let Some(comparer) = &self.comparer else { return };
        let digests: Vec<(Granule, GranuleDigest)> = granules_of(extent)
            .zip(data.chunks(GRANULE_BYTES as usize))
            .map(|(granule, data)| (granule, comparer.digest(volume, granule, data)))
            .collect();
        let region = |granule: Granule| granule.0 / COMPARED_GRANULES_MAX;
        for (granule, digest) in digests {
            self.comparing.gathered.entry((volume, region(granule))).or_default().push((granule, digest));
        }
        // Reads end in any order, so the region before may still lack some.
        while self.comparing.gathered.len() > REGIONS_GATHERED_MAX {
            self.ask_first();
        }
    }

    pub(super) fn ask_first(&mut self) {
        let Some(((volume, _), mut granules)) = self.comparing.gathered.pop_first() else { return };
        let Some(comparer) = &mut self.comparer else { return };
        granules.sort_by_key(|(granule, _)| *granule);
        let as_of = if self.fold.is_empty() { self.cut } else { self.cut.next() };
        let number = self.comparing.next;
        self.comparing.next += 1;
        self.comparing.asked.insert(number, (volume, granules.iter().map(|(granule, _)| *granule).collect()));
        comparer.ask(Question { number, volume, as_of, granules });
    }

    /// Takes the answers that have come, and asks what was gathered when nothing more is being read.
    pub(super) fn compare(&mut self) -> bool {
        let reading =
            matches!(self.round, Round::Reading { .. }) || self.reads > 0 || !self.landed.is_empty();
        while !reading && !self.comparing.gathered.is_empty() {
            self.ask_first();
        }
        let mut moved = false;
        while let Some(Answer { number, verdict }) =
            self.comparer.as_mut().and_then(|comparer| comparer.answer())
        {
            let Some((volume, granules)) = self.comparing.asked.remove(&number) else { continue };
            moved = true;
            self.comparing.compared += ByteCount(granules.len() as u64 * GRANULE_BYTES);
            for granule in granules {
                let different = match &verdict {
                    Verdict::Same => false,
                    Verdict::Differs(different) => different.contains(&granule),
                    Verdict::Unknown => true,
                };
                if different {
                    self.comparing.different += ByteCount(GRANULE_BYTES);
                    self.tap.mark_dirty(volume, granule);
                }
                self.tap.trust(volume, granule);
                self.tap.leave_drain(volume, granule);
            }
        }
        moved
    }
}
