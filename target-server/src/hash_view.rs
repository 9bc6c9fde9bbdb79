//! Hashes of a view, so that what is there already need not be sent.

use block::ByteOffset;
use bytes::Bytes;
use control::{VIEW_HASH_BYTES, VIEW_HASH_UNIT};
use replica::{ReplicaError, View};

use crate::operate::Chunks;

/// Units whose hashes are sent together: those of 16 MiB.
const UNITS_TOGETHER: u64 = 256;

/// Gives the hashes of all units that are not zeroes, in order.
pub(crate) fn hash_view(view: &View, chunks: &Chunks) -> Result<(), ReplicaError> {
    let unit = VIEW_HASH_UNIT.0;
    let units = view.size().0.div_ceil(unit);
    let mut content = vec![0; unit as usize];
    let mut next_data = 0;
    let mut first = 0;
    while first < units {
        let last = (first + UNITS_TOGETHER).min(units);
        let mut hashes = vec![0; (last - first) as usize * VIEW_HASH_BYTES];
        for (index, hash) in (first..last).zip(hashes.chunks_exact_mut(VIEW_HASH_BYTES)) {
            let (start, end) = (index * unit, ((index + 1) * unit).min(view.size().0));
            if next_data < start {
                let found = view.next_data(ByteOffset(start))?;
                next_data = found.map_or(u64::MAX, |extent| extent.offset().0.max(start));
            }
            if next_data < end {
                let content = &mut content[..(end - start) as usize];
                view.read_at(content, ByteOffset(start))?;
                hash.copy_from_slice(&unit_hash(content));
                // Looked up again at the next unit.
                next_data = 0;
            }
        }
        let empty = hashes.iter().all(|byte| *byte == 0);
        let offset = ByteOffset(first * VIEW_HASH_BYTES as u64);
        if !empty && chunks.blocking_send((offset, Bytes::from(hashes))).is_err() {
            // Nobody wants them any more.
            return Ok(());
        }
        // Long holes cost nothing.
        first = if empty && next_data > last * unit { (next_data / unit).min(units) } else { last };
    }
    Ok(())
}

/// The hash of one unit, as both sides make it.
pub fn unit_hash(content: &[u8]) -> [u8; VIEW_HASH_BYTES] {
    let mut hash = [0; VIEW_HASH_BYTES];
    if content.iter().any(|byte| *byte != 0) {
        hash.copy_from_slice(&blake3::hash(content).as_bytes()[..VIEW_HASH_BYTES]);
    }
    hash
}
