use std::net::SocketAddr;
use std::path::PathBuf;

use block::{ByteCount, ByteOffset, GroupId, Label, UnixNanos, VolumeId};
use serde::{Deserialize, Serialize};

use crate::{PointInfo, PointSelector, VolumeSummary};

/// Asks a target server to serve volumes at a point over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// Which group.
    pub group: GroupId,
    /// Which of its volumes, all at the same point; none for all that the point has.
    pub volumes: Vec<VolumeId>,
    /// When.
    pub point: PointSelector,
    /// Where.
    pub place: ExportPlace,
    /// With overlays that take writes; the replica does not change.
    #[serde(default)]
    pub writable: bool,
    /// The volumes of a promoted group as they are now, for writing; what is written stays. The point does not count then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub promoted: bool,
    /// What each overlay may hold at most; without it the server's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_limit: Option<ByteCount>,
    /// Goes on when the operator's connection ends.
    #[serde(default)]
    pub detach: bool,
    /// The drill that it is a part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill: Option<Label>,
    /// Ends by itself after so long, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_s: Option<u64>,
}

impl ExportRequest {
    /// For reading, until the operator's connection ends.
    pub fn new(
        group: GroupId,
        volumes: Vec<VolumeId>,
        point: PointSelector,
        place: ExportPlace,
    ) -> ExportRequest {
        ExportRequest {
            group,
            volumes,
            point,
            place,
            writable: false,
            promoted: false,
            overlay_limit: None,
            detach: false,
            drill: None,
            time_limit_s: None,
        }
    }
}

/// Where an export is to be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportPlace {
    /// A Unix socket on the target server's machine, for its user only.
    Socket(PathBuf),
    /// A TCP port, with TLS and certificates of operators.
    Tls(SocketAddr),
    /// A TCP port beside the target server's own, on the same address, with TLS and certificates of operators.
    Beside,
    /// A TCP port where everybody is let in who reaches it.
    Plain(SocketAddr),
}

/// An export that is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportInfo {
    /// Names it, until the server ends.
    pub id: u64,
    /// Which group.
    pub group: GroupId,
    /// At which point.
    pub point: PointInfo,
    /// The volumes; each is exported by its name.
    pub volumes: Vec<VolumeSummary>,
    /// Where it listens; a port of 0 has become a real one.
    pub place: ExportPlace,
    /// Whether it takes writes into overlays.
    pub writable: bool,
    /// Whether it takes writes that stay; the point is then the newest when it began.
    #[serde(default)]
    pub promoted: bool,
    /// Whether it goes on without its operator.
    pub detached: bool,
    /// Who asked for it.
    pub operator: String,
    /// When it began, by the server's clock.
    pub since: UnixNanos,
    /// The drill that it is a part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill: Option<Label>,
    /// When it ends by itself, by the server's clock, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<UnixNanos>,
    /// Clients connected now.
    pub connections: u64,
    /// Asked for by clients so far.
    pub read_bytes: ByteCount,
    /// Written by clients so far.
    pub written_bytes: ByteCount,
    /// What the overlays hold.
    pub overlay_bytes: ByteCount,
    /// What they may hold, all together.
    pub overlay_limit: ByteCount,
}

/// The answer to [`crate::OperatorRequest::Exports`] and [`crate::OperatorRequest::StopExport`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportsReply {
    /// Those that run, or the one that was stopped.
    pub exports: Vec<ExportInfo>,
}

/// A part of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewRange {
    /// Where it begins.
    pub offset: ByteOffset,
    /// How long it is.
    pub length: ByteCount,
}

/// What one hash of [`crate::OperatorRequest::HashView`] is over; the volume's last one may be over less.
pub const VIEW_HASH_UNIT: ByteCount = ByteCount(block::GRANULE_BYTES);
/// Bytes of one hash: the first ones of the unit's BLAKE3, or zeroes when the unit is zeroes.
pub const VIEW_HASH_BYTES: usize = 16;
/// The most ranges of one [`crate::OperatorRequest::ReadView`]. More are refused; ask several times.
pub const VIEW_RANGES_MAX: usize = 512;
