//! Comparing disks with their replicas: why, when, how far.

use std::fmt;

use block::{ByteCount, UnixNanos};
use serde::{Deserialize, Serialize};

/// Why volumes are compared with their replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncReason {
    /// Nobody followed the disks for a while: the machine was started again, or tracking was ended, or another disk came.
    TrackingEnded,
    /// Tracking has a gap while it runs: something was written that could not be seen.
    TrackingLost,
    /// An agent before this one had begun it.
    Continued,
    /// Most of the volume was missed.
    MostlyDirty,
    /// The process server lost epochs that it had acknowledged.
    Gap,
    /// A scrub found parts of the replica damaged.
    Scrub,
    /// Somebody asked for it.
    Command,
    /// A target began in the middle of the history, and was never compared.
    NewTarget,
}

impl fmt::Display for ResyncReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ResyncReason::TrackingEnded => "tracking-ended",
            ResyncReason::TrackingLost => "tracking-lost",
            ResyncReason::Continued => "continued",
            ResyncReason::MostlyDirty => "mostly-dirty",
            ResyncReason::Gap => "gap",
            ResyncReason::Scrub => "scrub",
            ResyncReason::Command => "command",
            ResyncReason::NewTarget => "new-target",
        })
    }
}

/// Where a resync stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncStage {
    /// It begins when its hours come, or by command.
    WaitingForWindow,
    /// Others compare; it begins when the process server gives it its turn.
    WaitingForTurn,
    /// It goes on.
    Comparing,
}

/// When a resync that somebody asks for begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncWhen {
    /// As soon as the process server gives it its turn.
    #[default]
    Now,
    /// In the hours that the agent is configured with.
    Window,
}

/// A resync that goes on or waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Why.
    pub reason: ResyncReason,
    /// The same in words.
    pub why: String,
    /// Since when it is wanted, by the source's clock.
    pub since: UnixNanos,
    /// Which volumes.
    pub volumes: Vec<String>,
    /// Where it stands.
    pub stage: ResyncStage,
    /// When its hours come, if it waits for them; none within a week when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begins: Option<UnixNanos>,
    /// How many are before it, if it waits for its turn and the process server has said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead: Option<u32>,
    /// What is compared.
    pub bytes: ByteCount,
    /// What of it has been.
    pub compared: ByteCount,
    /// What of that was different.
    pub different: ByteCount,
    /// What will be sent, before compression; all of it as long as nothing is known.
    pub send_estimate: ByteCount,
    /// How long it will take from its beginning, or from now on, in seconds.
    pub seconds_estimate: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_and_stages_have_a_stable_text() {
        let reasons = [
            ResyncReason::TrackingEnded,
            ResyncReason::TrackingLost,
            ResyncReason::Continued,
            ResyncReason::MostlyDirty,
            ResyncReason::Gap,
            ResyncReason::Scrub,
            ResyncReason::Command,
        ];
        let texts: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        assert_eq!(texts.join(" "), "tracking-ended tracking-lost continued mostly-dirty gap scrub command");
        for reason in reasons {
            assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{reason}\""));
        }
        let stages = [ResyncStage::WaitingForWindow, ResyncStage::WaitingForTurn, ResyncStage::Comparing];
        let json = serde_json::to_string(&stages).unwrap();
        assert_eq!(json, r#"["waiting-for-window","waiting-for-turn","comparing"]"#);
    }
}
