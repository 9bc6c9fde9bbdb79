//! Folding 4 KiB writes on one thread, against copying the same bytes into memory that is as warm.

use std::time::Instant;

use block::{BLOCK_BYTES, ByteOffset};
use changeset::Fold;
use seawall_benches::{Pair, compare, data};

fn main() -> anyhow::Result<()> {
    let writes = data::mix();
    let blocks: Vec<(ByteOffset, &[u8])> = writes
        .iter()
        .flat_map(|write| {
            let at = (write.offset.0..).step_by(BLOCK_BYTES as usize).map(ByteOffset);
            at.zip(write.data.chunks_exact(BLOCK_BYTES as usize))
        })
        .collect();
    let mut fold = Fold::new();
    let mut copy = vec![0_u8; data::MIX_BYTES];
    compare("changeset_fold", data::MIX_BYTES as u64, || {
        let start = Instant::now();
        fold.clear();
        for (offset, block) in &blocks {
            fold.write(0, *offset, block);
        }
        let subject = start.elapsed();
        let start = Instant::now();
        for ((_, block), place) in blocks.iter().zip(copy.chunks_exact_mut(BLOCK_BYTES as usize)) {
            place.copy_from_slice(block);
        }
        std::hint::black_box(&mut copy);
        Pair { subject, limit: start.elapsed() }
    })
}
