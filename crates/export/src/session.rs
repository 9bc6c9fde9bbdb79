//! Requests of one client, until it leaves.
//!
//! - Order: requests may be answered in another order than they came. A write, zeroing or trim is done before it is
//!   answered, and what was answered is seen by every later request of every connection.
//! - Retries: none. A request that cannot be done is answered with an error; a client that breaks the protocol is left.
//! - Cancellation: shutting the socket down ends it; requests under way are finished and their answers dropped.
//! - Memory: two pieces and the input buffer, and a piece for each worker, whatever the client asks for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Extent};

use crate::channel::Channel;
use crate::negotiate::Agreed;
use crate::protocol::{Malformed, Request, command, errno, flag};
use crate::reply::{Failure, Replier};
use crate::workers::Workers;
use crate::{PIECE_BYTES, REQUEST_BYTES_MAX};

/// How much is taken from the socket at once.
const INPUT_BYTES: usize = 128 * 1024;

/// What an export has done so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections: AtomicUsize,
    pub(crate) requests: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
}

/// What was received and not yet used.
struct Input {
    channel: Arc<dyn Channel>,
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    fn available(&self) -> usize {
        self.end - self.start
    }

    /// Waits until `count` bytes are there; `false` at the end.
    fn wait_for(&mut self, count: usize) -> io::Result<bool> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.available());
        while self.end < count {
            match self.channel.receive(&mut self.bytes[self.end..])? {
                0 if self.end == 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => self.end += received,
            }
        }
        Ok(true)
    }

    /// Fills `buffer`, past what was received from the channel itself.
    fn take(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let known = self.available().min(buffer.len());
        buffer[..known].copy_from_slice(&self.bytes[self.start..self.start + known]);
        self.start += known;
        let mut filled = known;
        while filled < buffer.len() {
            match self.channel.receive(&mut buffer[filled..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => filled += received,
            }
        }
        Ok(())
    }
}

/// Serves requests until the client leaves.
///
/// # Errors
/// When the connection ends half-way, or the client breaks the protocol.
pub(crate) fn serve(agreed: Agreed, counters: &Counters) -> io::Result<()> {
    let Agreed { channel, disk, structured, allocation } = agreed;
    let replier = {
        let (channel, disk) = (channel.clone(), disk);
        move || Replier::new(channel.clone(), disk.clone(), structured)
    };
    let input = Input { channel: channel.clone(), bytes: vec![0; INPUT_BYTES].into(), start: 0, end: 0 };
    let mut session = Session {
        replier: replier(),
        input,
        piece: Vec::new(),
        workers: Workers::new(channel.clone(), Box::new(replier)),
        allocation,
        counters,
    };
    let outcome = session.run();
    // Workers may be sending to a client that takes nothing any more.
    if outcome.is_err() {
        channel.shut_down();
    }
    outcome
}

struct Session<'a> {
    replier: Replier,
    input: Input,
    /// Data of a write.
    piece: Vec<u8>,
    workers: Workers,
    allocation: bool,
    counters: &'a Counters,
}

impl Session<'_> {
    fn run(&mut self) -> io::Result<()> {
        loop {
            if self.input.available() < Request::BYTES {
                self.replier.flush()?;
                if !self.input.wait_for(Request::BYTES)? {
                    return Ok(());
                }
            }
            let mut head = [0; Request::BYTES];
            self.input.take(&mut head)?;
            let request = Request::decode(&head).map_err(malformed)?;
            self.counters.requests.fetch_add(1, Relaxed);
            if request.command == command::DISCONNECT {
                return self.replier.flush();
            }
            self.answer(&request)?;
        }
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        if request.command == command::WRITE {
            return self.write(request);
        }
        if let Err(failure) = self.check(request) {
            return self.replier.failed(request, &failure);
        }
        match request.command {
            command::READ => {
                self.counters.read_bytes.fetch_add(request.length.into(), Relaxed);
                // With nothing else to do meanwhile, handing over would only cost.
                let more = self.input.available() >= Request::BYTES;
                if more && self.workers.worth_while() && self.workers.take(*request) {
                    return Ok(());
                }
                self.workers.read(&mut self.replier, request)
            }
            command::BLOCK_STATUS => self.replier.status(request),
            command::CACHE => self.replier.cache(request),
            _ => match self.change(request) {
                Ok(()) => self.replier.done(request),
                Err(failure) => self.replier.failed(request, &failure),
            },
        }
    }

    /// Whether a request can be done at all.
    fn check(&self, request: &Request) -> Result<(), Failure> {
        let invalid = |why: &str| Err(Failure::new(errno::INVALID, why));
        let (known, writes) = match request.command {
            command::READ => (flag::DONT_FRAGMENT, false),
            command::WRITE => (flag::FUA, true),
            command::FLUSH | command::CACHE => (0, false),
            command::TRIM => (flag::FUA, true),
            command::WRITE_ZEROES => (flag::FUA | flag::NO_HOLE | flag::FAST_ZERO, true),
            command::BLOCK_STATUS => (flag::ONE_EXTENT, false),
            _ => return invalid("unknown command"),
        };
        // Some clients set FUA on everything; where nothing is written it asks for nothing.
        if request.flags & !(known | flag::FUA) != 0 {
            return invalid("unknown flags");
        }
        if request.command == command::FLUSH {
            return if request.length == 0 && request.offset == 0 {
                Ok(())
            } else {
                invalid("a flush of a range")
            };
        }
        if request.length == 0 {
            return invalid("an empty range");
        }
        if request.command == command::READ && u64::from(request.length) > REQUEST_BYTES_MAX.0 {
            return invalid("too long; see the largest block size");
        }
        if request.command == command::BLOCK_STATUS && !self.allocation {
            return invalid("block status was not agreed on");
        }
        if writes && !self.replier.disk().is_writable() {
            return Err(Failure::new(errno::PERMISSION, "exported for reading only; use --writable"));
        }
        if request.end().is_none_or(|end| end > self.replier.size().0) {
            let errno = if writes { errno::NO_SPACE } else { errno::INVALID };
            return Err(Failure::new(errno, "past the end"));
        }
        Ok(())
    }

    fn change(&mut self, request: &Request) -> Result<(), Failure> {
        let disk = self.replier.disk();
        let range = Extent::new(ByteOffset(request.offset), ByteCount(request.length.into()));
        match (request.command, range) {
            (command::TRIM, Ok(range)) => disk.trim(range)?,
            (command::WRITE_ZEROES, Ok(range)) => disk.zero(range, request.flags & flag::NO_HOLE != 0)?,
            (command::FLUSH, _) => disk.flush()?,
            _ => return Err(Failure::new(errno::INVALID, "unknown command")),
        }
        if request.flags & flag::FUA != 0 {
            disk.flush()?;
        }
        Ok(())
    }

    /// Takes a write's data piece by piece. All of it is taken, also when it cannot be written.
    fn write(&mut self, request: &Request) -> io::Result<()> {
        if u64::from(request.length) > REQUEST_BYTES_MAX.0 {
            return Err(malformed(Malformed::WriteLength(request.length)));
        }
        let mut outcome = self.check(request);
        self.counters.written_bytes.fetch_add(request.length.into(), Relaxed);
        if self.input.available() < request.length as usize {
            // The client may wait for answers before it sends on.
            self.replier.flush()?;
        }
        let mut left = u64::from(request.length);
        let mut at = request.offset;
        while left > 0 {
            // Pieces end at whole blocks of the disk, so that no block is written in two parts.
            let length = left.min(PIECE_BYTES.0 - at % BLOCK_BYTES);
            self.piece.resize(length as usize, 0);
            self.input.take(&mut self.piece)?;
            if outcome.is_ok() {
                let written = self.replier.disk().write_at(&self.piece, ByteOffset(at));
                outcome = written.map_err(Failure::from);
            }
            at = at.saturating_add(length);
            left -= length;
        }
        if outcome.is_ok() && request.flags & flag::FUA != 0 {
            outcome = self.replier.disk().flush().map_err(Failure::from);
        }
        match outcome {
            Ok(()) => self.replier.done(request),
            Err(failure) => self.replier.failed(request, &failure),
        }
    }
}

fn malformed(why: Malformed) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
