//! `seawall plan`: what is done to recover, in which order, and doing it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use control::fleet::plan::{AnswerStep, NewPlan, Plan, PlanInfo, PlanRun, RunMode, RunPlan};
use control::fleet::{JobInfo, Name, ResourceId, StepState};
use hyper::Method;
use serde_json::json;

use super::change::{Certain, Common};
use super::{Fleet, ago, job, moment, not_there, say_json};
use crate::exit::{Exit, stop};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall plan check shop.yaml
  seawall plan apply shop.yaml
  seawall plan run shop --mode dry-run --watch
  seawall plan run shop --mode failover --yes --watch
  seawall plan confirm shop --note done
  seawall plan report shop --html report.html")]
pub(crate) struct PlanOptions {
    #[command(subcommand)]
    command: PlanCommand,
}

#[derive(Debug, Subcommand)]
enum PlanCommand {
    /// All of them
    #[command(after_help = "Example:\n  seawall plan list")]
    List(Common),
    /// What one says, and its runs
    #[command(
        after_help = "Examples:\n  seawall plan show shop\n  seawall plan show shop --json | jq -r .plan.text"
    )]
    Show {
        /// Which, by name or id
        plan: String,
        #[command(flatten)]
        common: Common,
    },
    /// Keep a plan of a file, in place of the one of its name if there is one
    #[command(
        after_help = "Examples:\n  seawall plan apply shop.yaml\n  seawall plan show shop --json | jq -r .plan.text"
    )]
    Apply {
        /// YAML or JSON; - is standard input
        file: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Delete one; reports of its runs stay
    #[command(after_help = "Example:\n  seawall plan remove shop --yes")]
    Remove {
        /// Which, by name or id
        plan: String,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        common: Common,
    },
    /// Look whether a file is a plan that makes sense; asks nobody
    #[command(after_help = "Example:\n  seawall plan check shop.yaml

Whether the fleet has what it names is looked at by `seawall plan run NAME --mode dry-run`.")]
    Check {
        /// YAML or JSON; - is standard input
        file: PathBuf,
        /// One JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Run one, or look whether it could be run
    #[command(after_help = "Examples:
  seawall plan run shop --mode dry-run --watch
  seawall plan run shop --mode drill --yes --watch

Exit status with --watch: 0 when the run is done, 3 when it failed or was cancelled.")]
    Run {
        /// Which, by name or id
        plan: String,
        /// What for
        #[arg(long, value_enum)]
        mode: Mode,
        /// Show how it goes on until it has ended
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        common: Common,
    },
    /// Confirm that the step is done that waits for a person, or refuse it
    #[command(after_help = "Examples:
  seawall plan confirm shop
  seawall plan confirm shop --step switch-over --refuse --note unreachable")]
    Confirm {
        /// Which plan, by name or id; its newest run is meant
        plan: String,
        /// Which step; the one that waits when left out
        #[arg(long)]
        step: Option<Name>,
        /// It cannot be done: the step has failed
        #[arg(long)]
        refuse: bool,
        /// What others should know of it
        #[arg(long, default_value = "")]
        note: String,
        #[command(flatten)]
        common: Common,
    },
    /// Have the newest run, which failed, go on at the step that failed
    #[command(after_help = "Example:\n  seawall plan resume shop --watch")]
    Resume {
        /// Which plan, by name or id
        plan: String,
        /// Show how it goes on until it has ended
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        common: Common,
    },
    /// How a run went: times, goals, what was found and printed
    #[command(after_help = "Examples:
  seawall plan report shop
  seawall plan report shop --html report.html
  seawall plan report shop --run 0123456789abcdef0123456789abcdef --json")]
    Report {
        /// Which plan, by name or id
        plan: String,
        /// Which run; the newest when left out
        #[arg(long, value_name = "ID")]
        run: Option<ResourceId>,
        /// Write it as a page to this file
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
}

/// What a plan is run for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// The old site is lost
    Failover,
    /// The old site is there, and is left
    Planned,
    /// To try it out
    Drill,
    /// Do nothing, and look whether everything could be done
    DryRun,
}

impl From<Mode> for RunMode {
    fn from(mode: Mode) -> RunMode {
        match mode {
            Mode::Failover => RunMode::Failover,
            Mode::Planned => RunMode::Planned,
            Mode::Drill => RunMode::Drill,
            Mode::DryRun => RunMode::DryRun,
        }
    }
}

impl PlanOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            PlanCommand::Check { json, .. } => *json,
            PlanCommand::List(common)
            | PlanCommand::Show { common, .. }
            | PlanCommand::Apply { common, .. }
            | PlanCommand::Remove { common, .. }
            | PlanCommand::Run { common, .. }
            | PlanCommand::Confirm { common, .. }
            | PlanCommand::Resume { common, .. }
            | PlanCommand::Report { common, .. } => common.json,
        }
    }
}

fn read(file: &Path) -> anyhow::Result<(String, Plan)> {
    let text = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    let text = text.with_context(|| format!("read the plan in {}", file.display()))?;
    let plan = Plan::read(&text).with_context(|| format!("read the plan in {}", file.display()))?;
    Ok((text, plan))
}

/// The plan of this name or id.
async fn find(fleet: &Fleet, named: &str) -> anyhow::Result<PlanInfo> {
    let plans: Vec<PlanInfo> = fleet.get("/plans").await?;
    let found = plans.iter().find(|plan| plan.name.as_str() == named || plan.id.as_str() == named);
    let found = found.ok_or_else(|| not_there("plan", named, plans.iter().map(|plan| plan.name.as_str())))?;
    fleet.get(&format!("/plans/{}", found.id)).await
}

async fn newest_run(fleet: &Fleet, plan: &PlanInfo) -> anyhow::Result<PlanRun> {
    let Some(job) = &plan.last_run else {
        return Err(stop(Exit::NotFound, format!("find a run of the plan {}: it was never run", plan.name)));
    };
    fleet.get(&format!("/runs/{}", job.id)).await
}

pub(crate) async fn run(options: &PlanOptions) -> anyhow::Result<Exit> {
    match &options.command {
        PlanCommand::List(common) => {
            let plans: Vec<PlanInfo> = Fleet::open(&common.place)?.get("/plans").await?;
            match common.json {
                true => say_json(&json!({ "plans": plans }))?,
                false => text::say(&render(&plans))?,
            }
        }
        PlanCommand::Show { plan, common } => {
            let fleet = Fleet::open(&common.place)?;
            let plan = find(&fleet, plan).await?;
            let runs: Vec<JobInfo> = fleet.get(&format!("/plans/{}/runs", plan.id)).await?;
            match common.json {
                true => say_json(&json!({ "plan": plan, "runs": runs }))?,
                false => text::say(&render_one(&plan, &runs))?,
            }
        }
        PlanCommand::Apply { file, common } => {
            let (text, plan) = read(file)?;
            let fleet = Fleet::open(&common.place)?;
            let plans: Vec<PlanInfo> = fleet.get("/plans").await?;
            let there = plans.iter().find(|there| there.name == plan.name);
            let (method, path) = match there {
                Some(there) => (Method::PUT, format!("/plans/{}", there.id)),
                None => (Method::POST, "/plans".to_owned()),
            };
            let acted = fleet.act(method, &path, &NewPlan { text }).await?;
            return acted
                .say(common, &format!("The plan {} is kept, with {} steps.", plan.name, plan.steps.len()));
        }
        PlanCommand::Remove { plan, certain, common } => {
            let fleet = Fleet::open(&common.place)?;
            let plan = find(&fleet, plan).await?;
            certain.ask("remove plan", plan.name.as_str(), "The plan will be gone.")?;
            let acted = fleet.destroy(&format!("/plans/{}", plan.id), plan.name.as_str()).await?;
            return acted.say(common, &format!("The plan {} is gone.", plan.name));
        }
        PlanCommand::Check { file, json } => {
            let (_, plan) = read(file)?;
            match json {
                true => say_json(&json!({ "name": plan.name, "steps": plan.steps.len() }))?,
                false => text::say(&format!(
                    "{} makes sense: the plan {} with {} steps. `seawall plan run {} --mode dry-run` looks whether the fleet has what it names.\n",
                    file.display(),
                    plan.name,
                    plan.steps.len(),
                    plan.name
                ))?,
            }
        }
        PlanCommand::Run { plan, mode, watch, certain, common } => {
            let fleet = Fleet::open(&common.place)?;
            let plan = find(&fleet, plan).await?;
            let mode = RunMode::from(*mode);
            if mode != RunMode::DryRun {
                certain.ask(
                    "run plan",
                    plan.name.as_str(),
                    &format!("It will be run ({}).", mode.as_str()),
                )?;
            }
            let asked = RunPlan { mode, confirm: plan.name.to_string() };
            let begun: JobInfo = fleet.post(&format!("/plans/{}/run", plan.id), &asked).await?;
            return job::follow(&fleet, begun, *watch, common.json).await;
        }
        PlanCommand::Confirm { plan, step, refuse, note, common } => {
            let fleet = Fleet::open(&common.place)?;
            let run = newest_run(&fleet, &find(&fleet, plan).await?).await?;
            let waits = |step: &&control::fleet::plan::RunStep| {
                step.kind == "manual" && step.state == StepState::Running
            };
            let step = match (step, run.steps.iter().find(waits)) {
                (Some(step), _) => step.clone(),
                (None, Some(step)) => step.id.clone(),
                (None, None) => bail!("confirm a step of the plan {}: none waits for a person", run.name),
            };
            let asked = AnswerStep { step: step.clone(), done: !refuse, note: note.clone() };
            let acted = fleet.act(Method::POST, &format!("/runs/{}/answer", run.id), &asked).await?;
            let what = if *refuse { "refused" } else { "confirmed" };
            return acted.say(common, &format!("The step {step} is {what}."));
        }
        PlanCommand::Resume { plan, watch, common } => {
            let fleet = Fleet::open(&common.place)?;
            let run = newest_run(&fleet, &find(&fleet, plan).await?).await?;
            let resumed: JobInfo = fleet.post(&format!("/runs/{}/resume", run.id), &json!({})).await?;
            return job::follow(&fleet, resumed, *watch, common.json).await;
        }
        PlanCommand::Report { plan, run, html, common } => {
            let fleet = Fleet::open(&common.place)?;
            let run: PlanRun = match run {
                Some(run) => fleet.get(&format!("/runs/{run}")).await?,
                None => newest_run(&fleet, &find(&fleet, plan).await?).await?,
            };
            if let Some(file) = html {
                std::fs::write(file, seawall_config_server::report(&run))
                    .with_context(|| format!("write the report to {}", file.display()))?;
            }
            match (common.json, html) {
                (true, _) => say_json(&run)?,
                (false, Some(file)) => text::say(&format!("The report is in {}.\n", file.display()))?,
                (false, None) => text::say(&render_run(&run))?,
            }
        }
    }
    Ok(Exit::Done)
}

fn render(plans: &[PlanInfo]) -> String {
    if plans.is_empty() {
        return "There is no plan yet; `seawall plan apply FILE` keeps one.\n".to_owned();
    }
    let mut table = text::table(&["Plan", "Steps", "Goals", "Last run", "About"], &[1]);
    for plan in plans {
        let goal = |name: &str, seconds: Option<u64>| seconds.map(|seconds| format!("{name} {seconds} s"));
        let goals = [goal("RPO", plan.goals.rpo_s), goal("RTO", plan.goals.rto_s)];
        let last = plan.last_run.as_ref();
        table.add_row([
            plan.name.to_string(),
            plan.steps.to_string(),
            goals.into_iter().flatten().collect::<Vec<_>>().join(", "),
            last.map_or_else(
                || "never".to_owned(),
                |job| format!("{}, {}", job.state.as_str(), ago(job.created)),
            ),
            plan.about.clone(),
        ]);
    }
    format!("{table}\n")
}

fn render_one(plan: &PlanInfo, runs: &[JobInfo]) -> String {
    let mut table = text::table(&["Run", "State", "Begun", "By", "Message"], &[]);
    for run in runs {
        table.add_row([
            run.id.to_string(),
            run.state.as_str().to_owned(),
            ago(run.created),
            run.created_by.clone(),
            run.message.clone(),
        ]);
    }
    let runs = if runs.is_empty() { "It was never run.".to_owned() } else { table.to_string() };
    format!("{}\n{runs}\n", plan.text.trim_end())
}

fn seconds(ms: i64) -> String {
    format!("{}.{} s", ms.max(0) / 1000, ms.max(0) % 1000 / 100)
}

fn reached(goal: Option<bool>) -> &'static str {
    match goal {
        Some(true) => ", goal reached",
        Some(false) => ", goal not reached",
        None => "",
    }
}

fn render_run(run: &PlanRun) -> String {
    let mut table = text::table(&["Step", "State", "Took", "Found, and what to do"], &[2]);
    for step in &run.steps {
        let took = step.began.zip(step.ended).map(|(began, ended)| seconds(ended.since(began)));
        let mut found: Vec<String> =
            [&step.message, &step.mend].into_iter().filter(|text| !text.is_empty()).cloned().collect();
        found.extend(step.children.iter().map(|child| format!("{}: {}", child.group, child.state.as_str())));
        if !step.output.is_empty() {
            found.push(step.output.trim_end().to_owned());
        }
        table.add_row([
            format!("{} ({})", step.title, step.kind),
            step.state.as_str().to_owned(),
            took.unwrap_or_default(),
            found.join("\n"),
        ]);
    }
    let oldest = run.points.iter().filter_map(|age| age.age_ms).max();
    let oldest = oldest.map_or_else(String::new, |age| {
        format!("Data: the oldest newest point was {} old{}\n", seconds(age), reached(run.rpo_reached))
    });
    format!(
        "Run {} of {} ({}), asked for by {}, {}\n{table}\nTime: {}{}\n{oldest}{}: {}\n",
        run.id,
        run.name,
        run.mode.as_str(),
        run.job.created_by,
        moment(run.began),
        seconds(run.took_ms),
        reached(run.rto_reached),
        run.job.state.as_str(),
        run.job.message
    )
}
