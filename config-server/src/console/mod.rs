//! The console: pages for people, made here and served with everything they need.
//!
//! A page is a client of the API, in this process: what it shows and does goes through the same acts, the same guard and the
//! same audit log as everybody's requests (`door`). So a page can neither see nor do more than its user.
//!
//! Rooms: `door` leads to the API; `layout` is the frame of every page, `words` says values in words, `form` reads what was
//! sent; `asset` has the files; each other room is a page or a few that belong together. Pages work without JavaScript;
//! with it, what is marked live is fetched anew every few seconds and after each event.

mod access;
mod alert;
mod asset;
mod door;
mod enrol;
mod event;
mod failover;
mod form;
mod group;
mod home;
mod job;
mod layout;
mod login;
mod machine;
mod overview;
mod plan;
mod point;
mod policy;
mod server;
mod settings;
mod timeline;
mod words;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, LOCATION, REFERRER_POLICY};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use control::fleet::{Problem, ProblemCode};
use http_body_util::BodyExt;

use crate::api::extract::BODY_BYTES_MAX;
use crate::app::Shared;
use crate::fault::{Answer, Fault, ProblemTag, fault};

/// An instant as text, for what is kept.
pub(crate) fn moment_of(time: control::fleet::UnixMillis) -> String {
    format!("{} UTC", words::utc(time, ' '))
}

/// A page.
type Shown = Answer<Html<String>>;

/// What every page has.
#[derive(Clone)]
pub(crate) struct Console {
    app: Shared,
    /// The API, as it is served to everybody else.
    api: Router,
}

/// Pages load their own files and talk to their own server, and nothing else: no scripts or styles in the page's text.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The largest problem document that a page shows, in bytes.
const PROBLEM_BYTES_MAX: usize = 64 * 1024;

/// All pages, for a router whose fallback is the API's.
pub(crate) fn router(app: &Shared, api: Router) -> Router {
    let console = Console { app: app.clone(), api };
    Router::new()
        .route("/", get(overview::page))
        .route("/login", get(login::page).post(login::login))
        .route("/logout", post(login::logout))
        .route("/machines", get(machine::list))
        .route("/machines/named/{name}", get(machine::named))
        .route("/machines/{id}", get(machine::page))
        .route("/machines/{id}/protect", get(machine::protect_page).post(machine::protect))
        .route("/machines/{id}/remove", post(machine::remove))
        .route("/groups/{id}", get(group::page))
        .route("/groups/{id}/point", post(group::take_point))
        .route("/groups/{id}/resync", post(group::resync))
        .route("/groups/{id}/targets", post(group::change_targets))
        .route("/groups/{id}/failover", post(failover::start))
        .route("/groups/{id}/failover/{step}", post(failover::step))
        .route("/groups/{id}/drill", post(failover::drill))
        .route("/groups/{id}/drill/end", post(failover::end_drill))
        .route("/groups/{id}/prove", post(failover::prove))
        .route("/groups/{id}/reverse", post(home::reverse))
        .route("/groups/{id}/failback", post(home::fail_back))
        .route("/groups/{id}/change", post(group::change))
        .route("/groups/{id}/unprotect", post(group::unprotect))
        .route("/groups/{id}/remove", post(group::remove))
        .route("/groups/{id}/points/{epoch}", get(point::page))
        .route("/servers", get(server::list))
        .route("/servers/{role}/{id}/remove", post(server::remove))
        .route("/jobs", get(job::list))
        .route("/jobs/{id}", get(job::page))
        .route("/jobs/{id}/cancel", post(job::cancel))
        .route("/events", get(event::page))
        .route("/enrol", get(enrol::page).post(enrol::make))
        .route("/enrol/{id}/delete", post(enrol::delete))
        .route("/plans", get(plan::list).post(plan::make))
        .route("/plans/{id}", get(plan::page).post(plan::change))
        .route("/plans/{id}/run", post(plan::run))
        .route("/plans/{id}/delete", post(plan::delete))
        .route("/runs/{id}", get(plan::run_page))
        .route("/runs/{id}/report", get(plan::report))
        .route("/runs/{id}/answer", post(plan::answer))
        .route("/runs/{id}/resume", post(plan::resume))
        .route("/policies", get(policy::list).post(policy::make))
        .route("/policies/{id}", get(policy::page).post(policy::change))
        .route("/policies/{id}/delete", post(policy::delete))
        .route("/settings", get(settings::page).post(settings::change))
        .route("/settings/alerts", get(alert::page).post(alert::change))
        .route("/settings/alerts/test", post(alert::test))
        .route("/settings/password", post(settings::password))
        .route("/settings/tokens", post(settings::make_token))
        .route("/settings/tokens/{id}/delete", post(settings::delete_token))
        .route("/users", get(access::users).post(access::make_user))
        .route("/users/{id}", post(access::change_user))
        .route("/approvals", get(access::approvals))
        .route("/approvals/{id}", post(access::answer))
        .route("/audit", get(access::audit))
        .route("/assets/{name}", get(asset::serve))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn(from_here))
        .layer(from_fn(show_problems))
        .with_state(console)
}

/// Whether a path is the API's and not a person's.
pub(crate) fn is_api(path: &str) -> bool {
    path == "/api" || path.starts_with("/api/")
}

/// What was sent from another site's page is refused, also where there is no session yet that could tell.
async fn from_here(request: Request, next: Next) -> Response {
    let refuse = *request.method() != Method::GET && !is_from_here(request.headers());
    if refuse {
        return fault(
            ProblemCode::Csrf,
            "The request comes from another site's page",
            "Open the console itself, and do it there.",
        )
        .into_response();
    }
    next.run(request).await
}

fn is_from_here(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    match (text("sec-fetch-site"), text("origin"), text("host")) {
        (Some(site), ..) => matches!(site, "same-origin" | "none"),
        // Programs say no origin; browsers do.
        (None, None, _) => true,
        (None, Some(origin), host) => host.is_some() && origin.strip_prefix("https://") == host,
    }
}

/// Problems are pages here. Whoever is not logged in is led to the login, and back.
async fn show_problems(request: Request, next: Next) -> Response {
    let (uri, is_get) = (request.uri().clone(), *request.method() == Method::GET);
    let live = request.headers().contains_key("hx-request");
    let response = next.run(request).await;
    let mut response = match response.extensions().get::<ProblemTag>().cloned() {
        None => response,
        Some(tag) => show_problem(response, &tag, &uri, is_get, live).await,
    };
    let heads = response.headers_mut();
    heads.entry(CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(POLICY));
    // Without it browsers say of the console's own forms that they come from nowhere.
    heads.insert(REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    response
}

async fn show_problem(response: Response, tag: &ProblemTag, uri: &Uri, is_get: bool, live: bool) -> Response {
    if tag.0 == ProblemCode::Unauthenticated.code() && uri.path() != "/login" {
        return to_login(uri, is_get, live);
    }
    let status = response.status();
    let body = http_body_util::Limited::new(response.into_body(), PROBLEM_BYTES_MAX).collect().await;
    let problem: Option<Problem> = body.ok().and_then(|body| serde_json::from_slice(&body.to_bytes()).ok());
    let problem = problem.unwrap_or_else(|| {
        Problem::new(ProblemCode::Internal, "The config server failed", "Look at the config server's log.")
    });
    let mut shown = (status, Html(layout::problem(&problem).into_string())).into_response();
    shown.extensions_mut().insert(tag.clone());
    shown
}

fn to_login(uri: &Uri, is_get: bool, live: bool) -> Response {
    let back = if is_get { uri.path_and_query().map_or("/", |path| path.as_str()) } else { "/" };
    let login = match back {
        "/" => "/login".to_owned(),
        back => format!("/login?next={}", words::in_query(back)),
    };
    let (status, name) = match live {
        // The page itself is to go there, and not the part of it that asked.
        true => (StatusCode::UNAUTHORIZED, HeaderName::from_static("hx-redirect")),
        false => (StatusCode::SEE_OTHER, LOCATION),
    };
    let mut response = status.into_response();
    if let Ok(value) = HeaderValue::from_str(&login) {
        response.headers_mut().insert(name, value);
    }
    response
}

/// To another page, after something was done.
fn go(path: &str) -> Answer<Response> {
    let value = HeaderValue::from_str(path)
        .map_err(|error| crate::fault::internal("name the page that follows", error))?;
    Ok((StatusCode::SEE_OTHER, [(LOCATION, value)]).into_response())
}

/// The fault of a part of a path that names nothing.
fn no_page(what: &str) -> Fault {
    crate::fault::not_found("page", what.chars().take(80).collect::<String>())
}

fn html(page: maud::Markup) -> Html<String> {
    Html(page.into_string())
}

/// A page of text for a person who has gone astray.
pub(crate) fn nothing_here() -> Response {
    let fault = fault(ProblemCode::NotFound, "There is nothing at this address", "Begin with the overview.");
    let page = layout::problem(&fault.problem).into_string();
    let mut response = (StatusCode::NOT_FOUND, Html(page)).into_response();
    let policy = HeaderValue::from_static(POLICY);
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn what_another_site_sends_is_known() {
        let host = ("host", "seawall.example:7443");
        for (pairs, here) in [
            (vec![host, ("origin", "https://seawall.example:7443")], true),
            (vec![host, ("origin", "http://seawall.example:7443")], false),
            (vec![host, ("origin", "https://evil.example")], false),
            (vec![host, ("origin", "null")], false),
            (vec![host, ("sec-fetch-site", "cross-site")], false),
            (vec![host, ("sec-fetch-site", "same-origin")], true),
            (vec![host, ("origin", "https://seawall.example:7443"), ("sec-fetch-site", "same-site")], false),
            (vec![("origin", "https://seawall.example:7443")], false),
            (vec![host], true),
        ] {
            assert_eq!(is_from_here(&headers(&pairs)), here, "{pairs:?}");
        }
    }
}
