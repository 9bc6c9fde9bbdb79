//! Answers, gathered so that many small ones leave in one call, and large ones piece by piece.

use std::io;
use std::sync::Arc;

use block::{ByteCount, ByteOffset};

use crate::channel::Channel;
use crate::disk::{Disk, DiskError};
use crate::protocol::{
    ALLOCATION_ID, HOLE_AND_ZERO, Request, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, errno, flag,
};
use crate::{HOLE_CHECK_BYTES, PIECE_BYTES, STATUS_EXTENTS_MAX};

/// Heads and small answers beside one piece.
const ROOM_BYTES: usize = 64 * 1024;
const CHUNK_HEAD_BYTES: usize = 20;
const SIMPLE_HEAD_BYTES: usize = 16;

/// Why a request is answered with an error.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) errno: u32,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(errno: u32, message: &str) -> Failure {
        Failure { errno, message: message.to_owned() }
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Failure {
        let errno = match &error {
            DiskError::NoSpace(_) => errno::NO_SPACE,
            DiskError::Replica(error) if error.is_retryable() => {
                tracing::warn!(%error, "write to an exported disk");
                errno::NO_SPACE
            }
            DiskError::ReadOnly => errno::PERMISSION,
            DiskError::PastEnd { .. } => errno::INVALID,
            DiskError::Replica(_) | DiskError::Overlay { .. } => {
                // The client learns only a number; an operator must be able to learn why.
                tracing::error!(%error, "serve an exported disk");
                errno::IO
            }
        };
        Failure { errno, message: error.to_string() }
    }
}

/// One thread's answers to one client.
pub(crate) struct Replier {
    channel: Arc<dyn Channel>,
    disk: Arc<dyn Disk>,
    structured: bool,
    bytes: Box<[u8]>,
    used: usize,
}

impl Replier {
    pub(crate) fn new(channel: Arc<dyn Channel>, disk: Arc<dyn Disk>, structured: bool) -> Replier {
        let bytes = vec![0; PIECE_BYTES.0 as usize + ROOM_BYTES].into();
        Replier { channel, disk, structured, bytes, used: 0 }
    }

    /// Sends what has been gathered.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.used > 0 {
            self.channel.send(&self.bytes[..self.used])?;
            self.used = 0;
        }
        Ok(())
    }

    fn room(&mut self, bytes: usize) -> io::Result<()> {
        if self.bytes.len() - self.used < bytes { self.flush() } else { Ok(()) }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    fn put_chunk_head(&mut self, request: &Request, flags: u16, kind: u16, length: u32) {
        self.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        self.put(&flags.to_be_bytes());
        self.put(&kind.to_be_bytes());
        self.put(&request.cookie.to_be_bytes());
        self.put(&length.to_be_bytes());
    }

    fn put_simple_head(&mut self, request: &Request, errno: u32) {
        self.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        self.put(&errno.to_be_bytes());
        self.put(&request.cookie.to_be_bytes());
    }

    /// Answers a request that gives no data.
    pub(crate) fn done(&mut self, request: &Request) -> io::Result<()> {
        self.room(CHUNK_HEAD_BYTES)?;
        if self.structured {
            self.put_chunk_head(request, chunk::DONE, chunk::NONE, 0);
        } else {
            self.put_simple_head(request, 0);
        }
        Ok(())
    }

    /// Answers with an error.
    pub(crate) fn failed(&mut self, request: &Request, failure: &Failure) -> io::Result<()> {
        tracing::debug!(
            command = request.command,
            offset = request.offset,
            length = request.length,
            ?failure,
            "refused"
        );
        if !self.structured {
            self.room(SIMPLE_HEAD_BYTES)?;
            self.put_simple_head(request, failure.errno);
            return Ok(());
        }
        let mut end = failure.message.len().min(1024);
        while !failure.message.is_char_boundary(end) {
            end -= 1;
        }
        let text = &failure.message.as_bytes()[..end];
        self.room(CHUNK_HEAD_BYTES + 6 + text.len())?;
        self.put_chunk_head(request, chunk::DONE, chunk::ERROR, 6 + text.len() as u32);
        self.put(&failure.errno.to_be_bytes());
        self.put(&(text.len() as u16).to_be_bytes());
        self.put(text);
        Ok(())
    }

    /// Answers a read whose range was checked. An error after the first piece of a simple reply ends the connection,
    /// since that cannot be told otherwise.
    pub(crate) fn read(&mut self, request: &Request) -> io::Result<()> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        if !self.structured {
            self.room(SIMPLE_HEAD_BYTES + ((end - at).min(PIECE_BYTES.0)) as usize)?;
            let before = self.used;
            self.put_simple_head(request, 0);
            while at < end {
                let piece = (end - at).min(PIECE_BYTES.0);
                self.room(piece as usize)?;
                match self.put_data(at, piece) {
                    Err(error) if at == request.offset => {
                        self.used = before;
                        return self.failed(request, &error.into());
                    }
                    other => other.map_err(io::Error::other)?,
                }
                at += piece;
            }
            return Ok(());
        }
        let whole = request.flags & flag::DONT_FRAGMENT != 0;
        if whole && end - at > PIECE_BYTES.0 {
            let failure = Failure::new(errno::OVERFLOW, "too long to be sent in one piece");
            return self.failed(request, &failure);
        }
        let look = !whole && end - at >= HOLE_CHECK_BYTES.0;
        // Up to where there is data for certain.
        let mut data_end = if look { at } else { end };
        while at < end {
            if at >= data_end {
                let (hole_end, next) = match self.next_data(at, end) {
                    Ok(found) => found,
                    Err(error) => return self.failed(request, &error.into()),
                };
                data_end = next;
                if hole_end > at {
                    self.room(CHUNK_HEAD_BYTES + 12)?;
                    let flags = if hole_end == end { chunk::DONE } else { 0 };
                    self.put_chunk_head(request, flags, chunk::HOLE, 12);
                    self.put(&at.to_be_bytes());
                    self.put(&((hole_end - at) as u32).to_be_bytes());
                    at = hole_end;
                    continue;
                }
            }
            let piece = (data_end - at).min(PIECE_BYTES.0);
            self.room(CHUNK_HEAD_BYTES + 8 + piece as usize)?;
            let before = self.used;
            let flags = if at + piece == end { chunk::DONE } else { 0 };
            self.put_chunk_head(request, flags, chunk::DATA, 8 + piece as u32);
            self.put(&at.to_be_bytes());
            if let Err(error) = self.put_data(at, piece) {
                self.used = before;
                return self.failed(request, &error.into());
            }
            at += piece;
            if piece == PIECE_BYTES.0 {
                // The client takes it while the next is read.
                self.flush()?;
            }
        }
        Ok(())
    }

    /// The end of the hole at `at`, which may be empty, and the end of the data behind it; neither past `end`.
    fn next_data(&self, at: u64, end: u64) -> Result<(u64, u64), DiskError> {
        Ok(match self.disk.next_data(ByteOffset(at))? {
            Some(found) => (found.offset().0.clamp(at, end), found.end().0.min(end)),
            None => (end, end),
        })
    }

    fn put_data(&mut self, at: u64, length: u64) -> Result<(), DiskError> {
        let place = self.used..self.used + length as usize;
        self.disk.read_at(&mut self.bytes[place], ByteOffset(at))?;
        self.used += length as usize;
        Ok(())
    }

    /// Answers where the range holds data and where holes.
    pub(crate) fn status(&mut self, request: &Request) -> io::Result<()> {
        let extents_max = if request.flags & flag::ONE_EXTENT != 0 { 1 } else { STATUS_EXTENTS_MAX };
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        let mut extents: Vec<(u32, u32)> = Vec::new();
        while at < end && extents.len() < extents_max {
            let (hole_end, data_end) = match self.next_data(at, end) {
                Ok(found) => found,
                Err(error) => return self.failed(request, &error.into()),
            };
            for (next, state) in [(hole_end, HOLE_AND_ZERO), (data_end, 0)] {
                if next > at {
                    match extents.last_mut() {
                        Some((length, last)) if *last == state => *length += (next - at) as u32,
                        _ => extents.push(((next - at) as u32, state)),
                    }
                    at = next;
                }
            }
        }
        // A hole and the data behind it may have come at once.
        extents.truncate(extents_max);
        self.room(CHUNK_HEAD_BYTES + 4 + extents.len() * 8)?;
        self.put_chunk_head(request, chunk::DONE, chunk::BLOCK_STATUS, 4 + extents.len() as u32 * 8);
        self.put(&ALLOCATION_ID.to_be_bytes());
        for (length, state) in extents {
            self.put(&length.to_be_bytes());
            self.put(&state.to_be_bytes());
        }
        Ok(())
    }

    /// Brings a range into the system's cache.
    pub(crate) fn cache(&mut self, request: &Request) -> io::Result<()> {
        self.flush()?;
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        while at < end {
            let piece = (end - at).min(PIECE_BYTES.0);
            if let Err(error) = self.disk.read_at(&mut self.bytes[..piece as usize], ByteOffset(at)) {
                return self.failed(request, &error.into());
            }
            at += piece;
        }
        self.done(request)
    }

    pub(crate) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    pub(crate) fn size(&self) -> ByteCount {
        self.disk.size()
    }
}
