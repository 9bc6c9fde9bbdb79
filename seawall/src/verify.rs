//! `seawall verify`: every kind of file that the servers keep, while they do not run.

use crate::config::Place;
use clap::Args;
use std::fmt::Write;

use anyhow::{Context, ensure};
use block::{Epoch, GroupId};
use control::PointSelector;
use serde::Serialize;

use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall verify --dir /etc/seawall
  Whether one volume could be restored as it was at a point:
    seawall verify vdb --point 1200 --dir /etc/seawall
  seawall verify --dir /etc/seawall --group 6d1f0b6c2f0e4b6f9a53c1d3a8e4f702 --json

Reads the process server's cache and the target server's replicas, as DIR's configurations name them, where they are on this machine:
segments, cursors, states, undo layers, images, spans, pins, checksums. Changes nothing. A server that runs has its files open;
`seawall scrub` is for that. With a volume or a point, the end of what is shown is about these, and so is the exit status: 0 when all is
sound, 3 when something is damaged, 1 when it cannot be told.")]
pub(crate) struct VerifyOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume to tell of, by name or identity; everything is read all the same [default: all]
    pub(crate) volume: Option<String>,
    /// Recovery point to tell of: `latest`, or an epoch's number as `seawall points` shows it [default: latest]
    #[arg(long, value_name = "POINT")]
    pub(crate) point: Option<PointSelector>,
    /// Only the replica of this group
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Findings {
    sound: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<CacheFindings>,
    replicas: Vec<ReplicaFindings>,
    /// Of what was asked about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    points: Vec<PointFindings>,
}

/// A volume at a point.
#[derive(Debug, Serialize)]
struct PointFindings {
    group: GroupId,
    volume: String,
    point: u64,
    sound: bool,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct CacheFindings {
    directory: String,
    segments: usize,
    bytes: u64,
    changesets: u64,
    problems: Vec<String>,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ReplicaFindings {
    group: GroupId,
    applied: u64,
    points: usize,
    layers: usize,
    spans: u64,
    bytes: u64,
    /// Of images, what was compared with its checksum.
    compared_bytes: u64,
    problems: Vec<String>,
    notes: Vec<String>,
}

pub(crate) fn run(options: &VerifyOptions) -> anyhow::Result<Exit> {
    let dir = options.place.find()?;
    let (process, target) =
        (dir.join("process-server/process-server.toml"), dir.join("target-server/target-server.toml"));
    ensure!(
        process.is_file() || target.is_file(),
        "verify: neither {} nor {} is there; name the directory of a server on this machine with --dir",
        process.display(),
        target.display()
    );
    let mut findings = Findings::default();
    if process.is_file() && options.group.is_none() {
        let config = seawall_process_server::Config::load(&process)?;
        let cache = config.process_server.cache;
        // A cache that was never used has nothing to verify.
        if cache.is_dir() {
            findings.cache = Some(verify_cache(&cache)?);
        }
    }
    if target.is_file() {
        let config = seawall_target_server::Config::load(&target)?;
        let groups = config.groups.iter().map(|group| group.id);
        let groups: Vec<GroupId> = groups.filter(|id| options.group.is_none_or(|only| only == *id)).collect();
        ensure!(
            !groups.is_empty(),
            "verify: {} has no group {}",
            target.display(),
            options.group.map(|group| group.to_string()).unwrap_or_default()
        );
        for group in groups {
            // A group of which nothing has arrived yet has no files.
            if config.data.join(group.to_string()).is_dir() {
                let (replica, points) = verify_replica(&config.data, group, options)?;
                findings.replicas.push(replica);
                findings.points.extend(points);
            }
        }
    }
    if let Some(volume) = &options.volume {
        ensure!(!findings.points.is_empty(), "verify: no replica here has a volume {volume}");
    }
    let cache_sound = findings.cache.as_ref().is_none_or(|cache| cache.problems.is_empty());
    findings.sound = match &findings.points[..] {
        [] => cache_sound && findings.replicas.iter().all(|replica| replica.problems.is_empty()),
        points => points.iter().all(|point| point.sound),
    };
    let shown = match options.json {
        true => format!("{}\n", serde_json::to_string(&findings)?),
        false => render(&findings),
    };
    text::say(&shown)?;
    Ok(if findings.sound { Exit::Done } else { Exit::Short })
}

fn verify_cache(cache: &std::path::Path) -> anyhow::Result<CacheFindings> {
    let report = seawall_process_server::verify(cache)
        .with_context(|| format!("verify the cache {}; stop the process server first", cache.display()))?;
    let mut notes = Vec::new();
    if report.torn_tail {
        notes.push(
            "the log ends in a torn write, as a crash leaves it; nothing acknowledged was in it".to_owned(),
        );
    }
    if report.half_received > 0 {
        notes.push(format!("{} half-received changesets, to be discarded", report.half_received));
    }
    Ok(CacheFindings {
        directory: cache.display().to_string(),
        segments: report.segments,
        bytes: report.bytes.get(),
        changesets: report.groups.iter().map(|group| group.changesets).sum(),
        problems: report.damages.iter().map(ToString::to_string).collect(),
        notes,
    })
}

fn verify_replica(
    data: &std::path::Path,
    group: GroupId,
    options: &VerifyOptions,
) -> anyhow::Result<(ReplicaFindings, Vec<PointFindings>)> {
    let report = seawall_target_server::verify(data, group)
        .with_context(|| format!("verify the replica of group {group}; stop the target server first"))?;
    let mut points = Vec::new();
    let wanted = |id: &str, name: &str| match &options.volume {
        Some(volume) => volume == id || volume == name,
        None => options.point.is_some(),
    };
    let volumes = report.volumes.iter().filter(|volume| wanted(&volume.id.to_string(), &volume.name));
    for volume in volumes {
        let epoch = match options.point.unwrap_or_default() {
            PointSelector::Epoch(epoch) => epoch,
            PointSelector::Application => {
                anyhow::bail!(
                    "verify: say which point by its number; `seawall points` shows which are application-consistent"
                )
            }
            PointSelector::Latest => report.newest().context("verify: there is no recovery point yet")?,
        };
        let mut problems: Vec<String> =
            report.wrong_at(epoch, Some(volume.id)).map(ToOwned::to_owned).collect();
        if problems.is_empty() && !report.is_point(epoch) {
            let side = |point: Option<Epoch>| point.map_or("none".to_owned(), |point| point.to_string());
            let (before, after) = report.nearest(epoch);
            problems.push(format!(
                "there is no recovery point {epoch}; the nearest before it is {}, after it {}",
                side(before),
                side(after)
            ));
        }
        points.push(PointFindings {
            group,
            volume: volume.name.clone(),
            point: epoch.0,
            sound: problems.is_empty(),
            problems,
        });
    }
    let findings = ReplicaFindings {
        group,
        applied: report.applied.0,
        points: report.layers.iter().filter(|layer| layer.consistency.is_point()).count(),
        layers: report.layers.len(),
        spans: report.spans,
        bytes: report.layers.iter().map(|layer| layer.bytes.get()).sum(),
        compared_bytes: report.compared.get(),
        problems: report.problems,
        notes: report.notes,
    };
    Ok((findings, points))
}

fn render(findings: &Findings) -> String {
    let mut shown = String::new();
    let list = |shown: &mut String, problems: &[String], notes: &[String]| {
        for note in notes {
            let _ = writeln!(shown, "  Note: {note}");
        }
        for problem in problems {
            let _ = writeln!(shown, "  DAMAGED: {problem}");
        }
    };
    if let Some(cache) = &findings.cache {
        let _ = writeln!(
            shown,
            "Cache {}: {} segments, {} changesets, {}",
            cache.directory,
            cache.segments,
            cache.changesets,
            block::ByteCount(cache.bytes)
        );
        list(&mut shown, &cache.problems, &cache.notes);
    }
    for replica in &findings.replicas {
        let _ = writeln!(
            shown,
            "Replica of group {}: epoch {} applied, {} recovery points, {} undo layers of {}, {} spans, {} of images",
            replica.group,
            replica.applied,
            replica.points,
            replica.layers,
            block::ByteCount(replica.bytes),
            replica.spans,
            block::ByteCount(replica.compared_bytes)
        );
        list(&mut shown, &replica.problems, &replica.notes);
    }
    for point in &findings.points {
        let verdict = if point.sound { "sound" } else { "NOT SOUND" };
        let _ = writeln!(shown, "{} at point {}: {verdict}", point.volume, point.point);
        for problem in &point.problems {
            let _ = writeln!(shown, "  {problem}");
        }
    }
    if findings.points.is_empty() {
        let _ = writeln!(shown, "{}", if findings.sound { "All is sound." } else { "Something is DAMAGED." });
    }
    shown
}
