//! The initial copy of a disk, from the agent's start to the first applied recovery point, through the process server's
//! durable cache, encrypted and compressed, all on this machine; against reading the disk with O_DIRECT and writing the
//! same bytes to a file with one fdatasync. As root: eBPF capture of a loop device; otherwise a scanned file.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::Epoch;
use capture::Buffer;
use scratch::LoopDisk;
use seawall_benches::{Pair, Way, compare, data};

const DISK_BYTES: u64 = 1 << 30;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let image = dir.path().join("source.img");
    fill(&image)?;
    let disk = scratch::is_root().then(|| LoopDisk::attach(&image, 512)).transpose()?;
    let device = disk.as_ref().map_or(image.as_path(), LoopDisk::device);
    let source = if disk.is_some() { "ebpf" } else { "scan" };
    let mut turns = 0;
    compare("pipeline", DISK_BYTES, || {
        turns += 1;
        let place = dir.path().join(format!("turn{turns}"));
        let subject = runtime.block_on(replicate(&place, device, source)).expect("the disk is replicated");
        fs::remove_dir_all(&place).expect("the turn's directory goes");
        let limit = copy(device, &dir.path().join("plain")).expect("the disk is copied");
        Pair { subject, limit }
    })
}

/// Mixed content, as [`data::mix`] has it, over the whole disk.
fn fill(image: &Path) -> anyhow::Result<()> {
    let file = File::create(image)?;
    file.set_len(DISK_BYTES)?;
    let writes = data::mix();
    let mut at = 0;
    for write in writes.iter().cycle() {
        let length = write.data.len().min((DISK_BYTES - at) as usize);
        file.write_all_at(&write.data[..length], at)?;
        at += length as u64;
        if at == DISK_BYTES {
            break;
        }
    }
    file.sync_all().context("sync the source")
}

async fn replicate(dir: &Path, device: &Path, source: &str) -> anyhow::Result<Duration> {
    let way = Way::start(dir, device, source).await?;
    let (took, agent) = way.replicate(Epoch::NONE).await?;
    tokio::task::block_in_place(|| agent.shutdown());
    way.shutdown().await?;
    Ok(took)
}

fn copy(device: &Path, out: &Path) -> anyhow::Result<Duration> {
    let o_direct = 0o40000;
    let from = OpenOptions::new().read(true).custom_flags(o_direct).open(device)?;
    let to = File::create(out)?;
    let mut buffer = Buffer::zeroed(1 << 20);
    let began = Instant::now();
    for at in (0..DISK_BYTES).step_by(buffer.len()) {
        from.read_exact_at(&mut buffer, at)?;
        to.write_all_at(&buffer, at)?;
    }
    to.sync_data()?;
    Ok(began.elapsed())
}
