//! A resync of a disk of which 1 % has changed while nobody followed it, from the agent's start to the first new recovery
//! point, against one sequential read of the disk with O_DIRECT. `resync_bytes`: what was sent, against the changed granules
//! and a thousandth of the volume. 10 GiB; quick: 1 GiB. As root: eBPF.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::{Epoch, GRANULE_BYTES};
use capture::Buffer;
use scratch::LoopDisk;
use seawall_benches::{Pair, Way, compare, data, quick, result};

/// The agent's report is as old as this at most.
const REPORTED_AFTER: Duration = Duration::from_millis(600);

fn main() -> anyhow::Result<()> {
    if !scratch::is_root() {
        println!("resync: NOT RUN: it needs root, for loop devices and eBPF");
        return Ok(());
    }
    let disk_bytes: u64 = if quick() { 1 << 30 } else { 10 << 30 };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let image = dir.path().join("source.img");
    fill(&image, disk_bytes)?;
    let disk = LoopDisk::attach(&image, 512)?;
    scratch::run("losetup", &["--direct-io=on", disk.device().to_str().context("path")?])?;
    let way = runtime.block_on(Way::start(&dir.path().join("way"), disk.device(), "ebpf"))?;
    let (_, agent) = runtime.block_on(way.replicate(Epoch::NONE))?;
    agent.shutdown();
    let (mut turn, mut sent, mut changed) = (0, 0, 0);
    compare("resync", disk_bytes, || {
        turn += 1;
        changed = change(disk.device(), disk_bytes, turn).expect("the disk is written");
        let before = way.newest();
        let (took, agent) = runtime.block_on(way.replicate(before)).expect("the disk is compared");
        std::thread::sleep(REPORTED_AFTER);
        sent = agent.report().sent_bytes_total.0;
        agent.shutdown();
        let read = read(disk.device(), disk_bytes).expect("the disk is read");
        Pair { subject: took, limit: read }
    })?;
    runtime.block_on(way.shutdown())?;
    // Random bytes cannot be compressed.
    let limit = changed as f64 * 1.1 + disk_bytes as f64 / 1000.0;
    result("resync_bytes", limit / 1e6, "MB allowed", sent as f64 / 1e6)
}

/// Mixed content, as [`data::mix`] has it, over the whole disk.
fn fill(image: &Path, bytes: u64) -> anyhow::Result<()> {
    let file = File::create(image)?;
    file.set_len(bytes)?;
    let mut at = 0;
    for write in data::mix().iter().cycle() {
        let length = write.data.len().min((bytes - at) as usize);
        file.write_all_at(&write.data[..length], at)?;
        at += length as u64;
        if at == bytes {
            break;
        }
    }
    file.sync_all().context("sync the source")
}

/// Every hundredth granule, by random bytes; gives how many bytes.
fn change(device: &Path, bytes: u64, turn: u64) -> anyhow::Result<u64> {
    let file = OpenOptions::new().write(true).open(device)?;
    let mut random = vec![0; GRANULE_BYTES as usize];
    let mut changed = 0;
    for granule in (turn % 100..bytes / GRANULE_BYTES).step_by(100) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&turn.to_le_bytes()).update(&granule.to_le_bytes());
        hasher.finalize_xof().fill(&mut random);
        file.write_all_at(&random, granule * GRANULE_BYTES)?;
        changed += GRANULE_BYTES;
    }
    file.sync_all()?;
    Ok(changed)
}

fn read(device: &Path, bytes: u64) -> anyhow::Result<Duration> {
    let o_direct = 0o40000;
    let file = OpenOptions::new().read(true).custom_flags(o_direct).open(device)?;
    let mut buffer = Buffer::zeroed(1 << 20);
    let began = Instant::now();
    for at in (0..bytes).step_by(buffer.len()) {
        file.read_exact_at(&mut buffer, at)?;
    }
    Ok(began.elapsed())
}
