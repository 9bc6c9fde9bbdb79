use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why the API did not do something: RFC 9457's problem document, with what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A URI for the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the code means, in short.
    pub title: String,
    /// As in the answer's head.
    pub status: u16,
    /// For programs; codes never change their meaning.
    pub code: String,
    /// What was tried, on what, and why not.
    pub detail: String,
    /// What to do.
    pub mend: String,
}

macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident $status:literal $code:literal $title:literal)*) => {
        /// Why the API did not do something: one code for programs, with its status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ProblemCode { $($(#[$doc])* $name,)* }

        impl ProblemCode {
            /// All of them.
            pub const ALL: &[ProblemCode] = &[$(ProblemCode::$name),*];

            /// For programs.
            pub const fn code(self) -> &'static str {
                match self { $(ProblemCode::$name => $code,)* }
            }

            /// HTTP's status.
            pub const fn status(self) -> u16 {
                match self { $(ProblemCode::$name => $status,)* }
            }

            /// What it means, in short.
            pub const fn title(self) -> &'static str {
                match self { $(ProblemCode::$name => $title,)* }
            }
        }
    };
}

problems! {
    /// The body or a parameter is not what it must be.
    BadRequest 400 "bad-request" "The request cannot be read"
    /// Nobody, or nobody who is known.
    Unauthenticated 401 "unauthenticated" "It is not known who asks"
    /// Known, and not allowed.
    Forbidden 403 "forbidden" "Who asks may not do this"
    /// The session's second secret is missing.
    Csrf 403 "csrf" "The request does not prove that it comes from the session's own page"
    /// The certificate was revoked.
    Revoked 403 "revoked" "The certificate was revoked"
    /// There is no such thing.
    NotFound 404 "not-found" "There is no such thing"
    /// There is no such act on this thing.
    MethodNotAllowed 405 "method-not-allowed" "That cannot be done with this"
    /// It would contradict what is there.
    Conflict 409 "conflict" "It contradicts what is there"
    /// The name typed is not the thing's.
    NotConfirmed 409 "not-confirmed" "The act was not confirmed by the name of what it destroys"
    /// A second person must agree first.
    ApprovalNeeded 202 "approval-needed" "A second person must approve this first"
    /// More bytes than the API takes.
    TooLarge 413 "too-large" "The request is too large"
    /// Not JSON.
    UnsupportedMedia 415 "unsupported-media" "The request's body is not JSON"
    /// A value makes no sense.
    Invalid 422 "invalid" "A value makes no sense"
    /// As many as there may be are there.
    Limit 422 "limit" "There are as many as there may be"
    /// Too often.
    TooMany 429 "too-many" "It was tried too often"
    /// A fault of the config server.
    Internal 500 "internal" "The config server failed"
    /// Not now.
    Unavailable 503 "unavailable" "The config server cannot do it now"
}

impl Problem {
    /// A problem.
    pub fn new(code: ProblemCode, detail: impl Into<String>, mend: impl Into<String>) -> Problem {
        Problem {
            kind: format!("urn:seawall:problem:{}", code.code()),
            title: code.title().to_owned(),
            status: code.status(),
            code: code.code().to_owned(),
            detail: detail.into(),
            mend: mend.into(),
        }
    }

    /// Whether it has this code.
    pub fn is(&self, code: ProblemCode) -> bool {
        self.code == code.code()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.detail)?;
        if self.mend.is_empty() { Ok(()) } else { write!(f, "; {}", self.mend) }
    }
}

impl std::error::Error for Problem {}
