//! `seawall failover`.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use block::{ByteCount, GroupId};
use clap::{Args, Subcommand};
use control::{
    ExportInfo, ExportPlace, ExportRequest, FailoverReply, FailoverStep, OperatorRequest, PointSelector,
    TargetGroup, VolumeSummary,
};

use crate::ask::Servers;
use crate::config::Place;
use crate::export::uri;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Look whether the newest point is the right one, then fail over to it:
    seawall points
    seawall failover start --point latest
  Serve the disks, so that what is written to them stays; in one go:
    seawall failover start --point latest --promote --export /run/seawall
  Or step by step, also after the target server was started again:
    seawall failover promote
    seawall export vdb --promoted --socket /run/vdb.sock --detach
  It was right:
    seawall failover commit
  It was a false alarm, or another point is wanted:
    seawall export stop 1
    seawall failover demote
    seawall failover cancel

Until it is committed, nothing is lost: what the source wrote after the point stays, and cancelling takes it up again; what was written
to the promoted volumes meanwhile is given up then. From the start on, nothing of the source is taken; after the commit, never again in
its old generation. While a group is promoted, nothing is taken from any source.")]
pub(crate) struct FailoverOptions {
    #[command(subcommand)]
    pub(crate) step: Step,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Step {
    /// Make a group's volumes what they were at a point, and take nothing more from its source
    #[command(after_help = "Examples:
  seawall failover start --point latest
  seawall failover start --point 1200 --yes --json
  seawall failover start --point latest --promote --export /run/seawall --yes")]
    Start {
        /// Recovery point: `latest`, `application` (the newest application-consistent one), or an epoch's number as `seawall points` shows it
        #[arg(long, value_name = "POINT", default_value_t)]
        point: PointSelector,
        /// Then serve the volumes for writing; what is written stays
        #[arg(long)]
        promote: bool,
        /// And export each of them on the target server's machine, on the socket DIR/VOLUME.sock, until `seawall export stop`
        #[arg(long, value_name = "DIR", requires = "promote")]
        export: Option<PathBuf>,
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
    /// Take writes to the volumes of a failed-over group; they stay, and `seawall export --promoted` serves them
    #[command(after_help = "Example:
  seawall failover promote")]
    Promote(Common),
    /// End that: what was written is applied and the newest point; exports have to be ended before
    #[command(after_help = "Example:
  seawall failover demote")]
    Demote(Common),
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
            Step::Start { common, .. }
            | Step::Commit(common)
            | Step::Cancel(common)
            | Step::Promote(common)
            | Step::Demote(common) => common.json,
        }
    }
}

pub(crate) async fn run(options: &FailoverOptions) -> anyhow::Result<()> {
    let (common, step) = match &options.step {
        Step::Start { point, common, .. } => (common, FailoverStep::Start(*point)),
        Step::Commit(common) => (common, FailoverStep::Commit),
        Step::Cancel(common) => (common, FailoverStep::Cancel),
        Step::Promote(common) => (common, FailoverStep::Promote),
        Step::Demote(common) => (common, FailoverStep::Demote),
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
        FailoverStep::Cancel => {
            let written = group.failover.map(|failover| failover.written_bytes).unwrap_or_default();
            (written > ByteCount::ZERO).then(|| {
                format!(
                    "What was written to {} since the failover, {written} in all, is given up.",
                    names(&group)
                )
            })
        }
        FailoverStep::Promote | FailoverStep::Demote => None,
    };
    if let Some(about) = about.filter(|_| !common.yes) {
        confirm(&about, &group)?;
    }
    // From here on nobody is waited for.
    let begun = Instant::now();
    let request = OperatorRequest::Failover { group: group.group, step };
    let mut reply: FailoverReply = servers.change(&request).await?;
    let mut shown = if common.json { String::new() } else { render(&reply, step) };
    let mut exports = Vec::new();
    if let Step::Start { promote: true, export, .. } = &options.step {
        let request = OperatorRequest::Failover { group: group.group, step: FailoverStep::Promote };
        let put_back = reply.changed_bytes;
        reply = servers.change(&request).await.context(
            "the group is failed over and not promoted; `seawall failover promote` tries again, `seawall failover cancel` takes it back",
        )?;
        reply.changed_bytes = put_back;
        shown.push_str(&if common.json { String::new() } else { render(&reply, FailoverStep::Promote) });
        for volume in group.volumes.iter().filter(|_| export.is_some()) {
            let dir = std::path::absolute(export.as_deref().unwrap_or(Path::new("")))?;
            exports.push(serve(&servers, &group, volume, &dir).await?);
        }
        let took = begun.elapsed();
        for info in exports.iter().filter(|_| !common.json) {
            for volume in &info.volumes {
                let _ = writeln!(shown, "  export {}: {}", info.id, uri(info, None, &volume.name));
            }
        }
        if !common.json {
            let _ = writeln!(shown, "It took {:.2} s from the command.", took.as_secs_f64());
        }
        if common.json {
            let uris = exports
                .iter()
                .flat_map(|info| info.volumes.iter().map(|volume| uri(info, None, &volume.name)));
            let mut json = serde_json::to_value(&reply)?;
            json["exports"] = serde_json::to_value(&exports)?;
            json["uris"] = uris.collect::<Vec<String>>().into();
            json["took_ms"] = serde_json::json!(took.as_secs_f64() * 1000.0);
            shown = format!("{json}\n");
        }
    } else if common.json {
        shown = format!("{}\n", serde_json::to_string(&reply)?);
    }
    Ok(text::say(&shown)?)
}

/// Exports a promoted volume on a socket that goes on.
async fn serve(
    servers: &Servers,
    group: &TargetGroup,
    volume: &VolumeSummary,
    dir: &Path,
) -> anyhow::Result<ExportInfo> {
    let request = ExportRequest {
        promoted: true,
        detach: true,
        ..ExportRequest::new(
            group.group,
            vec![volume.id],
            PointSelector::Latest,
            ExportPlace::Socket(dir.join(format!("{}.sock", volume.name.replace('/', "-")))),
        )
    };
    let held = servers.export(request).await.with_context(|| {
        format!(
            "the group is failed over and promoted; `seawall export {} --promoted` exports it",
            volume.name
        )
    })?;
    Ok(held.info)
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
        FailoverStep::Promote => {
            "Promoted: `seawall export --promoted` serves the volumes, and what is written to them stays.\n"
                .to_owned()
        }
        FailoverStep::Demote => format!("Demoted: what was written is point {point}.\n"),
    }
}
