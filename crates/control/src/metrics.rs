//! What each part tells Prometheus: the figures of its status, in the text format 0.0.4
//! (prometheus.io/docs/instrumenting/exposition_formats).
//!
//! Names are for ever: dashboards and alerts use them. docs/metrics.md is [`document`].

use std::fmt::Write as _;

use block::{Epoch, UnixNanos};

use crate::{AgentReport, ProcessServerStatus, Severity, StateCode, TargetServerStatus};

/// What a metric's value does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows, and begins at 0 when the part starts.
    Counter,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        }
    }
}

/// A metric.
#[derive(Debug, PartialEq, Eq)]
pub struct Metric {
    /// As Prometheus knows it.
    pub name: &'static str,
    /// What its value does.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it is, with the unit.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($name:ident $metric:literal $kind:ident [$($label:literal)*] $help:literal)*) => {
        $(#[doc = $help]
        pub static $name: Metric =
            Metric { name: $metric, kind: Kind::$kind, labels: &[$($label),*], help: $help };)*

        /// All of them.
        pub static ALL: &[&Metric] = &[$(&$name),*];
    };
}

metrics! {
    BUILD "seawall_build_info" Gauge ["part" "version"] "1; which part this is, and its version."
    STATE "seawall_state" Gauge ["part" "group" "state"]
        "1 for the state that the part, or its part of a group, is in; see the list of state codes."
    TROUBLE "seawall_trouble" Gauge ["part" "group"]
        "How much the state matters: 0 good, 1 to be noticed, 2 a person is needed."
    PROCESS_CPU "seawall_process_cpu_seconds_total" Counter ["part"] "Processor time used by the process, in seconds."
    PROCESS_MEMORY "seawall_process_resident_bytes" Gauge ["part"] "Memory of the process that is in use, in bytes."

    CAPTURED "seawall_agent_captured_epoch" Gauge ["group"] "The epoch that is open."
    SEALED "seawall_agent_sealed_epoch" Gauge ["group"] "The last epoch that was sealed."
    AGENT_CACHED "seawall_agent_cached_epoch" Gauge ["group"] "The last epoch that the process server has confirmed."
    AGENT_APPLIED "seawall_agent_applied_epoch" Gauge ["group"] "The last epoch that the target has confirmed."
    SEALED_TIME "seawall_agent_sealed_cut_timestamp_seconds" Gauge ["group"]
        "When the last sealed epoch was cut, in seconds since 1970."
    WRITTEN "seawall_agent_written_bytes_total" Counter ["group"] "Written to the protected disks, in bytes."
    SENT "seawall_agent_sent_bytes_total" Counter ["group"] "Sent to the process server, in bytes."
    MISSED "seawall_agent_missed_writes_total" Counter ["group"]
        "Writes whose data was not captured and is read from the disk."
    OVERFLOWS "seawall_agent_ring_overflows_total" Counter ["group"] "How often the ring was full."
    RING_USED "seawall_agent_ring_used_bytes" Gauge ["group"] "Captured and not yet consumed, in bytes."
    RING_SIZE "seawall_agent_ring_size_bytes" Gauge ["group"] "Size of the ring, in bytes."
    MEMORY_USED "seawall_agent_epoch_memory_used_bytes" Gauge ["group"] "Memory of open and unsent epochs, in bytes."
    MEMORY_LIMIT "seawall_agent_epoch_memory_limit_bytes" Gauge ["group"] "The limit of that, in bytes."
    UNSENT "seawall_agent_unsent_bytes" Gauge ["group"] "Sealed and not yet sent, in bytes."
    COALESCING "seawall_agent_coalescing" Gauge ["group"]
        "1 while so many epochs wait that later writes replace earlier ones in the open epoch."
    SUSPECT "seawall_agent_suspect_bytes" Gauge ["group"] "To be compared with the replica, in bytes."
    COMPARED "seawall_agent_compared_bytes_total" Counter ["group"] "Compared with the replica, in bytes."
    DIFFERENT "seawall_agent_different_bytes_total" Counter ["group"] "Of these, different, in bytes."
    VOLUME_SIZE "seawall_agent_volume_size_bytes" Gauge ["group" "volume"] "Size of a volume, in bytes."
    VOLUME_DIRTY "seawall_agent_volume_dirty_bytes" Gauge ["group" "volume"]
        "To be read, or being read, from a volume's disk, in bytes."
    VOLUME_MODE "seawall_agent_volume_capture_mode" Gauge ["group" "volume" "mode"]
        "1 for how the volume's writes are captured: data, scan, bitmap or lost."

    CACHE_USED "seawall_process_cache_used_bytes" Gauge [] "Space that the cache uses, in bytes."
    CACHE_LIMIT "seawall_process_cache_limit_bytes" Gauge [] "Space that the cache may use, in bytes."
    FSYNC "seawall_process_fsync_seconds" Gauge ["quantile"] "Time of an fsync of the cache, in seconds."
    RESYNCS "seawall_process_resyncs" Gauge [] "Groups that compare their disks now."
    RESYNCS_WAITING "seawall_process_resyncs_waiting" Gauge [] "Groups that wait for their turn to."
    CONNECTED "seawall_process_agent_connected" Gauge ["group"] "1 while the group's agent is connected."
    CACHED "seawall_process_cached_epoch" Gauge ["group"] "The last epoch that is cached durably."
    CACHED_BYTES "seawall_process_cached_bytes" Gauge ["group"] "Cached and not applied by every target, in bytes."
    RECEIVED "seawall_process_received_bytes_total" Counter ["group"] "Received from the agent, in bytes."
    LINK_CONNECTED "seawall_process_target_connected" Gauge ["group" "target"] "1 while the target is connected."
    LINK_APPLIED "seawall_process_target_applied_epoch" Gauge ["group" "target"] "The last epoch that it has applied."
    LINK_BACKLOG "seawall_process_target_backlog_bytes" Gauge ["group" "target"]
        "Cached and not applied by it, in bytes."
    LINK_SENT "seawall_process_target_sent_bytes_total" Counter ["group" "target"] "Sent to it, in bytes."

    APPLIED "seawall_target_applied_epoch" Gauge ["group"] "The last epoch that is applied durably."
    APPLIED_TIME "seawall_target_applied_cut_timestamp_seconds" Gauge ["group"]
        "When that epoch was cut, in seconds since 1970."
    APPLIED_BYTES "seawall_target_applied_bytes_total" Counter ["group"] "Applied, in bytes."
    APPLY "seawall_target_apply_seconds" Gauge ["group" "quantile"] "Time of applying an epoch, in seconds."
    POINTS "seawall_target_points" Gauge ["group"] "Recovery points."
    NEWEST "seawall_target_newest_point_timestamp_seconds" Gauge ["group"]
        "When the newest recovery point was cut, in seconds since 1970; time() less this is the recovery point objective \
         that is reached."
    OLDEST "seawall_target_oldest_point_timestamp_seconds" Gauge ["group"]
        "When the oldest recovery point was cut, in seconds since 1970."
    UNDO "seawall_target_undo_bytes" Gauge ["group"] "Space of the undo layers, in bytes."
    WARNINGS "seawall_target_warnings" Gauge ["group"] "Things that a person should know of."
    FAILED_OVER "seawall_target_failed_over" Gauge ["group"] "1 while failed over and neither committed nor cancelled."
    EXPORTS "seawall_target_exports" Gauge [] "Recovery points that are served over NBD."

    MACHINES "seawall_fleet_machines" Gauge [] "Machines of the fleet."
    GROUPS "seawall_fleet_groups" Gauge [] "Protected groups."
    RECOVERABLE "seawall_fleet_groups_recoverable" Gauge [] "Of these, those that have a recovery point."
    IN_TROUBLE "seawall_fleet_groups_in_trouble" Gauge [] "Of these, those whose state needs a person."
    SILENT "seawall_fleet_silent_parts" Gauge [] "Parts that have not reported for longer than they should."
    WORST "seawall_fleet_worst_point_age_seconds" Gauge []
        "The oldest newest recovery point of all groups, in seconds; absent when there is none."
    JOBS "seawall_fleet_jobs" Gauge [] "Jobs under way."
    APPROVALS "seawall_fleet_approvals" Gauge [] "Acts that wait for a second person."
    ALERTS "seawall_fleet_alerts" Gauge ["kind"] "Alerts that are raised."
}

/// Values of metrics, to be told.
#[derive(Debug, Default)]
pub struct Values(Vec<(&'static Metric, Vec<String>, f64)>);

impl Values {
    /// Adds a value. The labels are in the order of the metric's.
    pub fn add(&mut self, metric: &'static Metric, labels: &[&str], value: f64) {
        debug_assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
        self.0.push((metric, labels.iter().map(|label| (*label).to_owned()).collect(), value));
    }

    /// Adds those of another part of the same process.
    pub fn append(&mut self, mut others: Values) {
        self.0.append(&mut others.0);
    }

    fn state(&mut self, part: &str, group: &str, state: StateCode) {
        self.add(&STATE, &[part, group, state.code()], 1.0);
        let severity = match state.severity() {
            Severity::Good => 0.0,
            Severity::Notice => 1.0,
            Severity::Trouble => 2.0,
        };
        self.add(&TROUBLE, &[part, group], severity);
    }

    /// What every part tells of its process.
    pub fn process(&mut self, part: &str, version: &str) {
        self.add(&BUILD, &[part, version], 1.0);
        if let Some((cpu, memory)) = own_process() {
            self.add(&PROCESS_CPU, &[part], cpu);
            self.add(&PROCESS_MEMORY, &[part], memory);
        }
    }

    /// The text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for metric in ALL {
            let mut values = self.0.iter().filter(|(of, ..)| std::ptr::eq(*of, *metric)).peekable();
            if values.peek().is_none() {
                continue;
            }
            let _ = writeln!(text, "# HELP {} {}", metric.name, metric.help);
            let _ = writeln!(text, "# TYPE {} {}", metric.name, metric.kind.as_str());
            for (_, labels, value) in values {
                text.push_str(metric.name);
                let named: Vec<String> = metric
                    .labels
                    .iter()
                    .zip(labels)
                    .map(|(name, label)| format!("{name}=\"{}\"", escaped(label)))
                    .collect();
                if !named.is_empty() {
                    let _ = write!(text, "{{{}}}", named.join(","));
                }
                let _ = writeln!(text, " {value}");
            }
        }
        text
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Processor time in seconds, and memory in use in bytes.
fn own_process() -> Option<(f64, f64)> {
    // proc(5): times are in clock ticks, of which Linux tells user space 100 a second; memory is in pages.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let time = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = resident.split_whitespace().next()?.parse().ok()?;
    Some((time / TICKS, kib * 1024.0))
}

fn epoch(epoch: Epoch) -> f64 {
    epoch.0 as f64
}

fn seconds(time: UnixNanos) -> f64 {
    time.0 as f64 / 1e9
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

/// Of an agent. `group` is what it protects, `None` while that is nothing.
pub fn of_agent(group: Option<&str>, report: &AgentReport) -> Values {
    let mut values = Values::default();
    values.process("agent", env!("CARGO_PKG_VERSION"));
    values.state("agent", group.unwrap_or_default(), report.state);
    let Some(group) = group else { return values };
    let bytes = [
        (&WRITTEN, report.written_bytes_total),
        (&SENT, report.sent_bytes_total),
        (&RING_USED, report.ring_used),
        (&RING_SIZE, report.ring_bytes),
        (&MEMORY_USED, report.epoch_memory_used),
        (&MEMORY_LIMIT, report.epoch_memory_limit),
        (&UNSENT, report.unsent_bytes),
        (&SUSPECT, report.suspect_bytes),
        (&COMPARED, report.compared_bytes),
        (&DIFFERENT, report.different_bytes),
    ];
    let figures = [
        (&CAPTURED, epoch(report.captured)),
        (&SEALED, epoch(report.sealed)),
        (&AGENT_CACHED, epoch(report.cached)),
        (&AGENT_APPLIED, epoch(report.applied)),
        (&SEALED_TIME, seconds(report.sealed_cut_time)),
        (&MISSED, report.missed_writes_total as f64),
        (&OVERFLOWS, report.overflow_total as f64),
        (&COALESCING, flag(report.coalescing)),
    ];
    for (metric, value) in figures.into_iter().chain(bytes.map(|(metric, bytes)| (metric, bytes.0 as f64))) {
        values.add(metric, &[group], value);
    }
    for volume in &report.volumes {
        let labels = [group, volume.volume.name.as_str()];
        values.add(&VOLUME_SIZE, &labels, volume.volume.size.0 as f64);
        values.add(&VOLUME_DIRTY, &labels, volume.dirty_bytes.saturating_add(volume.draining_bytes).0 as f64);
        values.add(&VOLUME_MODE, &[group, &volume.volume.name, &volume.mode.to_string()], 1.0);
    }
    values
}

/// Of a process server.
pub fn of_process_server(status: &ProcessServerStatus) -> Values {
    let mut values = Values::default();
    values.process("process-server", env!("CARGO_PKG_VERSION"));
    values.state("process-server", "", status.state);
    values.add(&CACHE_USED, &[], status.cache_used.0 as f64);
    values.add(&CACHE_LIMIT, &[], status.cache_limit.0 as f64);
    values.add(&FSYNC, &["0.5"], status.fsync_ms_p50 / 1000.0);
    values.add(&FSYNC, &["0.99"], status.fsync_ms_p99 / 1000.0);
    values.add(&RESYNCS, &[], status.resyncs as f64);
    values.add(&RESYNCS_WAITING, &[], status.resyncs_waiting as f64);
    for group in &status.groups {
        let id = group.group.to_string();
        values.state("process-server", &id, group.state);
        values.add(&CONNECTED, &[&id], flag(group.agent.is_some()));
        values.add(&CACHED, &[&id], epoch(group.cached));
        values.add(&CACHED_BYTES, &[&id], group.cached_bytes.0 as f64);
        values.add(&RECEIVED, &[&id], group.received_bytes_total.0 as f64);
        for link in &group.targets {
            let labels = [id.as_str(), link.address.as_str()];
            values.add(&LINK_CONNECTED, &labels, flag(link.connected));
            values.add(&LINK_APPLIED, &labels, epoch(link.applied));
            values.add(&LINK_BACKLOG, &labels, link.backlog_bytes.0 as f64);
            values.add(&LINK_SENT, &labels, link.sent_bytes_total.0 as f64);
        }
    }
    values
}

/// Of a target server.
pub fn of_target_server(status: &TargetServerStatus) -> Values {
    let mut values = Values::default();
    values.process("target-server", env!("CARGO_PKG_VERSION"));
    values.state("target-server", "", status.state);
    values.add(&EXPORTS, &[], status.exports.len() as f64);
    for group in &status.groups {
        let id = group.group.to_string();
        values.state("target-server", &id, group.state);
        values.add(&APPLIED, &[&id], epoch(group.applied));
        values.add(&APPLIED_TIME, &[&id], seconds(group.applied_cut_time));
        values.add(&APPLIED_BYTES, &[&id], group.applied_bytes_total.0 as f64);
        values.add(&APPLY, &[&id, "0.5"], group.apply_ms_p50 / 1000.0);
        values.add(&APPLY, &[&id, "0.99"], group.apply_ms_p99 / 1000.0);
        values.add(&POINTS, &[&id], group.points as f64);
        values.add(&UNDO, &[&id], group.undo_bytes.0 as f64);
        values.add(&WARNINGS, &[&id], group.warnings.len() as f64);
        values.add(&FAILED_OVER, &[&id], flag(group.failover.is_some()));
        if let Some(point) = &group.newest_point {
            values.add(&NEWEST, &[&id], seconds(point.cut_time));
        }
        if let Some(point) = &group.oldest_point {
            values.add(&OLDEST, &[&id], seconds(point.cut_time));
        }
    }
    values
}

/// The document that lists them all.
pub fn document() -> String {
    let mut text = String::from(
        "# Metrics\n\nEvery part tells Prometheus its figures where `--metrics HOST:PORT` says, at `/metrics`, without TLS and to whoever \
         asks: name an\naddress that only the monitoring reaches. `packaging/grafana/seawall.json` is a dashboard of them.\n\n\
         `seawall server --metrics` tells those of its three servers at one place. Processor time and memory are those of the one \
         process\nthen, once for each part.\n\n\
         | metric | kind | labels | what it is |\n|---|---|---|---|\n",
    );
    for metric in ALL {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            metric.name,
            metric.kind.as_str(),
            labels.join(", "),
            metric.help
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `SEAWALL_WRITE_DOCUMENTS=1 cargo nextest run -p control metrics` writes it anew.
    #[test]
    fn the_document_lists_every_metric() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        if std::env::var_os("SEAWALL_WRITE_DOCUMENTS").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap();
        assert!(
            kept == document(),
            "docs/metrics.md is old: set SEAWALL_WRITE_DOCUMENTS=1 and run this again"
        );
    }

    #[test]
    fn names_are_as_prometheus_wants_them() {
        for metric in ALL {
            let good = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            assert!(good(metric.name) && metric.name.starts_with("seawall_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.labels.iter().all(|label| good(label)), "{}", metric.name);
            assert_eq!(ALL.iter().filter(|other| other.name == metric.name).count(), 1, "{}", metric.name);
        }
    }

    #[test]
    fn labels_are_escaped_and_values_are_told_by_metric() {
        let mut values = Values::default();
        values.add(&VOLUME_DIRTY, &["a", "b\"\\\n"], 1.5);
        values.add(&SENT, &["a"], 3.0);
        values.add(&VOLUME_DIRTY, &["a", "c"], 0.0);
        let lines: Vec<String> = values.text().lines().map(str::to_owned).collect();
        let at =
            |line: &str| lines.iter().position(|found| found == line).unwrap_or_else(|| panic!("{lines:#?}"));
        assert_eq!(
            at("# TYPE seawall_agent_sent_bytes_total counter") + 1,
            at("seawall_agent_sent_bytes_total{group=\"a\"} 3")
        );
        let first = at(r#"seawall_agent_volume_dirty_bytes{group="a",volume="b\"\\\n"} 1.5"#);
        assert_eq!(first + 1, at("seawall_agent_volume_dirty_bytes{group=\"a\",volume=\"c\"} 0"));
        assert_eq!(lines.len(), 7);
    }
}
