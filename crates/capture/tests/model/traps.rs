//! What random steps meet too rarely.

use crate::kernel::World;
use crate::programs::Issue;

impl World {
    /// Three writes while the agent waits: the records of the first hold up the ring, the second is captured behind them
    /// and completes, the third depends on the second and goes where a drain is reading, whose read then ends. Each
    /// part may be left out, or go further.
    pub(crate) fn trap(&mut self) {
        if !self.writing || self.reads.is_empty() {
            return;
        }
        if self.rng.percent(60) {
            let steps = self.rng.between(6, 12);
            self.run_write(None, steps);
        }
        if self.rng.percent(80)
            && let Some(tag) = self.run_write(None, 100)
        {
            self.land_write(tag, true);
        }
        let which = self.rng.below(self.reads.len());
        let read = &self.reads[which];
        let aim = (usize::from(read.read.volume.0), read.read.extent.offset().0 / 512 + read.next as u64);
        if self.rng.percent(80)
            && let Some(tag) = self.run_write(Some(aim), 100)
        {
            let completes = self.rng.percent(50);
            self.land_write(tag, completes);
        }
        if self.rng.percent(80) {
            let reads = self.reads.len();
            while self.reads.len() == reads {
                self.now += 1;
                self.read_step(which);
            }
        }
    }

    /// A request that the agent looks at is used for another write, which ends as well.
    pub(crate) fn use_again(&mut self, tag: usize) {
        if !self.config.hasty || !self.writing || self.rng.percent(30) {
            return;
        }
        if self.flying.contains(&tag) {
            self.land_write(tag, true);
        }
        if self.run_write(None, 100) == Some(tag) {
            let completes = self.rng.percent(80);
            self.land_write(tag, completes);
        }
    }

    /// A new write, whose issue program runs for so many steps. Its request, if that took it into flight.
    fn run_write(&mut self, aim: Option<(usize, u64)>, steps: usize) -> Option<usize> {
        let processor = self.processors.iter().position(Option::is_none)?;
        let tag = self.requests.iter().position(Option::is_none)?;
        let volume = self.rng.below(self.volumes.len());
        let (volume, sector) = aim.map_or((volume, None), |(volume, sector)| (volume, Some(sector)));
        self.create_in(tag, volume, sector)?;
        self.processors[processor] = Some(Issue::new(tag, processor as u32, true));
        for _ in 0..steps {
            self.now += 1;
            self.issue_on(processor);
        }
        self.flying.contains(&tag).then_some(tag)
    }

    /// A write in flight reaches the disk, and its completion may be seen.
    fn land_write(&mut self, tag: usize, completes: bool) {
        self.now += 1;
        self.apply(tag, usize::MAX, u64::MAX);
        if let Some(request) = &mut self.requests[tag] {
            request.slow = true;
        }
        let Some(which) = self.flying.iter().position(|other| *other == tag).filter(|_| completes) else {
            return;
        };
        self.flying.swap_remove(which);
        let total = self.requests[tag].as_ref().map_or(0, |request| request.ranges.total());
        let completions = self.completions.len();
        self.complete(tag, false, total);
        while self.completions.len() > completions {
            self.now += 1;
            self.complete_on(completions);
        }
    }
}
