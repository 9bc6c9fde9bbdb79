//! What an act of the API fails with: a problem for whoever asked, and a line in the log when it is our own fault.

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use control::fleet::{Problem, ProblemCode};

/// A problem, on its way to whoever asked.
#[derive(Clone, Debug)]
pub struct Fault {
    pub(crate) problem: Box<Problem>,
    retry_after_s: Option<u64>,
}

/// What an act gives.
pub(crate) type Answer<T> = Result<T, Fault>;

/// The problem's code, for the audit log.
#[derive(Clone, Debug)]
pub(crate) struct ProblemTag(pub(crate) String);

pub(crate) fn fault(code: ProblemCode, detail: impl Into<String>, mend: impl Into<String>) -> Fault {
    Fault { problem: Box::new(Problem::new(code, detail, mend)), retry_after_s: None }
}

/// There is no such thing.
pub(crate) fn not_found(what: &str, id: impl std::fmt::Display) -> Fault {
    fault(
        ProblemCode::NotFound,
        format!("There is no {what} {id}"),
        format!("Look at the list for the {what}s there are."),
    )
}

/// A value makes no sense.
pub(crate) fn invalid(detail: impl Into<String>) -> Fault {
    fault(ProblemCode::Invalid, detail, "Correct the value and send the request again.")
}

/// It contradicts what is there.
pub(crate) fn conflict(detail: impl Into<String>, mend: impl Into<String>) -> Fault {
    fault(ProblemCode::Conflict, detail, mend)
}

/// A fault of our own: what it was is for the log only.
pub(crate) fn internal(doing: &str, error: impl std::fmt::Display) -> Fault {
    tracing::error!(doing, %error, "the config server failed");
    fault(
        ProblemCode::Internal,
        format!("The config server failed to {doing}"),
        "Look at the config server's log; nothing was changed.",
    )
}

impl Fault {
    pub(crate) fn retry_after(mut self, seconds: u64) -> Fault {
        self.retry_after_s = Some(seconds);
        self
    }

    /// Whether it has this code.
    pub fn is(&self, code: ProblemCode) -> bool {
        self.problem.is(code)
    }
}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Fault {
        Fault { problem: Box::new(problem), retry_after_s: None }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.problem.fmt(f)
    }
}

impl std::error::Error for Fault {}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Fault {
        let busy = match &error {
            sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::Tls(_) => true,
            // SQLite: busy, locked, full, an error of the disk; PostgreSQL: connections, shutting down, conflicts.
            sqlx::Error::Database(database) => database.code().is_some_and(|code| {
                matches!(&*code, "5" | "6" | "10" | "13" | "261" | "517" | "40001" | "40P01")
                    || code.starts_with("08")
                    || code.starts_with("57P")
                    || code.starts_with("53")
            }),
            _ => false,
        };
        if !busy {
            return internal("use its store", error);
        }
        tracing::warn!(%error, "the store does not answer");
        fault(
            ProblemCode::Unavailable,
            "The config server's store does not answer",
            "Try again; if it stays so, look at the config server's log and at its database.",
        )
        .retry_after(5)
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let tag = ProblemTag(self.problem.code.clone());
        let body = serde_json::to_vec(&self.problem).unwrap_or_default();
        let mut response = (status, body).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(tag);
        response
    }
}
