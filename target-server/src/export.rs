//! Exports of this server's points over NBD: started, listed and stopped by operators.
//!
//! An export holds a view of each of its volumes, so that the layers that it needs stay; and an overlay on each when it is
//! writable. It ends when it is stopped, when its time is over, when the server stops, and, unless detached, when its operator's
//! connection ends.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use block::{ByteCount, UnixNanos, VolumeId};
use control::{
    ExportInfo, ExportPlace, ExportRequest, ExportsReply, PointInfo, PointSelector, VolumeSummary,
};
use durable::RealStorage;
use export::{Disk, Export, Exported, ListenError, Overlay, Place, Security, Space, TlsSide};
use parking_lot::Mutex;
use replica::PromotedVolume;
use tokio::sync::watch;
use wire::{LiveCredentials, Operation, RefusalCode, WireError};

use crate::operate::{json, open_view, unknown};
use crate::refusal::Refusal;
use crate::retain::epoch_of;
use crate::server::Server;

/// Exports at the same time. A further one is refused as busy.
pub const EXPORTS_MAX: usize = 16;
/// What an overlay may hold when nobody says otherwise. Past it the drill's writes fail.
pub const OVERLAY_LIMIT_DEFAULT: ByteCount = ByteCount::gib(16);

/// What a time limit may be. A longer one is refused; without one an export goes on until it is stopped.
pub const EXPORT_TIME_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// The exports of a server.
pub(crate) struct Exports {
    tls: TlsSide,
    address: IpAddr,
    next: AtomicU64,
    /// `None` while one is being started, so that the limit holds.
    running: Mutex<BTreeMap<u64, Option<Arc<Running>>>>,
}

struct Running {
    id: u64,
    request: ExportRequest,
    point: PointInfo,
    volumes: Vec<VolumeSummary>,
    overlays: Vec<Arc<Overlay>>,
    place: ExportPlace,
    operator: String,
    since: UnixNanos,
    /// After so long it ends by itself.
    lasts: Option<Duration>,
    export: Export,
    /// Becomes true when it is to end; whoever waits for its operator ends it.
    ended: watch::Sender<bool>,
}

impl Running {
    fn info(&self) -> ExportInfo {
        let counted = self.export.counted();
        let sum = |of: fn(&Overlay) -> ByteCount| {
            self.overlays.iter().fold(ByteCount::ZERO, |sum, overlay| sum.saturating_add(of(overlay)))
        };
        ExportInfo {
            id: self.id,
            group: self.request.group,
            point: self.point.clone(),
            volumes: self.volumes.clone(),
            place: self.place.clone(),
            writable: self.request.writable,
            promoted: self.request.promoted,
            detached: self.request.detach,
            operator: self.operator.clone(),
            since: self.since,
            drill: self.request.drill.clone(),
            until: self.lasts.map(|lasts| UnixNanos(self.since.0.saturating_add(lasts.as_nanos() as u64))),
            connections: counted.connections as u64,
            read_bytes: counted.read,
            written_bytes: counted.written,
            overlay_bytes: sum(Overlay::held),
            overlay_limit: sum(Overlay::limit),
        }
    }
}

impl Exports {
    /// None yet. `address` is where the server itself listens.
    pub(crate) fn new(credentials: Arc<LiveCredentials>, address: IpAddr) -> Exports {
        let shown = move || wire::foreign_server(&credentials.current());
        let tls = TlsSide { config: Arc::new(shown), admit: Arc::new(wire::operator_of) };
        Exports { tls, address, next: AtomicU64::new(1), running: Mutex::default() }
    }

    pub(crate) fn list(&self) -> Vec<ExportInfo> {
        let running: Vec<_> = self.running.lock().values().flatten().cloned().collect();
        running.iter().map(|running| running.info()).collect()
    }

    /// Ends an export; `None` when there is no such one. Waits until nothing of it runs.
    fn stop(&self, id: u64) -> Option<ExportInfo> {
        let running = {
            let mut all = self.running.lock();
            all.get(&id)?.as_ref()?;
            all.remove(&id)??
        };
        running.ended.send_replace(true);
        let info = running.info();
        tracing::info!(export = id, "export ends");
        Some(info)
    }

    pub(crate) fn stop_all(&self) {
        let all: Vec<u64> = self.running.lock().keys().copied().collect();
        for id in all {
            self.stop(id);
        }
    }

    /// Takes a number, when there is room.
    fn reserve(&self) -> Result<u64, Refusal> {
        let mut running = self.running.lock();
        if running.len() >= EXPORTS_MAX {
            let message = format!(
                "export a point: {EXPORTS_MAX} exports are running already; `seawall export list` shows them, `seawall \
                 export stop ID` ends one"
            );
            return Err(Refusal::new(RefusalCode::Busy, message));
        }
        let id = self.next.fetch_add(1, Relaxed);
        running.insert(id, None);
        Ok(id)
    }

    fn start(
        &self,
        server: &Server,
        request: ExportRequest,
        operator: String,
    ) -> Result<Arc<Running>, Refusal> {
        let id = self.reserve()?;
        let started = self.open(server, id, request, operator);
        let mut running = self.running.lock();
        match &started {
            Ok(started) => running.insert(id, Some(started.clone())),
            Err(_) => running.remove(&id),
        };
        started
    }

    fn open(
        &self,
        server: &Server,
        id: u64,
        request: ExportRequest,
        operator: String,
    ) -> Result<Arc<Running>, Refusal> {
        let bad = |message: String| Refusal::new(RefusalCode::BadRequest, message);
        if request.promoted && request.writable {
            return Err(bad(
                "export a promoted volume: what is written to it stays; leave out the overlay".to_owned()
            ));
        }
        let lasts = request.time_limit_s.map(Duration::from_secs);
        if lasts.is_some_and(|lasts| lasts.is_zero() || lasts > EXPORT_TIME_MAX) {
            let most = EXPORT_TIME_MAX.as_secs() / 86_400;
            return Err(bad(format!("export a point: it may last from a second to {most} days")));
        }
        let wanted = wanted(server, &request)?;
        let mut selector = request.point;
        let (mut volumes, mut exported, mut overlays) = (Vec::new(), Vec::new(), Vec::new());
        let mut point = None;
        for volume in wanted {
            let (head, view) = open_view(server, request.group, volume, selector)?;
            // All volumes at one instant, also when the newest point changes meanwhile.
            selector = PointSelector::Epoch(head.point.epoch);
            let name = head.volume.name.clone();
            let mut disk: Arc<dyn Disk> = match request.promoted {
                true => Arc::new(promoted(server, &request, volume)?),
                false => Arc::new(view),
            };
            if request.writable {
                let overlay = overlay(server, &request, id, volume, disk)?;
                overlays.push(overlay.clone());
                disk = overlay;
            }
            let description = match request.promoted {
                true => format!("{name}, promoted: what is written stays"),
                false => format!(
                    "{name} at recovery point {}, {}-consistent{}",
                    head.point.epoch,
                    head.point.consistency,
                    if request.writable { ", writable" } else { "" }
                ),
            };
            exported.push(Exported { name, description, disk });
            volumes.push(head.volume);
            point.get_or_insert(head.point);
        }
        let point = point.ok_or_else(|| bad("export a point: it has no volumes".to_owned()))?;
        let (place, security) = match &request.place {
            ExportPlace::Socket(path) if !path.is_absolute() => {
                let path = path.display();
                return Err(bad(format!("export on socket {path}: give an absolute path")));
            }
            ExportPlace::Socket(path) => (Place::Socket(path.clone()), Security::Open),
            ExportPlace::Tls(address) => (Place::Tcp(*address), Security::Required(self.tls.clone())),
            ExportPlace::Beside => {
                (Place::Tcp(SocketAddr::new(self.address, 0)), Security::Required(self.tls.clone()))
            }
            ExportPlace::Plain(address) => (Place::Tcp(*address), Security::Open),
        };
        let export = Export::start(exported, place, security).map_err(|error| {
            let code = match &error {
                ListenError::Taken { .. } => RefusalCode::BadRequest,
                ListenError::Io { .. } => RefusalCode::Failed,
            };
            Refusal::new(code, format!("export a point: {error}"))
        })?;
        let place = match (&request.place, export.place()) {
            (ExportPlace::Plain(_), Place::Tcp(address)) => ExportPlace::Plain(*address),
            (_, Place::Tcp(address)) => ExportPlace::Tls(*address),
            (_, Place::Socket(path)) => ExportPlace::Socket(path.clone()),
        };
        tracing::info!(
            export = id, group = %request.group, point = %point.epoch, ?place, writable = request.writable, operator,
            "export begins"
        );
        Ok(Arc::new(Running {
            id,
            request,
            point,
            volumes,
            overlays,
            place,
            operator,
            since: UnixNanos::now(),
            lasts,
            export,
            ended: watch::Sender::new(false),
        }))
    }
}

/// The volumes to be exported.
fn wanted(server: &Server, request: &ExportRequest) -> Result<Vec<VolumeId>, Refusal> {
    let mut wanted = request.volumes.clone();
    if wanted.is_empty() {
        let unknown = || {
            let message = format!("export group {}: this target server does not keep it", request.group);
            Refusal::new(RefusalCode::UnknownGroup, message)
        };
        let group = server.group(request.group).ok_or_else(unknown)?;
        let replica = group.replica()?;
        let point = replica.point(epoch_of(replica, request.point)?)?;
        wanted = point.volumes.iter().map(|info| info.id).collect();
    }
    let mut distinct = wanted.clone();
    distinct.sort_unstable();
    distinct.dedup();
    if distinct.len() < wanted.len() {
        return Err(Refusal::new(RefusalCode::BadRequest, "export a point: a volume is named twice"));
    }
    Ok(wanted)
}

/// A volume for writing. While the export holds it, the group is not demoted.
fn promoted(server: &Server, request: &ExportRequest, volume: VolumeId) -> Result<PromotedVolume, Refusal> {
    let group = server.group(request.group).ok_or_else(|| unknown(request.group))?;
    Ok(group.replica()?.promoted_volume(volume)?)
}

fn overlay(
    server: &Server,
    request: &ExportRequest,
    id: u64,
    volume: VolumeId,
    base: Arc<dyn Disk>,
) -> Result<Arc<Overlay>, Refusal> {
    let failed = |error: String| Refusal::new(RefusalCode::Failed, format!("export a point: {error}"));
    let group = server.group(request.group).ok_or_else(|| failed("the group is gone".to_owned()))?;
    let limit = request.overlay_limit.unwrap_or(OVERLAY_LIMIT_DEFAULT);
    // The overlays' own directory may not exist yet; the replica's does, on the same file system.
    let dir = group.overlays.parent().unwrap_or(&group.overlays);
    let space = Space::in_dir(dir, limit);
    let overlay = Overlay::create(&RealStorage, &group.overlays, &format!("{id}-{volume}"), base, space);
    overlay.map(Arc::new).map_err(|error| failed(error.to_string()))
}

/// Answers a request to export.
pub(crate) async fn serve(
    server: &Arc<Server>,
    operation: Operation,
    request: ExportRequest,
) -> Result<(), WireError> {
    let operator = operation.peer().to_string();
    if request.detach {
        return match start_detached(server, request, operator).await {
            Ok(info) => operation.reply(&json(&info)).await,
            Err(refusal) => {
                operation.refuse(refusal.code, &refusal.message);
                Ok(())
            }
        };
    }
    let running = match start(server, request, operator).await {
        Ok(running) => running,
        Err(refusal) => {
            operation.refuse(refusal.code, &refusal.message);
            return Ok(());
        }
    };
    let id = running.id;
    let over = over(running.ended.subscribe(), running.lasts);
    let head = json(&running.info());
    drop(running);
    let writer = match operation.stream(&head).await {
        Ok(writer) => writer,
        Err(error) => {
            end(server, id).await;
            return Err(error);
        }
    };
    let refusal = tokio::select! {
        _ = writer.ended() => None,
        why = over => Some((RefusalCode::NotFound, why)),
        () = server.stopping() => Some((RefusalCode::Stopping, "the target server is stopping")),
    };
    end(server, id).await;
    if let Some((code, message)) = refusal {
        writer.refuse(code, message);
    }
    Ok(())
}

async fn start(
    server: &Arc<Server>,
    request: ExportRequest,
    operator: String,
) -> Result<Arc<Running>, Refusal> {
    let starter = server.clone();
    let start = move || starter.exports.start(&starter, request, operator);
    let started = tokio::task::spawn_blocking(start).await;
    started.unwrap_or_else(|error| Err(Refusal::new(RefusalCode::Internal, error.to_string())))
}

/// Starts one that goes on by itself until it is ended, its time is over, or the server stops.
pub(crate) async fn start_detached(
    server: &Arc<Server>,
    request: ExportRequest,
    operator: String,
) -> Result<ExportInfo, Refusal> {
    let running = start(server, request, operator).await?;
    let (id, info) = (running.id, running.info());
    let over = over(running.ended.subscribe(), running.lasts);
    let is_limited = running.lasts.is_some();
    drop(running);
    if is_limited {
        let server = server.clone();
        tokio::spawn(async move {
            let why = tokio::select! {
                why = over => why,
                () = server.stopping() => return,
            };
            if end(&server, id).await.is_some() {
                tracing::info!(export = id, "{why}");
            }
        });
    }
    Ok(info)
}

/// Waits until an export has been stopped or its time is over; says which.
async fn over(mut ended: watch::Receiver<bool>, lasts: Option<Duration>) -> &'static str {
    let stopped = async {
        // A sender that is gone means the same.
        let _ = ended.wait_for(|ended| *ended).await;
    };
    let time = async {
        match lasts {
            Some(lasts) => tokio::time::sleep(lasts).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = stopped => "the export was stopped",
        () = time => "the export's time is over",
    }
}

/// Answers a request to stop one.
pub(crate) async fn stop(server: &Arc<Server>, operation: Operation, id: u64) -> Result<(), WireError> {
    match end(server, id).await {
        Some(info) => operation.reply(&json(&ExportsReply { exports: vec![info] })).await,
        None => {
            let message =
                format!("stop export {id}: there is no such export; `seawall export list` shows them");
            operation.refuse(RefusalCode::NotFound, &message);
            Ok(())
        }
    }
}

/// Ends one and waits until nothing of it runs, which may take as long as a request under way.
pub(crate) async fn end(server: &Arc<Server>, id: u64) -> Option<ExportInfo> {
    let server = server.clone();
    tokio::task::spawn_blocking(move || server.exports.stop(id)).await.unwrap_or_default()
}
