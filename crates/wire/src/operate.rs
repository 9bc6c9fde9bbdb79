//! Operation: one request of an operator, answered by JSON or by a view's bytes.
//!
//! Cancellation: dropping either side ends the conversation; nothing is remembered.

use std::time::Duration;

use block::{ByteCount, ByteOffset, GroupId};
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::compare::Comparison;
use crate::credentials::Credentials;
use crate::delivery::{DATA_FRAME_BYTES, Receiver, read_message};
use crate::frame::{FRAME_PAYLOAD_MAX, Frame, FrameKind, Open, Outgoing};
use crate::handshake::Purpose;
use crate::identity::{Identity, Role};
use crate::link::{Link, Timing, cut};
use crate::listener::{Connection, connect_for};
use crate::measure::Measurement;
use crate::{RefusalCode, WireError};

/// The longest request, in bytes. A longer one is refused.
pub const REQUEST_BYTES_MAX: ByteCount = ByteCount::kib(64);
/// The longest answer, in bytes. A longer one is refused by whoever sends or reads it.
pub const REPLY_BYTES_MAX: ByteCount = ByteCount::mib(16);
/// How many bytes of a view may be under way.
pub const VIEW_WINDOW: ByteCount = ByteCount::mib(8);
/// How long an authenticated peer has to say what it wants. Past it, it is refused.
pub const OPENING_TIME_MAX: Duration = Duration::from_secs(10);

/// What an accepted connection turns out to be.
#[derive(Debug)]
pub enum Opening {
    /// Somebody delivers changesets.
    Deliver(Receiver),
    /// An operator asks.
    Operate(Operation),
    /// Somebody compares.
    Compare(Comparison),
    /// An agent measures the way to here.
    Measure(Measurement),
}

impl Opening {
    /// Reads what the peer wants, and checks that its certificate allows it: agents deliver for the one group that
    /// theirs names, process servers for any (or the one that theirs names), operators ask.
    ///
    /// # Errors
    /// When it may not (it has been refused then), breaks the protocol, or says nothing in time.
    pub async fn read(connection: Connection) -> Result<Opening, WireError> {
        Opening::read_with(connection, Timing::default()).await
    }

    pub(crate) async fn read_with(connection: Connection, timing: Timing) -> Result<Opening, WireError> {
        let purpose = connection.purpose();
        let (peer, mut link) = connection.start(timing);
        let allowed = match purpose {
            Purpose::Deliver => matches!(peer.role, Role::Agent | Role::ProcessServer),
            Purpose::Operate => peer.role == Role::Operator,
            Purpose::Compare => matches!(peer.role, Role::Agent | Role::ProcessServer),
            Purpose::Measure => peer.role == Role::Agent,
        };
        if !allowed {
            let message = format!("{peer} may not {}", purpose.verb());
            return Err(link.shared.refuse(RefusalCode::Unauthorised, false, &message));
        }
        let frame = match timeout(OPENING_TIME_MAX, link.next()).await {
            Ok(frame) => frame?,
            Err(_) => {
                link.violated("nothing was asked for in time");
                let peer = link.shared.peer.clone();
                return Err(WireError::TimedOut { what: "open", peer, after: OPENING_TIME_MAX });
            }
        };
        match (purpose, frame.kind) {
            (Purpose::Deliver, FrameKind::Open) => {
                let open: Open = read_message(&link.shared, &frame)?;
                if let Some(message) = group_fault(&peer, purpose.verb(), open.group) {
                    return Err(link.shared.refuse(RefusalCode::WrongGroup, false, &message));
                }
                Ok(Opening::Deliver(Receiver::new(peer, open, block::HistoryId(frame.argument), link)))
            }
            (Purpose::Operate, FrameKind::Request)
                if frame.payload.len() as u64 <= REQUEST_BYTES_MAX.get() =>
            {
                let request = text(&link, frame)?;
                Ok(Opening::Operate(Operation { peer, request, link }))
            }
            (Purpose::Compare, FrameKind::Compare) => {
                let Some(opening) = Comparison::opening(&frame) else {
                    return Err(link.violated("a comparison was not opened as it must be"));
                };
                if let Some(message) = group_fault(&peer, purpose.verb(), opening.0) {
                    return Err(link.shared.refuse(RefusalCode::WrongGroup, false, &message));
                }
                Ok(Opening::Compare(Comparison::accepted(peer, opening, link)))
            }
            (Purpose::Measure, FrameKind::Probe) => match Measurement::opening(&frame) {
                Some(total) => Ok(Opening::Measure(Measurement::accepted(peer, total, link))),
                None => Err(link.violated("a measurement was not opened as it must be")),
            },
            (_, kind) => {
                Err(link.violated(&format!("a {kind:?} frame does not begin to {}", purpose.verb())))
            }
        }
    }
}

/// Why the peer may not speak for the group, when it may not.
fn group_fault(peer: &Identity, verb: &str, wanted: GroupId) -> Option<String> {
    match (peer.role, peer.group) {
        (_, Some(group)) if group == wanted => None,
        (_, Some(group)) => {
            Some(format!("{verb} for group {wanted}: the certificate of {peer} names group {group}"))
        }
        (Role::Agent, None) => {
            Some(format!("{verb} for group {wanted}: the certificate of {peer} names no group"))
        }
        (_, None) => None,
    }
}

/// A request to answer.
#[derive(Debug)]
pub struct Operation {
    peer: Identity,
    request: String,
    link: Link,
}

impl Operation {
    /// Who asks.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// Who asks and from where, for logs.
    pub fn address(&self) -> &str {
        &self.link.shared.peer
    }

    /// What is asked, JSON.
    pub fn request(&self) -> &str {
        &self.request
    }

    /// Answers.
    ///
    /// # Errors
    /// When the answer is longer than [`REPLY_BYTES_MAX`], or the connection ended.
    pub async fn reply(self, json: &str) -> Result<(), WireError> {
        send_text(&self.link, FrameKind::Reply, json).await
    }

    /// Answers with a view: `json` says what it is, its bytes follow.
    ///
    /// # Errors
    /// As [`Operation::reply`].
    pub async fn stream(self, json: &str) -> Result<ViewWriter, WireError> {
        send_text(&self.link, FrameKind::Reply, json).await?;
        let granted = self.link.shared.granted.subscribe();
        Ok(ViewWriter { link: self.link, granted, sent: 0 })
    }

    /// Refuses. Whether the operator should try again follows from the code.
    pub fn refuse(self, code: RefusalCode, message: &str) {
        self.link.shared.refuse(code, code.is_retryable(), message);
    }
}

/// Sends the bytes of a view. Ranges that are not sent read as zeroes.
#[derive(Debug)]
pub struct ViewWriter {
    link: Link,
    granted: watch::Receiver<u64>,
    sent: u64,
}

impl ViewWriter {
    /// Sends bytes at their offset in the view. Waits until the reader has room.
    ///
    /// # Errors
    /// When the connection ended.
    pub async fn data(&mut self, offset: ByteOffset, mut bytes: Bytes) -> Result<(), WireError> {
        let mut offset = offset.get();
        while !bytes.is_empty() {
            let sent = self.sent;
            let room = tokio::select! {
                biased;
                error = self.link.shared.failed() => return Err(error),
                granted = self.granted.wait_for(|granted| *granted > sent) => match granted {
                    Ok(granted) => *granted - sent,
                    Err(_) => return Err(WireError::Closed { peer: self.link.shared.peer.clone() }),
                },
            };
            let length = (bytes.len() as u64).min(room).min(DATA_FRAME_BYTES.get());
            let part = bytes.split_to(length as usize);
            self.link.send(Outgoing::new(FrameKind::View, offset, vec![part])).await?;
            self.sent += length;
            offset += length;
        }
        Ok(())
    }

    /// Says that the view is whole, with what is to be said at the end.
    ///
    /// # Errors
    /// As [`Operation::reply`].
    pub async fn finish(self, json: &str) -> Result<(), WireError> {
        send_text(&self.link, FrameKind::Finish, json).await
    }

    /// Waits until the other side is gone.
    pub async fn ended(&self) -> WireError {
        self.link.shared.failed().await
    }

    /// Gives up: the view cannot be completed.
    pub fn refuse(self, code: RefusalCode, message: &str) {
        self.link.shared.refuse(code, code.is_retryable(), message);
    }
}

/// The asking side.
#[derive(Debug)]
pub struct Operator;

impl Operator {
    /// Asks the server at `addr`, and gives its answer.
    ///
    /// # Errors
    /// When the server cannot be reached, does not accept this side, refuses, or falls silent.
    pub async fn call(
        addr: &str,
        expected: Role,
        credentials: &Credentials,
        request: &str,
    ) -> Result<String, WireError> {
        let mut link = ask(addr, expected, credentials, request).await?;
        read_text(&mut link, FrameKind::Reply, None).await
    }

    /// Asks the server at `addr` for a view.
    ///
    /// # Errors
    /// As [`Operator::call`].
    pub async fn stream(
        addr: &str,
        expected: Role,
        credentials: &Credentials,
        request: &str,
    ) -> Result<ViewReader, WireError> {
        let mut link = ask(addr, expected, credentials, request).await?;
        link.shared.grant(VIEW_WINDOW);
        let head = read_text(&mut link, FrameKind::Reply, None).await?;
        Ok(ViewReader { link, head, tail: None })
    }
}

/// Takes the bytes of a view.
#[derive(Debug)]
pub struct ViewReader {
    link: Link,
    head: String,
    tail: Option<String>,
}

impl ViewReader {
    /// What the server said of the view before its bytes, JSON.
    pub fn head(&self) -> &str {
        &self.head
    }

    /// What the server said at the end, JSON; `None` before [`ViewReader::next`] gave `None`.
    pub fn tail(&self) -> Option<&str> {
        self.tail.as_deref()
    }

    /// The next bytes and their offset; `None` when the view is whole. Ranges that do not come are zeroes.
    ///
    /// # Errors
    /// When the server gives up or the connection ends before the view is whole.
    pub async fn next(&mut self) -> Result<Option<(ByteOffset, Bytes)>, WireError> {
        if self.tail.is_some() {
            return Ok(None);
        }
        let frame = self.link.next().await?;
        match frame.kind {
            FrameKind::View => {
                self.link.shared.grant(ByteCount(frame.payload.len() as u64));
                Ok(Some((ByteOffset(frame.argument), frame.payload)))
            }
            FrameKind::Finish => {
                self.tail = Some(read_text(&mut self.link, FrameKind::Finish, Some(frame)).await?);
                Ok(None)
            }
            kind => Err(self.link.violated(&format!("a {kind:?} frame has no place in a view"))),
        }
    }
}

async fn ask(
    addr: &str,
    expected: Role,
    credentials: &Credentials,
    request: &str,
) -> Result<Link, WireError> {
    if request.len() as u64 > REQUEST_BYTES_MAX.get() {
        let size = ByteCount(request.len() as u64);
        return Err(WireError::TooLarge { what: "a request", size, limit: REQUEST_BYTES_MAX });
    }
    let connection = connect_for(Purpose::Operate, addr, expected, credentials).await?;
    let (_, link) = connection.start(Timing::default());
    link.send(Outgoing::new(FrameKind::Request, 0, vec![Bytes::copy_from_slice(request.as_bytes())])).await?;
    Ok(link)
}

async fn send_text(link: &Link, kind: FrameKind, json: &str) -> Result<(), WireError> {
    if json.len() as u64 > REPLY_BYTES_MAX.get() {
        let size = ByteCount(json.len() as u64);
        let message = format!("the answer of {size} is longer than {REPLY_BYTES_MAX}; ask for less");
        link.shared.refuse(RefusalCode::Limit, false, &message);
        return Err(WireError::TooLarge { what: "an answer", size, limit: REPLY_BYTES_MAX });
    }
    let mut left = json.len() as u64;
    if left == 0 {
        return link.send(Outgoing::new(kind, 0, Vec::new())).await;
    }
    for part in cut(Bytes::copy_from_slice(json.as_bytes()), FRAME_PAYLOAD_MAX.get() as usize) {
        left -= part.len() as u64;
        link.send(Outgoing::new(kind, left, vec![part])).await?;
    }
    Ok(())
}

/// Reads a text that may come in several frames, of which the first may have been read.
async fn read_text(link: &mut Link, kind: FrameKind, first: Option<Frame>) -> Result<String, WireError> {
    let mut whole = Vec::new();
    let mut next = first;
    loop {
        let frame = match next.take() {
            Some(frame) => frame,
            None => link.next().await?,
        };
        if frame.kind != kind {
            return Err(link.violated(&format!("a {:?} frame came, expected {kind:?}", frame.kind)));
        }
        let size = whole.len() as u64 + frame.payload.len() as u64;
        if size.saturating_add(frame.argument) > REPLY_BYTES_MAX.get() {
            return Err(link.shared.refuse(RefusalCode::Limit, false, "the answer is too long"));
        }
        whole.extend_from_slice(&frame.payload);
        if frame.argument == 0 {
            return String::from_utf8(whole).map_err(|_| link.violated("the answer is not UTF-8"));
        }
    }
}

fn text(link: &Link, frame: Frame) -> Result<String, WireError> {
    String::from_utf8(frame.payload.into()).map_err(|_| link.violated("the request is not UTF-8"))
}
