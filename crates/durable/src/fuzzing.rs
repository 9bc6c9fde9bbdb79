//! What the fuzzer throws at the decoder of record files. Built for it alone.

use std::path::Path;

use crate::record::{RECORD_SLOT_BYTES, mend, slot};
use crate::{CrashStorage, OpenMode, RecordFile, Storage};

/// A record file of arbitrary slots; with the lowest bits of the first byte, those whose magic, version and checksum are mended.
pub fn record(data: &[u8]) {
    let Some((&way, data)) = data.split_first() else { return };
    // The first half is the first slot, as short as it may be; the second one lies where the second slot is.
    let (first, second) = data.split_at(data.len() / 2);
    let storage = CrashStorage::new();
    let path = Path::new("/record");
    let file = storage.open(path, OpenMode::CreateNew).expect("a new file");
    for (number, half) in [first, second].into_iter().enumerate() {
        let mut half = half.to_vec();
        if way >> number & 1 == 1 {
            mend(&mut half);
        }
        file.write_all_at(&half, number as u64 * RECORD_SLOT_BYTES as u64).expect("room");
    }
    drop(file);
    let Ok((mut record, payload)) = RecordFile::open(&storage, path) else { return };
    // Behind the first half the file has zeroes, which may be the payload's end.
    let end = payload.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    assert!(end == 0 || data.windows(end).any(|part| part == &payload[..end]));
    // What can be read can be replaced, unless no number is left.
    if record.write(b"next").is_ok() {
        assert_eq!(RecordFile::open(&storage, path).expect("just written").1, b"next");
    }
}

/// What [`record`] begins with.
pub fn record_seeds() -> Vec<Vec<u8>> {
    let slot = |sequence, payload: &[u8]| slot(Path::new("/record"), sequence, payload).expect("short");
    let both = [slot(7, b"seawall"), slot(8, b"another")].concat();
    [0, 1, 2, 3].map(|way| [&[way][..], &both].concat()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number after the last one was reckoned with an overflow.
    #[test]
    fn what_broke_once_does_not_again() {
        record(include_bytes!("../../../fuzz/regressions/durable-record/last-number"));
    }

    /// It ended in what no slot was written to.
    #[test]
    fn a_payload_may_end_in_the_hole_between_the_slots() {
        record(include_bytes!("../../../fuzz/regressions/durable-record/payload-in-hole"));
    }

    #[test]
    fn seeds_are_read() {
        for seed in record_seeds() {
            record(&seed);
            let mut first = seed[1..].split_at((seed.len() - 1) / 2).0.to_vec();
            let before = first.clone();
            mend(&mut first);
            assert_eq!(first, before);
        }
    }
}
