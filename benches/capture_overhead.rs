//! What capture costs the application: fio's random writes at full saturation, native and captured in turn, with direct I/O
//! on a loop device. Value and limit are IOPS (4 KiB) or MB/s (64 KiB); the ratio is what the application keeps.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use block::{ByteCount, Epoch, UnixNanos, VolumeId};
use capture::{
    Device, DirectDisks, KernelTap, KernelTapOptions, Progress, Source, SourceStatus, Tracker, TrackerLimits,
};
use changeset::{Fold, VolumeInfo};
use scratch::{FileSystem, LoopDisk, Mount};
use seawall_benches::{quick, result};

const DISK_BYTES: u64 = 1 << 30;

struct Measured {
    rate: f64,
    p99_us: f64,
}

fn main() -> anyhow::Result<()> {
    if !scratch::is_root() {
        println!("capture_overhead: NOT RUN: it needs root, for loop devices and eBPF");
        return Ok(());
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), DISK_BYTES)?;
    scratch::run("losetup", &["--direct-io=on", disk.device().to_str().context("path")?])?;
    FileSystem::Ext4.make(disk.device())?;
    let mount = Mount::new(disk.device(), &dir.path().join("mnt"), "defaults")?;
    let file = mount.point().join("file");
    fio(&file, "write", "1m", 8, None)?;
    let (rounds, seconds) = if quick() { (2, 2) } else { (7, 4) };
    for (name, size, data, unit) in [
        ("capture_4k_data", "4k", true, "IOPS"),
        ("capture_4k_bitmap", "4k", false, "IOPS"),
        ("capture_64k_data", "64k", true, "MB/s"),
    ] {
        let (mut native, mut captured) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            native.push(fio(&file, "randwrite", size, 16, Some(seconds))?);
            let follower = Follower::start(disk.device(), data)?;
            captured.push(fio(&file, "randwrite", size, 16, Some(seconds))?);
            let status = follower.stop()?;
            ensure!(status.losses == 0, "tracking was lost: {status:?}");
            if status.missed_ring > 0 {
                println!("{name}: {} writes missed by a full ring", status.missed_ring);
            }
        }
        let ratio = |of: fn(&Measured) -> f64| {
            let mut ratios: Vec<f64> = native.iter().zip(&captured).map(|(n, c)| of(c) / of(n)).collect();
            ratios.sort_by(f64::total_cmp);
            ratios[ratios.len() / 2]
        };
        let median = |list: &[Measured]| {
            let mut rates: Vec<f64> = list.iter().map(|one| one.rate).collect();
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        println!("{name}: p99 latency {:.2} times native", ratio(|one| one.p99_us));
        // The limit is what the native median would be if every round had had the median ratio.
        let value = median(&captured);
        result(name, value, unit, value / ratio(|one| one.rate))?;
    }
    Ok(())
}

fn fio(file: &Path, kind: &str, size: &str, depth: u32, seconds: Option<u64>) -> anyhow::Result<Measured> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--size=512M", "--ioengine=libaio", "--direct=1", "--output-format=json"]);
    command.arg(format!("--filename={}", file.display())).arg(format!("--rw={kind}"));
    command.arg(format!("--bs={size}")).arg(format!("--iodepth={depth}"));
    if let Some(seconds) = seconds {
        command.args(["--time_based", &format!("--runtime={seconds}")]);
    }
    let output = command.output().context("run fio: is it installed?")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).context("read fio's answer")?;
    let write = &json["jobs"][0]["write"];
    let rate =
        if size == "4k" { write["iops"].as_f64() } else { write["bw_bytes"].as_f64().map(|bw| bw / 1e6) };
    let p99 = write["clat_ns"]["percentile"]["99.000000"].as_f64().unwrap_or(0.0) / 1e3;
    Ok(Measured { rate: rate.context("fio's rate")?, p99_us: p99 })
}

/// Follows the disk as the agent does, without sealing: what is measured is capture.
struct Follower {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<SourceStatus>>,
}

impl Follower {
    fn start(device: &Path, data: bool) -> anyhow::Result<Follower> {
        let device = Device::open(device)?;
        let volume = VolumeInfo {
            id: VolumeId([1; 16]),
            name: "disk".into(),
            size: device.size(),
            logical_block: 512,
        };
        let disks = DirectDisks::new(vec![device.direct()?], 2)?;
        let options = KernelTapOptions { ring: ByteCount::mib(128), data, keep: None };
        let tap = KernelTap::attach(&[(volume.id, &device)], &options)?;
        if let (true, Some(why)) = (data, tap.why_not_data()) {
            anyhow::bail!("no data mode: {why}");
        }
        let mut tracker = Tracker::new(tap, disks, vec![volume], TrackerLimits::default(), UnixNanos::now());
        // In bitmap mode the drain would compete for the disk with what is measured: the first copy is waited for.
        let settled = Arc::new(AtomicBool::new(false));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (stop, settled) = (stop.clone(), settled.clone());
            move || -> anyhow::Result<SourceStatus> {
                let (mut spare, mut epoch) = (Fold::new(), Epoch::NONE);
                while !stop.load(Ordering::SeqCst) {
                    let progress = tracker.advance(UnixNanos::now(), ByteCount::mib(64))?;
                    if progress == Progress::Full || tracker.open_bytes() >= ByteCount::mib(32) {
                        epoch = epoch.next();
                        spare = tracker.cut(spare, epoch).fold;
                        tracker.acknowledged(epoch);
                        spare.clear();
                    }
                    if progress == Progress::Idle {
                        settled.store(tracker.consistency().is_point(), Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                Ok(tracker.status())
            }
        });
        while !settled.load(Ordering::SeqCst) && !thread.is_finished() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Follower { stop, thread })
    }

    fn stop(self) -> anyhow::Result<SourceStatus> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow::anyhow!("the follower panicked"))?
    }
}
