//! Recovery plans: what is done, in which order, to bring machines up at the other site. People write them as YAML or JSON, read
//! strictly; docs/plans.md has an example.

mod check;
mod read;
mod run;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Name, ResourceId, UnixMillis};

pub use check::PlanError;
pub use run::{AnswerStep, PlanRun, RunMode, RunPlan, RunStep, StepAnswer, StepChild, StepPointAge};

/// The longest text of a plan, in bytes. A longer one is refused.
pub const PLAN_TEXT_BYTES_MAX: usize = 64 * 1024;
/// Steps of a plan. More are refused.
pub const PLAN_STEPS_MAX: usize = 64;
/// Groups of one step. More are refused.
pub const PLAN_GROUPS_MAX: usize = 64;
/// Records of one step. More are refused.
pub const PLAN_RECORDS_MAX: usize = 64;
/// Values of one record. More are refused.
pub const PLAN_VALUES_MAX: usize = 16;
/// Arguments of a script. More are refused.
pub const SCRIPT_ARGUMENTS_MAX: usize = 32;
/// The longest argument of a script, in bytes. A longer one is refused.
pub const SCRIPT_ARGUMENT_BYTES_MAX: usize = 1000;
/// Bytes of a script's output that are kept: the last ones.
pub const SCRIPT_OUTPUT_BYTES_MAX: usize = 16 * 1024;
/// Headers of a webhook. More are refused.
pub const WEBHOOK_HEADERS_MAX: usize = 16;
/// The longest body of a webhook, in bytes. A longer one is refused.
pub const WEBHOOK_BODY_BYTES_MAX: usize = 16 * 1024;
/// The longest time-out of a step, in seconds: a week, for a person may have to be waited for.
pub const STEP_TIMEOUT_S_MAX: u64 = 7 * 86_400;
/// The longest wait, in seconds.
pub const WAIT_S_MAX: u64 = 86_400;
/// The longest title of a step, in characters.
pub const TITLE_CHARS_MAX: usize = 200;
/// The longest text for a person, in characters.
pub const TEXT_CHARS_MAX: usize = 4000;
/// The longest note of a person, in characters.
pub const NOTE_CHARS_MAX: usize = 1000;

/// What is done to recover, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// What people call it.
    pub name: Name,
    /// What it is for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub about: String,
    /// What must be reached.
    #[serde(default)]
    pub goals: PlanGoals,
    /// What is done, one after the other.
    pub steps: Vec<PlanStep>,
}

/// What a run of a plan must reach; its report compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanGoals {
    /// How old what is recovered may be, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_s: Option<u64>,
    /// How long all steps may take together, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rto_s: Option<u64>,
}

/// One step: exactly one of the things that can be done, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanStep {
    /// By what other steps, people and reports name it; once in a plan.
    pub id: Name,
    /// What it does, for people; its id when left out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub title: String,
    /// After so long it has failed.
    #[serde(default = "timeout_s")]
    pub timeout_s: u64,
    /// What comes after a failure.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// In which runs it is done; in others it is skipped.
    #[serde(default)]
    pub when: PlanWhen,
    /// Done only after this outcome of an earlier step; skipped otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only_if: Option<PlanCondition>,

    /// Fail groups over, all at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<PlanFailover>,
    /// Keep failovers of groups for good, all at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<PlanCommit>,
    /// Take a recovery point of groups, all at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<PlanPoint>,
    /// Start a machine on a point of each of these groups, and look whether it comes up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prove: Option<PlanProve>,
    /// Let time pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<PlanWait>,
    /// Run a script on a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub script: Option<PlanScript>,
    /// Have a person do something, and say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manual: Option<PlanManual>,
    /// Change records of a DNS zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<PlanDns>,
    /// Tell something else by HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<PlanWebhook>,
}

fn timeout_s() -> u64 {
    600
}

/// What a step does.
#[derive(Clone, Copy, Debug)]
pub enum PlanAction<'a> {
    /// Fail groups over.
    Failover(&'a PlanFailover),
    /// Keep failovers for good.
    Commit(&'a PlanCommit),
    /// Take a recovery point of groups.
    Point(&'a PlanPoint),
    /// Prove that groups' machines come up.
    Prove(&'a PlanProve),
    /// Let time pass.
    Wait(&'a PlanWait),
    /// Run a script.
    Script(&'a PlanScript),
    /// Ask a person.
    Manual(&'a PlanManual),
    /// Change DNS.
    Dns(&'a PlanDns),
    /// Tell by HTTP.
    Webhook(&'a PlanWebhook),
}

impl PlanAction<'_> {
    /// Its name in a plan.
    pub fn kind(&self) -> &'static str {
        match self {
            PlanAction::Failover(_) => "failover",
            PlanAction::Commit(_) => "commit",
            PlanAction::Point(_) => "point",
            PlanAction::Prove(_) => "prove",
            PlanAction::Wait(_) => "wait",
            PlanAction::Script(_) => "script",
            PlanAction::Manual(_) => "manual",
            PlanAction::Dns(_) => "dns",
            PlanAction::Webhook(_) => "webhook",
        }
    }

    /// Groups that it is about.
    pub fn groups(&self) -> &[Name] {
        match self {
            PlanAction::Failover(failover) => &failover.groups,
            PlanAction::Commit(commit) => &commit.groups,
            PlanAction::Point(point) => &point.groups,
            PlanAction::Prove(prove) => &prove.groups,
            _ => &[],
        }
    }
}

impl PlanStep {
    /// Everything that it says to do; a step that was checked says one.
    fn actions(&self) -> impl Iterator<Item = PlanAction<'_>> {
        let Self { failover, commit, point, prove, wait, script, manual, dns, webhook, .. } = self;
        [
            failover.as_ref().map(PlanAction::Failover),
            commit.as_ref().map(PlanAction::Commit),
            point.as_ref().map(PlanAction::Point),
            prove.as_ref().map(PlanAction::Prove),
            wait.as_ref().map(PlanAction::Wait),
            script.as_ref().map(PlanAction::Script),
            manual.as_ref().map(PlanAction::Manual),
            dns.as_ref().map(PlanAction::Dns),
            webhook.as_ref().map(PlanAction::Webhook),
        ]
        .into_iter()
        .flatten()
    }

    /// What it does; nothing only before it was checked.
    pub fn action(&self) -> Option<PlanAction<'_>> {
        self.actions().next()
    }

    /// What it is called by people.
    pub fn shown(&self) -> &str {
        if self.title.is_empty() { self.id.as_str() } else { &self.title }
    }
}

/// What comes after a failed step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// The run fails; it can be resumed there.
    #[default]
    Stop,
    /// The next step.
    Continue,
}

/// In which runs a step is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanWhen {
    /// In all.
    #[default]
    Always,
    /// In planned ones: the old site is there.
    Planned,
    /// In unplanned ones: the old site is lost.
    Unplanned,
    /// In drills.
    Drill,
}

impl PlanWhen {
    /// Whether a step is done in a run of this mode. A dry run looks at all of them.
    pub const fn fits(self, mode: RunMode) -> bool {
        match (self, mode) {
            (PlanWhen::Always, _) | (_, RunMode::DryRun) => true,
            (PlanWhen::Planned, RunMode::Planned)
            | (PlanWhen::Unplanned, RunMode::Failover)
            | (PlanWhen::Drill, RunMode::Drill) => true,
            (PlanWhen::Planned | PlanWhen::Unplanned | PlanWhen::Drill, _) => false,
        }
    }
}

/// An outcome of an earlier step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanCondition {
    /// Which step.
    pub step: Name,
    /// How it must have ended.
    pub outcome: StepOutcome,
}

/// How a step has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StepOutcome {
    /// As it should.
    Passed,
    /// It could not be done.
    Failed,
    /// It was not needed.
    Skipped,
}

/// Fail groups over, all at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFailover {
    /// Which, by their machines' names.
    pub groups: Vec<Name>,
    /// To which point. In a planned run each machine hands over its disks, and the point is the one that this makes.
    #[serde(default)]
    pub point: FailoverPoint,
    /// Then take writes to the volumes at the target.
    #[serde(default)]
    pub promote: bool,
}

/// To which point groups fail over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverPoint {
    /// The newest one.
    #[default]
    Newest,
    /// The newest one that is application-consistent.
    Application,
}

/// Keep failovers of groups for good, all at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanCommit {
    /// Which, by their machines' names.
    pub groups: Vec<Name>,
}

/// Take a recovery point of groups, all at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanPoint {
    /// Whose, by their machines' names.
    pub groups: Vec<Name>,
    /// application, filesystem or crash.
    #[serde(default = "application")]
    pub consistency: block::Consistency,
}

/// Start a machine on a point of each of these groups, on overlays and without a network, and look whether it comes up. What it must say is as
/// the groups' policies say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanProve {
    /// Whose, by their machines' names.
    pub groups: Vec<Name>,
    /// Which point.
    #[serde(default)]
    pub point: FailoverPoint,
}

fn application() -> block::Consistency {
    block::Consistency::Application
}

/// Let time pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanWait {
    /// How much.
    pub seconds: u64,
}

/// Run a script on a machine of the fleet, if its agent's own configuration lets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanScript {
    /// On which.
    pub machine: Name,
    /// A file's name in the agent's directory of scripts.
    pub command: Name,
    /// What it is given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
}

/// Have a person do something, and say so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanManual {
    /// What.
    pub text: String,
}

/// Change records of a DNS zone, by RFC 2136.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanDns {
    /// The zone's primary server, `host` or `host:port`.
    pub server: String,
    /// Which zone.
    pub zone: String,
    /// The name of the TSIG key, a file of the config server; nothing is signed when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Name>,
    /// What is there afterwards, in place of what was there of the same name and type.
    pub records: Vec<PlanRecord>,
}

/// Records of one name and type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRecord {
    /// Within the zone, as in `www`; `@` is the zone itself.
    pub name: String,
    /// Of which type.
    #[serde(rename = "type")]
    pub kind: PlanRecordType,
    /// How long others may remember it, in seconds.
    #[serde(default = "ttl_s")]
    pub ttl_s: u32,
    /// Addresses, names or texts. With none, what is there goes.
    pub values: Vec<String>,
}

fn ttl_s() -> u32 {
    60
}

/// A type of DNS record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PlanRecordType {
    /// An IPv4 address.
    A,
    /// An IPv6 address.
    Aaaa,
    /// Another name for the same.
    Cname,
    /// A text.
    Txt,
}

/// Tell something else by HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanWebhook {
    /// http:// or https://; for https the machine's own list of authorities counts.
    pub url: String,
    /// How.
    #[serde(default)]
    pub method: PlanMethod,
    /// Besides those that HTTP needs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// What is sent. Empty for GET and DELETE.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub body: String,
}

/// How HTTP is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PlanMethod {
    /// POST.
    #[default]
    Post,
    /// PUT.
    Put,
    /// PATCH.
    Patch,
    /// GET.
    Get,
    /// DELETE.
    Delete,
}

impl PlanMethod {
    /// As HTTP has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            PlanMethod::Post => "POST",
            PlanMethod::Put => "PUT",
            PlanMethod::Patch => "PATCH",
            PlanMethod::Get => "GET",
            PlanMethod::Delete => "DELETE",
        }
    }

    /// Whether a body goes with it.
    pub const fn has_body(self) -> bool {
        matches!(self, PlanMethod::Post | PlanMethod::Put | PlanMethod::Patch)
    }
}

/// A plan to keep: its text, with whatever remarks are in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPlan {
    /// YAML, or JSON, at most 64 KiB.
    #[schema(min_length = 1, max_length = 65536)]
    pub text: String,
}

/// A plan that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanInfo {
    /// Names it for ever.
    pub id: ResourceId,
    /// What people call it.
    pub name: Name,
    /// What it is for.
    pub about: String,
    /// What must be reached.
    pub goals: PlanGoals,
    /// How many steps it has.
    pub steps: i64,
    /// It, as it was written; left out in lists.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// When it last changed.
    pub changed: UnixMillis,
    /// Who changed it.
    pub changed_by: String,
    /// Its newest run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_run: Option<super::JobInfo>,
}
