//! The log's writer: one thread that writes what all appenders queued, and makes it durable with one sync.
//!
//! The order, and what breaks when it is changed:
//! 1. a segment's name, header and space are durable before a record is written to it (else a held changeset may be
//!    in a file without a name after a crash, or a torn header may hide records);
//! 2. all records of a changeset are written, its last included, before the sync that covers it (else it is
//!    acknowledged and lost);
//! 3. the sync returns before anyone is told "held" and before the changeset can be read;
//! 4. a full segment is cut to its end and synced before the next is made (else a tear in the one that is no longer the last would
//!    be taken for damage).
//!
//! Retries: a write that finds the medium full is tried again when space may have been freed (nothing was
//! acknowledged, and it writes the same bytes to the same place). Any other error, and every error of a sync, poisons
//! the cache: after a failed sync the kernel may show data that the medium does not have.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Epoch, Generation, GroupId};
use durable::{OpenMode, StorageFile, fault_point};

use crate::cache::Shared;
use crate::error::CacheError;
use crate::format::{HEADER_BYTES, Kind, RecordHeader, SegmentHeader};
use crate::position::Position;
use crate::recover::{ChunkAt, Entry, segment_name};
use crate::state::{Barrier, Chunk, Event, Job, News, SEGMENT_START, SegmentUse, tell};

/// How long to wait before a full medium is tried again, unless something was freed before.
const FULL_WAIT: Duration = Duration::from_millis(500);
/// At most so many bytes are written between two syncs where changesets are waiting to be held.
const BATCH_BYTES_MAX: u64 = 32 << 20;
const PADDING: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

pub(crate) struct Writer {
    shared: Arc<Shared>,
    active: Option<Active>,
    next_segment: u64,
    /// What was written of changesets that are not ended.
    arriving: HashMap<u64, Vec<ChunkAt>>,
}

struct Active {
    file: Arc<dyn StorageFile>,
    path: PathBuf,
    header: SegmentHeader,
    end: u64,
    durable: u64,
}

/// Written, and held once the next sync returns.
struct Ended {
    group: GroupId,
    entry: Entry,
    chunk: Chunk,
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, next_segment: u64) -> Writer {
        Writer { shared, active: None, next_segment, arriving: HashMap::new() }
    }

    /// Runs until the cache is closed or poisoned.
    pub(crate) fn run(mut self) {
        loop {
            let mut state = self.shared.state.lock();
            while state.queue.is_empty() && !state.closing && state.poisoned.is_none() {
                self.shared.work.wait(&mut state);
            }
            if state.poisoned.is_some() || state.queue.is_empty() {
                break;
            }
            let jobs = std::mem::take(&mut state.queue);
            drop(state);
            if let Err(error) = self.process(jobs) {
                self.shared.poison(&error);
                break;
            }
        }
        if self.shared.state.lock().poisoned.is_none()
            && let Err(error) = self.finish()
        {
            self.shared.poison(&error);
        }
        let left = std::mem::take(&mut self.shared.state.lock().queue);
        for job in left {
            if let Job::Barrier(done) = job {
                done(Err(self.shared.state.lock().healthy().err().unwrap_or(CacheError::Closing)));
            }
        }
    }

    /// Writes jobs in order. Syncs when a changeset ended or somebody waits for it.
    fn process(&mut self, jobs: Vec<Job>) -> Result<(), CacheError> {
        let mut jobs = jobs.into_iter();
        let mut run: Vec<Chunk> = Vec::new();
        let mut run_bytes = 0;
        let mut ended = Vec::new();
        let mut barriers: Vec<Barrier> = Vec::new();
        loop {
            let job = jobs.next();
            let room =
                self.active.as_ref().map_or(0, |active| self.shared.segment_bytes.saturating_sub(active.end));
            let full = run_bytes >= room || run_bytes >= BATCH_BYTES_MAX;
            if !run.is_empty() && (full || !matches!(job, Some(Job::Chunk(_)))) {
                let bytes = std::mem::take(&mut run_bytes);
                if let Err(error) = self.write(std::mem::take(&mut run), &mut ended) {
                    fail(barriers, jobs, &error);
                    return Err(error);
                }
                if bytes >= BATCH_BYTES_MAX
                    && !ended.is_empty()
                    && let Err(error) = self.hold(&mut ended)
                {
                    fail(barriers, jobs, &error);
                    return Err(error);
                }
            }
            match job {
                Some(Job::Chunk(chunk)) => {
                    run_bytes += record_bytes(&chunk);
                    run.push(chunk);
                }
                Some(Job::Abandon { arrival }) => {
                    if let Some(chunks) = self.arriving.remove(&arrival) {
                        self.shared.state.lock().release(&chunks);
                    }
                }
                Some(Job::Barrier(done)) => barriers.push(done),
                None => break,
            }
        }
        if !ended.is_empty()
            && let Err(error) = self.hold(&mut ended)
        {
            fail(barriers, jobs, &error);
            return Err(error);
        }
        for done in barriers {
            done(Ok(()));
        }
        Ok(())
    }

    /// Writes records with one call.
    fn write(&mut self, run: Vec<Chunk>, ended: &mut Vec<Ended>) -> Result<(), CacheError> {
        if self.active.as_ref().is_some_and(|active| active.end >= self.shared.segment_bytes) {
            self.seal()?;
        }
        if self.active.is_none() {
            self.active = Some(self.create()?);
        }
        let active = self.active.as_mut().expect("made above");
        let start = active.end;
        let mut end = start;
        let mut headers = Vec::with_capacity(run.len());
        let mut places = Vec::with_capacity(run.len());
        for chunk in &run {
            let header = RecordHeader {
                kind: if chunk.last { Kind::Last } else { Kind::Chunk },
                segment: active.header,
                offset: end,
                durable: active.durable,
                arrival: chunk.arrival,
                group: chunk.group,
                position: chunk.position,
                total: chunk.total,
                chunk_offset: chunk.offset,
                length: chunk.length,
                checksum: chunk.checksum,
            };
            end = header.end();
            headers.push(header.encode());
            places.push(ChunkAt {
                segment: active.header.number,
                offset: header.payload_offset(),
                length: chunk.length,
                checksum: chunk.checksum,
            });
        }
        let mut slices = Vec::with_capacity(run.iter().map(|chunk| chunk.pieces.len() + 2).sum());
        for (chunk, header) in run.iter().zip(&headers) {
            slices.push(IoSlice::new(header));
            slices.extend(chunk.pieces.iter().map(|piece| IoSlice::new(piece)));
            let padding = record_bytes(chunk) as usize - HEADER_BYTES - chunk.length as usize;
            slices.push(IoSlice::new(&PADDING[..padding]));
        }
        fault_point("before-cache-write");
        while let Err(source) = active.file.write_all_vectored_at(&slices, start) {
            wait_for_space(&self.shared, "write", &active.path, source)?;
        }
        active.end = end;
        fault_point("after-cache-write");

        let mut news: News = Vec::with_capacity(run.len());
        let mut state = self.shared.state.lock();
        state.disk_full = false;
        let written = end - start;
        state.used += written;
        state.reserved -= written;
        let segment = state.segments.entry(active.header.number).or_default();
        segment.bytes += written;
        segment.live += places.len() as u64;
        drop(state);
        for (mut chunk, place) in run.into_iter().zip(places) {
            chunk.pieces = Vec::new();
            news.push((chunk.observer.clone(), Event::Written(block::ByteCount(u64::from(chunk.length)))));
            let mut chunks = self.arriving.remove(&chunk.arrival).unwrap_or_default();
            chunks.push(place);
            if chunk.last {
                let entry = Entry { position: chunk.position, total: chunk.total, chunks: chunks.into() };
                ended.push(Ended { group: chunk.group, entry, chunk });
            } else {
                self.arriving.insert(chunk.arrival, chunks);
            }
        }
        tell(news);
        Ok(())
    }

    /// Makes everything written durable, then lets it be read and says so.
    fn hold(&mut self, ended: &mut Vec<Ended>) -> Result<(), CacheError> {
        self.sync()?;
        let mut news: News = Vec::with_capacity(ended.len());
        let mut state = self.shared.state.lock();
        for Ended { group, entry, chunk } in ended.drain(..) {
            let epoch = entry.position.epoch;
            if state.hold(group, entry) {
                news.push((chunk.observer, Event::Held(epoch)));
            }
        }
        drop(state);
        tell(news);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), CacheError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.durable == active.end {
            return Ok(());
        }
        let started = Instant::now();
        active.file.sync_data().map_err(io_error("sync", &active.path))?;
        fault_point("after-cache-sync");
        if let Some(on_sync) = &self.shared.on_sync {
            on_sync(started.elapsed());
        }
        active.durable = active.end;
        self.shared.state.lock().durable = (active.header.number, active.durable);
        Ok(())
    }

    /// Ends the active segment.
    fn seal(&mut self) -> Result<(), CacheError> {
        if let Some(active) = &self.active {
            // Gives back what was allocated ahead, so that a segment that is not the last ends where its records end.
            active.file.set_len(active.end).map_err(io_error("cut", &active.path))?;
            active.file.sync_data().map_err(io_error("sync", &active.path))?;
            let mut state = self.shared.state.lock();
            if let Some(segment) = state.segments.get_mut(&active.header.number) {
                segment.active = false;
            }
            // With it the cursor file vouches for all of the segment before anything is punched out of it.
            state.durable = (active.header.number, active.end);
            state.cursors_dirty = true;
            self.active = None;
        }
        Ok(())
    }

    fn create(&mut self) -> Result<Active, CacheError> {
        let number = self.next_segment;
        let path = self.shared.dir.join(segment_name(number));
        let header = SegmentHeader { number, salt: salt() };
        let storage = &*self.shared.storage;
        let make = || -> io::Result<Arc<dyn StorageFile>> {
            // Not `CreateNew`: an earlier try may have found the medium full half-way.
            let file = storage.open(&path, OpenMode::CreateOrOpen)?;
            file.set_len(0)?;
            file.allocate(0, self.shared.segment_bytes)?;
            file.write_all_at(&header.encode(), 0)?;
            Ok(file)
        };
        let file = loop {
            match make() {
                Ok(file) => break file,
                Err(source) => wait_for_space(&self.shared, "create", &path, source)?,
            }
        };
        fault_point("before-segment-sync");
        file.sync_data().map_err(io_error("sync", &path))?;
        storage.sync_dir(&self.shared.dir).map_err(io_error("sync directory", &self.shared.dir))?;
        self.next_segment += 1;
        let mut state = self.shared.state.lock();
        state.used += SEGMENT_START;
        let segment = SegmentUse { bytes: SEGMENT_START, active: true, ..SegmentUse::default() };
        state.segments.insert(number, segment);
        Ok(Active { file, path, header, end: SEGMENT_START, durable: SEGMENT_START })
    }

    /// Closing in good order: the log says that all of it is durable, so that opening has nothing to make sure of.
    fn finish(&mut self) -> Result<(), CacheError> {
        self.sync()?;
        if let Some(active) = &mut self.active {
            let mark = RecordHeader {
                kind: Kind::Mark,
                segment: active.header,
                offset: active.end,
                durable: active.durable,
                arrival: 0,
                group: GroupId([0; 16]),
                position: Position { generation: Generation(0), epoch: Epoch::NONE },
                total: 0,
                chunk_offset: 0,
                length: 0,
                checksum: 0,
            };
            active.file.write_all_at(&mark.encode(), active.end).map_err(io_error("write", &active.path))?;
            active.end = mark.end();
            // With its end known, opening need not look for where it is.
            active.file.set_len(active.end).map_err(io_error("cut", &active.path))?;
            self.sync()?;
        }
        Ok(())
    }
}

fn record_bytes(chunk: &Chunk) -> u64 {
    crate::format::record_bytes(chunk.length as usize)
}

fn io_error(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| CacheError::Io { action, path, source }
}

/// The cache is about to be poisoned; who waits for a barrier must hear of it.
fn fail(barriers: Vec<Barrier>, jobs: impl Iterator<Item = Job>, error: &CacheError) {
    let reason: Arc<str> = error.to_string().into();
    let left = jobs.filter_map(|job| if let Job::Barrier(done) = job { Some(done) } else { None });
    for done in barriers.into_iter().chain(left) {
        done(Err(CacheError::Poisoned(reason.clone())));
    }
}

/// Returns when a full medium may be tried again.
fn wait_for_space(
    shared: &Shared,
    action: &'static str,
    path: &std::path::Path,
    source: io::Error,
) -> Result<(), CacheError> {
    let full = matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let mut state = shared.state.lock();
    if !full || state.closing {
        return Err(CacheError::Io { action, path: path.to_owned(), source });
    }
    if !state.disk_full {
        tracing::warn!(path = %path.display(), "{action} cache segment: the file system is full; sources wait");
    }
    state.disk_full = true;
    shared.keep.notify_all();
    shared.freed.wait_for(&mut state, FULL_WAIT);
    Ok(())
}

/// Not guessable by who sends changesets: seeded by the system for each process.
fn salt() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}
