//! Comparison: messages of one group about what source and target hold, passed on by the process server, which cannot read
//! them. Whoever asks opens; each further message has a number, and an answer has its question's.
//!
//! Cancellation: dropping either side ends the conversation; nothing is remembered, and questions are asked again in another.

use block::{ByteCount, Generation, GroupId};
use bytes::Bytes;

use crate::frame::{Frame, FrameKind, Outgoing};
use crate::identity::Identity;
use crate::link::{Link, Timing};
use crate::listener::Connection;
use crate::{RefusalCode, WireError};

/// The longest message, in bytes. A longer one is refused.
pub const COMPARE_BYTES_MAX: ByteCount = ByteCount::kib(8);
/// Bytes of the random number that names a conversation.
pub const CONVERSATION_BYTES: usize = 16;
const OPENING_BYTES: usize = 16 + 8 + CONVERSATION_BYTES;
const TURN_BYTES: usize = 8;

/// When whoever opened a conversation may ask: comparisons read whole disks, so only so many go on at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// How many are before it; 0: it may ask now.
    pub ahead: u32,
    /// How many may ask at a time.
    pub at_once: u32,
}

impl Turn {
    pub(crate) fn encode(self) -> Bytes {
        let mut bytes = Vec::with_capacity(TURN_BYTES);
        bytes.extend_from_slice(&self.ahead.to_le_bytes());
        bytes.extend_from_slice(&self.at_once.to_le_bytes());
        bytes.into()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Turn> {
        let (ahead, at_once) = bytes.split_first_chunk::<4>()?;
        let at_once = at_once.try_into().ok()?;
        Some(Turn { ahead: u32::from_le_bytes(*ahead), at_once: u32::from_le_bytes(at_once) })
    }
}

/// A conversation about what both ends hold.
#[derive(Debug)]
pub struct Comparison {
    peer: Identity,
    group: GroupId,
    generation: Generation,
    conversation: [u8; CONVERSATION_BYTES],
    link: Link,
}

impl Comparison {
    /// Begins a conversation over a connection that was made for it.
    ///
    /// # Errors
    /// When the connection ended.
    pub async fn open(
        connection: Connection,
        group: GroupId,
        generation: Generation,
        conversation: [u8; CONVERSATION_BYTES],
    ) -> Result<Comparison, WireError> {
        let (peer, link) = connection.start(Timing::default());
        let mut bytes = Vec::with_capacity(OPENING_BYTES);
        bytes.extend_from_slice(&group.0);
        bytes.extend_from_slice(&generation.0.to_le_bytes());
        bytes.extend_from_slice(&conversation);
        link.send(Outgoing::new(FrameKind::Compare, 0, vec![bytes.into()])).await?;
        Ok(Comparison { peer, group, generation, conversation, link })
    }

    /// What the first frame says; `None` when it is no opening.
    pub(crate) fn opening(frame: &Frame) -> Option<(GroupId, Generation, [u8; CONVERSATION_BYTES])> {
        let bytes: &[u8; OPENING_BYTES] = frame.payload.as_ref().try_into().ok()?;
        let group = GroupId(bytes[..16].try_into().ok()?);
        let generation = Generation(u64::from_le_bytes(bytes[16..24].try_into().ok()?));
        (frame.argument == 0).then_some((group, generation, bytes[24..].try_into().ok()?))
    }

    pub(crate) fn accepted(
        peer: Identity,
        (group, generation, conversation): (GroupId, Generation, [u8; CONVERSATION_BYTES]),
        link: Link,
    ) -> Comparison {
        Comparison { peer, group, generation, conversation, link }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// Whose volumes it is about.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The history that it is about.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The number that names it, chosen by who asks.
    pub fn conversation(&self) -> [u8; CONVERSATION_BYTES] {
        self.conversation
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the other side refuses, or the connection ended.
    pub async fn send(&self, number: u64, message: Bytes) -> Result<(), WireError> {
        self.link.send(Outgoing::new(FrameKind::Compare, number, vec![message])).await
    }

    /// The next message and its number.
    ///
    /// # Errors
    /// When the other side refuses, breaks the protocol, or the connection ended.
    pub async fn next(&mut self) -> Result<(u64, Bytes), WireError> {
        let frame = self.link.next().await?;
        let fits = frame.payload.len() as u64 <= COMPARE_BYTES_MAX.get();
        match frame.kind {
            FrameKind::Compare if fits && frame.argument > 0 => Ok((frame.argument, frame.payload)),
            kind => Err(self.link.violated(&format!("a {kind:?} frame has no place in a comparison"))),
        }
    }

    /// Tells whoever opened how long it waits. Nothing is asked before 0 are ahead.
    ///
    /// # Errors
    /// When the other side refuses, or the connection ended.
    pub async fn tell_turn(&self, turn: Turn) -> Result<(), WireError> {
        self.link.send(Outgoing::new(FrameKind::Compare, 0, vec![turn.encode()])).await
    }

    /// Waits for news of the own turn. Cancelling loses nothing.
    ///
    /// # Errors
    /// When the other side refuses, breaks the protocol, or the connection ended.
    pub async fn turn(&mut self) -> Result<Turn, WireError> {
        let frame = self.link.next().await?;
        let turn =
            (frame.kind == FrameKind::Compare && frame.argument == 0).then(|| Turn::decode(&frame.payload));
        turn.flatten()
            .ok_or_else(|| self.link.violated("something else came in place of a turn in a comparison"))
    }

    /// Waits until the conversation has ended.
    pub async fn ended(&self) -> WireError {
        self.link.shared.failed().await
    }

    /// Refuses and closes. Whether the other side should try again follows from the code.
    pub fn refuse(&self, code: RefusalCode, message: &str) {
        self.link.shared.refuse(code, code.is_retryable(), message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As docs/formats/wire.md has it.
    #[test]
    fn golden_bytes() {
        let turn = Turn { ahead: 3, at_once: 0x0102 };
        assert_eq!(turn.encode().as_ref(), [3, 0, 0, 0, 2, 1, 0, 0]);
        assert_eq!(Turn::decode(&turn.encode()), Some(turn));
        for length in (0..20).filter(|length| *length != TURN_BYTES) {
            assert_eq!(Turn::decode(&vec![0; length]), None);
        }
    }
}
