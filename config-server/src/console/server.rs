//! Process and target servers.

use axum::extract::Path;
use axum::response::Response;
use control::Severity;
use control::fleet::{Role, ServerInfo};
use maud::{Markup, html};

use super::door::Visit;
use super::form::Form;
use super::machine::{clock, in_path, seen};
use super::{Shown, layout, no_page, words};
use crate::fault::Answer;

fn cards(servers: &[ServerInfo]) -> Markup {
    html! {
        table.cards {
            thead { tr { th { "Server" } th { "State" } th { "Reported" } th.number { "Groups" } th { "Room" } th { "Clock" } th { "Certificate ends" } } }
            tbody {
                @for server in servers {
                    tr {
                        td data-label="Server" { strong { (server.name) } div.quiet { (server.address) } }
                        td data-label="State" {
                            (words::state(server.state))
                            @if server.state.severity() > Severity::Good { div { (server.meaning) " " (server.what_to_do) } }
                            @if let Some(trouble) = &server.trouble { div.problem { (trouble) } }
                        }
                        td data-label="Reported" { (seen(server.seen)) }
                        td.number data-label="Groups" { (server.groups) }
                        td data-label="Room" { (room(server)) }
                        td data-label="Clock" { (clock(server.clock_ahead_ms)) }
                        td data-label="Certificate ends" { (words::until(server.certificate_expires)) }
                    }
                }
            }
        }
    }
}

/// Where the bar of what is used changes its colour, in percent; alerts have limits of their own.
const ROOM_MARKED_PERCENT: u64 = 80;

fn room(server: &ServerInfo) -> Markup {
    html! {
        @match server.capacity {
            None => { span.quiet { "not known" } }
            Some(capacity) => {
                @let used = capacity.bytes_total.saturating_sub(capacity.bytes_free);
                @let mark = capacity.bytes_total / 100 * ROOM_MARKED_PERCENT;
                meter min="0" low=(mark) high=(mark) optimum="0" max=(capacity.bytes_total) value=(used) aria-label="Used" {}
                div.quiet { (words::bytes(capacity.bytes_free)) " of " (words::bytes(capacity.bytes_total)) " free" }
            }
        }
    }
}

pub(super) async fn list(visit: Visit) -> Shown {
    let process: Vec<ServerInfo> = visit.door.all("/process-servers").await?;
    let targets: Vec<ServerInfo> = visit.door.all("/target-servers").await?;
    let live = html! {
        h1 { "Servers" }
        h2 { "Process servers" }
        p.quiet { "Hold changes, encrypted, until every target has them." }
        @if process.is_empty() { (layout::nothing("None has enrolled yet.")) } @else { (cards(&process)) }
        h2 { "Target servers" }
        p.quiet { "Apply changes to replicas, and keep the recovery points." }
        @if targets.is_empty() { (layout::nothing("None has enrolled yet.")) } @else { (cards(&targets)) }
    };
    let rest = html! {
        @if visit.user.role >= Role::Operator { p { a.button href="/enrol" { "Enrol a server" } } }
        @if visit.user.role >= Role::Administrator {
            @for (role, servers) in [("process-servers", &process), ("target-servers", &targets)] {
                @for server in servers {
                    @let path = format!("/{role}/{}", server.id);
                    (layout::danger(&visit, &format!("/servers{path}/remove"), &format!("Remove {}", server.name),
                        "Its certificates are revoked. What it holds on its disks stays there.", server.name.as_str(),
                        layout::command(&format!("seawall server remove {} --role {} --yes", words::shell(server.name.as_str()), server.role))))
                }
            }
        }
    };
    Ok(super::html(layout::page(&visit, "Servers", live, rest)))
}

pub(super) async fn remove(
    visit: Visit,
    Path((role, id)): Path<(String, String)>,
    form: Form,
) -> Answer<Response> {
    if !matches!(role.as_str(), "process-servers" | "target-servers") {
        return Err(no_page(&role));
    }
    super::access::destroy(&visit, &format!("/{role}/{}", in_path(&id)?), &form, "/servers").await
}
