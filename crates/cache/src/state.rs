//! What the cache knows in memory, and the rules of space and order. No I/O here; everything is under one short lock.
//!
//! Space: `used` (bytes of all segments, less what was punched out of them) and `reserved` (what accepted changesets
//! will still take) together never pass `bytes_max`. A changeset is accepted only when all of it fits, so it can
//! always be completed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use block::{ByteCount, Epoch, Generation, GroupId, HistoryId};
use bytes::Bytes;

use crate::cursors::{Cursors, GroupCursor};
use crate::error::{AppendError, CacheError, ReadError};
use crate::format::{CHUNK_BYTES, HEADER_BYTES, record_bytes};
use crate::position::Position;
use crate::recover::{ChunkAt, Entry};

/// A hole is only worth making of whole pages of the file system, in bytes.
const PAGE: u64 = 4096;

/// What an appender is told, in order. The observer must not block and must not call the cache.
#[derive(Clone, Debug)]
pub enum Event {
    /// So many bytes of changesets have left memory.
    Written(ByteCount),
    /// This changeset and all before it are durable.
    Held(Epoch),
    /// There may be room for the changeset that did not fit: begin it again.
    Room,
    /// The appender is of no more use.
    Closed(Closed),
}

/// Why an appender is of no more use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closed {
    /// Another appender of the same group was opened.
    Superseded,
    /// Held changesets of the group were lost; it needs a new generation.
    Lost(Arc<str>),
    /// The storage failed.
    Poisoned(Arc<str>),
}

/// Gets the events of one appender.
pub type Observer = Arc<dyn Fn(Event) + Send + Sync>;

/// What is to be told once the lock is given back.
pub(crate) type News = Vec<(Observer, Event)>;

pub(crate) fn tell(news: News) {
    for (observer, event) in news {
        observer(event);
    }
}

/// Work for the log's writer, in order.
pub(crate) enum Job {
    Chunk(Chunk),
    /// The reception ends unfinished; what was written of it is of no use.
    Abandon {
        arrival: u64,
    },
    /// To be called when everything before it is durable.
    Barrier(Barrier),
}

pub(crate) type Barrier = Box<dyn FnOnce(Result<(), CacheError>) + Send>;

/// A record to be written.
pub(crate) struct Chunk {
    pub(crate) arrival: u64,
    pub(crate) group: GroupId,
    pub(crate) position: Position,
    pub(crate) total: u64,
    pub(crate) offset: u64,
    pub(crate) pieces: Vec<Bytes>,
    pub(crate) length: u32,
    pub(crate) checksum: u32,
    pub(crate) last: bool,
    pub(crate) observer: Observer,
}

pub(crate) struct State {
    pub(crate) bytes_max: u64,
    pub(crate) segment_bytes: u64,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) segments: BTreeMap<u64, SegmentUse>,
    pub(crate) queue: Vec<Job>,
    pub(crate) used: u64,
    pub(crate) reserved: u64,
    pub(crate) next_arrival: u64,
    /// Who waits for room, first come first served, so that a large changeset is not starved by small ones.
    pub(crate) waiting: VecDeque<(GroupId, u64)>,
    /// Somebody waits: free what can be freed now, not lazily.
    pub(crate) pressure: bool,
    /// The file system is full although the cache's own limit is not reached.
    pub(crate) disk_full: bool,
    pub(crate) poisoned: Option<Arc<str>>,
    pub(crate) closing: bool,
    /// Something changed that the cursor file does not say.
    pub(crate) cursors_dirty: bool,
    /// Of the active segment, for the cursor file.
    pub(crate) durable: (u64, u64),
}

#[derive(Default)]
pub(crate) struct Group {
    /// All targets have applied it; it and what is before it is freed.
    pub(crate) base: Position,
    /// The last that was taken in whole, durable or on its way there.
    pub(crate) accepted: Position,
    /// Held, after `base`, in order, without gaps.
    pub(crate) entries: VecDeque<Entry>,
    pub(crate) bytes: u64,
    pub(crate) targets: BTreeMap<String, Target>,
    pub(crate) lost: Option<(Position, Arc<str>)>,
    /// Which history of the newest generation that a target has told of.
    pub(crate) history: Option<(Generation, HistoryId)>,
    /// `base` is what the targets said, since nothing was known here; and nothing has been held since.
    pub(crate) adopted: bool,
    /// Counts the appenders opened; only the last may append.
    pub(crate) owner: u64,
    pub(crate) observer: Option<Observer>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Target {
    /// `None` until it was heard of.
    pub(crate) applied: Option<Position>,
    /// Whether the configuration still names it; if not, it is remembered but holds nothing back.
    pub(crate) configured: bool,
}

/// What the log has in one file.
#[derive(Debug, Default)]
pub(crate) struct SegmentUse {
    /// Counted in `used`.
    pub(crate) bytes: u64,
    /// Records of changesets that are held or arriving.
    pub(crate) live: u64,
    /// Data that may be punched out, as (offset, length).
    pub(crate) dead: Vec<(u64, u64)>,
    pub(crate) active: bool,
}

impl State {
    pub(crate) fn healthy(&self) -> Result<(), CacheError> {
        match &self.poisoned {
            Some(reason) => Err(CacheError::Poisoned(reason.clone())),
            None if self.closing => Err(CacheError::Closing),
            None => Ok(()),
        }
    }

    pub(crate) fn free(&self) -> u64 {
        self.bytes_max.saturating_sub(self.used + self.reserved)
    }

    /// Makes the caller the only appender of the group. Gives its number.
    pub(crate) fn take_over(
        &mut self,
        id: GroupId,
        generation: Generation,
        observer: Observer,
    ) -> Result<(u64, News), AppendError> {
        self.healthy()?;
        let group = self.groups.entry(id).or_default();
        group.may_append(id, generation)?;
        let number = group.owner + 1;
        let mut news = News::new();
        if let Some(old) = group.observer.replace(observer) {
            news.push((old, Event::Closed(Closed::Superseded)));
        }
        let old = std::mem::replace(&mut group.owner, number);
        self.leave_queue(id, old, &mut news);
        Ok((number, news))
    }

    pub(crate) fn check_owner(&self, id: GroupId, owner: u64) -> Result<&Group, AppendError> {
        self.healthy()?;
        let group = self.groups.get(&id).ok_or(AppendError::Superseded)?;
        if group.owner == owner {
            return Ok(group);
        }
        match &group.lost {
            Some((from, reason)) if group.observer.is_none() => {
                Err(AppendError::Lost { group: id, from: *from, reason: reason.clone() })
            }
            _ => Err(AppendError::Superseded),
        }
    }

    /// Accepts a changeset's beginning: it comes next, and all of it has room. Gives its arrival number.
    pub(crate) fn begin(
        &mut self,
        id: GroupId,
        owner: u64,
        position: Position,
        total: ByteCount,
    ) -> Result<(u64, News), AppendError> {
        let group = self.check_owner(id, owner)?;
        group.may_append(id, position.generation)?;
        if !group.accepted.is_followed_by(position) {
            let held = group.accepted.epoch_in(position.generation);
            let epoch = position.epoch;
            return Err(if epoch <= held {
                AppendError::Replayed { epoch, held }
            } else {
                AppendError::Gap { epoch, expected: held.next() }
            });
        }
        let needed = changeset_bytes(total);
        // The active segment cannot be freed, so it may be in the way for ever.
        let most = self.bytes_max.saturating_sub(self.segment_bytes + record_bytes(CHUNK_BYTES));
        if needed > most {
            return Err(AppendError::TooLarge { total, bytes_max: ByteCount(self.bytes_max) });
        }
        let place = self.waiting.iter().position(|waiter| *waiter == (id, owner));
        let is_next = place.unwrap_or(self.waiting.len()) == 0;
        let free = self.free();
        if !is_next || needed > free {
            if place.is_none() {
                self.waiting.push_back((id, owner));
            }
            self.pressure = true;
            return Err(AppendError::Full { needed: ByteCount(needed), free: ByteCount(free) });
        }
        let mut news = News::new();
        self.leave_queue(id, owner, &mut news);
        self.reserved += needed;
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        Ok((arrival, news))
    }

    /// Takes a waiter out, and tells the next when that changes who is first.
    pub(crate) fn leave_queue(&mut self, id: GroupId, owner: u64, news: &mut News) {
        if let Some(place) = self.waiting.iter().position(|waiter| *waiter == (id, owner)) {
            self.waiting.remove(place);
            self.pressure = !self.waiting.is_empty();
            if place == 0 {
                self.room(news);
            }
        }
    }

    /// Space was freed: the first who waits may try again.
    pub(crate) fn room(&mut self, news: &mut News) {
        if let Some((id, owner)) = self.waiting.front()
            && let Some(group) = self.groups.get(id).filter(|group| group.owner == *owner)
            && let Some(observer) = &group.observer
        {
            news.push((observer.clone(), Event::Room));
        }
    }

    /// A changeset is durable. `false` when the group was found damaged meanwhile, so that it must not follow.
    pub(crate) fn hold(&mut self, id: GroupId, entry: Entry) -> bool {
        let group = self.groups.entry(id).or_default();
        let position = entry.position;
        let lost = group.lost.as_ref().is_some_and(|(lost, _)| lost.generation >= position.generation);
        if lost || !group.held().is_followed_by(position) {
            self.release(&entry.chunks);
            return false;
        }
        group.bytes += entry.total;
        group.entries.push_back(entry);
        self.cursors_dirty = true;
        true
    }

    /// These records are of no more use.
    pub(crate) fn release(&mut self, chunks: &[ChunkAt]) {
        for chunk in chunks {
            if let Some(segment) = self.segments.get_mut(&chunk.segment) {
                segment.live = segment.live.saturating_sub(1);
                segment.bury(chunk);
            }
        }
    }

    /// A target has applied everything up to `applied`. Frees what all have applied.
    pub(crate) fn applied(&mut self, id: GroupId, name: &str, applied: Position) -> Result<(), ReadError> {
        let unknown = || ReadError::UnknownTarget { group: id, target: name.to_owned() };
        let group = self.groups.get_mut(&id).ok_or_else(unknown)?;
        let held = group.held();
        let target = group.targets.get_mut(name).filter(|target| target.configured).ok_or_else(unknown)?;
        if applied > held {
            return Err(ReadError::Ahead { holds: applied, held });
        }
        if target.applied.is_none_or(|before| before < applied) {
            target.applied = Some(applied);
            self.cursors_dirty = true;
            self.free_applied(id);
        }
        Ok(())
    }

    pub(crate) fn free_applied(&mut self, id: GroupId) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let floor = group.floor();
        let mut freed = Vec::new();
        while group.entries.front().is_some_and(|entry| entry.position <= floor)
            && let Some(entry) = group.entries.pop_front()
        {
            group.bytes -= entry.total;
            group.base = entry.position;
            freed.push(entry);
        }
        for entry in freed {
            self.release(&entry.chunks);
        }
    }

    /// A held changeset is not readable: it and those after it in its generation are dropped, and no more of that
    /// generation are accepted. `None` when it is not held any more.
    pub(crate) fn lose(&mut self, id: GroupId, position: Position, reason: &Arc<str>) -> Option<News> {
        let group = self.groups.get_mut(&id)?;
        let at = group.entries.binary_search_by_key(&position, |entry| entry.position).ok()?;
        let mut news = News::new();
        let (lost, kept): (Vec<Entry>, Vec<Entry>) = group
            .entries
            .split_off(at)
            .into_iter()
            .partition(|entry| entry.position.generation == position.generation);
        group.entries.extend(kept);
        group.bytes -= lost.iter().map(|entry| entry.total).sum::<u64>();
        group.lost = Some((position, reason.clone()));
        if group.accepted.generation == position.generation {
            group.accepted = group.held();
            let old = group.owner;
            group.owner += 1;
            if let Some(observer) = group.observer.take() {
                news.push((observer, Event::Closed(Closed::Lost(reason.clone()))));
            }
            self.leave_queue(id, old, &mut news);
        }
        for entry in lost {
            self.release(&entry.chunks);
        }
        self.cursors_dirty = true;
        Some(news)
    }

    pub(crate) fn poison(&mut self, reason: &Arc<str>) -> News {
        self.poisoned.get_or_insert_with(|| reason.clone());
        let observers = self.groups.values_mut().filter_map(|group| group.observer.take());
        observers.map(|observer| (observer, Event::Closed(Closed::Poisoned(reason.clone())))).collect()
    }

    pub(crate) fn cursors(&self) -> Cursors {
        let groups = self.groups.iter().map(|(id, group)| {
            let applied = |(name, target): (&String, &Target)| Some((name.clone(), target.applied?));
            let cursor = GroupCursor {
                base: group.base,
                // Tells an adopted base from one that was held here.
                held: if group.is_adopted() { Position::NONE } else { group.held() },
                lost: group.lost.as_ref().map(|(lost, _)| *lost),
                history: group.history,
                targets: group.targets.iter().filter_map(applied).collect(),
            };
            (*id, cursor)
        });
        let (segment, durable) = self.durable;
        Cursors { segment, durable, groups: groups.collect() }
    }
}

impl Group {
    pub(crate) fn held(&self) -> Position {
        self.entries.back().map_or(self.base, |entry| entry.position)
    }

    /// Nothing is held, or arriving whole.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.accepted == self.base
    }

    pub(crate) fn is_adopted(&self) -> bool {
        self.adopted && self.is_empty()
    }

    fn may_append(&self, id: GroupId, generation: Generation) -> Result<(), AppendError> {
        if let Some((from, reason)) = &self.lost
            && from.generation >= generation
        {
            return Err(AppendError::Lost { group: id, from: *from, reason: reason.clone() });
        }
        let current = self.accepted.generation;
        if generation < current {
            return Err(AppendError::OldGeneration { generation, current });
        }
        Ok(())
    }

    /// Whether the target can still be given what it lacks. One that cannot holds back no space: it must be resynced
    /// anyway.
    fn is_served(&self, target: &Target) -> bool {
        let applied = target.applied.unwrap_or_default();
        self.entries
            .front()
            .is_none_or(|first| applied >= first.position || applied.is_followed_by(first.position))
    }

    /// What all targets that count have applied. Without any nothing is freed: it might be wanted yet.
    pub(crate) fn floor(&self) -> Position {
        let counted = self.targets.values().filter(|target| target.configured && self.is_served(target));
        counted.map(|target| target.applied.unwrap_or_default()).min().unwrap_or(self.base)
    }
}

impl SegmentUse {
    pub(crate) fn bury(&mut self, chunk: &ChunkAt) {
        if u64::from(chunk.length) >= 2 * PAGE {
            self.dead.push((chunk.offset, u64::from(chunk.length)));
        }
    }
}

/// The whole pages of a range.
pub(crate) fn pages((offset, length): (u64, u64)) -> (u64, u64) {
    let start = offset.next_multiple_of(PAGE);
    let end = (offset + length) / PAGE * PAGE;
    (start, end.saturating_sub(start))
}

/// What a changeset of `total` bytes takes in the log.
pub(crate) fn changeset_bytes(total: ByteCount) -> u64 {
    let chunk = CHUNK_BYTES as u64;
    let (full, rest) = (total.get() / chunk, total.get() % chunk);
    let tail = if rest > 0 || full == 0 { record_bytes(rest as usize) } else { 0 };
    full.saturating_mul(record_bytes(CHUNK_BYTES)).saturating_add(tail)
}

/// What `used` starts from for a new segment.
pub(crate) const SEGMENT_START: u64 = HEADER_BYTES as u64;

/// Segments to remove, with their bytes, and ranges to punch out of others.
pub(crate) type Garbage = (Vec<(u64, u64)>, Vec<(u64, Vec<(u64, u64)>)>);

impl State {
    /// Whether something can be freed; punching holes only pays where somebody waits.
    pub(crate) fn has_garbage(&self, holes: bool) -> bool {
        self.segments
            .values()
            .any(|segment| !segment.active && (segment.live == 0 || holes && !segment.dead.is_empty()))
    }

    /// Takes what can be freed. The segments to remove are forgotten; their bytes stay counted until they are gone.
    pub(crate) fn take_garbage(&mut self) -> Garbage {
        let empty = |segment: &SegmentUse| !segment.active && segment.live == 0;
        let gone: Vec<(u64, u64)> = self
            .segments
            .iter()
            .filter(|(_, segment)| empty(segment))
            .map(|(number, segment)| (*number, segment.bytes))
            .collect();
        for (number, _) in &gone {
            self.segments.remove(number);
        }
        let mut holes = Vec::new();
        if self.pressure || self.disk_full {
            for (number, segment) in
                self.segments.iter_mut().filter(|(_, segment)| !segment.active && !segment.dead.is_empty())
            {
                holes.push((*number, std::mem::take(&mut segment.dead)));
            }
        }
        (gone, holes)
    }

    /// After the cursors could not be written.
    pub(crate) fn give_garbage_back(&mut self, gone: Vec<(u64, u64)>, holes: Vec<(u64, Vec<(u64, u64)>)>) {
        for (number, bytes) in gone {
            self.segments.insert(number, SegmentUse { bytes, ..SegmentUse::default() });
        }
        for (number, ranges) in holes {
            if let Some(segment) = self.segments.get_mut(&number) {
                segment.dead.extend(ranges);
            }
        }
    }
}
