//! Logs and meters, and where the figures are read.

mod latency;
mod log;
mod meter;
mod scrape;

pub use latency::{Latencies, LatencySummary};
pub use log::{Format, LogError, init};
pub use meter::{Clock, METER_WINDOW, Meter};
pub use scrape::{SCRAPERS_MAX, Scraped};
