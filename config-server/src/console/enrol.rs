//! Tokens with which machines and servers come into the fleet.

use axum::extract::Path;
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use control::fleet::{EnrolTokenInfo, MadeEnrolToken, NewEnrolToken, PartRole};
use maud::{Markup, html};
use serde_json::json;

use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{Shown, go, layout, words};
use crate::fault::Answer;

fn table(visit: &Visit, tokens: &[EnrolTokenInfo]) -> Markup {
    html! {
        @if tokens.is_empty() { (layout::nothing("There is none.")) }
        @else {
            table.cards {
                thead { tr { th { "For" } th { "Good until" } th { "Made by" } th { "Used by" } th { "" } } }
                tbody {
                    @for token in tokens {
                        tr {
                            td data-label="For" { (token.role) @if let Some(name) = &token.name { " " strong { (name) } } }
                            td data-label="Good until" { (words::until(token.expires)) }
                            td data-label="Made by" { (token.created_by) }
                            td data-label="Used by" { @match &token.used_by { Some(name) => { (name) } None => { span.quiet { "nobody" } } } }
                            td {
                                @if token.used_by.is_none() {
                                    (layout::button(visit, &format!("/enrol/{}/delete", token.id), "Delete",
                                        layout::command(&format!("seawall token delete {}", token.id))))
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn form(visit: &Visit) -> Markup {
    html! {
        form.fields.card method="post" action="/enrol" {
            (layout::csrf(visit))
            h2 { "Make a token" }
            p { "It is good for one machine or server, once." }
            label { "For"
                select name="role" {
                    option value="agent" { "a machine (agent)" }
                    option value="process-server" { "a process server" }
                    option value="target-server" { "a target server" }
                } }
            label { "Name in the fleet (else it says one itself)" input name="name" autocomplete="off" spellcheck="false" maxlength="64"; }
            label { "Good for, in minutes" input name="minutes" type="number" min="1" max="10080" value="60" required; }
            button { "Make a token" }
            (layout::command("seawall token create --role agent --minutes 60"))
        }
    }
}

pub(super) async fn page(visit: Visit) -> Shown {
    let tokens: Vec<EnrolTokenInfo> = visit.door.get("/enrol-tokens").await?;
    let content = html! {
        h1 { "Enrol" }
        (form(&visit))
        section { h2 { "Tokens" } (table(&visit, &tokens)) }
    };
    Ok(super::html(layout::still(&visit, "Enrol", content)))
}

/// What to type on the machine, with the address at which this console was found.
fn line(made: &MadeEnrolToken, host: &str) -> String {
    let (role, token) = (made.info.role, &made.token);
    let more = match role {
        PartRole::Agent => String::new(),
        PartRole::ProcessServer => {
            " --advertise HOST:7440 --config /etc/seawall/process-server.toml".to_owned()
        }
        PartRole::TargetServer => {
            " --advertise HOST:7441 --config /etc/seawall/target-server.toml".to_owned()
        }
    };
    format!(
        "seawall-{role} enroll --server {}{more} --token {token}",
        words::shell(&format!("https://{host}"))
    )
}

pub(super) async fn make(visit: Visit, headers: HeaderMap, form: Form) -> Shown {
    let asked = NewEnrolToken {
        role: form.value("role")?,
        name: form.optional("name")?,
        minutes: form.value("minutes")?,
    };
    let made: MadeEnrolToken = visit.door.act_for(Method::POST, "/enrol-tokens", form.csrf(), &asked).await?;
    let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or("CONFIG-SERVER");
    let line = line(&made, host);
    let name = made
        .info
        .name
        .as_ref()
        .map_or_else(String::new, |name| format!(" --name {}", words::shell(name.as_str())));
    let content = html! {
        h1 { "A token for one " (made.info.role) }
        p { "Good until " (words::until(made.info.expires)) ". It is shown this once. Type there:" }
        div.secret { code #line { (line) } button.plain type="button" data-copy=(line) { "Copy" } }
        p { "Then start it; it appears under " a href="/machines" { "Machines" } " or " a href="/servers" { "Servers" } "." }
        (layout::command(&format!("seawall token create --role {}{name} --minutes {}", made.info.role, asked.minutes)))
        p { a href="/enrol" { "Another one" } }
    };
    Ok(super::html(layout::still(&visit, "A token", content)))
}

pub(super) async fn delete(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/enrol-tokens/{}", in_path(&id)?);
    visit.door.act(Method::DELETE, &path, form.csrf(), &json!({})).await?;
    go("/enrol")
}
