//! How a part belongs to a fleet: it enrols once with a token ([`join()`]), keeps its certificate good, reports, and hears what
//! it is to do ([`Member`]). [`Client`] is the way to the config server's API for parts and for the operator's command;
//! [`seal`] gives group keys from an agent to a target so that the config server between them cannot read them.
//!
//! Consistency: what a part was told last is kept in a file, and acted on at the next start, whether the config server is
//! there or not.
//! Crash consistency: a certificate and its key are made in a directory of their own, and a link leads to the one in use; the
//! link is replaced in one step.
//! Retries: a check-in that fails is tried again at the next interval, for ever; nothing else waits for it.

mod client;
mod credentials;
mod error;
mod file;
mod fingerprint;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod join;
mod member;
mod profile;
pub mod seal;
mod state;
mod url;

pub use client::{Client, REPLY_BYTES_MAX, REQUEST_TIME_MAX};
pub use credentials::CURRENT;
pub use error::EnrolError;
pub use file::{FileEnrolment, enrol_with_file};
pub use fingerprint::{Fingerprint, FingerprintError};
pub use join::{Joined, join};
pub use member::{ASK_EVERY, Charge, Member, RENEW_PART, TaskDone};
pub use profile::Profile;
pub use state::ConfigServerSection;
pub use url::ServerUrl;
