//! Which stage of the way holds the others up.

use std::fmt;

use block::ByteCount;
use serde::{Deserialize, Serialize};

use crate::{ProcessGroup, StateCode};

/// What waits before a target counts as its being slow from here on.
pub const TARGET_BEHIND_BYTES: ByteCount = ByteCount::mib(16);
/// What waits at the agent counts as a slow way to the process server from here on.
pub const WAY_BEHIND_BYTES: ByteCount = ByteCount::mib(8);

/// A stage of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BottleneckStage {
    /// The disks of the source are read as fast as `[limits]` and their writers allow.
    Source,
    /// The way from the agent to the process server.
    Link,
    /// The process server's cache: it has no space, or its disk is slow.
    Cache,
    /// A target, or the way there.
    Target,
}

impl fmt::Display for BottleneckStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BottleneckStage::Source => "source",
            BottleneckStage::Link => "link",
            BottleneckStage::Cache => "cache",
            BottleneckStage::Target => "target",
        })
    }
}

/// The stage that holds the others up, and what waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bottleneck {
    /// Which.
    pub stage: BottleneckStage,
    /// In words.
    pub why: String,
    /// Changes that wait before it.
    pub waiting: ByteCount,
    /// Changes of which only the last state will be sent: in the open epoch, which waits for its turn, and in granules that
    /// are still to be read.
    pub coalesced: ByteCount,
}

impl Bottleneck {
    /// Of a group at a process server, whose `bottleneck` is not looked at. `None` when everything keeps up. The last stage
    /// that is full is the one: those before it are full because of it.
    pub fn of(group: &ProcessGroup) -> Option<Bottleneck> {
        let report = group.report.as_ref();
        let remaining = report.map_or(ByteCount::ZERO, |report| report.remaining_bytes());
        let coalesced =
            report.filter(|report| report.coalescing).map_or(ByteCount::ZERO, |report| report.open_bytes);
        let found = |stage, why: String, waiting| {
            Some(Bottleneck { stage, why, waiting, coalesced: coalesced.saturating_add(remaining) })
        };
        let slowest = group.targets.iter().max_by_key(|link| link.backlog_bytes);
        if let Some(link) = slowest {
            let backlog = link.backlog_bytes;
            if backlog > ByteCount::ZERO && !link.connected {
                let why =
                    format!("target {} is not reached; {backlog} wait for it in the cache", link.address);
                return found(BottleneckStage::Target, why, backlog);
            }
            if backlog >= TARGET_BEHIND_BYTES {
                let rate = ByteCount(link.sent_bytes_per_s.max(0.0) as u64);
                let why = format!(
                    "target {} or the way there takes {rate} a second; {backlog} wait in the cache",
                    link.address
                );
                return found(BottleneckStage::Target, why, backlog);
            }
        }
        let report = report?;
        let unsent = report.unsent_bytes;
        if report.coalescing || unsent >= WAY_BEHIND_BYTES {
            if group.state == StateCode::CacheFull {
                let why = format!("the cache has no space; {unsent} wait at the agent");
                return found(BottleneckStage::Cache, why, unsent);
            }
            let rate = ByteCount(report.sent_bytes_per_s.max(0.0) as u64);
            let why =
                format!("the way to the process server takes {rate} a second; {unsent} wait at the agent");
            return found(BottleneckStage::Link, why, unsent);
        }
        if remaining > ByteCount::ZERO {
            let why = format!("{remaining} of the source's disks are still to be read");
            return found(BottleneckStage::Source, why, remaining);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use block::{Epoch, Generation, GroupId};

    use super::*;
    use crate::{AgentReport, TargetLink};

    fn group(backlog: ByteCount, connected: bool, report: AgentReport) -> ProcessGroup {
        let link = TargetLink {
            address: "dr:7441".into(),
            connected,
            applied: Epoch(1),
            backlog_bytes: backlog,
            sent_bytes_total: ByteCount::ZERO,
            sent_bytes_per_s: 1024.0,
            state: StateCode::Replicating,
            last_error: None,
            next_try: None,
        };
        ProcessGroup {
            group: GroupId([1; 16]),
            generation: Generation(1),
            agent: None,
            cached: Epoch(4),
            cached_bytes: backlog,
            received_bytes_total: ByteCount::ZERO,
            received_bytes_per_s: 0.0,
            targets: vec![link],
            report: Some(report),
            state: StateCode::Replicating,
            last_error: None,
            bottleneck: None,
        }
    }

    /// A slow stage fills those before it: the last full one is meant.
    #[test]
    fn the_last_full_stage_is_the_one() {
        let none = AgentReport::default;
        let full = || AgentReport {
            coalescing: true,
            open_bytes: ByteCount::mib(3),
            unsent_bytes: ByteCount::mib(9),
            ..none()
        };
        let stage = |group: &ProcessGroup| Bottleneck::of(group).map(|found| found.stage);
        assert_eq!(stage(&group(ByteCount::mib(1), true, none())), None);
        assert_eq!(stage(&group(ByteCount::mib(16), true, full())), Some(BottleneckStage::Target));
        assert_eq!(stage(&group(ByteCount(1), false, full())), Some(BottleneckStage::Target));
        let link = Bottleneck::of(&group(ByteCount::mib(1), true, full())).unwrap();
        assert_eq!((link.stage, link.coalesced), (BottleneckStage::Link, ByteCount::mib(3)));
        let cache = ProcessGroup { state: StateCode::CacheFull, ..group(ByteCount::ZERO, true, full()) };
        assert_eq!(stage(&cache), Some(BottleneckStage::Cache));
    }
}
