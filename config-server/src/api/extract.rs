//! Reading what is asked, strictly.

use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use control::fleet::ProblemCode;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::fault::{Fault, fault, not_found};

/// The largest body, in bytes. A larger one is refused.
pub(crate) const BODY_BYTES_MAX: usize = 256 * 1024;
/// The largest check-in of a part, in bytes: servers tell of every group.
pub(crate) const CHECK_IN_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long a body may take to arrive.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// Entries of one part of a list.
pub(crate) const PAGE_MAX: i64 = 1000;
const PAGE_DEFAULT: i64 = 100;

/// A body of JSON.
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Fault;
    async fn from_request(request: Request, _: &S) -> Result<Body<T>, Fault> {
        read(request, BODY_BYTES_MAX).await.map(Body)
    }
}

/// A body of JSON that may be large.
pub(crate) struct LargeBody<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for LargeBody<T> {
    type Rejection = Fault;
    async fn from_request(request: Request, _: &S) -> Result<LargeBody<T>, Fault> {
        read(request, CHECK_IN_BYTES_MAX).await.map(LargeBody)
    }
}

async fn read<T: DeserializeOwned>(request: Request, limit: usize) -> Result<T, Fault> {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err(fault(
            ProblemCode::UnsupportedMedia,
            format!("The body's type is {kind:?}"),
            "Send JSON, with Content-Type: application/json.",
        ));
    }
    let body = Limited::new(request.into_body(), limit).collect();
    let bytes = match tokio::time::timeout(BODY_TIME_MAX, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => {
            return Err(fault(
                ProblemCode::TooLarge,
                format!("The body has more than {limit} bytes"),
                "Send less at once.",
            ));
        }
        Ok(Err(_)) | Err(_) => {
            return Err(fault(ProblemCode::BadRequest, "The body did not arrive whole", "Send it again."));
        }
    };
    let unreadable = |why: String| {
        fault(
            ProblemCode::BadRequest,
            format!("Read the body: {why}"),
            "Send what the OpenAPI document says: GET /api/v1/openapi.json.",
        )
    };
    // JSON's reader would take an array of the values for an object.
    if bytes.trim_ascii_start().first().is_some_and(|first| *first != b'{') {
        return Err(unreadable("it is not an object, {...}".to_owned()));
    }
    serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))
}

/// Parameters after the question mark.
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Query<T>, Fault> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(query) => Ok(Query(query.0)),
            Err(error) => Err(fault(
                ProblemCode::BadRequest,
                format!("Read the parameters: {}", error.body_text()),
                "Send what the OpenAPI document says: GET /api/v1/openapi.json.",
            )),
        }
    }
}

/// The id in the path.
pub(crate) struct Id<T>(pub(crate) T);

impl<S: Send + Sync, T: std::str::FromStr + Send> FromRequestParts<S> for Id<T> {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Id<T>, Fault> {
        let text = match axum::extract::Path::<String>::from_request_parts(parts, state).await {
            Ok(path) => path.0,
            Err(error) => return Err(fault(ProblemCode::BadRequest, error.body_text(), "Correct the path.")),
        };
        // What is no id names nothing.
        text.parse().map(Id).map_err(|_| not_found("resource", text.chars().take(80).collect::<String>()))
    }
}

/// Which part of a list.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    #[serde(default)]
    pub(crate) after: Option<String>,
    #[serde(default)]
    pub(crate) limit: Option<i64>,
}

impl Part {
    /// How many entries.
    pub(crate) fn limit(&self) -> Result<i64, Fault> {
        match self.limit.unwrap_or(PAGE_DEFAULT) {
            limit if (1..=PAGE_MAX).contains(&limit) => Ok(limit),
            limit => Err(crate::fault::invalid(format!("limit is {limit}, expected 1 to {PAGE_MAX}"))),
        }
    }

    /// After which text.
    pub(crate) fn after_text(&self) -> Result<&str, Fault> {
        let after = self.after.as_deref().unwrap_or_default();
        // PostgreSQL has no texts with it.
        if after.len() > 64 || after.contains('\0') {
            return Err(crate::fault::invalid("after is no `next` of a part before"));
        }
        Ok(after)
    }

    /// After which number, where the newest come first.
    pub(crate) fn before_number(&self) -> Result<i64, Fault> {
        match &self.after {
            None => Ok(i64::MAX),
            Some(text) => {
                text.parse().map_err(|_| crate::fault::invalid("after is no `next` of a part before"))
            }
        }
    }
}
