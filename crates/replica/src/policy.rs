//! How many points are kept for how long: all for a time, then one an hour, a day, a week.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use block::{Consistency, Epoch, UnixNanos};

use crate::retention::reference;

/// Rules of a policy. More are refused when it is read.
pub const RULES_MAX: usize = 16;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const WEEK: u64 = 7 * DAY;
const YEAR: u64 = 365 * DAY;

/// Which points are kept for how long, as in `all for 2h, hourly for 24h, daily for 30d, weekly for 1y`.
///
/// A rule holds for the points older than the rule before it reaches. Slots are counted in UTC from 1970, so that a day is a
/// day; of each slot the point of the best consistency is kept, the newest of those. A slot is thinned once all of it
/// is old enough, so that its layers are merged once and not again for each point. Points older than the last rule reaches
/// go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Rule>,
}

/// Keep one point of each slot, up to an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    /// In seconds; 0: all points.
    every: u64,
    /// In seconds.
    age: u64,
}

/// A text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "read retention policy: {problem} in {part:?}; expected rules such as `all for 2h, hourly for 24h, daily for 30d, \
     weekly for 1y`, each longer than the one before"
)]
pub struct PolicyError {
    part: String,
    problem: String,
}

/// A point that a policy decides about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) epoch: Epoch,
    pub(crate) cut: UnixNanos,
    pub(crate) consistency: Consistency,
}

impl Policy {
    /// Why each of the points, in order, is kept: the number of the rule; `None` for one that is not. The newest is
    /// always kept.
    pub(crate) fn keep(&self, points: &[Candidate], now: UnixNanos) -> Vec<Option<usize>> {
        let Some(newest) = points.last() else { return Vec::new() };
        let reference = reference(newest.cut, now).0;
        let mut kept = vec![None; points.len()];
        // The best of each slot that is thinned.
        let mut best: HashMap<(usize, u64), usize> = HashMap::new();
        for (index, point) in points.iter().enumerate() {
            let age = reference.saturating_sub(point.cut.0);
            let Some(number) = self.rules.iter().position(|rule| age <= nanos(rule.age)) else { continue };
            let rule = self.rules[number];
            if rule.every == 0 {
                kept[index] = Some(number);
                continue;
            }
            let slot = point.cut.0 / nanos(rule.every);
            let ends = (slot + 1).saturating_mul(nanos(rule.every));
            let since = if number == 0 { 0 } else { nanos(self.rules[number - 1].age) };
            if ends.saturating_add(since) > reference {
                kept[index] = Some(number);
                continue;
            }
            let held = best.entry((number, slot)).or_insert(index);
            if points[*held].consistency <= point.consistency {
                *held = index;
            }
        }
        for ((number, _), index) in best {
            kept[index] = Some(number);
        }
        if let Some(newest) = kept.last_mut() {
            newest.get_or_insert(0);
        }
        kept
    }

    /// What a rule is called, as in `hourly for 24h`.
    pub(crate) fn rule(&self, number: usize) -> String {
        self.rules.get(number).map(Rule::to_string).unwrap_or_default()
    }
}

fn nanos(seconds: u64) -> u64 {
    seconds.saturating_mul(1_000_000_000)
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.every {
            0 => f.write_str("all")?,
            HOUR => f.write_str("hourly")?,
            DAY => f.write_str("daily")?,
            WEEK => f.write_str("weekly")?,
            every => write!(f, "every {}", Span(every))?,
        }
        write!(f, " for {}", Span(self.age))
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, rule) in self.rules.iter().enumerate() {
            write!(f, "{}{rule}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Seconds, shown in the largest unit that they are a multiple of.
struct Span(u64);

const UNITS: [(&str, u64); 6] = [("y", YEAR), ("w", WEEK), ("d", DAY), ("h", HOUR), ("m", MINUTE), ("s", 1)];

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A day is said as 24h, as people do.
        let fits = |seconds: u64| self.0.is_multiple_of(seconds) && (self.0 / seconds > 1 || seconds != DAY);
        let (unit, seconds) = UNITS.into_iter().find(|(_, seconds)| fits(*seconds)).unwrap_or(("s", 1));
        write!(f, "{}{unit}", self.0 / seconds)
    }
}

/// A number with a unit, such as `90s`, `15m`, `24h`, `30d`, `2w`, `1y`.
///
/// # Errors
/// When it is none, or 0, or not to be counted in seconds.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text[digits.len()..].trim();
    let seconds = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, seconds)| *seconds);
    let seconds = seconds.ok_or_else(|| format!("{text:?} has no unit of s, m, h, d, w, y"))?;
    let count: u64 = digits.parse().map_err(|_| format!("{text:?} begins with no whole number"))?;
    match count.checked_mul(seconds) {
        None | Some(0) => Err(format!("{text:?} is no length of time")),
        Some(seconds) => Ok(Duration::from_secs(seconds)),
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        let mut rules: Vec<Rule> = Vec::new();
        for part in text.split(',') {
            let part = part.trim();
            let refuse = |problem: String| PolicyError { part: part.chars().take(64).collect(), problem };
            let (what, age) =
                part.split_once(" for ").ok_or_else(|| refuse("there is no `... for ...`".to_owned()))?;
            let every = match what.trim() {
                "all" => 0,
                "hourly" => HOUR,
                "daily" => DAY,
                "weekly" => WEEK,
                other => match other.strip_prefix("every ") {
                    Some(span) => parse_span(span).map_err(refuse)?.as_secs(),
                    None => {
                        return Err(refuse(format!(
                            "{other:?} is none of all, hourly, daily, weekly, every ..."
                        )));
                    }
                },
            };
            let age = parse_span(age).map_err(refuse)?.as_secs();
            if let Some(before) = rules.last() {
                if age <= before.age {
                    return Err(refuse(format!("it reaches no further than `{before}`")));
                }
                if every <= before.every {
                    return Err(refuse(format!("it keeps no fewer points than `{before}`")));
                }
            }
            if every > age {
                return Err(refuse("it is over before its first slot is".to_owned()));
            }
            if rules.len() == RULES_MAX {
                return Err(refuse(format!("there are more than {RULES_MAX} rules")));
            }
            rules.push(Rule { every, age });
        }
        Ok(Policy { rules })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(text: &str) -> Policy {
        text.parse().unwrap()
    }

    #[test]
    fn policies_are_read_and_shown() {
        for text in [
            "all for 2h, hourly for 24h, daily for 30d, weekly for 1y",
            "all for 90s",
            "every 15m for 6h, every 6h for 2w",
        ] {
            assert_eq!(policy(text).to_string(), text);
        }
        assert_eq!(policy("all for 120m,hourly for 1d"), policy("all for 2h, hourly for 24h"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, says) in [
            ("", "no `... for ...`"),
            ("all", "no `... for ...`"),
            ("all for 2h, ", "no `... for ...` in \"\""),
            ("most for 2h", "none of all, hourly"),
            ("all for 2", "no unit"),
            ("all for h", "no whole number"),
            ("all for 0h", "no length of time"),
            ("all for 99999999999999999999y", "no whole number"),
            ("all for 9999999999999999y", "no length of time"),
            ("all for 2h, hourly for 1h", "reaches no further than `all for 2h`"),
            ("hourly for 24h, all for 30d", "keeps no fewer points than `hourly for 24h`"),
            ("daily for 3h", "over before"),
            ("every for 3h", "none of all"),
        ] {
            let error = text.parse::<Policy>().unwrap_err().to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    /// Points every `step` seconds up to `until`.
    fn points(step: u64, until: u64) -> Vec<Candidate> {
        let point = |number: u64| Candidate {
            epoch: Epoch(number + 1),
            cut: UnixNanos(nanos(number * step)),
            consistency: Consistency::Crash,
        };
        (0..=until / step).map(point).collect()
    }

    fn ages(policy: &Policy, points: &[Candidate]) -> Vec<u64> {
        let newest = points.last().unwrap().cut;
        let kept = policy.keep(points, UnixNanos(u64::MAX));
        let ages = points.iter().zip(kept).filter(|(_, kept)| kept.is_some());
        ages.map(|(point, _)| newest.since(point.cut).as_secs() / MINUTE).collect()
    }

    #[test]
    fn of_each_slot_the_newest_is_kept() {
        // Every 10 minutes, for 30 hours; the newest at 06:00 of the second day.
        let points = points(10 * MINUTE, 30 * HOUR);
        let found = ages(&policy("all for 2h, hourly for 24h, daily for 30d"), &points);
        // What is older than 24 h is a day of which a part is younger, so all that there is of it stays.
        let mut expected: Vec<u64> = (24 * 6 + 1..=30 * 6).rev().map(|ten| ten * 10).collect();
        // At 23:50, 22:50 and so on before; 07:00 to 03:50 of the day, hour by hour.
        expected.extend((2..24).rev().map(|hour| hour * 60 + 10));
        expected.extend((0..=12).rev().map(|ten| ten * 10));
        assert_eq!(found, expected);
    }

    #[test]
    fn better_consistency_wins_in_a_slot() {
        let mut points = points(10 * MINUTE, 10 * HOUR);
        points[13].consistency = Consistency::Application;
        points[15].consistency = Consistency::Filesystem;
        let kept = policy("all for 1h, hourly for 24h").keep(&points, UnixNanos(u64::MAX));
        assert_eq!(kept[12..18], [None, Some(1), None, None, None, None]);
        assert_eq!(kept[18..24], [None, None, None, None, None, Some(1)]);
    }

    #[test]
    fn neither_silence_nor_a_clock_ahead_drops_points() {
        let points = points(10 * MINUTE, HOUR);
        let policy = policy("all for 2h");
        assert!(policy.keep(&points, UnixNanos(u64::MAX)).iter().all(Option::is_some));
        let mut ahead = points;
        ahead.last_mut().unwrap().cut = UnixNanos(nanos(YEAR));
        let kept = policy.keep(&ahead, UnixNanos(nanos(HOUR)));
        assert!(kept.iter().all(Option::is_some));
    }

    proptest! {
        /// Deciding again and again, as time goes on, keeps what deciding once would keep a point of: in every slot that had
        /// points and is within reach there is one.
        #[test]
        fn thinning_step_by_step_leaves_a_point_in_each_slot(
            steps in prop::collection::vec((1_u64..40, 0_usize..4), 1..400),
        ) {
            let policy = policy("all for 1h, every 2h for 12h, every 6h for 48h");
            let mut all: Vec<Candidate> = Vec::new();
            let mut live: Vec<Candidate> = Vec::new();
            let mut time = nanos(1000 * DAY);
            for (index, (minutes, kind)) in steps.iter().enumerate() {
                time += nanos(minutes * MINUTE);
                let consistency = [Consistency::Crash, Consistency::Filesystem, Consistency::Application][*kind % 3];
                let point = Candidate { epoch: Epoch(index as u64 + 1), cut: UnixNanos(time), consistency };
                all.push(point);
                live.push(point);
                let kept = policy.keep(&live, UnixNanos(u64::MAX));
                live = live.into_iter().zip(kept).filter(|(_, kept)| kept.is_some()).map(|(point, _)| point).collect();
                prop_assert_eq!(live.last().unwrap().epoch, point.epoch);
                let has = |from: u64, to: u64, points: &[Candidate]| points.iter().any(|point| (from..to).contains(&point.cut.0));
                // The last hour is whole.
                let young = |point: &&Candidate| time - point.cut.0 <= nanos(HOUR);
                prop_assert_eq!(all.iter().filter(young).count(), live.iter().filter(young).count());
                for (every, since, until) in [(2 * HOUR, HOUR, 12 * HOUR), (6 * HOUR, 12 * HOUR, 48 * HOUR)] {
                    let every = nanos(every);
                    for slot in (time - nanos(until)) / every + 1..(time - nanos(since)) / every {
                        let (from, to) = (slot * every, (slot + 1) * every);
                        prop_assert_eq!(has(from, to, &all), has(from, to, &live), "slot {}", slot);
                    }
                }
            }
        }
    }
}
