//! Logging in and out.

use axum::extract::Query;
use axum::http::header::SET_COOKIE;
use axum::http::{Method, StatusCode};
use axum::response::{Html, IntoResponse, Response};
use control::fleet::{Login, Problem};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::json;

use super::door::{Door, Visit};
use super::form::Form;
use super::{go, layout};
use crate::fault::{Answer, Fault};

#[derive(Debug, Default, Deserialize)]
pub(super) struct Back {
    #[serde(default)]
    next: String,
}

/// A page of this console; anything else is the overview, so that a link cannot lead somebody away after the login.
fn back(next: &str) -> &str {
    let own = next.starts_with('/') && !next.starts_with("//") && !next.contains(['\\', '\r', '\n', '\t']);
    if own { next } else { "/" }
}

fn shown(next: &str, name: &str, problem: Option<&Problem>) -> Markup {
    layout::outside(
        "Log in",
        html! {
            div.card.login {
                h1 { "Log in" }
                @if let Some(problem) = problem {
                    p.problem role="alert" { (problem.detail) ". " (problem.mend) }
                }
                form method="post" action="/login" {
                    input type="hidden" name="next" value=(back(next));
                    label { "Name" input name="name" value=(name) required autocomplete="username" autofocus[name.is_empty()]; }
                    label { "Password" input name="password" type="password" required autocomplete="current-password" autofocus[!name.is_empty()]; }
                    button { "Log in" }
                }
            }
        },
    )
}

pub(super) async fn page(Query(asked): Query<Back>) -> Html<String> {
    super::html(shown(&asked.next, "", None))
}

pub(super) async fn login(door: Door, form: Form) -> Answer<Response> {
    let (next, name) = (form.get("next"), form.get("name"));
    let asked = match name.parse() {
        Ok(name) => Login { name, password: form.verbatim("password").to_owned() },
        Err(error) => return Ok(again(next, name, crate::fault::invalid(format!("{error}")))),
    };
    match door.act(Method::POST, "/login", "", &asked).await {
        Err(fault) => Ok(again(next, name, fault)),
        Ok(answer) => {
            let mut response = go(back(next))?;
            for cookie in answer.headers().get_all(SET_COOKIE) {
                response.headers_mut().append(SET_COOKIE, cookie.clone());
            }
            Ok(response)
        }
    }
}

fn again(next: &str, name: &str, fault: Fault) -> Response {
    let status = StatusCode::from_u16(fault.problem.status).unwrap_or(StatusCode::UNAUTHORIZED);
    (status, super::html(shown(next, name, Some(&fault.problem)))).into_response()
}

pub(super) async fn logout(visit: Visit, form: Form) -> Answer<Response> {
    let answer = visit.door.act(Method::POST, "/logout", form.csrf(), &json!({})).await?;
    let mut response = go("/login")?;
    for cookie in answer.headers().get_all(SET_COOKIE) {
        response.headers_mut().append(SET_COOKIE, cookie.clone());
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::back;

    #[test]
    fn a_login_leads_nowhere_else() {
        assert_eq!(back("/groups/1?x=2"), "/groups/1?x=2");
        for away in ["https://evil.example", "//evil.example", "/\\evil.example", "", "javascript:x", "/a\nb"]
        {
            assert_eq!(back(away), "/", "{away}");
        }
    }
}
