//! From disk writes to a folded epoch: eBPF capture of block devices on a stock kernel, drain of what was missed,
//! and the `scan` source for anything that can be read.
//!
//! Rooms: [`kernel`](self) loads the eBPF program and is one [`Tap`]; [`Tracker`] is the state machine that turns any tap
//! and any [`Disk`] into epochs, the same in the agent and in the model tests; [`ScanSource`] needs neither. Both are a
//! [`Source`] to the agent.

pub mod check;
mod compare;
mod device;
mod disk;
mod disks;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod kernel;
mod lanes;
mod scan;
mod source;
mod tap;
mod tracker;

pub use compare::{Answer, Comparer, Question, Verdict};
pub use device::Device;
pub use disk::{Buffer, DirectDisks, Disk, Read, ReadDone};
pub use disks::{DeviceName, DeviceNameError, Disks, FoundDisk, Identity, Resolved, Sameness};
pub use error::CaptureError;
pub use kernel::{Keep, KernelTap, KernelTapOptions, OBJECT, Resumed, detach, give_way};
pub use scan::{SCAN_BYTES_PER_STEP, ScanSource};
pub use source::{Cut, Mode, Position, Progress, Source, SourceStatus, VolumeStatus};
pub use tap::{LossReason, Record, RecordKind, RingPosition, Tap, TapCounters, VolumeIndex};
pub use tracker::{TRACKER_LANE_BYTES_MAX, Tracker, TrackerLimits};
