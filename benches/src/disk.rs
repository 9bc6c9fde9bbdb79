//! A replica whose image is full of data that cannot be compressed.

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Consistency, Epoch};
use changeset::{Fold, Level, Opener, SealOptions, Stamp, seal};
use replica::GroupReplica;

use crate::data;

/// The volume's size; it fits into the system's cache.
pub const IMAGE_BYTES: u64 = 512 << 20;
/// An epoch's worth of it.
const EPOCH_BYTES: u64 = 64 << 20;
/// One block in so many is changed by the last epoch.
const CHANGED_ONE_IN: u64 = 100;

/// Applies epochs that fill the image, and one that changes a little; gives that one.
///
/// # Errors
/// When the replica refuses one.
pub fn fill(replica: &GroupReplica) -> anyhow::Result<Epoch> {
    let key = data::key();
    let mut epoch = Epoch::NONE;
    let mut apply = |fold: &Fold| -> anyhow::Result<()> {
        epoch = epoch.next();
        let stamp = Stamp { consistency: Consistency::Crash, group: replica.group(), ..data::stamp(epoch) };
        let mut volumes = data::volumes();
        volumes[0].size = ByteCount(IMAGE_BYTES);
        let sealed = seal(&stamp, &volumes, fold, &key, SealOptions { level: Level::Store, threads: 2 })?;
        let mut opener = Opener::new(key.clone(), replica.group(), 2);
        sealed.pieces.into_iter().try_for_each(|piece| opener.push(piece))?;
        replica.apply(&opener.finish()?)?;
        Ok(())
    };
    let block = |number: u64, seed: u64| {
        let mut state = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
        let words = (0..BLOCK_BYTES / 8).flat_map(move |_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_le_bytes()
        });
        words.collect::<Vec<u8>>()
    };
    for start in (0..IMAGE_BYTES).step_by(EPOCH_BYTES as usize) {
        let mut fold = Fold::new();
        for at in (start..start + EPOCH_BYTES).step_by(BLOCK_BYTES as usize) {
            fold.write(0, ByteOffset(at), &block(at / BLOCK_BYTES, 1));
        }
        apply(&fold)?;
    }
    let mut fold = Fold::new();
    for number in (0..IMAGE_BYTES / BLOCK_BYTES).step_by(CHANGED_ONE_IN as usize) {
        fold.write(0, ByteOffset(number * BLOCK_BYTES), &block(number, 2));
    }
    apply(&fold)?;
    Ok(epoch)
}
