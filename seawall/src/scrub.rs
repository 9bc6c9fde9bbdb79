//! `seawall scrub`.

use crate::config::Place;
use block::GroupId;
use clap::Args;
use std::fmt::Write;
use std::io::IsTerminal;

use anyhow::{Context, bail};
use control::{OperatorRequest, ScrubProgressInfo, ScrubReply, TargetGroup};
use indicatif::{ProgressBar, ProgressStyle};

use crate::ask::Servers;
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall scrub
  seawall scrub vdb --json | jq .findings

Replication goes on meanwhile. Exit status 0 when all is sound, 3 when something is damaged: it is said which recovery points that
concerns; the others can be used.")]
pub(crate) struct ScrubOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume, by name or identity, whose image is read [default: all]; undo layers are read in any case
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: Option<String>,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// One JSON object at the end, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

/// Damaged ranges shown of one finding; `--json` has more.
const RANGES_SHOWN: usize = 8;

pub(crate) async fn run(options: &ScrubOptions) -> anyhow::Result<Exit> {
    let servers = Servers::load(&options.place)?;
    let group = servers.one_group(options.group).await?;
    let volume = options.volume.as_ref().map(|wanted| find(&group, wanted)).transpose()?;
    let mut stream = servers.view(&OperatorRequest::Scrub { group: group.group, volume }).await?;
    let bar = match options.json || !std::io::stderr().is_terminal() {
        true => ProgressBar::hidden(),
        false => {
            let style = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        }
    };
    while let Some((_, line)) = stream.next().await.context("scrub; it goes on at the target")? {
        if let Ok(progress) = serde_json::from_slice::<ScrubProgressInfo>(&line) {
            bar.set_length(progress.total_bytes.get());
            bar.set_position(progress.done_bytes.get());
        }
    }
    bar.finish_and_clear();
    let reply: ScrubReply =
        serde_json::from_str(stream.tail().unwrap_or_default()).context("read what the scrub found")?;
    let shown = match options.json {
        true => format!("{}\n", serde_json::to_string(&reply)?),
        false => render(&reply),
    };
    text::say(&shown)?;
    Ok(if reply.findings.is_empty() { Exit::Done } else { Exit::Short })
}

fn find(group: &TargetGroup, wanted: &str) -> anyhow::Result<block::VolumeId> {
    let named = |volume: &&control::VolumeSummary| volume.name == wanted || volume.id.to_string() == wanted;
    match group.volumes.iter().find(named) {
        Some(volume) => Ok(volume.id),
        None => {
            let names: Vec<&str> = group.volumes.iter().map(|volume| volume.name.as_str()).collect();
            bail!("find volume {wanted}: group {} has: {}", group.group, names.join(", "))
        }
    }
}

fn render(reply: &ScrubReply) -> String {
    let mut shown =
        format!("Group {}: read {} undo layers, {} in all.\n", reply.group, reply.layers, reply.read_bytes);
    if reply.new_checksum_bytes.get() > 0 {
        let _ = writeln!(
            shown,
            "{} of images had no checksum yet, as after the first copy; from now on they are compared.",
            reply.new_checksum_bytes
        );
    }
    for note in &reply.notes {
        let _ = writeln!(shown, "Note: {note}");
    }
    for finding in &reply.findings {
        let _ = writeln!(shown, "DAMAGED: {}: {}", finding.file, finding.problem);
        if let Some(volume) = &finding.volume {
            let ranges = finding.damaged.iter().take(RANGES_SHOWN);
            let ranges: Vec<String> =
                ranges.map(|range| format!("{} bytes at {}", range.bytes, range.offset)).collect();
            let more = if finding.damaged.len() > RANGES_SHOWN { ", and more (--json)" } else { "" };
            let _ = writeln!(shown, "  of volume {}: {}{more}", volume.name, ranges.join(", "));
        }
        let _ = match (&finding.points, &finding.volume) {
            (None, _) => writeln!(shown, "  It concerns no recovery point."),
            (Some((first, last)), Some(_)) => writeln!(
                shown,
                "  It concerns {} recovery points, {first} to {last}: what is damaged is refused, all else can be read.",
                finding.points_count
            ),
            (Some((first, last)), None) => writeln!(
                shown,
                "  {} recovery points, {first} to {last}, cannot be used; the others can.",
                finding.points_count
            ),
        };
    }
    if reply.findings.is_empty() {
        shown.push_str("All is sound.\n");
    }
    shown
}

#[cfg(test)]
mod tests {
    use block::{ByteCount, Epoch, GroupId, VolumeId};
    use control::{DamagedRange, ScrubFinding, VolumeSummary};

    use super::*;

    #[test]
    fn a_person_sees_what_is_damaged_and_what_that_costs() {
        let sound = ScrubReply {
            group: GroupId([1; 16]),
            layers: 7,
            read_bytes: ByteCount::mib(3),
            new_checksum_bytes: ByteCount::mib(1),
            findings: Vec::new(),
            notes: Vec::new(),
        };
        let shown = render(&sound);
        for expected in ["7 undo layers, 3.0 MiB", "1.0 MiB of images had no checksum", "All is sound"] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        let volume = VolumeSummary { id: VolumeId([2; 16]), name: "vdb".into(), size: ByteCount::gib(1) };
        let layer = ScrubFinding {
            file: "/d/9.layer".into(),
            problem: "checksum".into(),
            volume: None,
            damaged: Vec::new(),
            points: Some((Epoch(1), Epoch(8))),
            points_count: 8,
        };
        let image = ScrubFinding {
            file: "/d/replica.img".into(),
            volume: Some(volume),
            damaged: (0..9).map(|at| DamagedRange { offset: at * 8192, bytes: 4096 }).collect(),
            ..layer.clone()
        };
        let shown = render(&ScrubReply { findings: vec![layer, image], ..sound });
        for expected in [
            "DAMAGED: /d/9.layer: checksum",
            "8 recovery points, 1 to 8, cannot be used",
            "of volume vdb: 4096 bytes at 0, 4096 bytes at 8192",
            "and more (--json)",
            "what is damaged is refused",
        ] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        assert!(!shown.contains("All is sound"));
    }
}
