//! The first page: could I recover right now, and to when?

use control::Severity;
use control::fleet::{AlertInfo, GroupInfo, JobInfo, Overview, Page};
use maud::{Markup, html};

use super::door::Visit;
use super::{Shown, event, job, layout, words};

/// Jobs and events on the overview.
const NEWEST: usize = 6;

/// How a group stands: whether one could recover, and whether to a moment that is new enough.
pub(super) fn standing(group: &GroupInfo) -> (Severity, String) {
    match group.rpo_ms {
        None => (Severity::Trouble, "No recovery point yet".to_owned()),
        Some(age) if !is_kept(group) && age > group.rpo_ms_max => (
            Severity::Trouble,
            format!("Recoverable, but to a moment older than the {} allowed", words::span(group.rpo_ms_max)),
        ),
        Some(_) if is_kept(group) => (Severity::Notice, "Recoverable; not protected any more".to_owned()),
        Some(_) if group.severity == Severity::Trouble => {
            (Severity::Trouble, format!("Recoverable; {}", words::readable(group.state.code())))
        }
        Some(_) if group.severity == Severity::Notice => {
            (Severity::Notice, format!("Recoverable; {}", words::readable(group.state.code())))
        }
        Some(_) => (Severity::Good, "Recoverable".to_owned()),
    }
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

fn headline(groups: &[GroupInfo]) -> Markup {
    let protected: Vec<&GroupInfo> = groups.iter().filter(|group| !is_kept(group)).collect();
    let good = protected.iter().filter(|group| standing(group).0 < Severity::Trouble).count();
    let oldest =
        protected.iter().filter_map(|group| group.newest_point.as_ref()).map(|point| point.cut_time).min();
    let none = protected.iter().filter(|group| group.newest_point.is_none()).count();
    let (severity, answer) = match (protected.len(), good) {
        (0, _) => (Severity::Notice, "Nothing is protected".to_owned()),
        (all, good) if all == good && all == 1 => {
            (Severity::Good, "Yes: the protected machine can be recovered".to_owned())
        }
        (all, good) if all == good => {
            (Severity::Good, format!("Yes: all {all} protected machines can be recovered"))
        }
        (all, good) => {
            (Severity::Trouble, format!("Not as it should be: {} of {all} need a look", all - good))
        }
    };
    let (class, sign) = words::sign(severity);
    html! {
        section.answer.(class) aria-labelledby="answer" {
            p.quiet { "Could I recover right now, and to when?" }
            h1 #answer { span aria-hidden="true" { (sign) } " " (answer) }
            @if let Some(oldest) = oldest {
                p { "Each to " strong { (words::moment(words::millis(oldest))) } " or later (" (words::ago(words::millis(oldest))) ")"
                    @if none > 0 { "; " (words::count(none as u64, "machine has", "machines have")) " no recovery point yet" } "." }
            } @else if protected.is_empty() {
                p { a href="/machines" { "Choose a machine" } " and protect its disks." }
            }
        }
    }
}

fn tile(name: &str, value: i64, severity: Severity, href: &str) -> Markup {
    let (class, _) = words::sign(severity);
    html! { a.tile.(class) href=(href) { strong { (words::number(value.max(0) as u64)) } span { (name) } } }
}

/// The groups, those in trouble first.
pub(super) fn table(groups: &[GroupInfo]) -> Markup {
    let mut sorted: Vec<&GroupInfo> = groups.iter().collect();
    sorted.sort_by_key(|group| {
        (std::cmp::Reverse(standing(group).0), std::cmp::Reverse(group.rpo_ms), group.name.clone())
    });
    html! {
        table.cards {
            thead { tr { th { "Machine" } th { "State" } th { "Newest point" } th.number { "Age" } th.number { "Allowed" } th { "What holds it up" } } }
            tbody {
                @for group in sorted {
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
            table.cards {
                thead { tr { th { "Since" } th { "How" } th { "What" } th { "What to do" } } }
                tbody {
                    @for alert in raised {
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

pub(super) async fn page(visit: Visit) -> Shown {
    let overview: Overview = visit.door.get("/overview").await?;
    let groups: Vec<GroupInfo> = visit.door.all("/groups").await?;
    let jobs: Page<JobInfo> = visit.door.get(&format!("/jobs?limit={NEWEST}")).await?;
    let events = event::newest(&visit, NEWEST).await?;
    let mut raised: Vec<AlertInfo> = visit.door.get("/alerts").await?;
    raised.retain(|alert| alert.cleared.is_none());
    let trouble_if = |count: i64| if count > 0 { Severity::Trouble } else { Severity::Good };
    let notice_if = |count: i64| if count > 0 { Severity::Notice } else { Severity::Good };
    let live = html! {
        (headline(&groups))
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
        section {
            h2 { "Protected machines" }
            @if groups.is_empty() {
                (layout::nothing("None yet."))
            } @else { (table(&groups)) }
        }
        div.columns {
            section { h2 { a href="/jobs" { "Jobs" } } (job::table(&jobs.items)) }
            section { h2 { a href="/events" { "Events" } } (event::list(&events)) }
        }
    };
    Ok(super::html(layout::page(&visit, "Overview", live, html! {})))
}
