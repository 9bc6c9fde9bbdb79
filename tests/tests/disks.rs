//! Disks as they are: partitioned, with large blocks, numbered anew, read-only, protected twice.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::lanes::{Lane, Writers, check};
use scratch::{FileSystem, LoopDisk, Mount, run};
use seawall_tests::system::{Part, System, program};
use seawall_tests::{name, root, text};

const MIB: u64 = 1 << 20;
/// Where the only partition of a partitioned disk begins.
const PARTITION_BYTES: u64 = MIB;

/// A disk with a partition table and one partition, and the partition's device.
fn partitioned(file: &Path, bytes: u64, sector_bytes: u32) -> anyhow::Result<(LoopDisk, PathBuf)> {
    File::create(file)?.set_len(bytes)?;
    let disk = LoopDisk::attach(file, sector_bytes)?;
    let mut table = Command::new("sfdisk");
    let mut table = table.arg("--quiet").arg(disk.device()).stdin(Stdio::piped()).spawn()?;
    let script = format!("label: gpt\nstart={}\n", PARTITION_BYTES / u64::from(sector_bytes));
    table.stdin.take().context("sfdisk's input")?.write_all(script.as_bytes())?;
    ensure!(table.wait()?.success(), "sfdisk failed");
    let partition = partition_of(&disk)?;
    Ok((disk, partition))
}

/// The device of a disk's first partition. A kernel that cannot read partition tables is told.
fn partition_of(disk: &LoopDisk) -> anyhow::Result<PathBuf> {
    run("partx", &["--update", text(disk.device())])?;
    let partition = PathBuf::from(format!("{}p1", disk.device().display()));
    ensure!(partition.exists(), "{} did not appear", partition.display());
    Ok(partition)
}

/// Starts an agent that must refuse, and gives what it said.
fn refused(system: &System) -> anyhow::Result<String> {
    let config = system.config(Part::Agent);
    let agent = program("seawall-agent")?;
    let output = Command::new("timeout")
        .args(["60", text(&agent), "run", "--config", text(&config)])
        .env("RUST_BACKTRACE", "0")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
    Ok(said)
}

/// Two partitioned disks, one with 4096-byte blocks and named by its partition: whole disks are protected, with one cut,
/// and what is restored is what they hold.
#[test]
fn kernel_partitioned_disks_of_both_block_sizes_share_a_cut() -> anyhow::Result<()> {
    if !root("kernel_partitioned_disks_of_both_block_sizes_share_a_cut") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (large, large_part) = partitioned(&dir.path().join("large.img"), 96 * MIB, 4096)?;
    let (small, small_part) = partitioned(&dir.path().join("small.img"), 64 * MIB, 512)?;
    let mut mounts = Vec::new();
    let mut lanes = Vec::new();
    for (part, place) in [(&large_part, "large"), (&small_part, "small")] {
        FileSystem::Ext4.make(part)?;
        let mount = Mount::new(part, &dir.path().join(place), "discard")?;
        for record_bytes in [512, 12 * 1024] {
            let index = lanes.len();
            let path = mount.point().join(format!("lane{index}"));
            lanes.push(Lane { index, path, offset: 0, slots: 50, record_bytes, direct: false });
        }
        mounts.push(mount);
    }
    let mut system = System::init(&[&large_part, small.device()], 200)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let writers = Writers::start(&lanes, 1000)?;
    system.start_all()?;
    system.wait_for_points("six points", |points| points.len() >= 6)?;
    let status = system.operator("status", &[])?;
    let volumes = status["groups"][0]["volumes"].to_string();
    ensure!(volumes.contains(text(large.device())), "{volumes}");
    let notes = status["groups"][0]["capture_notes"].to_string();
    ensure!(notes.contains("is a partition; protected is the whole disk below it"), "{notes}");
    let counts = writers.stop()?;
    for mount in &mounts {
        run("fsfreeze", &["--freeze", text(mount.point())])?;
    }
    let newest = system.wait_for_now();
    let stopped = system.stop(Part::Agent);
    let compared = newest.and_then(|newest| {
        stopped?;
        for (volume, disk) in [(name(&large_part), &large), (name(small.device()), &small)] {
            let out = system.dir().join("newest");
            system.restore(&volume, newest, &out)?;
            run("blockdev", &["--flushbufs", text(disk.device())])?;
            run("cmp", &[text(disk.device()), text(&out)]).context("the newest point against the disk")?;
        }
        Ok(newest)
    });
    for mount in mounts.drain(..) {
        run("fsfreeze", &["--unfreeze", text(mount.point())])?;
        mount.unmount()?;
    }
    let newest = compared?;
    let mut points = system.points();
    points.retain(|point| *point <= newest);
    let mut last = Vec::new();
    for point in points {
        last = check_point(&system, point, [&name(&large_part), &name(small.device())], &lanes)
            .with_context(|| format!("point {point}"))?;
    }
    ensure!(last == counts, "the newest point has {last:?}, written were {counts:?}");
    Ok(())
}

fn check_point(system: &System, point: u64, volumes: [&str; 2], lanes: &[Lane]) -> anyhow::Result<Vec<u64>> {
    let mut mounts = Vec::new();
    let mut disks = Vec::new();
    for (volume, (place, sector_bytes)) in volumes.into_iter().zip([("large", 4096), ("small", 512)]) {
        let image = system.dir().join(place).with_extension("img");
        system.restore(volume, point, &image)?;
        let disk = LoopDisk::attach(&image, sector_bytes)?;
        let part = partition_of(&disk)?;
        mounts.push(Mount::new(&part, &system.dir().join(place), "defaults")?);
        disks.push((disk, part));
    }
    let restored = |lane: &Lane| {
        let place = if lane.index < 2 { 0 } else { 1 };
        mounts[place].point().join(lane.path.file_name().expect("a lane has a file"))
    };
    let last = check(lanes, restored)?;
    for mount in mounts {
        mount.unmount()?;
    }
    for (_, part) in &disks {
        FileSystem::Ext4.check(part).context("fsck")?;
    }
    Ok(last)
}

/// The name that was configured means another disk after a restart: the protected one is found by its marks. When it has gone,
/// the other one is refused with both names.
#[test]
fn kernel_a_renumbered_disk_is_found_again_or_refused() -> anyhow::Result<()> {
    if !root("kernel_a_renumbered_disk_is_found_again_or_refused") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let ours = LoopDisk::create(&dir.path().join("ours.img"), 32 * MIB)?;
    let other = LoopDisk::create(&dir.path().join("other.img"), 32 * MIB)?;
    FileSystem::Ext4.make(ours.device())?;
    FileSystem::Ext4.make(other.device())?;
    // The kernel's numbers cannot be chosen here; a link can.
    let link = dir.path().join("sdb");
    symlink(ours.device(), &link)?;
    let mut system = System::init(&[&link], 200)?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    system.stop(Part::Agent)?;

    std::fs::remove_file(&link)?;
    symlink(other.device(), &link)?;
    let mount = Mount::new(ours.device(), &dir.path().join("mnt"), "defaults")?;
    std::fs::write(mount.point().join("file"), "written while nobody looked")?;
    mount.unmount()?;
    system.start(Part::Agent)?;
    let newest = system.wait_for_now()?;
    let status = system.operator("status", &[])?;
    let group = &status["groups"][0];
    ensure!(group["volumes"][0]["device"] == text(ours.device()), "{group}");
    let notes = group["capture_notes"].to_string();
    ensure!(notes.contains("is now") && notes.contains("fsuuid:"), "{notes}");
    system.stop(Part::Agent)?;
    let out = system.dir().join("restored");
    system.restore("sdb", newest, &out)?;
    run("cmp", &[text(ours.device()), text(&out)]).context("the newest point against the disk")?;

    let was = ours.device().to_owned();
    drop(ours);
    let said = refused(&system)?;
    for expected in
        ["no longer the disk that was protected", text(&was), text(other.device()), "protected-disks"]
    {
        ensure!(said.contains(expected), "{expected} in {said}");
    }
    Ok(())
}

/// Named by the UUID of its file system, a disk is protected wherever it is.
#[test]
fn kernel_a_disk_is_named_by_its_file_system() -> anyhow::Result<()> {
    if !root("kernel_a_disk_is_named_by_its_file_system") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (disk, part) = partitioned(&dir.path().join("disk.img"), 32 * MIB, 512)?;
    FileSystem::Ext4.make(&part)?;
    let uuid = run("blkid", &["--probe", "--match-tag", "UUID", "--output", "value", text(&part)])?;
    let mut system = System::init(&[disk.device()], 200)?;
    let path = format!("device = \"{}\"", disk.device().display());
    system.edit(Part::Agent, |text| text.replace(&path, &format!("device = \"fsuuid:{uuid}\"")))?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let status = system.operator("status", &[])?;
    ensure!(status["groups"][0]["volumes"][0]["device"] == text(disk.device()), "{status}");
    system.stop(Part::Agent)
}

/// What cannot be protected is refused with its reason.
#[test]
fn kernel_unfit_disks_are_refused() -> anyhow::Result<()> {
    if !root("kernel_unfit_disks_are_refused") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (disk, part) = partitioned(&dir.path().join("disk.img"), 32 * MIB, 512)?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let second = System::init(&[disk.device()], 200)?;
    let said = refused(&second)?;
    ensure!(said.contains("protected already, by process"), "{said}");
    // It is free again when its agent was killed.
    system.kill(Part::Agent)?;
    system.start(Part::Agent)?;
    system.wait_for_now()?;
    system.stop(Part::Agent)?;

    let twice = System::init(&[disk.device(), &part], 200)?;
    let said = refused(&twice)?;
    ensure!(said.contains("Name it once") && said.contains(text(disk.device())), "{said}");

    let gone = disk.device().to_owned();
    drop(disk);
    let empty = capture::Device::open(&gone).expect_err("a loop device without a file").to_string();
    ensure!(empty.contains("no size"), "{empty}");
    Ok(())
}

/// A volume that is larger from one epoch to the next, through the whole way: a point keeps the size it had, whatever came
/// after it, and also when the servers were started again.
#[test]
fn points_keep_the_size_they_had() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("disk");
    let old: Vec<u8> = (0..8 * MIB).map(|index| (index / 512 % 251) as u8).collect();
    std::fs::write(&source, &old)?;
    let mut system = System::init(&[&source], 200)?;
    system.start_all()?;
    let before =
        *system.wait_for_points("a first point", |points| !points.is_empty())?.last().context("a point")?;
    system.stop(Part::Agent)?;

    // Not a multiple of a granule, and the old part changes too.
    let mut new = old.clone();
    new[..4096].fill(7);
    new.extend((0..3 * MIB + 512).map(|index| (index / 512 % 13) as u8));
    std::fs::write(&source, &new)?;
    system.start(Part::Agent)?;
    system.wait_for_now()?;
    for part in [Part::Agent, Part::ProcessServer, Part::TargetServer] {
        system.stop(part)?;
    }
    system.start(Part::TargetServer)?;
    let points = system.wait_for_points("the points again", |points| points.contains(&before))?;
    let newest = *points.last().context("a point")?;
    for (point, expected) in [(before, &old), (newest, &new), (before, &old)] {
        let out = system.dir().join("restored");
        system.restore("disk", point, &out)?;
        ensure!(&std::fs::read(&out)? == expected, "point {point} is not what the disk held then");
    }
    Ok(())
}

/// A disk that grows while it is protected and written: the agent follows it in its new size, reads nothing again but the
/// new part, and every point keeps the size it had.
#[test]
fn kernel_a_disk_that_grows_is_followed() -> anyhow::Result<()> {
    if !root("kernel_a_disk_that_grows_is_followed") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    let disk = LoopDisk::create(&image, 96 * MIB)?;
    let name = name(disk.device());
    let mut system = System::init(&[disk.device()], 100)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let lane = Lane {
        index: 0,
        path: disk.device().to_owned(),
        offset: 0,
        slots: 64,
        record_bytes: 4096,
        direct: true,
    };
    let lanes = [lane];
    let writers = Writers::start(&lanes, 1000)?;
    system.start_all()?;
    let points = system.wait_for_points("some points", |points| points.len() >= 10)?;
    let before = *points.last().context("a point")?;

    std::fs::OpenOptions::new().write(true).open(&image)?.set_len(160 * MIB)?;
    run("losetup", &["-c", text(disk.device())])?;
    // At once, behind the old end.
    let output = format!("of={}", disk.device().display());
    run("dd", &["if=/dev/urandom", &output, "bs=1M", "count=4", "seek=120", "oflag=direct", "conv=notrunc"])?;
    let out = system.dir().join("restored");
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        let newest = system.wait_for_now()?;
        system.restore(&name, newest, &out)?;
        if std::fs::metadata(&out)?.len() == 160 * MIB {
            break;
        }
        ensure!(
            Instant::now() < limit,
            "the disk is not followed in its new size\n{}",
            system.logged(Part::Agent)
        );
    }
    let drained = system.drained()?;
    ensure!(
        drained < 80 * MIB,
        "{drained} bytes were read again for 64 MiB more\n{}",
        system.logged(Part::Agent)
    );

    let counts = writers.stop()?;
    let newest = system.wait_for_now()?;
    system.stop(Part::Agent)?;
    system.restore(&name, newest, &out)?;
    run("cmp", &[text(disk.device()), text(&out)]).context("the newest point against the disk")?;
    ensure!(check(&lanes, |_| out.clone())? == counts);
    system.restore(&name, before, &out)?;
    ensure!(std::fs::metadata(&out)?.len() == 96 * MIB, "a point keeps the size it had");
    Ok(())
}
