//! The timeline of recovery points: how far back one can go, how densely, and how consistent.

use block::Consistency;
use control::PointInfo;
use control::fleet::{GroupInfo, PointList, Policy, UnixMillis};
use maud::{Markup, html};

use super::words;

/// The picture's size, in units of its own.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = 16.0;
const LANE: f64 = 34.0;
const TOP: f64 = 24.0;
/// The youngest age on the axis, in seconds; ages grow to the left, each doubling as wide as the other.
const YOUNGEST_S: f64 = 1.0;
/// Points in the table below the picture.
const ROWS: usize = 20;

const LANES: [(Consistency, &str); 3] = [
    (Consistency::Application, "application"),
    (Consistency::Filesystem, "filesystem"),
    (Consistency::Crash, "crash"),
];

const TICKS: [(f64, &str); 8] = [
    (1.0, "now"),
    (10.0, "10 s"),
    (60.0, "1 min"),
    (600.0, "10 min"),
    (3600.0, "1 h"),
    (86_400.0, "1 day"),
    (604_800.0, "1 week"),
    (31_536_000.0, "1 year"),
];

/// Where ages lie: logarithmic, so that the last minute and the last year have room.
struct Axis {
    oldest_s: f64,
}

impl Axis {
    fn x(&self, age_s: f64) -> f64 {
        let part = (age_s.max(YOUNGEST_S) / YOUNGEST_S).ln() / (self.oldest_s / YOUNGEST_S).ln();
        WIDTH - RIGHT - part.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }
}

fn age_s(point: &PointInfo, now: UnixMillis) -> f64 {
    now.since(words::millis(point.cut_time)) as f64 / 1000.0
}

fn described(point: &PointInfo) -> String {
    let mut text = format!("epoch {}, {}", point.epoch, point.consistency);
    if let Some(label) = &point.note.label {
        text.push_str(&format!(", {label}"));
    }
    if point.pin.is_some() {
        text.push_str(", pinned");
    }
    if let Some(why) = &point.kept_for {
        text.push_str(&format!(", kept: {why}"));
    }
    if point.unusable.is_some() {
        text.push_str(", cannot be used");
    }
    text
}

/// The stretches of the policy's rules, the densest first: name, from and to in seconds of age.
fn rules(policy: &Policy) -> Vec<(&'static str, f64, f64)> {
    let mut from = YOUNGEST_S;
    let mut rules = Vec::new();
    for rule in &policy.retention {
        let name = match rule.every_s {
            0 => "all",
            3600 => "hourly",
            86_400 => "daily",
            _ => "weekly",
        };
        rules.push((name, from, rule.for_s as f64));
        from = rule.for_s as f64;
    }
    rules
}

fn picture(group: &GroupInfo, points: &[PointInfo], policy: &Policy) -> Markup {
    let now = UnixMillis::now();
    let oldest = points.iter().map(|point| age_s(point, now)).fold(600.0, f64::max);
    let axis = Axis { oldest_s: oldest * 1.3 };
    let bottom = TOP + LANE * LANES.len() as f64;
    let pos = |value: f64| format!("{value:.1}");
    html! {
        div.timeline tabindex="0" role="group" aria-label="Timeline of recovery points, the newest at the right" {
            svg viewBox=(format!("0 0 {WIDTH} {}", bottom + 24.0)) {
                @for (number, (name, from, to)) in rules(policy).into_iter().filter(|rule| rule.1 < axis.oldest_s).enumerate() {
                    @let (left, right) = (axis.x(to), axis.x(from));
                    rect.rule.odd[number % 2 == 1] x=(pos(left)) y="2" width=(pos(right - left)) height=(pos(bottom - 2.0)) {
                        title { "Retention: " (name) }
                    }
                    @if right - left > 40.0 {
                        text.rule-name x=(pos((left + right) / 2.0)) y="15" text-anchor="middle" { (name) }
                    }
                }
                @for (lane, (_, name)) in LANES.iter().enumerate() {
                    @let y = TOP + LANE * (lane as f64 + 0.5);
                    text.lane x="4" y=(pos(y + 4.0)) { (name) }
                    line.lane x1=(pos(LEFT)) x2=(pos(WIDTH - RIGHT)) y1=(pos(y)) y2=(pos(y)) {}
                }
                @for (age, name) in TICKS.iter().filter(|(age, _)| *age <= axis.oldest_s) {
                    line.tick x1=(pos(axis.x(*age))) x2=(pos(axis.x(*age))) y1=(pos(bottom)) y2=(pos(bottom + 5.0)) {}
                    text.tick x=(pos(axis.x(*age))) y=(pos(bottom + 18.0)) text-anchor="middle" { (name) }
                }
                @for point in points {
                    @let lane = LANES.iter().position(|(consistency, _)| *consistency == point.consistency).unwrap_or(2);
                    @let (x, y) = (axis.x(age_s(point, now)), TOP + LANE * (lane as f64 + 0.5));
                    a href=(format!("/groups/{}/points/{}", group.id, point.epoch)) tabindex="-1" {
                        @if point.pin.is_some() { circle.pin cx=(pos(x)) cy=(pos(y)) r="9" {} }
                        circle.point.(point.consistency).leaves[point.kept_for.is_none()].unusable[point.unusable.is_some()]
                            cx=(pos(x)) cy=(pos(y)) r="5" { title { (described(point)) } }
                    }
                }
            }
        }
        p.legend {
            span { span.key.point.application aria-hidden="true" {} "application" }
            span { span.key.point.filesystem aria-hidden="true" {} "filesystem" }
            span { span.key.point.crash aria-hidden="true" {} "crash" }
            span { span.key.pinned aria-hidden="true" {} "pinned" }
            span { span.key.point.leaves aria-hidden="true" {} "retention lets it go next" }
        }
    }
}

fn table(group: &GroupInfo, points: &[PointInfo]) -> Markup {
    let named = |point: &&PointInfo| point.pin.is_some() || point.note.label.is_some();
    let newest: Vec<&PointInfo> = points.iter().rev().take(ROWS / 2).collect();
    let others = points.iter().rev().skip(ROWS / 2).filter(named).take(ROWS / 2);
    let rows: Vec<&PointInfo> = newest.into_iter().chain(others).collect();
    html! {
        table.cards {
            thead { tr { th { "Point" } th { "Taken" } th { "Consistency" } th.number { "Changed" } th { "Kept" } } }
            tbody {
                @for point in rows {
                    tr {
                        td data-label="Point" {
                            a href=(format!("/groups/{}/points/{}", group.id, point.epoch)) { "epoch " (words::number(point.epoch.0)) }
                            @if let Some(label) = &point.note.label { " " span.label { (label) } }
                        }
                        td data-label="Taken" { (words::when(words::millis(point.cut_time))) }
                        td data-label="Consistency" { (point.consistency) }
                        td.number.minor data-label="Changed" { (words::bytes(point.changed_bytes.get())) }
                        td.minor data-label="Kept" { (kept(point)) }
                    }
                }
            }
        }
    }
}

/// Why retention keeps a point.
pub(super) fn kept(point: &PointInfo) -> Markup {
    html! {
        @match (&point.unusable, &point.kept_for) {
            (Some(why), _) => { (words::badge(control::Severity::Trouble, "cannot be used")) " " (why) }
            (None, Some(why)) => { (why) }
            (None, None) => { span.quiet { "goes with the next thinning" } }
        }
    }
}

/// The points as they were told last.
pub(super) fn show(group: &GroupInfo, list: &PointList, policy: &Policy) -> Markup {
    html! {
        @match list.time {
            None if group.newest_point.is_none() => { p.quiet { "There is no recovery point yet." } }
            None => { p.quiet role="status" { "The target is asked for the list; it takes a few seconds." } }
            Some(time) => {
                p.quiet { (words::count(group.points, "point", "points")) "; told " (words::ago(time))
                    @if list.omitted > 0 { ". " (words::number(list.points.len() as u64)) " of them are shown: the newest, those with a name, a pin or more than crash consistency, and of the others some" } "." }
                @if !list.points.is_empty() {
                    (picture(group, &list.points, policy))
                    (table(group, &list.points))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_grow_to_the_left_and_stay_in_the_picture() {
        let axis = Axis { oldest_s: 86_400.0 };
        let places: Vec<f64> = [-5.0, 0.0, 1.0, 60.0, 3600.0, 86_400.0, 1e12].map(|age| axis.x(age)).to_vec();
        assert!(places.is_sorted_by(|later, earlier| later >= earlier), "{places:?}");
        assert!(places.iter().all(|x| (LEFT..=WIDTH - RIGHT).contains(x)), "{places:?}");
        assert!(places[3] - places[4] > 100.0, "an hour is far from a minute: {places:?}");
    }

    #[test]
    fn rules_follow_each_other() {
        let rules = rules(&Policy::default());
        assert_eq!(rules.iter().map(|rule| rule.0).collect::<Vec<_>>(), ["all", "hourly", "daily", "weekly"]);
        assert!(rules.windows(2).all(|pair| pair[0].2 == pair[1].1));
    }
}
