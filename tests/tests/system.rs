//! The whole way with the real programs: agent, process server and target server as processes, real disks, real file systems.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::lanes::{Lane, Writers, check};
use scratch::{FileSystem, LoopDisk, Mount, run};
use seawall_tests::system::{Part, System, program};
use seawall_tests::{name, root, text};

const MIB: u64 = 1 << 20;

/// A group of two disks: one with a file system, one written directly. One writer's lanes are on both.
struct Source {
    kind: FileSystem,
    lanes: Vec<Lane>,
    mount: Option<Mount>,
    files: Option<LoopDisk>,
    raw: LoopDisk,
    /// The disk with the file system, as `seawall init` names it.
    files_name: String,
    point: PathBuf,
    _dir: tempfile::TempDir,
}

impl Source {
    fn make(kind: FileSystem) -> anyhow::Result<Source> {
        let dir = tempfile::tempdir()?;
        // XFS wants 300 MiB at least.
        let files = LoopDisk::create(&dir.path().join("files.img"), 320 * MIB)?;
        let raw = LoopDisk::create(&dir.path().join("raw.img"), 32 * MIB)?;
        kind.make(files.device())?;
        let point = dir.path().join("mnt");
        let mount = Mount::new(files.device(), &point, "discard")?;
        run("cp", &["-r", "/usr/include/linux", text(&point)])?;
        let mut lanes = Vec::new();
        for (index, record_bytes) in [512, 4096, 40 * 1024].into_iter().enumerate() {
            let path = point.join(format!("lane{index}"));
            lanes.push(Lane { index, path, offset: 0, slots: 100, record_bytes, direct: false });
        }
        for (index, record_bytes) in [512, 4096, 128 * 1024].into_iter().enumerate() {
            let (path, offset) = (raw.device().to_owned(), index as u64 * 9 * MIB);
            lanes.push(Lane { index: index + 3, path, offset, slots: 64, record_bytes, direct: true });
        }
        let files_name = name(files.device());
        Ok(Source { kind, lanes, mount: Some(mount), files: Some(files), raw, files_name, point, _dir: dir })
    }

    fn files(&self) -> &Path {
        self.files.as_ref().expect("the source is not gone").device()
    }

    /// Unmounts the file system and takes its disk away: Btrfs and XFS do not mount a restored disk beside its source.
    fn leave(&mut self) -> anyhow::Result<()> {
        self.mount.take().map_or(Ok(()), Mount::unmount)?;
        self.files.take();
        Ok(())
    }

    /// Restores both disks at a point and puts them before the oracle and the file system's checker. Gives the records.
    fn check(&self, system: &System, point: u64) -> anyhow::Result<Vec<u64>> {
        let [files, raw] = ["files.restored", "raw.restored"].map(|name| system.dir().join(name));
        system.restore(&self.files_name, point, &files)?;
        system.restore(&name(self.raw.device()), point, &raw)?;
        let disk = LoopDisk::attach(&files, 512)?;
        let mount = Mount::new(disk.device(), &self.point, "defaults")?;
        let place =
            |lane: &Lane| if lane.path == self.raw.device() { raw.clone() } else { lane.path.clone() };
        let last = check(&self.lanes, place)?;
        mount.unmount()?;
        self.kind.check(disk.device()).context("fsck")?;
        Ok(last)
    }

    /// Checks these points, oldest first; the last must have everything that was written.
    fn check_all(&self, system: &System, points: &[u64], counts: &[u64]) -> anyhow::Result<()> {
        let (mut seen, mut last) = (0, Vec::new());
        for point in points {
            last = self.check(system, *point).with_context(|| format!("point {point} of {points:?}"))?;
            let total = last.iter().sum();
            ensure!(total >= seen, "point {point} has {total} records, an older one {seen}");
            seen = total;
        }
        ensure!(last == counts, "the newest point has {last:?}, written were {counts:?}");
        println!("{}: {} points restored and checked, {seen} records", self.kind.name(), points.len());
        Ok(())
    }
}

/// Replicates under load, checks *every* point that is offered, and the newest one against the disks byte for byte.
fn every_point(kind: FileSystem) -> anyhow::Result<()> {
    let mut source = Source::make(kind)?;
    let mut system = System::init(&[source.files(), source.raw.device()], 500)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let writers = Writers::start(&source.lanes, 1000)?;
    system.start_all()?;
    system.wait_for_points("eight points", |points| points.len() >= 8)?;
    run("cp", &["-r", "/usr/include/linux", text(&source.point.join("again"))])?;
    run("rm", &["-r", text(&source.point.join("linux"))])?;
    run("fstrim", &[text(&source.point)])?;
    let counts = writers.stop()?;
    // Btrfs and XFS write in the background; frozen they do not.
    run("fsfreeze", &["--freeze", text(&source.point)])?;
    let compared = compare(&source, &mut system);
    run("fsfreeze", &["--unfreeze", text(&source.point)])?;
    compared?;
    source.leave()?;
    source.check_all(&system, &system.points(), &counts)
}

/// The newest point against the disks, which nobody writes now. Stops the agent, so that the points stay as they are.
fn compare(source: &Source, system: &mut System) -> anyhow::Result<()> {
    let newest = system.wait_for_now()?;
    system.stop(Part::Agent)?;
    for device in [source.files(), source.raw.device()] {
        let out = system.dir().join("newest");
        system.restore(&name(device), newest, &out)?;
        // The device's page cache is not the file system's.
        run("blockdev", &["--flushbufs", text(device)])?;
        run("cmp", &[text(device), text(&out)]).context("the newest point against the disk")?;
    }
    Ok(())
}

#[test]
fn kernel_every_point_of_ext4_holds() -> anyhow::Result<()> {
    if root("kernel_every_point_of_ext4_holds") { every_point(FileSystem::Ext4) } else { Ok(()) }
}

#[test]
fn kernel_every_point_of_xfs_holds() -> anyhow::Result<()> {
    if root("kernel_every_point_of_xfs_holds") { every_point(FileSystem::Xfs) } else { Ok(()) }
}

#[test]
fn kernel_every_point_of_btrfs_holds() -> anyhow::Result<()> {
    if root("kernel_every_point_of_btrfs_holds") { every_point(FileSystem::Btrfs) } else { Ok(()) }
}

/// Process server and target server are killed (-9) at random moments, 60 times, under load. What was acknowledged stays: the
/// agent would stop with a named state if the process server went back, and points never vanish. The oracle holds
/// for points from the midst of it, and at the end everything arrives.
#[test]
fn kernel_killed_servers_lose_nothing() -> anyhow::Result<()> {
    if !root("kernel_killed_servers_lose_nothing") {
        return Ok(());
    }
    const ROUNDS: u64 = 60;
    let mut source = Source::make(FileSystem::Ext4)?;
    let mut system = System::init(&[source.files(), source.raw.device()], 100)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let writers = Writers::start(&source.lanes, 1000)?;
    system.start_all()?;
    let mut known = system.wait_for_points("a first point", |points| !points.is_empty())?;
    let mut random = random("SEAWALL_SEED");
    for round in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(20 + random(400)));
        let part = if random(2) == 0 { Part::ProcessServer } else { Part::TargetServer };
        system.kill(part).with_context(|| format!("round {round}"))?;
        std::thread::sleep(Duration::from_millis(random(100)));
        system.start(part)?;
        if round % 10 == 9 {
            let last = *known.last().context("points")?;
            let points = system.wait_for_points("a newer point", |points| points.last() > Some(&last))?;
            ensure!(
                known.iter().all(|point| points.contains(point)),
                "points vanished: {known:?} became {points:?}"
            );
            known = points;
        }
    }
    let counts = writers.stop()?;
    run("sync", &["-f", text(&source.point)])?;
    system.wait_for_now()?;
    system.stop(Part::Agent)?;
    let points = system.points();
    ensure!(known.iter().all(|point| points.contains(point)), "points vanished: {known:?} became {points:?}");
    ensure!(!system.logged(Part::Agent).contains("delivery stopped"), "{}", system.logged(Part::Agent));
    source.leave()?;
    let some = some_of(&points, 10);
    println!("{ROUNDS} kills, {} points", points.len());
    source.check_all(&system, &some, &counts)
}

/// The agent is killed (-9), stopped or exchanged under load, again and again. It goes on without reading the disks again,
/// and every point holds. Now and then the ring's size changes, so that the programs and maps are exchanged too, as
/// an upgrade does.
#[test]
fn kernel_a_restarted_agent_goes_on() -> anyhow::Result<()> {
    if !root("kernel_a_restarted_agent_goes_on") {
        return Ok(());
    }
    const ROUNDS: u64 = 16;
    let mut source = Source::make(FileSystem::Ext4)?;
    let mut system = System::init(&[source.files(), source.raw.device()], 100)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let writers = Writers::start(&source.lanes, 1000)?;
    system.start_all()?;
    // What the first copy read is held elsewhere for sure a few epochs later.
    system.wait_for_points("some points", |points| points.len() >= 10)?;
    let first = system.drained()?;
    ensure!(first >= 352 * MIB, "the first copy drained {first} bytes only");
    let mut random = random("SEAWALL_SEED");
    let mut rings = ["\"64MiB\"", "\"128MiB\""].into_iter().cycle();
    for round in 0..ROUNDS {
        std::thread::sleep(Duration::from_millis(20 + random(500)));
        match random(3) {
            0 => system.stop(Part::Agent),
            _ => system.kill(Part::Agent),
        }
        .with_context(|| format!("round {round}"))?;
        if round % 4 == 3 {
            let (to, from) = (rings.next().unwrap_or_default(), ["\"64MiB\"", "\"128MiB\""]);
            system.edit(Part::Agent, |text| text.replace(from[usize::from(to == from[0])], to))?;
        }
        std::thread::sleep(Duration::from_millis(random(300)));
        system.start(Part::Agent)?;
        if random(2) == 0 {
            system.wait_for_now()?;
            let again = system.drained()?;
            ensure!(
                again < 100 * MIB,
                "round {round}: {again} bytes were read again\n{}",
                system.logged(Part::Agent)
            );
        }
    }
    let counts = writers.stop()?;
    run("fsfreeze", &["--freeze", text(&source.point)])?;
    let compared = compare(&source, &mut system);
    run("fsfreeze", &["--unfreeze", text(&source.point)])?;
    compared?;
    ensure!(!system.logged(Part::Agent).contains("delivery stopped"), "{}", system.logged(Part::Agent));
    source.leave()?;
    let points = system.points();
    let some = some_of(&points, 12);
    source.check_all(&system, &some, &counts)
}

/// About so many of the points, and always the newest.
fn some_of(points: &[u64], count: usize) -> Vec<u64> {
    let step = (points.len() / count).max(1);
    let mut some: Vec<u64> = points.iter().copied().step_by(step).collect();
    some.extend(points.last().filter(|last| some.last() != Some(last)));
    some
}

/// Numbers below a bound, from a seed that is printed and may be given in a variable.
fn random(variable: &str) -> impl FnMut(u64) -> u64 {
    let seed = std::env::var(variable).ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| block::UnixNanos::now().0) | 1;
    println!("{variable}={seed}");
    let mut state = seed;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    }
}

/// What the kernel keeps outlives the agent, belongs to one agent at a time, and ends with `detach`.
#[test]
fn kernel_detach_ends_what_is_kept() -> anyhow::Result<()> {
    if !root("kernel_detach_ends_what_is_kept") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 16 * MIB)?;
    let mut system = System::init(&[disk.device()], 100)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let kept = || std::fs::read_dir(system.tracking()).map_or(0, Iterator::count);
    ensure!(kept() == 1, "one group is kept");
    let detach = || -> anyhow::Result<std::process::Output> {
        let mut command = std::process::Command::new(program("seawall-agent")?);
        Ok(command.arg("detach").arg("--config").arg(system.config(Part::Agent)).output()?)
    };
    let refused = detach()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("another agent holds this group"), "{said}");
    ensure!(kept() == 1, "a refused detach changes nothing");
    let system = &mut system;
    system.stop(Part::Agent)?;
    ensure!(std::fs::read_dir(system.tracking())?.count() == 1, "tracking goes on without an agent");

    // A removal that was interrupted: what is left has a gap, so that all is read again.
    for round in 0..2 {
        let group = std::fs::read_dir(system.tracking())?.next().context("a group")??.path();
        let number = std::fs::read_dir(group)?.next().context("an installation")??.path();
        std::fs::remove_file(number.join("link_on_issue"))?;
        if round == 1 {
            std::fs::remove_file(number.join("granules"))?;
        }
        system.start(Part::Agent)?;
        system.wait_for_now()?;
        ensure!(system.drained()? >= 16 * MIB, "nothing that was not followed is taken for clean");
        system.stop(Part::Agent)?;
    }

    // An agent that does not keep its tracking leaves nothing behind that a later one would go on from.
    system.edit(Part::Agent, |text| text.replace("keep_tracking = true", "keep_tracking = false"))?;
    system.start(Part::Agent)?;
    system.wait_for_now()?;
    ensure!(!system.tracking().exists(), "what an earlier agent kept is gone");
    system.stop(Part::Agent)?;
    system.edit(Part::Agent, |text| text.replace("keep_tracking = false", "keep_tracking = true"))?;
    system.start(Part::Agent)?;
    system.wait_for_now()?;
    system.stop(Part::Agent)?;
    let config = system.config(Part::Agent);
    let detach = |said: &str| -> anyhow::Result<()> {
        let mut command = std::process::Command::new(program("seawall-agent")?);
        let output = command.arg("detach").arg("--config").arg(&config).output()?;
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success() && out.contains(said),
            "{out}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    detach("detached")?;
    ensure!(!system.tracking().exists(), "nothing is left");
    detach("nothing was attached")
}

/// A ring far too small for the writes, through the whole way: status says what happened, and points follow that hold.
#[test]
fn kernel_overflow_is_said_in_status() -> anyhow::Result<()> {
    if !root("kernel_overflow_is_said_in_status") {
        return Ok(());
    }
    let mut source = Source::make(FileSystem::Ext4)?;
    let mut system = System::init(&[source.files(), source.raw.device()], 200)?;
    system.edit(Part::Agent, |text| {
        text.replace("source = \"auto\"", "source = \"ebpf\"").replace("\"128MiB\"", "\"64KiB\"")
    })?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let writers = Writers::start(&source.lanes, 0)?;
    let limit = Instant::now() + Duration::from_secs(60);
    let said = loop {
        run("cp", &["-r", "/usr/include/linux", text(&source.point.join("more"))])?;
        run("rm", &["-r", text(&source.point.join("more"))])?;
        let status = system.operator("status", &[])?;
        let report = &status["process_server"]["groups"][0]["report"];
        if report["overflow_total"].as_u64() > Some(0) && report["state"] == "catching-up" {
            break report.clone();
        }
        ensure!(Instant::now() < limit, "status does not say that the ring was full: {status}");
    };
    ensure!(said["missed_writes_total"].as_u64() >= said["overflow_total"].as_u64(), "{said}");
    let counts = writers.stop()?;
    run("sync", &["-f", text(&source.point)])?;
    system.wait_for_now()?;
    system.stop(Part::Agent)?;
    source.leave()?;
    let points = system.points();
    let some = some_of(&points, 8);
    source.check_all(&system, &some, &counts)
}

/// Without privileges: an image file that is scanned, through the whole way.
#[test]
fn a_scanned_file_is_replicated() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image)?.set_len(16 * MIB)?;
    let mut system = System::init(&[&image], 200)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"scan\""))?;
    system.start_all()?;
    let lanes: Vec<Lane> = (0..2)
        .map(|index| Lane {
            index,
            path: image.clone(),
            offset: index as u64 * 4 * MIB,
            slots: 50,
            record_bytes: [512, 12 * 1024][index],
            direct: false,
        })
        .collect();
    let mut counts = Vec::new();
    for _ in 0..3 {
        let writers = Writers::go_on(&lanes, 1000, &counts)?;
        std::thread::sleep(Duration::from_millis(200));
        counts = writers.stop()?;
        let point = system.wait_for_now()?;
        let out = system.dir().join("restored");
        system.restore("disk.img", point, &out)?;
        ensure!(check(&lanes, |_| out.clone())? == counts);
        run("cmp", &[text(&image), text(&out)])?;
    }
    Ok(())
}

/// The demo proves what it says, in both ways, and leaves nothing behind.
fn demo(source: &str, mode: &str) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let output = std::process::Command::new(program("seawall")?)
        .args(["demo", "--seconds", "4", "--json", "--source", source])
        .env("TMPDIR", dir.path())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let last: serde_json::Value = serde_json::from_str(said.lines().last().unwrap_or_default())?;
    ensure!(last["mode"] == mode && last["verified"] == true, "{last}");
    for field in ["points", "rpo_ms_p50", "rpo_ms_p99", "bytes_written", "bytes_sent"] {
        ensure!(last[field].as_u64() > Some(0), "{field} in {last}");
    }
    ensure!(std::fs::read_dir(dir.path())?.next().is_none(), "the demo left files behind");
    ensure!(!run("losetup", &["--list"])?.contains(text(dir.path())), "the demo left a loop device behind");
    Ok(())
}

#[test]
fn kernel_the_demo_proves_what_it_says() -> anyhow::Result<()> {
    if root("kernel_the_demo_proves_what_it_says") { demo("ebpf", "data") } else { Ok(()) }
}

#[test]
fn the_demo_without_privileges_proves_what_it_says() -> anyhow::Result<()> {
    demo("scan", "scan")
}
