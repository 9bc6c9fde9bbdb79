//! Logs and meters.

mod latency;
mod log;
mod meter;

pub use latency::{Latencies, LatencySummary};
pub use log::{Format, LogError, init};
pub use meter::{Clock, METER_WINDOW, Meter};
