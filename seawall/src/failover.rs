//! `seawall failover`.

use std::io::{IsTerminal, Write};

use anyhow::{bail, ensure};
use block::GroupId;
use clap::{Args, Subcommand};
use control::{FailoverReply, FailoverStep, OperatorRequest, PointSelector, TargetGroup};

use crate::ask::Servers;
use crate::config::Place;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Look whether the newest point is the right one, then fail over to it:
    seawall points
    seawall failover start --point latest
  Give the disks to what is to run on them, and decide:
    seawall export vdb --point latest --writable --socket /run/vdb.sock
    seawall failover commit
  It was a false alarm, or another point is wanted:
    seawall failover cancel

Until it is committed, nothing is lost: what the source wrote after the point stays, and cancelling takes it up again. What is written
to an export meanwhile is the export's own and goes with it. From the start on, nothing of the source is taken; after the commit, never
again in its old generation.")]
pub(crate) struct FailoverOptions {
    #[command(subcommand)]
    pub(crate) step: Step,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Step {
    /// Make a group's volumes what they were at a point, and take nothing more from its source
    #[command(after_help = "Examples:
  seawall failover start --point latest
  seawall failover start --point 1200 --yes --json")]
    Start {
        /// Recovery point: `latest`, or an epoch's number as `seawall points` shows it
        #[arg(long, value_name = "POINT", default_value_t)]
        point: PointSelector,
        #[command(flatten)]
        common: Common,
    },
    /// Keep a failover, for good
    #[command(after_help = "Example:
  seawall failover commit")]
    Commit(Common),
    /// Take a failover back, and take what the source sends again
    #[command(after_help = "Example:
  seawall failover cancel")]
    Cancel(Common),
}

#[derive(Debug, Args)]
pub(crate) struct Common {
    #[command(flatten)]
    place: Place,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    group: Option<GroupId>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

impl FailoverOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.step {
            Step::Start { common, .. } | Step::Commit(common) | Step::Cancel(common) => common.json,
        }
    }
}

pub(crate) async fn run(options: &FailoverOptions) -> anyhow::Result<()> {
    let (common, step) = match &options.step {
        Step::Start { point, common } => (common, FailoverStep::Start(*point)),
        Step::Commit(common) => (common, FailoverStep::Commit),
        Step::Cancel(common) => (common, FailoverStep::Cancel),
    };
    let servers = Servers::load(&common.place)?;
    let group = servers.one_group(common.group).await?;
    let about = match step {
        FailoverStep::Start(point) => Some(format!(
            "Replication of {} stops, and its volumes become what they were at point {point}.",
            names(&group)
        )),
        FailoverStep::Commit => Some(format!(
            "What the source of {} has written after point {} is given up, and its generation is fenced for good.",
            names(&group),
            group.failover.map(|failover| failover.point.to_string()).unwrap_or_default()
        )),
        FailoverStep::Cancel => None,
    };
    if let Some(about) = about.filter(|_| !common.yes) {
        confirm(&about, &group)?;
    }
    let request = OperatorRequest::Failover { group: group.group, step };
    let reply: FailoverReply = servers.change(&request).await?;
    let shown = match common.json {
        true => format!("{}\n", serde_json::to_string(&reply)?),
        false => render(&reply, step),
    };
    Ok(text::say(&shown)?)
}

fn names(group: &TargetGroup) -> String {
    let names: Vec<&str> = group.volumes.iter().map(|volume| volume.name.as_str()).collect();
    format!("group {} ({})", group.group, names.join(", "))
}

/// The name of the first volume has to be typed.
fn confirm(about: &str, group: &TargetGroup) -> anyhow::Result<()> {
    ensure!(std::io::stdin().is_terminal(), "fail over: {about} There is nobody to ask here; say --yes");
    let name = group.volumes.first().map_or_else(|| group.group.to_string(), |volume| volume.name.clone());
    eprint!("{about} Type {name} to go on: ");
    std::io::stderr().flush()?;
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    if typed.trim() != name {
        bail!("fail over: {:?} was typed; nothing was done", typed.trim());
    }
    Ok(())
}

fn render(reply: &FailoverReply, step: FailoverStep) -> String {
    let point = reply.point.as_ref().map(|point| point.epoch.to_string()).unwrap_or_default();
    match step {
        FailoverStep::Start(_) => format!(
            "Failed over: point {point} is what was chosen; {} had changed since and were put back.\n\
             Generation {} begins. `seawall failover commit` keeps it, `seawall failover cancel` takes it back.\n",
            reply.changed_bytes, reply.generation
        ),
        FailoverStep::Commit => format!(
            "Committed: generation {} goes on from point {point}; what the old source sends is refused.\n",
            reply.generation
        ),
        FailoverStep::Cancel => {
            format!("Cancelled: point {point} is the newest again, and what the source sends is taken.\n")
        }
    }
}
