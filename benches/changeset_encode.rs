//! Sealing a folded epoch, against bare zstd and bare ChaCha20-Poly1305 over the blocks that are not zero, which are
//! already sorted and packed for it, with the same number of threads and buffers that are used again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use changeset::{Level, SealOptions, seal};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use seawall_benches::{Pair, compare, data};

const FRAME_BYTES: usize = 1 << 20;

fn main() -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism()?.get();
    let writes = data::mix();
    let (fold, dense) = (data::fold(&writes), data::dense(&writes));
    let (stamp, volumes, key) = (data::stamp(block::Epoch(1)), data::volumes(), data::key());
    let cipher = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).expect("a key has 32 bytes"));
    let frames: Vec<&[u8]> = dense.chunks(FRAME_BYTES).collect();
    let mut buffers: Vec<_> = (0..threads)
        .map(|_| zstd::bulk::Compressor::new(1).map(|zstd| (zstd, Vec::with_capacity(FRAME_BYTES * 2))))
        .collect::<Result<_, _>>()?;
    compare("changeset_encode", data::MIX_BYTES as u64, || {
        let start = Instant::now();
        let sealed = seal(&stamp, &volumes, &fold, &key, SealOptions { level: Level::Fast, threads });
        let subject = start.elapsed();
        std::hint::black_box(sealed.expect("the mix seals"));

        let start = Instant::now();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (compressor, buffer) in &mut buffers {
                let (frames, next, cipher) = (&frames, &next, &cipher);
                scope.spawn(move || {
                    while let Some(frame) = frames.get(next.fetch_add(1, Ordering::Relaxed)) {
                        compressor.compress_to_buffer(frame, buffer).expect("zstd compresses");
                        let nonce = Nonce::assume_unique_for_key([0; 12]);
                        let tag = cipher.seal_in_place_separate_tag(nonce, Aad::empty(), buffer);
                        std::hint::black_box((buffer.as_slice(), tag.expect("the cipher seals").as_ref()[0]));
                    }
                });
            }
        });
        Pair { subject, limit: start.elapsed() }
    })
}
