use std::fmt;
use std::sync::Arc;

use block::{ByteCount, Epoch, Generation, GroupId};
use bytes::{Bytes, BytesMut};

use crate::cache::Shared;
use crate::error::AppendError;
use crate::format::{CHUNK_BYTES, record_bytes};
use crate::position::Position;
use crate::state::{Chunk, Job, News, Observer, changeset_bytes, tell};

/// A piece shorter than this is copied together with its neighbours, in bytes: a list of many tiny pieces would cost
/// more than the copy.
const COPY_BYTES_MAX: usize = 4096;

/// Takes the changesets of one group and generation in, in order. Only the last one opened for a group works.
///
/// Memory: less than two [`CHUNK_BYTES`] here, and what was pushed and not yet reported as
/// [`Event::Written`](crate::Event::Written).
/// Cancellation: dropping it discards the changeset that is not ended; what was ended is held in its time.
pub struct Appender {
    shared: Arc<Shared>,
    group: GroupId,
    generation: Generation,
    owner: u64,
    held: Epoch,
    observer: Observer,
    open: Option<OpenChangeset>,
}

struct OpenChangeset {
    arrival: u64,
    position: Position,
    total: u64,
    /// Given to the writer so far.
    queued: u64,
    /// Of the log; given back when the changeset is abandoned.
    reserved: u64,
    pieces: Vec<Bytes>,
    small: BytesMut,
    /// In `pieces` and `small`.
    length: usize,
    checksum: u32,
}

impl Appender {
    pub(crate) fn new(
        shared: Arc<Shared>,
        group: GroupId,
        generation: Generation,
        owner: u64,
        observer: Observer,
    ) -> Result<Appender, AppendError> {
        let held = shared.state.lock().check_owner(group, owner)?.held().epoch_in(generation);
        Ok(Appender { shared, group, generation, owner, held, observer, open: None })
    }

    /// The last epoch of the generation that was held when this was opened. The next one begins after it.
    pub fn held(&self) -> Epoch {
        self.held
    }

    /// Begins a changeset of `total` bytes: checks that it comes next, and sets its space aside, so that it can be
    /// completed. An unfinished one before it is discarded.
    ///
    /// # Errors
    /// Nothing changed. [`AppendError::Full`]: try again at [`Event::Room`](crate::Event::Room).
    pub fn begin(&mut self, epoch: Epoch, total: ByteCount) -> Result<(), AppendError> {
        self.abandon();
        let position = Position { generation: self.generation, epoch };
        let mut state = self.shared.state.lock();
        let begun = state.begin(self.group, self.owner, position, total);
        if let Err(AppendError::Full { .. }) = begun {
            self.shared.keep.notify_all();
        }
        drop(state);
        let (arrival, news) = begun?;
        tell(news);
        self.open = Some(OpenChangeset {
            arrival,
            position,
            total: total.get(),
            queued: 0,
            reserved: changeset_bytes(total),
            pieces: Vec::new(),
            small: BytesMut::new(),
            length: 0,
            checksum: 0,
        });
        Ok(())
    }

    /// Adds bytes. Never waits; memory is bounded by what the caller takes in before it hears
    /// [`Event::Written`](crate::Event::Written).
    ///
    /// # Errors
    /// When there are more than announced, or the appender is of no more use.
    pub fn push(&mut self, mut bytes: Bytes) -> Result<(), AppendError> {
        let open = self.open.as_mut().ok_or(AppendError::Protocol("bytes outside of a changeset"))?;
        let left = open.total - open.queued - open.length as u64;
        if bytes.len() as u64 > left {
            return Err(AppendError::Protocol("more bytes than announced"));
        }
        while !bytes.is_empty() {
            if open.length == CHUNK_BYTES {
                // There is more, so this is not the last record.
                let chunk = open.take(self.group, &self.observer, false);
                let bytes = record_bytes(chunk.length as usize);
                if let Err(error) = enqueue(&self.shared, self.group, self.owner, chunk) {
                    open.reserved += bytes;
                    return Err(error);
                }
            }
            let part = bytes.split_to(bytes.len().min(CHUNK_BYTES - open.length));
            open.add(part);
        }
        Ok(())
    }

    /// Ends the changeset. It is held when [`Event::Held`](crate::Event::Held) says so.
    ///
    /// # Errors
    /// When there were fewer bytes than announced, or the appender is of no more use. The changeset is discarded.
    pub fn end(&mut self) -> Result<(), AppendError> {
        let Some(mut open) = self.open.take() else {
            return Err(AppendError::Protocol("an end outside of a changeset"));
        };
        if open.queued + open.length as u64 != open.total {
            self.open = Some(open);
            self.abandon();
            return Err(AppendError::Protocol("fewer bytes than announced"));
        }
        let chunk = open.take(self.group, &self.observer, true);
        let bytes = record_bytes(chunk.length as usize);
        let ended = enqueue(&self.shared, self.group, self.owner, chunk);
        if ended.is_err() {
            open.reserved += bytes;
            self.open = Some(open);
            self.abandon();
        }
        ended
    }

    /// Discards the changeset that is not ended.
    fn abandon(&mut self) {
        if let Some(open) = self.open.take() {
            let mut news = News::new();
            let mut state = self.shared.state.lock();
            state.reserved -= open.reserved;
            if state.poisoned.is_none() {
                state.queue.push(Job::Abandon { arrival: open.arrival });
            }
            state.room(&mut news);
            drop(state);
            self.shared.work.notify_one();
            tell(news);
        }
    }
}

/// Hands a record to the writer, unless another appender took over.
fn enqueue(shared: &Shared, group: GroupId, owner: u64, chunk: Chunk) -> Result<(), AppendError> {
    let mut state = shared.state.lock();
    state.check_owner(group, owner)?;
    if chunk.last
        && let Some(group) = state.groups.get_mut(&group)
    {
        group.accepted = chunk.position;
        group.adopted = false;
    }
    state.queue.push(Job::Chunk(chunk));
    drop(state);
    shared.work.notify_one();
    Ok(())
}

impl OpenChangeset {
    fn add(&mut self, part: Bytes) {
        self.checksum = crc32c::crc32c_append(self.checksum, &part);
        self.length += part.len();
        if part.len() <= COPY_BYTES_MAX {
            self.small.extend_from_slice(&part);
        } else {
            self.flush_small();
            self.pieces.push(part);
        }
    }

    fn flush_small(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push(self.small.split().freeze());
        }
    }

    /// What was gathered, as a record. Its part of the reservation goes with it.
    fn take(&mut self, group: GroupId, observer: &Observer, last: bool) -> Chunk {
        self.flush_small();
        let chunk = Chunk {
            arrival: self.arrival,
            group,
            position: self.position,
            total: self.total,
            offset: self.queued,
            pieces: std::mem::take(&mut self.pieces),
            length: self.length as u32,
            checksum: self.checksum,
            last,
            observer: observer.clone(),
        };
        self.reserved -= record_bytes(self.length);
        self.queued += self.length as u64;
        self.length = 0;
        self.checksum = 0;
        chunk
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        self.abandon();
        let mut news = News::new();
        let mut state = self.shared.state.lock();
        state.leave_queue(self.group, self.owner, &mut news);
        let group = state.groups.get_mut(&self.group).filter(|group| group.owner == self.owner);
        let observer = group.and_then(|group| group.observer.take());
        drop(state);
        // The observer may own anything; it is let go outside of the lock.
        drop(observer);
        tell(news);
    }
}

impl fmt::Debug for Appender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = self.open.as_ref().map(|open| open.position.epoch);
        write!(f, "Appender {{ {:?}, generation: {}, open: {open:?} }}", self.group, self.generation)
    }
}
