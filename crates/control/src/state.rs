use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How much a state matters to the person who reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Good,
    /// Not as it should be for ever, but nobody need act yet.
    Notice,
    /// A person must act.
    Trouble,
}

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident $code:literal $severity:ident $meaning:literal $todo:literal)*) => {
        /// What a part is doing or suffering: one code for programs, with its meaning and what to do for people.
        /// Codes are stable.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum StateCode {
            $($(#[$doc])* $name,)*
        }

        impl StateCode {
            /// All of them.
            pub const ALL: &[StateCode] = &[$(StateCode::$name),*];

            /// For programs: a stable name of lower-case letters and hyphens.
            pub const fn code(self) -> &'static str {
                match self { $(StateCode::$name => $code,)* }
            }

            /// What it means, in a sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(StateCode::$name => $meaning,)* }
            }

            /// What to do, in a sentence.
            pub const fn what_to_do(self) -> &'static str {
                match self { $(StateCode::$name => $todo,)* }
            }

            /// How much it matters.
            pub const fn severity(self) -> Severity {
                match self { $(StateCode::$name => Severity::$severity,)* }
            }
        }
    };
}

states! {
    /// Nothing is known yet.
    #[default]
    Unknown "unknown" Notice
        "Nothing is known of it: it has not reported, or speaks of a state that this version does not know."
        "If it stays so, look whether it runs, and upgrade the older side."
    /// Starting.
    Starting "starting" Notice
        "It is starting and recovering what it holds."
        "Nothing; it goes on by itself."
    /// Nothing is asked of it.
    Idle "idle" Good
        "It runs, and nothing is protected through it."
        "Nothing; what is to be protected is said at the config server, or in its configuration."
    /// No source yet.
    WaitingForAgent "waiting-for-agent" Notice
        "No agent of the group is connected; no new recovery points arrive."
        "Look whether the agent runs on the source and can reach the process server."
    /// Everything is still to be copied.
    InitialCopy "initial-copy" Notice
        "The volumes are being copied for the first time while writes go on; there is no recovery point yet."
        "Nothing; the first recovery point comes when the copy is complete."
    /// As it should be.
    Replicating "replicating" Good
        "Writes are captured and recovery points follow each other."
        "Nothing."
    /// Some writes' data was missed and is being read.
    CatchingUp "catching-up" Notice
        "Writes came faster than they could be taken; what was missed is being read from the disk, and no new point is offered until then."
        "Nothing, if it passes; if it comes back often, give the agent a larger ring or more memory, or the link more bandwidth."
    /// Tracking has a gap.
    Resync "resync" Notice
        "Tracking had a gap, so the volumes are compared with the replica; what differs is sent, and no new point is offered until then."
        "Nothing, if the cause is known (a restart of the machine); otherwise look at the last error."
    /// Data cannot be captured.
    CaptureLimited "capture-limited" Notice
        "The kernel does not let write data be captured; changes are found in another way, and points are rarer."
        "Look at the last error; the agent needs CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, and a kernel without confidentiality lockdown."
    /// Capture does not work at all.
    CaptureFailed "capture-failed" Trouble
        "Writes of a volume can no longer be captured; no new recovery points are made."
        "Look at the last error, mend it and start the agent again; the volumes are then compared."
    /// The disk of the source cannot be read.
    SourceFailed "source-failed" Trouble
        "A volume of the source cannot be read."
        "Look at the source's kernel log; older recovery points can be restored."
    /// The next part does not answer.
    Unreachable "unreachable" Notice
        "The next part on the way cannot be reached; it is tried again, and changes wait."
        "Look whether it runs and whether the network lets its port through."
    /// The next part does not accept this one, or the other way round.
    Unauthenticated "unauthenticated" Trouble
        "A certificate is missing, expired, of another authority or of another role; nothing is exchanged."
        "Compare both sides' ca.pem and clocks, and issue new credentials where they do not fit."
    /// The next part does not let this one do it.
    Unauthorised "unauthorised" Trouble
        "The peer knows who this is, but does not allow it to do this."
        "Look at the last error, and put the group or the role into the peer's configuration or this side's certificate."
    /// An old generation.
    Fenced "fenced" Trouble
        "The other side belongs to a newer generation: this source was failed over from, and its changes are refused."
        "Stop this agent; to protect this machine again, give it the new generation."
    /// Versions do not overlap.
    VersionMismatch "version-mismatch" Trouble
        "The two sides share no version of the protocol."
        "Upgrade the older side."
    /// No space in the cache.
    CacheFull "cache-full" Notice
        "The process server's cache is full; sources wait, and their changes become coarser until space is free."
        "Look why a target does not keep up, or give the cache more space."
    /// No space at the target.
    TargetFull "target-full" Trouble
        "The target has no space for the next changes; nothing that was applied is lost."
        "Give the target's file system more space, or keep fewer recovery points."
    /// The store failed.
    StoreFailed "store-failed" Trouble
        "The disk under this part's files failed; it takes nothing more, so that nothing wrong is acknowledged."
        "Look at the last error and the kernel log, mend the disk, and start this part again."
    /// Something that was stored or sent is not what it was.
    Corrupt "corrupt" Trouble
        "Something stored or received is not what was written; it was refused, and nothing of it was applied."
        "Look at the last error; if it comes back, a disk or memory is broken, and the group must be compared anew."
    /// An epoch is missing.
    Gap "gap" Trouble
        "Changes are missing between what is held and what arrives; none is applied."
        "Start the agent again with a comparison of the whole group."
    /// Another of the same name took over.
    Superseded "superseded" Notice
        "Another connection of the same group took over from this one."
        "If two agents are configured with the same group, stop one of them."
    /// Slower than the changes.
    Behind "behind" Notice
        "Changes arrive faster than this part passes them on; recovery points come late."
        "Nothing, if it passes; otherwise look at the bandwidth of the link and the speed of the target's disks."
    /// Cannot do what its configuration says.
    Misconfigured "misconfigured" Trouble
        "It cannot do what its configuration says."
        "Look at the last error and correct the configuration; `check-config` tests it."
    /// Failed over, and not decided yet.
    FailedOver "failed-over" Notice
        "Its volumes are what they were at a chosen point, and nothing is taken from the source until that is committed or cancelled."
        "Commit the failover, or cancel it."
    /// Failed over, and written.
    Promoted "promoted" Notice
        "Its volumes are written at the target, and nothing is taken from a source."
        "Nothing while the volumes are used; to go on with another source, end the exports and demote the group."
    /// Stopping.
    Stopping "stopping" Notice
        "It was told to stop, and is finishing what it has begun."
        "Nothing."
}

impl fmt::Display for StateCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

impl FromStr for StateCode {
    type Err = std::convert::Infallible;
    /// A code that this version does not know reads as [`StateCode::Unknown`].
    fn from_str(text: &str) -> Result<StateCode, Self::Err> {
        Ok(StateCode::ALL.iter().copied().find(|state| state.code() == text).unwrap_or_default())
    }
}

impl Serialize for StateCode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

impl<'de> Deserialize<'de> for StateCode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok(text.parse().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_stable_kebab_case_and_unique() {
        let codes: Vec<&str> = StateCode::ALL.iter().map(|state| state.code()).collect();
        let golden = "unknown starting idle waiting-for-agent initial-copy replicating catching-up resync capture-limited \
                      capture-failed source-failed unreachable unauthenticated unauthorised fenced version-mismatch \
                      cache-full target-full store-failed corrupt gap superseded behind misconfigured failed-over promoted stopping";
        assert_eq!(codes.join(" "), golden);
        for state in StateCode::ALL {
            let json = serde_json::to_string(state).unwrap();
            assert_eq!(serde_json::from_str::<StateCode>(&json).unwrap(), *state);
            assert!(state.code().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{state}");
            for sentence in [state.meaning(), state.what_to_do()] {
                assert!(
                    sentence.ends_with('.') && sentence.starts_with(|c: char| c.is_uppercase()),
                    "{sentence}"
                );
            }
        }
    }

    #[test]
    fn a_state_of_the_future_reads_as_unknown() {
        assert_eq!(serde_json::from_str::<StateCode>(r#""levitating""#).unwrap(), StateCode::Unknown);
    }
}
