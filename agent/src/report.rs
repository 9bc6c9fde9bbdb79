//! What the agent says of itself: for status, and for the process server, which keeps the last one.

use std::sync::Arc;

use block::{ByteCount, Epoch, UnixNanos, VolumeId};
use capture::{Mode, SourceStatus};
use control::{AgentReport, CaptureMode, ResyncStatus, StateCode, VolumeReport, VolumeSummary};
use parking_lot::Mutex;
use telemetry::Meter;
use wire::{RefusalCode, WireError};

use crate::config::AgentConfig;
use crate::hand_over::Disks;
use crate::limits::process_time;
use crate::outbox::{Mismatch, Outbox};
use crate::volumes::{Presence, Volumes};

struct State {
    report: AgentReport,
    churn: Meter,
    processor_ns: Meter,
    sent: Meter,
    /// What is wrong with capture; it does not mend itself.
    failure: Option<String>,
    /// What is wrong with the way to the process server.
    link: Option<Broken>,
}

/// What is wrong with the way to the process server, and when it is tried again.
struct Broken {
    code: StateCode,
    reason: String,
    next_try: UnixNanos,
}

/// Shared between the engine and delivery.
pub(crate) struct Reports {
    state: Mutex<State>,
    devices: Vec<(VolumeId, String, String)>,
    notes: Vec<String>,
    presence: Arc<Presence>,
    disks: Arc<Disks>,
    memory: ByteCount,
}

impl Reports {
    pub(crate) fn new(
        config: &AgentConfig,
        volumes: &Volumes,
        notes: Vec<String>,
        disks: Arc<Disks>,
    ) -> Reports {
        for note in &notes {
            tracing::info!(capture = note, "capture chosen");
        }
        let devices = volumes
            .list
            .iter()
            .map(|volume| (volume.id, volume.name.clone(), volume.path.display().to_string()))
            .collect();
        let state = State {
            report: AgentReport {
                state: StateCode::Starting,
                version: env!("CARGO_PKG_VERSION").into(),
                capture_notes: notes.clone(),
                ..AgentReport::default()
            },
            churn: Meter::new(),
            processor_ns: Meter::new(),
            sent: Meter::new(),
            failure: None,
            link: None,
        };
        let (presence, memory) = (volumes.presence.clone(), config.agent.epoch_memory_bytes);
        Reports { state: Mutex::new(state), devices, notes, presence, disks, memory }
    }

    pub(crate) fn latest(&self) -> AgentReport {
        let handed_over = self.disks.are_handed_over();
        AgentReport { handed_over, ..self.state.lock().report.clone() }
    }

    /// Capture or sealing has ended for good.
    pub(crate) fn fail(&self, reason: String) {
        let mut state = self.state.lock();
        state.report.state = StateCode::CaptureFailed;
        state.report.last_error = Some(reason.clone());
        state.failure = Some(reason);
    }

    /// The way to the process server works.
    pub(crate) fn connected(&self) {
        self.state.lock().link = None;
    }

    /// The way to the process server does not work.
    pub(crate) fn disconnected(&self, error: &WireError, next_try: UnixNanos) {
        self.state.lock().link = Some(Broken { code: state_of(error), reason: error.to_string(), next_try });
    }

    /// The two sides do not belong together.
    pub(crate) fn mismatched(&self, mismatch: &Mismatch, next_try: UnixNanos) {
        let code = match mismatch {
            Mismatch::Ahead { .. } => StateCode::Superseded,
            Mismatch::Behind { .. } => StateCode::Gap,
        };
        self.state.lock().link = Some(Broken { code, reason: mismatch.to_string(), next_try });
    }

    pub(crate) fn sent(&self, bytes: ByteCount) {
        self.state.lock().sent.add(bytes.0);
    }

    /// In words, which disks have been taken away.
    fn gone(&self) -> Option<String> {
        let gone: Vec<String> = self
            .devices
            .iter()
            .enumerate()
            .filter(|(index, _)| self.presence.gone(*index))
            .map(|(_, (_, name, device))| format!("{name} ({device})"))
            .collect();
        (!gone.is_empty()).then(|| {
            let gone = gone.join(", ");
            format!(
                "the disk of {gone} was taken away; no recovery points meanwhile. Attach it, or take it out of the \
                 configuration and start the agent again"
            )
        })
    }

    /// Renews the report from the source and the outbox. `open`: memory of the open epoch, and whether it must wait.
    pub(crate) fn update(
        &self,
        status: SourceStatus,
        outbox: &Outbox,
        resync: Option<ResyncStatus>,
        memory_used: ByteCount,
        open: (ByteCount, bool),
    ) {
        let progress = outbox.progress();
        let mut state = self.state.lock();
        let used = (process_time().as_nanos() as u64).saturating_sub(state.processor_ns.total());
        state.processor_ns.add(used);
        state.churn.add(status.written.0.saturating_sub(state.churn.total()));
        let bitmap = status.volumes.iter().any(|volume| volume.mode == Mode::Bitmap);
        let behind = status.volumes.iter().any(|volume| volume.dirty > ByteCount::ZERO)
            || status.draining > ByteCount::ZERO;
        let gone = self.gone();
        let code = match &state.link {
            _ if state.failure.is_some() => StateCode::CaptureFailed,
            _ if gone.is_some() => StateCode::SourceFailed,
            Some(broken) => broken.code,
            None if status.suspect > ByteCount::ZERO && progress.held.held > Epoch::NONE => StateCode::Resync,
            None if !progress.had_point => StateCode::InitialCopy,
            None if behind && status.losses > 0 => StateCode::Resync,
            None if behind && !bitmap => StateCode::CatchingUp,
            None if bitmap => StateCode::CaptureLimited,
            None => StateCode::Replicating,
        };
        let link_error = state.link.as_ref().map(|broken| broken.reason.clone());
        let next_try = state.link.as_ref().map(|broken| broken.next_try);
        let last_error = state
            .failure
            .clone()
            .or(gone)
            .or(link_error)
            .or(status.last_error)
            .or_else(|| (code == StateCode::CaptureLimited).then(|| self.notes.join("; ")));
        let mut volumes: Vec<VolumeReport> = status
            .volumes
            .iter()
            .zip(&self.devices)
            .enumerate()
            .map(|(index, (volume, (id, name, device)))| VolumeReport {
                volume: VolumeSummary { id: *id, name: name.clone(), size: volume.size },
                device: device.clone(),
                mode: match volume.mode {
                    _ if self.presence.gone(index) => CaptureMode::Lost,
                    Mode::Data => CaptureMode::Data,
                    Mode::Bitmap => CaptureMode::Bitmap,
                    Mode::Scan => CaptureMode::Scan,
                },
                dirty_bytes: volume.dirty,
                draining_bytes: ByteCount::ZERO,
                drained_total: ByteCount::ZERO,
            })
            .collect();
        if let Some(first) = volumes.first_mut() {
            // Drains are counted for the group; the first volume carries them.
            first.draining_bytes = status.draining;
            first.drained_total = status.drained;
        }
        state.report = AgentReport {
            time: UnixNanos::now(),
            version: env!("CARGO_PKG_VERSION").into(),
            captured: progress.numbered.next(),
            sealed: progress.sealed,
            cached: progress.held.held,
            applied: progress.held.applied,
            sealed_cut_time: progress.sealed_cut_time,
            volumes,
            churn_bytes_per_s: state.churn.per_second(),
            sent_bytes_per_s: state.sent.per_second(),
            written_bytes_total: status.written,
            sent_bytes_total: ByteCount(state.sent.total()),
            ring_used: status.ring_used,
            ring_bytes: status.ring,
            missed_writes_total: status.missed,
            overflow_total: status.missed_ring,
            epoch_memory_used: memory_used,
            epoch_memory_limit: self.memory,
            unsent_bytes: progress.bytes,
            open_bytes: open.0,
            coalescing: open.1,
            suspect_bytes: status.suspect,
            compared_bytes: status.compared,
            different_bytes: status.different,
            processors_used: state.processor_ns.per_second() / 1e9,
            memory_resident: memory_resident(),
            capture_notes: self.notes.clone(),
            state: code,
            last_error,
            resync,
            next_try,
            // As it is when somebody asks.
            handed_over: false,
        };
    }
}

/// Pages of this process that are in memory; 0 when the kernel does not say.
fn memory_resident() -> ByteCount {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok());
    ByteCount(pages.unwrap_or(0) * rustix::param::page_size() as u64)
}

/// What an error on the way to the next part means to a person.
fn state_of(error: &WireError) -> StateCode {
    match error {
        WireError::Tls { .. } | WireError::Identity { .. } | WireError::Credentials(_) => {
            StateCode::Unauthenticated
        }
        WireError::Handshake { .. } => StateCode::VersionMismatch,
        WireError::Refused { code, .. } => match code {
            RefusalCode::Version => StateCode::VersionMismatch,
            RefusalCode::Unauthorised | RefusalCode::WrongGroup | RefusalCode::UnknownGroup => {
                StateCode::Unauthorised
            }
            RefusalCode::Generation => StateCode::Fenced,
            RefusalCode::Replayed | RefusalCode::Gap => StateCode::Gap,
            RefusalCode::Corrupt => StateCode::Corrupt,
            RefusalCode::Full => StateCode::CacheFull,
            RefusalCode::Superseded => StateCode::Superseded,
            RefusalCode::Failed => StateCode::StoreFailed,
            _ => StateCode::Unreachable,
        },
        _ => StateCode::Unreachable,
    }
}
