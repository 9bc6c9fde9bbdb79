use std::path::PathBuf;
use std::sync::Arc;

use control::fleet::ResourceId;
use tokio::sync::{Notify, Semaphore, watch};
use wire::Authority;

use crate::checkin::{CheckIns, Digests};
use crate::plan::Effects;
use crate::store::Store;

/// What every act of the API has.
pub(crate) type Shared = Arc<App>;

/// What all tasks share.
pub(crate) struct App {
    pub(crate) store: Store,
    pub(crate) authority: Authority,
    /// Of the authority's certificate, hexadecimal.
    pub(crate) fingerprint: String,
    /// Names this config server among several while it runs.
    pub(crate) holder: ResourceId,
    pub(crate) check_ins: CheckIns,
    pub(crate) digests: Digests,
    /// Passwords that are checked at the same time: each takes memory and a processor.
    pub(crate) password_checks: Semaphore,
    pub(crate) streams: Arc<Semaphore>,
    pub(crate) newest_event: watch::Receiver<i64>,
    /// What plans do over the network.
    pub(crate) effects: Effects,
    /// The directory of TSIG keys.
    pub(crate) dns_keys: Option<PathBuf>,
    /// There is something to do for a job.
    pub(crate) jobs_wake: Notify,
    /// There may be something to do for a part that waits for it.
    pub(crate) tasks_wake: Notify,
    pub(crate) stopping: watch::Receiver<bool>,
}
