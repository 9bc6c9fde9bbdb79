use anyhow::{Context, bail};
use block::{ByteCount, UnixNanos};
use capture::{Device, DirectDisks, KernelTap, KernelTapOptions, ScanSource, Source, Tracker, TrackerLimits};
use changeset::VolumeInfo;

use crate::check::obstacles;
use crate::config::{AgentConfig, SourceChoice};
use crate::volumes::Volume;

/// Threads that read dirty granules.
const DRAIN_THREADS: usize = 2;
/// A probe needs a ring, however small.
pub(crate) const PROBE_RING: ByteCount = ByteCount::kib(64);

/// Opens the volumes as the configuration asks for; with it, in words, what was chosen and why.
pub(crate) fn open(
    config: &AgentConfig,
    volumes: &[Volume],
) -> anyhow::Result<(Box<dyn Source>, Vec<String>)> {
    let choice = config.agent.source;
    let scan = || -> anyhow::Result<Box<dyn Source>> {
        let volumes: Vec<_> =
            volumes.iter().map(|volume| (volume.id, volume.name.clone(), volume.path.clone())).collect();
        Ok(Box::new(ScanSource::open(&volumes, config.agent.epoch_interval_ms)?))
    };
    match choice {
        SourceChoice::Scan => Ok((scan()?, vec!["scan, as configured".into()])),
        SourceChoice::Ebpf | SourceChoice::EbpfBitmap => {
            let (source, why_not_data) = ebpf(config, volumes, choice == SourceChoice::Ebpf)?;
            if choice == SourceChoice::Ebpf
                && let Some(why) = why_not_data
            {
                bail!(
                    "capture write data with eBPF: {why}. Use source = \"auto\" to follow granules only, or \"scan\""
                );
            }
            Ok((source, vec!["eBPF, as configured".into()]))
        }
        SourceChoice::Auto => match ebpf(config, volumes, true) {
            Ok((source, None)) => Ok((source, vec!["eBPF with write data".into()])),
            Ok((source, Some(why))) => {
                Ok((source, with_obstacles(config, format!("eBPF without write data: {why}"))))
            }
            Err(error) => {
                let why = format!("{error:#}");
                let scan =
                    scan().with_context(|| format!("eBPF capture is not possible ({why}); scan instead"))?;
                let note = format!("scan, because eBPF capture is not possible: {why}");
                Ok((scan, with_obstacles(config, note)))
            }
        },
    }
}

/// A lower mode than wished for, with what `check` finds in the way of a better one.
fn with_obstacles(config: &AgentConfig, note: String) -> Vec<String> {
    let facts = capture::check::machine(&capture::check::Places::default(), config.agent.ring_bytes);
    std::iter::once(note).chain(obstacles(&facts)).collect()
}

fn ebpf(
    config: &AgentConfig,
    list: &[Volume],
    data: bool,
) -> anyhow::Result<(Box<dyn Source>, Option<String>)> {
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
    let options = KernelTapOptions { ring: config.agent.ring_bytes, data };
    let tap = KernelTap::attach(&devices, options)?;
    let why_not_data = tap.why_not_data().map(str::to_owned);
    let disks =
        DirectDisks::new(disks, DRAIN_THREADS).context("start the threads that read dirty granules")?;
    let tracker = Tracker::new(tap, disks, volumes, TrackerLimits::default(), UnixNanos::now());
    Ok((Box::new(tracker), why_not_data))
}

/// Whether writes of this disk can be captured with their data: attaches and detaches again.
///
/// # Errors
/// When they cannot; the error says why.
pub fn probe(device: &std::path::Path) -> anyhow::Result<()> {
    let device = Device::open(device)?;
    let tap = KernelTap::attach(&[device], KernelTapOptions { ring: PROBE_RING, data: true })?;
    match tap.why_not_data() {
        None => Ok(()),
        Some(why) => bail!("capture write data with eBPF: {why}"),
    }
}
