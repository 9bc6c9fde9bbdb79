use block::{Epoch, UnixNanos};
use serde::{Deserialize, Serialize};

/// That a machine came up from a point, and how long it took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofInfo {
    /// Which point. It may be gone meanwhile.
    pub epoch: Epoch,
    /// When it was cut, by the source's clock.
    pub cut_time: UnixNanos,
    /// The machine's disks.
    pub volumes: Vec<String>,
    /// When that was, by the target's clock.
    pub proven: UnixNanos,
    /// From the command to the end of all checks, in milliseconds.
    pub took_ms: u64,
    /// Who has proven it.
    pub operator: String,
}
