//! The way from a page to the API, in this process: the user's own session, through the API's own guard.

use axum::body::Body;
use axum::extract::{FromRequestParts, Request};
use axum::http::header::{CONTENT_TYPE, COOKIE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::response::Response;
use control::fleet::{Page, Problem, UserInfo};
use http_body_util::BodyExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tower::ServiceExt;

use super::Console;
use crate::api::API;
use crate::api::guard::{CSRF_HEADER, Peer, csrf_of_session, session_secret};
use crate::fault::{Answer, Fault, internal, invalid};

/// Entries that are asked for at once.
const PAGE_ENTRIES: usize = 1000;
/// Entries of a whole list that a page can show. Past it the list ends, and the page says so.
pub(super) const LIST_MAX: usize = 10_000;

/// The API, for one request of one user.
pub(super) struct Door {
    console: Console,
    peer: Peer,
    cookies: HeaderMap,
}

impl Door {
    async fn ask(
        &self,
        method: Method,
        path: &str,
        csrf: Option<&str>,
        body: Option<Vec<u8>>,
    ) -> Answer<Response> {
        let mut request = Request::builder().method(method).uri(format!("{API}{path}"));
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.cookies.clone());
            if body.is_some() {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            }
            if let Some(csrf) = csrf {
                let value = HeaderValue::from_str(csrf)
                    .map_err(|_| invalid("The form's csrf is no text that a page of the console has"))?;
                headers.insert(CSRF_HEADER, value);
            }
        }
        let mut request = request
            .body(body.map_or_else(Body::empty, Body::from))
            .map_err(|error| internal("ask its API", error))?;
        request.extensions_mut().insert(self.peer.clone());
        match self.console.api.clone().oneshot(request).await {
            Ok(response) => Ok(response),
        }
    }

    /// What the API gives.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Answer<T> {
        read(self.ask(Method::GET, path, None, None).await?).await
    }

    /// A whole list that the API gives in parts, up to [`LIST_MAX`] entries.
    pub(super) async fn all<T: DeserializeOwned>(&self, path: &str) -> Answer<Vec<T>> {
        let mut all = Vec::new();
        let mut after = String::new();
        loop {
            let part: Page<T> = self.get(&format!("{path}?limit={PAGE_ENTRIES}{after}")).await?;
            all.extend(part.items);
            match part.next {
                Some(next) if all.len() < LIST_MAX => after = format!("&after={next}"),
                _ => return Ok(all),
            }
        }
    }

    /// Does something, with the second secret that the page's form brought; the API checks it.
    pub(super) async fn act(
        &self,
        method: Method,
        path: &str,
        csrf: &str,
        body: &impl Serialize,
    ) -> Answer<Response> {
        let body = serde_json::to_vec(body).map_err(|error| internal("ask its API", error))?;
        let response = self.ask(method, path, Some(csrf), Some(body)).await?;
        if response.status().is_success() { Ok(response) } else { Err(problem(response).await) }
    }

    /// Like [`Door::act`], for what answers with something to read.
    pub(super) async fn act_for<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        csrf: &str,
        body: &impl Serialize,
    ) -> Answer<T> {
        read(self.act(method, path, csrf, body).await?).await
    }
}

pub(super) async fn read<T: DeserializeOwned>(response: Response) -> Answer<T> {
    if !response.status().is_success() {
        return Err(problem(response).await);
    }
    let bytes = response.into_body().collect().await.map_err(|error| internal("read its API", error))?;
    serde_json::from_slice(&bytes.to_bytes()).map_err(|error| internal("read its API", error))
}

async fn problem(response: Response) -> Fault {
    let problem: Result<Problem, String> = match response.into_body().collect().await {
        Ok(body) => serde_json::from_slice(&body.to_bytes()).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match problem {
        Ok(problem) => problem.into(),
        Err(error) => internal("read its API's problem", error),
    }
}

impl FromRequestParts<Console> for Door {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, console: &Console) -> Result<Door, Fault> {
        let peer = parts.extensions.get::<Peer>().cloned();
        let peer = peer.ok_or_else(|| internal("know who asks", "no peer"))?;
        let cookies = parts.headers.get_all(COOKIE).iter().map(|value| (COOKIE, value.clone()));
        Ok(Door { console: console.clone(), peer, cookies: cookies.collect() })
    }
}

/// Somebody who is logged in, at a page.
pub(super) struct Visit {
    pub(super) door: Door,
    pub(super) user: UserInfo,
    /// The session's second secret, for the page's forms.
    pub(super) csrf: String,
    /// Where the page is.
    pub(super) path: String,
}

impl FromRequestParts<Console> for Visit {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, console: &Console) -> Result<Visit, Fault> {
        let door = Door::from_request_parts(parts, console).await?;
        let user = door.get("/me").await?;
        let secret = session_secret(&parts.headers).unwrap_or_default();
        let csrf = csrf_of_session(&console.app, &secret).await?;
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Visit { door, user, csrf, path })
    }
}
