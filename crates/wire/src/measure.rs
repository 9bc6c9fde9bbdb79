//! Measuring: how many bytes a second come from an agent to a process server, before anything depends on it.
//!
//! The receiver throws the bytes away, counts them, and says what came in what time; it alone decides when it has enough.
//! Memory: what is granted, [`MEASURE_BYTES_MAX`] a measurement. Cancellation: dropping either side ends it; nothing is remembered.

use std::time::Duration;

use block::ByteCount;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout, timeout_at};

use crate::delivery::read_message;
use crate::frame::{Frame, FrameKind, Outgoing};
use crate::identity::Identity;
use crate::link::{Link, Timing, send};
use crate::listener::Connection;
use crate::operate::OPENING_TIME_MAX;
use crate::{RefusalCode, WireError};

/// What one measurement may send, in bytes. More is refused as it is announced.
pub const MEASURE_BYTES_MAX: ByteCount = ByteCount::mib(8);
/// How long the receiver counts after the first bytes came. What has not come by then does not count.
pub const MEASURE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long a measurement may wait for its turn at the receiver. Past it, it is refused as busy.
pub const MEASURE_WAIT_MAX: Duration = Duration::from_secs(30);

/// The bytes are sent in pieces of this size, so that a slow link is told from a dead one.
const PIECE_BYTES: usize = 32 * 1024;

/// What came, and in what time; payload of [`FrameKind::Measured`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes after the first piece, with which the time begins; 0 when no other came in time.
    pub bytes: ByteCount,
    /// How long they took, in microseconds; at least 1.
    pub time_us: u64,
}

impl Measured {
    /// Bytes a second, rounded down.
    pub fn bytes_per_s(self) -> u64 {
        let per_s = u128::from(self.bytes.get()) * 1_000_000 / u128::from(self.time_us.max(1));
        u64::try_from(per_s).unwrap_or(u64::MAX)
    }
}

/// The receiving side of a measurement.
#[derive(Debug)]
pub struct Measurement {
    peer: Identity,
    total: ByteCount,
    link: Link,
}

impl Measurement {
    /// How many bytes a first frame announces; `None` when it is no opening.
    pub(crate) fn opening(frame: &Frame) -> Option<ByteCount> {
        let total = ByteCount(frame.argument);
        (frame.payload.is_empty() && (1..=MEASURE_BYTES_MAX.get()).contains(&total.get())).then_some(total)
    }

    pub(crate) fn accepted(peer: Identity, total: ByteCount, link: Link) -> Measurement {
        Measurement { peer, total, link }
    }

    /// Who sends.
    pub fn peer(&self) -> &Identity {
        &self.peer
    }

    /// Takes the bytes, and tells the other side what came.
    ///
    /// # Errors
    /// When nothing comes within [`OPENING_TIME_MAX`], the other side breaks the protocol, or the connection ended.
    pub async fn take(mut self) -> Result<Measured, WireError> {
        self.link.shared.grant(self.total);
        let mut left = self.total.get();
        match timeout(OPENING_TIME_MAX, self.link.next()).await {
            Ok(frame) => left -= self.piece(&frame?, left)?,
            Err(_) => {
                self.link.violated("no bytes to measure came in time");
                let peer = self.link.shared.peer.clone();
                return Err(WireError::TimedOut { what: "measure", peer, after: OPENING_TIME_MAX });
            }
        }
        let (began, counted_from) = (Instant::now(), left);
        while left > 0 {
            match timeout_at(began + MEASURE_TIME_MAX, self.link.next()).await {
                Ok(frame) => left -= self.piece(&frame?, left)?,
                Err(_) => break,
            }
        }
        let time_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        let measured = Measured { bytes: ByteCount(counted_from - left), time_us };
        self.link.send(Outgoing::message(FrameKind::Measured, 0, &measured)).await?;
        Ok(measured)
    }

    /// How many bytes a frame brings, of which the argument says how many follow.
    fn piece(&self, frame: &Frame, left: u64) -> Result<u64, WireError> {
        let length = frame.payload.len() as u64;
        let fits = frame.kind == FrameKind::Probe && length > 0;
        match fits && left.checked_sub(length) == Some(frame.argument) {
            true => Ok(length),
            false => {
                Err(self.link.violated(&format!("a {:?} frame has no place in a measurement", frame.kind)))
            }
        }
    }

    /// Refuses. Whether the other side should try again follows from the code.
    pub fn refuse(self, code: RefusalCode, message: &str) {
        self.link.shared.refuse(code, code.is_retryable(), message);
    }
}

/// Measures how much comes over a connection that was made for [`Purpose::Measure`](crate::Purpose::Measure): sends at most
/// [`MEASURE_BYTES_MAX`], for about [`MEASURE_TIME_MAX`] at most.
///
/// # Errors
/// When the server refuses, breaks the protocol, or falls silent, or the connection ended.
pub async fn measure(connection: Connection) -> Result<Measured, WireError> {
    let (_, mut link) = connection.start(Timing::default());
    let (shared, outgoing) = (link.shared.clone(), link.outgoing.clone());
    let total = MEASURE_BYTES_MAX.get();
    let sending = async {
        send(&outgoing, &shared, Outgoing::new(FrameKind::Probe, total, Vec::new())).await?;
        let mut granted = shared.granted.subscribe();
        let piece = piece();
        let mut sent = 0;
        while sent < total {
            let length = (total - sent).min(PIECE_BYTES as u64);
            if granted.wait_for(|granted| *granted >= sent + length).await.is_err() {
                return Err(WireError::Closed { peer: shared.peer.clone() });
            }
            sent += length;
            let part = piece.slice(..length as usize);
            send(&outgoing, &shared, Outgoing::new(FrameKind::Probe, total - sent, vec![part])).await?;
        }
        Ok(())
    };
    let answer = async {
        let frame = link.next().await?;
        match frame.kind {
            FrameKind::Measured => read_message(&link.shared, &frame),
            kind => Err(link.violated(&format!("a {kind:?} frame came in place of what was measured"))),
        }
    };
    let both = async {
        tokio::pin!(sending, answer);
        // The answer may come before all is sent: the other side has counted long enough.
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            sent = &mut sending => {
                sent?;
                answer.await
            }
        }
    };
    let after = MEASURE_WAIT_MAX + OPENING_TIME_MAX + MEASURE_TIME_MAX;
    match timeout(after, both).await {
        Ok(measured) => measured,
        Err(_) => Err(WireError::TimedOut { what: "measure", peer: shared.peer.clone(), after }),
    }
}

/// Bytes that no link makes smaller.
fn piece() -> Bytes {
    // SplitMix64: it need not be unpredictable.
    let mut state = 0_u64;
    let words = (0..PIECE_BYTES / 8).flat_map(|_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)).to_le_bytes()
    });
    words.collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Role;

    /// As docs/formats/wire.md has it: postcard's varints.
    #[test]
    fn golden_bytes() {
        let measured = Measured { bytes: ByteCount(300), time_us: 2_000_000 };
        let frame = Outgoing::message(FrameKind::Measured, 0, &measured);
        assert_eq!(frame.header, [5, 0, 0, 0, 65, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(frame.payload.concat(), [0xac, 0x02, 0x80, 0x89, 0x7a]);
        assert_eq!(measured.bytes_per_s(), 150);
        assert_eq!(Measured { bytes: ByteCount(7), time_us: 0 }.bytes_per_s(), 7_000_000);
        assert_eq!(Measured { bytes: ByteCount(u64::MAX), time_us: 1 }.bytes_per_s(), u64::MAX);
    }

    #[test]
    fn an_opening_announces_no_more_than_is_taken() {
        let opening = |argument, payload: &'static [u8]| {
            let payload = Bytes::from_static(payload);
            Measurement::opening(&Frame { kind: FrameKind::Probe, argument, payload })
        };
        let most = MEASURE_BYTES_MAX.get();
        assert_eq!(opening(most, b""), Some(MEASURE_BYTES_MAX));
        assert_eq!((opening(most + 1, b""), opening(0, b""), opening(1, b"x")), (None, None, None));
    }

    /// Two ends of a connection in memory; time passes only while both wait.
    fn ends() -> (Link, Link) {
        let (near, far) = tokio::io::duplex(1 << 20);
        let start = |stream| Link::start(stream, "peer".into(), Timing::default());
        (start(near), start(far))
    }

    fn measurement(total: u64, link: Link) -> Measurement {
        Measurement::accepted(Identity::new(Role::ProcessServer, "x", None).unwrap(), ByteCount(total), link)
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_comes_in_time_counts() {
        let (mut sender, receiver) = ends();
        let taking = tokio::spawn(measurement(10 * 4096, receiver).take());
        sender.shared.granted.subscribe().wait_for(|granted| *granted > 0).await.unwrap();
        for left in (0..10_u64).rev() {
            let part = Bytes::from(vec![1; 4096]);
            // Refused at the end: the other side has counted long enough.
            let _ = sender.send(Outgoing::new(FrameKind::Probe, left * 4096, vec![part])).await;
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
        let measured = taking.await.unwrap().unwrap();
        // At 0 ms, which begins it, and at 600, 1200 and 1800.
        assert_eq!(measured, Measured { bytes: ByteCount(3 * 4096), time_us: 2_000_000 });
        let frame = sender.next().await.unwrap();
        assert_eq!(frame.message::<Measured>().unwrap(), measured);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_announced_and_what_does_not_come_end_it() {
        for (argument, length) in [(0, 4097), (1, 4096), (8192, 0)] {
            let (mut sender, receiver) = ends();
            let taking = tokio::spawn(measurement(4096, receiver).take());
            let part = Bytes::from(vec![1; length]);
            sender.send(Outgoing::new(FrameKind::Probe, argument, vec![part])).await.unwrap();
            let error = taking.await.unwrap().unwrap_err();
            assert!(matches!(error.refusal(), Some(RefusalCode::Corrupt | RefusalCode::Credit)), "{error}");
            assert!(sender.next().await.unwrap_err().refusal().is_some());
        }
        let (_sender, receiver) = ends();
        let error = measurement(4096, receiver).take().await.unwrap_err();
        assert!(matches!(error, WireError::TimedOut { .. }), "{error}");
    }

    #[test]
    fn the_bytes_do_not_repeat() {
        let piece = piece();
        assert_eq!(piece.len(), PIECE_BYTES);
        let words: std::collections::HashSet<&[u8]> = piece.chunks(8).collect();
        assert_eq!(words.len(), PIECE_BYTES / 8);
    }
}
