//! The target server: takes changesets from process servers, applies them to replicas, serves recovery points.
//!
//! One [`TargetServer`] keeps any number of groups, each with its own replica and key. Deliveries come over the wire
//! (one at a time for a group), operators ask for status, points and views.

mod compare;
mod config;
mod cutter;
mod delivery;
mod export;
mod failover;
mod fleet;
mod group;
mod hash_view;
mod operate;
mod proof;
mod refusal;
mod retain;
mod server;
mod upkeep;
mod view_hash;

pub use config::{
    Config, ConfigError, DeviceConfig, GROUPS_MAX, GroupConfig, RetentionConfig, THREADS_MAX,
    UPKEEP_RATE_MIN, UpkeepConfig,
};
pub use cutter::CUT_EVERY;
pub use delivery::{CREDIT_BYTES, PIPELINE_CHANGESETS};
pub use export::{EXPORT_TIME_MAX, EXPORTS_MAX, OVERLAY_LIMIT_DEFAULT};
pub use fleet::FleetTargetServer;
pub use hash_view::unit_hash;
pub use operate::{VIEW_CHUNK_BYTES, VIEWS_MAX, ViewEnd};
pub use replica::parse_span;
pub use retain::POINTS_LISTED_MAX;
pub use server::{Handle, StartError, TargetServer, verify};
pub use view_hash::ViewHash;
