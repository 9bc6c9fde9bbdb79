//! One's own password and tokens, and the fleet's settings.

use axum::extract::Path;
use axum::http::Method;
use axum::response::Response;
use control::fleet::{ApiTokenInfo, ChangePassword, MadeToken, NewApiToken, Role, Scope, Settings};
use maud::{Markup, html};
use serde_json::json;

use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{Shown, go, layout, words};
use crate::fault::Answer;

const SCOPES: [(Scope, &str); 4] = [
    (Scope::Read, "read: see"),
    (Scope::Operate, "operate: protect, take points, change policies"),
    (Scope::Enrol, "enrol: make tokens with which machines enrol"),
    (Scope::Administer, "administer: everything"),
];

fn tokens(visit: &Visit, tokens: &[ApiTokenInfo]) -> Markup {
    html! {
        @if tokens.is_empty() { (layout::nothing("You have none.")) }
        @else {
            table.cards {
                thead { tr { th { "Token" } th { "May" } th { "Good until" } th { "" } } }
                tbody {
                    @for token in tokens {
                        tr {
                            td data-label="Token" { strong { (token.name) } }
                            td data-label="May" { (token.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(", ")) }
                            td data-label="Good until" { (words::until(token.expires)) }
                            td { (layout::button(visit, &format!("/settings/tokens/{}/delete", token.id), "Delete",
                                layout::command(&format!("seawall api-token delete {}", token.id)))) }
                        }
                    }
                }
            }
        }
    }
}

pub(super) async fn page(visit: Visit) -> Shown {
    let own: Vec<ApiTokenInfo> = visit.door.get("/tokens").await?;
    let settings: Settings = visit.door.get("/settings").await?;
    let content = html! {
        h1 { "Settings" }
        p { "You are " strong { (visit.user.name) } ", " (visit.user.role) "."
            @if visit.user.role >= Role::Operator { " " a href="/settings/alerts" { "Alerts: when somebody is told, and who" } } }
        section {
            h2 { "Your tokens, for programs" }
            (tokens(&visit, &own))
            form.fields.card method="post" action="/settings/tokens" {
                h3 { "Make a token" }
                (layout::csrf(&visit))
                label { "What it is for" input name="name" required maxlength="64" autocomplete="off" spellcheck="false"; }
                fieldset { legend { "What it may do, within your role" }
                    @for (scope, text) in SCOPES {
                        label.tick { input type="checkbox" name="scope" value=(scope.as_str()) checked[scope == Scope::Read]; span { (text) } }
                    } }
                label { "Good for, in days" input name="days" type="number" min="1" max="366" value="90" required; }
                button { "Make a token" }
                (layout::command("seawall api-token create NAME --scope read --days 90"))
            }
        }
        section {
            form.fields.card method="post" action="/settings/password" {
                h2 { "Your password" }
                (layout::csrf(&visit))
                label { "As it is" input name="old" type="password" required autocomplete="current-password"; }
                label { "As it is to be, 12 characters or more" input name="new" type="password" required minlength="12" maxlength="1024" autocomplete="new-password"; }
                p.quiet { "All your sessions end, this one too." }
                button { "Change the password" }
                (layout::command("seawall user password"))
            }
        }
        @if visit.user.role >= Role::Administrator {
            section {
                form.fields.card method="post" action="/settings" {
                    h2 { "The fleet" }
                    (layout::csrf(&visit))
                    label.tick { input type="checkbox" name="second_person" checked[settings.second_person];
                        span { "Deleting, and shortening retention, need a second administrator's approval" } }
                    button { "Change" }
                    (layout::command(&format!("seawall setting change --second-person {}", settings.second_person)))
                }
            }
        }
    };
    Ok(super::html(layout::still(&visit, "Settings", content)))
}

pub(super) async fn change(visit: Visit, form: Form) -> Answer<Response> {
    let asked = Settings { second_person: form.ticked("second_person") };
    let answer = visit.door.act(Method::PUT, "/settings", form.csrf(), &asked).await?;
    super::access::done_or_waits(&answer, "/settings")
}

pub(super) async fn password(visit: Visit, form: Form) -> Answer<Response> {
    let asked = ChangePassword { old: form.verbatim("old").to_owned(), new: form.verbatim("new").to_owned() };
    visit.door.act(Method::PUT, "/me/password", form.csrf(), &asked).await?;
    go("/login?next=/settings")
}

pub(super) async fn make_token(visit: Visit, form: Form) -> Shown {
    let scopes = form.all("scope").into_iter().map(str::parse).collect::<Result<Vec<Scope>, String>>();
    let asked = NewApiToken {
        name: form.value("name")?,
        scopes: scopes.map_err(crate::fault::invalid)?,
        days: form.value("days")?,
    };
    let made: MadeToken = visit.door.act_for(Method::POST, "/tokens", form.csrf(), &asked).await?;
    let content = html! {
        h1 { "Token " (made.info.name) }
        p { "Good until " (words::until(made.info.expires)) ". It is shown this once." }
        div.secret { code { (made.token) } button.plain type="button" data-copy=(made.token) { "Copy" } }
        p { "Programs send it as " code { "Authorization: Bearer …" } "." }
        p { a href="/settings" { "Settings" } }
    };
    Ok(super::html(layout::still(&visit, "A token", content)))
}

pub(super) async fn delete_token(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/tokens/{}", in_path(&id)?);
    visit.door.act(Method::DELETE, &path, form.csrf(), &json!({})).await?;
    go("/settings")
}
