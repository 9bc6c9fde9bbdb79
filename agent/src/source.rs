use std::sync::Arc;

use anyhow::{Context, bail};
use block::{ByteCount, UnixNanos, VolumeId};
use capture::{
    CaptureError, Device, DirectDisks, Keep, KernelTap, KernelTapOptions, Resumed, ScanSource, Source,
    Tracker, TrackerLimits,
};
use changeset::VolumeInfo;
use control::ResyncReason;

use crate::check::obstacles;
use crate::compare::Comparisons;
use crate::config::{AgentConfig, SourceChoice};
use crate::resync::Cause;
use crate::volumes::Volume;

/// Threads that read dirty granules.
const DRAIN_THREADS: usize = 2;
/// A probe needs a ring, however small.
pub(crate) const PROBE_RING: ByteCount = ByteCount::kib(64);

/// What follows the group's disks.
pub(crate) struct Opened {
    pub(crate) source: Box<dyn Source>,
    /// What was chosen and why, in words.
    pub(crate) notes: Vec<String>,
    /// What an earlier agent has left, if tracking has gone on since.
    pub(crate) resumed: Option<Resumed>,
}

impl Opened {
    fn scan(source: Box<dyn Source>, notes: Vec<String>) -> Opened {
        Opened { source, notes, resumed: None }
    }

    fn chosen(mut self, notes: Vec<String>) -> Opened {
        self.notes.splice(0..0, notes);
        self
    }
}

/// Opens the volumes as the configuration asks for.
pub(crate) fn open(
    config: &AgentConfig,
    volumes: &[Volume],
    comparisons: &Arc<Comparisons>,
) -> anyhow::Result<Opened> {
    let choice = config.agent.source;
    let scan = || -> anyhow::Result<Box<dyn Source>> {
        forget_kept(config);
        let volumes: Vec<_> =
            volumes.iter().map(|volume| (volume.id, volume.name.clone(), volume.path.clone())).collect();
        Ok(Box::new(ScanSource::open(&volumes, config.agent.epoch_interval_ms)?))
    };
    match choice {
        SourceChoice::Scan => Ok(Opened::scan(scan()?, vec!["scan, as configured".into()])),
        SourceChoice::Ebpf | SourceChoice::EbpfBitmap => {
            let (opened, why_not_data) = ebpf(config, volumes, comparisons, choice == SourceChoice::Ebpf)?;
            if choice == SourceChoice::Ebpf
                && let Some(why) = why_not_data
            {
                bail!(
                    "capture write data with eBPF: {why}. Use source = \"auto\" to follow granules only, or \"scan\""
                );
            }
            Ok(opened.chosen(vec!["eBPF, as configured".into()]))
        }
        SourceChoice::Auto => match ebpf(config, volumes, comparisons, true) {
            Ok((opened, None)) => Ok(opened.chosen(vec!["eBPF with write data".into()])),
            Ok((opened, Some(why))) => {
                Ok(opened.chosen(with_obstacles(config, format!("eBPF without write data: {why}"))))
            }
            Err(error) => {
                let why = format!("{error:#}");
                let scan =
                    scan().with_context(|| format!("eBPF capture is not possible ({why}); scan instead"))?;
                let note = format!("scan, because eBPF capture is not possible: {why}");
                Ok(Opened::scan(scan, with_obstacles(config, note)))
            }
        },
    }
}

/// A lower mode than wished for, with what `check` finds in the way of a better one.
fn with_obstacles(config: &AgentConfig, note: String) -> Vec<String> {
    let facts = capture::check::machine(&capture::check::Places::default(), config.agent.ring_bytes);
    std::iter::once(note).chain(obstacles(&facts)).collect()
}

/// With the source: why data is not captured, if it is not.
fn ebpf(
    config: &AgentConfig,
    list: &[Volume],
    comparisons: &Arc<Comparisons>,
    data: bool,
) -> anyhow::Result<(Opened, Option<String>)> {
    let mut devices = Vec::new();
    let mut volumes = Vec::new();
    let mut disks = Vec::new();
    for volume in list {
        let device = Device::open(&volume.path)?;
        volumes.push(VolumeInfo {
            id: volume.id,
            name: volume.name.clone(),
            size: device.size(),
            logical_block: device.logical_block(),
        });
        disks.push(device.direct()?);
        devices.push(device);
    }
    let followed: Vec<(VolumeId, &Device)> = volumes.iter().map(|volume| volume.id).zip(&devices).collect();
    let (tap, mut notes) = attach(config, &followed, data)?;
    for (volume, device) in volumes.iter().zip(&devices).filter(|(_, device)| !device.counts_writes()) {
        notes.push(format!(
            "the kernel does not count what is written to {}, so that a write which no program sees would stay unknown. \
             Write 1 to queue/iostats below its folder in /sys/class/block",
            volume.name
        ));
        tracing::warn!(volume = volume.name, device = %device.path().display(), "queue/iostats is switched off");
    }
    for (volume, _) in volumes.iter().zip(&devices).filter(|(_, device)| device.is_read_only()) {
        notes.push(format!(
            "{} is read-only, so nothing changes on it; `seawall hand-over --release` or `blockdev --setrw` lets it be written to",
            volume.name
        ));
    }
    let why_not_data = tap.why_not_data().map(str::to_owned);
    let disks =
        DirectDisks::new(disks, DRAIN_THREADS).context("start the threads that read dirty granules")?;
    let resumed = tap.resumed();
    let whole = resumed.is_none() || tap.why_all().is_some();
    let ended = tap.why_all().map_or("nobody followed the disks before this agent", |why| why).to_owned();
    if resumed.is_some() {
        let all = tap.why_all().map(|why| format!("; all is read again: {why}")).unwrap_or_default();
        notes.push(format!("tracking went on while no agent ran{all}"));
    }
    let limits = TrackerLimits { share: config.agent.drain_share_percent, ..TrackerLimits::default() };
    let mut tracker = Tracker::new(tap, disks, volumes, limits, UnixNanos::now());
    tracker.compare_with(comparisons.begin());
    let status = tracker.status();
    let size: ByteCount = status.volumes.iter().map(|volume| volume.size).sum();
    // What an earlier agent has compared part of, goes on; what it has only waited with, waits.
    let begun = !whole && status.suspect > ByteCount::ZERO && status.suspect.0 < size.0;
    let cause = whole.then(|| Cause::new(ResyncReason::TrackingEnded, ended));
    comparisons.resyncs.expect(cause, begun);
    Ok((Opened { source: Box::new(tracker), notes, resumed }, why_not_data))
}

/// Attaches so that tracking outlives this process if it can, and says why if it cannot.
fn attach(
    config: &AgentConfig,
    volumes: &[(VolumeId, &Device)],
    data: bool,
) -> anyhow::Result<(KernelTap, Vec<String>)> {
    let mut options = KernelTapOptions { ring: config.agent.ring_bytes, data, keep: None };
    if config.agent.keep_tracking {
        let keep = Keep {
            folder: config.agent.tracking_folder.clone(),
            group: config.agent.group,
            generation: config.agent.generation,
        };
        options.keep = Some(keep);
        match KernelTap::attach(volumes, &options) {
            Err(CaptureError::NoBpfFileSystem { path, source }) => {
                options.keep = None;
                let note = format!(
                    "tracking ends with this process, and a restart reads everything again, because the BPF file \
                     system cannot be used at {}: {source}",
                    path.display()
                );
                return Ok((KernelTap::attach(volumes, &options)?, vec![note]));
            }
            attached => return Ok((attached?, Vec::new())),
        }
    }
    forget_kept(config);
    Ok((KernelTap::attach(volumes, &options)?, vec!["tracking ends with this process, as configured".into()]))
}

/// What an earlier agent has left is of no use to a source that does not go on from it, and would be wrong for a later one.
pub(crate) fn forget_kept(config: &AgentConfig) {
    if let Err(error) = capture::detach(&config.agent.tracking_folder, Some(&config.agent.group.to_string()))
    {
        tracing::warn!(%error, "end the tracking that an earlier agent has left");
    }
}

/// Whether writes of this disk can be captured with their data: attaches and detaches again.
///
/// # Errors
/// When they cannot; the error says why.
pub fn probe(device: &std::path::Path) -> anyhow::Result<()> {
    let device = Device::open(device)?;
    let options = KernelTapOptions { ring: PROBE_RING, data: true, keep: None };
    let tap = KernelTap::attach(&[(VolumeId([0; 16]), &device)], &options)?;
    match tap.why_not_data() {
        None => Ok(()),
        Some(why) => bail!("capture write data with eBPF: {why}"),
    }
}
