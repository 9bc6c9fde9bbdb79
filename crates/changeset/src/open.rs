//! From the bytes that travel back to changes.
//!
//! - Consistency: all or nothing. [`Opener::finish`] returns a changeset only when every byte of it was authenticated
//!   and every extent checked; before that nothing of it can be seen.
//! - Crash consistency: none, it is memory.
//! - Retries: a refused changeset stays refused; open it anew from its first byte.
//! - Cancellation: dropping an opener at any moment frees everything; its threads live only inside a call.
//!
//! A length that was read is checked before anything is allocated for it: a frame's against the frame limits and what the
//! routing header leaves for it, the header's against the limits of a changeset.

mod error;
mod rope;
mod worker;

use ::bytes::Bytes;
use block::{ByteCount, GroupId, PointNote};

use crate::changes::{Changeset, Frame};
use crate::frame::{
    Cipher, FrameHeader, FrameHeaderError, Kind, TABLE_ENTRY_BYTES, TABLE_HEAD_BYTES, TAG_BYTES, Trailer,
};
use crate::header::RoutingHeader;
use crate::key::GroupKey;
use crate::volume::{VolumeInfo, decode_manifest};
use crate::workers::spread;
pub use error::{ExtentFault, OpenError, Part};
use rope::Rope;
use worker::{Worker, open_frame};

/// Frames that wait for each thread before they are opened together.
const BATCH_FRAMES_PER_THREAD: usize = 8;

/// Opens one changeset from chunks of any size.
///
/// `push` and `finish` decrypt and decompress: call them where a few milliseconds of work do no harm.
///
/// Memory: the opened frames, and at most eight sealed ones for each thread.
pub struct Opener {
    key: GroupKey,
    group: GroupId,
    threads: usize,
    state: State,
    /// Bytes of the part that is being read.
    partial: Rope,
    received: u64,
    /// What is known once the header is read.
    opening: Option<Opening>,
}

/// What the next bytes are.
#[derive(Clone, Copy)]
enum State {
    Header,
    FrameHeader { number: u32 },
    FrameBody(FrameHeader),
    Done,
    Refused,
}

struct Opening {
    header: RoutingHeader,
    cipher: Cipher,
    volumes: Vec<VolumeInfo>,
    note: PointNote,
    /// Plain bytes of frames that the header leaves for those that have not come.
    plain_left: u64,
    tags: blake3::Hasher,
    waiting: Vec<(FrameHeader, Rope)>,
    workers: Vec<Worker>,
    frames: Vec<Frame>,
    extents: u64,
    data_bytes: u64,
}

impl Opener {
    /// For a changeset of `group`, on at most `threads` threads; 0 counts as 1.
    pub fn new(key: GroupKey, group: GroupId, threads: usize) -> Opener {
        Opener {
            key,
            group,
            threads: threads.max(1),
            state: State::Header,
            partial: Rope::default(),
            received: 0,
            opening: None,
        }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When they make the changeset one that must be refused. Every later call then fails too.
    pub fn push(&mut self, chunk: Bytes) -> Result<(), OpenError> {
        let result = self.take(chunk);
        if result.is_err() {
            self.refuse();
        }
        result
    }

    /// The changeset, when all of it has come and everything was verified.
    ///
    /// # Errors
    /// When bytes are missing, or what came must be refused.
    pub fn finish(mut self) -> Result<Changeset, OpenError> {
        match self.state {
            State::Done => {}
            State::Refused => return Err(OpenError::Refused),
            _ => return Err(OpenError::Truncated { received: self.received, part: self.part() }),
        }
        let opening = self.opening.take().expect("the header was read before the trailer");
        let Opening { header, volumes, note, frames, workers, .. } = opening;
        let slabs = workers.into_iter().map(|worker| worker.slabs.finish()).collect();
        Ok(Changeset { header, volumes, note, frames, slabs })
    }

    fn take(&mut self, mut chunk: Bytes) -> Result<(), OpenError> {
        while !chunk.is_empty() {
            let needed = match self.state {
                State::Header => RoutingHeader::BYTES,
                State::FrameHeader { .. } => FrameHeader::BYTES,
                State::FrameBody(frame) => frame.packed_bytes as usize + TAG_BYTES,
                State::Done => return Err(OpenError::TrailingBytes(chunk.len())),
                State::Refused => return Err(OpenError::Refused),
            };
            let part = chunk.split_to(chunk.len().min(needed - self.partial.len));
            self.received += part.len() as u64;
            self.partial.push(part);
            if self.partial.len == needed {
                let bytes = std::mem::take(&mut self.partial);
                self.state = self.complete(bytes)?;
            }
        }
        Ok(())
    }

    /// Deals with a whole part and says what comes next.
    fn complete(&mut self, bytes: Rope) -> Result<State, OpenError> {
        match (self.state, &mut self.opening) {
            (State::FrameHeader { number }, Some(opening)) => {
                let bytes = bytes.to_vec();
                let bytes = bytes.first_chunk().expect("a whole frame header was read");
                opening.frame_header(number, bytes).map(State::FrameBody)
            }
            (State::FrameBody(frame), Some(opening)) => {
                opening.frame(frame, bytes, self.received)?;
                Ok(match frame.kind {
                    Kind::Trailer => State::Done,
                    Kind::Manifest | Kind::Data => State::FrameHeader { number: frame.number + 1 },
                })
            }
            _ => {
                self.opening = Some(Opening::new(&self.key, self.group, self.threads, &bytes.to_vec())?);
                Ok(State::FrameHeader { number: 0 })
            }
        }
    }

    fn refuse(&mut self) {
        self.state = State::Refused;
        self.partial = Rope::default();
        self.opening = None;
    }

    fn part(&self) -> Part {
        match (self.state, &self.opening) {
            (State::FrameHeader { number }, Some(opening)) => opening.part(number),
            (State::FrameBody(frame), Some(opening)) => opening.part(frame.number),
            _ => Part::Header,
        }
    }
}

impl Opening {
    fn new(key: &GroupKey, group: GroupId, threads: usize, bytes: &[u8]) -> Result<Opening, OpenError> {
        let header = RoutingHeader::decode(bytes)?;
        if header.stamp.group != group {
            return Err(OpenError::WrongGroup { expected: group, found: header.stamp.group });
        }
        if header.key_id != key.id() {
            return Err(OpenError::WrongKey(group));
        }
        let total = header.plain_bytes.0
            + u64::from(header.extents) * TABLE_ENTRY_BYTES as u64
            + u64::from(header.frames) * TABLE_HEAD_BYTES as u64;
        let room = total + u64::from(header.frames) * TAG_BYTES as u64;
        let threads = threads.clamp(1, header.frames.max(1) as usize);
        Ok(Opening {
            header,
            cipher: Cipher::new(key, header.encode()),
            volumes: Vec::new(),
            note: PointNote::default(),
            plain_left: total,
            workers: (0..threads).map(|number| Worker::new(number, room)).collect(),
            tags: blake3::Hasher::new(),
            waiting: Vec::new(),
            frames: Vec::new(),
            extents: 0,
            data_bytes: 0,
        })
    }

    fn part(&self, number: u32) -> Part {
        match number {
            0 => Part::Manifest,
            number if number <= self.header.frames => Part::Frame(number),
            _ => Part::Trailer,
        }
    }

    fn frame_header(
        &mut self,
        number: u32,
        bytes: &[u8; FrameHeader::BYTES],
    ) -> Result<FrameHeader, OpenError> {
        let part = self.part(number);
        let frame = FrameHeader::decode(bytes).map_err(|error| match error {
            FrameHeaderError::Checksum => OpenError::FrameChecksum(part),
            FrameHeaderError::Field(field, value) => OpenError::Field { part, field, value },
        })?;
        if frame.number != number {
            return Err(OpenError::OutOfOrder { expected: number, found: frame.number });
        }
        let kind = match part {
            Part::Frame(_) => Kind::Data,
            Part::Trailer => Kind::Trailer,
            Part::Manifest | Part::Header => Kind::Manifest,
        };
        if frame.kind != kind {
            return Err(OpenError::Field { part, field: "kind", value: frame.kind as u64 });
        }
        if kind == Kind::Data {
            let left = self.plain_left.checked_sub(frame.plain_bytes.into());
            let value = frame.plain_bytes.into();
            self.plain_left = left.ok_or(OpenError::Field { part, field: "plain bytes", value })?;
        }
        Ok(frame)
    }

    /// Takes a whole frame; `bytes` are its text and tag, `received` counts all bytes up to its end.
    fn frame(&mut self, frame: FrameHeader, bytes: Rope, received: u64) -> Result<(), OpenError> {
        match frame.kind {
            Kind::Manifest => {
                let mut bytes = bytes.to_vec();
                let tag = open_frame(&self.cipher, &frame, &mut bytes, 0, Part::Manifest)?;
                self.tags.update(&tag);
                (self.volumes, self.note) = decode_manifest(&bytes).map_err(OpenError::Manifest)?;
            }
            Kind::Data => {
                self.waiting.push((frame, bytes));
                if self.waiting.len() >= self.workers.len() * BATCH_FRAMES_PER_THREAD {
                    self.open_waiting()?;
                }
            }
            Kind::Trailer => {
                self.open_waiting()?;
                let mut bytes = bytes.to_vec();
                open_frame(&self.cipher, &frame, &mut bytes, 0, Part::Trailer)?;
                let trailer_bytes = (FrameHeader::BYTES + bytes.len() + TAG_BYTES) as u64;
                // What came, counted here; it must be what the header announced and the trailer seals.
                let counted = Trailer {
                    frames: self.frames.len() as u32,
                    extents: self.extents as u32,
                    plain_bytes: self.data_bytes,
                    sealed_bytes: received - trailer_bytes,
                    tags: *self.tags.finalize().as_bytes(),
                };
                let announced = self.header.frames == counted.frames
                    && self.header.extents == counted.extents
                    && self.header.plain_bytes == ByteCount(counted.plain_bytes);
                if !announced || bytes != counted.encode() {
                    return Err(OpenError::Trailer);
                }
            }
        }
        Ok(())
    }

    fn open_waiting(&mut self) -> Result<(), OpenError> {
        let waiting = std::mem::take(&mut self.waiting);
        let Opening { cipher, volumes, workers, .. } = self;
        let opened =
            spread(workers, waiting, |worker, (frame, bytes)| worker.open(cipher, volumes, &frame, &bytes));
        for opened in opened {
            let (frame, tag) = opened?;
            if self.frames.last().is_some_and(|before| frame.start < before.end) {
                let frame = self.frames.len() as u32 + 1;
                return Err(OpenError::Extent { frame, index: 0, fault: ExtentFault::Unsorted });
            }
            self.tags.update(&tag);
            self.extents += u64::from(frame.extents);
            self.data_bytes += frame.data_bytes as u64;
            self.frames.push(frame);
        }
        Ok(())
    }
}
