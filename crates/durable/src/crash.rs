//! A simulated file system in memory that can fail and crash.
//!
//! It keeps the medium's rules as written at [`Storage`], at their worst: of what was not synced any part may survive
//! a crash, in units of one sector, and a file's length and data independently of each other. Names that were not
//! synced survive or not, one by one. For tests, of this crate and of those built on it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::pages::Pages;
use crate::{OpenMode, Storage, StorageFile};

/// A write may be torn at a multiple of this.
const SECTOR: u64 = 512;

/// What an injected failure says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// EIO. At a sync, an arbitrary part of what was to be synced reaches the medium and a later sync succeeds
    /// without the rest, as on Linux.
    InputOutput,
    /// A write takes only its first half, and what follows it ENOSPC: what a full medium does in the middle of one. Other
    /// operations as with [`Fault::NoSpace`].
    ShortWrite,
    /// ENOSPC (kind `StorageFull`). Hits writes, allocations, extensions and creations; syncs and removals go through.
    NoSpace,
}

/// Files in memory, with crashes and failures on demand.
///
/// Mutating operations (create, write, cut, allocate, zero, sync, rename, remove) are counted. [`stop_at`] makes the
/// machine stop in the middle of one, so that a test can try a crash at every step:
///
/// ```
/// # use durable::{CrashStorage, Storage, replace};
/// # use std::path::Path;
/// for stop in 0.. {
///     let storage = CrashStorage::new();
///     storage.stop_at(stop);
///     let finished = replace(&storage, Path::new("/file"), b"content").is_ok();
///     for seed in 0..10 {
///         let after = storage.crash(seed);
///         assert!(!finished || after.exists(Path::new("/file")).unwrap());
///     }
///     if finished {
///         break;
///     }
/// }
/// ```
///
/// [`stop_at`]: CrashStorage::stop_at
#[derive(Clone, Default)]
pub struct CrashStorage {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    names: BTreeMap<PathBuf, Arc<SimulatedFile>>,
    names_durable: BTreeMap<PathBuf, Arc<SimulatedFile>>,
    /// Since each directory's last sync, in order.
    names_pending: Vec<NameChange>,
    directories: BTreeSet<PathBuf>,
    operations: u64,
    stop_at: Option<u64>,
    fault: Option<(std::ops::Range<u64>, Fault)>,
    stopped: bool,
}

/// One step as the medium sees it: all of its entries appear together or not at all.
struct NameChange {
    directory: PathBuf,
    entries: Vec<(PathBuf, Option<Arc<SimulatedFile>>)>,
}

#[derive(Default)]
struct SimulatedFile {
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    seen: Pages,
    durable: Pages,
    /// Since the last sync, in order.
    pending: Vec<Change>,
    locked: bool,
}

#[derive(Clone)]
enum Change {
    Write(u64, Arc<[u8]>),
    Zero(u64, u64),
    SetLen(u64),
}

/// What happens to the operation at hand.
#[derive(PartialEq, Eq)]
enum Verdict {
    Done,
    /// It is under way when the machine stops: it may or may not have had its effect.
    Interrupted,
}

impl CrashStorage {
    /// An empty file system with the root directory.
    pub fn new() -> CrashStorage {
        CrashStorage::default()
    }

    /// How many mutating operations were begun so far.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// Lets operations up to number `operation` (counted from 0) finish and stops the machine in the middle of that
    /// one: it and everything after it fails. What it was about to write may be found after a crash, or not.
    pub fn stop_at(&self, operation: u64) {
        self.state.lock().stop_at = Some(operation);
    }

    /// Makes mutating operation number `operation` (counted from 0) fail.
    pub fn fail_at(&self, operation: u64, fault: Fault) {
        self.state.lock().fault = Some((operation..operation + 1, fault));
    }

    /// Makes every mutating operation from number `operation` on fail, until [`CrashStorage::mend`].
    pub fn fail_from(&self, operation: u64, fault: Fault) {
        self.state.lock().fault = Some((operation..u64::MAX, fault));
    }

    /// Takes back an injected failure. What it did to the medium stays done.
    pub fn mend(&self) {
        self.state.lock().fault = None;
    }

    /// Stops this machine and gives one that a crash at this moment may leave; the seed picks which. Open handles of
    /// the old one fail from now on. May be called again with other seeds, each for another possible outcome.
    ///
    /// Seed 0 loses everything that was not synced, seed 1 nothing; the others mix.
    pub fn crash(&self, seed: u64) -> CrashStorage {
        let mut state = self.state.lock();
        state.stopped = true;
        let mut luck = Luck::new(seed);
        let mut files: HashMap<*const SimulatedFile, Arc<SimulatedFile>> = HashMap::new();
        let mut survive = |file: &Arc<SimulatedFile>, luck: &mut Luck| -> Arc<SimulatedFile> {
            let made = files.entry(Arc::as_ptr(file)).or_insert_with(|| {
                let content = file.content.lock();
                let durable = survivors(&content.durable, &content.pending, luck);
                let content = Content { seen: durable.clone(), durable, ..Content::default() };
                Arc::new(SimulatedFile { content: Mutex::new(content) })
            });
            Arc::clone(made)
        };
        let mut names: BTreeMap<PathBuf, Arc<SimulatedFile>> = BTreeMap::new();
        for (path, file) in &state.names_durable {
            names.insert(path.clone(), survive(file, &mut luck));
        }
        for change in &state.names_pending {
            if luck.holds() {
                for (path, file) in &change.entries {
                    match file {
                        Some(file) => names.insert(path.clone(), survive(file, &mut luck)),
                        None => names.remove(path),
                    };
                }
            }
        }
        let after = State {
            names_durable: names.clone(),
            names,
            directories: state.directories.clone(),
            ..State::default()
        };
        CrashStorage { state: Arc::new(Mutex::new(after)) }
    }

    fn running(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state.lock();
        if state.stopped { Err(stopped()) } else { Ok(state) }
    }
}

impl fmt::Debug for CrashStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        write!(f, "CrashStorage {{ files: {}, operations: {} }}", state.names.len(), state.operations)
    }
}

impl State {
    /// Counts a mutating operation and says what becomes of it. `grows`: whether a full medium can refuse it.
    fn begin(&mut self, grows: bool) -> io::Result<Verdict> {
        let operation = self.operations;
        self.operations += 1;
        if self.stop_at.is_some_and(|stop| operation >= stop) {
            self.stopped = true;
            return Ok(Verdict::Interrupted);
        }
        match &self.fault {
            Some((range, Fault::InputOutput)) if range.contains(&operation) => {
                Err(rustix::io::Errno::IO.into())
            }
            Some((range, Fault::NoSpace | Fault::ShortWrite)) if grows && range.contains(&operation) => {
                Err(rustix::io::Errno::NOSPC.into())
            }
            _ => Ok(Verdict::Done),
        }
    }

    /// Whether a write that fails now leaves half of it.
    fn is_short(&self) -> bool {
        matches!(self.fault, Some((_, Fault::ShortWrite)))
    }

    fn change_names(&mut self, directory: &Path, entries: Vec<(PathBuf, Option<Arc<SimulatedFile>>)>) {
        for (path, file) in &entries {
            match file {
                Some(file) => self.names.insert(path.clone(), Arc::clone(file)),
                None => self.names.remove(path),
            };
        }
        self.names_pending.push(NameChange { directory: directory.to_owned(), entries });
    }
}

impl Verdict {
    fn finish<T>(self, value: T) -> io::Result<T> {
        if self == Verdict::Done { Ok(value) } else { Err(stopped()) }
    }
}

fn stopped() -> io::Error {
    io::Error::other("the simulated machine has stopped")
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_owned()
}

fn apply(pages: &mut Pages, change: &Change) {
    match change {
        Change::Write(offset, data) => pages.write(data, *offset),
        Change::Zero(offset, length) => pages.zero(*offset, *length),
        Change::SetLen(length) => pages.set_len(*length),
    }
}

/// What a crash leaves of a file: what was synced, and any sectors of the rest.
fn survivors(durable: &Pages, pending: &[Change], luck: &mut Luck) -> Pages {
    let mut pages = durable.clone();
    for change in pending {
        match change {
            Change::Write(offset, data) => {
                let end = offset + data.len() as u64;
                // A new length may be there without the data.
                if end > pages.len() && luck.holds() {
                    pages.set_len(end);
                }
                let mut start = *offset;
                while start < end {
                    let stop = ((start / SECTOR + 1) * SECTOR).min(end);
                    if luck.holds() {
                        pages.write(&data[(start - offset) as usize..(stop - offset) as usize], start);
                    }
                    start = stop;
                }
            }
            change if luck.holds() => apply(&mut pages, change),
            _ => {}
        }
    }
    pages
}

impl Storage for CrashStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut state = self.running()?;
        let found = state.names.get(path).cloned();
        let file = match (found, mode) {
            (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(file), _) => file,
            (None, OpenMode::Read | OpenMode::ReadWrite) => return Err(io::ErrorKind::NotFound.into()),
            (None, OpenMode::CreateNew | OpenMode::CreateOrOpen) => {
                let directory = directory_of(path);
                if !is_root(&directory) && !state.directories.contains(&directory) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                let verdict = state.begin(true)?;
                let file = Arc::new(SimulatedFile::default());
                state.change_names(&directory, vec![(path.to_owned(), Some(Arc::clone(&file)))]);
                verdict.finish(file)?
            }
        };
        let handle =
            Handle { storage: self.clone(), file, writable: mode != OpenMode::Read, lock: Mutex::new(false) };
        Ok(Arc::new(handle))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.running()?;
        let file = state.names.get(from).cloned().ok_or(io::ErrorKind::NotFound)?;
        let verdict = state.begin(true)?;
        let (gone, there) = ((from.to_owned(), None), (to.to_owned(), Some(file)));
        let (source, target) = (directory_of(from), directory_of(to));
        if source == target {
            state.change_names(&target, vec![gone, there]);
        } else {
            state.change_names(&target, vec![there]);
            state.change_names(&source, vec![gone]);
        }
        verdict.finish(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.running()?;
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let verdict = state.begin(false)?;
        state.change_names(&directory_of(path), vec![(path.to_owned(), None)]);
        verdict.finish(())
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.running()?;
        if is_root(path) || state.directories.contains(path) {
            return Ok(());
        }
        let verdict = state.begin(true)?;
        // Interrupted: none of it is there, which is what the rule "durable when it returned" allows.
        verdict.finish(())?;
        for directory in path.ancestors().filter(|directory| !is_root(directory)) {
            state.directories.insert(directory.to_owned());
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.running()?;
        if !is_root(dir) && !state.directories.contains(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = state.names.keys().chain(&state.directories).filter(|path| directory_of(path) == dir);
        let mut names: Vec<String> =
            inside.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let state = self.running()?;
        Ok(is_root(path) || state.names.contains_key(path) || state.directories.contains(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.running()?;
        state.begin(false)?.finish(())?;
        let pending = std::mem::take(&mut state.names_pending);
        for change in pending {
            if change.directory != dir {
                state.names_pending.push(change);
                continue;
            }
            for (path, file) in change.entries {
                match file {
                    Some(file) => state.names_durable.insert(path, file),
                    None => state.names_durable.remove(&path),
                };
            }
        }
        Ok(())
    }
}

fn is_root(path: &Path) -> bool {
    path.as_os_str().is_empty() || path == Path::new("/")
}

struct Handle {
    storage: CrashStorage,
    file: Arc<SimulatedFile>,
    writable: bool,
    lock: Mutex<bool>,
}

impl Handle {
    fn change(&self, grows: bool, change: Change) -> io::Result<()> {
        let mut state = self.storage.running()?;
        if !self.writable {
            return Err(rustix::io::Errno::BADF.into());
        }
        let begun = state.begin(grows);
        let mut content = self.file.content.lock();
        let verdict = match (begun, &change) {
            (Ok(verdict), _) => verdict,
            (Err(error), Change::Write(offset, data))
                if error.kind() == io::ErrorKind::StorageFull && state.is_short() =>
            {
                let half = Change::Write(*offset, data[..data.len() / 2].into());
                apply(&mut content.seen, &half);
                content.pending.push(half);
                return Err(error);
            }
            (Err(error), _) => return Err(error),
        };
        apply(&mut content.seen, &change);
        content.pending.push(change);
        verdict.finish(())
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle {{ bytes: {} }}", self.file.content.lock().seen.len())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if *self.lock.lock() {
            self.file.content.lock().locked = false;
        }
    }
}

impl StorageFile for Handle {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let _running = self.storage.running()?;
        Ok(self.file.content.lock().seen.read(buffer, offset))
    }

    fn write_all_vectored_at(&self, slices: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        let data: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        if data.is_empty() {
            return Ok(());
        }
        self.change(true, Change::Write(offset, data.into()))
    }

    fn len(&self) -> io::Result<u64> {
        let _running = self.storage.running()?;
        Ok(self.file.content.lock().seen.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(length > self.len()?, Change::SetLen(length))
    }

    fn zero_range(&self, offset: u64, length: u64) -> io::Result<()> {
        let length = self.len()?.saturating_sub(offset).min(length);
        self.change(false, Change::Zero(offset, length))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let _running = self.storage.running()?;
        Ok(self.file.content.lock().seen.next_data(offset))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.saturating_add(length).max(self.len()?);
        self.change(true, Change::SetLen(end))
    }

    fn try_lock(&self) -> io::Result<bool> {
        let _running = self.storage.running()?;
        let mut mine = self.lock.lock();
        let mut content = self.file.content.lock();
        if !*mine && content.locked {
            return Ok(false);
        }
        content.locked = true;
        *mine = true;
        Ok(true)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.storage.running()?;
        let begun = state.begin(false);
        let mut content = self.file.content.lock();
        let content = &mut *content;
        match begun {
            Ok(Verdict::Done) => {
                // Not `seen`: what an earlier failed sync lost stays lost.
                for change in content.pending.drain(..) {
                    apply(&mut content.durable, &change);
                }
                Ok(())
            }
            Ok(Verdict::Interrupted) => Err(stopped()),
            Err(error) => {
                let mut luck = Luck::new(state.operations.max(2));
                content.durable = survivors(&content.durable, &content.pending, &mut luck);
                content.pending.clear();
                Err(error)
            }
        }
    }
}

/// Decides what survives: a splitmix64 sequence, so that a seed always gives the same outcome.
struct Luck {
    state: u64,
    /// Out of 8; what is not synced survives this often.
    chances: u64,
}

impl Luck {
    fn new(seed: u64) -> Luck {
        let mut luck = Luck { state: seed, chances: 0 };
        luck.chances = match seed {
            0 => 0,
            1 => 8,
            _ => [1, 4, 7, 4][(luck.next() % 4) as usize],
        };
        luck
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn holds(&mut self) -> bool {
        self.next() % 8 < self.chances
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path() -> &'static Path {
        Path::new("/d/file")
    }

    fn made() -> (CrashStorage, Arc<dyn StorageFile>) {
        let storage = CrashStorage::new();
        storage.create_dir_all(Path::new("/d")).unwrap();
        let file = storage.open(path(), OpenMode::CreateNew).unwrap();
        storage.sync_dir(Path::new("/d")).unwrap();
        (storage, file)
    }

    fn found(storage: &CrashStorage) -> Vec<u8> {
        let file = storage.open(path(), OpenMode::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_was_synced_stays_and_the_rest_may_go() {
        let (storage, file) = made();
        file.write_all_at(&[1; 2048], 0).unwrap();
        file.sync_data().unwrap();
        file.write_all_at(&[2; 2048], 1024).unwrap();
        assert_eq!(found(&storage.crash(0)), [1; 2048]);
        assert_eq!(found(&storage.crash(1)), [[1; 1024].as_slice(), &[2; 2048]].concat());
        let mut torn = false;
        for seed in 2..200 {
            let bytes = found(&storage.crash(seed));
            assert_eq!(bytes[..1024], [1; 1024]);
            for sector in bytes[1024..].chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "torn inside a sector");
            }
            torn |= bytes.len() == 3072 && bytes[1024] != bytes[1536];
        }
        assert!(torn, "no seed tore the write");
        assert!(file.read_at(&mut [0], 0).is_err(), "a handle outlived the crash");
        assert!(storage.exists(path()).is_err());
    }

    #[test]
    fn a_name_that_was_not_synced_may_go_and_its_content_too() {
        let (storage, file) = made();
        file.write_all_at(b"old", 0).unwrap();
        file.sync_data().unwrap();
        let new = storage.open(Path::new("/d/new"), OpenMode::CreateNew).unwrap();
        new.write_all_at(b"new", 0).unwrap();
        storage.rename(Path::new("/d/new"), path()).unwrap();
        let outcomes: BTreeSet<Vec<u8>> = (0..100).map(|seed| found(&storage.crash(seed))).collect();
        let expected = [b"old".to_vec(), b"new".to_vec(), vec![0; 3], vec![]];
        assert_eq!(outcomes, expected.into_iter().collect(), "rename without sync has these four outcomes");
    }

    #[test]
    fn a_failed_sync_loses_what_a_later_sync_does_not_bring_back() {
        let (storage, file) = made();
        file.write_all_at(&[7; 64 * 512], 0).unwrap();
        storage.fail_at(storage.operations(), Fault::InputOutput);
        assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
        file.sync_data().unwrap();
        let mut seen = [0; 64 * 512];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == [7; 64 * 512], "the cache still shows it");
        assert!(found(&storage.crash(1)) != seen, "but the medium has not all of it");
    }

    #[test]
    fn a_short_write_leaves_half_and_an_error() {
        let (storage, file) = made();
        file.write_all_at(&[1; 10], 0).unwrap();
        storage.fail_at(storage.operations(), Fault::ShortWrite);
        assert_eq!(file.write_all_at(&[2; 8], 4).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(found(&storage), [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]);
        file.sync_data().unwrap();
        assert_eq!(found(&storage.crash(0)), [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]);
    }

    #[test]
    fn a_full_medium_refuses_growth_only() {
        let (storage, file) = made();
        storage.fail_from(storage.operations(), Fault::NoSpace);
        assert_eq!(file.write_all_at(&[1], 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.allocate(0, 10).unwrap_err().kind(), io::ErrorKind::StorageFull);
        file.sync_data().unwrap();
        storage.remove(path()).unwrap();
        storage.mend();
        file.write_all_at(&[1], 0).unwrap();
    }

    #[test]
    fn the_stopped_operation_may_or_may_not_have_happened() {
        let (storage, file) = made();
        storage.stop_at(storage.operations());
        assert!(file.write_all_at(&[9; 512], 0).is_err());
        assert!(file.sync_data().is_err(), "the machine has stopped");
        assert!(found(&storage.crash(0)).is_empty());
        assert_eq!(found(&storage.crash(1)), [9; 512]);
    }

    #[test]
    fn one_handle_at_a_time_has_the_lock() {
        let (storage, file) = made();
        let other = storage.open(path(), OpenMode::Read).unwrap();
        assert!(file.try_lock().unwrap() && file.try_lock().unwrap());
        assert!(!other.try_lock().unwrap());
        drop(file);
        assert!(other.try_lock().unwrap());
        assert!(storage.crash(1).open(path(), OpenMode::Read).unwrap().try_lock().unwrap());
    }
}
