//! What the fuzzer throws at what the kernel side leaves in the ring. Built for it alone.

use crate::kernel::fuzzing::decode_record;
use crate::tap::RecordKind;

/// A record of the ring.
pub fn record(data: &[u8]) {
    let Some(record) = decode_record(data) else { return };
    assert!(record.extent.end().0 >= record.extent.offset().0);
    if let RecordKind::Data(bytes) = record.kind {
        assert_eq!(bytes.len() as u64, record.extent.length().0);
    }
}

/// What [`record`] begins with: data and a discard.
pub fn record_seeds() -> Vec<Vec<u8>> {
    let record = |kind: u8, length: u32| {
        let mut bytes = 8_u64.to_le_bytes().to_vec();
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&[0, 0, kind, 3, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&[7; 512]);
        bytes
    };
    vec![record(1, 512), record(3, 65536)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        for seed in record_seeds() {
            assert!(decode_record(&seed).is_some());
            record(&seed);
        }
    }
}
