//! What root of a protected machine says to its agent, over a local socket: one JSON object on a line, and one or more for
//! answer, of which the last ends the conversation.

use block::{ByteCount, Consistency, Epoch, GroupId, Label, PointNote, UnixNanos};
use serde::{Deserialize, Serialize};

use crate::ResyncWhen;

/// Where agents put their sockets, named for their groups, unless configured otherwise.
pub const AGENT_SOCKET_DIR: &str = "/run/seawall";
/// The longest request, in bytes. More is refused.
pub const AGENT_REQUEST_BYTES_MAX: usize = 4096;

/// What is asked of an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum AgentRequest {
    /// Take a point now. Answered by progress, then a point or a refusal.
    Point {
        /// What it should be: application, filesystem or crash.
        consistency: Consistency,
        /// What to call it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        label: Option<Label>,
        /// Answer `applied` at the end, when the target holds it.
        #[serde(default)]
        wait: bool,
    },
    /// Compare volumes with the replica, and send what differs. Answered by [`AgentAnswer::Comparing`] or a refusal.
    Resync {
        /// By name; all when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        volume: Option<String>,
        /// When.
        #[serde(default)]
        when: ResyncWhen,
    },
    /// Keep everybody from writing to the disks, send what they hold, and prove that the target holds the same. Answered by
    /// progress, then [`AgentAnswer::HandedOver`] or a refusal, after which the disks are as before.
    HandOver,
    /// Let everybody write to disks that were handed over. Answered by [`AgentAnswer::Released`] or a refusal.
    Release,
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum AgentAnswer {
    /// It is being done; others follow.
    Progress {
        /// What is being done, for people.
        doing: String,
    },
    /// The point was cut and will be sent. The last answer, unless the request said `wait`.
    Point(TakenPoint),
    /// The target holds the point. The last answer.
    Applied {
        /// Of the point.
        epoch: Epoch,
    },
    /// These volumes are compared, or will be; status tells how far it is. The last answer.
    Comparing {
        /// Their names.
        volumes: Vec<String>,
        /// Their size, all together.
        bytes: ByteCount,
        /// When that begins, if not as soon as the process server gives it its turn.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        begins: Option<UnixNanos>,
    },
    /// Nobody can write to the disks any more, and the target holds what they hold. The last answer.
    HandedOver {
        /// The recovery point that is what the disks are.
        epoch: Epoch,
        /// All of the disks, compared by keyed checksums with the target's and found the same.
        equal: ByteCount,
        /// What had been found different before that, and was sent.
        different: ByteCount,
    },
    /// The disks may be written to again. The last answer.
    Released,
    /// It is not done. The last answer.
    Refused {
        /// For programs.
        code: AgentRefusal,
        /// Why, and what to do.
        reason: String,
    },
}

/// Why an agent does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentRefusal {
    /// Another point is being taken.
    Busy,
    /// The request is none.
    BadRequest,
    /// Who asks is neither root nor the agent's own user.
    NotAllowed,
    /// There could be no point of any consistency.
    NoPoint,
    /// No volume of the group has that name.
    NoSuchVolume,
    /// What is scanned is compared all the time.
    NotFollowed,
    /// Somebody uses the disks.
    InUse,
    /// The agent is stopping.
    Stopping,
}

/// A point that was taken because somebody asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenPoint {
    /// Of this group.
    pub group: GroupId,
    /// Its number.
    pub epoch: Epoch,
    /// When it was cut.
    pub cut_time: UnixNanos,
    /// What was asked for.
    pub asked: Consistency,
    /// What it is.
    pub consistency: Consistency,
    /// Its label, how long what was frozen for it, and why it is less than was asked.
    #[serde(flatten)]
    pub note: PointNote,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What scripts send and read; a change here breaks them.
    #[test]
    fn the_conversation_has_a_stable_text() {
        let request = |json: &str, request: AgentRequest| {
            assert_eq!(serde_json::to_string(&request).unwrap(), json);
            assert_eq!(serde_json::from_str::<AgentRequest>(json).unwrap(), request);
        };
        request(
            r#"{"request":"point","consistency":"application","label":"nightly","wait":true}"#,
            AgentRequest::Point {
                consistency: Consistency::Application,
                label: Some("nightly".parse().unwrap()),
                wait: true,
            },
        );
        let short = r#"{"request":"point","consistency":"crash"}"#;
        let AgentRequest::Point { label: None, wait: false, .. } = serde_json::from_str(short).unwrap()
        else {
            panic!("{short}");
        };
        assert!(serde_json::from_str::<AgentRequest>(&short.replace("}", ",\"label\":\"\"}")).is_err());
        assert!(serde_json::from_str::<AgentRequest>(r#"{"request":"reboot"}"#).is_err());
        let AgentRequest::Resync { volume: None, when: ResyncWhen::Now } =
            serde_json::from_str(r#"{"request":"resync"}"#).unwrap()
        else {
            panic!("a resync is of all volumes, now");
        };
        request(
            r#"{"request":"resync","volume":"data","when":"window"}"#,
            AgentRequest::Resync { volume: Some("data".into()), when: ResyncWhen::Window },
        );
        request(r#"{"request":"hand-over"}"#, AgentRequest::HandOver);
        request(r#"{"request":"release"}"#, AgentRequest::Release);
        let handed =
            AgentAnswer::HandedOver { epoch: Epoch(7), equal: ByteCount(4096), different: ByteCount(0) };
        let json = r#"{"answer":"handed-over","epoch":7,"equal":4096,"different":0}"#;
        assert_eq!(serde_json::to_string(&handed).unwrap(), json);

        let answer = |json: &str, answer: AgentAnswer| {
            assert_eq!(serde_json::to_string(&answer).unwrap(), json);
            assert_eq!(serde_json::from_str::<AgentAnswer>(json).unwrap(), answer);
        };
        let group = GroupId([0x11; 16]);
        answer(
            &format!(
                r#"{{"answer":"point","group":"{group}","epoch":7,"cut_time":9,"asked":"application","consistency":"filesystem","frozen_us":1500,"filesystems":["/"],"reason":"no hooks"}}"#
            ),
            AgentAnswer::Point(TakenPoint {
                group,
                epoch: Epoch(7),
                cut_time: UnixNanos(9),
                asked: Consistency::Application,
                consistency: Consistency::Filesystem,
                note: PointNote {
                    label: None,
                    frozen: Some(Duration::from_micros(1500)),
                    filesystems: vec!["/".into()],
                    reason: Some("no hooks".into()),
                },
            }),
        );
        answer(
            r#"{"answer":"refused","code":"busy","reason":"later"}"#,
            AgentAnswer::Refused { code: AgentRefusal::Busy, reason: "later".into() },
        );
        answer(r#"{"answer":"applied","epoch":7}"#, AgentAnswer::Applied { epoch: Epoch(7) });
        answer(
            r#"{"answer":"comparing","volumes":["data"],"bytes":4096}"#,
            AgentAnswer::Comparing { volumes: vec!["data".into()], bytes: ByteCount(4096), begins: None },
        );
    }
}
