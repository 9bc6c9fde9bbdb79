//! A recovery point as a disk that any tool can use: the network block device protocol (NBD), and overlays to write to.
//!
//! ```text
//! client -> channel (socket, TLS) -> negotiation (options) -> session (requests) -> disk: view, overlay on a view, or promoted volume
//! ```
//!
//! The protocol is the public one (github.com/NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle negotiation, structured
//! replies, block status of `base:allocation`, several connections, TLS by STARTTLS. Whoever breaks it is disconnected.

mod channel;
mod disk;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod limits;
mod negotiate;
mod overlay;
mod protocol;
mod reply;
mod server;
mod session;
mod workers;

pub use channel::{Admit, Shown, TlsSide};
pub use disk::{Disk, DiskError};
pub use limits::*;
pub use negotiate::{Exported, Security};
pub use overlay::{OVERLAY_SUFFIX, Overlay, Space};
pub use server::{Counted, Export, ListenError, Place};
