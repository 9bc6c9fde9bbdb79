//! What the agent may take of this machine's processors and of the way to the process server (R10).
//!
//! Neither limit is felt by applications: sealing and sending wait, so memory fills, so the ring is not consumed, so
//! writes turn into dirty granules, which are read when there is room again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{ByteCount, size_from_text};
use jiff::civil::{Time, Weekday};
use jiff::{Timestamp, Zoned, tz::TimeZone};
use parking_lot::Mutex;
use serde::{Deserialize, Deserializer};

/// The least processor time that may be configured, in percent of one processor: with less, a group's epochs would hardly
/// be sealed.
pub const CPU_PERCENT_MIN: u32 = 5;
/// The least bandwidth that may be configured, a second: with less, status reports alone would fill the way.
pub const BANDWIDTH_MIN: ByteCount = ByteCount::kib(16);
/// Windows of the schedule; more are refused.
pub const SCHEDULE_MAX: usize = 64;
/// What was not used of a limit is kept for so long.
const BURST: Duration = Duration::from_millis(250);
/// Sent between two looks at the limit: this part of a second's bytes, but at least so many.
const SLICES_PER_S: u64 = 20;
const SLICE_BYTES_MIN: u64 = 4096;
/// The longest rest at a time, so that whoever rests hears when it is told to stop.
const REST_MAX: Duration = Duration::from_millis(100);

/// `[limits]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsSection {
    /// Percent of one processor that the agent may use; 150 is one and a half. The capture programs in the kernel, which
    /// run within the writers' own time, are not counted.
    pub cpu_percent: Option<u32>,
    /// Sent to the process server, a second, when no window of the schedule says otherwise.
    #[serde(default, deserialize_with = "some_size")]
    pub bandwidth_bytes_s: Option<ByteCount>,
    /// The time zone of the schedule, as in `Europe/Berlin`; this machine's if left out.
    pub time_zone: Option<String>,
    /// Windows of time with a bandwidth of their own; the first that fits counts.
    #[serde(default)]
    pub schedule: Vec<Window>,
}

/// `[[limits.schedule]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Days on which it begins; every day if left out.
    #[serde(default)]
    pub days: Vec<Day>,
    /// When it begins, as in `08:00`.
    #[serde(deserialize_with = "time_of_day")]
    pub from: Time,
    /// When it ends; on the next day if that is not after `from`.
    #[serde(deserialize_with = "time_of_day")]
    pub to: Time,
    /// What may be sent, a second; no limit if left out.
    #[serde(default, deserialize_with = "some_size")]
    pub bandwidth_bytes_s: Option<ByteCount>,
}

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "days have names")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl From<Weekday> for Day {
    fn from(day: Weekday) -> Day {
        match day {
            Weekday::Monday => Day::Mon,
            Weekday::Tuesday => Day::Tue,
            Weekday::Wednesday => Day::Wed,
            Weekday::Thursday => Day::Thu,
            Weekday::Friday => Day::Fri,
            Weekday::Saturday => Day::Sat,
            Weekday::Sunday => Day::Sun,
        }
    }
}

fn some_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteCount>, D::Error> {
    size_from_text(deserializer).map(Some)
}

pub(crate) fn time_of_day<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
    let text = String::deserialize(deserializer)?;
    Time::strptime("%H:%M", &text).map_err(|_| {
        serde::de::Error::custom(format!(
            "{text:?} is no time of day; write hours and minutes, as in \"08:00\""
        ))
    })
}

impl LimitsSection {
    pub(crate) fn check(&self) -> Result<(), String> {
        let most = 100 * std::thread::available_parallelism().map_or(1, usize::from) as u32;
        if let Some(percent) = self.cpu_percent.filter(|percent| *percent < CPU_PERCENT_MIN) {
            return Err(format!(
                "cpu_percent = {percent}: at least {CPU_PERCENT_MIN} of one processor (this machine has {most})"
            ));
        }
        let windows = self.schedule.iter().map(|window| window.bandwidth_bytes_s);
        if let Some(small) =
            windows.chain([self.bandwidth_bytes_s]).flatten().find(|bytes| *bytes < BANDWIDTH_MIN)
        {
            return Err(format!("bandwidth_bytes_s = {small}: at least {BANDWIDTH_MIN}"));
        }
        if self.schedule.len() > SCHEDULE_MAX {
            return Err(format!("[limits] has {} windows; at most {SCHEDULE_MAX}", self.schedule.len()));
        }
        self.zone().map(drop)
    }

    fn zone(&self) -> Result<TimeZone, String> {
        match &self.time_zone {
            None => Ok(TimeZone::system()),
            Some(name) => TimeZone::get(name).map_err(|error| format!("time_zone = {name:?}: {error}")),
        }
    }
}

/// Whether a time lies within hours that begin on one of some days (all, when there are none), and end on the next day if the end
/// is not after the beginning.
pub(crate) fn within(days: &[Day], (from, to): (Time, Time), now: &Zoned) -> bool {
    let (time, today) = (now.time(), Day::from(now.weekday()));
    let yesterday = Day::from(now.weekday().previous());
    let begins = |day| days.is_empty() || days.contains(&day);
    if from < to {
        begins(today) && from <= time && time < to
    } else {
        begins(today) && from <= time || begins(yesterday) && time < to
    }
}

/// What may be sent a second at any time.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    windows: Vec<Window>,
    otherwise: Option<ByteCount>,
    zone: TimeZone,
}

impl Schedule {
    /// Of a section that was checked.
    pub(crate) fn new(limits: &LimitsSection) -> Schedule {
        Schedule {
            windows: limits.schedule.clone(),
            otherwise: limits.bandwidth_bytes_s,
            zone: limits.zone().unwrap_or(TimeZone::UTC),
        }
    }

    /// `None`: as much as goes through.
    pub(crate) fn bandwidth(&self, now: Timestamp) -> Option<ByteCount> {
        if self.windows.is_empty() {
            return self.otherwise;
        }
        let now = now.to_zoned(self.zone.clone());
        let fits = |window: &&Window| within(&window.days, (window.from, window.to), &now);
        self.windows.iter().find(fits).map_or(self.otherwise, |window| window.bandwidth_bytes_s)
    }
}

/// Spaces out what is sent.
#[derive(Debug)]
pub(crate) struct Pacer {
    /// When what was sent is paid for.
    paid: Instant,
}

impl Pacer {
    pub(crate) fn new(now: Instant) -> Pacer {
        Pacer { paid: now }
    }

    /// How many bytes to send before asking again.
    pub(crate) fn slice(rate: ByteCount) -> usize {
        (rate.0 / SLICES_PER_S).max(SLICE_BYTES_MIN) as usize
    }

    /// How long to wait before `bytes` more are sent at `rate` a second.
    pub(crate) fn wait(&mut self, now: Instant, bytes: usize, rate: ByteCount) -> Duration {
        let begin = self.paid.max(now - BURST);
        self.paid = begin + Duration::from_secs_f64(bytes as f64 / rate.0.max(1) as f64);
        begin.saturating_duration_since(now)
    }
}

/// Keeps the agent's processor time inside its limit: whoever works asks how long to rest first.
#[derive(Clone)]
pub(crate) struct Processor(Option<Arc<Mutex<Account>>>);

/// Nanoseconds of processor time above the limit; below it if negative.
struct Account {
    share: f64,
    debt: f64,
    at: Instant,
    used: Duration,
}

impl Account {
    fn rest(&mut self, now: Instant, used: Duration) -> Duration {
        let spent = used.saturating_sub(self.used).as_secs_f64();
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.share;
        (self.at, self.used) = (now, used);
        self.debt = (self.debt + spent - earned).max(-BURST.as_secs_f64() * self.share);
        Duration::from_secs_f64((self.debt / self.share).max(0.0))
    }
}

impl Processor {
    pub(crate) fn new(limits: &LimitsSection) -> Processor {
        Processor(limits.cpu_percent.map(|percent| {
            let (share, used) = (f64::from(percent) / 100.0, process_time());
            Arc::new(Mutex::new(Account { share, debt: 0.0, at: Instant::now(), used }))
        }))
    }

    /// How long to rest now; at most [`REST_MAX`].
    pub(crate) fn rest(&self) -> Option<Duration> {
        let account = self.0.as_ref()?;
        let rest = account.lock().rest(Instant::now(), process_time());
        (rest > Duration::ZERO).then(|| rest.min(REST_MAX))
    }

    /// Rests until there is time again, or `stop` says so.
    pub(crate) fn wait(&self, stop: impl Fn() -> bool) {
        while let Some(rest) = self.rest().filter(|_| !stop()) {
            std::thread::sleep(rest);
        }
    }
}

/// Processor time that this process has used.
pub(crate) fn process_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> Result<LimitsSection, String> {
        let limits: LimitsSection = toml::from_str(text).map_err(|error| error.to_string())?;
        limits.check().map(|()| limits)
    }

    #[test]
    fn windows_count_by_day_and_time_over_midnight_too() {
        let limits = section(
            r#"
            bandwidth_bytes_s = "50MiB"
            time_zone = "Europe/Berlin"
            [[schedule]]
            days = ["mon", "tue", "wed", "thu", "fri"]
            from = "08:00"
            to = "18:00"
            bandwidth_bytes_s = "10MiB"
            [[schedule]]
            days = ["sat"]
            from = "22:00"
            to = "06:00"
        "#,
        )
        .unwrap();
        let schedule = Schedule::new(&limits);
        for (time, expected) in [
            ("2026-11-20T07:59:59+01", Some(ByteCount::mib(50))), // a Friday
            ("2026-11-20T08:00:00+01", Some(ByteCount::mib(10))),
            ("2026-11-20T17:59:59+01", Some(ByteCount::mib(10))),
            ("2026-11-20T18:00:00+01", Some(ByteCount::mib(50))),
            ("2026-07-17T07:00:00+02", Some(ByteCount::mib(50))), // in summer
            ("2026-07-17T06:00:00Z", Some(ByteCount::mib(10))),
            ("2026-11-21T12:00:00+01", Some(ByteCount::mib(50))),
            ("2026-11-21T22:00:00+01", None),
            ("2026-11-22T05:59:00+01", None), // on Sunday, begun on Saturday
            ("2026-11-22T06:00:00+01", Some(ByteCount::mib(50))),
            ("2026-11-22T23:00:00+01", Some(ByteCount::mib(50))),
        ] {
            assert_eq!(schedule.bandwidth(time.parse().unwrap()), expected, "{time}");
        }
        assert_eq!(Schedule::new(&LimitsSection::default()).bandwidth(Timestamp::now()), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("cpu_percent = 1", "cpu_percent = 1"),
            ("bandwidth_bytes_s = \"1KiB\"", "at least 16.0 KiB"),
            ("time_zone = \"Mars/Olympus\"", "Mars/Olympus"),
            ("[[schedule]]\nfrom = \"8\"\nto = \"09:00\"", "no time of day"),
            ("[[schedule]]\nfrom = \"08:00\"\nto = \"24:30\"", "no time of day"),
            ("[[schedule]]\ndays = [\"monday\"]\nfrom = \"08:00\"\nto = \"09:00\"", "monday"),
            ("[[schedule]]\nfrom = \"08:00\"\nto = \"09:00\"\nbandwidth_bytes_s = \"2\"", "at least"),
        ] {
            let error = section(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    /// However it is asked, over any time no more goes out than the rate allows and what a burst saved up.
    #[test]
    fn no_more_is_sent_than_the_rate_allows() {
        let rate = ByteCount::mib(1);
        let begin = Instant::now();
        let mut pacer = Pacer::new(begin);
        let (mut now, mut sent, mut seed) = (begin + Duration::from_secs(5), 0_usize, 7_u64);
        let first = now;
        for _ in 0..10_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bytes = (seed >> 40) as usize % Pacer::slice(rate) + 1;
            now += Duration::from_micros(seed >> 54); // the way itself takes its time
            now += pacer.wait(now, bytes, rate);
            sent += bytes;
            let allowed = (now - first + BURST).as_secs_f64() * rate.0 as f64 + Pacer::slice(rate) as f64;
            assert!(sent as f64 <= allowed, "{sent} bytes sent, {allowed} allowed");
        }
        // And it is used: a sender that always has something gets it all.
        assert!(sent as f64 >= (now - first).as_secs_f64() * rate.0 as f64 * 0.99);
    }

    #[test]
    fn processor_time_stays_inside_its_share() {
        let begin = Instant::now();
        let mut account = Account { share: 0.25, debt: 0.0, at: begin, used: Duration::ZERO };
        let (mut now, mut used) = (begin, Duration::ZERO);
        for step in 1..1000_u32 {
            let work = Duration::from_millis(u64::from(step % 40));
            now += work; // all of it on the processor
            used += work;
            now += account.rest(now, used);
            let allowed = (now - begin + BURST).as_secs_f64() * 0.25 + 1e-3;
            assert!(used.as_secs_f64() <= allowed, "{used:?} of {:?}", now - begin);
        }
        assert!(used.as_secs_f64() >= (now - begin).as_secs_f64() * 0.24);
    }
}
