//! Throws arbitrary bytes at the changeset decoder: as they are, with mended checksums, and sealed as if by a faulty
//! sealer. crates/changeset/src/tests/decoder.rs does the same on the stable toolchain.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| changeset::fuzzing::open_arbitrary(data));
