//! What a cache's files hold: for opening it, and for verifying it offline.
//!
//! Invariants of what is found (asserted by `chain`):
//! - a group's changesets follow each other without a gap, from what was freed on ([`Position::is_followed_by`]);
//! - each has all of its bytes;
//! - none is older than what was freed, none follows a loss within the same generation.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{ByteCount, GroupId};
use durable::{OpenMode, REPLACE_SUFFIX, Storage};

use crate::cursors::{Cursors, GroupCursor};
use crate::error::CacheError;
use crate::format::{Flaw, HEADER_BYTES, Kind};
use crate::position::Position;
use crate::scan::{Depth, Scan, read_up_to, scan};

pub(crate) const CURSORS_FILE: &str = "cursors";
/// Where a damaged cursor file is kept for people to look at.
pub(crate) const CURSORS_DAMAGED_FILE: &str = "cursors.damaged";
pub(crate) const LOCK_FILE: &str = "lock";
/// The largest cursor file that is read, in bytes. A larger one counts as damaged.
const CURSORS_BYTES_MAX: u64 = 256 << 20;

/// Something that was durable once and is not any more. Never silent: see [`Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Bytes of a segment cannot be read as what was written.
    Segment {
        /// Which segment.
        segment: u64,
        /// Which of its bytes.
        range: Range<u64>,
    },
    /// The cursor file is missing or not readable. What each target has applied is asked of the targets.
    Cursors {
        /// What is wrong.
        reason: String,
    },
    /// Changesets that were held are lost, and those of the generation after them dropped.
    Changesets {
        /// Whose.
        group: GroupId,
        /// The first that is missing.
        from: Position,
        /// The last that is known to have been held.
        through: Position,
        /// What happened.
        reason: String,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Segment { segment, range } => {
                write!(f, "segment {segment} is damaged from byte {} to {}", range.start, range.end)
            }
            Damage::Cursors { reason } => {
                write!(f, "the cursor file was not readable ({reason}); targets are asked what they hold")
            }
            Damage::Changesets { group, from, through, reason } => write!(
                f,
                "group {group} lost {from} to {through} ({reason}); resync it with a new generation"
            ),
        }
    }
}

/// What was found in a cache's directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many segments.
    pub segments: usize,
    /// Their bytes.
    pub bytes: ByteCount,
    /// The groups, by id.
    pub groups: Vec<GroupReport>,
    /// Changesets of which only a part had arrived; they are discarded.
    pub half_received: u64,
    /// Whether the log had a torn tail, as a crash leaves it. Nothing acknowledged was in it.
    pub torn_tail: bool,
    /// What is damaged.
    pub damages: Vec<Damage>,
}

impl Report {
    /// Whether nothing is damaged. A torn tail is no damage.
    pub fn is_sound(&self) -> bool {
        self.damages.is_empty()
    }
}

/// A group in a cache's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupReport {
    /// Which.
    pub group: GroupId,
    /// Up to here everything was applied by all targets and freed.
    pub freed: Position,
    /// The last that is held.
    pub held: Position,
    /// How many are held.
    pub changesets: u64,
    /// Their bytes.
    pub bytes: ByteCount,
    /// What each target has applied, as far as was written down.
    pub targets: Vec<(String, Position)>,
}

/// Where a part of a changeset is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkAt {
    pub(crate) segment: u64,
    /// Of the data, not of the record.
    pub(crate) offset: u64,
    pub(crate) length: u32,
    pub(crate) checksum: u32,
}

/// A held changeset.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) position: Position,
    pub(crate) total: u64,
    pub(crate) chunks: Arc<[ChunkAt]>,
}

#[derive(Debug)]
pub(crate) struct FoundSegment {
    pub(crate) path: PathBuf,
    pub(crate) end: u64,
    /// From here to `end` nobody vouches that the medium has it.
    pub(crate) unsure_from: u64,
    /// The last one, when its creation was cut short.
    pub(crate) remove: bool,
}

#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) segments: BTreeMap<u64, FoundSegment>,
    pub(crate) cursors: Cursors,
    /// Whether the cursor file differs from `cursors` in more than is written lazily.
    pub(crate) cursors_changed: bool,
    pub(crate) cursors_damaged: bool,
    /// Groups whose base is what targets said, with nothing held since.
    pub(crate) adopted: BTreeSet<GroupId>,
    pub(crate) entries: BTreeMap<GroupId, Vec<Entry>>,
    /// Data of no more use, in segments that may stay for others.
    pub(crate) dead: Vec<ChunkAt>,
    pub(crate) next_arrival: u64,
    pub(crate) leftovers: Vec<PathBuf>,
    pub(crate) report: Report,
}

pub(crate) fn segment_name(number: u64) -> String {
    format!("segment-{number:016x}.log")
}

fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("segment-")?.strip_suffix(".log")?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    (segment_name(number) == name).then_some(number)
}

/// Checks a cache's files offline: all headers, all checksums, the order of all changesets. Changes nothing.
///
/// # Errors
/// When a process has the cache open, a file is of another version, or the storage fails. Damage is no error: it is in
/// the report.
pub fn verify(storage: &dyn Storage, dir: &Path) -> Result<Report, CacheError> {
    let lock = dir.join(LOCK_FILE);
    let _lock = match storage.open(&lock, OpenMode::Read) {
        Ok(file) if file.try_lock().map_err(io_error("lock", &lock))? => Some(file),
        Ok(_) => return Err(CacheError::Locked(dir.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(io_error("open", &lock)(error)),
    };
    Ok(find(storage, dir, true)?.report)
}

pub(crate) fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> CacheError + 'a {
    move |source| CacheError::Io { action, path: path.to_owned(), source }
}

/// Reads everything; `deep` reads the data of all segments, else only of the last.
pub(crate) fn find(storage: &dyn Storage, dir: &Path, deep: bool) -> Result<Found, CacheError> {
    let names = storage.list(dir).map_err(io_error("list", dir))?;
    let numbers: BTreeSet<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
    let leftovers =
        names.iter().filter(|name| name.ends_with(REPLACE_SUFFIX)).map(|name| dir.join(name)).collect();
    let mut report = Report::default();
    let read = read_cursors(storage, dir, !numbers.is_empty())?;
    let cursors_damaged = read.is_err();
    let cursors = read.unwrap_or_else(|reason| {
        report.damages.push(Damage::Cursors { reason });
        Cursors::default()
    });

    let mut segments = BTreeMap::new();
    let mut receptions = Receptions::default();
    let mut scans = Vec::new();
    // From the last: when its creation was cut short, the one before is where the log ends.
    let mut last = true;
    for number in numbers.into_iter().rev() {
        let path = dir.join(segment_name(number));
        let file = storage.open(&path, OpenMode::Read).map_err(io_error("open", &path))?;
        let durable = if cursors.segment == number { cursors.durable } else { 0 };
        let depth = Depth { last, durable, data: deep || last };
        let scan = scan(&*file, number, depth).map_err(io_error("read", &path))?;
        if let Err(flaw @ Flaw::Version(_)) = scan.header {
            return Err(CacheError::Version { path, reason: flaw.to_string() });
        }
        let remove = last && scan.torn && scan.end == 0;
        let unsure_from = if last { scan.durable.max(HEADER_BYTES as u64).min(scan.end) } else { scan.end };
        last &= remove;
        report.torn_tail |= scan.torn;
        segments.insert(number, FoundSegment { path, end: scan.end, unsure_from, remove });
        scans.push((number, scan));
    }
    for (number, scan) in scans.into_iter().rev() {
        report.segments += 1;
        report.bytes += ByteCount(scan.end);
        for range in &scan.damaged {
            report.damages.push(Damage::Segment { segment: number, range: range.clone() });
        }
        receptions.add(number, &scan);
    }

    let mut found = Found {
        segments,
        cursors,
        cursors_changed: cursors_damaged,
        cursors_damaged,
        adopted: BTreeSet::new(),
        entries: BTreeMap::new(),
        dead: Vec::new(),
        next_arrival: receptions.changesets.keys().max().map_or(1, |arrival| arrival + 1),
        leftovers,
        report,
    };
    found.chain_all(receptions);
    Ok(found)
}

/// `Err` says why the file is not usable.
fn read_cursors(
    storage: &dyn Storage,
    dir: &Path,
    expected: bool,
) -> Result<Result<Cursors, String>, CacheError> {
    let path = dir.join(CURSORS_FILE);
    let file = match storage.open(&path, OpenMode::Read) {
        Ok(file) => file,
        // It is written before the first segment, so it can only be missing in a new directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !expected => {
            return Ok(Ok(Cursors::default()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err("it is missing".to_owned())),
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    let length = file.len().map_err(io_error("read", &path))?;
    if length > CURSORS_BYTES_MAX {
        return Ok(Err(format!("its {length} bytes are more than {CURSORS_BYTES_MAX}")));
    }
    let mut bytes = vec![0; length as usize];
    let got = read_up_to(&*file, &mut bytes, 0).map_err(io_error("read", &path))?;
    match Cursors::decode(&bytes[..got]) {
        Ok(cursors) => Ok(Ok(cursors)),
        Err(flaw @ Flaw::Version(_)) => Err(CacheError::Version { path, reason: flaw.to_string() }),
        Err(flaw) => Ok(Err(flaw.to_string())),
    }
}

#[derive(Default)]
struct Receptions {
    /// By arrival: the order in which they began, which for one group is the order of its history.
    changesets: BTreeMap<u64, Reception>,
}

struct Reception {
    group: GroupId,
    position: Position,
    total: u64,
    received: u64,
    complete: bool,
    /// Why it is not usable.
    broken: Option<String>,
    chunks: Vec<ChunkAt>,
}

impl Receptions {
    fn add(&mut self, number: u64, scan: &Scan) {
        for record in &scan.records {
            let header = &record.header;
            if header.kind == Kind::Mark {
                continue;
            }
            let reception = self.changesets.entry(header.arrival).or_insert_with(|| Reception {
                group: header.group,
                position: header.position,
                total: header.total,
                received: 0,
                complete: false,
                broken: None,
                chunks: Vec::new(),
            });
            let same = (reception.group, reception.position, reception.total)
                == (header.group, header.position, header.total);
            if !same || header.chunk_offset != reception.received {
                reception.broken.get_or_insert_with(|| "a part of it is missing".to_owned());
            }
            if record.damaged {
                let reason = format!("segment {number} is damaged at byte {}", header.payload_offset());
                reception.broken.get_or_insert(reason);
            }
            reception.received = header.chunk_offset + u64::from(header.length);
            reception.complete |= header.kind == Kind::Last;
            reception.chunks.push(ChunkAt {
                segment: number,
                offset: header.payload_offset(),
                length: header.length,
                checksum: header.checksum,
            });
        }
    }
}

impl Found {
    fn chain_all(&mut self, receptions: Receptions) {
        let mut by_group: HashMap<GroupId, Vec<Reception>> = HashMap::new();
        for reception in receptions.changesets.into_values() {
            if reception.complete {
                by_group.entry(reception.group).or_default().push(reception);
            } else {
                self.report.half_received += 1;
                self.dead.extend(reception.chunks);
            }
        }
        for group in by_group.keys() {
            self.cursors.groups.entry(*group).or_default();
        }
        let groups: Vec<GroupId> = self.cursors.groups.keys().copied().collect();
        for group in groups {
            let mut cursor = self.cursors.groups.remove(&group).unwrap_or_default();
            let entries = self.chain(group, &mut cursor, by_group.remove(&group).unwrap_or_default());
            self.report.groups.push(GroupReport {
                group,
                freed: cursor.base,
                held: entries.last().map_or(cursor.base, |entry| entry.position),
                changesets: entries.len() as u64,
                bytes: entries.iter().map(|entry| ByteCount(entry.total)).sum(),
                targets: cursor.targets.iter().map(|(name, applied)| (name.clone(), *applied)).collect(),
            });
            self.entries.insert(group, entries);
            self.cursors.groups.insert(group, cursor);
        }
    }

    /// The changesets of one group that follow each other, from what was freed on.
    fn chain(&mut self, group: GroupId, cursor: &mut GroupCursor, receptions: Vec<Reception>) -> Vec<Entry> {
        if self.cursors_damaged
            && let Some(first) = receptions.first()
        {
            // What was freed had been applied by every target; of the rest nobody knows.
            cursor.base = before(first.position);
        }
        let mut entries: Vec<Entry> = Vec::new();
        let mut current = cursor.base;
        let mut loss: Option<(Position, Position, String)> = None;
        let lost = cursor.lost;
        let is_known_lost = |position: Position| {
            lost.is_some_and(|lost| position.generation == lost.generation && position.epoch >= lost.epoch)
        };
        for reception in receptions {
            let position = reception.position;
            let known_lost = is_known_lost(position);
            let follows = current.is_followed_by(position);
            if position > current && !known_lost && follows && reception.broken.is_none() {
                current = position;
                let chunks = reception.chunks.into();
                entries.push(Entry { position, total: reception.total, chunks });
                continue;
            }
            self.dead.extend_from_slice(&reception.chunks);
            if position <= current || known_lost {
                continue;
            }
            let missing = if follows { position } else { after(current, position) };
            let reason = reception.broken.unwrap_or_else(|| "it is not in the log".to_owned());
            match &mut loss {
                Some((from, through, _)) if from.generation == position.generation => *through = position,
                _ => loss = Some((missing, position, reason)),
            }
        }
        if cursor.held > current && loss.is_none() && !is_known_lost(cursor.held) {
            let missing = after(current, cursor.held);
            loss = Some((missing, cursor.held, "it is not in the log".to_owned()));
        }
        if let Some((from, through, reason)) = loss {
            self.cursors_changed = true;
            cursor.lost = Some(from);
            self.report.damages.push(Damage::Changesets { group, from, through, reason });
        }
        if cursor.held == Position::NONE && cursor.base != Position::NONE && entries.is_empty() {
            self.adopted.insert(group);
        }
        cursor.held = current;
        let mut previous = cursor.base;
        for entry in &entries {
            assert!(previous.is_followed_by(entry.position), "{} follows {previous}", entry.position);
            previous = entry.position;
        }
        entries
    }
}

fn before(position: Position) -> Position {
    Position { epoch: block::Epoch(position.epoch.0.saturating_sub(1)), ..position }
}

/// What should have come after `current` in the generation of `found`.
fn after(current: Position, found: Position) -> Position {
    Position { generation: found.generation, epoch: current.epoch_in(found.generation).next() }
}
