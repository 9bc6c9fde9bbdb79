//! The last boot proof of a group: told by whoever has seen a machine come up, kept over restarts.

use std::path::{Path, PathBuf};

use block::{Epoch, GroupId, UnixNanos, VolumeId};
use control::ProofInfo;
use durable::{RealStorage, RecordError, RecordFile};
use parking_lot::Mutex;
use wire::RefusalCode;

use crate::operate::{json, unknown};
use crate::refusal::Refusal;
use crate::server::Server;

const FILE_NAME: &str = "proof";

/// Where a group's last proof is kept.
pub(crate) struct LastProof {
    path: PathBuf,
    /// Or why it is not known.
    last: Mutex<Result<Option<ProofInfo>, String>>,
}

impl LastProof {
    /// `dir`: the group's.
    pub(crate) fn open(dir: &Path) -> LastProof {
        let path = dir.join(FILE_NAME);
        let last = match RecordFile::open(&RealStorage, &path) {
            Ok((_, json)) => serde_json::from_slice(&json)
                .map(Some)
                .map_err(|error| format!("read {}: {error}", path.display())),
            Err(RecordError::Missing(_)) => Ok(None),
            Err(error) => Err(error.to_string()),
        };
        LastProof { path, last: Mutex::new(last) }
    }

    pub(crate) fn last(&self) -> Option<ProofInfo> {
        self.last.lock().clone().ok().flatten()
    }

    /// What a person should know.
    pub(crate) fn warning(&self) -> Option<String> {
        let problem = self.last.lock().clone().err()?;
        Some(format!(
            "which point was proven last is not known: {problem}. Prove one again with `seawall prove`"
        ))
    }

    fn keep(&self, proof: &ProofInfo) -> Result<(), RecordError> {
        let mut last = self.last.lock();
        // Whole, so that one that cannot be read goes with it.
        RecordFile::create(&RealStorage, &self.path, json(proof).as_bytes())?;
        *last = Ok(Some(proof.clone()));
        Ok(())
    }
}

/// Keeps a proof, as the last one.
pub(crate) fn keep(
    server: &Server,
    operator: String,
    id: GroupId,
    epoch: Epoch,
    volumes: &[VolumeId],
    took_ms: u64,
) -> Result<String, Refusal> {
    let group = server.group(id).ok_or_else(|| unknown(id))?;
    let point = group.replica()?.point(epoch)?;
    let mut names = Vec::new();
    for volume in volumes {
        let known = point.volumes.iter().find(|info| info.id == *volume);
        let known = known.ok_or_else(|| {
            let message = format!("keep the proof of point {epoch}: it has no volume {volume}");
            Refusal::new(RefusalCode::NotFound, message)
        })?;
        names.push(known.name.clone());
    }
    let cut_time = point.cut_time;
    let proof = ProofInfo { epoch, cut_time, volumes: names, proven: UnixNanos::now(), took_ms, operator };
    group.proof.keep(&proof).map_err(|error| Refusal::new(RefusalCode::Failed, error.to_string()))?;
    tracing::info!(group = %id, %epoch, took_ms, "a machine came up from a point");
    Ok(json(&proof))
}
