//! The process server: holds agents' changesets durably and forwards them, in order, to each target server of the group.
//!
//! It never sees plain data: changesets are opaque bytes with a group, a generation and an epoch, which the wire's
//! messages carry and the target server compares with what is sealed inside. What it keeps is in the [`cache`] crate.
//!
//! One task per agent's connection ([`INTAKE_WINDOW`]), one per group and target, one that accepts; the cache's two threads
//! write. Status is gathered when it is asked for.

mod compare;
mod config;
mod fleet;
mod forward;
mod hub;
mod intake;
mod measure;
mod operate;
mod server;
mod turns;

pub use config::{
    CACHE_BYTES_MIN, Config, ConfigError, GROUPS_MAX, GroupConfig, ProcessServerSection, RESYNCS_AT_ONCE_MAX,
    TARGETS_MAX,
};
pub use fleet::FleetProcessServer;
pub use intake::{INTAKE_BACKLOG_MAX, INTAKE_WINDOW, TAKEOVER_WAIT};
pub use measure::MEASURES_AT_ONCE;
pub use server::{Handle, ProcessServer, StartError, verify};
