//! `seawall group failover`: a group led through a failover by the config server, step by step.

use block::UnixNanos;
use clap::{Args, Subcommand};
use control::PointSelector;
use control::fleet::{Confirm, GroupFailover, GroupInfo, StartFailover};
use serde_json::json;

use super::Fleet;
use super::change::Certain;
use super::group::{Followed, Which, begin, target_named};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  The machine is lost; look what there is, and fail over:
    seawall group points web
    seawall group failover start web --point latest --promote --watch
  It is to move, and nothing may be lost; stop what runs on it and unmount its disks, then:
    seawall group failover start web --planned --promote --watch
  It was right, or it was not:
    seawall group failover commit web --watch
    seawall group failover cancel web --watch

What each step does to the points, and what is fenced when: docs/lifecycle.md. The volumes of a promoted group are served by
`seawall export --promoted` at its target.")]
pub(crate) struct GroupFailoverOptions {
    #[command(subcommand)]
    step: Step,
}

#[derive(Debug, Subcommand)]
enum Step {
    /// Fence the source, and make the volumes at the target what they were at a point
    #[command(after_help = "Examples:
  seawall group failover start web
  seawall group failover start web --point application --promote --watch
  seawall group failover start web --planned --yes --watch

Again with another point: the failover before is taken back first. Exit status with --watch: 0 when it is done, 3 when it could not
be done.")]
    Start {
        #[command(flatten)]
        which: Which,
        /// Recovery point: latest, application (the newest that is application-consistent), or an epoch's number
        #[arg(long, value_name = "POINT", default_value_t, conflicts_with = "planned")]
        point: PointSelector,
        /// Have the machine hand over its disks first, with proof that nothing is lost; they must be unmounted
        #[arg(long)]
        planned: bool,
        /// Then take writes to the volumes at the target
        #[arg(long)]
        promote: bool,
        /// Which of its target servers, by name; needed where several keep it
        #[arg(long, value_name = "NAME")]
        target_server: Option<String>,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        followed: Followed,
    },
    /// Keep a failover for good; the machine is not protected any more
    #[command(after_help = "Example:\n  seawall group failover commit web --watch")]
    Commit(Sure),
    /// Take a failover back, and with it what was written since; the source is taken again
    #[command(after_help = "Example:\n  seawall group failover cancel web --watch")]
    Cancel(Sure),
    /// Take writes to the volumes of a failed-over group at its target
    #[command(after_help = "Example:\n  seawall group failover promote web --watch")]
    Promote(Plain),
    /// End that: what was written is applied and a recovery point; exports have to be ended before
    #[command(after_help = "Example:\n  seawall group failover demote web --watch")]
    Demote(Plain),
    /// Let the machine write to disks that it has handed over
    #[command(after_help = "Example:\n  seawall group failover release web --watch")]
    Release(Plain),
}

#[derive(Debug, Args)]
struct Sure {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    certain: Certain,
    #[command(flatten)]
    followed: Followed,
}

#[derive(Debug, Args)]
struct Plain {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    followed: Followed,
}

impl GroupFailoverOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.step {
            Step::Start { followed, .. } => followed.json(),
            Step::Commit(sure) | Step::Cancel(sure) => sure.followed.json(),
            Step::Promote(plain) | Step::Demote(plain) | Step::Release(plain) => plain.followed.json(),
        }
    }
}

pub(super) async fn run(options: &GroupFailoverOptions) -> anyhow::Result<Exit> {
    match &options.step {
        Step::Start { which, point, planned, promote, target_server, certain, followed } => {
            let fleet = Fleet::open(followed.place())?;
            let group = which.find(&fleet).await?;
            let target_server = match target_server {
                Some(named) => Some(target_named(&fleet, named).await?),
                None => None,
            };
            let about = match planned {
                true => "Its machine's disks are closed to everybody, and its volumes go over to the target."
                    .to_owned(),
                false => format!(
                    "Nothing more of its machine is taken, and its volumes become what they were at point {point}."
                ),
            };
            certain.ask("fail over", group.name.as_str(), &about)?;
            let asked = StartFailover {
                confirm: group.name.to_string(),
                point: *point,
                planned: *planned,
                promote: *promote,
                target_server,
            };
            begin(which, "failover", &json!(asked), followed).await
        }
        Step::Commit(sure) => {
            let about =
                "What its machine has written after the point is given up, and it is not protected any more.";
            typed(sure, "commit the failover of", about, "failover/commit").await
        }
        Step::Cancel(sure) => {
            let about = "What was written to its volumes at the target since the failover is given up.";
            typed(sure, "cancel the failover of", about, "failover/cancel").await
        }
        Step::Promote(plain) => begin(&plain.which, "promote", &json!({}), &plain.followed).await,
        Step::Demote(plain) => begin(&plain.which, "demote", &json!({}), &plain.followed).await,
        Step::Release(plain) => begin(&plain.which, "release", &json!({}), &plain.followed).await,
    }
}

async fn typed(sure: &Sure, doing: &str, about: &str, act: &str) -> anyhow::Result<Exit> {
    let group = sure.which.find(&Fleet::open(sure.followed.place())?).await?;
    sure.certain.ask(doing, group.name.as_str(), about)?;
    let asked = Confirm { confirm: group.name.to_string() };
    begin(&sure.which, act, &json!(asked), &sure.followed).await
}

/// Where a group stands between its source and its target, in lines; nothing when no failover has come between them.
pub(super) fn render_standing(group: &GroupInfo) -> String {
    let mut shown = String::new();
    if let Some(GroupFailover { generation, failover, promoted, committed, .. }) = &group.failover {
        let stands = match (failover, promoted, committed) {
            (Some(failover), _, _) if !failover.complete => {
                format!("failing over to point {}, not complete; start it again or cancel it", failover.point)
            }
            (Some(failover), Some(_), _) => format!(
                "failed over to point {} and promoted; {} written since. Commit it, or demote and cancel it",
                failover.point, failover.written_bytes
            ),
            (Some(failover), None, _) => {
                format!("failed over to point {}; commit it, or cancel it", failover.point)
            }
            (None, Some(_), _) => "the failover is committed, and the group promoted".to_owned(),
            (None, None, _) => "the failover is committed".to_owned(),
        };
        shown += &format!("Failover: {stands} (generation {generation}).\n");
    }
    if group.handed_over {
        shown += "Handed over: nothing can write to the machine's disks; `seawall group failover release` ends that.\n";
    }
    if let Some(proof) = &group.proof {
        let (when, _) = text::instant(UnixNanos(proof.proven.0));
        shown += &format!(
            "Proven: a machine came up from point {} at {when}, {:.1} s after the command.\n",
            proof.epoch,
            proof.took_ms as f64 / 1000.0
        );
    }
    shown
}
