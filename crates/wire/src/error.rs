use std::io;
use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, Epoch};

use crate::credentials::CredentialsError;
use crate::frame::FrameError;
use crate::handshake::HandshakeError;
use crate::refusal::RefusalCode;
use crate::retry::FailureClass;

/// Why a conversation with a peer did not take place or ended. Cheap to clone, so that every half of a connection can
/// tell the one reason.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The address could not be listened on.
    #[error("listen on {addr}: {source}")]
    Bind {
        /// What was asked for.
        addr: String,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// No TCP connection came about.
    #[error("connect to {addr}: {source}")]
    Connect {
        /// What was asked for.
        addr: String,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// The peer was silent for too long.
    #[error("{what} with {peer}: no answer within {} s", .after.as_secs_f64())]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// Who should have answered.
        peer: String,
        /// How long it was waited.
        after: Duration,
    },
    /// TLS did not come about: a certificate is missing, expired or of another authority, or the peer speaks no TLS.
    #[error(
        "authenticate {peer} by TLS: {reason}; both sides need a valid certificate of the same authority"
    )]
    Tls {
        /// The other side's address.
        peer: String,
        /// What TLS said.
        reason: String,
    },
    /// The peer's certificate is valid but names somebody else than is expected or allowed.
    #[error("identify {peer}: {reason}")]
    Identity {
        /// The other side.
        peer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The first 32 bytes after TLS were not Seawall's, or no version is shared.
    #[error("shake hands with {peer}: {source}")]
    Handshake {
        /// The other side.
        peer: String,
        /// What was wrong.
        source: HandshakeError,
    },
    /// What arrived is no frame.
    #[error("read a frame from {peer}: {source}")]
    Frame {
        /// The other side.
        peer: String,
        /// What was wrong.
        source: FrameError,
    },
    /// The connection broke.
    #[error("converse with {peer}: connection lost: {source}")]
    Lost {
        /// The other side.
        peer: String,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// The peer ended the conversation in good order.
    #[error("converse with {peer}: the peer closed the connection")]
    Closed {
        /// The other side.
        peer: String,
    },
    /// One side refused the other, and said why.
    #[error("refused ({code}): {message}")]
    Refused {
        /// For programs.
        code: RefusalCode,
        /// For people: what was refused, why, and what to do.
        message: String,
        /// Whether the same may work later without an operator.
        retry: bool,
    },
    /// The caller gave more or fewer bytes than it announced.
    #[error("deliver epoch {epoch}: {total} were announced, {given} were given")]
    Length {
        /// The changeset's epoch.
        epoch: Epoch,
        /// What was announced.
        total: ByteCount,
        /// What was given.
        given: ByteCount,
    },
    /// The caller gave something larger than may be sent.
    #[error("send {what}: {size} is more than the limit of {limit}")]
    TooLarge {
        /// What was to be sent.
        what: &'static str,
        /// Its size.
        size: ByteCount,
        /// The limit.
        limit: ByteCount,
    },
    /// The own certificate, key or authority cannot be used.
    #[error(transparent)]
    Credentials(#[from] Arc<CredentialsError>),
}

impl WireError {
    /// Whether trying again later, without anyone mending anything, may succeed.
    ///
    /// Authentication and authorisation are not: the state shown must name them, with the mend.
    pub fn is_retryable(&self) -> bool {
        match self {
            WireError::Connect { .. }
            | WireError::TimedOut { .. }
            | WireError::Lost { .. }
            | WireError::Closed { .. }
            | WireError::Frame { .. } => true,
            WireError::Refused { retry, .. } => *retry,
            WireError::Bind { .. }
            | WireError::Tls { .. }
            | WireError::Identity { .. }
            | WireError::Handshake { .. }
            | WireError::Length { .. }
            | WireError::TooLarge { .. }
            | WireError::Credentials(_) => false,
        }
    }

    /// How it is tried again. A peer whose own store failed follows the schedule: somebody else mends it, and nothing has to
    /// be done on this side.
    pub fn class(&self) -> FailureClass {
        match self {
            WireError::Refused { code: RefusalCode::Failed, .. } => FailureClass::Recoverable,
            error if error.is_retryable() => FailureClass::Recoverable,
            _ => FailureClass::NonRecoverable,
        }
    }

    /// The refusal's code, when this is one.
    pub fn refusal(&self) -> Option<RefusalCode> {
        match self {
            WireError::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    pub(crate) fn lost(peer: &str, source: io::Error) -> WireError {
        WireError::Lost { peer: peer.to_owned(), source: Arc::new(source) }
    }
}

impl From<CredentialsError> for WireError {
    fn from(error: CredentialsError) -> WireError {
        WireError::Credentials(Arc::new(error))
    }
}
