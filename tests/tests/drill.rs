//! A drill, with the real programs: the disks of a group, for writing, while replication goes on as before.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::lanes::{Lane, Writers, check};
use scratch::{LoopDisk, run};
use seawall_tests::system::{Part, System};
use seawall_tests::{name, random, root, text};

const MIB: u64 = 1 << 20;
const DISKS: usize = 10;

/// The newest points' distances in time, over a while.
fn distances(system: &System, time: Duration) -> anyhow::Result<Vec<f64>> {
    let reply = || -> anyhow::Result<Vec<u64>> {
        let reply = system.operator("points", &[])?;
        let points = reply["groups"][0]["points"].as_array().context("points")?;
        Ok(points.iter().filter_map(|point| point["cut_time"].as_u64()).collect())
    };
    let from = *reply()?.last().context("a point")?;
    std::thread::sleep(time);
    let times: Vec<u64> = reply()?.into_iter().filter(|time| *time >= from).collect();
    Ok(times.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e6).collect())
}

/// Ten disks at one point, written to by their clients, while the source writes on: the clients see the point and what they wrote, the
/// points from during the drill hold, and at the end nothing of it is left.
#[test]
fn kernel_a_drill_of_ten_disks_leaves_replication_alone() -> anyhow::Result<()> {
    if !root("kernel_a_drill_of_ten_disks_leaves_replication_alone") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut disks = Vec::new();
    for index in 0..DISKS {
        let image = dir.path().join(format!("{index}.img"));
        std::fs::write(&image, random(16 * MIB)?)?;
        disks.push(LoopDisk::attach(&image, 512)?);
    }
    let devices: Vec<&std::path::Path> = disks.iter().map(LoopDisk::device).collect();
    let mut system = System::init(&devices, 200)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let lanes: Vec<Lane> = [0, DISKS - 1]
        .into_iter()
        .enumerate()
        .map(|(index, disk)| Lane {
            index,
            path: disks[disk].device().to_owned(),
            offset: 8 * MIB,
            slots: 64,
            record_bytes: 4096,
            direct: true,
        })
        .collect();
    let writers = Writers::start(&lanes, 2000)?;
    system.start_all()?;
    let point = *system.wait_for_points("a point", |points| points.len() > 3)?.last().context("a point")?;
    let before = distances(&system, Duration::from_secs(3))?;

    let sockets = dir.path().join("nbd");
    std::fs::create_dir(&sockets)?;
    let began = Instant::now();
    let started = system.asked(&[
        "drill",
        "start",
        "--point",
        &point.to_string(),
        "--sockets",
        text(&sockets),
        "--for",
        "10m",
    ])?;
    println!(
        "a drill of {DISKS} disks: ready after {:?}, {} ms of them asking",
        began.elapsed(),
        started["took_ms"]
    );
    let volumes = started["volumes"].as_array().context("volumes")?.clone();
    ensure!(volumes.len() == DISKS, "{started}");
    let again = system.asked(&["drill", "start"]).expect_err("one of that name is running").to_string();
    ensure!(again.contains("seawall drill stop drill"), "{again}");

    // Each disk is what it was at the point, and takes writes.
    for volume in &volumes {
        let (uri, disk) =
            (volume["uri"].as_str().context("uri")?, volume["volume"].as_str().context("name")?);
        let at_point = system.restored(disk, point)?;
        let copy = dir.path().join("copy");
        run("nbdcopy", &[uri, text(&copy)])?;
        ensure!(std::fs::read(&copy)? == at_point, "{disk} is what it was at the point");
        let written = Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 1M 2M", uri]).output()?;
        ensure!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
        run("nbdcopy", &[uri, text(&copy)])?;
        let mut changed = at_point.clone();
        changed[MIB as usize..3 * MIB as usize].fill(7);
        ensure!(std::fs::read(&copy)? == changed, "{disk} has what its client wrote");
        ensure!(system.restored(disk, point)? == at_point, "the point does not change");
    }
    let during = distances(&system, Duration::from_secs(3))?;
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len().max(1) as f64;
    println!("between points: {:.0} ms before, {:.0} ms during the drill", mean(&before), mean(&during));
    ensure!(during.len() > 1, "points go on coming during the drill: {during:?}");

    let amid = *system.points().last().context("a point")?;
    let listed = system.asked(&["drill", "list"])?;
    ensure!(listed["exports"][0]["overlay_bytes"].as_u64() >= Some(2 * MIB * DISKS as u64), "{listed}");
    let stopped = system.asked(&["drill", "stop"])?;
    ensure!(stopped["drill"] == "drill" && std::fs::read_dir(&sockets)?.next().is_none(), "{stopped}");
    ensure!(system.asked(&["drill", "list"])?["exports"].as_array().is_some_and(Vec::is_empty));
    let none = system.asked(&["drill", "stop"]).expect_err("none is running").to_string();
    ensure!(none.contains("none is running"), "{none}");

    // The replica is the source, and a point from during the drill holds.
    let counts = writers.stop()?;
    let newest = system.wait_for_now()?;
    system.stop(Part::Agent)?;
    for disk in &disks {
        run("blockdev", &["--flushbufs", text(disk.device())])?;
        ensure!(
            system.restored(&name(disk.device()), newest)? == std::fs::read(disk.device())?,
            "the newest point is the disk"
        );
    }
    let restored = |lane: &Lane| dir.path().join(format!("lane{}", lane.index));
    for (point, least) in [(amid, vec![0; counts.len()]), (newest, counts)] {
        for lane in &lanes {
            std::fs::write(restored(lane), system.restored(&name(&lane.path), point)?)?;
        }
        let found = check(&lanes, restored).with_context(|| format!("point {point}"))?;
        ensure!(
            found.iter().zip(&least).all(|(found, least)| found >= least),
            "{found:?} of {least:?} records"
        );
    }
    Ok(())
}

/// Nobody ends it.
#[test]
fn kernel_a_drill_ends_by_itself() -> anyhow::Result<()> {
    if !root("kernel_a_drill_ends_by_itself") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 16 * MIB)?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    system.wait_for_points("a point", |points| !points.is_empty())?;
    let started = system.asked(&["drill", "start", "--name", "short", "--for", "2s"])?;
    ensure!(started["volumes"][0]["uri"].as_str().is_some_and(|uri| uri.starts_with("nbds://")), "{started}");
    let limit = Instant::now() + Duration::from_secs(60);
    while system.asked(&["drill", "list"])?["exports"] != serde_json::json!([]) {
        ensure!(Instant::now() < limit, "the drill goes on");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
