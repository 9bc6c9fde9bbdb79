//! One schedule: a machine, an agent with the real tracker, a replica that opens what the agent seals.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use block::{
    ByteCount, Consistency, Epoch, GRANULE_BYTES, Generation, Granule, GroupId, UnixNanos, VolumeId,
};
use bytes::Bytes;
use capture::{
    Answer, Comparer, Progress, Question, Source, Tap, Tracker, TrackerLimits, Verdict, VolumeIndex,
};
use changeset::{
    Fold, GranuleDigest, GroupKey, Level, Opener, Payload, SealOptions, Stamp, VolumeInfo, seal,
};

use crate::kernel::{Config, GRANULE, World};
use crate::met::Met;
use crate::mutation::Mutation;
use crate::oracle::Value;
use crate::rng::Rng;
use crate::tap::{Shared, SimDisk, SimTap, sides, write_sector};

const GROUP: GroupId = GroupId([7; 16]);
const KEY: [u8; 32] = [9; 32];
/// The tracker's pause after a failed read is ten ticks.
pub(crate) const NANOS_PER_TICK: u64 = 100_000_000;
/// A sector that holds what no write put there.
const GARBLED: Value = Value::MAX;
/// When nothing is written any more, everything is drained, consumed and offered within so many turns.
const SETTLE_TURNS_MAX: usize = 20_000;

fn pace(rng: &mut Rng) -> Pace {
    Pace {
        turns: rng.between(20, 500),
        kernel: *rng.pick(&[60, 75, 90]),
        cuts: *rng.pick(&[3, 10, 30]),
        cuts_behind: *rng.pick(&[10, 30, 100, 100]),
        suspects: *rng.pick(&[0, 2, 10]),
        traps: *rng.pick(&[0, 0, 4, 15]),
        crashes: *rng.pick(&[0, 0, 1, 4]),
        deliveries: *rng.pick(&[100, 100, 30, 5]),
        quiet: rng.percent(80),
        pressure: *rng.pick(&[0, 0, 0, 10, 60]),
    }
}

fn config(rng: &mut Rng, mutation: Option<Mutation>) -> Config {
    // Most schedules meet one or two troubles, so that there is quiet between them; some meet all.
    let mut troubles = [0; 10];
    if rng.percent(10) {
        troubles = [3; 10];
    } else {
        for _ in 0..2 {
            *rng.pick_mut(&mut troubles) = *rng.pick(&[1, 4, 15]);
        }
    }
    let [
        mut failures,
        mut requeues,
        partials,
        mut skipped_issues,
        skipped_completions,
        mut handled_twice,
        passthrough,
        encrypted,
        unreadable,
        read_errors,
    ] = troubles;
    // A write that nobody saw leaves no trace but in the disks' counts: they must be exact then, which they are not where
    // something ends twice for us, or where the disk never pauses. There every write has a slot, and none fails.
    let (mut left_out, mut left_out_twice) = (0, 0);
    let mut every_slot = false;
    let mut unquiet = false;
    let mut hasty = false;
    let aimed = mutation.is_some_and(Mutation::is_about_unseen_ends);
    match if aimed { 6 } else { rng.below(20) } {
        0..3 => {
            (left_out, left_out_twice) = *rng.pick(&[(15, 0), (0, 3), (3, 3), (3, 1)]);
            (handled_twice, requeues, skipped_issues) = (0, 0, 0);
        }
        3..6 => {
            left_out = *rng.pick(&[3, 15]);
            (skipped_issues, failures) = (0, 0);
            every_slot = true;
            unquiet = rng.percent(50);
        }
        6 | 7 => {
            (left_out, left_out_twice) = *rng.pick(&[(15, 0), (50, 0), (15, 3), (50, 3)]);
            (handled_twice, requeues, skipped_issues, failures) = (0, 0, 0, 0);
            (every_slot, hasty) = (left_out_twice == 0, true);
        }
        _ => {}
    }
    let mut sometimes =
        |percent: usize, rates: &[usize]| if rng.percent(percent) { *rng.pick(rates) } else { 0 };
    let discards = sometimes(50, &[5, 20]);
    let zeroes = sometimes(50, &[5, 20]);
    let stalls = sometimes(80, &[5, 20, 50]);
    let volumes = (0..*rng.pick(&[1, 2, 2, 2, 3]))
        .map(|_| GRANULE * *rng.pick(&[0, 1, 1, 2]) + rng.between(8, 24) as u64)
        .collect();
    let (preemption, preempted_steps) =
        *rng.pick(&[(0, 0), (3, 10), (50, 4), (10, 20), (5, 60), (1, 300), (2, 300)]);
    Config {
        volumes,
        dense: rng.percent(15),
        processors: rng.between(1, 4),
        tags: if hasty { *rng.pick(&[1, 2, 3]) } else { *rng.pick(&[1, 3, 5, 8, 12]) },
        hot: rng.percent(30),
        eager: if hasty { 100 } else { *rng.pick(&[100, 40, 15, 5]) },
        buckets: rng.between(1, 2),
        slots: if every_slot || hasty { 12 } else { *rng.pick(&[1, 2, 8, 8, 8, 8, 8, 8]) },
        ring_bytes: *rng.pick(&[1 << 13, 1 << 14, 1 << 15, 1 << 17, 1 << 17, 1 << 17, 1 << 17]),
        data_mode: rng.percent(97),
        failures,
        requeues,
        partials,
        skipped_issues,
        skipped_completions,
        handled_twice,
        left_out,
        left_out_twice,
        flushes: if rng.percent(50) { 50 } else { 0 },
        every_slot,
        unquiet,
        passthrough,
        encrypted,
        discards,
        zeroes,
        unreadable,
        read_errors,
        read_pace: *rng.pick(&[100, 100, 10, 3]),
        stall_pace: *rng.pick(&[10, 4, 1]),
        ring_stalls: *rng.pick(&[0, 0, 10, 40]),
        stalls,
        preemption,
        preempted_steps,
        hasty,
        traps: *rng.pick(&[0, 0, 0, 1]),
    }
}

/// How the agent and the kernel take turns.
struct Pace {
    turns: usize,
    /// Percentages.
    kernel: usize,
    cuts: usize,
    /// Cuts while records wait that the epoch does not hold.
    cuts_behind: usize,
    /// Traps while the agent is outside of its calls.
    traps: usize,
    /// Granules that the agent has reason to read again.
    suspects: usize,
    /// Turns in which the agent is killed, in percent; at a random step of its.
    crashes: usize,
    /// Turns in which the process server takes an epoch, and the agent hears of it.
    deliveries: usize,
    /// The initial copy comes before the first write.
    quiet: bool,
    /// How often the memory limit is next to nothing.
    pressure: usize,
}

/// An epoch on its way to the replica.
struct Sent {
    epoch: Epoch,
    pieces: Vec<Bytes>,
    consistency: Consistency,
    time: UnixNanos,
    /// When it was cut.
    tick: u64,
    in_flight: bool,
}

/// The way to the replica, shared with the tracker.
#[derive(Default)]
struct Way {
    questions: Vec<Question>,
    answers: Vec<Answer>,
}

/// Digests are the data's own: what a granule holds, as values.
struct SimComparer {
    shared: Shared,
    way: Arc<Mutex<Way>>,
    /// Calls with something suspect until it is compared, since nothing was; and how many of them there are each time.
    waits: u32,
    wait: u32,
    questions_max: usize,
}

impl Comparer for SimComparer {
    fn is_wanted(&mut self) -> Option<bool> {
        // As an agent's: while nothing is suspect no comparison runs.
        let world = self.shared.lock();
        let suspect = world.volumes.iter().any(|volume| volume.suspect != 0);
        self.waits = if suspect { self.waits.saturating_sub(1) } else { self.wait };
        (suspect && self.waits == 0).then_some(true)
    }

    fn digest(&self, _volume: VolumeIndex, granule: Granule, data: &[u8]) -> GranuleDigest {
        digest(granule, data)
    }

    fn ask(&mut self, question: Question) {
        let mut world = self.shared.lock();
        world.preempt();
        if !world.dead {
            self.way.lock().expect("one thread").questions.push(question);
        }
    }

    fn answer(&mut self) -> Option<Answer> {
        let mut world = self.shared.lock();
        world.preempt();
        if world.dead { None } else { self.way.lock().expect("one thread").answers.pop() }
    }

    fn questions_max(&self) -> usize {
        self.questions_max
    }
}

fn digest(granule: Granule, data: &[u8]) -> GranuleDigest {
    // All of a sector is in its first bytes, and what is compared here are honest digests.
    let mut sum = u128::from(granule.0);
    for sector in data.chunks(512) {
        let value = u64::from_le_bytes(sector[..8].try_into().expect("8 of 512 bytes"));
        sum = (sum ^ u128::from(value)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    sum.to_le_bytes()
}

struct Model {
    shared: Shared,
    way: Arc<Mutex<Way>>,
    /// Whether suspects are compared.
    compares: bool,
    tracker: Tracker<SimTap, SimDisk>,
    infos: Vec<VolumeInfo>,
    limits: TrackerLimits,
    outbox: VecDeque<Sent>,
    /// The last epoch that the replica has, and the last that the agent knows of.
    held: Epoch,
    told: Epoch,
    mutation: Option<Mutation>,
    limit: ByteCount,
    read: ByteCount,
    spare: Option<Fold>,
    epoch: Epoch,
    replica: Vec<Value>,
    bases: Vec<usize>,
    /// No question is answered before the replica has this.
    as_of: Epoch,
    /// The first instant that suits the last point.
    instant: u64,
    met: Met,
}

impl Model {
    fn now(&self) -> UnixNanos {
        UnixNanos(self.shared.lock().now * NANOS_PER_TICK)
    }

    fn steps(&self, count: usize) {
        let mut world = self.shared.lock();
        for _ in 0..count {
            world.step();
        }
    }

    /// R9: what the open epoch holds stays below the limit, but for the last thing that was folded into it.
    fn advance(&mut self, limit: ByteCount) -> Result<Progress, String> {
        let (now, full) = (self.now(), self.tracker.open_bytes() >= limit);
        self.shared.lock().handed = (0, 0);
        let progress = self.tracker.advance(now, limit).map_err(|error| error.to_string())?;
        if self.start_again_if_dead() {
            return Ok(Progress::Busy);
        }
        let (data, zeroes) = self.shared.lock().handed;
        // A zero range may make room; data never does.
        if full && data > 1 && zeroes == 0 {
            return Err(format!("memory was full, and {data} records were taken"));
        }
        let bound = self.limit + self.read + ByteCount(GRANULE_BYTES);
        if self.tracker.open_bytes() > bound {
            return Err(format!("the open epoch holds {}, over {bound}", self.tracker.open_bytes()));
        }
        self.met.full += u64::from(progress == Progress::Full);
        Ok(progress)
    }

    /// R8: an agent that was killed is followed by another. Epochs on their way are gone.
    fn start_again_if_dead(&mut self) -> bool {
        if !self.shared.lock().dead {
            return false;
        }
        self.shared.lock().agent_gone();
        self.met.epochs_dropped += self.outbox.len() as u64;
        self.outbox.clear();
        (self.epoch, self.told) = (self.held, self.held);
        let (tap, disk) = sides(&self.shared);
        let now = self.now();
        self.tracker = Tracker::new(tap, disk, self.infos.clone(), self.limits, now);
        self.compare();
        if self.mutation == Some(Mutation::RoundsOverlap) {
            self.tracker.let_rounds_overlap();
        }
        self.tracker.acknowledged(self.held);
        true
    }

    /// Cuts, and sends the epoch on its way. Whether it is to be offered.
    fn cut(&mut self) -> Result<bool, String> {
        let reuse = self.spare.take().unwrap_or_default();
        let epoch = self.epoch.next();
        let mut cut = self.tracker.cut(reuse, epoch);
        if self.mutation == Some(Mutation::OfferedWhileDraining) {
            let offered = self.tracker.tap().dirty_at_most() == 0;
            cut.consistency = if offered { Consistency::Crash } else { Consistency::None };
        }
        if self.shared.lock().dead {
            cut.fold.clear();
            self.spare = Some(cut.fold);
            self.start_again_if_dead();
            return Ok(false);
        }
        self.met.cuts += 1;
        self.epoch = epoch;
        let (tick, in_flight) = {
            let world = self.shared.lock();
            (world.now, !world.at_rest())
        };
        let (consistency, time) = (cut.consistency, cut.time);
        let mut sent = Sent { epoch, pieces: Vec::new(), consistency, time, tick, in_flight };
        if !cut.fold.is_empty() {
            let key = GroupKey::from_bytes(KEY);
            let (consistency, cut_time) = (cut.consistency, cut.time);
            let stamp = Stamp { group: GROUP, generation: Generation(1), epoch, consistency, cut_time };
            let options = SealOptions { level: Level::Store, threads: 1 };
            let sealed = seal(&stamp, &self.tracker.volumes(), &cut.fold, &key, options);
            sent.pieces = sealed.map_err(|error| error.to_string())?.pieces;
        }
        cut.fold.clear();
        self.spare = Some(cut.fold);
        self.outbox.push_back(sent);
        Ok(cut.consistency.is_point())
    }

    /// The replica takes the next epoch, and the oracle is asked when it is offered.
    fn deliver(&mut self) -> Result<(), String> {
        let Some(sent) = self.outbox.pop_front() else { return Ok(()) };
        self.held = sent.epoch;
        if !sent.pieces.is_empty() {
            self.apply(sent.pieces)?;
        }
        if !sent.consistency.is_point() {
            return Ok(());
        }
        self.met.points += 1;
        self.met.points_in_flight += u64::from(sent.in_flight);
        if self.mutation == Some(Mutation::WritesRace) {
            return Ok(());
        }
        let world = self.shared.lock();
        let what = |error: String| format!("epoch {} of tick {}: {error}", sent.epoch, sent.tick);
        let (first, last) = world.history.possible(&self.replica, self.instant, sent.tick).map_err(what)?;
        world.history.untorn(&self.replica).map_err(what)?;
        if sent.time.0 / NANOS_PER_TICK > last {
            let error =
                format!("dated {}, but its state is of {last} at the latest", sent.time.0 / NANOS_PER_TICK);
            return Err(what(error));
        }
        self.instant = first;
        Ok(())
    }

    /// What a new tracker compares with: questions of the one before are not answered any more.
    fn compare(&mut self) {
        if !self.compares {
            return;
        }
        self.way = Arc::default();
        let mut world = self.shared.lock();
        let (wait, questions_max) = (world.rng.below(4) as u32 * 20 + 1, world.rng.between(1, 4));
        drop(world);
        let (shared, way) = (self.shared.clone(), self.way.clone());
        // The number of the last epoch may be one that an earlier agent gave.
        self.as_of = self.epoch;
        self.tracker.compare_with(Box::new(SimComparer { shared, way, waits: wait, wait, questions_max }));
    }

    /// The replica answers what it can by now.
    fn answer(&mut self) {
        let (early, trusting) = (
            self.mutation == Some(Mutation::ComparedTooEarly),
            self.mutation == Some(Mutation::DifferentTrusted),
        );
        let mut way = self.way.lock().expect("one thread");
        let Way { questions, answers } = &mut *way;
        let ready = |question: &Question| early || self.held >= question.as_of.max(self.as_of);
        let Some(which) = questions.iter().position(ready) else { return };
        let Question { number, volume, granules, .. } = questions.swap_remove(which);
        let base = self.bases[usize::from(volume.0)];
        let sectors = (self.infos[usize::from(volume.0)].size.0 / 512) as usize;
        let different = |(granule, found): &&(Granule, GranuleDigest)| {
            let first = granule.0 as usize * GRANULE as usize;
            let last = (first + GRANULE as usize).min(sectors);
            let mut data = vec![0; (last - first) * 512];
            for (index, sector) in (first..last).enumerate() {
                let value = self.replica[base + sector];
                if value != 0 {
                    write_sector(&mut data[index * 512..], value, base + sector);
                }
            }
            digest(*granule, &data) != *found
        };
        let different: Vec<Granule> =
            granules.iter().filter(different).map(|(granule, _)| *granule).collect();
        self.met.compared_different += different.len() as u64;
        self.met.compared_same += (granules.len() - different.len()) as u64;
        let verdict = match (different.is_empty() || trusting, self.shared.lock().rng.percent(5)) {
            (_, true) => Verdict::Unknown,
            (true, _) => Verdict::Same,
            (false, _) => Verdict::Differs(different),
        };
        answers.push(Answer { number, verdict });
    }

    /// The agent hears what is held.
    fn tell(&mut self) {
        if self.told < self.held {
            self.told = self.held;
            self.tracker.acknowledged(self.held);
            self.start_again_if_dead();
        }
    }

    /// What the target does: everything through the sealed format.
    fn apply(&mut self, pieces: Vec<Bytes>) -> Result<(), String> {
        let mut opener = Opener::new(GroupKey::from_bytes(KEY), GROUP, 1);
        for piece in pieces {
            opener.push(piece).map_err(|error| error.to_string())?;
        }
        let changeset = opener.finish().map_err(|error| error.to_string())?;
        for change in changeset.changes() {
            let first = self.bases[usize::from(change.volume)] + (change.extent.offset().0 / 512) as usize;
            let sectors = (change.extent.length().0 / 512) as usize;
            match change.payload {
                Payload::Zero => self.replica[first..first + sectors].fill(0),
                Payload::Data(data) => {
                    for (index, bytes) in data.chunks_exact(512).enumerate() {
                        self.replica[first + index] = value_of(bytes, first + index);
                    }
                }
            }
        }
        Ok(())
    }

    /// Nothing is written any more: everything must come to rest, and the replica be equal.
    fn settle(&mut self) -> Result<(), String> {
        self.shared.lock().fuse = None;
        self.start_again_if_dead();
        self.shared.lock().writing = false;
        for _ in 0..SETTLE_TURNS_MAX {
            self.steps(4);
            if self.advance(self.limit)? == Progress::Full || self.shared.lock().rng.percent(10) {
                self.cut()?;
            }
            let rest = {
                let world = self.shared.lock();
                world.at_rest() && world.ring.consumed == world.ring.produced
            };
            let settled = rest && self.tracker.consistency().is_point() && self.cut()?;
            while !self.outbox.is_empty() {
                self.deliver()?;
            }
            self.tell();
            self.answer();
            if settled {
                let world = self.shared.lock();
                let source = world.volumes.iter().flat_map(|volume| &volume.platter);
                let differs = source.zip(&self.replica).position(|(source, replica)| source != replica);
                return differs.map_or(Ok(()), |sector| {
                    Err(format!(
                        "at rest, but sector {sector} of the replica holds {:#x}",
                        self.replica[sector]
                    ))
                });
            }
        }
        Err(format!("nothing is written any more, but no point after {SETTLE_TURNS_MAX} turns"))
    }
}

fn value_of(bytes: &[u8], sector: usize) -> Value {
    let (value, rest) = bytes.split_at(4);
    let value = Value::from_le_bytes(value.try_into().expect("4 bytes"));
    let found = u32::from_le_bytes(rest[..4].try_into().expect("4 bytes"));
    let expected = if value == 0 { 0 } else { sector as u32 };
    if found == expected { value } else { GARBLED }
}

/// Runs the schedule of a seed.
///
/// `folds` are kept from schedule to schedule, because a new one fills a megabyte with zeroes.
pub(crate) fn run(seed: u64, mutation: Option<Mutation>, folds: &mut Vec<Fold>) -> Result<Met, String> {
    let mut rng = Rng::new(seed);
    let (config, pace) = (config(&mut rng, mutation), pace(&mut rng));
    let read = GRANULE_BYTES * rng.between(1, 2) as u64;
    let lanes = ByteCount(*rng.pick(&[1024, 4096, 1 << 20]));
    let limits = TrackerLimits {
        read: ByteCount(read),
        reads: rng.between(1, 3),
        lanes,
        share: *rng.pick(&[100, 100, 30, 1]),
    };
    let limit = ByteCount(*rng.pick(&[read * 4 / 3 + 4096, read * 2, 1 << 20, 1 << 20]));

    let world = World::new(config, mutation, Rng::new(rng.next()));
    let infos: Vec<VolumeInfo> = world
        .volumes
        .iter()
        .zip(0..)
        .map(|(volume, index)| VolumeInfo {
            id: VolumeId([index; 16]),
            name: format!("disk{index}"),
            size: ByteCount(volume.sectors * 512),
            logical_block: 512,
        })
        .collect();
    let bases: Vec<usize> = world.volumes.iter().map(|volume| volume.base).collect();
    let sectors = world.volumes.iter().map(|volume| volume.platter.len()).sum();
    let now = UnixNanos(world.now * NANOS_PER_TICK);
    let shared = Shared::new(world);
    let (tap, disk) = sides(&shared);
    let mut tracker = Tracker::new(tap, disk, infos.clone(), limits, now);
    // The fold that a tracker begins with is new; one that was used before takes its place.
    tracker.cut(folds.pop().unwrap_or_default(), Epoch::NONE);
    let mut model = Model {
        shared,
        way: Arc::default(),
        compares: rng.percent(50),
        as_of: Epoch::NONE,
        tracker,
        infos,
        limits,
        outbox: VecDeque::new(),
        held: Epoch::NONE,
        told: Epoch::NONE,
        mutation,
        limit,
        read: limits.read,
        spare: folds.pop(),
        epoch: Epoch::NONE,
        replica: vec![0; sectors],
        bases,
        instant: 0,
        met: Met::default(),
    };
    if mutation == Some(Mutation::RoundsOverlap) {
        model.tracker.let_rounds_overlap();
    }
    model.compare();
    let result = model.play(&mut rng, pace);
    let told = format!("{:?}, limit {limit}, {limits:?}", model.shared.lock().config);
    result.map_err(|error| format!("{error}\n{told}"))?;
    folds.extend(model.spare.take());
    folds.push(model.tracker.cut(Fold::new(), model.epoch.next()).fold);
    folds.iter_mut().for_each(Fold::clear);
    let mut met = model.shared.lock().met;
    (met.compared_same, met.compared_different) = (model.met.compared_same, model.met.compared_different);
    (met.cuts, met.points, met.points_in_flight, met.full, met.epochs_dropped) = (
        model.met.cuts,
        model.met.points,
        model.met.points_in_flight,
        model.met.full,
        model.met.epochs_dropped,
    );
    Ok(met)
}

impl Model {
    fn play(&mut self, rng: &mut Rng, pace: Pace) -> Result<(), String> {
        if pace.quiet {
            // The initial copy without disturbance, so that what follows meets data mode at once.
            self.shared.lock().writing = false;
            for _ in 0..400 {
                self.steps(4);
                if self.advance(self.limit)? == Progress::Full || self.compares && rng.percent(20) {
                    self.cut()?;
                }
                if self.compares {
                    self.deliver()?;
                    self.tell();
                    self.answer();
                }
                if self.tracker.consistency().is_point() {
                    break;
                }
            }
            self.shared.lock().writing = true;
        }
        for _ in 0..pace.turns {
            if rng.percent(pace.traps) {
                self.shared.lock().trap();
            } else if rng.percent(pace.kernel) {
                self.steps(*rng.pick(&[1, 2, 5, 12]));
                continue;
            }
            if rng.percent(pace.suspects) {
                let volume = VolumeIndex(rng.below(self.bases.len()) as u16);
                let granule = rng.below(self.tracker.tap().granules(volume) as usize) as u64;
                self.tracker.tap().mark_dirty(volume, Granule(granule));
            }
            let lost = self.shared.lock().volumes.iter().any(|volume| volume.lost);
            if pace.crashes > 0 && lost && rng.percent(30) {
                self.shared.lock().fuse = Some(rng.between(1, 6) as u32); // while it acts on the loss
            } else if rng.percent(pace.crashes) {
                self.shared.lock().fuse = Some(rng.between(1, 60) as u32);
            }
            if rng.percent(pace.deliveries) {
                self.deliver()?;
            }
            if rng.percent(pace.deliveries) {
                self.tell();
            }
            if rng.percent(pace.deliveries) {
                self.answer();
            }
            // What waits to be sent leaves the open epoch little room.
            let limit = if rng.percent(pace.pressure) { ByteCount(8192) } else { self.limit };
            let full = self.advance(limit)? == Progress::Full;
            let lags = {
                let world = self.shared.lock();
                world.ring.consumed < world.ring.produced
            };
            if rng.percent(if full {
                30
            } else if lags {
                pace.cuts_behind
            } else {
                pace.cuts
            }) {
                self.cut()?;
            }
        }
        self.settle()
    }
}
