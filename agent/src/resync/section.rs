//! `[resync]`: when disks may be compared with their replicas by themselves.

use jiff::civil::Time;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use serde::Deserialize;

use block::UnixNanos;

use crate::limits::{Day, time_of_day, within};

/// Windows of `[resync]`; more are refused.
pub const WINDOWS_MAX: usize = 64;
/// The least and the most of a volume, in percent, that may be configured as `dirty_percent`.
pub const DIRTY_PERCENT: (u32, u32) = (1, 100);
/// How far ahead the next opening of a window is looked for.
const LOOK_AHEAD_MINUTES: i64 = 8 * 24 * 60;

/// `[resync]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResyncSection {
    /// When resyncs begin by themselves; without one, they begin at any time.
    pub window: Vec<Hours>,
    /// The time zone of the windows, as in `Europe/Berlin`; this machine's if left out.
    pub time_zone: Option<String>,
    /// When more of a volume than this was missed, in percent, all of it is compared instead of sent.
    pub dirty_percent: u32,
}

/// `[[resync.window]]`: hours of some days.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hours {
    /// Days on which it begins; every day if left out.
    #[serde(default)]
    pub days: Vec<Day>,
    /// When it begins, as in `18:00`.
    #[serde(deserialize_with = "time_of_day")]
    pub from: Time,
    /// When it ends; on the next day if that is not after `from`.
    #[serde(deserialize_with = "time_of_day")]
    pub to: Time,
}

impl Default for ResyncSection {
    fn default() -> ResyncSection {
        let midnight = Time::midnight();
        let evening =
            Hours { days: Vec::new(), from: Time::constant(18, 0, 0, 0), to: Time::constant(8, 0, 0, 0) };
        let weekend = Hours { days: vec![Day::Sat, Day::Sun], from: midnight, to: midnight };
        ResyncSection { window: vec![evening, weekend], time_zone: None, dirty_percent: 50 }
    }
}

impl ResyncSection {
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.window.len() > WINDOWS_MAX {
            return Err(format!("[resync] has {} windows; at most {WINDOWS_MAX}", self.window.len()));
        }
        if !(DIRTY_PERCENT.0..=DIRTY_PERCENT.1).contains(&self.dirty_percent) {
            let (least, most) = DIRTY_PERCENT;
            return Err(format!(
                "[resync] dirty_percent = {}: must be {least} to {most}",
                self.dirty_percent
            ));
        }
        self.zone().map(drop)
    }

    fn zone(&self) -> Result<TimeZone, String> {
        match &self.time_zone {
            None => Ok(TimeZone::system()),
            Some(name) => {
                TimeZone::get(name).map_err(|error| format!("[resync] time_zone = {name:?}: {error}"))
            }
        }
    }
}

/// The windows of a section that was checked.
pub(super) struct Windows {
    hours: Vec<Hours>,
    zone: TimeZone,
}

impl Windows {
    pub(super) fn new(section: &ResyncSection) -> Windows {
        Windows { hours: section.window.clone(), zone: section.zone().unwrap_or(TimeZone::UTC) }
    }

    /// Whether one is open; always, when there is none.
    pub(super) fn are_open(&self, now: Timestamp) -> bool {
        let now = now.to_zoned(self.zone.clone());
        self.hours.is_empty()
            || self.hours.iter().any(|hours| within(&hours.days, (hours.from, hours.to), &now))
    }

    /// The next minute at which one is open; `None` if there is none in the next days.
    pub(super) fn next_opening(&self, now: Timestamp) -> Option<UnixNanos> {
        // From the beginning of this minute, so that it does not move with the seconds.
        let minute = Timestamp::from_second(now.as_second() / 60 * 60).ok()?;
        (0..LOOK_AHEAD_MINUTES)
            .filter_map(|minutes| minute.checked_add(minutes.minutes()).ok())
            .find(|time| *time > now && self.are_open(*time) || *time <= now && self.are_open(now))
            .map(|time| UnixNanos(u64::try_from(time.as_nanosecond()).unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(text: &str) -> Windows {
        let section: ResyncSection = toml::from_str(text).unwrap();
        section.check().unwrap();
        Windows::new(&section)
    }

    #[test]
    fn evenings_and_weekends_unless_configured() {
        let windows = windows("time_zone = \"Europe/Berlin\"");
        for (time, open) in [
            ("2026-11-20T07:59:59+01", true), // a Friday
            ("2026-11-20T08:00:00+01", false),
            ("2026-11-20T12:00:00Z", false),
            ("2026-11-20T17:59:59+01", false),
            ("2026-11-20T18:00:00+01", true),
            ("2026-11-21T12:00:00+01", true), // Saturday
            ("2026-11-22T12:00:00+01", true),
            ("2026-11-23T07:00:00+01", true),
            ("2026-11-23T08:00:00+01", false),
        ] {
            assert_eq!(windows.are_open(time.parse().unwrap()), open, "{time}");
        }
        let next = |time: &str| windows.next_opening(time.parse().unwrap()).unwrap();
        let at = |time: &str| {
            let time: Timestamp = time.parse().unwrap();
            UnixNanos(time.as_nanosecond() as u64)
        };
        assert_eq!(next("2026-11-20T09:10:11+01"), at("2026-11-20T18:00:00+01"));
        assert_eq!(next("2026-11-23T17:59:30+01"), at("2026-11-23T18:00:00+01"));
    }

    #[test]
    fn no_window_is_always_and_a_night_begins_on_its_day() {
        assert!(windows("window = []").are_open("2026-11-20T12:00:00Z".parse().unwrap()));
        let windows =
            windows("time_zone = \"UTC\"\n[[window]]\ndays = [\"sun\"]\nfrom = \"22:00\"\nto = \"02:00\"");
        assert!(windows.are_open("2026-11-23T01:00:00Z".parse().unwrap())); // Monday, begun on Sunday
        assert!(!windows.are_open("2026-11-22T01:00:00Z".parse().unwrap()));
        let next = windows.next_opening("2026-11-23T02:00:00Z".parse().unwrap()).unwrap();
        let at: Timestamp = "2026-11-29T22:00:00Z".parse().unwrap();
        assert_eq!(i128::from(next.0), at.as_nanosecond());
    }
}
