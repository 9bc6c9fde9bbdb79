//! The picture as tables.

use std::fmt::Write as _;
use std::time::Duration;

use block::ByteCount;
use control::{ResyncStage, ResyncStatus, Severity};

use super::gather::{GroupView, Overview};
use crate::text;

pub(crate) fn overview(overview: &Overview) -> String {
    let mut out = String::new();
    for error in &overview.errors {
        let _ = writeln!(out, "! {error}\n");
    }
    if overview.groups.is_empty() && overview.errors.is_empty() {
        out.push_str("No group yet: no agent has delivered anything.\n");
    }
    for group in &overview.groups {
        out.push_str(&group_text(group));
        out.push('\n');
    }
    if let Some(server) = &overview.process_server {
        let _ = writeln!(
            out,
            "Process server {}: cache {} of {}, fsync {:.1} ms (99 of 100: {:.1} ms)",
            server.name, server.cache_used, server.cache_limit, server.fsync_ms_p50, server.fsync_ms_p99
        );
    }
    if let Some(server) = &overview.target_server {
        let undo: ByteCount = server.groups.iter().map(|group| group.undo_bytes).sum();
        let _ = writeln!(out, "Target server {}: undo layers {undo}", server.name);
        for export in &server.exports {
            let volumes: Vec<&str> = export.volumes.iter().map(|volume| volume.name.as_str()).collect();
            let _ = writeln!(
                out,
                "Export {}: {} at point {}, clients {}, overlays {} of {}{}",
                export.id,
                volumes.join(", "),
                export.point.epoch,
                export.connections,
                export.overlay_bytes,
                export.overlay_limit,
                if export.detached { ", detached" } else { "" }
            );
        }
    }
    out
}

fn group_text(group: &GroupView) -> String {
    let mut out = String::new();
    let agent = group.agent.as_deref().unwrap_or("not connected");
    let _ = writeln!(out, "Group {}, generation {}, agent {agent}", group.group, group.generation);
    let _ = writeln!(out, "State: {}. {}", group.state, group.meaning);
    if group.state.severity() > Severity::Good {
        let _ = writeln!(out, "To do: {}", group.what_to_do);
    }
    out.push('\n');

    let ladder = &group.ladder;
    let mut positions = text::table(
        &["Captured", "Sealed", "Cached", "Applied", "Oldest kept", "Points"],
        &[0, 1, 2, 3, 4, 5],
    );
    positions.add_row([
        ladder.captured.to_string(),
        ladder.sealed.to_string(),
        ladder.cached.to_string(),
        ladder.applied.to_string(),
        if group.points == 0 { "-".to_owned() } else { ladder.oldest_kept.to_string() },
        group.points.to_string(),
    ]);
    let _ = writeln!(out, "{positions}");

    let lag = match group.lag_seconds {
        Some(seconds) => text::span(Duration::from_secs_f64(seconds.clamp(0.0, 1e9))),
        None => "no recovery point yet".to_owned(),
    };
    let _ = writeln!(
        out,
        "Lag:        {lag}; {} not applied (to be read {}, at the agent {}, in the cache {})",
        group.lag_bytes, group.lag.remaining, group.lag.agent, group.lag.cache
    );
    if let Some(proof) = &group.proof {
        let (when, _) = text::instant(proof.proven);
        let _ = writeln!(
            out,
            "Proven:     point {} came up in {}, {when}",
            proof.epoch,
            text::span(Duration::from_millis(proof.took_ms))
        );
    }
    let rate = |value: Option<f64>| value.map_or_else(|| "unknown".to_owned(), text::rate);
    let mode = group.mode.map_or_else(|| "unknown".to_owned(), |mode| mode.to_string());
    let _ = writeln!(
        out,
        "Throughput: written {}, sent {}, applied {}; capture mode {mode}",
        rate(group.churn_bytes_per_s),
        rate(group.sent_bytes_per_s),
        rate(group.applied_bytes_per_s),
    );
    for note in &group.capture_notes {
        let _ = writeln!(out, "Capture:    {note}");
    }
    if let Some(capture) = &group.capture {
        let _ = writeln!(
            out,
            "Agent:      ring {} of {}, epochs {} of {}, in memory {}, processors {:.2}, missed writes {}, \
             overflows {}, reported {} ago",
            capture.ring_used,
            capture.ring_bytes,
            capture.epoch_memory_used,
            capture.epoch_memory_limit,
            capture.memory_resident,
            capture.processors_used,
            capture.missed_writes_total,
            capture.overflow_total,
            text::span(Duration::from_secs_f64(capture.report_age_seconds.clamp(0.0, 1e9))),
        );
        if capture.suspect_bytes > ByteCount::ZERO || capture.compared_bytes > ByteCount::ZERO {
            let _ = writeln!(
                out,
                "Compared:   {} with the replica, of which {} were different; {} still to compare",
                capture.compared_bytes, capture.different_bytes, capture.suspect_bytes,
            );
        }
    }

    if let Some(slow) = &group.bottleneck {
        let _ = writeln!(out, "Bottleneck: {}: {}", slow.stage, slow.why);
        if slow.coalesced > ByteCount::ZERO {
            let _ = writeln!(
                out,
                "            of {} at the agent only the last state will be sent",
                slow.coalesced
            );
        }
    }
    if let Some(resync) = &group.resync {
        out.push_str(&resync_text(resync));
    }

    if !group.volumes.is_empty() {
        let heading = ["Volume", "Device", "Size", "Mode", "To be read", "Read"];
        let mut table = text::table(&heading, &[2, 4, 5]);
        for volume in &group.volumes {
            table.add_row([
                volume.volume.name.clone(),
                volume.device.clone(),
                volume.volume.size.to_string(),
                volume.mode.to_string(),
                volume.dirty_bytes.saturating_add(volume.draining_bytes).to_string(),
                volume.drained_total.to_string(),
            ]);
        }
        let _ = writeln!(out, "{table}");
    } else if !group.replicas.is_empty() {
        let mut table = text::table(&["Volume", "Size"], &[1]);
        for volume in &group.replicas {
            table.add_row([volume.name.clone(), volume.size.to_string()]);
        }
        let _ = writeln!(out, "{table}");
    }

    for warning in &group.warnings {
        let _ = writeln!(out, "Warning:    {warning}");
    }
    for stage in &group.stages {
        if stage.state.severity() > Severity::Good || stage.last_error.is_some() {
            let error =
                stage.last_error.as_ref().map_or_else(String::new, |error| format!(" Last error: {error}"));
            let next = stage.next_try_seconds.map_or_else(String::new, |seconds| {
                format!(" Next try in {}, or when it is back.", text::span(Duration::from_secs_f64(seconds)))
            });
            let _ = writeln!(out, "{}: {}. {}{error}{next}", stage.stage, stage.state, stage.state.meaning());
        }
    }
    out
}

fn resync_text(resync: &ResyncStatus) -> String {
    let ResyncStatus { reason, why, bytes, compared, different, send_estimate, .. } = resync;
    let volumes = resync.volumes.join(", ");
    let takes = text::span(Duration::from_secs(resync.seconds_estimate));
    let mut shown = format!("Resync:     of {volumes}, because ({reason}) {why}\n            ");
    match resync.stage {
        ResyncStage::WaitingForWindow => {
            let when = resync
                .begins
                .map_or_else(|| "when its hours come".to_owned(), |begins| text::instant(begins).0);
            let _ = writeln!(
                shown,
                "waits until {when}, or for `seawall resync`; {bytes} to compare, about {takes}, at most {send_estimate} to send"
            );
        }
        ResyncStage::WaitingForTurn => {
            let ahead = resync.ahead.map_or_else(String::new, |ahead| format!(", {ahead} before it"));
            let _ = writeln!(
                shown,
                "waits for its turn at the process server{ahead}; {bytes} to compare, about {takes}"
            );
        }
        ResyncStage::Comparing => {
            let _ = writeln!(
                shown,
                "{compared} of {bytes} compared, {different} different; about {send_estimate} to send in all, {takes} left"
            );
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use control::StateCode;

    use super::super::gather::tests::{NOW, process, target};
    use super::super::gather::{self};
    use super::*;

    #[test]
    fn a_person_sees_what_is_wrong_and_what_to_do() {
        let good = overview(&gather::overview(Some(process()), Some(target()), Vec::new(), NOW));
        for expected in [
            "State: replicating",
            "Lag:        3.0 s; 12.0 MiB",
            "web-1",
            "/dev/vdb",
            "capture mode data",
            "Capture:    eBPF with",
            "Warning:    undo layers take 9.0 GiB",
        ] {
            assert!(good.contains(expected), "{expected} in\n{good}");
        }
        assert!(!good.contains("To do"), "{good}");
        let mut broken = target();
        broken.groups[0].state = StateCode::StoreFailed;
        broken.groups[0].last_error = Some("write layer 8: input/output error".into());
        let mut away = process();
        away.groups[0].targets[0].state = StateCode::Unreachable;
        away.groups[0].targets[0].next_try = Some(block::UnixNanos(away.time.0 + 240_000_000_000));
        let shown = overview(&gather::overview(Some(away), None, Vec::new(), NOW));
        assert!(shown.contains("Next try in 4"), "{shown}");
        let errors = vec!["ask the process server at c:7440: refused".to_owned()];
        let shown = overview(&gather::overview(None, Some(broken), errors, NOW));
        for expected in ["! ask the process server", "State: store-failed", "To do: ", "write layer 8"] {
            assert!(shown.contains(expected), "{expected} in\n{shown}");
        }
    }
}
