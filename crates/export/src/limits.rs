use std::time::Duration;

use block::ByteCount;

/// The longest read or write of one request. A longer read is refused as invalid, a longer write closes the connection.
pub const REQUEST_BYTES_MAX: ByteCount = ByteCount::mib(32);
/// Bytes of a disk read or written in one go. Longer requests take several; replies are sent piece by piece.
pub const PIECE_BYTES: ByteCount = ByteCount::kib(256);
/// Reads from this length on are looked up for holes first, which are then told instead of sent.
pub const HOLE_CHECK_BYTES: ByteCount = ByteCount::kib(64);
/// Connections of one export at the same time. A further one is closed.
pub const CONNECTIONS_MAX: usize = 16;
/// Requests of one connection that wait for a worker. Past it the connection's own thread does them, and takes no more.
pub const REQUESTS_QUEUED_MAX: usize = 64;
/// Threads of one connection that read while its own thread takes requests. Started only when the disk makes reads wait.
pub const WORKERS_MAX: usize = 16;
/// Extents in one answer to a block status request. The client asks again for what lies behind them.
pub const STATUS_EXTENTS_MAX: usize = 1024;
/// The longest data of an option during negotiation. A longer one closes the connection.
pub const OPTION_BYTES_MAX: ByteCount = ByteCount::kib(16);
/// Options of one negotiation. Past it the connection is closed.
pub const OPTIONS_MAX: usize = 128;
/// How long the peer may be silent during negotiation. Past it the connection is closed.
pub const NEGOTIATION_SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long negotiation may take in all, up to TLS where there is TLS. Past it the connection is closed.
pub const NEGOTIATION_TIME_MAX: Duration = Duration::from_secs(60);
/// The longest name of a disk, as the protocol has it, in bytes. A longer one is refused.
pub const NAME_BYTES_MAX: usize = 4096;
/// What an overlay always leaves free on its file system: this part of it,
pub const RESERVE_PART: u64 = 20;
/// but not more than this much.
pub const RESERVE_BYTES_MAX: ByteCount = ByteCount::gib(16);
/// How much an overlay takes between looking at the space that is left.
pub const SPACE_CHECK_BYTES: ByteCount = ByteCount::mib(4);
