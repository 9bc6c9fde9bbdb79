//! `seawall drill`: a test failover. Every volume of one group or several, as of a point, writable, for a while.
//!
//! The disks are overlays at the target: what is written to them is dropped at the end, and replication, retention and the points do
//! not know of it. A drill is no more than its exports, which the target server ends by itself when the time is over, whatever has
//! become of whoever began it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use block::{ByteCount, GroupId, Label, UnixNanos};
use clap::{Args, Subcommand};
use control::{ExportInfo, ExportPlace, ExportRequest, GroupPoints, PointSelector};

use crate::ask::Servers;
use crate::config::Place;
use crate::exit::{Exit, stop};
use crate::export::uri;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  All groups of the target server, each at its newest point, for four hours:
    seawall drill start
  One group at a point, for clients on the target server's machine:
    seawall drill start --group 0011223344556677889900aabbccddee --point 1207 --sockets /run/seawall --for 30m
  What is running, and its end:
    seawall drill list
    seawall drill stop

What is written goes into overlays at the target and is dropped at the end. Replication goes on meanwhile, as if there were no drill.")]
pub(crate) struct DrillOptions {
    #[command(subcommand)]
    pub(crate) command: DrillCommand,
}

impl DrillOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            DrillCommand::Start(options) => options.json,
            DrillCommand::List(options) => options.json,
            DrillCommand::Stop(options) => options.json,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum DrillCommand {
    /// Serve all volumes of groups at a point, writable, until the time is over
    #[command(after_help = "Examples:
  seawall drill start
  seawall drill start --name monthly --for 2h --limit 50GiB --json")]
    Start(DrillStartOptions),
    /// Show the drills that are running
    #[command(after_help = "Example:
  seawall drill list --json")]
    List(DrillListOptions),
    /// End a drill; its clients are disconnected, and what was written is dropped
    #[command(after_help = "Examples:
  seawall drill stop
  seawall drill stop monthly")]
    Stop(DrillStopOptions),
}

#[derive(Debug, Args)]
pub(crate) struct DrillStartOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// A group; may be given several times [default: all that have a point]
    #[arg(long = "group", value_name = "ID")]
    pub(crate) groups: Vec<GroupId>,
    /// Recovery point: `latest`, `application` (the newest application-consistent one), or the number of an epoch of the one group
    #[arg(long, value_name = "POINT", default_value_t)]
    pub(crate) point: PointSelector,
    /// What to call it
    #[arg(long, value_name = "NAME", default_value = "drill", value_parser = crate::point::parse_label)]
    pub(crate) name: Label,
    /// How long it lasts at most, as in 30m, 4h, 2d; up to 30d
    #[arg(long = "for", value_name = "SPAN", default_value = "4h", value_parser = seawall_target_server::parse_span)]
    pub(crate) lasts: Duration,
    /// Sockets in this directory of the target server's machine, for its user only [default: ports with TLS]
    #[arg(long, value_name = "DIR")]
    pub(crate) sockets: Option<PathBuf>,
    /// What may be written to each volume, such as 10GiB [default: 16GiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) limit: Option<ByteCount>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DrillListOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// One JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DrillStopOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Which, where several are running
    #[arg(value_name = "NAME", value_parser = crate::point::parse_label)]
    pub(crate) name: Option<Label>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(options: &DrillOptions) -> anyhow::Result<()> {
    match &options.command {
        DrillCommand::Start(options) => start(options).await,
        DrillCommand::List(options) => list(options).await,
        DrillCommand::Stop(options) => end(options).await,
    }
}

/// The parts of all drills.
async fn running(servers: &Servers) -> anyhow::Result<Vec<ExportInfo>> {
    let exports = servers.exports().await?.exports;
    Ok(exports.into_iter().filter(|export| export.drill.is_some()).collect())
}

async fn start(options: &DrillStartOptions) -> anyhow::Result<()> {
    let began = Instant::now();
    let servers = Servers::load(&options.place)?;
    let name = &options.name;
    let groups = chosen(servers.points(None).await?.groups, options)?;
    if running(&servers).await?.iter().any(|export| export.drill.as_ref() == Some(name)) {
        bail!(
            "start drill {name}: one of that name is running; `seawall drill stop {name}` ends it, or give another --name"
        );
    }
    let mut parts: Vec<ExportInfo> = Vec::new();
    for group in &groups {
        let started = part(&servers, options, group).await;
        let failed = match started {
            Ok(info) => {
                // A target server that does not know of time limits would serve it for ever.
                let kept = info.until.is_some() && info.drill.is_some();
                parts.push(info);
                if kept {
                    continue;
                }
                anyhow::anyhow!(
                    "the target server does not know of drills; use the same version of Seawall on both sides"
                )
            }
            Err(error) => error,
        };
        // All or nothing.
        for info in &parts {
            if let Err(error) = servers.stop_export(info.id).await {
                tracing::warn!(export = info.id, error = format!("{error:#}"), "end a part of the drill");
            }
        }
        return Err(failed.context(format!("start drill {name} of group {group}; nothing of it is running")));
    }
    let took = began.elapsed();
    if options.json {
        let uris: Vec<serde_json::Value> = parts.iter().flat_map(volumes).collect();
        let took_ms = took.as_secs_f64() * 1000.0;
        let said =
            serde_json::json!({ "drill": name, "took_ms": took_ms, "exports": parts, "volumes": uris });
        return Ok(text::say(&format!("{said}\n"))?);
    }
    let mut out = format!("Drill {name} is ready after {}.\n{}", text::short(took), table(&parts));
    if options.sockets.is_none() {
        out.push_str(
            "Clients show a certificate of an operator (operator/cert.pem and key.pem), and expect of the server that \
             ca.pem vouches for the name target-server.seawall.invalid (QEMU: tls-hostname).\n",
        );
    }
    let _ = writeln!(
        out,
        "It ends with `seawall drill stop {name}`, and by itself after {}.",
        text::span(options.lasts)
    );
    Ok(text::say(&out)?)
}

/// The groups that are meant.
fn chosen(known: Vec<GroupPoints>, options: &DrillStartOptions) -> anyhow::Result<Vec<GroupId>> {
    let missing = options.groups.iter().find(|id| !known.iter().any(|group| group.group == **id));
    if let Some(missing) = missing {
        return Err(stop(
            Exit::NotFound,
            format!("start a drill of group {missing}: the target server does not keep it"),
        ));
    }
    let named = |group: &GroupPoints| options.groups.is_empty() || options.groups.contains(&group.group);
    let mut groups = Vec::new();
    for group in known.iter().filter(|group| named(group)) {
        if !group.points.is_empty() {
            groups.push(group.group);
        } else if !options.groups.is_empty() {
            let message = format!("start a drill of group {}: it has no recovery point yet", group.group);
            return Err(stop(Exit::NotFound, message));
        }
    }
    if groups.is_empty() {
        return Err(stop(
            Exit::NotFound,
            "start a drill: no group of the target server has a recovery point",
        ));
    }
    ensure!(
        groups.len() == 1 || !matches!(options.point, PointSelector::Epoch(_)),
        "start a drill at point {}: the points of {} groups have nothing in common; say which group with --group ID",
        options.point,
        groups.len()
    );
    Ok(groups)
}

/// Begins it for a group.
async fn part(servers: &Servers, options: &DrillStartOptions, group: &GroupId) -> anyhow::Result<ExportInfo> {
    let place = match &options.sockets {
        // Names of sockets are short: 107 bytes in all.
        Some(dir) => {
            ExportPlace::Socket(std::path::absolute(dir)?.join(format!("{:.8}.sock", group.to_string())))
        }
        None => ExportPlace::Beside,
    };
    let request = ExportRequest {
        writable: true,
        overlay_limit: options.limit,
        detach: true,
        drill: Some(options.name.clone()),
        time_limit_s: Some(options.lasts.as_secs()),
        ..ExportRequest::new(*group, Vec::new(), options.point, place)
    };
    Ok(servers.export(request).await?.info)
}

/// Each volume of a part, for programs.
fn volumes(part: &ExportInfo) -> Vec<serde_json::Value> {
    let volume = |volume: &control::VolumeSummary| {
        serde_json::json!({
            "group": part.group, "volume": volume.name, "point": part.point.epoch, "uri": uri(part, None, &volume.name),
        })
    };
    part.volumes.iter().map(volume).collect()
}

fn table(parts: &[ExportInfo]) -> String {
    let mut table = text::table(
        &["Drill", "Group", "Volume", "Point", "Of", "Where", "Clients", "Overlays", "Ends"],
        &[3, 6],
    );
    for part in parts {
        for (index, volume) in part.volumes.iter().enumerate() {
            // What is of the whole part is said once.
            let of_part = |text: String| if index == 0 { text } else { String::new() };
            table.add_row([
                of_part(part.drill.as_ref().map(ToString::to_string).unwrap_or_default()),
                of_part(part.group.to_string()),
                volume.name.clone(),
                part.point.epoch.to_string(),
                text::instant(part.point.cut_time).0,
                uri(part, None, &volume.name),
                of_part(part.connections.to_string()),
                of_part(part.overlay_bytes.to_string()),
                of_part(part.until.map_or_else(String::new, |until| text::instant(until).0)),
            ]);
        }
    }
    format!("{table}\n")
}

async fn list(options: &DrillListOptions) -> anyhow::Result<()> {
    let parts = running(&Servers::load(&options.place)?).await?;
    let shown = match options.json {
        true => format!("{}\n", serde_json::json!({ "exports": parts })),
        false if parts.is_empty() => "No drill is running.\n".to_owned(),
        false => table(&parts),
    };
    Ok(text::say(&shown)?)
}

async fn end(options: &DrillStopOptions) -> anyhow::Result<()> {
    let servers = Servers::load(&options.place)?;
    let parts = running(&servers).await?;
    let mut names: Vec<&Label> = parts.iter().filter_map(|part| part.drill.as_ref()).collect();
    // Parts of drills that began at the same time are mixed.
    names.sort_unstable_by_key(|name| name.as_str());
    names.dedup();
    let name = match (&options.name, &names[..]) {
        (Some(name), names) if names.contains(&name) => name.clone(),
        (Some(name), _) => return Err(stop(Exit::NotFound, format!("stop drill {name}: it is not running"))),
        (None, [name]) => (*name).clone(),
        (None, []) => return Err(stop(Exit::NotFound, "stop a drill: none is running")),
        (None, names) => {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            bail!("stop a drill: {} are running; say which", names.join(", "));
        }
    };
    let mut stopped = Vec::new();
    for part in parts.iter().filter(|part| part.drill.as_ref() == Some(&name)) {
        let reply = servers.stop_export(part.id).await.with_context(|| format!("stop drill {name}"))?;
        stopped.extend(reply.exports);
    }
    if options.json {
        return Ok(text::say(&format!("{}\n", serde_json::json!({ "drill": name, "exports": stopped })))?);
    }
    let written: ByteCount = stopped.iter().map(|part| part.overlay_bytes).sum();
    let since = stopped.iter().map(|part| part.since).min().unwrap_or_default();
    let lasted = Duration::from_nanos(UnixNanos::now().0.saturating_sub(since.0));
    Ok(text::say(&format!(
        "Drill {name} has ended after {}; {written} that were written are dropped.\n",
        text::span(lasted)
    ))?)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn options(more: &[&str]) -> DrillStartOptions {
        let words = ["seawall", "drill", "start"];
        match Cli::try_parse_from(words.iter().chain(more)).unwrap().command {
            Command::Drill(DrillOptions { command: DrillCommand::Start(options) }) => options,
            other => panic!("{other:?}"),
        }
    }

    fn group(id: u8, epochs: &[u64]) -> GroupPoints {
        let point = |epoch: &u64| {
            let mut point = crate::export::tests::info(ExportPlace::Beside).point;
            point.epoch = block::Epoch(*epoch);
            point
        };
        GroupPoints {
            group: GroupId([id; 16]),
            generation: block::Generation(1),
            volumes: Vec::new(),
            points: epochs.iter().map(point).collect(),
            omitted: 0,
        }
    }

    #[test]
    fn groups_are_those_that_are_named_or_that_have_points() {
        let known = || vec![group(1, &[3]), group(2, &[]), group(3, &[4, 5])];
        let of = |more: &[&str]| chosen(known(), &options(more)).map_err(|error| error.to_string());
        assert_eq!(of(&[]).unwrap(), [GroupId([1; 16]), GroupId([3; 16])]);
        let third = GroupId([3; 16]).to_string();
        assert_eq!(of(&["--group", &third, "--point", "4"]).unwrap(), [GroupId([3; 16])]);
        assert!(of(&["--point", "4"]).unwrap_err().contains("nothing in common"));
        assert!(of(&["--group", &GroupId([2; 16]).to_string()]).unwrap_err().contains("no recovery point"));
        assert!(of(&["--group", &GroupId([9; 16]).to_string()]).unwrap_err().contains("does not keep"));
        assert!(chosen(vec![group(2, &[])], &options(&[])).is_err());
    }
}
