use std::io;
use std::path::{Path, PathBuf};

use block::{ByteCount, ByteOffset, Epoch, Generation, GroupId, VolumeId};

/// Why a replica did not do what was asked. Unless it says poisoned, nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The changeset is of another group.
    #[error("apply epoch {epoch} of {found:?} to the replica of {expected:?}: another group's changeset")]
    WrongGroup {
        /// The replica's.
        expected: GroupId,
        /// The changeset's.
        found: GroupId,
        /// The changeset's.
        epoch: Epoch,
    },
    /// The changeset is of another generation of the group's history.
    #[error(
        "apply epoch {epoch} of generation {found} to the replica of {group:?}, which follows generation {expected}: \
         a replica follows one generation; start a new replica or send that generation elsewhere"
    )]
    WrongGeneration {
        /// The group.
        group: GroupId,
        /// The replica's.
        expected: Generation,
        /// The changeset's.
        found: Generation,
        /// The changeset's.
        epoch: Epoch,
    },
    /// A source of another generation asks.
    #[error(
        "take generation {found} for {group:?}: its replica follows generation {expected}; after a failover the source must \
         be protected anew"
    )]
    OtherGeneration {
        /// The group.
        group: GroupId,
        /// The replica's.
        expected: Generation,
        /// The source's.
        found: Generation,
    },
    /// A failover is neither committed nor cancelled.
    #[error(
        "the replica of {group:?} has been failed over to point {point}, which is neither committed nor cancelled: commit or \
         cancel it first"
    )]
    FailoverPending {
        /// The group.
        group: GroupId,
        /// The point that was chosen.
        point: Epoch,
    },
    /// There is no failover to commit or to cancel.
    #[error("the replica of {group:?} has no failover that is pending; nothing to commit or to cancel")]
    NoFailover {
        /// The group.
        group: GroupId,
    },
    /// A failover needs a newer generation.
    #[error(
        "fail the replica of {group:?} over to generation {asked}: it has to be newer than the one that the replica follows{}",
        known.map(|known| format!(", {known}")).unwrap_or_default()
    )]
    NotNewer {
        /// The group.
        group: GroupId,
        /// The replica's.
        known: Option<Generation>,
        /// The one that was asked for.
        asked: Generation,
    },
    /// Its volumes are written here.
    #[error(
        "the replica of {group:?} is promoted: its volumes are written here; `seawall failover demote` ends that, and has to \
         come first"
    )]
    Promoted {
        /// The group.
        group: GroupId,
    },
    /// It is to be promoted first.
    #[error("the replica of {group:?} is not promoted; `seawall failover promote` does it, after a failover")]
    NotPromoted {
        /// The group.
        group: GroupId,
    },
    /// A volume of it is open for writing.
    #[error(
        "demote the replica of {group:?}: its volumes are exported ({open} of them are open); `seawall export list` shows by \
         whom, end that first"
    )]
    PromotedInUse {
        /// The group.
        group: GroupId,
        /// How many, each as often as it is open.
        open: usize,
    },
    /// Its source may go on.
    #[error(
        "promote the replica of {group:?}: it is not failed over, or a source has sent something since; fail over first, so that \
         there are never two sides that write"
    )]
    NotFailedOver {
        /// The group.
        group: GroupId,
    },
    /// Somebody looks at a point that would go.
    #[error("point {epoch} of {group:?} is being read or exported; end that first")]
    InUse {
        /// The group.
        group: GroupId,
        /// The point.
        epoch: Epoch,
    },
    /// The epoch is applied already.
    #[error("apply epoch {epoch} to the replica of {group:?}, which holds epoch {applied}: replayed")]
    Replayed {
        /// The group.
        group: GroupId,
        /// The changeset's.
        epoch: Epoch,
        /// The replica's last.
        applied: Epoch,
    },
    /// Epochs between the replica's last and this one are missing.
    #[error(
        "apply epoch {epoch} to the replica of {group:?}, which holds epoch {applied}: epochs between them are \
         missing; send epoch {} first", applied.next()
    )]
    Gap {
        /// The group.
        group: GroupId,
        /// The changeset's.
        epoch: Epoch,
        /// The replica's last.
        applied: Epoch,
    },
    /// A volume of the changeset does not fit its replica.
    #[error("apply epoch {epoch} to volume {name:?} ({id}): {problem}")]
    Volume {
        /// The changeset's.
        epoch: Epoch,
        /// The volume.
        id: VolumeId,
        /// Its name.
        name: String,
        /// What does not fit.
        problem: VolumeProblem,
    },
    /// The changeset contradicts itself.
    #[error("apply epoch {epoch} of {group:?}: {problem}")]
    Invalid {
        /// The group.
        group: GroupId,
        /// The changeset's.
        epoch: Epoch,
        /// What is wrong.
        problem: String,
    },
    /// The target's storage is full. Nothing changed; the same changeset may be applied again when there is space.
    #[error("{doing} {}: no space left: {source}; free space or shorten retention", path.display())]
    NoSpace {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The system refused. While applying, this poisons the replica.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An earlier failure left it unknown what the images hold.
    #[error("the replica of {group:?} is poisoned: {reason}; mend the storage, then open the replica again")]
    Poisoned {
        /// The group.
        group: GroupId,
        /// The earlier failure.
        reason: String,
    },
    /// A file does not hold what its format says.
    #[error("read {}: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory is not a replica that this configuration may open.
    #[error("open replica {}: {problem}", path.display())]
    Unusable {
        /// The directory, image or device.
        path: PathBuf,
        /// Why, and what to do.
        problem: String,
    },
    /// No recovery point is kept for the epoch.
    #[error(
        "there is no recovery point {epoch} of group {group}{}; `seawall points` lists them",
        nearest.map(|nearest| format!("; the nearest is {nearest}")).unwrap_or_default()
    )]
    NoSuchPoint {
        /// The group.
        group: GroupId,
        /// The epoch asked for.
        epoch: Epoch,
        /// The point that is nearest to it and can be viewed.
        nearest: Option<Epoch>,
    },
    /// The recovery point cannot be viewed: a layer after it is damaged.
    #[error(
        "open a view of {group:?} at epoch {epoch}: the way back to it leads through {}, which is damaged: {problem};          choose a newer point", path.display()
    )]
    UnusablePoint {
        /// The group.
        group: GroupId,
        /// The recovery point.
        epoch: Epoch,
        /// The newest damaged layer after it.
        path: PathBuf,
        /// What is wrong with that.
        problem: String,
    },
    /// A block of an image is damaged, and a view comes to it.
    #[error(
        "read byte {offset} of volume {volume} from {}: scrubbing found that block damaged; a resync of the volume mends \
         it; older points may have it from undo layers", path.display()
    )]
    DamagedImage {
        /// The image.
        path: PathBuf,
        /// The volume.
        volume: VolumeId,
        /// Where the first damaged block begins.
        offset: ByteOffset,
    },
    /// The recovery point may not go.
    #[error("delete recovery point {epoch} of {group:?}: {problem}")]
    PointStays {
        /// The group.
        group: GroupId,
        /// The recovery point.
        epoch: Epoch,
        /// Why, and what to do.
        problem: String,
    },
    /// A point cannot be pinned.
    #[error("pin recovery point {epoch} of {group:?}: {problem}")]
    Pin {
        /// The group.
        group: GroupId,
        /// The recovery point.
        epoch: Epoch,
        /// Why not, and what to do.
        problem: String,
    },
    /// Work in the background was told to stop. Nothing changed.
    #[error("stopped before it was done; nothing changed")]
    Stopped,
    /// The recovery point has no such volume.
    #[error(
        "open a view of {volume:?} at epoch {epoch} of {group:?}: that recovery point has no such volume"
    )]
    NoSuchVolume {
        /// The group.
        group: GroupId,
        /// The volume asked for.
        volume: VolumeId,
        /// The recovery point.
        epoch: Epoch,
    },
    /// A read past a view's end.
    #[error("read {} bytes at {offset} of a view of {} bytes: past its end", length.0, size.0)]
    PastEnd {
        /// Where.
        offset: ByteOffset,
        /// How many bytes.
        length: ByteCount,
        /// The view's size.
        size: ByteCount,
    },
}

/// Why a changeset's volume does not fit its replica.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeProblem {
    /// The source's disk became smaller.
    #[error(
        "it shrank from {} to {} bytes, and what lay past its end would be lost from older points; start a new \
         replica", before.0, after.0
    )]
    Shrunk {
        /// The replica's size.
        before: ByteCount,
        /// The changeset's.
        after: ByteCount,
    },
    /// The volume's size is not a number of sectors.
    #[error("its size of {} bytes is not a multiple of 512", .0.0)]
    Size(ByteCount),
    /// Devices are named by volume name, and another volume has that name.
    #[error(
        "volume {other} has the same name and its replica on the device named for it; give them different names"
    )]
    DeviceTaken {
        /// The volume that is on the device.
        other: VolumeId,
    },
    /// The operator's device cannot hold the volume.
    #[error("it has {} bytes and the device {} only {}; give a larger device", needed.0, path.display(), size.0)]
    DeviceTooSmall {
        /// The device.
        path: PathBuf,
        /// The device's size.
        size: ByteCount,
        /// The volume's.
        needed: ByteCount,
    },
}

impl ReplicaError {
    /// Whether the same call may succeed later without anyone mending the replica.
    pub fn is_retryable(&self) -> bool {
        matches!(self, ReplicaError::NoSpace { .. })
    }

    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> ReplicaError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                ReplicaError::NoSpace { doing, path, source }
            }
            _ => ReplicaError::Io { doing, path, source },
        }
    }

    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> ReplicaError {
        ReplicaError::Corrupt { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn unusable(path: &Path, problem: impl Into<String>) -> ReplicaError {
        ReplicaError::Unusable { path: path.to_owned(), problem: problem.into() }
    }
}

/// Names what was tried on what, for a failed call into storage.
pub(crate) trait Context<T> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T, ReplicaError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T, ReplicaError> {
        self.map_err(|error| ReplicaError::io(doing, path, error))
    }
}
