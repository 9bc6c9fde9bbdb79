//! The ring as the kernel keeps it: reservations in order, each busy until it is submitted or discarded.

use std::collections::VecDeque;

use crate::oracle::Value;

/// Bytes of the kernel's header of a record.
const HEADER_BYTES: u64 = 8;
/// `struct record`, and `struct piece`, in bytes.
pub(crate) const RANGE_BYTES: u64 = 24 + HEADER_BYTES;
pub(crate) const PIECE_BYTES: u64 = 24 + 4096 + HEADER_BYTES;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Busy,
    Submitted,
    Discarded,
}

#[derive(Clone, Copy)]
pub(crate) struct SimRecord {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) state: State,
    pub(crate) volume: u16,
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
    /// `None`: zeroes.
    pub(crate) data: Option<Value>,
    pub(crate) lane: u32,
    pub(crate) first: bool,
    pub(crate) last: bool,
}

pub(crate) struct SimRing {
    pub(crate) records: VecDeque<SimRecord>,
    pub(crate) bytes: u64,
    pub(crate) produced: u64,
    pub(crate) consumed: u64,
    /// What the producer knows of `consumed`, and what is left of it when the agent is killed.
    pub(crate) published: u64,
    /// Records between the two.
    taken: usize,
}

impl SimRing {
    pub(crate) fn new(bytes: u64) -> SimRing {
        SimRing { records: VecDeque::new(), bytes, produced: 0, consumed: 0, published: 0, taken: 0 }
    }

    /// The next record that is not consumed.
    pub(crate) fn next(&self) -> Option<SimRecord> {
        self.records.get(self.taken).copied()
    }

    /// The next two, for exchanging them.
    pub(crate) fn next_two(&mut self) -> Option<(&mut SimRecord, &mut SimRecord)> {
        let (first, second) = self.records.make_contiguous()[self.taken..].split_at_mut_checked(1)?;
        Some((&mut first[0], second.first_mut()?))
    }

    pub(crate) fn take(&mut self, record: &SimRecord) {
        self.consumed = record.end;
        self.taken += 1;
    }

    pub(crate) fn publish(&mut self) {
        self.published = self.consumed;
        self.records.drain(..std::mem::take(&mut self.taken));
    }

    /// A new agent begins at what was published.
    pub(crate) fn go_back(&mut self) {
        self.consumed = self.published;
        self.taken = 0;
    }

    /// `bpf_ringbuf_reserve`: where the record is, or nothing when it does not fit.
    pub(crate) fn reserve(&mut self, bytes: u64, record: SimRecord) -> Option<u64> {
        let (start, end) = (self.produced, self.produced + bytes);
        if end - self.published > self.bytes - 1 {
            return None;
        }
        self.produced = end;
        self.records.push_back(SimRecord { start, end, state: State::Busy, ..record });
        Some(start)
    }

    pub(crate) fn finish(&mut self, start: u64, state: State) {
        let record = self.records.iter_mut().rev().find(|record| record.start == start);
        record.expect("reserved and not consumed, for it is busy").state = state;
    }
}
