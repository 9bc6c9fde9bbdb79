use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Name, ProofPolicy, ResourceId, UnixMillis};

/// Rules of retention in a policy. More are refused.
pub const RETENTION_RULES_MAX: usize = 16;
/// Windows of a bandwidth schedule. More are refused.
pub const WINDOWS_MAX: usize = 64;

/// How old the newest recovery point may be before a person is told, in seconds, unless a policy says otherwise.
pub const RPO_S_MAX: u64 = 900;

const RPO_S: std::ops::RangeInclusive<u64> = 1..=31 * 86_400;
const EPOCH_INTERVAL_MS: std::ops::RangeInclusive<u64> = 100..=3_600_000;
const APPLICATION_EVERY_S: std::ops::RangeInclusive<u64> = 10..=31 * 86_400;
const KEPT_FOR_S_MAX: u64 = 100 * 365 * 86_400;
const BANDWIDTH_MIN: u64 = 16 * 1024;
/// What JSON's readers can tell apart.
const BYTES_MAX: u64 = 1 << 53;
const CPU_PERCENT: std::ops::RangeInclusive<u32> = 5..=100_000;
const RING_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 30;
const MEMORY_BYTES: std::ops::RangeInclusive<u64> = 24 << 20..=64 << 30;
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// How groups are protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Between two recovery points, in milliseconds.
    #[schema(minimum = 100, maximum = 3_600_000)]
    pub epoch_interval_ms: u64,
    /// How old the newest recovery point may be, in seconds; past it the group is in trouble.
    #[serde(default = "rpo_s_max")]
    #[schema(minimum = 1, maximum = 2_678_400)]
    pub rpo_s_max: u64,
    /// Between two points that are more than crash-consistent, in seconds; 0 for none.
    #[serde(default)]
    #[schema(maximum = 2_678_400)]
    pub application_every_s: u64,
    /// What those are: filesystems are frozen only, or applications quiesced too.
    #[serde(default)]
    pub application_filesystem_only: bool,
    /// Which points are kept for how long, each rule longer than the one before.
    #[schema(min_items = 1, max_items = 16)]
    pub retention: Vec<RetentionRule>,
    /// The most that undo layers may take, in bytes; no limit when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 9_007_199_254_740_992_u64)]
    pub space_bytes_max: Option<u64>,
    /// Sent, in bytes a second, when no window says otherwise; no limit when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16384, maximum = 9_007_199_254_740_992_u64)]
    pub bandwidth_bytes_s: Option<u64>,
    /// Windows of time with a bandwidth of their own; the first that fits counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 64)]
    pub bandwidth_windows: Vec<BandwidthWindow>,
    /// Hours in which comparisons that became necessary by themselves may begin; at any time when empty; as the agent's own configuration
    /// says (evenings and weekends) when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 64)]
    pub resync_windows: Option<Vec<ResyncWindow>>,
    /// Of the windows, as in `Europe/Berlin`; the machine's own when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 64, pattern = "^[A-Za-z0-9_+/-]{1,64}$")]
    pub time_zone: Option<String>,
    /// Percent of one processor that the agent may use; no limit when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 5, maximum = 100_000)]
    pub cpu_percent: Option<u32>,
    /// Kernel memory for writes that the agent has not taken yet; the agent's default when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1_048_576, maximum = 1_073_741_824)]
    pub ring_bytes: Option<u64>,
    /// The agent's memory for what is not cached yet; the agent's default when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 25_165_824, maximum = 68_719_476_736_u64)]
    pub epoch_memory_bytes: Option<u64>,
    /// How machines are proven to come up; without it only when somebody asks for a proof.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<ProofPolicy>,
}

fn rpo_s_max() -> u64 {
    RPO_S_MAX
}

/// Keep one point of each stretch of time, up to an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RetentionRule {
    /// In seconds: 0 (all points), 3600, 86400 or 604800.
    pub every_s: u64,
    /// In seconds; more than the rule before.
    #[schema(minimum = 60)]
    pub for_s: u64,
}

/// A window of time with a bandwidth of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BandwidthWindow {
    /// Days on which it begins (mon, tue, ...); every day when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 7)]
    pub days: Vec<String>,
    /// When it begins, as in `08:00`.
    #[schema(pattern = "^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    pub from: String,
    /// When it ends; on the next day if that is not after `from`.
    #[schema(pattern = "^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    pub to: String,
    /// Sent, in bytes a second; no limit when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 16384, maximum = 9_007_199_254_740_992_u64)]
    pub bandwidth_bytes_s: Option<u64>,
}

/// Hours of some days.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResyncWindow {
    /// Days on which they begin (mon, tue, ...); every day when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 7)]
    pub days: Vec<String>,
    /// When they begin, as in `18:00`.
    #[schema(pattern = "^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    pub from: String,
    /// When they end; on the next day if that is not after `from`.
    #[schema(pattern = "^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    pub to: String,
}

impl std::fmt::Display for ResyncWindow {
    /// As in `sat sun 00:00-00:00`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.days.iter().try_for_each(|day| write!(f, "{day} "))?;
        write!(f, "{}-{}", self.from, self.to)
    }
}

impl std::str::FromStr for ResyncWindow {
    type Err = String;

    /// Reads what is displayed. Whether days and times are some is the policy's to check.
    fn from_str(text: &str) -> Result<ResyncWindow, String> {
        let mut words: Vec<&str> = text.split_whitespace().collect();
        let hours = words.pop().and_then(|hours| hours.split_once('-'));
        let (from, to) =
            hours.ok_or_else(|| format!("{text:?} are no hours; write them as in mon tue 18:00-08:00"))?;
        let days = words.into_iter().map(str::to_owned).collect();
        Ok(ResyncWindow { days, from: from.to_owned(), to: to.to_owned() })
    }
}

/// What is wrong with a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError(pub String);

impl std::fmt::Display for PolicyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PolicyError {}

impl Default for Policy {
    /// A point a second; all for a day, then one an hour for a week, one a day for a month, one a week for a year.
    fn default() -> Policy {
        let rule = |every_s, for_s| RetentionRule { every_s, for_s };
        Policy {
            epoch_interval_ms: 1000,
            rpo_s_max: RPO_S_MAX,
            application_every_s: 0,
            application_filesystem_only: false,
            retention: vec![
                rule(0, 86_400),
                rule(3600, 7 * 86_400),
                rule(86_400, 30 * 86_400),
                rule(604_800, 365 * 86_400),
            ],
            space_bytes_max: None,
            bandwidth_bytes_s: None,
            bandwidth_windows: Vec::new(),
            resync_windows: None,
            time_zone: None,
            cpu_percent: None,
            ring_bytes: None,
            epoch_memory_bytes: None,
            proof: None,
        }
    }
}

impl Policy {
    /// Looks whether every value makes sense.
    ///
    /// # Errors
    /// The first that does not, with what would.
    pub fn check(&self) -> Result<(), PolicyError> {
        let refuse = |reason: String| Err(PolicyError(reason));
        if !EPOCH_INTERVAL_MS.contains(&self.epoch_interval_ms) {
            return refuse(format!(
                "epoch_interval_ms is {}, expected 100 to 3600000",
                self.epoch_interval_ms
            ));
        }
        if !RPO_S.contains(&self.rpo_s_max) || self.rpo_s_max * 1000 < self.epoch_interval_ms {
            return refuse(format!(
                "rpo_s_max is {}, expected 1 to 2678400, and no less than epoch_interval_ms",
                self.rpo_s_max
            ));
        }
        if self.application_every_s != 0 && !APPLICATION_EVERY_S.contains(&self.application_every_s) {
            return refuse(format!(
                "application_every_s is {}, expected 0 (never) or 10 to 2678400",
                self.application_every_s
            ));
        }
        self.check_retention()?;
        let windows = self.bandwidth_windows.iter();
        let limits = windows.map(|window| window.bandwidth_bytes_s).chain([self.bandwidth_bytes_s]);
        if let Some(bad) = limits.flatten().find(|bytes| !(BANDWIDTH_MIN..=BYTES_MAX).contains(bytes)) {
            return refuse(format!("bandwidth_bytes_s is {bad}, expected {BANDWIDTH_MIN} to {BYTES_MAX}"));
        }
        if let Some(bad) = self.space_bytes_max.filter(|bytes| !(1..=BYTES_MAX).contains(bytes)) {
            return refuse(format!(
                "space_bytes_max is {bad}, expected 1 to {BYTES_MAX}; leave it out for no limit"
            ));
        }
        let resync = self.resync_windows.as_deref().unwrap_or_default();
        for (name, count) in
            [("bandwidth_windows", self.bandwidth_windows.len()), ("resync_windows", resync.len())]
        {
            if count > WINDOWS_MAX {
                return refuse(format!("{name} has {count} entries, at most {WINDOWS_MAX} go"));
            }
        }
        let windows = self.bandwidth_windows.iter().map(|window| (&window.days, [&window.from, &window.to]));
        for (days, times) in windows.chain(resync.iter().map(|hours| (&hours.days, [&hours.from, &hours.to])))
        {
            if let Some(time) = times.into_iter().find(|time| !is_time_of_day(time)) {
                return refuse(format!("{time:?} is no time of day; write it as 08:00"));
            }
            if let Some(day) = days.iter().find(|day| !DAYS.contains(&day.as_str())) {
                return refuse(format!("{day:?} is no day; write mon, tue, wed, thu, fri, sat or sun"));
            }
            if days.len() > DAYS.len() {
                return refuse("a window names more days than a week has".to_owned());
            }
        }
        let zone = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'+' | b'/' | b'-');
        if let Some(name) = &self.time_zone
            && (name.is_empty() || name.len() > 64 || !name.bytes().all(zone))
        {
            return refuse(format!("time_zone is {name:?}, expected a name such as Europe/Berlin"));
        }
        let within = |name: &str, value: Option<u64>, range: std::ops::RangeInclusive<u64>| match value {
            Some(value) if !range.contains(&value) => {
                Err(PolicyError(format!("{name} is {value}, expected {} to {}", range.start(), range.end())))
            }
            _ => Ok(()),
        };
        let cpu = u64::from(*CPU_PERCENT.start())..=u64::from(*CPU_PERCENT.end());
        within("cpu_percent", self.cpu_percent.map(u64::from), cpu)?;
        within("ring_bytes", self.ring_bytes, RING_BYTES)?;
        if let Some(ring) = self.ring_bytes.filter(|ring| !ring.is_power_of_two()) {
            return refuse(format!("ring_bytes is {ring}, expected a power of two"));
        }
        within("epoch_memory_bytes", self.epoch_memory_bytes, MEMORY_BYTES)?;
        self.proof.as_ref().map_or(Ok(()), ProofPolicy::check).map_err(PolicyError)
    }

    fn check_retention(&self) -> Result<(), PolicyError> {
        let refuse = |reason: String| Err(PolicyError(reason));
        if self.retention.is_empty() || self.retention.len() > RETENTION_RULES_MAX {
            return refuse(format!(
                "retention has {} rules, expected 1 to {RETENTION_RULES_MAX}",
                self.retention.len()
            ));
        }
        let mut before: Option<RetentionRule> = None;
        for rule in &self.retention {
            if ![0, 3600, 86_400, 604_800].contains(&rule.every_s) {
                return refuse(format!(
                    "every_s of retention is {}, expected 0 (all points), 3600, 86400 or 604800",
                    rule.every_s
                ));
            }
            if rule.for_s < 60 || rule.for_s > KEPT_FOR_S_MAX || rule.for_s % 60 != 0 {
                return refuse(format!(
                    "for_s of retention is {}, expected whole minutes, 60 to {KEPT_FOR_S_MAX}",
                    rule.for_s
                ));
            }
            if rule.every_s > rule.for_s {
                return refuse(format!(
                    "a rule of retention with every_s {} is over after {} s, before its first point",
                    rule.every_s, rule.for_s
                ));
            }
            if let Some(before) = before
                && (before.for_s >= rule.for_s || before.every_s >= rule.every_s)
            {
                return refuse(
                    "the rules of retention must follow each other: each rarer, and kept longer, than the one before"
                        .to_owned(),
                );
            }
            before = Some(*rule);
        }
        Ok(())
    }

    /// The retention in the words of a target server's configuration.
    pub fn retention_text(&self) -> String {
        let mut text = String::new();
        for rule in &self.retention {
            let every = match rule.every_s {
                0 => "all",
                3600 => "hourly",
                86_400 => "daily",
                _ => "weekly",
            };
            let (count, unit) = match rule.for_s {
                seconds if seconds % 86_400 == 0 => (seconds / 86_400, "d"),
                seconds if seconds % 3600 == 0 => (seconds / 3600, "h"),
                seconds => (seconds / 60, "m"),
            };
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{every} for {count}{unit}");
        }
        text
    }

    /// Whether some point that `self` keeps would go under `other`.
    pub fn keeps_more_than(&self, other: &Policy) -> bool {
        let shorter_space = match (self.space_bytes_max, other.space_bytes_max) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(ours), Some(theirs)) => theirs < ours,
        };
        // A rule of ours is kept by theirs when one at least as dense reaches at least as far.
        let covered = |rule: &RetentionRule| {
            let mut rules = other.retention.iter();
            rules.any(|theirs| theirs.every_s <= rule.every_s && theirs.for_s >= rule.for_s)
        };
        shorter_space || !self.retention.iter().all(covered)
    }
}

fn is_time_of_day(text: &str) -> bool {
    let Some((hours, minutes)) = text.split_once(':') else { return false };
    let number = |text: &str, below: u32| {
        text.len() == 2
            && text.bytes().all(|byte| byte.is_ascii_digit())
            && text.parse::<u32>().is_ok_and(|value| value < below)
    };
    number(hours, 24) && number(minutes, 60)
}

/// A policy to make, or what one is to become.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPolicy {
    /// Not taken yet.
    pub name: Name,
    /// What it says.
    pub policy: Policy,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyInfo {
    /// Names it for ever.
    pub id: ResourceId,
    /// What people call it.
    pub name: Name,
    /// What it says.
    pub policy: Policy,
    /// Groups that follow it.
    pub groups: i64,
    /// When it last changed.
    pub changed: UnixMillis,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_has_the_words_of_targets() {
        assert_eq!(
            Policy::default().retention_text(),
            "all for 1d, hourly for 7d, daily for 30d, weekly for 365d"
        );
        Policy::default().check().unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let bad = |change: fn(&mut Policy), named: &str| {
            let mut policy = Policy::default();
            change(&mut policy);
            let error = policy.check().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        };
        bad(|policy| policy.epoch_interval_ms = 1, "epoch_interval_ms is 1");
        bad(|policy| policy.rpo_s_max = 0, "rpo_s_max is 0");
        bad(|policy| policy.epoch_interval_ms = 1_000_000, "rpo_s_max is 900");
        bad(|policy| policy.application_every_s = 1, "application_every_s is 1");
        bad(|policy| policy.retention.clear(), "0 rules");
        bad(|policy| policy.retention.swap(0, 1), "follow each other");
        bad(|policy| policy.retention[1].every_s = 7, "every_s of retention is 7");
        bad(|policy| policy.retention[0].for_s = 61, "whole minutes");
        bad(|policy| policy.retention = vec![RetentionRule { every_s: 3600, for_s: 60 }], "before its first");
        bad(|policy| policy.bandwidth_bytes_s = Some(1), "bandwidth_bytes_s is 1");
        bad(|policy| policy.time_zone = Some("a b".into()), "time_zone");
        bad(|policy| policy.ring_bytes = Some(3 << 20), "power of two");
        bad(|policy| policy.cpu_percent = Some(1), "cpu_percent is 1");
        bad(
            |policy| policy.proof = Some(ProofPolicy { cpus: 0, ..ProofPolicy::default() }),
            "cpus of the proof",
        );
        let window = |from: &str, days: &[&str]| BandwidthWindow {
            days: days.iter().map(|day| (*day).to_owned()).collect(),
            from: from.to_owned(),
            to: "18:00".to_owned(),
            bandwidth_bytes_s: None,
        };
        for (window, named) in [
            (window("8:00", &[]), "8:00"),
            (window("24:00", &[]), "24:00"),
            (window("08:00", &["son"]), "son"),
        ] {
            let hours =
                ResyncWindow { days: window.days.clone(), from: window.from.clone(), to: window.to.clone() };
            let policy = Policy { bandwidth_windows: vec![window], ..Policy::default() };
            assert!(policy.check().unwrap_err().to_string().contains(named));
            let policy = Policy { resync_windows: Some(vec![hours]), ..Policy::default() };
            assert!(policy.check().unwrap_err().to_string().contains(named));
        }
        bad(
            |policy| policy.resync_windows = Some(vec!["18:00-08:00".parse().unwrap(); 65]),
            "resync_windows has 65",
        );
    }

    #[test]
    fn hours_are_read_as_they_are_written() {
        for text in ["18:00-08:00", "sat sun 00:00-00:00"] {
            let hours: ResyncWindow = text.parse().unwrap();
            assert_eq!(hours.to_string(), text);
            Policy { resync_windows: Some(vec![hours]), ..Policy::default() }.check().unwrap();
        }
        assert!("".parse::<ResyncWindow>().is_err() && "mon 18:00".parse::<ResyncWindow>().is_err());
    }

    #[test]
    fn shortening_is_noticed_and_lengthening_is_not() {
        let long = Policy::default();
        let mut other = long.clone();
        assert!(!long.keeps_more_than(&other));
        other.retention[3].for_s *= 2;
        assert!(!long.keeps_more_than(&other));
        assert!(other.keeps_more_than(&long));
        other.retention.remove(1);
        assert!(long.keeps_more_than(&other));
        let other = Policy { space_bytes_max: Some(1), ..long.clone() };
        assert!(long.keeps_more_than(&other) && !other.keeps_more_than(&long));
    }
}
