//! What moves frames over an authenticated stream: one task a connection, which reads and writes at the same time.
//!
//! Consistency: frames of one direction arrive whole and in order. Nothing is remembered beyond the connection.
//! Retries: none here; a broken connection is told to every holder once, with the same [`WireError`].
//! Cancellation: callers only put frames into a queue or take them out, so dropping a call's future never leaves half
//! a frame on the wire. Dropping the last holder sends what is queued, then closes in order.
//! Memory: what arrives is bounded by the credit granted, and by [`FRAMES_QUEUED_MAX`]; what leaves by
//! [`FRAMES_LEAVING_MAX`] frames. The reader takes what arrives even when nobody asks for it (within these bounds), so
//! that signs of life go on while the holder is busy.

use std::future::pending;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{ByteCount, HistoryId};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use crate::frame::{
    Accept, Condition, FRAME_HEADER_BYTES, Frame, FrameError, FrameHeader, FrameKind, Held, Outgoing, Refuse,
};
use crate::{RefusalCode, WireError};

/// How often each side gives a sign of life.
pub const PING_EVERY: Duration = Duration::from_secs(10);
/// How long a peer may be silent. Past it the connection counts as lost.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long a side that closes waits until the peer has taken the last words.
pub const LINGER_MAX: Duration = Duration::from_secs(5);
/// Frames that have arrived and nobody took. When reached, the reader waits, and with it the peer.
pub const FRAMES_QUEUED_MAX: usize = 16 * 1024;
/// Frames that wait to leave. When reached, the caller waits.
pub const FRAMES_LEAVING_MAX: usize = 4;
/// How much is gathered for one write, at most about this and one frame more.
const CORK_BYTES: usize = 512 * 1024;
/// The blocks that frames are read into: four of the frames that deliveries are made of.
const READ_BYTES: usize = 4 * (FRAME_HEADER_BYTES + crate::delivery::DATA_FRAME_BYTES.get() as usize);
/// Blocks that are kept for another use when everything in them has been taken: fresh memory must be mapped and
/// zeroed by the kernel, which costs more than decrypting.
const SPARE_BLOCKS_MAX: usize = 4;

/// The times of a connection; tests use shorter ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) ping_every: Duration,
    pub(crate) silence_max: Duration,
    pub(crate) linger_max: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing { ping_every: PING_EVERY, silence_max: SILENCE_MAX, linger_max: LINGER_MAX }
    }
}

/// One holder's side of a running connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) shared: Arc<Shared>,
    pub(crate) outgoing: mpsc::Sender<Outgoing>,
    pub(crate) incoming: mpsc::Receiver<Frame>,
}

/// What all holders of a connection and its task share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) peer: String,
    urgent: Mutex<Urgent>,
    wake: Notify,
    /// Bytes that the peer has granted in all, and those that were sent.
    pub(crate) granted: watch::Sender<u64>,
    /// Bytes that were granted to the peer in all.
    granted_to_peer: AtomicU64,
    pub(crate) held: watch::Sender<Held>,
    pub(crate) condition: watch::Sender<Option<Condition>>,
    failure: watch::Sender<Option<WireError>>,
    refused: AtomicBool,
}

/// Small frames that go before everything queued. They add up, so that they need no queue.
#[derive(Debug, Default)]
struct Urgent {
    accept: Option<(Accept, HistoryId)>,
    grant: u64,
    hold: Option<Held>,
    condition: Option<Condition>,
    refuse: Option<Refuse>,
}

impl Shared {
    fn urgent(&self) -> MutexGuard<'_, Urgent> {
        self.urgent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the acceptance before everything else, and counts its credit.
    pub(crate) fn accept(&self, accept: Accept, history: HistoryId) {
        self.granted_to_peer.fetch_add(accept.credit.get(), SeqCst);
        self.urgent().accept = Some((accept, history));
        self.wake.notify_one();
    }

    pub(crate) fn grant(&self, bytes: ByteCount) {
        if bytes.get() > 0 {
            self.granted_to_peer.fetch_add(bytes.get(), SeqCst);
            self.urgent().grant += bytes.get();
            self.wake.notify_one();
        }
    }

    pub(crate) fn hold(&self, held: Held) {
        self.urgent().hold = Some(held);
        self.wake.notify_one();
    }

    pub(crate) fn tell(&self, condition: Condition) {
        self.urgent().condition = Some(condition);
        self.wake.notify_one();
    }

    /// Refuses the peer: the first refusal is sent, then the connection is closed.
    pub(crate) fn refuse(&self, code: RefusalCode, retry: bool, message: &str) -> WireError {
        let refuse = Refuse::new(code, retry, message);
        let error = refuse.clone().into_error();
        if !self.refused.swap(true, SeqCst) {
            self.urgent().refuse = Some(refuse);
            self.wake.notify_one();
        }
        self.fail(error.clone());
        error
    }

    /// Keeps the first reason for the end.
    pub(crate) fn fail(&self, error: WireError) {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(error);
            }
            first
        });
    }

    /// Why the connection ended, when it has.
    pub(crate) fn failure(&self) -> Option<WireError> {
        self.failure.borrow().clone()
    }

    /// Waits until the connection has ended.
    pub(crate) async fn failed(&self) -> WireError {
        let mut failure = self.failure.subscribe();
        match failure.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or_else(|| WireError::Closed { peer: self.peer.clone() }),
            // The sender is a field of self, so this does not happen.
            Err(_) => WireError::Closed { peer: self.peer.clone() },
        }
    }

    /// Whether this side has refused the peer.
    pub(crate) fn has_refused(&self) -> bool {
        self.refused.load(SeqCst)
    }
}

impl Link {
    /// Starts the connection's task.
    pub(crate) fn start<S>(stream: S, peer: String, timing: Timing) -> Link
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = Arc::new(Shared {
            peer,
            urgent: Mutex::default(),
            wake: Notify::new(),
            granted: watch::Sender::new(0),
            granted_to_peer: AtomicU64::new(0),
            held: watch::Sender::new(Held::default()),
            condition: watch::Sender::new(None),
            failure: watch::Sender::new(None),
            refused: AtomicBool::new(false),
        });
        let (outgoing, leaving) = mpsc::channel(FRAMES_LEAVING_MAX);
        let (arrived, incoming) = mpsc::channel(FRAMES_QUEUED_MAX);
        tokio::spawn(drive(stream, shared.clone(), leaving, arrived, timing));
        Link { shared, outgoing, incoming }
    }

    /// The next frame. `Closed` when the peer ended in good order.
    pub(crate) async fn next(&mut self) -> Result<Frame, WireError> {
        if self.shared.has_refused() {
            return Err(self.shared.failed().await);
        }
        tokio::select! {
            biased;
            frame = self.incoming.recv() => match frame {
                Some(frame) => Ok(frame),
                None => Err(self.shared.failed().await),
            },
            // Only a refusal by this side ends the connection before the queue says so.
            error = refused(&self.shared) => Err(error),
        }
    }

    /// Queues a frame.
    pub(crate) async fn send(&self, frame: Outgoing) -> Result<(), WireError> {
        send(&self.outgoing, &self.shared, frame).await
    }

    /// A violation by the peer: refuses it and gives the error.
    pub(crate) fn violated(&self, message: &str) -> WireError {
        self.shared.refuse(RefusalCode::Corrupt, true, message)
    }
}

pub(crate) async fn send(
    outgoing: &mpsc::Sender<Outgoing>,
    shared: &Shared,
    frame: Outgoing,
) -> Result<(), WireError> {
    // The queue outlives a failure for as long as the connection lingers, so both are watched.
    tokio::select! {
        biased;
        error = shared.failed() => Err(error),
        sent = outgoing.send(frame) => match sent {
            Ok(()) => Ok(()),
            Err(_) => Err(shared.failed().await),
        },
    }
}

async fn refused(shared: &Shared) -> WireError {
    let error = shared.failed().await;
    if shared.has_refused() { error } else { pending().await }
}

/// Tells every holder of the end, whatever ended the task.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.fail(WireError::Closed { peer: self.0.peer.clone() });
    }
}

async fn drive<S>(
    stream: S,
    shared: Arc<Shared>,
    leaving: mpsc::Receiver<Outgoing>,
    arrived: mpsc::Sender<Frame>,
    timing: Timing,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Declared first, dropped last: by then `arrived` is gone, and whoever waits for a frame sees the reason.
    let end = End(shared.clone());
    let (read, write) = tokio::io::split(stream);
    let mut reader = pin!(read_frames(read, shared.clone(), arrived, timing));
    let mut writer = pin!(write_frames(write, shared.clone(), leaving, timing));
    tokio::select! {
        error = &mut reader => {
            shared.fail(error);
            // What is still queued has no receiver; but a refusal of this side should still be told.
            if shared.has_refused() {
                let _ = timeout(timing.linger_max, &mut writer).await;
            }
        }
        written = &mut writer => match written {
            // The last words are out. Until the peer closes too, what it sends is read and thrown away: closing a
            // socket with unread bytes would reset it, and the last words would be lost.
            Ok(()) => {
                if let Ok(error) = timeout(timing.linger_max, &mut reader).await {
                    shared.fail(error);
                }
            }
            // The peer may have said why before it closed.
            Err(error) => match timeout(timing.linger_max, &mut reader).await {
                Ok(reason @ WireError::Refused { .. }) => shared.fail(reason),
                _ => shared.fail(WireError::lost(&shared.peer, error)),
            },
        },
    }
    drop(end);
}

/// Reads until the connection ends, and gives the reason.
async fn read_frames<R: AsyncRead + Unpin>(
    read: R,
    shared: Arc<Shared>,
    arrived: mpsc::Sender<Frame>,
    timing: Timing,
) -> WireError {
    let mut reader = FrameReader::new(read);
    let mut received = 0_u64;
    let peer = || shared.peer.clone();
    loop {
        let frame = match reader.next(timing.silence_max).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return WireError::Closed { peer: peer() },
            Err(ReadError::Frame(source)) => {
                if !matches!(source, FrameError::Truncated { .. }) {
                    shared.refuse(RefusalCode::Corrupt, true, &format!("read a frame: {source}"));
                }
                return WireError::Frame { peer: peer(), source };
            }
            Err(ReadError::Io(source)) => return WireError::lost(&shared.peer, source),
            Err(ReadError::Silent) => {
                return WireError::TimedOut { what: "converse", peer: peer(), after: timing.silence_max };
            }
        };
        match frame.kind {
            FrameKind::Ping => continue,
            FrameKind::Grant => {
                shared.granted.send_modify(|granted| *granted = granted.saturating_add(frame.argument));
                continue;
            }
            FrameKind::Hold => match frame.message::<Held>() {
                Ok(held) => {
                    shared.held.send_replace(held);
                    continue;
                }
                Err(source) => return WireError::Frame { peer: peer(), source },
            },
            FrameKind::Condition => match frame.message::<Condition>() {
                Ok(condition) => {
                    let condition = Condition { unproven: ByteCount(frame.argument), ..condition };
                    shared.condition.send_replace(Some(condition));
                    continue;
                }
                Err(source) => return WireError::Frame { peer: peer(), source },
            },
            FrameKind::Refuse => {
                return match frame.message::<Refuse>() {
                    Ok(refuse) => refuse.into_error(),
                    Err(source) => WireError::Frame { peer: peer(), source },
                };
            }
            FrameKind::Data | FrameKind::View | FrameKind::Probe => {
                received += frame.payload.len() as u64;
                let granted = shared.granted_to_peer.load(SeqCst);
                if received > granted {
                    let message =
                        format!("{received} bytes arrived, only {granted} were granted; wait for credit");
                    return shared.refuse(RefusalCode::Credit, true, &message);
                }
            }
            _ => {}
        }
        // When nobody takes frames any more, the connection is about to close; they are thrown away.
        let _ = arrived.send(frame).await;
    }
}

async fn write_frames<W: AsyncWrite + Unpin>(
    mut write: W,
    shared: Arc<Shared>,
    mut leaving: mpsc::Receiver<Outgoing>,
    timing: Timing,
) -> io::Result<()> {
    let mut ping = interval_at(Instant::now() + timing.ping_every, timing.ping_every);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut batch = Vec::new();
    loop {
        let mut last = false;
        let mut next = None;
        tokio::select! {
            biased;
            () = shared.wake.notified() => {}
            frame = leaving.recv() => {
                last = frame.is_none();
                next = frame;
            }
            _ = ping.tick() => batch.push(Outgoing::new(FrameKind::Ping, 0, Vec::new())),
        }
        let urgent = std::mem::take(&mut *shared.urgent());
        if let Some((accept, history)) = urgent.accept {
            batch.push(Outgoing::message(FrameKind::Accept, history.0, &accept));
        }
        if urgent.grant > 0 {
            batch.push(Outgoing::new(FrameKind::Grant, urgent.grant, Vec::new()));
        }
        if let Some(held) = urgent.hold {
            batch.push(Outgoing::message(FrameKind::Hold, 0, &held));
        }
        if let Some(condition) = urgent.condition {
            batch.push(Outgoing::message(FrameKind::Condition, condition.unproven.0, &condition));
        }
        batch.extend(next);
        if let Some(refuse) = urgent.refuse {
            batch.push(Outgoing::message(FrameKind::Refuse, 0, &refuse));
            last = true;
        }
        let mut size: usize = batch.iter().map(Outgoing::len).sum();
        while size < CORK_BYTES && !last {
            match leaving.try_recv() {
                Ok(frame) => {
                    size += frame.len();
                    batch.push(frame);
                }
                Err(_) => break,
            }
        }
        write_batch(&mut write, &batch).await?;
        batch.clear();
        write.flush().await?;
        if last {
            return write.shutdown().await;
        }
    }
}

/// Writes frames as one stream of bytes, headers and payloads together, so that they share TLS records.
async fn write_batch<W: AsyncWrite + Unpin>(write: &mut W, batch: &[Outgoing]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(batch.len() * 4);
    for frame in batch {
        slices.push(IoSlice::new(&frame.header));
        slices
            .extend(frame.payload.iter().filter(|piece| !piece.is_empty()).map(|piece| IoSlice::new(piece)));
    }
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        match write.write_vectored(left).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => IoSlice::advance_slices(&mut left, count),
        }
    }
    Ok(())
}

#[derive(Debug)]
pub(crate) enum ReadError {
    Frame(FrameError),
    Io(io::Error),
    Silent,
}

/// Cuts a stream of bytes into frames. Payloads are parts of the buffer that was read into, not copies.
#[derive(Debug)]
pub(crate) struct FrameReader<R> {
    read: R,
    buffer: BytesMut,
    /// Ends of blocks whose frames may still be in use.
    spare: Vec<BytesMut>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(read: R) -> FrameReader<R> {
        FrameReader { read, buffer: BytesMut::new(), spare: Vec::new() }
    }

    /// The next frame; `None` at an end between frames. No single read may take longer than `silence_max`.
    pub(crate) async fn next(&mut self, silence_max: Duration) -> Result<Option<Frame>, ReadError> {
        loop {
            let missing = match self.buffer.first_chunk::<FRAME_HEADER_BYTES>() {
                None => FRAME_HEADER_BYTES - self.buffer.len(),
                Some(bytes) => {
                    let header = FrameHeader::decode(bytes).map_err(ReadError::Frame)?;
                    let whole = FRAME_HEADER_BYTES + header.length as usize;
                    if self.buffer.len() >= whole {
                        let mut frame = self.buffer.split_to(whole);
                        let payload = frame.split_off(FRAME_HEADER_BYTES).freeze();
                        return Ok(Some(Frame { kind: header.kind, argument: header.argument, payload }));
                    }
                    whole - self.buffer.len()
                }
            };
            self.make_room(missing);
            match timeout(silence_max, self.read.read_buf(&mut self.buffer)).await {
                Err(_) => return Err(ReadError::Silent),
                Ok(Err(error)) => return Err(ReadError::Io(error)),
                Ok(Ok(0)) if self.buffer.is_empty() => return Ok(None),
                Ok(Ok(0)) => return Err(ReadError::Frame(FrameError::Truncated { missing })),
                Ok(Ok(_)) => {}
            }
        }
    }
}

impl<R> FrameReader<R> {
    /// Room for `missing` bytes after what is in the buffer.
    fn make_room(&mut self, missing: usize) {
        if self.buffer.capacity() - self.buffer.len() >= missing {
            return;
        }
        let begun = self.buffer.split();
        let need = begun.len() + missing;
        let reusable =
            self.spare.iter_mut().position(|block| need <= READ_BYTES && block.try_reclaim(READ_BYTES));
        let fresh = match reusable {
            Some(index) => self.spare.swap_remove(index),
            None => BytesMut::with_capacity(need.max(READ_BYTES)),
        };
        let full = std::mem::replace(&mut self.buffer, fresh);
        self.buffer.extend_from_slice(&begun);
        drop(begun);
        if self.spare.len() < SPARE_BLOCKS_MAX {
            self.spare.push(full);
        }
    }
}

/// Cuts `bytes` into payloads of at most `limit`, without copying.
pub(crate) fn cut(mut bytes: Bytes, limit: usize) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let length = bytes.len().min(limit);
        (length > 0).then(|| bytes.split_to(length))
    })
}

#[cfg(test)]
mod tests;
