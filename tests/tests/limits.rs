//! What the agent may take of the machine and of the way: real programs, an image file that is scanned.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::LoopDisk;
use seawall_tests::root;
use seawall_tests::system::{Part, System};

const MIB: u64 = 1 << 20;

/// Random bytes: what is sent is as large as what was written.
fn random(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut noise = std::fs::File::open("/dev/urandom")?.take(bytes);
    std::io::copy(&mut noise, &mut std::fs::File::create(path)?)?;
    Ok(())
}

fn system(image: &Path, limits: &str) -> anyhow::Result<System> {
    let mut system = System::init(&[image], 100)?;
    system.edit(Part::Agent, |text| {
        format!("{}\n[limits]\n{limits}\n", text.replace("source = \"auto\"", "source = \"scan\""))
    })?;
    system.start_all()?;
    Ok(system)
}

/// The initial copy takes as long as its bytes need at least, and meanwhile the agent goes on telling how it is.
#[test]
fn the_way_is_used_up_to_its_limit() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    random(&image, 6 * MIB)?;
    let begun = Instant::now();
    // Another limit for every hour of the day: the schedule is what counts.
    let system = system(
        &image,
        "bandwidth_bytes_s = \"1GiB\"\n[[limits.schedule]]\nfrom = \"00:00\"\nto = \"00:00\"\nbandwidth_bytes_s = \"2MiB\"",
    )?;
    let mut reports = Vec::new();
    while system.points().is_empty() {
        ensure!(begun.elapsed() < Duration::from_secs(120), "no point");
        std::thread::sleep(Duration::from_millis(50));
        // Servers that are starting do not answer yet.
        let Ok(status) = system.operator("status", &[]) else { continue };
        let time = status["process_server"]["groups"][0]["report"]["time"].clone();
        if reports.last() != Some(&time) {
            reports.push(time);
        }
    }
    // What is saved up at the beginning may go at once.
    let least = Duration::from_secs_f64((6.0 - 0.25 * 2.0) / 2.0);
    ensure!(begun.elapsed() >= least, "6 MiB took {:?}, at 2 MiB/s", begun.elapsed());
    ensure!(reports.len() >= 4, "{} reports in {:?}", reports.len(), begun.elapsed());
    Ok(())
}

fn processor_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> =
        stat.rsplit(')').next().context("a process has a name")?.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// An agent that could use all of a processor, to compute checksums ten times a second, uses what it may.
#[test]
fn the_processor_is_used_up_to_its_limit() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    random(&image, 512 * MIB)?;
    let mut shares = Vec::new();
    for limits in ["cpu_percent = 10", ""] {
        let system = system(&image, limits)?;
        let pid = system.pid(Part::Agent)?;
        std::thread::sleep(Duration::from_secs(2));
        let (before, begun) = (processor_time(pid)?, Instant::now());
        std::thread::sleep(Duration::from_secs(3));
        let used = processor_time(pid)?.saturating_sub(before);
        shares.push(used.as_secs_f64() / begun.elapsed().as_secs_f64());
    }
    println!("with a limit of 0.1 processors: {:.2}; without: {:.2}", shares[0], shares[1]);
    // Beside the work that rests there are the tasks that send and report.
    ensure!(shares[0] < 0.15, "0.1 processors are allowed, {:.2} were used", shares[0]);
    ensure!(shares[1] > 0.15, "without a limit {:.2} are used, so this test proves nothing", shares[1]);
    Ok(())
}

/// What the agent holds in memory when nothing is written, besides its ring and its epochs; bytes.
const AT_REST_MAX: u64 = 60_000_000;

/// After a first copy and at rest. The epochs' memory is made small, so that little can hide behind it.
#[test]
fn kernel_the_agent_at_rest_is_small() -> anyhow::Result<()> {
    if !root("kernel_the_agent_at_rest_is_small") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    random(&image, 256 * MIB)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.edit(Part::Agent, |text| {
        text.replace("epoch_memory_bytes = \"256MiB\"", "epoch_memory_bytes = \"24MiB\"")
    })?;
    system.start_all()?;
    system.wait_for_points("three points", |points| points.len() >= 3)?;
    let pages = std::fs::read_to_string(format!("/proc/{}/statm", system.pid(Part::Agent)?))?;
    let fields: Vec<u64> = pages.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    let page = rustix::param::page_size() as u64;
    // Shared pages are those of the ring and the maps, and of the program's own file.
    let (resident, shared) = (fields[1] * page, fields[2] * page);
    let besides = (resident - shared).saturating_sub(24 * MIB);
    println!("resident {resident}, of which shared {shared}; besides the epochs {besides}");
    ensure!(besides < AT_REST_MAX, "{besides} bytes at rest");
    system.stop(Part::Agent)
}
