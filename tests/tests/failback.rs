//! The way back, with the real programs: a disk that comes home is the starting replica, and only what differs moves.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::{LoopDisk, run};
use seawall_tests::system::{Part, System};
use seawall_tests::{GRANULE, content, differing, name, random, root, text};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const DISK: u64 = 96 * MIB;

/// Writes random data at some places, and gives the whole disk.
fn write(disk: &LoopDisk, places: &[(u64, u64)]) -> anyhow::Result<Vec<u8>> {
    let file = OpenOptions::new().write(true).open(disk.device())?;
    for (at, bytes) in places {
        file.write_all_at(&random(*bytes)?, *at)?;
    }
    file.sync_all()?;
    content(disk.device())
}

/// Writes what is there.
fn writable(disk: &LoopDisk) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(disk.device())?;
    let mut sector = [0; 4096];
    file.read_exact_at(&mut sector, 0)?;
    file.write_all_at(&sector, 0)
}

/// At most 1.1 times the granules that differ, and 0.1 % of the volume for the checksums.
fn little_moved(report: &Value, differed: u64) -> anyhow::Result<()> {
    let sent = report["sent_bytes_total"].as_u64().context("bytes sent")?;
    println!("{sent} bytes moved, {differed} differed: {:.3}", sent as f64 / differed as f64);
    ensure!(
        sent > 0 && sent <= differed * 11 / 10 + DISK / 1000,
        "{sent} bytes moved for {differed}: {report}"
    );
    Ok(())
}

/// Site A is lost; B goes on from a point of before; A's disk comes home with what B has, and what A wrote after the point is kept; then A
/// protects it to B again.
#[test]
fn kernel_a_disk_comes_home_and_only_what_differs_moves() -> anyhow::Result<()> {
    if !root("kernel_a_disk_comes_home_and_only_what_differs_moves") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("a.img");
    std::fs::write(&image, random(DISK)?)?;
    let disk_a = LoopDisk::attach(&image, 512)?;
    let (a, disk_name) = (disk_a.device().to_owned(), name(disk_a.device()));
    let mut forward = System::init(&[&a], 200)?;
    forward.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    // Whoever protects a disk that came home does not want to wait for the night.
    forward.close_hours()?;
    forward.start_all()?;
    forward.wait_for_points("a first point", |points| !points.is_empty())?;
    let at_point = write(&disk_a, &[(3 * MIB, 200_000)])?;
    let point = forward.wait_for_now()?;
    // A goes on writing; all of that arrives, but is not what is chosen.
    let lost = write(&disk_a, &[(10 * MIB, 700_000), (50 * MIB, 4096)])?;
    forward.wait_for_now()?;
    forward.kill(Part::Agent)?;
    forward.failover(&["start", "--point", &point.to_string()])?;
    let committed = forward.failover(&["commit"])?;
    ensure!(committed["generation"] == 2, "{committed}");
    let chosen = committed["point"]["epoch"].as_u64().context("the point")?;

    // B has the raw image, and writes to it.
    let image_b = dir.path().join("b.img");
    std::fs::write(&image_b, forward.restored(&disk_name, chosen)?)?;
    let disk_b = LoopDisk::attach(&image_b, 512)?;
    ensure!(content(disk_b.device())? == at_point);
    let at_b = write(&disk_b, &[(20 * MIB + 4096, 3 * MIB), (90 * MIB, 65536)])?;

    // A's machine is back: no tracking, and its disk as it was left.
    forward.detach()?;
    ensure!(content(disk_a.device())? == lost);
    let mut back = System::init(&[disk_b.device()], 200)?;
    back.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let name_b = name(disk_b.device());
    let adopt = format!("\n[[group.volume]]\nname = {name_b:?}\ndevice = {:?}\nadopt = true\n", text(&a));
    back.edit(Part::TargetServer, |text| format!("{text}{adopt}"))?;
    back.close_hours()?;
    back.start_all()?;
    let points = back.wait_for_points("a point of B", |points| points.len() > 1)?;
    let first = *points.last().context("the newest point")?;
    ensure!(back.restored(&name_b, first)? == at_b, "A has what B has");
    ensure!(back.restored(&name_b, 1)? == lost, "what A wrote after the point is kept as it was found");
    let found = back.point_at_target(&1.into())?;
    ensure!(found["label"] == "as found" && found["pin"].is_object(), "{found}");
    little_moved(&back.report()?, differing(&lost, &at_b))?;

    // B goes on meanwhile; then it is stopped, and its last state is A's.
    let last_at_b = write(&disk_b, &[(70 * MIB, 100_000)])?;
    let handed = back.hand_over(&[])?;
    let last = handed["epoch"].as_u64().context("the last point")?;
    ensure!(handed["equal"] == DISK && handed["different"] == 0, "{handed}");
    writable(&disk_b).expect_err("nothing writes to B's disk any more");
    back.failover(&["start", "--point", &last.to_string()])?;
    back.failover(&["commit"])?;
    back.stop(Part::Agent)?;
    ensure!(back.restored(&name_b, 1)? == lost && back.restored(&name_b, last)? == last_at_b);
    back.stop(Part::TargetServer)?;
    back.stop(Part::ProcessServer)?;
    ensure!(content(disk_a.device())? == last_at_b, "A's disk is B's, byte for byte");

    // A runs again, in the next generation, and is protected to B's replica as before.
    forward.failover(&["start", "--point", "latest"])?;
    let again = forward.failover(&["commit"])?;
    ensure!(again["generation"] == 3, "{again}");
    forward.edit(Part::Agent, |text| match text.contains("generation = ") {
        true => text.replace("generation = 1", "generation = 3"),
        false => text.replace("[agent]\n", "[agent]\ngeneration = 3\n"),
    })?;
    forward.start(Part::Agent)?;
    let home = forward.wait_for_now()?;
    ensure!(forward.restored(&disk_name, home)? == last_at_b, "B's replica follows A again");
    ensure!(forward.restored(&disk_name, point)? == at_point, "points from before stay");
    little_moved(&forward.report()?, differing(&at_point, &last_at_b))?;
    let latest = write(&disk_a, &[(MIB, 5000)])?;
    let newest = forward.wait_for_now()?;
    ensure!(forward.restored(&disk_name, newest)? == latest);
    forward.stop(Part::Agent)?;
    back.detach()?;
    forward.detach()
}

/// A planned failover is refused while the disk is in use, ends with the proof that nothing is lost, finds what the replica had
/// different, and can be taken back; a command that is cut short leaves the disk as it was.
#[test]
fn kernel_a_disk_is_handed_over_with_proof_or_not_at_all() -> anyhow::Result<()> {
    if !root("kernel_a_disk_is_handed_over_with_proof_or_not_at_all") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), DISK)?;
    let disk_name = name(disk.device());
    run("mkfs.ext4", &["-q", text(disk.device())])?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let writable = || writable(&disk);

    let mounted = dir.path().join("mounted");
    std::fs::create_dir(&mounted)?;
    run("mount", &[text(disk.device()), text(&mounted)])?;
    std::fs::write(mounted.join("file"), random(MIB)?)?;
    let refused = system.hand_over(&[]).map_err(|error| error.to_string());
    run("umount", &[text(&mounted)])?;
    let refused = refused.expect_err("it is mounted");
    ensure!(refused.contains(text(&mounted)) && refused.contains("unmount"), "{refused}");
    writable().context("what was refused changes nothing")?;

    // While the target does not answer there is no end, and who asked goes away.
    system.kill(Part::TargetServer)?;
    let mut asking = std::process::Command::new(seawall_tests::system::program("seawall")?)
        .args(["hand-over", "--json", "--socket"])
        .arg(system.socket())
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let limit = Instant::now() + Duration::from_secs(30);
    while writable().is_ok() {
        ensure!(Instant::now() < limit, "the disk stays writable");
        std::thread::sleep(Duration::from_millis(20));
    }
    asking.kill()?;
    asking.wait()?;
    while writable().is_err() {
        ensure!(Instant::now() < limit, "the disk stays shut");
        std::thread::sleep(Duration::from_millis(20));
    }
    system.start(Part::TargetServer)?;

    let handed = system.hand_over(&[])?;
    ensure!(handed["answer"] == "handed-over" && handed["equal"] == DISK, "{handed}");
    let epoch = handed["epoch"].as_u64().context("the point")?;
    writable().expect_err("it is handed over");
    run("mount", &[text(disk.device()), text(&mounted)]).expect_err("and claimed");
    ensure!(system.hand_over(&[])? == handed, "whoever asks again gets the answer again, and no other point");
    let all = content(disk.device())?;
    ensure!(system.restored(&disk_name, epoch)? == all, "the point is the disk");
    ensure!(system.hand_over(&["--release"])?["answer"] == "released");
    write(&disk, &[(40 * MIB, 4096)]).context("it goes on")?;
    system.wait_for_now()?;

    // The replica is not what it should be: that is found, mended, and said.
    let replica = find(&system.place(Part::TargetServer), "replica.img")?.context("the replica's image")?;
    let file = OpenOptions::new().write(true).open(&replica)?;
    file.write_all_at(b"damage", 33 * MIB + 77)?;
    file.sync_all()?;
    let handed = system.hand_over(&[])?;
    ensure!(handed["different"] == GRANULE as u64, "{handed}");
    let epoch = handed["epoch"].as_u64().context("the point")?;
    system.failover(&["start", "--point", &epoch.to_string()])?;
    let committed = system.failover(&["commit"])?;
    let newest = committed["point"]["epoch"].as_u64().context("the newest point")?;
    ensure!(
        committed["changed_bytes"] == 0 && system.restored(&disk_name, newest)? == content(disk.device())?
    );
    system.hand_over(&["--release"])?;
    system.stop(Part::Agent)?;
    system.detach()
}

fn find(dir: &Path, name: &str) -> anyhow::Result<Option<std::path::PathBuf>> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if path.file_name().is_some_and(|file| file == name) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// A target server claims the device that a replica lies on. The kernel then refuses to zero a range of it of which something has been written
/// and has not reached the medium yet; that was taken for a failed disk, and poisoned replicas of disks that came home.
#[test]
fn kernel_a_claimed_device_is_zeroed_while_it_is_written() -> anyhow::Result<()> {
    use durable::{OpenMode, RealStorage, Storage as _};
    if !root("kernel_a_claimed_device_is_zeroed_while_it_is_written") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 4 * MIB)?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
    let _claim = rustix::fs::open(disk.device(), flags, rustix::fs::Mode::empty())?;
    let file = RealStorage.open(disk.device(), OpenMode::ReadWrite)?;
    for _ in 0..20 {
        file.write_all_at(&vec![7; MIB as usize], MIB)?;
        file.zero_range(MIB + 8192, 65536)?;
    }
    file.sync_data()?;
    let mut expected = vec![0; 4 * MIB as usize];
    expected[MIB as usize..2 * MIB as usize].fill(7);
    expected[MIB as usize + 8192..][..65536].fill(0);
    ensure!(content(disk.device())? == expected);
    Ok(())
}
