use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::PlanGoals;
use crate::fleet::{JobInfo, JobState, Name, ResourceId, StepState, UnixMillis};

super::super::names! {
    /// What a plan is run for.
    RunMode {
        /// The old site is lost.
        Failover "failover"
        /// The old site is there, and is left.
        Planned "planned"
        /// To try it out.
        Drill "drill"
        /// Nothing is done; it is looked whether everything could be.
        DryRun "dry-run"
    }
}

/// Run a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunPlan {
    /// What for.
    pub mode: RunMode,
    /// The plan's name, typed; a dry run needs none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 64)]
    pub confirm: String,
}

/// A person's answer to a step that waits for one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AnswerStep {
    /// Which step.
    pub step: Name,
    /// It is done, or it is refused and the step has failed.
    pub done: bool,
    /// What others should know of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schema(max_length = 1000)]
    pub note: String,
}

/// A run of a plan, while it goes on and after it: its report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanRun {
    /// Names it; the job that it is has the same id.
    pub id: ResourceId,
    /// Of which plan.
    pub plan: ResourceId,
    /// What people call that.
    pub name: Name,
    /// What it is run for.
    pub mode: RunMode,
    /// How it stands, without its steps.
    pub job: JobInfo,
    /// What must be reached.
    pub goals: PlanGoals,
    /// When it was asked for.
    pub began: UnixMillis,
    /// When it ended; left out while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<UnixMillis>,
    /// How long it has taken until now, or took, in milliseconds.
    pub took_ms: i64,
    /// Whether it was done within the goal's time; left out without a goal, in a dry run, and while neither is certain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rto_reached: Option<bool>,
    /// How old the recovery points were when a step began that takes or uses them; a planned failover loses nothing, and has none.
    pub points: Vec<StepPointAge>,
    /// Whether all of these were young enough for the goal; left out without a goal or points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_reached: Option<bool>,
    /// Its steps in order.
    pub steps: Vec<RunStep>,
}

impl PlanRun {
    /// Says whether goals were reached, from what else is known.
    pub fn judge(&mut self) {
        let is_dry = self.mode == RunMode::DryRun;
        self.rto_reached = match self.goals.rto_s.filter(|_| !is_dry) {
            None => None,
            Some(rto_s) if self.took_ms > i64::try_from(rto_s.saturating_mul(1000)).unwrap_or(i64::MAX) => {
                Some(false)
            }
            Some(_) => match self.job.state {
                JobState::Done => Some(true),
                JobState::Failed | JobState::Cancelled => Some(false),
                JobState::Waiting | JobState::Running => None,
            },
        };
        let young = |age: &StepPointAge, rpo_s: u64| {
            age.age_ms.is_some_and(|age| age <= i64::try_from(rpo_s.saturating_mul(1000)).unwrap_or(i64::MAX))
        };
        self.rpo_reached = match self.goals.rpo_s {
            Some(rpo_s) if !self.points.is_empty() => Some(self.points.iter().all(|age| young(age, rpo_s))),
            _ => None,
        };
    }
}

/// How old a group's recovery point was: the newest one, or the one that a failover asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StepPointAge {
    /// When this step began.
    pub step: Name,
    /// Which group.
    pub group: Name,
    /// In milliseconds; left out when there was no point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<i64>,
}

/// A step of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunStep {
    /// Its id in the plan.
    pub id: Name,
    /// What it does.
    pub title: String,
    /// failover, commit, point, wait, script, manual, dns or webhook.
    pub kind: String,
    /// How it stands.
    pub state: StepState,
    /// What was found.
    pub message: String,
    /// What to do about it; empty when nothing need be done.
    pub mend: String,
    /// How often it was begun; more than 1 after the run was resumed.
    pub attempts: u32,
    /// When it began, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<UnixMillis>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<UnixMillis>,
    /// What a person is asked to do; empty for other kinds.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// What a script printed: the last of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
    /// Jobs that it began.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<StepChild>,
    /// What a person answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<StepAnswer>,
}

/// A job that a step began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StepChild {
    /// Of which group.
    pub group: Name,
    /// Which job.
    pub job: ResourceId,
    /// How it stands.
    pub state: JobState,
    /// In a sentence.
    pub message: String,
}

/// What a person answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StepAnswer {
    /// Who.
    pub who: String,
    /// When.
    pub time: UnixMillis,
    /// It is done, or it is refused.
    pub done: bool,
    /// What others should know of it.
    pub note: String,
}
