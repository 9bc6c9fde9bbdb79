use std::collections::HashMap;

use block::{ByteCount, Extent};
use changeset::Fold;

use crate::tap::{Record, RecordKind, VolumeIndex};

/// Requests of which not all records have come yet. A request is folded whole, with its last record (R1: an epoch
/// never ends inside a request); one that never ends was missed and is dropped.
///
/// A request's place in the order is that of its last record. Two requests whose records are mixed were issued at the
/// same time on two CPUs, so neither can depend on the other.
///
/// A request that never ends stays until its CPU issues another, so what they hold has a limit of its own: past it, the
/// request that has waited longest is given up, and its granules are read from the disk instead.
#[derive(Default)]
pub(crate) struct Lanes {
    open: HashMap<u32, Request>,
    bytes: u64,
    taken: u64,
    /// Parts of requests that were given up: to be marked dirty before the next cut.
    pub(crate) given_up: Vec<(VolumeIndex, Extent)>,
}

#[derive(Default)]
struct Request {
    /// When its last part came.
    touched: u64,
    parts: Vec<(VolumeIndex, Extent, bool)>,
    data: Vec<u8>,
}

impl Lanes {
    /// Takes a record, and folds its request if it is the last. Unfinished ones hold at most `limit` afterwards.
    pub(crate) fn take(&mut self, record: Record<'_>, fold: &mut Fold, limit: ByteCount) {
        if record.first && record.last {
            self.drop_lane(record.lane);
            return match record.kind {
                RecordKind::Data(data) => fold.write(record.volume.0, record.extent.offset(), data),
                RecordKind::Zeroes => fold.zero(record.volume.0, record.extent),
            };
        }
        if record.first {
            self.drop_lane(record.lane);
        } else if !self.open.contains_key(&record.lane) {
            self.given_up.push((record.volume, record.extent)); // the rest of a request that was given up
            return;
        }
        self.taken += 1;
        let request = self.open.entry(record.lane).or_default();
        request.touched = self.taken;
        request.parts.push((record.volume, record.extent, matches!(record.kind, RecordKind::Data(_))));
        if let RecordKind::Data(data) = record.kind {
            request.data.extend_from_slice(data);
            self.bytes += data.len() as u64;
        }
        if record.last
            && let Some(request) = self.open.remove(&record.lane)
        {
            self.bytes -= request.data.len() as u64;
            let mut data = &request.data[..];
            for (volume, extent, has_data) in request.parts {
                if has_data {
                    let (part, rest) = data.split_at(extent.length().0 as usize);
                    fold.write(volume.0, extent.offset(), part);
                    data = rest;
                } else {
                    fold.zero(volume.0, extent);
                }
            }
        }
        while self.bytes > limit.0
            && let Some(longest) =
                self.open.iter().min_by_key(|(_, request)| request.touched).map(|(lane, _)| *lane)
            && let Some(request) = self.open.remove(&longest)
        {
            self.bytes -= request.data.len() as u64;
            self.given_up.extend(request.parts.iter().map(|(volume, extent, _)| (*volume, *extent)));
        }
    }

    fn drop_lane(&mut self, lane: u32) {
        if let Some(request) = self.open.remove(&lane) {
            self.bytes -= request.data.len() as u64;
        }
    }

    /// What unfinished requests have of the disks so far.
    pub(crate) fn held(&self) -> impl Iterator<Item = (VolumeIndex, Extent)> {
        let parts = self.open.values().flat_map(|request| &request.parts);
        parts.map(|(volume, extent, _)| (*volume, *extent))
    }

    /// Bytes of unfinished requests.
    #[cfg(test)]
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use block::{ByteCount, ByteOffset};

    use super::*;

    const LIMIT: ByteCount = ByteCount(2 * 4096);

    fn record(lane: u32, offset: u64, data: &[u8], first: bool, last: bool) -> Record<'_> {
        let extent = Extent::new(ByteOffset(offset), ByteCount(data.len() as u64)).unwrap();
        Record { volume: VolumeIndex(0), extent, kind: RecordKind::Data(data), lane, first, last }
    }

    #[test]
    fn a_request_is_folded_with_its_last_record_only() {
        let (mut lanes, mut fold) = (Lanes::default(), Fold::new());
        lanes.take(record(0, 0, &[1; 4096], true, false), &mut fold, LIMIT);
        lanes.take(record(1, 8192, &[2; 4096], true, true), &mut fold, LIMIT);
        assert_eq!(fold.plain_bytes(), ByteCount(4096));
        lanes.take(record(0, 4096, &[1; 4096], false, true), &mut fold, LIMIT);
        assert_eq!(fold.plain_bytes(), ByteCount(3 * 4096));
        assert_eq!(lanes.bytes(), 0);
    }

    #[test]
    fn a_request_that_never_ends_is_dropped() {
        let (mut lanes, mut fold) = (Lanes::default(), Fold::new());
        lanes.take(record(0, 0, &[1; 4096], true, false), &mut fold, LIMIT);
        lanes.take(record(0, 8192, &[2; 4096], true, true), &mut fold, LIMIT);
        lanes.take(record(0, 4096, &[1; 4096], false, true), &mut fold, LIMIT);
        assert_eq!(fold.plain_bytes(), ByteCount(4096));
        assert_eq!(lanes.bytes(), 0);
    }
    #[test]
    fn the_request_that_waited_longest_is_given_up() {
        let (mut lanes, mut fold) = (Lanes::default(), Fold::new());
        for lane in 0..3 {
            lanes.take(record(lane, u64::from(lane) * 8192, &[1; 4096], true, false), &mut fold, LIMIT);
        }
        assert_eq!(lanes.bytes(), LIMIT.0);
        lanes.take(record(0, 4096, &[1; 4096], false, true), &mut fold, LIMIT);
        assert!(fold.is_empty(), "its beginning is gone");
        let extent = |offset| Extent::new(ByteOffset(offset), ByteCount(4096)).unwrap();
        assert_eq!(lanes.given_up, [(VolumeIndex(0), extent(0)), (VolumeIndex(0), extent(4096))]);
    }
}
