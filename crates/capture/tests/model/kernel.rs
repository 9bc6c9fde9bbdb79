//! A simulated machine: writers, processors, the capture programs' memory, and disks that do what disks may.
//!
//! [`World::step`] is one tick: one processor, interrupt, request or read goes on by the smallest step that others can
//! see in between. Everything that happens comes from the seed.

use capture::{Read, VolumeIndex};

use crate::met::Met;
use crate::mutation::Mutation;
use crate::oracle::{History, Value, WriteId};
use crate::programs::{Completion, Issue, Slot};
use crate::ring::SimRing;
use crate::rng::Rng;

/// Sectors of a granule.
pub(crate) const GRANULE: u64 = 128;
/// Granules of a bitmap word. 64 in the kernel; few here, so that small requests span several words.
pub(crate) const WORD: u64 = 2;
/// Sectors of the largest data request.
const DATA_SECTORS_MAX: usize = 14;
/// The largest request of any kind: its sectors are bits of a `u128`.
const SECTORS_MAX: u64 = 128;
/// Ranges of a discard.
pub(crate) const RANGES_MAX: usize = 3;

/// What this schedule may meet. Percentages where nothing else is said.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) volumes: Vec<u64>, // sectors
    pub(crate) dense: bool,
    pub(crate) processors: usize,
    pub(crate) tags: usize,
    /// How soon a free request is used for a new write.
    pub(crate) eager: usize,
    /// Most writes go to one granule.
    pub(crate) hot: bool,
    pub(crate) buckets: usize,
    pub(crate) slots: usize,
    pub(crate) ring_bytes: u64,
    pub(crate) data_mode: bool,
    pub(crate) failures: usize,
    pub(crate) requeues: usize,
    pub(crate) partials: usize,
    pub(crate) skipped_issues: usize,
    pub(crate) skipped_completions: usize,
    pub(crate) handled_twice: usize,
    /// Completions that no copy of the program handles, and that are not counted either.
    pub(crate) left_out: usize,
    /// Writes of which neither issue nor completion is seen.
    pub(crate) left_out_twice: usize,
    /// Of those whose completion nobody sees, such as flush the disk's cache before their end.
    pub(crate) flushes: usize,
    /// Only writes that have a slot are left out.
    pub(crate) every_slot: bool,
    /// The disks' counts cannot be compared with ours: a disk that never pauses.
    pub(crate) unquiet: bool,
    pub(crate) passthrough: usize,
    pub(crate) encrypted: usize,
    pub(crate) discards: usize,
    pub(crate) zeroes: usize,
    pub(crate) unreadable: usize,
    pub(crate) read_errors: usize,
    /// How fast drain reads are, and what stalls.
    pub(crate) read_pace: usize,
    pub(crate) stall_pace: usize,
    /// How many reservations in the ring stay busy for long.
    pub(crate) ring_stalls: usize,
    /// How many of the programs and requests stall.
    pub(crate) stalls: usize,
    /// How often the agent is kept waiting in the middle of a call, and for how many ticks at most.
    pub(crate) preemption: usize,
    pub(crate) preempted_steps: usize,
    /// Requests are used again at once, also while the agent looks at what they left behind.
    pub(crate) hasty: bool,
    /// How often what happens meanwhile is what would hurt most: see [`World::trap`].
    pub(crate) traps: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Zeroes,
    Discard,
    Passthrough,
}

/// Up to [`RANGES_MAX`] ranges of sectors.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ranges {
    list: [(u64, u64); RANGES_MAX],
    count: usize,
}

impl Ranges {
    fn one(sector: u64, sectors: u64) -> Ranges {
        let mut ranges = Ranges::default();
        ranges.push(sector, sectors);
        ranges
    }

    fn push(&mut self, sector: u64, sectors: u64) {
        self.list[self.count] = (sector, sectors);
        self.count += 1;
    }

    pub(crate) fn as_slice(&self) -> &[(u64, u64)] {
        &self.list[..self.count]
    }

    pub(crate) fn sectors(&self) -> impl Iterator<Item = u64> + use<> {
        self.list.into_iter().take(self.count).flat_map(|(sector, sectors)| sector..sector + sectors)
    }

    pub(crate) fn total(&self) -> u64 {
        self.as_slice().iter().map(|(_, sectors)| sectors).sum()
    }

    /// After its first `done` sectors have ended; of several ranges, only the place of the first moves.
    pub(crate) fn without_first(self, done: u64) -> Ranges {
        let (sector, sectors) = self.list[0];
        match (self.count, sectors > done) {
            (1, true) => Ranges::one(sector + done, sectors - done),
            _ => self,
        }
    }

    fn overlaps(&self, other: &Ranges) -> bool {
        self.as_slice()
            .iter()
            .any(|(a, an)| other.as_slice().iter().any(|(b, bn)| *a < b + bn && *b < a + an))
    }
}

/// A `struct request`, from its submission until its completion is visible. Its address is its place.
pub(crate) struct Request {
    pub(crate) write: WriteId,
    pub(crate) volume: usize,
    pub(crate) kind: Kind,
    /// What is left of it; a partial completion takes off the front.
    pub(crate) ranges: Ranges,
    /// What the disk gets, and what memory holds: different with inline encryption.
    pub(crate) value: Value,
    pub(crate) memory: Value,
    /// Sectors of `ranges` that the disk has.
    applied: u128,
    pub(crate) slow: bool,
    /// The program did not see that it came back.
    requeue_unseen: bool,
    /// No program sees anything of it.
    pub(crate) left_out: bool,
    /// Its data has ended.
    pub(crate) flushing: bool,
}

impl Request {
    pub(crate) fn encrypted(&self) -> bool {
        self.value != self.memory
    }
}

pub(crate) struct SimVolume {
    pub(crate) sectors: u64,
    pub(crate) granules: u64,
    pub(crate) platter: Vec<Value>,
    /// The first of its sectors in the history.
    pub(crate) base: usize,
    pub(crate) dirty: u64,
    pub(crate) draining: u64,
    pub(crate) suspect: u64,
    pub(crate) lost: bool,
    /// The two sets of touched granules.
    pub(crate) touched: [u64; 2],
    /// Sectors that ended: as the disk counts, as the programs do, and those among them whose slots were found stale.
    pub(crate) ended_kernel: u64,
    pub(crate) ended: u64,
    pub(crate) mended: u64,
    /// By how much the disk's count may be ahead; and both as they were last read.
    pub(crate) ended_base: u64,
    pub(crate) ended_read: (u64, u64),
    /// For [`Mutation::CachedReads`].
    cache: Vec<Option<Value>>,
}

/// A drain's read: its sectors are read at different times.
pub(crate) struct SimRead {
    pub(crate) read: Read,
    pub(crate) values: Vec<Value>,
    pub(crate) next: usize,
    left: usize,
    /// For [`Mutation::PositionTooEarly`].
    pub(crate) produced: u64,
    pub(crate) failed: bool,
}

pub(crate) struct World {
    pub(crate) config: Config,
    pub(crate) mutation: Option<Mutation>,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    pub(crate) writing: bool,
    pub(crate) volumes: Vec<SimVolume>,
    pub(crate) history: History,
    pub(crate) met: Met,
    next_value: Value,
    /// Writers that wait for nothing any more.
    next_writes: usize,

    pub(crate) requests: Vec<Option<Request>>,
    waiting: Vec<usize>,
    pub(crate) flying: Vec<usize>,
    pub(crate) processors: Vec<Option<Issue>>,
    pub(crate) completions: Vec<Completion>,
    pub(crate) reads: Vec<SimRead>,
    pub(crate) finished: Vec<SimRead>,
    /// Records handed to the agent in its last step: of data, and of zeroes.
    pub(crate) handed: (u64, u64),

    // The programs' maps.
    pub(crate) issue_attached: bool,
    pub(crate) complete_attached: bool,
    pub(crate) ring: SimRing,
    pub(crate) buckets: Vec<Vec<Option<Slot>>>,
    pub(crate) phase: usize,
    pub(crate) marked: u64,
    pub(crate) marked_again: u64,
    /// Completions that no copy of the program handled.
    pub(crate) skipped: u64,
    // The agent's side of them.
    pub(crate) young: usize,
    pub(crate) skipped_seen: u64,
    /// Steps of the agent until it is killed.
    pub(crate) fuse: Option<u32>,
    /// It has been killed: whatever it does has no effect any more.
    pub(crate) dead: bool,
}

impl World {
    /// A machine with writes in flight, and the programs attached to it.
    pub(crate) fn new(config: Config, mutation: Option<Mutation>, mut rng: Rng) -> World {
        let config = match mutation {
            Some(Mutation::PositionTooEarly) => Config { left_out: 0, left_out_twice: 0, ..config },
            _ => config,
        };
        let mut initial = Vec::new();
        let mut volumes = Vec::new();
        let mut next_value = 1;
        for sectors in &config.volumes {
            let base = initial.len();
            for sector in 0..*sectors {
                let filled = if config.dense { sector % 8 == 3 } else { sector % GRANULE < 6 };
                if filled && rng.percent(70) {
                    initial.push(next_value);
                    next_value += 1;
                } else {
                    initial.push(0);
                }
            }
            volumes.push(SimVolume {
                sectors: *sectors,
                granules: sectors.div_ceil(GRANULE),
                platter: initial[base..].to_vec(),
                base,
                dirty: 0,
                draining: 0,
                suspect: 0,
                lost: false,
                touched: [0; 2],
                ended_kernel: 0,
                ended: 0,
                mended: 0,
                ended_base: 0,
                ended_read: (0, 0),
                cache: vec![None; *sectors as usize],
            });
        }
        let mut world = World {
            mutation,
            now: 0,
            writing: true,
            volumes,
            history: History::new(initial),
            met: Met::default(),
            next_value,
            next_writes: 0,
            requests: (0..config.tags).map(|_| None).collect(),
            waiting: Vec::new(),
            flying: Vec::new(),
            processors: vec![None; config.processors],
            completions: Vec::new(),
            reads: Vec::new(),
            finished: Vec::new(),
            handed: (0, 0),
            issue_attached: false,
            complete_attached: false,
            ring: SimRing::new(config.ring_bytes),
            buckets: vec![vec![None; config.slots]; config.buckets],
            phase: 0,
            marked: 0,
            marked_again: 0,
            skipped: 0,
            young: 0,
            skipped_seen: 0,
            fuse: None,
            dead: false,
            rng,
            config,
        };
        // As KernelTap::attach does: everything dirty, then completion, then issue.
        world.some_steps(20);
        for volume in &mut world.volumes {
            volume.dirty = (1 << volume.granules) - 1;
            volume.suspect = volume.dirty;
        }
        world.complete_attached = true;
        world.some_steps(6);
        world.issue_attached = true;
        world.some_steps(6);
        for volume in &mut world.volumes {
            volume.ended_base = volume.ended_kernel.wrapping_sub(volume.ended);
        }
        world
    }

    pub(crate) fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    fn some_steps(&mut self, most: usize) {
        for _ in 0..self.rng.below(most + 1) {
            self.step();
        }
    }

    /// The kernel goes on while the agent is inside a call, or the agent is killed there.
    pub(crate) fn preempt(&mut self) {
        if let Some(left) = &mut self.fuse {
            *left = left.saturating_sub(1);
            self.dead |= *left == 0;
        }
        if self.rng.percent(self.config.preemption) {
            self.some_steps(self.config.preempted_steps);
        }
        if self.rng.percent(self.config.traps) {
            self.trap();
        }
    }

    /// One tick.
    pub(crate) fn step(&mut self) {
        self.now += 1;
        let mut which = self.rng.below(
            2 + self.processors.len() + self.completions.len() * 2 + self.flying.len() + self.reads.len() * 2,
        );
        if which < 2 {
            return self.submit();
        }
        which -= 2;
        if which < self.processors.len() {
            return self.issue_step(which);
        }
        which -= self.processors.len();
        if which < self.completions.len() * 2 {
            return self.completion_step(which / 2);
        }
        which -= self.completions.len() * 2;
        if which < self.flying.len() {
            return self.fly(which);
        }
        which -= self.flying.len();
        self.read_step(which / 2);
    }

    /// Every program that runs now comes to its end.
    pub(crate) fn end_programs(&mut self) {
        for processor in 0..self.processors.len() {
            while self.processors[processor].is_some() {
                self.now += 1;
                self.issue_on(processor);
            }
        }
        while !self.completions.is_empty() {
            self.now += 1;
            self.complete_on(0);
        }
    }

    /// The agent is gone, and what it was reading; a new one begins.
    pub(crate) fn agent_gone(&mut self) {
        self.ring.go_back();
        self.reads.clear();
        self.finished.clear();
        (self.dead, self.fuse) = (false, None);
        self.met.crashes += 1;
    }

    /// Whether no write is anywhere between its submission and its completion.
    pub(crate) fn at_rest(&self) -> bool {
        self.requests.iter().all(Option::is_none) && self.completions.is_empty()
    }

    // ---- the host ----

    /// Hands a request to a processor that is free: one that waits, or a new one.
    fn submit(&mut self) {
        let processor = self.rng.below(self.processors.len());
        if self.processors[processor].is_some() {
            return;
        }
        let tag = if !self.waiting.is_empty() && (!self.writing || self.rng.percent(50)) {
            let which = self.rng.below(self.waiting.len());
            self.waiting.swap_remove(which)
        } else if let Some(tag) = self.create() {
            tag
        } else {
            return;
        };
        // Skipped at its second issue after its requeue was skipped: the hole that is left of R11.
        let seen = self.requests[tag].as_ref().is_some_and(|request| !request.requeue_unseen);
        let mut skipped = seen && self.rng.percent(self.config.skipped_issues);
        if self.issue_attached && self.slot_of(tag).is_none() && self.rng.percent(self.config.left_out_twice)
        {
            self.met.left_out_twice += 1;
            if let Some(request) = &mut self.requests[tag] {
                request.left_out = true;
            }
        }
        skipped |= self.requests[tag].as_ref().is_some_and(|request| request.left_out);
        if !self.issue_attached || skipped {
            self.take_off(tag, false);
        } else {
            self.processors[processor] = Some(Issue::new(tag, processor as u32, self.slow()));
        }
    }

    fn hot(&mut self) -> bool {
        self.config.hot && self.rng.percent(60)
    }

    pub(crate) fn slow(&mut self) -> bool {
        self.rng.percent(self.config.stalls)
    }

    fn value(&mut self) -> Value {
        self.next_value += 1;
        self.next_value
    }

    fn create(&mut self) -> Option<usize> {
        let tag = self.rng.below(self.requests.len());
        if !self.writing || self.requests[tag].is_some() {
            return None;
        }
        // A writer that waited for a completion goes on at once.
        if self.next_writes > 0 {
            self.next_writes -= 1;
        } else if !self.rng.percent(self.config.eager) {
            return None;
        }
        self.create_at(tag)
    }

    fn create_at(&mut self, tag: usize) -> Option<usize> {
        let volume = if self.hot() { 0 } else { self.rng.below(self.volumes.len()) };
        self.create_in(tag, volume, None)
    }

    /// A new write of a volume, at `sector` if it is given.
    pub(crate) fn create_in(&mut self, tag: usize, volume: usize, sector: Option<u64>) -> Option<usize> {
        let kind = match self.rng.below(100) {
            x if x < self.config.discards => Kind::Discard,
            x if x < self.config.discards + self.config.zeroes => Kind::Zeroes,
            x if x < self.config.discards + self.config.zeroes + self.config.passthrough => Kind::Passthrough,
            _ => Kind::Data,
        };
        let ranges = self.place(volume, kind, sector)?;
        let value = match kind {
            Kind::Data | Kind::Passthrough if self.rng.percent(92) => self.value(),
            _ => 0,
        };
        let encrypted = kind == Kind::Data && self.rng.percent(self.config.encrypted);
        let memory = if encrypted { self.value() } else { value };
        let base = self.volumes[volume].base;
        let sectors = ranges.sectors().map(|sector| base + sector as usize);
        let write = self.history.submit(sectors, value, self.now);
        self.met.writes += 1;
        let slow = self.slow();
        self.requests[tag] = Some(Request {
            write,
            volume,
            kind,
            ranges,
            value,
            memory,
            applied: 0,
            slow,
            requeue_unseen: false,
            left_out: false,
            flushing: false,
        });
        Some(tag)
    }

    /// Where a new write goes: near the edges of granules, and not where another one is in flight.
    fn place(&mut self, volume: usize, kind: Kind, sector: Option<u64>) -> Option<Ranges> {
        let sectors = self.volumes[volume].sectors;
        let granules = self.volumes[volume].granules;
        let mut ranges = Ranges::default();
        let pieces = if kind == Kind::Discard { self.rng.between(1, RANGES_MAX) } else { 1 };
        for _ in 0..pieces {
            let granule = if self.hot() { 0 } else { self.rng.below(granules as usize) as u64 * GRANULE };
            let start = if let Some(sector) = sector {
                sector
            } else if self.config.dense {
                self.rng.below(sectors as usize) as u64
            } else {
                (granule + self.rng.below(16) as u64).saturating_sub(6)
            };
            let length = match (kind, self.rng.below(8)) {
                (Kind::Data | Kind::Passthrough, _) => self.rng.between(1, DATA_SECTORS_MAX),
                (_, 0) => self.rng.between(20, SECTORS_MAX as usize),
                _ => self.rng.between(1, 24),
            };
            let end = (start + length as u64).min(sectors);
            let range = Ranges::one(start, end.saturating_sub(start));
            if start >= end || ranges.overlaps(&range) || ranges.total() + range.total() > SECTORS_MAX {
                continue;
            }
            ranges.push(start, end - start);
        }
        let raced = self
            .requests
            .iter()
            .flatten()
            .any(|other| other.volume == volume && other.ranges.overlaps(&ranges));
        (ranges.count > 0 && (!raced || self.is(Mutation::WritesRace))).then_some(ranges)
    }

    /// The request leaves for the disk.
    pub(crate) fn take_off(&mut self, tag: usize, captured: bool) {
        let request = self.requests[tag].as_ref().expect("a request that was issued");
        let (write, volume, ranges) = (request.write, request.volume, request.ranges);
        if !captured {
            self.history.missed(write);
            if self.is(Mutation::MarkedAtIssue) && self.issue_attached {
                self.mark_at_once(volume, ranges);
            }
        }
        self.flying.push(tag);
    }

    // ---- the disk ----

    /// A request in flight: some sectors reach the platter, or its fate is decided.
    fn fly(&mut self, which: usize) {
        let tag = self.flying[which];
        let Some(request) = &self.requests[tag] else { return };
        let slow = request.slow;
        if self.rng.percent(60) {
            let most = self.rng.between(1, 12);
            return self.apply(tag, most, u64::MAX);
        }
        if slow && !self.rng.percent(self.config.stall_pace) {
            return;
        }
        self.flying.swap_remove(which);
        let total = self.requests[tag].as_ref().map_or(0, |request| request.ranges.total());
        let data = self.requests[tag].as_ref().is_some_and(|request| request.kind == Kind::Data);
        if self.writing && self.rng.percent(self.config.requeues) {
            return self.requeue(tag, false);
        }
        let partial = data && total > 1 && self.writing && self.rng.percent(self.config.partials);
        let error = self.rng.percent(if self.writing { self.config.failures } else { 0 });
        let done = if partial { self.rng.between(1, total as usize - 1) as u64 } else { total };
        if !error {
            self.apply(tag, usize::MAX, done);
        }
        self.met.partial += u64::from(partial);
        self.met.failed += u64::from(error);
        self.complete(tag, error, done);
    }

    /// Up to `most` of the first `within` sectors of a request reach the platter.
    pub(crate) fn apply(&mut self, tag: usize, most: usize, within: u64) {
        let Some(request) = &mut self.requests[tag] else { return };
        let volume = &mut self.volumes[request.volume];
        let total = request.ranges.total().min(within);
        let (mut left, start) = (most, self.rng.below(total as usize) as u64);
        for turn in 0..total {
            let index = (start + turn) % total;
            if left == 0 {
                break;
            }
            if request.applied >> index & 1 == 0 {
                request.applied |= 1 << index;
                let sector = request.ranges.sectors().nth(index as usize).expect("below the total");
                volume.platter[sector as usize] = request.value;
                left -= 1;
            }
        }
    }

    /// The request comes back and will be issued again, perhaps with other data.
    fn requeue(&mut self, tag: usize, after_error: bool) {
        let changes = self.rng.percent(60);
        let value = self.value();
        let Some(request) = &mut self.requests[tag] else { return };
        let base = self.volumes[request.volume].base;
        if changes && !after_error && request.kind == Kind::Data && !request.encrypted() {
            let sectors = request.ranges.sectors().map(|sector| base + sector as usize);
            if self.history.change(request.write, sectors, value) {
                (request.value, request.memory) = (value, value);
                self.met.changed += 1;
            }
        }
        request.applied = 0;
        self.met.requeued += 1;
        self.waiting.push(tag);
        self.on_requeue(tag);
    }

    /// `on_requeue`: what was captured of the request is not trusted any more.
    fn on_requeue(&mut self, tag: usize) {
        let unseen = self.rng.percent(self.config.skipped_issues);
        if let Some(request) = &mut self.requests[tag] {
            request.requeue_unseen = unseen;
        }
        if self.complete_attached && !unseen && !self.is(Mutation::RequeueIgnored) {
            self.miss_slot(tag);
            if let Some(place) = self.slot_of(tag)
                && let Some(slot) = self.slot(place)
            {
                slot.requeued = true;
            }
        }
    }

    /// The completion of the first `done` sectors is visible to everyone: a bio ends, a writer goes on.
    pub(crate) fn seen(&mut self, tag: usize, done: u64) {
        let request = self.requests[tag].as_ref().expect("a request that completes");
        let volume = &self.volumes[request.volume];
        for sector in request.ranges.sectors().take(done as usize) {
            let after = volume.platter[sector as usize];
            self.history.complete(request.write, volume.base + sector as usize, after, self.now);
        }
        self.next_writes += usize::from(self.rng.percent(40));
    }

    /// What is left of the request goes on, or its address is free again.
    pub(crate) fn released(&mut self, tag: usize, error: bool, done: u64) {
        let request = self.requests[tag].as_mut().expect("a request that completes");
        if done == request.ranges.total() {
            self.requests[tag] = None;
            return;
        }
        let (sector, sectors) = request.ranges.list[0];
        request.ranges = Ranges::one(sector + done, sectors - done);
        request.applied >>= done;
        if error || self.rng.percent(50) {
            self.requeue(tag, error);
        } else {
            self.flying.push(tag);
        }
    }

    // ---- drain reads ----

    pub(crate) fn begin_read(&mut self, read: Read) {
        let (first, sectors) = (read.extent.offset().0 / 512, (read.extent.length().0 / 512) as usize);
        let volume = &self.volumes[usize::from(read.volume.0)];
        assert!(first + sectors as u64 <= volume.sectors, "a read past the end of the disk: {read:?}");
        let next = self.rng.below(sectors);
        self.met.reads += 1;
        self.reads.push(SimRead {
            read,
            values: vec![0; sectors],
            next,
            left: sectors,
            produced: self.ring.produced,
            failed: false,
        });
    }

    pub(crate) fn read_step(&mut self, which: usize) {
        if self.writing && !self.rng.percent(self.config.read_pace) {
            return;
        }
        if self.reads[which].left > 0 {
            let torn = self.reads[which].left < self.reads[which].values.len();
            let most = *self.rng.pick(&[3, 10, 60, 1000]);
            let cached = self.is(Mutation::CachedReads);
            let SimRead { read, values, next, left, .. } = &mut self.reads[which];
            let volume = &mut self.volumes[usize::from(read.volume.0)];
            let first = (read.extent.offset().0 / 512) as usize;
            for _ in 0..most.min(*left) {
                let sector = first + *next;
                let mut value = volume.platter[sector];
                if cached {
                    value = *volume.cache[sector].get_or_insert(value);
                }
                values[*next] = value;
                *next = (*next + 1) % values.len();
                *left -= 1;
            }
            self.met.torn_reads += u64::from(torn);
        } else if self.rng.percent(50) {
            let mut read = self.reads.swap_remove(which);
            read.failed = self.writing && self.rng.percent(self.config.read_errors);
            self.met.read_errors += u64::from(read.failed);
            self.finished.push(read);
        }
    }

    // ---- bits ----

    /// The bits of a range of sectors, word by word: (word, mask within the volume).
    pub(crate) fn words(sector: u64, sectors: u64) -> impl Iterator<Item = u64> {
        let (first, last) = (sector / GRANULE, (sector + sectors - 1) / GRANULE);
        (first / WORD..=last / WORD).map(move |word| {
            (first.max(word * WORD)..=last.min(word * WORD + WORD - 1))
                .fold(0, |mask, granule| mask | 1 << granule)
        })
    }

    pub(crate) fn mark_at_once(&mut self, volume: usize, ranges: Ranges) {
        for (sector, sectors) in ranges.as_slice() {
            for mask in World::words(*sector, *sectors) {
                let dirty = &mut self.volumes[volume].dirty;
                self.marked += u64::from((mask & !*dirty).count_ones());
                *dirty |= mask;
            }
        }
    }

    pub(crate) fn volume_mut(&mut self, volume: VolumeIndex) -> &mut SimVolume {
        &mut self.volumes[usize::from(volume.0)]
    }
}
