//! The two programs of bpf/capture.bpf.c, step by step. What the C does between two steps here, no other party can see.
//!
//! Of the copies that close R11's hole only the effects are here: an issue that every copy skipped (a missed write), and an
//! event that a second copy handles again because an interrupt in between made it forget the first.

use crate::kernel::{Kind, Ranges, World};
use crate::mutation::Mutation;
use crate::oracle::WriteId;
use crate::ring::{PIECE_BYTES, RANGE_BYTES, SimRecord, State};

/// An entry of `inflight`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) tag: usize,
    phase: usize,
    pub(crate) missed: bool,
    /// Told apart from another of the same request in the same phase, which the kernel's table cannot.
    pub(crate) write: WriteId,
    pub(crate) volume: usize,
    pub(crate) ranges: Ranges,
    pub(crate) requeued: bool,
    /// Found stale; not since it was used again.
    pub(crate) doubted: bool,
    /// For [`Mutation::LeftAtIssue`].
    pub(crate) left: bool,
}

impl Slot {
    /// Whether the kernel's table would hold the same value.
    pub(crate) fn looks_like(&self, other: &Slot) -> bool {
        (self.tag, self.phase, self.missed) == (other.tag, other.phase, other.missed)
    }
}

pub(crate) type Place = (usize, usize);

#[derive(Clone, Copy, Debug)]
enum IssueAt {
    FindSlot,
    /// What its request wrote before has ended unseen.
    Reuse {
        place: Place,
        before: Slot,
        step: u32,
    },
    ReadPhase,
    ClaimSlot,
    LookAtBits {
        range: usize,
        word: usize,
    },
    Release,
    Reserve {
        range: usize,
        done: u64,
    },
    Submit {
        range: usize,
        done: u64,
        sectors: u64,
        start: u64,
    },
    End,
}

/// `on_issue`, running on a processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Issue {
    tag: usize,
    lane: u32,
    slow: bool,
    at: IssueAt,
    phase: usize,
    slot: Option<Place>,
    records: u32,
    failed: bool,
    trusted: bool,
    /// A later copy of the program.
    again: bool,
}

impl Issue {
    pub(crate) fn new(tag: usize, lane: u32, slow: bool) -> Issue {
        Issue {
            tag,
            lane,
            slow,
            at: IssueAt::FindSlot,
            phase: 0,
            slot: None,
            records: 0,
            failed: false,
            trusted: false,
            again: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CompletionAt {
    Find,
    CountMark {
        range: usize,
        word: usize,
    },
    SetMark {
        range: usize,
        word: usize,
    },
    CorrectMark {
        range: usize,
        word: usize,
    },
    FreeSlot,
    Visible,
    /// Its data has ended, and the disk's cache is being flushed.
    Flush,
    /// For [`Mutation::CountedTooLate`].
    CountLate,
}

/// `on_complete`, running on some processor, and what follows: the request's end is seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    tag: usize,
    error: bool,
    done: u64,
    whole: bool,
    slow: bool,
    again: bool,
    seen: bool,
    at: CompletionAt,
    slot: Option<Place>,
    skipped: bool,
    volume: usize,
    ranges: Ranges,
    mask: u64,
    before: u64,
    /// For [`Mutation::CountedTooLate`].
    uncounted: u64,
}

impl World {
    pub(crate) fn slot_of(&self, tag: usize) -> Option<Place> {
        let bucket = tag % self.buckets.len();
        let slot = self.buckets[bucket].iter().position(|slot| slot.is_some_and(|slot| slot.tag == tag))?;
        Some((bucket, slot))
    }

    pub(crate) fn slot(&mut self, (bucket, slot): Place) -> &mut Option<Slot> {
        &mut self.buckets[bucket][slot]
    }

    pub(crate) fn issue_step(&mut self, processor: usize) {
        let stalls = self.processors[processor].is_some_and(|run| run.slow);
        if !stalls || self.rng.percent(self.config.stall_pace) {
            self.issue_on(processor);
        }
    }

    pub(crate) fn issue_on(&mut self, processor: usize) {
        let Some(mut run) = self.processors[processor] else { return };
        if !self.issue_program(&mut run) {
            self.processors[processor] = Some(run);
        } else if !run.again && self.rng.percent(self.config.handled_twice) {
            self.met.handled_twice += 1;
            self.processors[processor] =
                Some(Issue { again: true, ..Issue::new(run.tag, run.lane, run.slow) });
        } else {
            let captured = matches!(run.at, IssueAt::End) && !run.failed;
            self.processors[processor] = None;
            self.take_off(run.tag, captured);
        }
    }

    /// One step; true at the program's end.
    fn issue_program(&mut self, run: &mut Issue) -> bool {
        let request = self.requests[run.tag].as_ref().expect("a request that is being issued");
        let (kind, ranges, write, volume) = (request.kind, request.ranges, request.write, request.volume);
        let is_ranges = matches!(kind, Kind::Discard | Kind::Zeroes);
        let look_first = self.is(Mutation::LookedBeforeClaiming);
        let look = IssueAt::LookAtBits { range: 0, word: 0 };
        let copy = IssueAt::Reserve { range: 0, done: 0 };
        match run.at {
            IssueAt::FindSlot => {
                let trusted =
                    self.config.data_mode && (!request.encrypted() || self.is(Mutation::PlaintextTrusted));
                if let Some(place) = self.slot_of(run.tag) {
                    if !self.is(Mutation::RequeueIgnored) {
                        self.miss_slot(run.tag);
                        self.history.missed(write);
                        let slot = self.slot(place).as_mut().expect("found");
                        let before = *slot;
                        (slot.requeued, slot.doubted) = (false, false);
                        self.met.stale += u64::from(before.write != write);
                        run.at = IssueAt::Reuse { place, before, step: 0 };
                        return false;
                    }
                    return true;
                }
                if kind == Kind::Passthrough {
                    return true;
                }
                run.trusted = trusted && !(is_ranges && self.is(Mutation::DiscardIgnored));
                run.at = if look_first && run.trusted { look } else { IssueAt::ReadPhase };
            }
            IssueAt::Reuse { place, before, step } => {
                match step {
                    0 if self.is(Mutation::StaleIgnored) => {}
                    // Before it is counted: what is counted is taken for dirty.
                    0 => self.mark_at_once(before.volume, before.ranges),
                    1 if before.requeued => {}
                    1 => self.count_mended(before.volume, before.ranges.total()),
                    _ => {
                        if let Some(slot) = self.slot(place) {
                            (slot.write, slot.volume, slot.ranges) = (write, volume, ranges);
                        }
                        if kind == Kind::Passthrough {
                            *self.slot(place) = None;
                        }
                        return true;
                    }
                }
                run.at = IssueAt::Reuse { place, before, step: step + 1 };
            }
            IssueAt::ReadPhase => {
                run.phase = self.phase;
                run.at = IssueAt::ClaimSlot;
            }
            IssueAt::ClaimSlot => {
                let bucket = run.tag % self.buckets.len();
                let Some(free) = self.buckets[bucket].iter().position(Option::is_none) else {
                    self.met.missed_slot += 1;
                    return true;
                };
                let (tag, phase, missed) = (run.tag, run.phase, !run.trusted);
                self.buckets[bucket][free] = Some(Slot {
                    tag,
                    phase,
                    missed,
                    write,
                    volume,
                    ranges,
                    requeued: false,
                    doubted: false,
                    left: false,
                });
                if missed {
                    self.met.missed_copy += 1;
                    return true;
                }
                run.slot = Some((bucket, free));
                run.at = if look_first { copy } else { look };
            }
            IssueAt::LookAtBits { range, word } => {
                let (sector, sectors) = ranges.as_slice()[range];
                let mut words = World::words(sector, sectors).skip(word);
                let volume = &self.volumes[volume];
                let dirty = if self.is(Mutation::DirtyCaptured) { 0 } else { volume.dirty };
                let draining = if self.is(Mutation::DrainingCaptured) { 0 } else { volume.draining };
                run.at = if words.next().is_some_and(|mask| (dirty | draining) & mask != 0) {
                    IssueAt::Release
                } else if words.next().is_some() {
                    IssueAt::LookAtBits { range, word: word + 1 }
                } else if range + 1 < ranges.as_slice().len() {
                    IssueAt::LookAtBits { range: range + 1, word: 0 }
                } else if look_first {
                    IssueAt::ReadPhase
                } else {
                    copy
                };
            }
            IssueAt::Release => {
                self.met.missed_dirty += 1;
                if let Some(place) = run.slot.take()
                    && let Some(slot) = self.slot(place)
                {
                    slot.missed = true;
                }
                return true;
            }
            IssueAt::Reserve { range, done } => {
                let (sector, length) = ranges.as_slice()[range];
                // A page's part may be any number of sectors up to 8.
                let sectors =
                    if is_ranges { length } else { (length - done).min(self.rng.between(1, 8) as u64) };
                let last =
                    if is_ranges { range + 1 == ranges.as_slice().len() } else { done + sectors == length };
                let record = SimRecord {
                    start: 0,
                    end: 0,
                    state: State::Busy,
                    volume: volume as u16,
                    sector: sector + done,
                    sectors,
                    data: (!is_ranges).then(|| self.requests[run.tag].as_ref().map_or(0, |rq| rq.memory)),
                    lane: run.lane,
                    first: run.records == 0,
                    last,
                };
                let bytes = if is_ranges { RANGE_BYTES } else { PIECE_BYTES };
                let Some(start) = self.ring.reserve(bytes, record) else {
                    self.met.missed_ring += 1;
                    self.met.missed_ring_inside += u64::from(run.records > 0);
                    run.failed = !self.is(Mutation::OverflowIgnored);
                    run.at = IssueAt::End;
                    return false;
                };
                run.slow |= self.rng.percent(self.config.ring_stalls);
                run.at = IssueAt::Submit { range, done, sectors, start };
            }
            IssueAt::Submit { range, done, sectors, start } => {
                if !is_ranges && self.rng.percent(self.config.unreadable) {
                    self.ring.finish(start, State::Discarded);
                    self.met.missed_copy += 1;
                    run.failed = true;
                    run.at = IssueAt::End;
                    return false;
                }
                self.ring.finish(start, State::Submitted);
                run.records += 1;
                let (_, length) = ranges.as_slice()[range];
                run.at = if done + sectors < length {
                    IssueAt::Reserve { range, done: done + sectors }
                } else if range + 1 < ranges.as_slice().len() {
                    IssueAt::Reserve { range: range + 1, done: 0 }
                } else {
                    IssueAt::End
                };
                if matches!(run.at, IssueAt::End) {
                    self.history.captured(write);
                }
            }
            IssueAt::End => {
                if run.failed {
                    let place = run.slot.expect("claimed before");
                    self.slot(place).as_mut().expect("in flight until it completes").missed = true;
                } else {
                    self.met.captured += 1;
                    self.met.several_records += u64::from(run.records > 1);
                }
                if self.is(Mutation::LeftAtIssue)
                    && let Some(place) = run.slot
                {
                    self.slot(place).as_mut().expect("in flight until it completes").left = true;
                }
                return true;
            }
        }
        false
    }

    /// A request in flight is missed from now on.
    pub(crate) fn miss_slot(&mut self, tag: usize) {
        if let Some(place) = self.slot_of(tag)
            && let Some(slot) = self.slot(place)
        {
            slot.missed = true;
            let write = slot.write;
            self.history.missed(write);
        }
    }

    /// Its end was not seen.
    fn count_mended(&mut self, volume: usize, sectors: u64) {
        let volume = &mut self.volumes[volume];
        volume.ended += sectors;
        volume.mended += sectors;
    }

    /// What `on_suspects` asks: whether the request of a slot does something else now.
    pub(crate) fn is_stale(&self, slot: &Slot) -> bool {
        let same = |request: &crate::kernel::Request| {
            let first = |ranges: &Ranges| ranges.as_slice()[0].0;
            let flushing = request.flushing && !self.is(Mutation::FlushingInFlight);
            request.volume == slot.volume && first(&request.ranges) == first(&slot.ranges) && !flushing
        };
        !self.requests[slot.tag].as_ref().is_some_and(same)
    }

    /// `on_suspects` of one slot, as it was noted: if it is stale still, frees it and marks what its write wrote.
    pub(crate) fn mend(&mut self, place: Place, noted: &Slot) {
        let undoubted = self.is(Mutation::Undoubted);
        let same = |slot: &Slot| slot.looks_like(noted) && (slot.doubted || undoubted);
        let Some(slot) = self.slot(place).filter(same) else { return };
        if !self.is_stale(&slot) {
            if let Some(slot) = self.slot(place) {
                slot.doubted = false;
            }
            return;
        }
        let ended = self.part_ended(&slot);
        self.preempt();
        self.use_again(slot.tag);
        if !self.slot(place).is_some_and(|slot| same(&slot)) {
            return;
        }
        *self.slot(place) = None;
        self.preempt();
        self.mark_at_once(slot.volume, slot.ranges);
        self.preempt();
        self.count_mended(slot.volume, ended);
        self.met.mended += 1;
    }

    /// How many sectors of a stale slot's write have ended.
    pub(crate) fn part_ended(&self, slot: &Slot) -> u64 {
        let part = self.requests[slot.tag].as_ref().and_then(|request| {
            let (now, (sector, sectors)) = (request.ranges.as_slice()[0].0, slot.ranges.as_slice()[0]);
            let moved = now.checked_sub(sector)?;
            (slot.ranges.as_slice().len() == 1 && moved > 0 && moved < sectors).then_some(moved)
        });
        part.unwrap_or(slot.ranges.total())
    }

    /// Places in flight and what is there.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (Place, Slot)> {
        let places = self.buckets.iter().enumerate();
        places.flat_map(|(bucket, slots)| {
            slots.iter().enumerate().filter_map(move |(place, slot)| Some(((bucket, place), (*slot)?)))
        })
    }

    /// The disk says that a request, or the first `done` sectors of it, has ended.
    pub(crate) fn complete(&mut self, tag: usize, error: bool, done: u64) {
        let slow = self.slow();
        let request = self.requests[tag].as_ref().expect("a request in flight");
        let whole = done == request.ranges.sectors().count() as u64;
        let (volume, ranges) = (request.volume, request.ranges);
        let skipped =
            self.complete_attached && self.writing && self.rng.percent(self.config.skipped_completions);
        // The disks do not count what user space sends: a command of its that is left out leaves no trace.
        let counts = self.requests[tag].as_ref().is_some_and(|request| request.kind != Kind::Passthrough);
        let left_out = self.complete_attached
            && counts
            && (!self.config.every_slot || self.slot_of(tag).is_some())
            && (self.requests[tag].as_ref().is_some_and(|request| request.left_out)
                || self.writing && self.rng.percent(self.config.left_out));
        self.met.left_out += u64::from(left_out);
        if left_out {
            self.history.missed(self.requests[tag].as_ref().map_or(0, |request| request.write));
        }
        let skipped = skipped && !left_out;
        let seen = self.complete_attached && !skipped && !left_out;
        let at = if seen { CompletionAt::Find } else { CompletionAt::Visible };
        self.met.skipped += u64::from(skipped);
        if skipped {
            self.history.missed(self.requests[tag].as_ref().map_or(0, |request| request.write));
            self.skipped += u64::from(!self.is(Mutation::SkippedUncounted));
        }
        self.completions.push(Completion {
            tag,
            error,
            done,
            whole,
            slow,
            again: false,
            seen: false,
            at,
            slot: None,
            skipped: skipped || left_out,
            volume,
            ranges,
            mask: 0,
            before: 0,
            uncounted: 0,
        });
    }

    pub(crate) fn completion_step(&mut self, which: usize) {
        if !self.completions[which].slow || self.rng.percent(self.config.stall_pace * 2) {
            self.complete_on(which);
        }
    }

    pub(crate) fn complete_on(&mut self, which: usize) {
        let mut run = self.completions[which];
        if self.completion_program(&mut run) {
            self.completions.swap_remove(which);
        } else {
            self.completions[which] = run;
        }
    }

    fn next_mark(&self, run: &Completion, range: usize, word: usize) -> CompletionAt {
        let (sector, sectors) = run.ranges.as_slice()[range];
        if World::words(sector, sectors).nth(word + 1).is_some() {
            CompletionAt::CountMark { range, word: word + 1 }
        } else if range + 1 < run.ranges.as_slice().len() {
            CompletionAt::CountMark { range: range + 1, word: 0 }
        } else {
            CompletionAt::FreeSlot
        }
    }

    /// One step; true at the end.
    fn completion_program(&mut self, run: &mut Completion) -> bool {
        let late = self.is(Mutation::MarkedTooLate);
        match run.at {
            CompletionAt::Find => {
                let request = self.requests[run.tag].as_ref().expect("a request that completes");
                let (kind, write) = (request.kind, request.write);
                // The disk counts just after us, in some nanoseconds.
                if kind != Kind::Passthrough {
                    let volume = &mut self.volumes[run.volume];
                    volume.ended += run.done;
                    volume.ended_kernel += if run.again { 0 } else { run.done };
                }
                if kind == Kind::Passthrough {
                    if !self.is(Mutation::PassthroughIgnored) {
                        self.volumes[run.volume].lost = true;
                        self.met.lost += 1;
                    }
                    run.at = CompletionAt::Visible;
                    return false;
                }
                run.slot = self.slot_of(run.tag);
                let value = run.slot.and_then(|place| *self.slot(place));
                let discard =
                    matches!(kind, Kind::Discard | Kind::Zeroes) && self.is(Mutation::DiscardIgnored);
                let unseen = value.is_none() && !self.is(Mutation::UnseenIgnored) && !discard;
                let error = run.error && !self.is(Mutation::FailureIgnored);
                let missed = value.is_some_and(|slot| slot.missed);
                self.met.unseen += u64::from(value.is_none());
                if run.error {
                    self.history.missed(write);
                }
                let marks = (unseen || missed) && !self.is(Mutation::MarkedAtIssue) || error;
                run.at = if marks {
                    if late {
                        run.seen = true;
                        self.seen(run.tag, run.done);
                    }
                    CompletionAt::CountMark { range: 0, word: 0 }
                } else {
                    CompletionAt::FreeSlot
                };
            }
            CompletionAt::CountMark { range, word } => {
                let (sector, sectors) = run.ranges.as_slice()[range];
                run.mask = World::words(sector, sectors).nth(word).expect("a word of the range");
                if self.volumes[run.volume].dirty & run.mask == run.mask {
                    run.before = run.mask; // all of them are dirty already: nothing is counted
                    run.at = self.next_mark(run, range, word);
                    return false;
                }
                if !self.is(Mutation::CountedTooLate) {
                    self.marked += u64::from(run.mask.count_ones());
                }
                run.at = CompletionAt::SetMark { range, word };
            }
            CompletionAt::SetMark { range, word } => {
                let dirty = &mut self.volumes[run.volume].dirty;
                run.before = *dirty;
                *dirty |= run.mask;
                run.at = CompletionAt::CorrectMark { range, word };
            }
            CompletionAt::CorrectMark { range, word } => {
                let already = u64::from((run.before & run.mask).count_ones());
                if self.is(Mutation::CountedTooLate) {
                    run.uncounted += u64::from(run.mask.count_ones()) - already;
                } else {
                    self.marked_again += already;
                }
                run.at = self.next_mark(run, range, word);
            }
            CompletionAt::FreeSlot => {
                run.at = match run.slot {
                    Some(place) if run.whole || run.error => {
                        *self.slot(place) = None;
                        CompletionAt::Visible
                    }
                    Some(place) => {
                        if let Some(slot) = self.slot(place)
                            && slot.ranges.as_slice()[0] == run.ranges.as_slice()[0]
                        {
                            slot.ranges = slot.ranges.without_first(run.done);
                        }
                        CompletionAt::Visible
                    }
                    None => CompletionAt::Visible,
                };
            }
            CompletionAt::Visible
                if !run.again && !run.seen && !run.skipped && self.rng.percent(self.config.handled_twice) =>
            {
                self.met.handled_twice += 1;
                (run.again, run.slot) = (true, None);
                run.at = if self.complete_attached { CompletionAt::Find } else { CompletionAt::Visible };
            }
            CompletionAt::Visible => {
                let unseen = run.skipped || !self.complete_attached;
                let passthrough =
                    self.requests[run.tag].as_ref().is_some_and(|request| request.kind == Kind::Passthrough);
                if unseen && !passthrough {
                    self.volumes[run.volume].ended_kernel += run.done;
                    if run.whole
                        && self.rng.percent(self.config.flushes)
                        && let Some(request) = &mut self.requests[run.tag]
                    {
                        request.flushing = true;
                        (run.slow, run.at) = (true, CompletionAt::Flush);
                        return false;
                    }
                }
                if !run.seen {
                    self.seen(run.tag, run.done);
                }
                self.released(run.tag, run.error, run.done);
                if run.uncounted == 0 {
                    return true;
                }
                run.at = CompletionAt::CountLate;
            }
            CompletionAt::Flush => {
                // The end of the flush is an event of its own, which may be seen.
                if let Some(place) = self.slot_of(run.tag)
                    && self.complete_attached
                    && self.rng.percent(50)
                    && let Some(slot) = self.slot(place).take()
                {
                    self.mark_at_once(slot.volume, slot.ranges);
                    self.count_mended(slot.volume, slot.ranges.total());
                }
                self.seen(run.tag, run.done);
                self.released(run.tag, run.error, run.done);
                return true;
            }
            CompletionAt::CountLate => {
                self.marked += run.uncounted;
                return true;
            }
        }
        false
    }
}
