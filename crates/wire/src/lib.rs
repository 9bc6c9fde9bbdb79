//! How Seawall's parts talk: TLS 1.3 with both sides proven, a frozen handshake, frames, credit. Payloads are opaque.
//!
//! A connection is made by [`connect`] or accepted by a [`Listener`]; both sides then know who the other is, as the
//! local [`authority`] wrote it into the certificate ([`Identity`]). What follows is either a delivery of changesets
//! ([`Sender`], [`Receiver`]), one request of an operator ([`Operator`], [`Operation`]), a comparison of what both ends
//! hold ([`Comparison`]), or a measurement of the way between them ([`measure()`], [`Measurement`]).
//!
//! The bytes are in docs/formats/wire.md.

pub mod authority;
mod compare;
mod credentials;
mod delivery;
mod error;
mod foreign;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handshake;
mod identity;
mod link;
mod listener;
mod measure;
mod operate;
mod refusal;
mod renewal;
mod retry;
mod revoked;
mod tls;
mod web;

pub use authority::{Authority, AuthorityError, ServerNames, Signed, new_request};
pub use compare::{COMPARE_BYTES_MAX, CONVERSATION_BYTES, Comparison, Turn};
pub use credentials::{CA_FILE, CERT_FILE, CREDENTIAL_BYTES_MAX, Credentials, CredentialsError, KEY_FILE};
pub use delivery::{
    ACCEPT_TIME_MAX, Answerer, DATA_FRAME_BYTES, Incoming, REPORT_BYTES_MAX, Receipts, Receiver, Sender,
};
pub use error::WireError;
pub use foreign::{foreign_client, foreign_server, operator_of};
pub use frame::{
    Condition, FRAME_HEADER_BYTES, FRAME_PAYLOAD_MAX, FrameError, FrameKind, Held, REFUSAL_BYTES_MAX,
};
pub use handshake::{HANDSHAKE_BYTES, HANDSHAKE_MAGIC, HandshakeError, Purpose, VERSIONS};
pub use identity::{Identity, IdentityError, NAME_BYTES_MAX, Role};
pub use link::{FRAMES_LEAVING_MAX, FRAMES_QUEUED_MAX, LINGER_MAX, PING_EVERY, SILENCE_MAX};
pub use listener::{
    BACKLOG, CONNECT_TIME_MAX, Connection, HANDSHAKE_TIME_MAX, HANDSHAKES_PENDING_MAX, Listener, Pending,
    REVOCATION_LOOK_EVERY, connect, connect_for,
};
pub use measure::{MEASURE_BYTES_MAX, MEASURE_TIME_MAX, MEASURE_WAIT_MAX, Measured, Measurement, measure};
pub use operate::{
    OPENING_TIME_MAX, Opening, Operation, Operator, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, VIEW_WINDOW,
    ViewReader, ViewWriter,
};
pub use refusal::RefusalCode;
pub use renewal::LiveCredentials;
pub use retry::{
    FailureClass, LOOK_S, Pause, Peers, QUICK_S_MAX, QUICK_WAIT, Retry, RetryPolicy, RetryPolicyError,
    SLOW_MINUTES_MAX, SLOW_WAITS_MAX, Woken,
};
pub use revoked::{REVOKED_FILE, REVOKED_MAX, Revocations, SERIAL_BYTES_MAX, Serial, revoked_text};
pub use tls::ALPN;
pub use web::{
    FINGERPRINT_BYTES, NotFromHere, WEB_ALPN, WebTrust, fingerprint, web_client, web_peer, web_server,
};
