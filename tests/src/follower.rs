//! Capture alone, without servers: a thread that drives a tracker as the agent does, and a replay of its epochs onto an image.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use block::{ByteCount, Epoch, Generation, GroupId, UnixNanos, VolumeId};
use capture::{
    Device, DirectDisks, Keep, KernelTap, KernelTapOptions, Progress, Source, SourceStatus, Tracker,
    TrackerLimits,
};
use changeset::{Fold, GroupKey, Level, Opener, Payload, SealOptions, Sealed, Stamp, VolumeInfo, seal};

const KEY: [u8; 32] = [7; 32];
/// The group that everything belongs to.
pub const GROUP: GroupId = GroupId([3; 16]);

/// A capture that runs in a thread.
pub struct Follower {
    stop: Arc<AtomicBool>,
    points: Arc<AtomicU64>,
    thread: Option<JoinHandle<anyhow::Result<Followed>>>,
}

/// What a capture gave.
pub struct Followed {
    /// Every epoch, in order.
    pub epochs: Vec<Sealed>,
    /// What the source said at the end.
    pub status: SourceStatus,
    /// The most that the ring held when looked at.
    pub ring_used_max: ByteCount,
}

/// How a capture is set up.
#[derive(Clone, Debug)]
pub struct FollowOptions {
    /// Ring size.
    pub ring: ByteCount,
    /// Data mode.
    pub data: bool,
    /// Between cuts.
    pub interval: Duration,
    /// Epoch memory.
    pub memory: ByteCount,
    /// How long the consumer sleeps after each step, to be slow on purpose.
    pub nap: Duration,
    /// Where tracking outlives it.
    pub keep: Option<Keep>,
    /// Gaps in tracking are expected.
    pub gaps: bool,
}

impl Default for FollowOptions {
    fn default() -> FollowOptions {
        FollowOptions {
            ring: ByteCount::mib(64),
            data: true,
            interval: Duration::from_millis(200),
            memory: ByteCount::mib(64),
            nap: Duration::ZERO,
            keep: None,
            gaps: false,
        }
    }
}

impl Follower {
    /// Attaches to the devices and follows them.
    ///
    /// # Errors
    /// When the kernel refuses, or data mode was asked for and is not to be had.
    pub fn start(devices: &[&Path], options: FollowOptions) -> anyhow::Result<Follower> {
        let devices = devices.iter().map(|path| Device::open(path)).collect::<Result<Vec<_>, _>>()?;
        let volumes = devices
            .iter()
            .enumerate()
            .map(|(index, device)| VolumeInfo {
                id: VolumeId([index as u8; 16]),
                name: format!("disk{index}"),
                size: device.size(),
                logical_block: device.logical_block(),
            })
            .collect();
        let disks = devices.iter().map(Device::direct).collect::<Result<Vec<_>, _>>()?;
        let followed: Vec<(VolumeId, &Device)> =
            devices.iter().enumerate().map(|(index, device)| (VolumeId([index as u8; 16]), device)).collect();
        let tap_options =
            KernelTapOptions { ring: options.ring, data: options.data, keep: options.keep.clone() };
        let tap = KernelTap::attach(&followed, &tap_options)?;
        if let (true, Some(why)) = (options.data, tap.why_not_data()) {
            bail!("data mode is off: {why}");
        }
        let tracker = Tracker::new(
            tap,
            DirectDisks::new(disks, 2)?,
            volumes,
            // What is tested is correctness; the application need not be spared.
            TrackerLimits { share: 100, ..TrackerLimits::default() },
            UnixNanos::now(),
        );
        let stop = Arc::new(AtomicBool::new(false));
        let points = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let (stop, points) = (stop.clone(), points.clone());
            move || follow(tracker, &options, &stop, &points)
        });
        Ok(Follower { stop, points, thread: Some(thread) })
    }

    /// Waits until so many points have been cut.
    ///
    /// # Errors
    /// When capture ended, or 120 s were not enough.
    pub fn wait_for_points(&self, count: u64) -> anyhow::Result<()> {
        let limit = Instant::now() + Duration::from_secs(120);
        while self.points.load(Ordering::SeqCst) < count {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            ensure!(!ended && Instant::now() < limit, "only {} points", self.points.load(Ordering::SeqCst));
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Stops when everything is drained and consumed, with a last cut.
    ///
    /// # Errors
    /// When capture failed, or does not settle within 60 s.
    pub fn finish(mut self) -> anyhow::Result<Followed> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("a follower finishes once")?;
        thread.join().map_err(|_| anyhow::anyhow!("the follower panicked"))?
    }
}

fn follow(
    mut source: impl Source,
    options: &FollowOptions,
    stop: &AtomicBool,
    points: &AtomicU64,
) -> anyhow::Result<Followed> {
    let mut epochs = Vec::new();
    let mut reuse = Fold::new();
    let mut next_cut = Instant::now() + options.interval;
    let mut ring_used_max = ByteCount::ZERO;
    let mut give_up = None;
    let key = GroupKey::from_bytes(KEY);
    loop {
        ring_used_max = ring_used_max.max(source.status().ring_used);
        let progress = source.advance(UnixNanos::now(), options.memory)?;
        let stopping = stop.load(Ordering::SeqCst);
        let settled = stopping && progress == Progress::Idle && source.consistency().is_point();
        if progress == Progress::Full || Instant::now() >= next_cut || settled {
            let epoch = Epoch(epochs.len() as u64 + 1);
            let cut = source.cut(reuse, epoch);
            points.fetch_add(u64::from(cut.consistency.is_point()), Ordering::SeqCst);
            let stamp = Stamp {
                group: GROUP,
                generation: Generation(1),
                epoch,
                consistency: cut.consistency,
                cut_time: cut.time,
            };
            let options_seal = SealOptions { level: Level::Fast, threads: 1 };
            epochs.push(seal(&stamp, &source.volumes(), &cut.fold, &key, options_seal)?);
            reuse = cut.fold;
            reuse.clear();
            next_cut = Instant::now() + options.interval;
        }
        if settled {
            let status = source.status();
            ensure!(options.gaps || status.losses == 0, "tracking had a gap: {status:?}");
            return Ok(Followed { epochs, status, ring_used_max });
        }
        if stopping {
            let limit = *give_up.get_or_insert_with(|| Instant::now() + Duration::from_secs(60));
            ensure!(Instant::now() < limit, "capture does not settle: {:?}", source.status());
        }
        if progress == Progress::Idle {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(options.nap);
    }
}

impl Followed {
    /// Which epochs are offered as recovery points, by their place in `epochs`.
    pub fn points(&self) -> Vec<usize> {
        let is_point = |index: &usize| self.epochs[*index].header.stamp.consistency.is_point();
        (0..self.epochs.len()).filter(is_point).collect()
    }

    /// Applies the epochs `range` to images (by volume).
    ///
    /// # Errors
    /// When an epoch cannot be opened, or an image not written.
    pub fn replay(&self, range: std::ops::Range<usize>, images: &[&Path]) -> anyhow::Result<()> {
        let files = images
            .iter()
            .map(|path| OpenOptions::new().write(true).create(true).truncate(false).open(path))
            .collect::<Result<Vec<_>, _>>()?;
        for sealed in &self.epochs[range] {
            let mut opener = Opener::new(GroupKey::from_bytes(KEY), GROUP, 1);
            for piece in &sealed.pieces {
                opener.push(piece.clone())?;
            }
            let changeset = opener.finish()?;
            for (file, volume) in files.iter().zip(&changeset.volumes) {
                file.set_len(volume.size.0)?;
            }
            for change in changeset.changes() {
                let file = &files[usize::from(change.volume)];
                let offset = change.extent.offset().0;
                match change.payload {
                    Payload::Data(data) => file.write_all_at(data, offset)?,
                    Payload::Zero => {
                        let mut left = change.extent.length().0;
                        let zeroes = vec![0; left.min(1 << 20) as usize];
                        while left > 0 {
                            let part = left.min(1 << 20);
                            file.write_all_at(&zeroes[..part as usize], change.extent.end().0 - left)?;
                            left -= part;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
