//! Frames: a header of 16 bytes, then the payload. The byte table is in docs/formats/wire.md.

use block::{ByteCount, Epoch, Generation, GroupId};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::refusal::RefusalCode;

/// How long a frame's header is, in bytes.
pub const FRAME_HEADER_BYTES: usize = 16;
/// The longest payload of a frame. A longer one is refused before anything is allocated for it.
pub const FRAME_PAYLOAD_MAX: ByteCount = ByteCount::mib(1);

/// What a frame is. The numbers are part of the protocol and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FrameKind {
    /// Nothing but a sign of life.
    Ping = 1,
    /// The sender of this frame refuses, and closes.
    Refuse = 2,
    /// More bytes may be sent; the argument says how many.
    Grant = 3,
    /// Opens a delivery; the argument is which history of the generation it is, 0 when the sender does not know.
    Open = 16,
    /// Accepts a delivery.
    Accept = 17,
    /// Begins the changeset of the epoch in the argument.
    Begin = 18,
    /// Bytes of the changeset; the argument is their offset in it.
    Data = 19,
    /// Ends the changeset of the epoch in the argument.
    End = 20,
    /// What the receiver holds now.
    Hold = 21,
    /// A sender's status, JSON.
    Report = 22,
    /// What the receiver says of the replica at the end of the way.
    Condition = 23,
    /// An operator's request, JSON.
    Request = 32,
    /// Part of an answer, JSON; the argument is how many bytes follow in further frames.
    Reply = 33,
    /// Bytes of a view; the argument is their offset in it.
    View = 34,
    /// The end of a view, JSON; the argument is how many bytes follow in further frames.
    Finish = 35,
    /// A message of a comparison, sealed; the argument is its number, and 0 opens one.
    Compare = 48,
    /// Bytes that are counted and thrown away; the argument is how many follow. The first has none, and announces all.
    Probe = 64,
    /// What came of a measurement's bytes, and in what time.
    Measured = 65,
}

impl FrameKind {
    const ALL: [FrameKind; 18] = [
        FrameKind::Ping,
        FrameKind::Refuse,
        FrameKind::Grant,
        FrameKind::Open,
        FrameKind::Accept,
        FrameKind::Begin,
        FrameKind::Data,
        FrameKind::End,
        FrameKind::Hold,
        FrameKind::Report,
        FrameKind::Condition,
        FrameKind::Request,
        FrameKind::Reply,
        FrameKind::View,
        FrameKind::Finish,
        FrameKind::Compare,
        FrameKind::Probe,
        FrameKind::Measured,
    ];

    fn from_number(number: u16) -> Option<FrameKind> {
        FrameKind::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

/// Why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The payload would be too long.
    #[error("payload of {length} bytes is more than {}", FRAME_PAYLOAD_MAX.get())]
    TooLong {
        /// What the header says.
        length: u32,
    },
    /// A kind that this version does not know.
    #[error("unknown frame kind {0}")]
    Kind(u16),
    /// No flag is defined yet.
    #[error("unknown frame flags {0:04x}")]
    Flags(u16),
    /// The payload is not what its kind says.
    #[error("the payload of a {kind:?} frame cannot be read")]
    Payload {
        /// The frame.
        kind: FrameKind,
    },
    /// The connection ended within a frame.
    #[error("the connection ended within a frame: {missing} bytes are missing")]
    Truncated {
        /// How many more bytes the frame has.
        missing: usize,
    },
}

/// A frame's fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) length: u32,
    pub(crate) kind: FrameKind,
    pub(crate) argument: u64,
}

impl FrameHeader {
    pub(crate) fn encode(self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.length.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.argument.to_le_bytes());
        bytes
    }

    /// There is no magic and no checksum in a frame: TLS has authenticated every byte.
    pub(crate) fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<FrameHeader, FrameError> {
        let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if u64::from(length) > FRAME_PAYLOAD_MAX.get() {
            return Err(FrameError::TooLong { length });
        }
        let number = u16::from_le_bytes([bytes[4], bytes[5]]);
        let kind = FrameKind::from_number(number).ok_or(FrameError::Kind(number))?;
        let flags = u16::from_le_bytes([bytes[6], bytes[7]]);
        if flags != 0 {
            return Err(FrameError::Flags(flags));
        }
        let mut argument = [0; 8];
        argument.copy_from_slice(&bytes[8..16]);
        Ok(FrameHeader { length, kind, argument: u64::from_le_bytes(argument) })
    }
}

/// A frame that arrived whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: FrameKind,
    pub(crate) argument: u64,
    pub(crate) payload: Bytes,
}

impl Frame {
    /// The payload as the message that its kind says.
    pub(crate) fn message<M: DeserializeOwned>(&self) -> Result<M, FrameError> {
        match postcard::take_from_bytes(&self.payload) {
            Ok((message, [])) => Ok(message),
            _ => Err(FrameError::Payload { kind: self.kind }),
        }
    }
}

/// A frame on its way out. The payload may be in pieces; they leave as one.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub(crate) header: [u8; FRAME_HEADER_BYTES],
    pub(crate) payload: Vec<Bytes>,
}

impl Outgoing {
    /// The caller keeps the payload within [`FRAME_PAYLOAD_MAX`].
    pub(crate) fn new(kind: FrameKind, argument: u64, payload: Vec<Bytes>) -> Outgoing {
        let length: usize = payload.iter().map(Bytes::len).sum();
        debug_assert!(length as u64 <= FRAME_PAYLOAD_MAX.get());
        Outgoing { header: FrameHeader { length: length as u32, kind, argument }.encode(), payload }
    }

    pub(crate) fn message(kind: FrameKind, argument: u64, message: &impl Serialize) -> Outgoing {
        let payload = postcard::to_stdvec(message).expect("messages have no type that postcard cannot write");
        Outgoing::new(kind, argument, vec![payload.into()])
    }

    pub(crate) fn len(&self) -> usize {
        FRAME_HEADER_BYTES + self.payload.iter().map(Bytes::len).sum::<usize>()
    }
}

/// Payload of [`FrameKind::Open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Open {
    pub(crate) group: GroupId,
    pub(crate) generation: Generation,
}

/// How far a receiver has come, in epochs of the delivery's generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The last epoch that the receiver has made durable, in cache or replica. Delivery goes on after it.
    pub held: Epoch,
    /// The last epoch that the replica at the end of the way has made durable.
    pub applied: Epoch,
}

/// How the replica at the end of the way is; payload of [`FrameKind::Condition`]. A hint: what is damaged is asked of the
/// target itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Whether it has a recovery point.
    pub has_point: bool,
    /// Bytes of its images that a scrub found damaged.
    pub damaged: ByteCount,
    /// It began in the middle of a history: so many bytes of its disks the source has not compared with it yet. It has no point
    /// before the source has. The frame's argument.
    #[serde(skip)]
    pub unproven: ByteCount,
}

/// Payload of [`FrameKind::Accept`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Accept {
    pub(crate) held: Held,
    pub(crate) credit: ByteCount,
    /// The receiver has lost what it held, and goes on after what the replicas at the end of the way hold.
    pub(crate) rebased: bool,
}

/// Payload of [`FrameKind::Begin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begin {
    pub(crate) total: ByteCount,
}

/// Payload of [`FrameKind::Refuse`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refuse {
    code: u16,
    retry: bool,
    message: String,
}

/// The longest message of a refusal, in bytes. A longer one is cut.
pub const REFUSAL_BYTES_MAX: usize = 4096;

impl Refuse {
    pub(crate) fn new(code: RefusalCode, retry: bool, message: &str) -> Refuse {
        let mut end = message.len().min(REFUSAL_BYTES_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        Refuse { code: code.number(), retry, message: message[..end].to_owned() }
    }

    pub(crate) fn into_error(self) -> crate::WireError {
        crate::WireError::Refused {
            code: RefusalCode::from_number(self.code),
            message: self.message,
            retry: self.retry,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn golden_bytes() {
        let header =
            FrameHeader { length: 0x0001_0203, kind: FrameKind::Data, argument: 0x1122_3344_5566_7788 };
        let golden = [0x03, 0x02, 0x01, 0x00, 19, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
        assert_eq!(FrameHeader { length: 0x1203, ..header }.encode()[..2], [0x03, 0x12]);
        assert_eq!(header.encode(), golden);
        assert_eq!(FrameHeader::decode(&golden).unwrap(), header);
    }

    #[test]
    fn kinds_are_frozen() {
        let numbers: Vec<u16> = FrameKind::ALL.iter().map(|kind| *kind as u16).collect();
        assert_eq!(numbers, [1, 2, 3, 16, 17, 18, 19, 20, 21, 22, 23, 32, 33, 34, 35, 48, 64, 65]);
    }

    #[test]
    fn too_long_is_refused_by_the_header_alone() {
        let mut bytes = FrameHeader { length: 0, kind: FrameKind::Data, argument: 0 }.encode();
        bytes[0..4].copy_from_slice(&(FRAME_PAYLOAD_MAX.get() as u32 + 1).to_le_bytes());
        let length = FRAME_PAYLOAD_MAX.get() as u32 + 1;
        assert_eq!(FrameHeader::decode(&bytes), Err(FrameError::TooLong { length }));
    }

    #[test]
    fn refusals_are_cut_at_a_character() {
        let refuse = Refuse::new(RefusalCode::Gap, true, &"é".repeat(REFUSAL_BYTES_MAX));
        assert_eq!(refuse.message.len(), REFUSAL_BYTES_MAX);
        let odd = Refuse::new(RefusalCode::Gap, true, &format!("x{}", "é".repeat(REFUSAL_BYTES_MAX)));
        assert_eq!(odd.message.len(), REFUSAL_BYTES_MAX - 1);
    }

    proptest! {
        #[test]
        fn headers_survive(length in 0..=FRAME_PAYLOAD_MAX.get() as u32, kind in 0..FrameKind::ALL.len(), argument: u64) {
            let header = FrameHeader { length, kind: FrameKind::ALL[kind], argument };
            prop_assert_eq!(FrameHeader::decode(&header.encode()).unwrap(), header);
        }

        #[test]
        fn no_payload_panics(payload: Vec<u8>) {
            let frame = Frame { kind: FrameKind::Open, argument: 0, payload: payload.into() };
            let _ = frame.message::<Open>();
            let _ = frame.message::<Accept>();
            let _ = frame.message::<Begin>();
            let _ = frame.message::<Refuse>();
            let _ = frame.message::<Held>();
            let _ = frame.message::<crate::Measured>();
        }
    }
}
