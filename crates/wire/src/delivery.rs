//! Delivery: one protocol, used from agent to process server and from process server to target. The sender opens for
//! one group and generation; the receiver says what it holds and grants credit; changesets follow in order.
//!
//! Retries: the caller's. After any error both sides forget the connection; the next opening says where to go on.
//! Cancellation: [`Sender::begin`], [`Sender::data`] and [`Sender::deliver`] must run to their end once begun, or the
//! sender be dropped, since part of a changeset may be on its way; [`Receiver::next`] and [`Receipts::next`] may be
//! dropped at any time without losing anything.

use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, Epoch, Generation, GroupId, HistoryId};
use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::frame::{
    Accept, Begin, Condition, FRAME_PAYLOAD_MAX, Frame, FrameError, FrameKind, Held, Open, Outgoing,
};
use crate::identity::Identity;
use crate::link::{Link, Shared, Timing, send};
use crate::listener::Connection;
use crate::{RefusalCode, WireError};

/// The longest status report, in bytes. A longer one is refused.
pub const REPORT_BYTES_MAX: ByteCount = ByteCount::kib(64);
/// How many bytes of a changeset or view are put into one frame, at most.
pub const DATA_FRAME_BYTES: ByteCount = ByteCount::kib(256);

/// How long a receiver has to accept or refuse, once it has been asked. Past it the connection is given up.
pub const ACCEPT_TIME_MAX: Duration = Duration::from_secs(60);

/// The sending half of a delivery.
#[derive(Debug)]
pub struct Sender {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Outgoing>,
    granted: watch::Receiver<u64>,
    sent: u64,
    opening: Held,
    history: HistoryId,
    rebased: bool,
    current: Option<Current>,
}

/// The changeset that is being sent or received.
#[derive(Clone, Copy, Debug)]
struct Current {
    epoch: Epoch,
    total: ByteCount,
    given: u64,
}

/// What the receiver says of its progress.
#[derive(Debug)]
pub struct Receipts {
    shared: Arc<Shared>,
    held: watch::Receiver<Held>,
    /// Keeps the connection open when the sender is gone.
    _outgoing: mpsc::Sender<Outgoing>,
}

impl Sender {
    /// Opens a delivery. The receiver's first answer is in [`Sender::held`].
    ///
    /// # Errors
    /// When the receiver refuses, says nothing within [`ACCEPT_TIME_MAX`], or the connection ends.
    pub async fn open(
        connection: Connection,
        group: GroupId,
        generation: Generation,
    ) -> Result<(Sender, Receipts), WireError> {
        Sender::open_of(connection, group, generation, HistoryId::SOURCE).await
    }

    /// As [`Sender::open`], by one who knows which history of the generation it has: a receiver that begins in its middle takes it on.
    ///
    /// # Errors
    /// As there.
    pub async fn open_of(
        connection: Connection,
        group: GroupId,
        generation: Generation,
        history: HistoryId,
    ) -> Result<(Sender, Receipts), WireError> {
        Sender::open_with(connection, group, generation, history, Timing::default()).await
    }

    pub(crate) async fn open_with(
        connection: Connection,
        group: GroupId,
        generation: Generation,
        history: HistoryId,
        timing: Timing,
    ) -> Result<(Sender, Receipts), WireError> {
        let (_, mut link) = connection.start(timing);
        link.send(Outgoing::message(FrameKind::Open, history.0, &Open { group, generation })).await?;
        let frame = match timeout(ACCEPT_TIME_MAX, link.next()).await {
            Ok(frame) => frame?,
            Err(_) => {
                let peer = link.shared.peer.clone();
                return Err(WireError::TimedOut { what: "open a delivery", peer, after: ACCEPT_TIME_MAX });
            }
        };
        if frame.kind != FrameKind::Accept {
            return Err(link.violated(&format!("a delivery was opened, and {:?} came in answer", frame.kind)));
        }
        let accept: Accept = read_message(&link.shared, &frame)?;
        let history = HistoryId(frame.argument);
        let Link { shared, outgoing, .. } = link;
        shared.granted.send_modify(|granted| *granted = granted.saturating_add(accept.credit.get()));
        // Later news may have overtaken the acceptance.
        let mut held = shared.held.subscribe();
        held.mark_unchanged();
        if *held.borrow() != Held::default() {
            held.mark_changed();
        }
        let receipts = Receipts { shared: shared.clone(), held, _outgoing: outgoing.clone() };
        let granted = shared.granted.subscribe();
        let Accept { held: opening, rebased, .. } = accept;
        let sender = Sender { shared, outgoing, granted, sent: 0, opening, history, rebased, current: None };
        Ok((sender, receipts))
    }

    /// What the receiver held when it accepted: delivery goes on after it.
    pub fn held(&self) -> Held {
        self.opening
    }

    /// Which history of the generation the receiver has.
    pub fn history(&self) -> HistoryId {
        self.history
    }

    /// Whether the receiver has lost what it held, and goes on after what the replicas at the end of the way hold. No replica
    /// holds more than [`Sender::held`] says: what it acknowledged after that is gone, and may be numbered again.
    pub fn rebased(&self) -> bool {
        self.rebased
    }

    /// Sends one changeset whole. Waits for credit as needed.
    ///
    /// # Errors
    /// When the receiver refuses, the connection ends, or the pieces do not add up to `total`.
    pub async fn deliver(
        &mut self,
        epoch: Epoch,
        total: ByteCount,
        pieces: impl IntoIterator<Item = Bytes>,
    ) -> Result<(), WireError> {
        self.begin(epoch, total).await?;
        // Small pieces share a frame.
        let mut gathered = Vec::new();
        let mut size = 0;
        for piece in pieces {
            size += piece.len();
            gathered.push(piece);
            if size as u64 >= DATA_FRAME_BYTES.get() {
                self.data_vectored(std::mem::take(&mut gathered)).await?;
                size = 0;
            }
        }
        self.data_vectored(gathered).await?;
        self.end().await
    }

    /// Begins a changeset of `total` bytes.
    ///
    /// # Errors
    /// When the connection ended, or the one before was not ended.
    pub async fn begin(&mut self, epoch: Epoch, total: ByteCount) -> Result<(), WireError> {
        if let Some(Current { epoch, total, given }) = self.current {
            return Err(WireError::Length { epoch, total, given: ByteCount(given) });
        }
        self.send(Outgoing::message(FrameKind::Begin, epoch.0, &Begin { total })).await?;
        self.current = Some(Current { epoch, total, given: 0 });
        Ok(())
    }

    /// Sends bytes of the changeset; waits for credit and sends what fits.
    ///
    /// # Errors
    /// When the receiver refuses, the connection ends, or these are more bytes than announced.
    pub async fn data(&mut self, bytes: Bytes) -> Result<(), WireError> {
        self.data_vectored(vec![bytes]).await
    }

    async fn data_vectored(&mut self, pieces: Vec<Bytes>) -> Result<(), WireError> {
        let size: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        let Some(current) = &mut self.current else {
            let given = ByteCount(size);
            return Err(WireError::Length { epoch: Epoch::NONE, total: ByteCount::ZERO, given });
        };
        let mut offset = current.given;
        current.given += size;
        if current.given > current.total.get() {
            let Current { epoch, total, given } = *current;
            return Err(WireError::Length { epoch, total, given: ByteCount(given) });
        }
        let mut pieces = pieces.into_iter().filter(|piece| !piece.is_empty());
        let mut piece = pieces.next();
        while piece.is_some() {
            let room = self.credit().await?.min(DATA_FRAME_BYTES.get());
            let mut payload = Vec::new();
            let mut filled = 0;
            while let Some(bytes) = &mut piece
                && filled < room
            {
                let length = (bytes.len() as u64).min(room - filled);
                payload.push(bytes.split_to(length as usize));
                filled += length;
                if bytes.is_empty() {
                    piece = pieces.next();
                }
            }
            self.send(Outgoing::new(FrameKind::Data, offset, payload)).await?;
            self.sent += filled;
            offset += filled;
        }
        Ok(())
    }

    /// Ends the changeset.
    ///
    /// # Errors
    /// When the connection ended, or fewer bytes were sent than announced.
    pub async fn end(&mut self) -> Result<(), WireError> {
        match self.current {
            Some(Current { epoch, total, given }) if given == total.get() => {
                self.current = None;
                self.send(Outgoing::new(FrameKind::End, epoch.0, Vec::new())).await
            }
            Some(Current { epoch, total, given }) => {
                Err(WireError::Length { epoch, total, given: ByteCount(given) })
            }
            None => {
                Err(WireError::Length { epoch: Epoch::NONE, total: ByteCount::ZERO, given: ByteCount::ZERO })
            }
        }
    }

    /// Sends a status report, also in the midst of a changeset. Needs no credit.
    ///
    /// # Errors
    /// When it is longer than [`REPORT_BYTES_MAX`], or the connection ended.
    pub async fn report(&mut self, json: &str) -> Result<(), WireError> {
        if json.len() as u64 > REPORT_BYTES_MAX.get() {
            let size = ByteCount(json.len() as u64);
            return Err(WireError::TooLarge { what: "a status report", size, limit: REPORT_BYTES_MAX });
        }
        self.send(Outgoing::new(FrameKind::Report, 0, vec![Bytes::copy_from_slice(json.as_bytes())])).await
    }

    /// Waits until at least one byte may be sent, and gives how many may.
    async fn credit(&mut self) -> Result<u64, WireError> {
        let sent = self.sent;
        tokio::select! {
            biased;
            error = self.shared.failed() => Err(error),
            granted = self.granted.wait_for(|granted| *granted > sent) => match granted {
                Ok(granted) => Ok(*granted - sent),
                Err(_) => Err(WireError::Closed { peer: self.shared.peer.clone() }),
            },
        }
    }

    async fn send(&self, frame: Outgoing) -> Result<(), WireError> {
        send(&self.outgoing, &self.shared, frame).await
    }
}

impl Receipts {
    /// How the replica at the end of the way is, when somebody has said so, and news of it.
    pub fn condition(&self) -> watch::Receiver<Option<Condition>> {
        let mut condition = self.shared.condition.subscribe();
        // What came with the acceptance is news too.
        condition.mark_changed();
        condition
    }

    /// Waits for news of what the receiver holds. News that came in quick succession are told as the last one.
    ///
    /// # Errors
    /// When the receiver refuses ([`WireError::Refused`]) or the connection ends.
    pub async fn next(&mut self) -> Result<Held, WireError> {
        tokio::select! {
            biased;
            changed = self.held.changed() => match changed {
                Ok(()) => Ok(*self.held.borrow_and_update()),
                Err(_) => Err(WireError::Closed { peer: self.shared.peer.clone() }),
            },
            error = self.shared.failed() => Err(error),
        }
    }
}

/// The receiving half of a delivery.
#[derive(Debug)]
pub struct Receiver {
    peer: Identity,
    group: GroupId,
    generation: Generation,
    history: HistoryId,
    link: Link,
    current: Option<Current>,
}

/// What arrives in a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A changeset begins.
    Begin {
        /// Its epoch.
        epoch: Epoch,
        /// How many bytes follow until its end; already compared with what arrived when the end is told.
        total: ByteCount,
    },
    /// Bytes of the changeset, in order; never empty.
    Data(Bytes),
    /// All bytes of the changeset have arrived.
    End,
    /// The sender's status, JSON.
    Report(String),
}

impl Receiver {
    pub(crate) fn new(peer: Identity, open: Open, history: HistoryId, link: Link) -> Receiver {
        Receiver { peer, group: open.group, generation: open.generation, history, link, current: None }
    }

    /// Whose changesets. For an agent, its certificate names this group.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The history that the changesets belong to.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Which history of it, as far as the sender knows.
    pub fn history(&self) -> HistoryId {
        self.history
    }

    /// Who sends.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// Accepts: says what is held, and grants the first credit. To refuse instead, use [`Answerer::refuse`].
    pub fn accept(&self, held: Held, credit: ByteCount) {
        self.accept_of(held, credit, HistoryId::SOURCE);
    }

    /// As [`Receiver::accept`], by a replica: says as well which history of the generation it has.
    pub fn accept_of(&self, held: Held, credit: ByteCount, history: HistoryId) {
        self.link.shared.accept(Accept { held, credit, rebased: false }, history);
    }

    /// As [`Receiver::accept`], by a receiver that has lost what it held: `held` is what the replicas hold.
    pub fn accept_rebased(&self, held: Held, credit: ByteCount) {
        self.link.shared.accept(Accept { held, credit, rebased: true }, HistoryId::SOURCE);
    }

    /// What answers the sender, usable from other tasks.
    pub fn answerer(&self) -> Answerer {
        Answerer { shared: self.link.shared.clone() }
    }

    /// The next part of the delivery; `None` when the sender closed in good order between changesets.
    ///
    /// # Errors
    /// When the connection ends within a changeset, the sender broke the protocol (it is refused then), or
    /// [`Answerer::refuse`] was called.
    pub async fn next(&mut self) -> Result<Option<Incoming>, WireError> {
        loop {
            let frame = match self.link.next().await {
                Ok(frame) => frame,
                Err(WireError::Closed { .. }) if self.current.is_none() => return Ok(None),
                Err(error) => return Err(error),
            };
            match (frame.kind, &mut self.current) {
                (FrameKind::Begin, None) => {
                    let begin: Begin = read_message(&self.link.shared, &frame)?;
                    let epoch = Epoch(frame.argument);
                    self.current = Some(Current { epoch, total: begin.total, given: 0 });
                    return Ok(Some(Incoming::Begin { epoch, total: begin.total }));
                }
                (FrameKind::Data, Some(current)) if frame.argument == current.given => {
                    current.given += frame.payload.len() as u64;
                    if current.given > current.total.get() {
                        let message = format!(
                            "epoch {} has {} bytes and more, {} were announced",
                            current.epoch,
                            current.given,
                            current.total.get()
                        );
                        return Err(self.link.violated(&message));
                    }
                    if !frame.payload.is_empty() {
                        return Ok(Some(Incoming::Data(frame.payload)));
                    }
                }
                (FrameKind::End, Some(current)) if frame.argument == current.epoch.0 => {
                    let Current { epoch, total, given } = *current;
                    if given != total.get() {
                        let announced = total.get();
                        let message = format!("epoch {epoch} has {given} bytes, {announced} were announced");
                        return Err(self.link.violated(&message));
                    }
                    self.current = None;
                    return Ok(Some(Incoming::End));
                }
                (FrameKind::Report, _) if frame.payload.len() as u64 <= REPORT_BYTES_MAX.get() => {
                    return match String::from_utf8(frame.payload.into()) {
                        Ok(json) => Ok(Some(Incoming::Report(json))),
                        Err(_) => Err(self.link.violated("a status report is not UTF-8")),
                    };
                }
                (kind, current) => {
                    let place = current
                        .map_or_else(String::new, |current| format!(" within epoch {}", current.epoch));
                    let message = format!("a {kind:?} frame ({}) has no place here{place}", frame.argument);
                    return Err(self.link.violated(&message));
                }
            }
        }
    }
}

/// Answers the sender of a delivery. None of these waits; what has not left yet adds up.
#[derive(Clone, Debug)]
pub struct Answerer {
    shared: Arc<Shared>,
}

impl Answerer {
    /// Lets the sender send more bytes. Bytes in memory are bounded by what was granted and not taken.
    pub fn grant(&self, bytes: ByteCount) {
        self.shared.grant(bytes);
    }

    /// Tells what is durable now. Call it only when it is.
    pub fn hold(&self, held: Held) {
        self.shared.hold(held);
    }

    /// Tells how the replica at the end of the way is. Only after the delivery was accepted.
    pub fn tell(&self, condition: Condition) {
        self.shared.tell(condition);
    }

    /// Refuses and closes. Whether the sender should try again follows from the code.
    pub fn refuse(&self, code: RefusalCode, message: &str) {
        self.shared.refuse(code, code.is_retryable(), message);
    }

    /// Why the delivery ended, when it has.
    pub fn failure(&self) -> Option<WireError> {
        self.shared.failure()
    }

    /// Waits until the delivery has ended.
    pub async fn ended(&self) -> WireError {
        self.shared.failed().await
    }
}

pub(crate) fn read_message<M: serde::de::DeserializeOwned>(
    shared: &Shared,
    frame: &Frame,
) -> Result<M, WireError> {
    frame.message().map_err(|source: FrameError| {
        shared.refuse(RefusalCode::Corrupt, true, &source.to_string());
        WireError::Frame { peer: shared.peer.clone(), source }
    })
}

const _: () = assert!(DATA_FRAME_BYTES.get() <= FRAME_PAYLOAD_MAX.get());
const _: () = assert!(REPORT_BYTES_MAX.get() <= FRAME_PAYLOAD_MAX.get());

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;
    use crate::identity::Role;

    /// What a receiver says when the peer sends these frames after an acceptance of 100 bytes.
    async fn received(frames: &[Outgoing]) -> WireError {
        let (near, mut far) = duplex(64 * 1024);
        let link = Link::start(near, "peer".into(), Timing::default());
        let open = Open { group: GroupId([1; 16]), generation: Generation(1) };
        let peer = Identity::new(Role::Agent, "agent", Some(open.group)).unwrap();
        let mut receiver = Receiver::new(peer, open, HistoryId::SOURCE, link);
        receiver.accept(Held::default(), ByteCount(100));
        for frame in frames {
            far.write_all(&frame.header).await.unwrap();
            for piece in &frame.payload {
                far.write_all(piece).await.unwrap();
            }
        }
        loop {
            match receiver.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the peer did not close"),
                Err(error) => return error,
            }
        }
    }

    /// None of these can come from our own sender; a broken or hostile one is refused by name.
    #[tokio::test]
    async fn what_breaks_the_protocol_is_refused() {
        let begin = || Outgoing::message(FrameKind::Begin, 5, &Begin { total: ByteCount(3) });
        let data = |offset, bytes: &'static [u8]| {
            Outgoing::new(FrameKind::Data, offset, vec![Bytes::from_static(bytes)])
        };
        let end = |epoch| Outgoing::new(FrameKind::End, epoch, Vec::new());
        let report = |bytes: Vec<u8>| Outgoing::new(FrameKind::Report, 0, vec![bytes.into()]);
        let cases = [
            (vec![begin(), data(0, b"ab"), end(5)], "epoch 5 has 2 bytes, 3 were announced"),
            (vec![begin(), data(0, b"abcd")], "has 4 bytes and more, 3 were announced"),
            (vec![begin(), data(1, b"ab")], "a Data frame (1) has no place here within epoch 5"),
            (vec![begin(), data(0, b"abc"), end(6)], "a End frame (6) has no place here within epoch 5"),
            (vec![begin(), begin()], "a Begin frame (5) has no place here within epoch 5"),
            (vec![data(0, b"abc")], "a Data frame (0) has no place here"),
            (vec![end(0)], "a End frame (0) has no place here"),
            (vec![Outgoing::new(FrameKind::Reply, 0, Vec::new())], "a Reply frame"),
            (vec![report(vec![0xff])], "not UTF-8"),
            (vec![report(vec![b'x'; REPORT_BYTES_MAX.get() as usize + 1])], "a Report frame"),
            (vec![Outgoing::new(FrameKind::Begin, 1, Vec::new())], "Begin frame cannot be read"),
        ];
        for (frames, expected) in cases {
            let error = received(&frames).await;
            assert!(error.to_string().contains(expected), "{error}, expected {expected}");
        }
    }
}
