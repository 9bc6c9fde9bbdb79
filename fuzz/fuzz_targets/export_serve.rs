//! Throws arbitrary clients at the NBD server: their bytes as they are, after a sound negotiation, and as requests that are
//! nearly sound. crates/export/src/fuzzing.rs does the same on the stable toolchain.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| export::fuzzing::serve_arbitrary(data));
