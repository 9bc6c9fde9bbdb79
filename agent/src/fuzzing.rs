//! What the fuzzer throws at the agent's own decoders. Built for it alone.

pub use crate::volumes::fuzzing::{disks, disks_seeds};
