//! What capture costs the application: fio's random writes at full saturation, native and captured in turn, with direct I/O
//! on a loop device. Value and limit are IOPS (4 KiB) or MB/s (64 KiB); the ratio is what the application keeps.
//!
//! `capture_100mb`: the mean latency of 100 MB/s of writes in 64 KiB, captured against native, with the spread of the native
//! rounds beside it. `capture_1500mb`: what a disk in memory takes of 1.5 GB/s while it is captured with the ring of the
//! default configuration; writes that the ring had no room for are told.
//!
//! Names as arguments (`cargo bench --bench capture_overhead -- capture_4k_data`) leave the others out.

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

#[derive(Clone, Copy)]
struct Measured {
    rate: f64,
    mean_us: f64,
    p99_us: f64,
}

/// What fio does.
#[derive(Clone, Copy)]
struct Load {
    kind: &'static str,
    size: &'static str,
    depth: u32,
    seconds: Option<u64>,
    mb_per_s: Option<u32>,
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
    fio(&file, Load { kind: "write", size: "1m", depth: 8, seconds: None, mb_per_s: None })?;
    let (rounds, seconds) = if quick() { (2, 2) } else { (7, 4) };
    for (name, size, data, unit) in [
        ("capture_4k_data", "4k", true, "IOPS"),
        ("capture_4k_bitmap", "4k", false, "IOPS"),
        ("capture_64k_data", "64k", true, "MB/s"),
    ] {
        if !wanted(name) {
            continue;
        }
        let load = Load { kind: "randwrite", size, depth: 16, seconds: Some(seconds), mb_per_s: None };
        let rounds = Rounds::run(name, disk.device(), &file, load, data, rounds)?;
        println!("{name}: p99 latency {:.2} times native", rounds.ratio(|one| one.p99_us));
        // The limit is what the native median would be if every round had had the median ratio.
        let value = median(rounds.captured.iter().map(|one| one.rate));
        result(name, value, unit, value / rounds.ratio(|one| one.rate))?;
    }

    if wanted("capture_100mb") {
        at_100mb(disk.device(), &file, rounds, seconds)?;
    }
    mount.unmount()?;
    if wanted("capture_1500mb") {
        at_1500mb(rounds, seconds)?;
    }
    Ok(())
}

/// Whether the command line asks for this one; without names it asks for all.
fn wanted(name: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).peekable();
    names.peek().is_none() || names.any(|one| one == name)
}

fn at_100mb(disk: &Path, file: &Path, rounds: usize, seconds: u64) -> anyhow::Result<()> {
    let load = Load { kind: "randwrite", size: "64k", depth: 4, seconds: Some(seconds), mb_per_s: Some(100) };
    let slow = Rounds::run("capture_100mb", disk, file, load, true, rounds)?;
    let native = median(slow.native.iter().map(|one| one.mean_us));
    let spread = slow.native.iter().map(|one| one.mean_us / native);
    println!(
        "capture_100mb: native rounds were {:.2} to {:.2} times their median",
        spread.clone().fold(f64::INFINITY, f64::min),
        spread.fold(0.0, f64::max)
    );
    // Less is better, so that the ratio is native to captured.
    result("capture_100mb", native, "us native", native * slow.ratio(|one| one.mean_us))
}

fn at_1500mb(rounds: usize, seconds: u64) -> anyhow::Result<()> {
    let memory = tempfile::tempdir_in("/dev/shm")?;
    let disk = LoopDisk::create(&memory.path().join("disk.img"), DISK_BYTES)?;
    let load = Load { kind: "write", size: "256k", depth: 16, seconds: Some(seconds), mb_per_s: Some(1500) };
    let fill = Load { size: "1m", seconds: None, mb_per_s: None, ..load };
    fio(disk.device(), fill)?;
    let fast = Rounds::run("capture_1500mb", disk.device(), disk.device(), load, true, rounds)?;
    println!(
        "capture_1500mb: {} of about {:.0} writes missed by a full ring; native {:.0} MB/s",
        fast.missed_ring,
        fast.captured.iter().map(|one| one.rate * 1e6 / 262_144.0 * seconds as f64).sum::<f64>(),
        median(fast.native.iter().map(|one| one.rate))
    );
    result("capture_1500mb", median(fast.captured.iter().map(|one| one.rate)), "MB/s", 1500.0)
}

/// Native and captured in turn.
struct Rounds {
    native: Vec<Measured>,
    captured: Vec<Measured>,
    missed_ring: u64,
}

impl Rounds {
    fn run(
        name: &str,
        disk: &Path,
        file: &Path,
        load: Load,
        data: bool,
        count: usize,
    ) -> anyhow::Result<Rounds> {
        let mut rounds = Rounds { native: Vec::new(), captured: Vec::new(), missed_ring: 0 };
        for _ in 0..count {
            rounds.native.push(fio(file, load)?);
            let follower = Follower::start(disk, data)?;
            rounds.captured.push(fio(file, load)?);
            let status = follower.stop()?;
            ensure!(status.losses == 0, "tracking was lost: {status:?}");
            if status.missed_ring > 0 {
                println!("{name}: {} writes missed by a full ring", status.missed_ring);
            }
            rounds.missed_ring += status.missed_ring;
        }
        Ok(rounds)
    }

    /// The median of captured to native, round by round.
    fn ratio(&self, of: fn(&Measured) -> f64) -> f64 {
        median(self.native.iter().zip(&self.captured).map(|(native, captured)| of(captured) / of(native)))
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn fio(file: &Path, load: Load) -> anyhow::Result<Measured> {
    let Load { kind, size, depth, seconds, mb_per_s } = load;
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--size=512M", "--ioengine=libaio", "--direct=1", "--output-format=json"]);
    command.arg(format!("--filename={}", file.display())).arg(format!("--rw={kind}"));
    command.arg(format!("--bs={size}")).arg(format!("--iodepth={depth}"));
    if let Some(seconds) = seconds {
        command.args(["--time_based", &format!("--runtime={seconds}")]);
    }
    if let Some(rate) = mb_per_s {
        command.args([&format!("--rate={rate}m"), "--kb_base=1000"]);
    }
    let output = command.output().context("run fio: is it installed?")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).context("read fio's answer")?;
    let write = &json["jobs"][0]["write"];
    let rate =
        if size == "4k" { write["iops"].as_f64() } else { write["bw_bytes"].as_f64().map(|bw| bw / 1e6) };
    let mean_us = write["clat_ns"]["mean"].as_f64().unwrap_or(0.0) / 1e3;
    let p99 = write["clat_ns"]["percentile"]["99.000000"].as_f64().unwrap_or(0.0) / 1e3;
    Ok(Measured { rate: rate.context("fio's rate")?, mean_us, p99_us: p99 })
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
                capture::give_way()?;
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
                        if !settled.load(Ordering::SeqCst) {
                            settled.store(tracker.consistency().is_point(), Ordering::SeqCst);
                        }
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
