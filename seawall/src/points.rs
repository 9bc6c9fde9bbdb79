//! `seawall points`.

use crate::config::Place;
use block::GroupId;
use clap::Args;
use std::fmt::Write;

use block::UnixNanos;
use control::{GroupPoints, PointInfo, PointsReply};

use crate::ask::Servers;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall points --dir /etc/seawall
  seawall points --json | jq '.groups[0].points[-1].epoch'")]
pub(crate) struct PointsOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Only of this group
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Only the newest so many of each group, 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) last: usize,
    /// One JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(options: &PointsOptions) -> anyhow::Result<()> {
    let mut reply = Servers::load(&options.place)?.points(options.group).await?;
    if options.last > 0 {
        for group in &mut reply.groups {
            let surplus = group.points.len().saturating_sub(options.last);
            group.points.drain(..surplus);
        }
    }
    let shown = match options.json {
        true => format!("{}\n", serde_json::to_string(&reply)?),
        false => render(&reply, UnixNanos::now()),
    };
    Ok(text::say(&shown)?)
}

fn render(reply: &PointsReply, now: UnixNanos) -> String {
    if reply.groups.is_empty() {
        return "No group yet: nothing has been delivered to this target server.\n".to_owned();
    }
    reply.groups.iter().map(|group| render_group(group, now)).collect::<Vec<_>>().join("\n")
}

fn render_group(group: &GroupPoints, now: UnixNanos) -> String {
    let volumes: Vec<String> =
        group.volumes.iter().map(|volume| format!("{} ({})", volume.name, volume.size)).collect();
    let mut heading =
        format!("Group {}, generation {}: {}\n", group.group, group.generation, volumes.join(", "));
    if group.points.is_empty() {
        return format!(
            "{heading}No recovery point yet; `seawall status` shows how far the first copy is.\n"
        );
    }
    let mut table = text::table(
        &["Point", "Time here", "UTC", "Age", "Consistency", "Frozen", "Changed", "Kept for", "Label"],
        &[0, 3, 5, 6],
    );
    for point in &group.points {
        let (local, utc) = text::instant(point.cut_time);
        table.add_row([
            point.epoch.to_string(),
            local,
            utc,
            text::span(now.since(point.cut_time)),
            point.consistency.to_string(),
            point.note.frozen.map(text::short).unwrap_or_default(),
            point.changed_bytes.to_string(),
            kept_for(point, now),
            point.note.label.as_ref().map(ToString::to_string).unwrap_or_default(),
        ]);
    }
    if group.omitted > 0 {
        let _ = writeln!(
            heading,
            "{} older points are not listed; they can be used all the same.",
            group.omitted
        );
    }
    let _ = writeln!(heading, "{table}");
    for point in &group.points {
        if let Some(reason) = &point.note.reason {
            let _ =
                writeln!(heading, "Point {}: only {}-consistent: {reason}", point.epoch, point.consistency);
        }
    }
    // One damaged layer makes all points before it unusable, for the same reason.
    let mut unusable = group.points.iter().filter_map(|point| Some((point.epoch, point.unusable.as_ref()?)));
    if let Some((first, reason)) = unusable.next() {
        let last = unusable.next_back().map_or(first, |(last, _)| last);
        let _ = writeln!(heading, "Points {first} to {last} cannot be used: {reason}");
    }
    heading
}

/// The rule that keeps it, or its pin.
fn kept_for(point: &PointInfo, now: UnixNanos) -> String {
    match (&point.unusable, &point.pin, &point.kept_for) {
        (Some(_), ..) => "UNUSABLE".to_owned(),
        (None, Some(pin), _) => {
            let label = pin.label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
            match pin.expires {
                None => format!("pinned{label}"),
                Some(expires) => format!("pinned{label} for {}", text::span(expires.since(now))),
            }
        }
        (None, None, Some(rule)) => rule.clone(),
        (None, None, None) => "goes soon".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use block::{ByteCount, Consistency, Epoch, Generation, GroupId, PointNote, VolumeId};
    use control::{PinInfo, PointInfo, VolumeSummary};

    use super::*;

    #[test]
    fn points_are_a_table() {
        let second = 1_000_000_000;
        let volume = VolumeSummary { id: VolumeId([1; 16]), name: "data".into(), size: ByteCount::gib(2) };
        let point = PointInfo {
            epoch: Epoch(7),
            cut_time: UnixNanos(1_700_000_000 * second),
            consistency: Consistency::Filesystem,
            note: PointNote {
                label: Some("nightly".parse().unwrap()),
                frozen: Some(Duration::from_millis(14)),
                filesystems: vec!["/".into()],
                reason: Some("there are no hooks".into()),
            },
            changed_bytes: ByteCount::kib(12),
            pin: None,
            kept_for: Some("hourly for 24h".into()),
            unusable: None,
        };
        let pinned = PointInfo {
            epoch: Epoch(8),
            pin: Some(PinInfo {
                label: Some("audit".parse().unwrap()),
                pinned: UnixNanos(0),
                expires: Some(UnixNanos(1_700_007_290 * second)),
            }),
            ..point.clone()
        };
        let going = PointInfo { epoch: Epoch(9), kept_for: None, ..point.clone() };
        let unusable = |epoch| PointInfo {
            epoch: Epoch(epoch),
            unusable: Some("8.layer is damaged".into()),
            ..point.clone()
        };
        let mut group = GroupPoints {
            group: GroupId([2; 16]),
            generation: Generation(1),
            volumes: vec![volume],
            points: vec![unusable(5), unusable(6), point.clone(), pinned, going],
            omitted: 4,
        };
        let now = UnixNanos(1_700_000_090 * second);
        let shown = render(&PointsReply { groups: vec![group.clone()] }, now);
        for expected in [
            "data (2.0 GiB)",
            "2023-11-14T22:13:20.000Z",
            "90 s",
            "filesystem",
            "12.0 KiB",
            "14 ms",
            "nightly",
            "Point 7: only filesystem-consistent: there are no hooks",
            "hourly for 24h",
            "pinned \"audit\" for 2 h 00 min",
            "goes soon",
            "UNUSABLE",
            "Points 5 to 6 cannot be used: 8.layer is damaged",
            "4 older points are not listed",
        ] {
            assert!(shown.contains(expected), "{expected} in\n{shown}");
        }
        group.points.clear();
        assert!(render(&PointsReply { groups: vec![group] }, now).contains("No recovery point yet"));
        assert!(render(&PointsReply::default(), now).contains("No group yet"));
    }
}
