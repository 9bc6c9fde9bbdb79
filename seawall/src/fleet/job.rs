//! `seawall job`: what the config server does that takes long.

use std::time::Duration;

use clap::{Args, Subcommand};
use control::fleet::{JobInfo, JobState, Page, ResourceId, StepInfo, StepState};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{Fleet, ProfilePlace, ago, say_json};
use crate::exit::Exit;
use crate::text;

/// A job that is watched is asked after so often.
const WATCH_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall job list
  seawall job show 0123456789abcdef0123456789abcdef --watch
  seawall job cancel 0123456789abcdef0123456789abcdef")]
pub(crate) struct JobOptions {
    #[command(subcommand)]
    command: JobCommand,
}

#[derive(Debug, Subcommand)]
enum JobCommand {
    /// The newest ones
    #[command(after_help = "Examples:
  seawall job list
  seawall job list --last 100 --json | jq -r '.jobs[] | select(.state == \"failed\").message'")]
    List {
        /// How many
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
        last: u16,
        #[command(flatten)]
        common: Common,
    },
    /// One with its steps: what was found, and what to do about it
    #[command(after_help = "Examples:
  seawall job show 0123456789abcdef0123456789abcdef
  seawall job show 0123456789abcdef0123456789abcdef --watch

Exit status with --watch: 0 when the job is done, 3 when it failed or was cancelled.")]
    Show {
        /// Which, as `seawall job list` shows it
        id: ResourceId,
        /// Show how it goes on until it has ended
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        common: Common,
    },
    /// End one; what it has done stays
    #[command(after_help = "Example:\n  seawall job cancel 0123456789abcdef0123456789abcdef")]
    Cancel {
        /// Which, as `seawall job list` shows it
        id: ResourceId,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    place: ProfilePlace,
    /// JSON instead of text: one object, with --watch one for each change, one a line
    #[arg(long)]
    json: bool,
}

impl JobOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            JobCommand::List { common, .. }
            | JobCommand::Show { common, .. }
            | JobCommand::Cancel { common, .. } => common.json,
        }
    }
}

pub(crate) async fn run(options: &JobOptions) -> anyhow::Result<Exit> {
    match &options.command {
        JobCommand::List { last, common } => {
            let jobs: Page<JobInfo> = Fleet::open(&common.place)?.get(&format!("/jobs?limit={last}")).await?;
            match common.json {
                true => say_json(&json!({ "jobs": jobs.items }))?,
                false => text::say(&render(&jobs.items))?,
            }
        }
        JobCommand::Show { id, watch, common } => {
            let fleet = Fleet::open(&common.place)?;
            let job: JobInfo = fleet.get(&format!("/jobs/{id}")).await?;
            if *watch {
                return follow(&fleet, job, true, common.json).await;
            }
            match common.json {
                true => say_json(&job)?,
                false => text::say(&render_one(&job))?,
            }
        }
        JobCommand::Cancel { id, common } => {
            let () = Fleet::open(&common.place)?.post(&format!("/jobs/{id}/cancel"), &json!({})).await?;
            match common.json {
                true => say_json(&json!({ "cancelled": id }))?,
                false => text::say(&format!("Job {id} is cancelled.\n"))?,
            }
        }
    }
    Ok(Exit::Done)
}

/// Says what job has begun; with `watch`, how it goes on until it ends, and by the exit status how it ended.
pub(crate) async fn follow(fleet: &Fleet, begun: JobInfo, watch: bool, json: bool) -> anyhow::Result<Exit> {
    if !watch {
        match json {
            true => say_json(&begun)?,
            false => text::say(&format!(
                "Job {} has begun: {} {}. `seawall job show {} --watch` shows how it goes on.\n",
                begun.id,
                begun.kind.as_str(),
                begun.subject,
                begun.id
            ))?,
        }
        return Ok(Exit::Done);
    }
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(100) };
    bar.set_style(ProgressStyle::with_template("{bar:30} {percent:>3} % {elapsed} [{eta} left] {msg}")?);
    let ended = watched(fleet, begun, &bar, json).await;
    bar.finish_and_clear();
    let ended = ended?;
    if !json {
        text::say(&render_one(&ended))?;
    }
    Ok(match ended.state {
        JobState::Done => Exit::Done,
        _ => Exit::Short,
    })
}

async fn watched(fleet: &Fleet, begun: JobInfo, bar: &ProgressBar, json: bool) -> anyhow::Result<JobInfo> {
    let path = format!("/jobs/{}", begun.id);
    let mut told: Option<JobInfo> = None;
    let mut job = begun;
    loop {
        if told.as_ref() != Some(&job) {
            match json {
                true => say_json(&job)?,
                false => show_change(told.as_ref(), &job, bar),
            }
        }
        if job.state.ended() {
            return Ok(job);
        }
        told = Some(job);
        tokio::time::sleep(WATCH_EVERY).await;
        job = fleet.get_patiently(&path, |error| bar.set_message(format!("{error}; trying again"))).await?;
    }
}

/// Steps that have ended go above the bar and stay.
fn show_change(before: Option<&JobInfo>, job: &JobInfo, bar: &ProgressBar) {
    let stood = |code: &str| before.and_then(|job| job.steps.iter().find(|step| step.code == code));
    for step in &job.steps {
        let ended = matches!(step.state, StepState::Passed | StepState::Warned | StepState::Failed);
        if ended && stood(&step.code).is_none_or(|stood| stood.state != step.state) {
            bar.suspend(|| eprintln!("{}: {}. {}", step.state.as_str(), step.title, found(step, " ")));
        }
    }
    bar.set_position(job.percent.into());
    bar.set_message(job.message.clone());
}

fn found(step: &StepInfo, between: &str) -> String {
    match step.mend.is_empty() {
        true => step.message.clone(),
        false => format!("{}{between}{}", step.message, step.mend),
    }
}

fn render(jobs: &[JobInfo]) -> String {
    if jobs.is_empty() {
        return "There has been no job.\n".to_owned();
    }
    let mut table = text::table(&["Job", "What", "On", "State", "%", "Changed", "Message"], &[4]);
    for job in jobs {
        table.add_row([
            job.id.to_string(),
            job.kind.as_str().to_owned(),
            job.subject.clone(),
            job.state.as_str().to_owned(),
            job.percent.to_string(),
            ago(job.changed),
            job.message.clone(),
        ]);
    }
    format!("{table}\n")
}

fn render_one(job: &JobInfo) -> String {
    let mut table = text::table(&["Step", "State", "Found, and what to do"], &[]);
    for step in &job.steps {
        table.add_row([step.title.clone(), step.state.as_str().to_owned(), found(step, "\n")]);
    }
    format!(
        "Job {}: {} {}, asked for by {}\n{table}\n{}, {} %: {}\n",
        job.id,
        job.kind.as_str(),
        job.subject,
        job.created_by,
        job.state.as_str(),
        job.percent,
        job.message
    )
}
