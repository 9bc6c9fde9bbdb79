//! The config server: who may talk to whom, what is protected and how, what is happening, and every button.
//!
//! Rooms: `config` reads the file; `init` makes a new one; `store` keeps the state; `server` listens and starts everything;
//! `api` has every act, each behind its guard (`api::guard`: who asks, whether they may, the audit log); `view` makes the
//! pictures that are shown; `console` has the pages for people, which use the API as everybody does; `checkin` takes what parts report, `reports` has it
//! at hand, as `declared` has what is declared, `sample` keeps figures of it for charts; `desired` says what each is to do; `job`, `protect` and `plan` do
//! what is long.
//!
//! What is declared is in the store; parts fetch it and act on it whether this server runs or not. So an outage of any length
//! costs the view and the buttons, never a recovery point. Several servers may run on one PostgreSQL at once: jobs have
//! leases, events are read from the store, nothing else is shared.

mod alert;
mod api;
mod app;
mod audit;
mod backup;
mod checkin;
mod config;
mod console;
mod credentials;
mod declared;
mod desired;
mod fault;
mod init;
mod job;
mod plan;
mod protect;
mod reports;
mod sample;
mod secret;
mod server;
mod store;
mod tidy;
mod view;

pub use api::openapi;
pub use audit::AUDIT_KEPT;
pub use backup::{backup, restore};
pub use checkin::{CHECK_IN_AGAIN_MS, CHECK_IN_EVERY_MS, CHECK_IN_SOON_MS};
pub use config::{Config, ConfigError, NAMES_MAX};
pub use fault::Fault;
pub use init::{InitOptions, init};
pub use job::{JOBS_KEPT, JOBS_UNDER_WAY_MAX, LEASE};
pub use plan::report;
pub use protect::{CLOCK_SKEW_REFUSED_MS, CLOCK_SKEW_WARNED_MS, SILENT_WAIT_MAX};
pub use sample::SAMPLE_STEPS;
pub use secret::new_password;
pub use server::{CONNECTIONS_MAX, ConfigServer, Handle, check, fingerprint};
