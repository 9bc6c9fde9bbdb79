//! The first page: could I recover right now, and to when?

use axum::extract::Query;
use control::Severity;
use control::fleet::{AlertInfo, GroupInfo, JobInfo, Overview, Page, UnixMillis};
use maud::{Markup, html};
use serde::Deserialize;

use super::door::Visit;
use super::{Shown, event, job, layout, words};

/// Jobs and events on the overview.
const NEWEST: usize = 6;
/// Groups of one page of the overview.
const GROUPS_SHOWN: usize = 50;
/// Raised alerts on the overview; the newest, of more it says how many there are.
const ALERTS_SHOWN: usize = 10;

/// How a group stands: whether one could recover, and whether to a moment that is new enough.
pub(super) fn standing(group: &GroupInfo) -> (Severity, String) {
    let severity = group.attention();
    let text = match group.rpo_ms {
        None => "No recovery point yet".to_owned(),
        Some(_) if is_kept(group) => "Recoverable; not protected any more".to_owned(),
        Some(age) if age > group.rpo_ms_max => {
            format!("Recoverable, but to a moment older than the {} allowed", words::span(group.rpo_ms_max))
        }
        Some(_) if severity == Severity::Good => "Recoverable".to_owned(),
        Some(_) => format!("Recoverable; {}", words::readable(group.state.code())),
    };
    (severity, text)
}

/// Its protection has ended, and its points are there still.
pub(super) fn is_kept(group: &GroupInfo) -> bool {
    !group.protected
}

/// What holds its points up, in words.
pub(super) fn bottleneck(group: &GroupInfo) -> String {
    match &group.bottleneck {
        Some(found) => format!("The {}: {}", found.stage, found.why),
        None if group.severity == Severity::Good => "Nothing; everything keeps up".to_owned(),
        None => group.meaning.clone(),
    }
}

fn headline(overview: &Overview) -> Markup {
    let (severity, answer) = match (overview.groups, overview.groups_to_look_at) {
        (0, _) => (Severity::Notice, "Nothing is protected".to_owned()),
        (1, 0) => (Severity::Good, "Yes: the protected machine can be recovered".to_owned()),
        (all, 0) => {
            let all = words::number(all.max(0) as u64);
            (Severity::Good, format!("Yes: all {all} protected machines can be recovered"))
        }
        (all, some) => {
            let [all, some] = [all, some].map(|count| words::number(count.max(0) as u64));
            (Severity::Trouble, format!("Not as it should be: {some} of {all} need a look"))
        }
    };
    let (class, sign) = words::sign(severity);
    let oldest = overview.worst_rpo_ms.map(|age| UnixMillis(overview.time.0.saturating_sub(age)));
    let none = (overview.groups - overview.groups_recoverable).max(0) as u64;
    html! {
        section.answer.(class) aria-labelledby="answer" {
            p.quiet { "Could I recover right now, and to when?" }
            h1 #answer { span aria-hidden="true" { (sign) } " " (answer) }
            @if let Some(oldest) = oldest {
                p { "Each to " strong { (words::moment(oldest)) } " or later (" (words::ago(oldest)) ")"
                    @if none > 0 { "; " (words::count(none, "machine has", "machines have")) " no recovery point yet" } "." }
            } @else if overview.groups == 0 {
                p { a href="/machines" { "Choose a machine" } " and protect its disks." }
            }
        }
    }
}

fn tile(name: &str, value: i64, severity: Severity, href: &str) -> Markup {
    let (class, _) = words::sign(severity);
    html! { a.tile.(class) href=(href) { strong { (words::number(value.max(0) as u64)) } span { (name) } } }
}

/// Groups, in the order in which they come.
pub(super) fn table(groups: &[GroupInfo]) -> Markup {
    html! {
        table.cards {
            thead { tr { th { "Machine" } th { "State" } th { "Newest point" } th.number { "Age" } th.number { "Allowed" } th { "Last proven" } th { "What holds it up" } } }
            tbody {
                @for group in groups {
                    @let (severity, text) = standing(group);
                    tr {
                        td data-label="Machine" { a href=(format!("/groups/{}", group.id)) { strong { (group.name) } } }
                        td data-label="State" { (words::badge(severity, &text)) }
                        td data-label="Newest point" {
                            @match &group.newest_point {
                                Some(point) => { (words::moment(words::millis(point.cut_time))) " " span.quiet { (point.consistency) } }
                                None => { "none" }
                            }
                        }
                        td.number data-label="Age" {
                            @match &group.newest_point {
                                Some(point) => { (words::ago(words::millis(point.cut_time))) }
                                None => { "–" }
                            }
                        }
                        td.number data-label="Allowed" { (words::span(group.rpo_ms_max)) }
                        td data-label="Last proven" {
                            @match &group.proof {
                                Some(proof) => { (words::ago(words::millis(proof.proven))) ", in " (words::span(i64::try_from(proof.took_ms).unwrap_or(i64::MAX))) }
                                None => { span.quiet { "never" } }
                            }
                        }
                        td data-label="What holds it up" { (bottleneck(group)) }
                    }
                }
            }
        }
    }
}

/// What is wrong now, and what to do about it.
fn alerts(raised: &[AlertInfo]) -> Markup {
    html! {
        section aria-labelledby="alerts" {
            h2 #alerts { "Alerts" }
            @if raised.len() > ALERTS_SHOWN {
                p.quiet { "The newest " (ALERTS_SHOWN) " of " (words::number(raised.len() as u64)) " that are raised." }
            }
            table.cards {
                thead { tr { th { "Since" } th { "How" } th { "What" } th { "What to do" } } }
                tbody {
                    @for alert in raised.iter().take(ALERTS_SHOWN) {
                        @let severity = if alert.severity == "trouble" { Severity::Trouble } else { Severity::Notice };
                        tr {
                            td data-label="Since" { (words::moment(alert.raised)) " (" (words::ago(alert.raised)) ")" }
                            td data-label="How" { (words::badge(severity, &alert.severity)) }
                            td data-label="What" { (alert.message) }
                            td data-label="What to do" { (alert.mend) }
                        }
                    }
                }
            }
        }
    }
}

/// Which of the groups are shown.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Which {
    /// How many come before.
    #[serde(default)]
    from: usize,
    /// What their names have in them.
    #[serde(default)]
    name: String,
}

impl Which {
    fn address(&self, from: usize) -> String {
        format!("/?from={from}&name={}", words::in_query(&self.name))
    }
}

/// The groups of one page, and the ways to the others.
fn protected(which: &Which, groups: &Page<GroupInfo>, all: i64) -> Markup {
    let shown = groups.items.len();
    html! {
        section #machines {
            h2 { "Protected machines" }
            @if shown == 0 && which.from == 0 && which.name.is_empty() {
                (layout::nothing("None yet."))
            } @else {
                @if shown == 0 { (layout::nothing("No protected machine here has such a name.")) }
                @else { (table(&groups.items)) }
                @if all > GROUPS_SHOWN as i64 || !which.name.is_empty() {
                    nav.pages aria-label="Protected machines" {
                        span { (words::number(which.from as u64 + u64::from(shown > 0))) " to " (words::number((which.from + shown) as u64))
                            @if which.name.is_empty() { ", those that need a look first" } @else { " of those with " strong { (which.name) } " in their names" } }
                        @if which.from > 0 { a href=(which.address(which.from.saturating_sub(GROUPS_SHOWN))) rel="prev" { "Before" } }
                        @if groups.next.is_some() { a href=(which.address(which.from + GROUPS_SHOWN)) rel="next" { "Next" } }
                        @if !which.name.is_empty() { a href="/" { "All" } }
                    }
                }
            }
        }
    }
}

pub(super) async fn page(visit: Visit, Query(which): Query<Which>) -> Shown {
    let overview: Overview = visit.door.get("/overview").await?;
    let path = format!(
        "/groups?order=attention&limit={GROUPS_SHOWN}&after={}&name={}",
        which.from,
        words::in_query(&which.name)
    );
    let groups: Page<GroupInfo> = visit.door.get(&path).await?;
    let jobs: Page<JobInfo> = visit.door.get(&format!("/jobs?limit={NEWEST}")).await?;
    let events = event::newest(&visit, NEWEST).await?;
    let mut raised: Vec<AlertInfo> = visit.door.get("/alerts").await?;
    raised.retain(|alert| alert.cleared.is_none());
    let trouble_if = |count: i64| if count > 0 { Severity::Trouble } else { Severity::Good };
    let notice_if = |count: i64| if count > 0 { Severity::Notice } else { Severity::Good };
    let live = html! {
        (headline(&overview))
        section.tiles aria-label="Figures" {
            (tile("machines", overview.machines, Severity::Good, "/machines"))
            (tile("protected groups", overview.groups, Severity::Good, "/machines"))
            (tile("in trouble", overview.groups_in_trouble, trouble_if(overview.groups_in_trouble), "/"))
            (tile("silent parts", overview.silent_parts, trouble_if(overview.silent_parts), "/servers"))
            (tile("jobs under way", overview.jobs, Severity::Good, "/jobs"))
            @if visit.user.role >= control::fleet::Role::Operator {
                (tile("approvals wait", overview.approvals, notice_if(overview.approvals), "/approvals"))
            }
        }
        @if !raised.is_empty() {
            (alerts(&raised))
        }
        (protected(&which, &groups, overview.groups))
        div.columns {
            section { h2 { a href="/jobs" { "Jobs" } } (job::table(&jobs.items)) }
            section { h2 { a href="/events" { "Events" } } (event::list(&events)) }
        }
    };
    let find = html! {
        @if overview.groups > GROUPS_SHOWN as i64 {
            form.find method="get" action="/" role="search" {
                label { "Find a protected machine" input name="name" type="search" maxlength="64" value=(which.name) autocomplete="off" spellcheck="false"; }
                button { "Find" }
            }
        }
    };
    Ok(super::html(layout::page_with(&visit, "Overview", find, live, html! {})))
}
