//! The only place in Seawall that creates, replaces, renames and fsyncs files.
//!
//! Everything persisted goes through [`Storage`]: [`RealStorage`] is the file system, [`CrashStorage`] a simulation
//! that can stop at any operation and build the images a crash leaves, so that every order of lost and torn writes
//! can be tried.
//!
//! What is assumed of the medium is written at [`Storage`]. Two ways to keep a small state whole across a crash:
//! [`replace()`] for one that changes seldom or grows (three syncs, any size), [`RecordFile`] for one that changes each
//! second (one sync, bounded size).

mod crash;
mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod pages;
mod real;
mod record;
mod replace;
mod storage;

pub use crash::{CrashStorage, Fault};
pub use fault::{FAULT_VARIABLE, fault_point};
pub use real::RealStorage;
pub use record::{RECORD_PAYLOAD_BYTES_MAX, RecordError, RecordFile};
pub use replace::{REPLACE_SUFFIX, replace};
pub use storage::{OpenMode, Storage, StorageFile};
