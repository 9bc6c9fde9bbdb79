use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use block::{ByteCount, Epoch, Generation, GroupId, HistoryId};
use durable::{OpenMode, Storage, StorageFile};
use parking_lot::{Condvar, Mutex};

use crate::append::Appender;
use crate::cursors::TARGET_NAME_BYTES_MAX;
use crate::error::{AppendError, CacheError, ReadError};
use crate::format::HEADER_BYTES;
use crate::keeper::{self, write_cursors};
use crate::log::Writer;
use crate::position::Position;
use crate::read::HeldChangeset;
use crate::recover::{CURSORS_DAMAGED_FILE, CURSORS_FILE, Found, LOCK_FILE, Report, find, io_error};
use crate::state::{Group, Job, Observer, SegmentUse, State, Target, tell};

/// A segment of the log is closed when it has reached this size, by default.
pub const SEGMENT_BYTES: ByteCount = ByteCount::mib(64);
/// The smallest segment, in bytes; below it files would be made and removed more than written.
pub const SEGMENT_BYTES_MIN: ByteCount = ByteCount::kib(4);
/// How much of a full segment's data is read and written again at once when the log's tail is made sure of.
const REWRITE_BYTES: usize = 1 << 20;

/// The targets of a group, by name. Must always answer the same while the cache is open.
pub type TargetsOf = Arc<dyn Fn(GroupId) -> Vec<String> + Send + Sync>;

/// How a cache is opened.
#[derive(Clone)]
pub struct Options {
    /// The most its segments take. When it is reached, nothing more is accepted until targets have applied something.
    pub bytes_max: ByteCount,
    /// When a segment is closed. Its space is allocated ahead, on top of `bytes_max`.
    pub segment_bytes: ByteCount,
    /// Where each group goes.
    pub targets: TargetsOf,
    /// Told how long each sync of the log took.
    pub on_sync: Option<Arc<dyn Fn(Duration) + Send + Sync>>,
}

impl Options {
    /// With segments of [`SEGMENT_BYTES`], or a sixteenth of a cache too small for that.
    pub fn new(bytes_max: ByteCount, targets: TargetsOf) -> Options {
        let sixteenth = ByteCount(bytes_max.get() / 16);
        let segment_bytes = SEGMENT_BYTES.min(sixteenth).max(SEGMENT_BYTES_MIN);
        Options { bytes_max, segment_bytes, targets, on_sync: None }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Options {{ bytes_max: {}, segment_bytes: {} }}", self.bytes_max, self.segment_bytes)
    }
}

/// An open cache. Dropping it closes it as [`Cache::close`] does, without telling of errors.
pub struct Cache {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Gone when closed, so that the directory can be opened again.
    lock: Mutex<Option<Arc<dyn StorageFile>>>,
}

pub(crate) struct Shared {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) dir: PathBuf,
    pub(crate) segment_bytes: u64,
    pub(crate) on_sync: Option<Arc<dyn Fn(Duration) + Send + Sync>>,
    pub(crate) targets: TargetsOf,
    pub(crate) state: Mutex<State>,
    /// Jobs are queued, or it is closing.
    pub(crate) work: Condvar,
    /// The keeper has something to do.
    pub(crate) keep: Condvar,
    /// Space was freed.
    pub(crate) freed: Condvar,
    /// Held while the cursor file is written.
    pub(crate) cursors_file: Mutex<()>,
}

impl Shared {
    pub(crate) fn poison(&self, error: &CacheError) {
        let reason: Arc<str> = error.to_string().into();
        tracing::error!(%error, "the cache stops; what it holds stays readable");
        let news = self.state.lock().poison(&reason);
        self.work.notify_all();
        self.keep.notify_all();
        self.freed.notify_all();
        tell(news);
    }
}

impl Cache {
    /// Opens the cache in `dir`, which is made when it is missing, and recovers what it holds.
    ///
    /// The order, and what breaks when it is changed:
    /// 1. everything is read and checked;
    /// 2. of the last segment what was never durable is cut off, and what nobody vouches for is written again and
    ///    synced (else bytes that are only in the page cache, after a failed sync, would be offered as held);
    /// 3. the cursor file is written when something was found lost, so that the loss is remembered whatever comes;
    /// 4. only then is anything offered or accepted.
    ///
    /// # Errors
    /// When another process has it open, a file is of another version, or the storage fails. Damage is no error: it is
    /// in the report, and the groups it does not touch go on.
    pub fn open(
        storage: Arc<dyn Storage>,
        dir: &Path,
        options: Options,
    ) -> Result<(Cache, Report), CacheError> {
        storage.create_dir_all(dir).map_err(io_error("create directory", dir))?;
        let lock_path = dir.join(LOCK_FILE);
        let lock = storage.open(&lock_path, OpenMode::CreateOrOpen).map_err(io_error("open", &lock_path))?;
        if !lock.try_lock().map_err(io_error("lock", &lock_path))? {
            return Err(CacheError::Locked(dir.to_owned()));
        }
        let found = find(&*storage, dir, false)?;
        make_sure(&*storage, &found)?;
        if found.cursors_damaged {
            let (from, to) = (dir.join(CURSORS_FILE), dir.join(CURSORS_DAMAGED_FILE));
            if storage.exists(&from).map_err(io_error("look for", &from))? {
                storage.rename(&from, &to).map_err(io_error("set aside", &from))?;
            }
        }
        let cursors_path = dir.join(CURSORS_FILE);
        let write_now = found.cursors_changed
            || !storage.exists(&cursors_path).map_err(io_error("look for", &cursors_path))?;
        let next_segment = found.segments.keys().max().map_or(1, |number| number + 1);
        let report = found.report.clone();
        let shared = Arc::new(Shared {
            state: Mutex::new(state(found, &options)),
            storage,
            dir: dir.to_owned(),
            segment_bytes: options.segment_bytes.max(SEGMENT_BYTES_MIN).get(),
            on_sync: options.on_sync,
            targets: options.targets,
            work: Condvar::new(),
            keep: Condvar::new(),
            freed: Condvar::new(),
            cursors_file: Mutex::new(()),
        });
        if write_now {
            write_cursors(&shared)?;
        }
        let cache = Cache { shared: shared.clone(), threads: Mutex::default(), lock: Mutex::new(Some(lock)) };
        let writer = Writer::new(shared.clone(), next_segment);
        cache.spawn("cache-log", move || writer.run())?;
        cache.spawn("cache-keeper", move || keeper::run(&shared))?;
        Ok((cache, report))
    }

    fn spawn(&self, name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<(), CacheError> {
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(body);
        self.threads.lock().push(spawned.map_err(io_error("start a thread for", &self.shared.dir))?);
        Ok(())
    }

    /// Finishes what was queued, writes the cursors, and closes. Nothing is accepted after it; another process may then
    /// open the directory.
    ///
    /// # Errors
    /// When the storage failed, now or before.
    pub fn close(&self) -> Result<(), CacheError> {
        self.stop();
        match &self.shared.state.lock().poisoned {
            Some(reason) => Err(CacheError::Poisoned(reason.clone())),
            None => Ok(()),
        }
    }

    fn stop(&self) {
        // The writer first, so that the keeper's last cursors speak of all of its work.
        self.shared.state.lock().closing = true;
        self.shared.work.notify_all();
        self.shared.keep.notify_all();
        self.shared.freed.notify_all();
        for thread in self.threads.lock().drain(..) {
            // A thread that panicked has said so; nothing it did not finish was acknowledged.
            let _ = thread.join();
        }
        self.lock.lock().take();
    }

    /// Opens an appender for a group, in place of any before. `ready` is called when everything that was accepted
    /// before is durable, so that [`Appender::held`] is exact; by another thread, and it must not block.
    ///
    /// A new connection always takes over: the old one is most often dead without knowing, and who may speak for the
    /// group was proven by a certificate. Nothing can be lost by it, since both hear what is held and the order is kept
    /// here.
    ///
    /// # Errors
    /// When the generation is not accepted or the cache has stopped; `ready` is then not called.
    pub fn appender_with(
        &self,
        group: GroupId,
        generation: Generation,
        observer: Observer,
        ready: impl FnOnce(Result<Appender, AppendError>) + Send + 'static,
    ) -> Result<(), AppendError> {
        let shared = self.shared.clone();
        let mut state = self.shared.state.lock();
        let (owner, news) = state.take_over(group, generation, observer.clone())?;
        configure(&mut state, group, &self.shared.targets);
        state.queue.push(Job::Barrier(Box::new(move |done: Result<(), CacheError>| {
            ready(match done {
                Ok(()) => Appender::new(shared, group, generation, owner, observer),
                Err(error) => Err(error.into()),
            });
        })));
        drop(state);
        self.shared.work.notify_one();
        tell(news);
        Ok(())
    }

    /// [`Cache::appender_with`] for who can wait.
    ///
    /// # Errors
    /// As there.
    pub fn appender(
        &self,
        group: GroupId,
        generation: Generation,
        observer: Observer,
    ) -> Result<Appender, AppendError> {
        let (send, receive) = mpsc::channel();
        self.appender_with(group, generation, observer, move |ready| {
            // Nobody waits any more when this fails.
            let _ = send.send(ready);
        })?;
        receive.recv().unwrap_or(Err(CacheError::Closing.into()))
    }

    /// The first held changeset after `after`; `None` when there is none yet.
    ///
    /// # Errors
    /// When the history between is not here: [`ReadError::TooLate`], [`ReadError::Ahead`].
    pub fn next_after(&self, group: GroupId, after: Position) -> Result<Option<HeldChangeset>, ReadError> {
        let state = self.shared.state.lock();
        let Some(found) = state.groups.get(&group) else {
            return if after.epoch == Epoch::NONE { Ok(None) } else { Err(ahead(after, Position::NONE)) };
        };
        let held = found.held();
        if after > held && after.epoch > Epoch::NONE {
            return Err(ahead(after, held));
        }
        let at = found.entries.partition_point(|entry| entry.position <= after);
        match found.entries.get(at) {
            // Nothing is held, but something was: whoever lacks it will not get it any more, and must not look as if it kept up.
            None if after < found.base => {
                let oldest = Position { epoch: found.base.epoch.next(), ..found.base };
                Err(ReadError::TooLate { holds: after, oldest })
            }
            None => Ok(None),
            Some(entry) if after.is_followed_by(entry.position) => {
                Ok(Some(HeldChangeset::new(self.shared.clone(), group, entry.clone())))
            }
            Some(entry) => Err(ReadError::TooLate { holds: after, oldest: entry.position }),
        }
    }

    /// A target said what it holds, on connecting. From here on that position is its cursor, durably. Blocks for the
    /// disk the first time a target is heard of.
    ///
    /// # Errors
    /// When the target's history cannot be this cache's: it holds more than the cache, or, unknown to the cache, holds
    /// what only the cache could have sent. Then nothing may be sent to it. One that the configuration now calls by
    /// another name is known.
    pub fn contact(&self, group: GroupId, target: &str, holds: Position) -> Result<(), ReadError> {
        let mut state = self.shared.state.lock();
        let unknown = || ReadError::UnknownTarget { group, target: target.to_owned() };
        configure(&mut state, group, &self.shared.targets);
        let found = state.groups.get_mut(&group).ok_or_else(unknown)?;
        let held = found.held();
        let known = found.targets.get(target).filter(|target| target.configured).ok_or_else(unknown)?.applied;
        if holds.epoch > Epoch::NONE {
            if holds > held {
                return Err(ahead(holds, held));
            }
            let sent_by_us = found
                .entries
                .iter()
                .any(|entry| entry.position.generation == holds.generation && entry.position <= holds);
            if known.is_none() && sent_by_us && !found.inherit(holds) {
                return Err(ReadError::OtherHistory(holds));
            }
        }
        // A target of a new generation holds nothing of it; that does not undo what it applied of the one before.
        let cursor = if holds.epoch == Epoch::NONE { known.unwrap_or(holds).max(holds) } else { holds };
        if let Some(entry) = found.targets.get_mut(target) {
            entry.applied = Some(cursor);
        }
        state.cursors_dirty = true;
        state.free_applied(group);
        drop(state);
        self.shared.keep.notify_all();
        if known.is_none() {
            // Before anything is sent to it: a crash must not make it look like one that got it from elsewhere.
            write_cursors(&self.shared)?;
        }
        Ok(())
    }

    /// A target that holds `holds` said which history of the generation it has. The first one that says so of a generation is believed, and
    /// that is kept; blocks for the disk then. To be called before [`Cache::contact`], which looks at numbers only.
    ///
    /// # Errors
    /// When the targets' history of this generation is another one: nothing may be sent to this target.
    pub fn follow(&self, group: GroupId, holds: Position, history: HistoryId) -> Result<(), ReadError> {
        if holds.epoch == Epoch::NONE {
            // It has none yet.
            return Ok(());
        }
        let mut state = self.shared.state.lock();
        configure(&mut state, group, &self.shared.targets);
        let Some(found) = state.groups.get_mut(&group) else { return Ok(()) };
        match found.history {
            Some((generation, known)) if generation == holds.generation => {
                return if known == history { Ok(()) } else { Err(ReadError::OtherHistory(holds)) };
            }
            // It lags: what it lacks of an older generation was taken in before.
            Some((generation, _)) if generation > holds.generation => return Ok(()),
            _ => found.history = Some((holds.generation, history)),
        }
        state.cursors_dirty = true;
        drop(state);
        Ok(write_cursors(&self.shared)?)
    }

    /// Which history of a generation the targets have; [`HistoryId::SOURCE`] when none has told of another.
    pub fn history(&self, group: GroupId, generation: Generation) -> HistoryId {
        let state = self.shared.state.lock();
        let known = state.groups.get(&group).and_then(|group| group.history);
        known.filter(|(of, _)| *of == generation).map_or(HistoryId::SOURCE, |(_, history)| history)
    }

    /// A target that holds nothing, and can no longer be given what it lacks, begins after what is held now: it is sent what follows, and
    /// its source must compare everything with it. The position, which from here on counts as applied there, durably.
    ///
    /// # Errors
    /// When the group has no such target, or the cursor file cannot be written.
    pub fn join(&self, group: GroupId, target: &str) -> Result<Position, ReadError> {
        let mut state = self.shared.state.lock();
        let unknown = || ReadError::UnknownTarget { group, target: target.to_owned() };
        let found = state.groups.get_mut(&group).ok_or_else(unknown)?;
        let held = found.held();
        let joins = found.targets.get_mut(target).filter(|target| target.configured).ok_or_else(unknown)?;
        joins.applied = Some(held);
        state.cursors_dirty = true;
        state.free_applied(group);
        drop(state);
        self.shared.keep.notify_all();
        // Before anything is sent to it, as in `contact`.
        write_cursors(&self.shared)?;
        Ok(held)
    }

    /// Whether nothing was ever held of a group, so that [`Cache::adopt`] is of use.
    pub fn knows_nothing(&self, group: GroupId) -> bool {
        let state = self.shared.state.lock();
        state.groups.get(&group).is_none_or(|group| group.is_empty() && group.base == Position::NONE)
    }

    /// A cache that knows nothing of a group, or of the generation that its targets hold, begins after what they hold: the most of
    /// `holds`. What an earlier cache had acknowledged after it is lost, and nobody has applied it; what is here of earlier
    /// generations goes, for no target takes it any more. `false` when something of the generation is held meanwhile, or they
    /// hold nothing.
    ///
    /// # Errors
    /// When the cursor file cannot be written.
    pub fn adopt(&self, group: GroupId, holds: &[(String, Position)]) -> Result<bool, CacheError> {
        let base = holds.iter().map(|(_, position)| *position).max().unwrap_or(Position::NONE);
        let mut state = self.shared.state.lock();
        configure(&mut state, group, &self.shared.targets);
        let Some(found) = state.groups.get_mut(&group) else { return Ok(false) };
        let known = found
            .accepted
            .generation
            .max(found.lost.as_ref().map_or(Generation(0), |(from, _)| from.generation));
        if base.epoch == Epoch::NONE || known >= base.generation {
            return Ok(false);
        }
        let fenced = std::mem::take(&mut found.entries);
        (found.base, found.accepted, found.adopted, found.bytes) = (base, base, true, 0);
        for (target, position) in holds {
            if let Some(target) = found.targets.get_mut(target) {
                target.applied = Some(*position);
            }
        }
        for entry in fenced {
            state.release(&entry.chunks);
        }
        state.cursors_dirty = true;
        drop(state);
        // Before anybody is told: a crash must not make it look like something that was held here.
        write_cursors(&self.shared)?;
        Ok(true)
    }

    /// Whether the group begins after what its targets said, and nothing has been held since: see [`Cache::adopt`].
    pub fn is_adopted(&self, group: GroupId) -> bool {
        self.shared.state.lock().groups.get(&group).is_some_and(|group| group.is_adopted())
    }

    /// A target has durably applied everything up to `applied`. Kept in the cursor file within
    /// [`CURSORS_EVERY`](crate::CURSORS_EVERY); frees what all targets have applied.
    ///
    /// # Errors
    /// When the group has no such target, or the cache never held so much.
    pub fn applied(&self, group: GroupId, target: &str, applied: Position) -> Result<(), ReadError> {
        let mut state = self.shared.state.lock();
        state.applied(group, target, applied)?;
        if state.pressure || state.disk_full {
            self.shared.keep.notify_all();
        }
        Ok(())
    }

    /// What a target has applied, as far as is known.
    pub fn cursor(&self, group: GroupId, target: &str) -> Option<Position> {
        self.shared.state.lock().groups.get(&group)?.targets.get(target)?.applied
    }

    /// The last held changeset of a group.
    pub fn held(&self, group: GroupId) -> Position {
        self.shared.state.lock().groups.get(&group).map_or(Position::NONE, Group::held)
    }

    /// What all targets of a group have applied.
    pub fn applied_by_all(&self, group: GroupId) -> Position {
        self.shared.state.lock().groups.get(&group).map_or(Position::NONE, |group| {
            let targets = group.targets.values().filter(|target| target.configured);
            targets.map(|target| target.applied.unwrap_or_default()).min().unwrap_or(group.base)
        })
    }

    /// The first generation after `after` that the cache has changesets of, for a target that can no longer be given those of
    /// `after`.
    pub fn generation_after(&self, group: GroupId, after: Generation) -> Option<Generation> {
        let state = self.shared.state.lock();
        let entries = &state.groups.get(&group)?.entries;
        entries.iter().map(|entry| entry.position.generation).find(|generation| *generation > after)
    }

    /// The groups that the cache knows.
    pub fn groups(&self) -> Vec<GroupId> {
        self.shared.state.lock().groups.keys().copied().collect()
    }

    /// How it is.
    pub fn status(&self) -> CacheStatus {
        let state = self.shared.state.lock();
        let groups = state.groups.iter().map(|(id, group)| CacheGroup {
            group: *id,
            held: group.held(),
            freed: group.base,
            changesets: group.entries.len() as u64,
            bytes: ByteCount(group.bytes),
            lost: group.lost.as_ref().map(|(from, reason)| (*from, reason.to_string())),
            targets: group
                .targets
                .iter()
                .filter(|(_, target)| target.configured)
                .map(|(name, target)| CacheTarget {
                    name: name.clone(),
                    applied: target.applied,
                    backlog_bytes: group.backlog(target.applied.unwrap_or_default()),
                })
                .collect(),
        });
        CacheStatus {
            bytes_max: ByteCount(state.bytes_max),
            bytes_used: ByteCount(state.used),
            bytes_reserved: ByteCount(state.reserved),
            segments: state.segments.len() as u64,
            waiting: state.pressure,
            disk_full: state.disk_full,
            poisoned: state.poisoned.as_ref().map(|reason| reason.to_string()),
            groups: groups.collect(),
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cache {{ {} }}", self.shared.dir.display())
    }
}

/// How a cache is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheStatus {
    /// The most its segments may take.
    pub bytes_max: ByteCount,
    /// What they take.
    pub bytes_used: ByteCount,
    /// What the changesets that are arriving will still take.
    pub bytes_reserved: ByteCount,
    /// How many segments.
    pub segments: u64,
    /// Whether a changeset waits for room.
    pub waiting: bool,
    /// Whether the file system is full.
    pub disk_full: bool,
    /// Why it has stopped, when it has.
    pub poisoned: Option<String>,
    /// The groups, by id.
    pub groups: Vec<CacheGroup>,
}

/// A group in a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheGroup {
    /// Which.
    pub group: GroupId,
    /// The last that is held.
    pub held: Position,
    /// Up to here all is applied and freed.
    pub freed: Position,
    /// How many are held and not freed.
    pub changesets: u64,
    /// Their bytes.
    pub bytes: ByteCount,
    /// The first that was lost and why, when that happened. Later generations are not touched by it.
    pub lost: Option<(Position, String)>,
    /// Where it goes.
    pub targets: Vec<CacheTarget>,
}

/// A target of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheTarget {
    /// Its name.
    pub name: String,
    /// What it has applied; `None` until it was heard of.
    pub applied: Option<Position>,
    /// Held for it and not applied.
    pub backlog_bytes: ByteCount,
}

impl Group {
    /// A target that was renamed in the configuration goes on where it was under its old name.
    fn inherit(&mut self, holds: Position) -> bool {
        let former = self.targets.iter().find(|(_, target)| {
            let applied = target.applied.filter(|applied| applied.generation == holds.generation);
            !target.configured && applied.is_some_and(|applied| applied <= holds)
        });
        match former.map(|(name, _)| name.clone()) {
            Some(name) => self.targets.remove(&name).is_some(),
            None => false,
        }
    }

    fn backlog(&self, applied: Position) -> ByteCount {
        let at = self.entries.partition_point(|entry| entry.position <= applied);
        self.entries.range(at..).map(|entry| ByteCount(entry.total)).sum()
    }
}

fn ahead(holds: Position, held: Position) -> ReadError {
    ReadError::Ahead { holds, held }
}

/// A name that the cursor file cannot hold is no target; whoever asks for it hears that it is unknown.
fn usable(names: Vec<String>) -> impl Iterator<Item = String> {
    names.into_iter().filter(|name| {
        let fits = name.len() <= TARGET_NAME_BYTES_MAX;
        if !fits {
            tracing::error!(
                target = name,
                "name of a target is longer than {TARGET_NAME_BYTES_MAX} bytes: not used"
            );
        }
        fits
    })
}

/// Brings a group's targets in line with the configuration.
fn configure(state: &mut State, id: GroupId, targets: &TargetsOf) {
    let group = state.groups.entry(id).or_default();
    for name in usable(targets(id)) {
        group.targets.entry(name).or_default().configured = true;
    }
}

/// Step 2 of opening.
fn make_sure(storage: &dyn Storage, found: &Found) -> Result<(), CacheError> {
    for path in &found.leftovers {
        storage.remove(path).map_err(io_error("remove", path))?;
    }
    let Some((_, last)) = found.segments.iter().rev().find(|(_, segment)| !segment.remove) else {
        return remove_unmade(storage, found);
    };
    let file = storage.open(&last.path, OpenMode::ReadWrite).map_err(io_error("open", &last.path))?;
    let length = file.len().map_err(io_error("read", &last.path))?;
    let mut buffer = vec![0; REWRITE_BYTES];
    let mut at = last.unsure_from;
    while at < last.end {
        let count = usize::try_from(last.end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        file.read_exact_at(&mut buffer[..count], at).map_err(io_error("read", &last.path))?;
        file.write_all_at(&buffer[..count], at).map_err(io_error("write", &last.path))?;
        at += count as u64;
    }
    if length != last.end || last.unsure_from < last.end {
        file.set_len(last.end).map_err(io_error("cut", &last.path))?;
        file.sync_data().map_err(io_error("sync", &last.path))?;
    }
    remove_unmade(storage, found)
}

fn remove_unmade(storage: &dyn Storage, found: &Found) -> Result<(), CacheError> {
    for segment in found.segments.values().filter(|segment| segment.remove) {
        storage.remove(&segment.path).map_err(io_error("remove", &segment.path))?;
    }
    Ok(())
}

fn state(mut found: Found, options: &Options) -> State {
    let kept = found.segments.iter().filter(|(_, segment)| !segment.remove);
    let mut segments: BTreeMap<u64, SegmentUse> = kept
        .map(|(number, segment)| (*number, SegmentUse { bytes: segment.end, ..SegmentUse::default() }))
        .collect();
    let last = segments.last_key_value().map_or((0, 0), |(number, segment)| (*number, segment.bytes));
    let mut groups = BTreeMap::new();
    for (id, cursor) in std::mem::take(&mut found.cursors.groups) {
        let entries: VecDeque<_> = found.entries.remove(&id).unwrap_or_default().into();
        for chunk in entries.iter().flat_map(|entry| entry.chunks.iter()) {
            if let Some(segment) = segments.get_mut(&chunk.segment) {
                segment.live += 1;
            }
        }
        let mut targets: BTreeMap<String, Target> = cursor
            .targets
            .into_iter()
            .map(|(name, applied)| (name, Target { applied: Some(applied), configured: false }))
            .collect();
        for name in usable((options.targets)(id)) {
            let target = targets.entry(name).or_default();
            target.configured = true;
            if found.cursors_damaged {
                target.applied = Some(cursor.base);
            }
        }
        let mut group = Group {
            base: cursor.base,
            bytes: entries.iter().map(|entry| entry.total).sum(),
            entries,
            targets,
            lost: cursor.lost.map(|lost| (lost, "found when the cache was opened".into())),
            history: cursor.history,
            adopted: found.adopted.contains(&id),
            ..Group::default()
        };
        group.accepted = group.held();
        groups.insert(id, group);
    }
    for chunk in &found.dead {
        if let Some(segment) = segments.get_mut(&chunk.segment) {
            segment.bury(chunk);
        }
    }
    let mut state = State {
        bytes_max: options.bytes_max.get(),
        segment_bytes: options.segment_bytes.max(SEGMENT_BYTES_MIN).get(),
        used: segments.values().map(|segment| segment.bytes).sum(),
        groups,
        segments,
        queue: Vec::new(),
        reserved: 0,
        next_arrival: found.next_arrival,
        waiting: VecDeque::new(),
        pressure: false,
        disk_full: false,
        poisoned: None,
        closing: false,
        cursors_dirty: true,
        durable: last,
    };
    debug_assert!(state.used >= state.segments.len() as u64 * HEADER_BYTES as u64);
    let ids: Vec<GroupId> = state.groups.keys().copied().collect();
    for id in ids {
        state.free_applied(id);
    }
    state
}
