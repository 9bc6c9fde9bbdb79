//! What happened.

use axum::extract::Query;
use control::Severity;
use control::fleet::{EventInfo, Page};
use maud::{Markup, html};
use serde::Deserialize;

use super::door::Visit;
use super::{Shown, layout, words};
use crate::fault::Answer;

/// Events of a page.
const SHOWN: usize = 100;

/// The newest events, the newest first.
pub(super) async fn newest(visit: &Visit, last: usize) -> Answer<Vec<EventInfo>> {
    let mut events: Page<EventInfo> = visit.door.get(&format!("/events?last={last}")).await?;
    events.items.reverse();
    Ok(events.items)
}

fn severity(event: &EventInfo) -> Severity {
    match event.severity.as_str() {
        "good" => Severity::Good,
        "notice" => Severity::Notice,
        _ => Severity::Trouble,
    }
}

/// The page of what an event is about, where there is one.
fn page_of(subject: &str) -> Option<String> {
    let (kind, id) = subject.split_once('/')?;
    match kind {
        "machines" | "groups" | "jobs" | "policies" => Some(format!("/{kind}/{id}")),
        "process-servers" | "target-servers" => Some("/servers".to_owned()),
        "approvals" => Some("/approvals".to_owned()),
        _ => None,
    }
}

/// Events, one a line.
pub(super) fn list(events: &[EventInfo]) -> Markup {
    html! {
        @if events.is_empty() { (layout::nothing("Nothing yet.")) }
        @else {
            ul.events {
                @for event in events {
                    @let (class, sign) = words::sign(severity(event));
                    li.(class) {
                        span.sign aria-hidden="true" { (sign) }
                        div {
                            @match page_of(&event.subject) {
                                Some(href) => { a href=(href) { (event.message) } }
                                None => { (event.message) }
                            }
                            div.quiet { (words::when(event.time)) }
                        }
                    }
                }
            }
        }
    }
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Before {
    #[serde(default)]
    before: Option<i64>,
}

pub(super) async fn page(visit: Visit, Query(asked): Query<Before>) -> Shown {
    let events = match asked.before {
        None => newest(&visit, SHOWN).await?,
        Some(before) => {
            // Events have numbers without gaps.
            let after = before.saturating_sub(SHOWN as i64 + 1).max(0);
            let limit = before.saturating_sub(1).saturating_sub(after).clamp(1, SHOWN as i64);
            let page: Page<EventInfo> =
                visit.door.get(&format!("/events?after={after}&limit={limit}")).await?;
            page.items.into_iter().rev().collect()
        }
    };
    let oldest = events.last().map_or(0, |event| event.id);
    let live = html! {
        h1 { "Events" }
        (list(&events))
        @if oldest > 1 { p { a href=(format!("/events?before={oldest}")) { "Older" } } }
    };
    Ok(super::html(layout::page(&visit, "Events", live, layout::command("seawall events --last 100"))))
}
