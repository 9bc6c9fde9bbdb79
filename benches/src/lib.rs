//! What the benches share: comparing a subject with its limit, and the data they work on.
//!
//! A bench here never measures alone. The subject and its limit (the same work done by nothing but what cannot be done
//! without: a memcpy, bare zstd, a bare `pwrite`) take turns in one run, so that whatever slows the machine down slows both,
//! and what is kept is their ratio.
//!
//! `SEAWALL_BENCH_QUICK=1` measures for about two seconds instead of ten. `SEAWALL_BENCH_JSON=FILE` puts the result
//! into FILE, a JSON array of objects with name, value, unit, limit and ratio; a result of the same name is replaced.

mod compare;
pub mod data;
pub mod disk;
pub mod fleet;
pub mod nbd;
pub mod site;
mod way;

pub use compare::{Pair, compare, quick, result};
pub use way::Way;
