//! A group that this server keeps: its replica, who delivers, how it goes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{ByteCount, Epoch, Generation, GroupId, Label, UnixNanos};
use changeset::GroupKey;
use control::{PinInfo, PointInfo, StateCode, TargetGroup, VolumeSummary};
use durable::RealStorage;
use export::Overlay;
use parking_lot::Mutex;
use replica::{Applied, GroupReplica, Options, Point, ReplicaError};
use telemetry::{Latencies, Meter};
use tokio::sync::OwnedMutexGuard;
use wire::{Answerer, RefusalCode};

use crate::GroupConfig;
use crate::config::{Claim, ConfigError};
use crate::cutter::Cutter;
use crate::proof::LastProof;
use crate::refusal::Refusal;
use crate::upkeep::Upkeep;

/// The name of the point that adopted disks begin with.
pub(crate) const ADOPTED_LABEL: &str = "as found";

/// Where overlays are, below a group's directory.
const OVERLAYS_DIR: &str = "overlays";

pub(crate) struct Group {
    pub(crate) id: GroupId,
    /// The directory of the overlays of its exports.
    pub(crate) overlays: PathBuf,
    pub(crate) key: GroupKey,
    /// Why the replica could not be opened, in place of it. Other groups go on.
    replica: Result<Arc<GroupReplica>, Refusal>,
    _devices: Vec<Claim>,
    /// Held by the one delivery whose changesets are applied.
    turn: Arc<tokio::sync::Mutex<()>>,
    delivery: Mutex<Delivery>,
    applied_bytes: Meter,
    apply_times: Latencies,
    /// The last boot proof.
    pub(crate) proof: LastProof,
    /// While it is promoted.
    cutter: Mutex<Option<Cutter>>,
    /// Dropped with the group, which ends it.
    pub(crate) upkeep: Option<Upkeep>,
}

#[derive(Default)]
struct Delivery {
    /// The newest connection.
    answerer: Option<Answerer>,
    /// Who has the turn.
    sender: Option<String>,
    /// What went wrong, with the state that it means, until an epoch is applied.
    trouble: Option<StateCode>,
    last_error: Option<String>,
}

impl Group {
    /// Opens a group's replica. A replica that does not open makes a group that says why.
    pub(crate) fn open(config: &GroupConfig, data: &Path) -> Result<Group, ConfigError> {
        let key = config.load_key()?;
        let devices = config.claim_devices()?;
        let overlays = data.join(config.id.to_string()).join(OVERLAYS_DIR);
        match Overlay::sweep(&RealStorage, &overlays) {
            Ok(0) => {}
            Ok(removed) => tracing::warn!(group = %config.id, removed, "removed overlays that a crash left"),
            Err(error) => tracing::error!(group = %config.id, %error, "remove overlays that a crash left"),
        }
        let options = Options {
            devices: config.device_paths(),
            retention: (&config.retention).into(),
            ..Options::default()
        };
        let opened = GroupReplica::open(Arc::new(RealStorage), data, config.id, options);
        let opened = opened.and_then(|(replica, report)| {
            adopt(config, &devices, &replica)?;
            Ok((replica, report))
        });
        let replica = match opened {
            Ok((replica, report)) => {
                tracing::info!(group = %config.id, applied = %report.applied, "replica opened");
                if let Some(epoch) = report.rolled_back {
                    tracing::warn!(group = %config.id, %epoch, "took back an epoch that was half-applied");
                }
                for damaged in &report.damaged {
                    let (epoch, problem) = (damaged.epoch, &damaged.problem);
                    tracing::error!(
                        group = %config.id, %epoch, problem,
                        "undo layer is damaged: older recovery points are lost, the newest state is not"
                    );
                }
                Ok(Arc::new(replica))
            }
            Err(error) => {
                tracing::error!(group = %config.id, %error, "replica does not open; the group is not served");
                let mut refusal = Refusal::from(error);
                refusal.code = RefusalCode::Failed;
                refusal.state = refusal.state.or(Some(StateCode::StoreFailed));
                Err(refusal)
            }
        };
        let upkeep = match &replica {
            Ok(replica) => Some(Upkeep::start(config, replica.clone())),
            Err(_) => None,
        };
        let group = Group {
            id: config.id,
            cutter: Mutex::default(),
            proof: LastProof::open(&data.join(config.id.to_string())),
            overlays,
            upkeep,
            key,
            replica,
            _devices: devices,
            turn: Arc::default(),
            delivery: Mutex::default(),
            applied_bytes: Meter::new(),
            apply_times: Latencies::new(),
        };
        group.cut_by_itself();
        Ok(group)
    }

    /// Applies what is written from now on, while it is promoted.
    pub(crate) fn cut_by_itself(&self) {
        let Ok(replica) = &self.replica else { return };
        let mut cutter = self.cutter.lock();
        if replica.promoted().is_some() && cutter.as_ref().is_none_or(Cutter::is_over) {
            *cutter = Some(Cutter::start(replica.clone()));
        }
    }

    pub(crate) fn replica(&self) -> Result<&Arc<GroupReplica>, Refusal> {
        self.replica.as_ref().map_err(Refusal::clone)
    }

    /// Makes `answerer`'s connection the one that delivers, once the one before has finished what it was applying.
    /// `None` when a newer connection has taken over meanwhile.
    ///
    /// The newest connection wins: a sender that reconnects is served at once, though this side may not have noticed
    /// yet that its old connection is dead. Two senders of the same group take turns and see why; the order of epochs
    /// keeps both from doing harm.
    pub(crate) async fn take_turn(&self, answerer: &Answerer, sender: &str) -> Option<Turn<'_>> {
        let before = self.delivery.lock().answerer.replace(answerer.clone());
        if let Some(before) = before {
            let message = format!("deliver for group {}: {sender} has taken over", self.id);
            before.refuse(RefusalCode::Superseded, &message);
        }
        let guard = tokio::select! {
            guard = self.turn.clone().lock_owned() => guard,
            _ = answerer.ended() => return None,
        };
        if answerer.failure().is_some() {
            return None;
        }
        self.delivery.lock().sender = Some(sender.to_owned());
        Some(Turn { group: self, _guard: guard })
    }

    pub(crate) fn applied(&self, applied: &Applied, took: Duration) {
        self.applied_bytes.add(applied.written.0);
        self.apply_times.record(took);
        self.delivery.lock().trouble = None;
    }

    pub(crate) fn refused(&self, refusal: &Refusal) {
        let mut delivery = self.delivery.lock();
        if refusal.state.is_some() {
            delivery.trouble = refusal.state;
        }
        delivery.last_error = Some(refusal.message.clone());
    }

    fn state(&self, replica: &GroupReplica, newest: Option<&Point>) -> StateCode {
        if replica.poisoned().is_some() {
            return StateCode::StoreFailed;
        }
        if replica.promoted().is_some() {
            return StateCode::Promoted;
        }
        if replica.failover().is_some() {
            return StateCode::FailedOver;
        }
        let delivery = self.delivery.lock();
        match (delivery.trouble, &delivery.sender, newest) {
            (Some(trouble), ..) => trouble,
            (None, None, _) => StateCode::WaitingForAgent,
            (None, Some(_), None) => StateCode::InitialCopy,
            (None, Some(_), Some(newest)) if newest.epoch < replica.applied().1 => StateCode::CatchingUp,
            (None, Some(_), Some(_)) => StateCode::Replicating,
        }
    }

    pub(crate) fn status(&self) -> TargetGroup {
        let mut status = TargetGroup {
            group: self.id,
            generation: Default::default(),
            sender: None,
            volumes: Vec::new(),
            applied: Epoch::NONE,
            applied_cut_time: UnixNanos(0),
            failover: None,
            promoted: None,
            proof: self.proof.last(),
            newest_point: None,
            oldest_point: None,
            points: 0,
            newest_application_cut_time: None,
            undo_bytes: ByteCount::ZERO,
            applied_bytes_total: ByteCount(self.applied_bytes.total()),
            applied_bytes_per_s: self.applied_bytes.per_second(),
            apply_ms_p50: 0.0,
            apply_ms_p99: 0.0,
            state: StateCode::StoreFailed,
            last_error: None,
            warnings: Vec::new(),
        };
        let replica = match &self.replica {
            Ok(replica) => replica,
            Err(refusal) => {
                status.state = refusal.state.unwrap_or(StateCode::StoreFailed);
                status.last_error = Some(refusal.message.clone());
                return status;
            }
        };
        let (generation, applied) = replica.applied();
        let points = replica.points_summary();
        let times = self.apply_times.summary();
        status.generation = generation.unwrap_or_default();
        status.applied = applied;
        status.applied_cut_time = replica.applied_cut_time().unwrap_or_default();
        status.volumes = replica.volumes().into_iter().map(|volume| summary(&volume.info)).collect();
        status.failover = crate::failover::info(replica);
        status.promoted = crate::failover::promoted(replica);
        status.newest_point = points.newest.as_ref().map(point_info);
        status.oldest_point = points.oldest.as_ref().map(point_info);
        status.points = points.count;
        status.newest_application_cut_time = points.newest_application.map(|point| point.cut_time);
        let space = replica.space();
        status.undo_bytes = space.used;
        status.warnings.extend(space.warning);
        if points.unusable > 0 {
            status.warnings.push(format!(
                "{} recovery points cannot be viewed, for an undo layer is damaged; `seawall points` shows which",
                points.unusable
            ));
        }
        status.warnings.extend(self.proof.warning());
        status.warnings.extend(self.cutter.lock().as_ref().and_then(Cutter::warning));
        status.warnings.extend(self.upkeep.iter().flat_map(Upkeep::warnings));
        status.apply_ms_p50 = times.p50.as_secs_f64() * 1000.0;
        status.apply_ms_p99 = times.p99.as_secs_f64() * 1000.0;
        status.state = self.state(replica, points.newest.as_ref());
        let delivery = self.delivery.lock();
        status.sender.clone_from(&delivery.sender);
        status.last_error = replica.poisoned().or_else(|| delivery.last_error.clone());
        status
    }
}

/// A new replica of disks that come home begins with what is on them.
fn adopt(config: &GroupConfig, devices: &[Claim], replica: &GroupReplica) -> Result<(), ReplicaError> {
    if replica.applied() != (None, Epoch::NONE) {
        return Ok(());
    }
    let volumes = config.adopted(devices).map_err(|problem| ReplicaError::Invalid {
        group: config.id,
        epoch: Epoch::NONE,
        problem,
    })?;
    if volumes.is_empty() {
        return Ok(());
    }
    let generation = config.adopt_generation.unwrap_or(Generation(1));
    let label = Label::try_from(ADOPTED_LABEL.to_owned()).expect("it is short and plain");
    let adopted = replica.adopt(generation, &volumes, label)?;
    tracing::warn!(
        group = %config.id, %generation, epoch = %adopted.epoch,
        "adopted: what is on the devices is the first recovery point, pinned"
    );
    Ok(())
}

/// The right to apply changesets of a group, until dropped.
pub(crate) struct Turn<'a> {
    group: &'a Group,
    _guard: OwnedMutexGuard<()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.group.delivery.lock().sender = None;
    }
}

pub(crate) fn summary(info: &changeset::VolumeInfo) -> VolumeSummary {
    VolumeSummary { id: info.id, name: info.name.clone(), size: info.size }
}

pub(crate) fn point_info(point: &Point) -> PointInfo {
    PointInfo {
        epoch: point.epoch,
        cut_time: point.cut_time,
        consistency: point.consistency,
        note: point.note.clone(),
        changed_bytes: point.written.saturating_add(point.zeroed),
        pin: point.pin.as_ref().map(|pin| PinInfo {
            label: pin.label.clone(),
            pinned: pin.pinned,
            expires: pin.expires,
        }),
        kept_for: None,
        unusable: point.unusable.clone(),
    }
}
