//! Opening a changeset, with everything that is verified, against bare ChaCha20-Poly1305 and bare zstd over the same
//! blocks with the same number of threads and buffers that are used again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use changeset::{Level, Opener, SealOptions, seal};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use seawall_benches::{Pair, compare, data};

const FRAME_BYTES: usize = 1 << 20;

fn main() -> anyhow::Result<()> {
    let threads = std::thread::available_parallelism()?.get();
    let writes = data::mix();
    let (fold, dense) = (data::fold(&writes), data::dense(&writes));
    let key = data::key();
    let options = SealOptions { level: Level::Fast, threads };
    let sealed = seal(&data::stamp(block::Epoch(1)), &data::volumes(), &fold, &key, options)?;
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    let cipher = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).expect("a key has 32 bytes"));
    let mut frames = Vec::new();
    for chunk in dense.chunks(FRAME_BYTES) {
        let mut frame = zstd::bulk::compress(chunk, 1)?;
        cipher.seal_in_place_append_tag(nonce(), Aad::empty(), &mut frame).expect("the cipher seals");
        frames.push(frame);
    }
    let mut buffers: Vec<_> = (0..threads)
        .map(|_| {
            zstd::bulk::Decompressor::new().map(|zstd| (zstd, Vec::new(), Vec::with_capacity(FRAME_BYTES)))
        })
        .collect::<Result<_, _>>()?;
    compare("changeset_decode", data::MIX_BYTES as u64, || {
        let start = Instant::now();
        let mut opener = Opener::new(key.clone(), data::GROUP, threads);
        for piece in &sealed.pieces {
            opener.push(piece.clone()).expect("the mix opens");
        }
        let changeset = opener.finish().expect("the mix opens");
        let subject = start.elapsed();
        std::hint::black_box(changeset);

        let start = Instant::now();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (decompressor, buffer, plain) in &mut buffers {
                let (frames, next, cipher) = (&frames, &next, &cipher);
                scope.spawn(move || {
                    while let Some(frame) = frames.get(next.fetch_add(1, Ordering::Relaxed)) {
                        // What came over the wire cannot be opened in place.
                        buffer.clear();
                        buffer.extend_from_slice(frame);
                        let packed =
                            cipher.open_in_place(nonce(), Aad::empty(), buffer).expect("the frame opens");
                        decompressor.decompress_to_buffer(packed, plain).expect("zstd decompresses");
                        std::hint::black_box(plain.as_slice());
                    }
                });
            }
        });
        Pair { subject, limit: start.elapsed() }
    })
}
