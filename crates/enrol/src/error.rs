use std::io;
use std::path::PathBuf;

use control::fleet::Problem;

/// Why the config server was not reached, or did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// Nobody answers there.
    #[error("reach the config server {server}: {reason}")]
    Unreachable {
        /// Where.
        server: String,
        /// Why not.
        reason: String,
    },
    /// Whoever answers is not the config server, or does not believe this side.
    #[error("authenticate the config server {server}: {reason}")]
    Tls {
        /// Where.
        server: String,
        /// Why not.
        reason: String,
    },
    /// It answered, and did not do it.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// It answered something that cannot be understood.
    #[error("read the answer of the config server {server}: {reason}")]
    Answer {
        /// Where.
        server: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A token that is none.
    #[error("use the token: {0}; copy the whole of what `seawall token create` printed")]
    Token(&'static str),
    /// Credentials could not be made or used.
    #[error("{0}")]
    Credentials(String),
    /// A file could not be read or written.
    #[error("{action} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl EnrolError {
    /// The config server's own reason.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            EnrolError::Problem(problem) => Some(problem),
            _ => None,
        }
    }

    /// Whether trying again may help without a person.
    pub fn is_retryable(&self) -> bool {
        match self {
            EnrolError::Unreachable { .. } | EnrolError::Answer { .. } => true,
            EnrolError::Problem(problem) => matches!(problem.status, 429 | 500..),
            _ => false,
        }
    }
}

/// For files: what was tried, on what.
pub(crate) fn file(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> EnrolError {
    let path = path.to_owned();
    move |source| EnrolError::File { action, path, source }
}
