//! A disk's worth of changes, the same on every run and machine.

use block::{BLOCK_BYTES, ByteCount, ByteOffset, Epoch, Generation, GroupId, VolumeId};
use changeset::{Fold, GroupKey, Stamp, VolumeInfo};

/// Bytes in the mix.
pub const MIX_BYTES: usize = 64 << 20;
/// The volume the mix is spread over.
pub const VOLUME_BYTES: ByteCount = ByteCount::gib(1);

/// One write of an application.
pub struct Write {
    /// Where on the volume.
    pub offset: ByteOffset,
    /// What; whole 4 KiB blocks.
    pub data: Vec<u8>,
}

/// A small generator whose numbers are part of the data: it must never change.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }
}

/// 64 MiB as a real disk has them: half text (as logs, sources and tables are), a fifth random (as media and
/// compressed files are), the rest zeroes; in runs of 4 to 256 KiB with gaps between them, in the order an application
/// would write them, which is not the disk's.
pub fn mix() -> Vec<Write> {
    let mut numbers = Numbers(0x5ea_3a11);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| (0..2 + numbers.below(9)).map(|_| b'a' + numbers.below(26) as u8).collect())
        .collect();
    let mut writes = Vec::new();
    let (mut total, mut offset) = (0, 0);
    while total < MIX_BYTES {
        let blocks = (1 + numbers.below(64)).min(((MIX_BYTES - total) as u64) / BLOCK_BYTES);
        let length = (blocks * BLOCK_BYTES) as usize;
        let data = match numbers.below(10) {
            0..5 => text(&mut numbers, &words, length),
            5..7 => (0..length / 8).flat_map(|_| numbers.next().to_le_bytes()).collect(),
            _ => vec![0; length],
        };
        writes.push(Write { offset: ByteOffset(offset), data });
        total += length;
        offset += (blocks + numbers.below(100)) * BLOCK_BYTES;
    }
    assert!(offset < VOLUME_BYTES.0, "the mix fits its volume");
    for index in (1..writes.len()).rev() {
        let other = numbers.below(index as u64 + 1) as usize;
        writes.swap(index, other);
    }
    writes
}

/// Lines of words, a few of them frequent, and numbers.
fn text(numbers: &mut Numbers, words: &[Vec<u8>], length: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(length + 64);
    while text.len() < length {
        for _ in 0..6 + numbers.below(8) {
            // Squaring the draw twice makes low indexes frequent.
            let draw = numbers.below(1 << 16);
            let index = (((draw * draw) >> 16) * draw) >> 20;
            text.extend_from_slice(&words[index as usize % words.len()]);
            text.push(b' ');
        }
        text.extend_from_slice(numbers.below(1_000_000).to_string().as_bytes());
        text.push(b'\n');
    }
    text.truncate(length);
    text
}

/// An epoch that holds the writes.
pub fn fold(writes: &[Write]) -> Fold {
    let mut fold = Fold::new();
    for write in writes {
        fold.write(0, write.offset, &write.data);
    }
    fold
}

/// Blocks that are not zero, one after another in the volume's order: what has to be compressed and sealed whatever
/// the format.
pub fn dense(writes: &[Write]) -> Vec<u8> {
    let mut sorted: Vec<&Write> = writes.iter().collect();
    sorted.sort_by_key(|write| write.offset);
    let blocks = sorted.iter().flat_map(|write| write.data.chunks_exact(BLOCK_BYTES as usize));
    blocks.filter(|block| block.iter().any(|byte| *byte != 0)).flatten().copied().collect()
}

/// The group every bench belongs to.
pub const GROUP: GroupId = GroupId([1; 16]);

/// The history everything here belongs to.
pub const GENERATION: Generation = Generation(1);

/// A stamp of one of the group's epochs.
pub fn stamp(epoch: Epoch) -> Stamp {
    Stamp {
        group: GROUP,
        generation: GENERATION,
        epoch,
        consistency: block::Consistency::Crash,
        cut_time: block::UnixNanos(epoch.0),
    }
}

/// The group's one volume.
pub fn volumes() -> Vec<VolumeInfo> {
    vec![VolumeInfo { id: VolumeId([2; 16]), name: "disk".into(), size: VOLUME_BYTES, logical_block: 512 }]
}

/// The group's key.
pub fn key() -> GroupKey {
    GroupKey::from_bytes([3; 32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_what_it_says() {
        let writes = mix();
        let total: usize = writes.iter().map(|write| write.data.len()).sum();
        let percent = |bytes: usize| bytes * 100 / total;
        let zero: usize =
            writes.iter().filter(|w| w.data.iter().all(|b| *b == 0)).map(|w| w.data.len()).sum();
        let random = writes.iter().filter(|w| w.data.iter().any(|b| *b >= 128)).map(|w| w.data.len()).sum();
        assert_eq!(total, MIX_BYTES);
        assert!((27..=33).contains(&percent(zero)) && (17..=23).contains(&percent(random)));
        assert_eq!(dense(&writes).len(), total - zero);
    }
}
