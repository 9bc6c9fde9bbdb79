//! What is known of a run, beside the job that it is.

use std::collections::BTreeMap;

use control::fleet::plan::{OnFailure, Plan, PlanStep, RunMode, StepOutcome, StepPointAge};
use control::fleet::{ResourceId, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::fault::{Answer, internal};

/// A run: the job's body. It goes on with the plan as it was when it began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) plan_id: ResourceId,
    pub(super) plan: Plan,
    pub(super) mode: RunMode,
    /// One for each step, in order.
    pub(super) records: Vec<Record>,
    /// How old points were when steps began.
    pub(super) points: Vec<StepPointAge>,
}

/// What is known of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// How often it was begun.
    pub(super) attempts: u32,
    pub(super) began: Option<UnixMillis>,
    pub(super) ended: Option<UnixMillis>,
    /// How it ended; nothing while it has not.
    pub(super) outcome: Option<StepOutcome>,
    /// Jobs that it began, by their groups' names.
    pub(super) children: BTreeMap<String, ResourceId>,
    /// What a machine was asked to do.
    pub(super) task: Option<ResourceId>,
}

impl Run {
    pub(super) fn new(plan_id: ResourceId, plan: Plan, mode: RunMode) -> Run {
        let records = vec![Record::default(); plan.steps.len()];
        Run { plan_id, plan, mode, records, points: Vec::new() }
    }

    pub(super) fn of_text(text: &str) -> Answer<Run> {
        serde_json::from_str(text).map_err(|error| internal("read a run of a plan", error))
    }

    pub(super) fn text(&self) -> Answer<String> {
        serde_json::to_string(self).map_err(|error| internal("keep a run of a plan", error))
    }

    /// The step whose turn it is.
    pub(super) fn current(&self) -> Option<usize> {
        self.records.iter().position(|record| record.outcome.is_none())
    }

    /// Why a step is not done in this run.
    pub(super) fn not_needed(&self, step: &PlanStep) -> Option<String> {
        if !step.when.fits(self.mode) {
            return Some("Not in a run of this mode.".to_owned());
        }
        // A dry run looks at all of them: which of them will be reached nobody knows.
        let condition = step.only_if.as_ref().filter(|_| self.mode != RunMode::DryRun)?;
        let place = self.plan.steps.iter().position(|earlier| earlier.id == condition.step)?;
        let outcome = self.records.get(place)?.outcome;
        (outcome != Some(condition.outcome)).then(|| {
            let wanted = match condition.outcome {
                StepOutcome::Passed => "has not passed",
                StepOutcome::Failed => "has not failed",
                StepOutcome::Skipped => "was not skipped",
            };
            format!("The step {} {wanted}.", condition.step)
        })
    }

    /// Whether the run ends when this step has failed.
    pub(super) fn stops_at(&self, step: &PlanStep) -> bool {
        self.mode != RunMode::DryRun && step.on_failure == OnFailure::Stop
    }

    /// How many steps have ended so.
    pub(super) fn count(&self, outcome: StepOutcome) -> usize {
        self.records.iter().filter(|record| record.outcome == Some(outcome)).count()
    }

    pub(super) fn percent(&self) -> u8 {
        let ended = self.records.iter().filter(|record| record.outcome.is_some()).count();
        u8::try_from(ended * 100 / self.records.len().max(1)).unwrap_or(100)
    }

    /// Has the run go on at the step that stopped it.
    pub(super) fn reopen(&mut self) {
        let stopped = (0..self.records.len()).find(|place| {
            self.records[*place].outcome == Some(StepOutcome::Failed)
                && self.stops_at(&self.plan.steps[*place])
        });
        if let Some(place) = stopped.or_else(|| self.current()) {
            let record = &mut self.records[place];
            let (attempts, children) = (record.attempts, std::mem::take(&mut record.children));
            *record = Record { attempts, children, ..Record::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(mode: RunMode) -> Run {
        let text = "name: shop
steps:
- {id: a, wait: {seconds: 1}, on_failure: continue}
- {id: b, wait: {seconds: 1}, only_if: {step: a, outcome: failed}}
- {id: c, wait: {seconds: 1}, when: drill}
- {id: d, wait: {seconds: 1}}
- {id: e, wait: {seconds: 1}}
";
        Run::new(ResourceId::from_bytes([1; 16]), Plan::read(text).unwrap(), mode)
    }

    #[test]
    fn conditions_are_of_modes_and_outcomes() {
        let needed = |run: &Run| {
            let steps = run.plan.steps.iter();
            steps
                .filter(|step| run.not_needed(step).is_none())
                .map(|step| step.id.to_string())
                .collect::<String>()
        };
        let mut failover = run(RunMode::Failover);
        failover.records[0].outcome = Some(StepOutcome::Passed);
        assert_eq!(needed(&failover), "ade");
        failover.records[0].outcome = Some(StepOutcome::Failed);
        assert_eq!(needed(&failover), "abde");
        let mut drill = run(RunMode::Drill);
        drill.records[0].outcome = Some(StepOutcome::Passed);
        assert_eq!(needed(&drill), "acde");
        assert_eq!(needed(&run(RunMode::DryRun)), "abcde");
    }

    #[test]
    fn it_goes_on_at_the_step_that_stopped_it() {
        let mut run = run(RunMode::Planned);
        use StepOutcome::*;
        for (place, outcome) in [Failed, Passed, Skipped, Failed].into_iter().enumerate() {
            run.records[place] = Record { outcome: Some(outcome), attempts: 1, ..Record::default() };
        }
        run.records[3].began = Some(UnixMillis(7));
        assert_eq!(run.current(), Some(4));
        run.reopen();
        assert_eq!(run.current(), Some(3));
        assert_eq!((run.records[3].attempts, run.records[3].began), (1, None));
        assert_eq!(run.records[0].outcome, Some(Failed), "a failure that was passed over stays");
        assert_eq!(Run::of_text(&run.text().unwrap()).unwrap(), run);
    }
}
