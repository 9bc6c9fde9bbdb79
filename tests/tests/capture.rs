//! Capture on the running kernel, without servers: real disks (loop devices), real file systems, real eBPF.
//!
//! These run one after another (nextest group `kernel`): loop devices and tracepoints are global.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use block::{ByteCount, Generation, GroupId};
use capture::Keep;
use scratch::lanes::{Lane, Writers, check};
use scratch::{FileSystem, LoopDisk, Mount, run};
use seawall_tests::follower::{FollowOptions, Followed, Follower};
use seawall_tests::{root, text};

const MIB: u64 = 1 << 20;

fn identical(a: &Path, b: &Path) -> anyhow::Result<()> {
    run("cmp", &[text(a), text(b)]).map(drop)
}

/// What an administrator's day does to a file system, in one go.
fn churn(mount: &Path, seed: u64) -> anyhow::Result<()> {
    let script = format!(
        "set -e; cd {dir}; mkdir d{seed}; head -c 30000000 /dev/urandom > d{seed}/random; sync d{seed}/random
         for i in $(seq 200); do echo $i {seed} > d{seed}/f$i; done; sync
         cp -r d{seed} e{seed}; mv e{seed} g{seed}; rm -rf d{seed}; truncate -s 1M g{seed}/f1
         dd if=/dev/zero of=g{seed}/zero bs=1M count=20 conv=fsync status=none
         fallocate -p -o 4096 -l 8M g{seed}/random
         dd if=/dev/urandom of=g{seed}/direct bs=64k count=100 oflag=direct status=none; sync",
        dir = mount.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output()?;
    ensure!(output.status.success(), "churn: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// At most `count` of the items, evenly spread, with the first and the last.
fn spread(items: &[usize], count: usize) -> Vec<usize> {
    let mut picked: Vec<usize> =
        (0..count).map(|index| items[index * (items.len() - 1) / (count - 1).max(1)]).collect();
    picked.dedup();
    picked
}

/// A follower of a mounted, busy file system ends with a byte-identical disk, and every point on the way satisfies the
/// oracle and the file system's checker.
fn file_system(kind: FileSystem) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("source.img"), 640 * MIB)?;
    kind.make(disk.device())?;
    let mount = Mount::new(disk.device(), &dir.path().join("mnt"), "discard")?;
    churn(mount.point(), 0)?;
    let lanes: Vec<Lane> = (0..3)
        .map(|index| Lane {
            index,
            path: mount.point().join(format!("lane{index}")),
            offset: 0,
            slots: 500,
            record_bytes: [512, 4096, 24 * 1024][index],
            direct: false,
        })
        .collect();
    let writers = Writers::start(&lanes, 0)?;
    let follower = Follower::start(&[disk.device()], FollowOptions::default())?;
    churn(mount.point(), 1)?;
    follower.wait_for_points(1)?;
    run("fstrim", &[text(mount.point())])?;
    for seed in 2..6 {
        churn(mount.point(), seed)?;
        run("rm", &["-r", text(&mount.point().join(format!("g{}", seed - 1)))])?;
    }
    follower.wait_for_points(6)?;
    let counts = writers.stop()?;
    mount.unmount()?;
    let followed = follower.finish()?;
    let points = followed.points();
    ensure!(points.len() >= 3, "only {} points of {} epochs", points.len(), followed.epochs.len());
    ensure!(followed.status.losses == 0, "tracking was lost: {:?}", followed.status);

    let image = dir.path().join("replica.img");
    let mut applied = 0;
    let mut seen = 0;
    let checked: Vec<usize> = spread(&points, 8);
    for point in &checked {
        followed.replay(applied..point + 1, &[&image])?;
        applied = point + 1;
        // On a copy, because mounting replays the journal into it.
        let copy = dir.path().join("copy.img");
        run("cp", &["--sparse=always", text(&image), text(&copy)])?;
        let restored = LoopDisk::attach(&copy, 512)?;
        // The source is not mounted any more, but XFS remembers identities.
        let options = if kind == FileSystem::Xfs { "nouuid" } else { "defaults" };
        let restored_mount = Mount::new(restored.device(), &dir.path().join("restored"), options)
            .with_context(|| format!("mount point {point}"))?;
        let last = check(&lanes, |lane| {
            restored_mount.point().join(lane.path.file_name().expect("a lane has a file"))
        })
        .with_context(|| format!("{} point at epoch {point}", kind.name()))?;
        restored_mount.unmount()?;
        kind.check(restored.device()).with_context(|| format!("fsck at epoch {point}"))?;
        let total = last.iter().sum();
        ensure!(total >= seen, "points go back: {total} records after {seen}");
        seen = total;
    }
    ensure!(checked.last() == points.last());
    followed.replay(applied..followed.epochs.len(), &[&image])?;
    identical(disk.device(), &image).context("after everything settled")?;
    ensure!(
        seen == counts.iter().sum::<u64>(),
        "the newest point has {seen} records, {counts:?} were written"
    );
    println!(
        "{}: {} epochs, {} points, {} checked, {} records, {} captured, {} missed writes",
        kind.name(),
        followed.epochs.len(),
        points.len(),
        checked.len(),
        seen,
        followed.status.written,
        followed.status.missed
    );
    Ok(())
}

#[test]
fn kernel_ext4_is_followed() -> anyhow::Result<()> {
    if root("kernel_ext4_is_followed") { file_system(FileSystem::Ext4) } else { Ok(()) }
}

#[test]
fn kernel_xfs_is_followed() -> anyhow::Result<()> {
    if root("kernel_xfs_is_followed") { file_system(FileSystem::Xfs) } else { Ok(()) }
}

#[test]
fn kernel_btrfs_is_followed() -> anyhow::Result<()> {
    if root("kernel_btrfs_is_followed") { file_system(FileSystem::Btrfs) } else { Ok(()) }
}

/// Lanes straight on a device, of very different record sizes. A lane takes 16 MiB.
fn raw_lanes(device: &Path, first: usize, count: usize) -> Vec<Lane> {
    (0..count)
        .map(|index| Lane {
            index: first + index,
            path: device.to_owned(),
            offset: index as u64 * 16 * MIB,
            slots: 64,
            record_bytes: [512, 4096, 20 * 1024, 128 * 1024][(first + index) % 4],
            direct: true,
        })
        .collect()
}

/// Replays every point and puts it before the oracle; the newest must have everything, byte for byte.
fn every_point(
    followed: &Followed,
    lanes: &[Lane],
    disks: &[&LoopDisk],
    counts: &[u64],
    dir: &Path,
) -> anyhow::Result<usize> {
    let images: Vec<_> = (0..disks.len()).map(|index| dir.join(format!("replica{index}.img"))).collect();
    let paths: Vec<&Path> = images.iter().map(AsRef::as_ref).collect();
    let place = |lane: &Lane| {
        let index = disks.iter().position(|disk| disk.device() == lane.path).expect("a lane is on a disk");
        images[index].clone()
    };
    let mut applied = 0;
    let mut last = Vec::new();
    let points = followed.points();
    for point in &points {
        followed.replay(applied..point + 1, &paths)?;
        applied = point + 1;
        last = check(lanes, place).with_context(|| format!("point at epoch {point}"))?;
    }
    ensure!(last == counts, "the newest point has {last:?}, written were {counts:?}");
    for (disk, image) in disks.iter().zip(&images) {
        identical(disk.device(), image)?;
    }
    println!(
        "{} points of {} epochs, all checked; {} writes missed, {} by a full ring",
        points.len(),
        followed.epochs.len(),
        followed.status.missed,
        followed.status.missed_ring
    );
    Ok(points.len())
}

/// Bursts of writes with rests between them, so that points are possible even if nothing but granules is followed.
fn bursts(lanes: &[Lane], rounds: usize, burst: Duration, rest: Duration) -> anyhow::Result<Vec<u64>> {
    bursts_after(Vec::new(), lanes, rounds, burst, rest)
}

/// As [`bursts`], after so many records of each lane.
fn bursts_after(
    mut counts: Vec<u64>,
    lanes: &[Lane],
    rounds: usize,
    burst: Duration,
    rest: Duration,
) -> anyhow::Result<Vec<u64>> {
    for _ in 0..rounds {
        let writers = Writers::go_on(lanes, 0, &counts)?;
        std::thread::sleep(burst);
        counts = writers.stop()?;
        std::thread::sleep(rest);
    }
    Ok(counts)
}

/// Two disks in one group, a log on one and data on the other: every point is consistent across both.
#[test]
fn kernel_two_disks_share_a_cut() -> anyhow::Result<()> {
    if !root("kernel_two_disks_share_a_cut") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let data = LoopDisk::create(&dir.path().join("data.img"), 64 * MIB)?;
    let log = LoopDisk::create(&dir.path().join("log.img"), 64 * MIB)?;
    let mut lanes = raw_lanes(data.device(), 0, 3);
    lanes.extend(raw_lanes(log.device(), 3, 3));
    let writers = Writers::start(&lanes, 0)?;
    let options = FollowOptions { interval: Duration::from_millis(20), ..FollowOptions::default() };
    let follower = Follower::start(&[data.device(), log.device()], options)?;
    follower.wait_for_points(12)?;
    while writers.written() < 20_000 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let counts = writers.stop()?;
    let followed = follower.finish()?;
    let points = every_point(&followed, &lanes, &[&data, &log], &counts, dir.path())?;
    ensure!(points >= 10, "only {points} points");
    Ok(())
}

/// A ring far too small for the writes: no point is offered while anything is dirty, what was missed is drained,
/// and every point that is offered satisfies the oracle.
#[test]
fn kernel_overflow_is_drained_and_said() -> anyhow::Result<()> {
    if !root("kernel_overflow_is_drained_and_said") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("source.img"), 64 * MIB)?;
    let lanes = raw_lanes(disk.device(), 0, 4);
    let options = FollowOptions {
        ring: ByteCount::kib(256),
        interval: Duration::from_millis(20),
        nap: Duration::from_millis(5),
        ..FollowOptions::default()
    };
    let follower = Follower::start(&[disk.device()], options)?;
    let counts = bursts(&lanes, 6, Duration::from_millis(300), Duration::from_millis(300))?;
    let followed = follower.finish()?;
    ensure!(followed.status.missed_ring > 0, "the ring never overflowed: {:?}", followed.status);
    let points = every_point(&followed, &lanes, &[&disk], &counts, dir.path())?;
    ensure!(points >= 3 && points < followed.epochs.len(), "{points} points");
    Ok(())
}

/// Bitmap mode: points come when the disk is quiet, and are right.
#[test]
fn kernel_bitmap_mode_gives_points_when_quiet() -> anyhow::Result<()> {
    if !root("kernel_bitmap_mode_gives_points_when_quiet") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("source.img"), 64 * MIB)?;
    let lanes = raw_lanes(disk.device(), 0, 4);
    let options =
        FollowOptions { data: false, interval: Duration::from_millis(20), ..FollowOptions::default() };
    let follower = Follower::start(&[disk.device()], options)?;
    let counts = bursts(&lanes, 4, Duration::from_millis(200), Duration::from_millis(200))?;
    let followed = follower.finish()?;
    ensure!(followed.status.written == ByteCount::ZERO, "data in bitmap mode");
    let points = every_point(&followed, &lanes, &[&disk], &counts, dir.path())?;
    ensure!(points >= 3, "{points} points");
    Ok(())
}

/// Initial copy under constant writes converges, and the first point that is offered already satisfies the oracle.
#[test]
fn kernel_initial_copy_converges_under_writes() -> anyhow::Result<()> {
    if !root("kernel_initial_copy_converges_under_writes") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("source.img"), 256 * MIB)?;
    let lanes = raw_lanes(disk.device(), 0, 8);
    let writers = Writers::start(&lanes, 0)?;
    std::thread::sleep(Duration::from_millis(200));
    let options = FollowOptions { interval: Duration::from_millis(50), ..FollowOptions::default() };
    let follower = Follower::start(&[disk.device()], options)?;
    follower.wait_for_points(10)?;
    let counts = writers.stop()?;
    let followed = follower.finish()?;
    every_point(&followed, &lanes, &[&disk], &counts, dir.path()).map(drop)
}

/// Somebody detaches some of the programs while writes go on. The disk's own count of writes tells: no point lacks one.
fn programs_taken_away(taken: &[&str]) -> anyhow::Result<Followed> {
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("source.img"), 64 * MIB)?;
    let lanes = raw_lanes(disk.device(), 0, 4);
    let group = GroupId((std::process::id() as u128).to_le_bytes());
    let folder = Path::new("/sys/fs/bpf/seawall-test");
    let keep = Keep { folder: folder.to_owned(), group, generation: Generation(1) };
    let options = FollowOptions {
        interval: Duration::from_millis(20),
        keep: Some(keep),
        gaps: true,
        ..FollowOptions::default()
    };
    let follower = Follower::start(&[disk.device()], options)?;
    let followed = (|| -> anyhow::Result<Followed> {
        let counts = bursts(&lanes, 1, Duration::from_millis(200), Duration::from_millis(100))?;
        follower.wait_for_points(1)?;
        for installation in std::fs::read_dir(folder.join(group.to_string()))? {
            let installation = installation?.path();
            for name in taken {
                std::fs::remove_file(installation.join(format!("link_{name}")))?;
            }
        }
        let (burst, rest) = (Duration::from_millis(200), Duration::from_millis(300));
        let counts = bursts_after(counts, &lanes, 4, burst, rest)?;
        let followed = follower.finish()?;
        every_point(&followed, &lanes, &[&disk], &counts, dir.path())?;
        Ok(followed)
    })();
    let removed = capture::detach(folder, Some(&group.to_string()));
    let followed = followed?;
    removed?;
    Ok(followed)
}

#[test]
fn kernel_writes_that_nobody_saw_are_found() -> anyhow::Result<()> {
    if !root("kernel_writes_that_nobody_saw_are_found") {
        return Ok(());
    }
    // Their ends go unseen, but each has its place in flight: only those are read again.
    let complete = ["on_complete_0", "on_complete_1", "on_complete_2"];
    let followed = programs_taken_away(&complete).context("without completions")?;
    ensure!(followed.status.ended_twice == 0, "an end counted twice hides another: {:?}", followed.status);
    ensure!(followed.status.drained > ByteCount(64 * MIB), "nothing was read again: {:?}", followed.status);
    // Nothing of them is seen: everything is read again.
    let all = ["on_issue", "on_complete_0", "on_complete_1", "on_complete_2"];
    let followed = programs_taken_away(&all).context("without any")?;
    ensure!(followed.status.losses > 0, "no gap was noticed: {:?}", followed.status);
    Ok(())
}

/// Devices that cannot be captured are refused, with what to name instead.
#[test]
fn devices_that_cannot_be_captured_are_named() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("plain");
    std::fs::write(&file, b"text")?;
    for (path, named) in [
        (file.as_path(), "not a block device"),
        (Path::new("/dev/null"), "not a block device"),
        (Path::new("/dev/no-such-disk"), "No such file"),
    ] {
        let error = capture::Device::open(path).expect_err("must be refused").to_string();
        ensure!(error.contains(named), "{}: {error}", path.display());
    }
    Ok(())
}
