//! Points that filesystems were frozen for, on the running kernel: what they promise, and that nothing stays frozen.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::lanes::{Lane, Writers, check};
use scratch::{FileSystem, LoopDisk, Mount, run};
use seawall_tests::frozen::{Beat, StuckDisk};
use seawall_tests::system::{Part, System};
use seawall_tests::{name, root, text};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A mounted disk and a raw one, in one group.
struct Site {
    mount: Option<Mount>,
    files: Option<LoopDisk>,
    raw: StuckDisk,
    point: PathBuf,
    files_name: String,
    _dir: tempfile::TempDir,
}

impl Site {
    fn make(kind: FileSystem) -> anyhow::Result<Site> {
        let dir = tempfile::tempdir()?;
        let files = LoopDisk::create(&dir.path().join("files.img"), 320 * MIB)?;
        let raw = StuckDisk::make(dir.path(), 32 * MIB)?;
        kind.make(files.device())?;
        let point = dir.path().join("mnt");
        let mount = Mount::new(files.device(), &point, "defaults")?;
        let files_name = name(files.device());
        Ok(Site { mount: Some(mount), files: Some(files), raw, point, files_name, _dir: dir })
    }

    /// Replicates both disks; waits for the first point.
    fn replicate(&self, source: &str, settings: &str) -> anyhow::Result<System> {
        let files = self.files.as_ref().context("the disk is there")?;
        let system = System::init(&[files.device(), self.raw.device()], 200)?;
        set(&system, source, settings)?;
        Ok(system)
    }

    fn leave(&mut self) -> anyhow::Result<()> {
        self.mount.take().map_or(Ok(()), Mount::unmount)?;
        self.files.take();
        Ok(())
    }
}

/// Sets the source, and what is in `[application]`.
fn set(system: &System, source: &str, settings: &str) -> anyhow::Result<()> {
    system.edit(Part::Agent, |text| {
        text.replace("source = \"auto\"", &format!("source = \"{source}\""))
            .replace("every_s = 0\n", &format!("{settings}\n"))
    })
}

fn start(system: &mut System) -> anyhow::Result<()> {
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty()).map(drop)
}

/// Puts a hook into the agent's directory.
fn hook(system: &System, name: &str, script: &str) -> anyhow::Result<()> {
    let dir = system.place(Part::Agent).join("hooks");
    fs::create_dir_all(&dir)?;
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/bash\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("chmod")
}

fn is(point: &Value, consistency: &str, reason: &str) -> anyhow::Result<()> {
    ensure!(point["consistency"] == consistency, "expected {consistency}: {point}");
    let said = point["reason"].as_str().unwrap_or_default();
    ensure!(said.contains(reason) && (reason.is_empty() == said.is_empty()), "expected {reason:?}: {point}");
    Ok(())
}

/// What a restored disk must show: nothing is left to be replayed, and everything that was durable before is there.
fn check_frozen(
    kind: FileSystem,
    site: &Site,
    image: &Path,
    lanes: &[Lane],
    before: &[u64],
) -> anyhow::Result<()> {
    let disk = LoopDisk::attach(image, 512)?;
    let device = text(disk.device());
    let without_replay = match kind {
        FileSystem::Ext4 => {
            let features = run("dumpe2fs", &["-h", device])?;
            ensure!(features.contains("has_journal"), "{features}");
            ensure!(!features.contains("needs_recovery"), "the journal would be replayed:\n{features}");
            "ro,noload"
        }
        FileSystem::Xfs => {
            // XFS leaves one record in its log when it is frozen, on purpose: the superblock, so that the next mount
            // frees what was unlinked but still open. Anything else would be metadata that is not in its place yet.
            let log = run("xfs_logprint", &["-t", device])?;
            let items: Vec<&str> =
                log.lines().filter(|line| line.contains("BUF:") || line.contains("INO:")).collect();
            ensure!(
                !log.contains("INO:") && !log.contains("EFI:"),
                "the log holds more than the superblock:\n{log}"
            );
            ensure!(
                items.iter().all(|item| !item.contains("blkno:") || item.contains("blkno:0x0 ")),
                "{log}"
            );
            "ro,norecovery"
        }
        FileSystem::Btrfs => {
            let superblock = run("btrfs", &["inspect-internal", "dump-super", device])?;
            let log_root = superblock.lines().find(|line| line.starts_with("log_root\t"));
            ensure!(log_root.is_some_and(|line| line.trim_end().ends_with("\t0")), "{superblock}");
            "ro,rescue=nologreplay"
        }
    };
    for options in [without_replay, "defaults"] {
        let mount = Mount::new(disk.device(), &site.point, options)?;
        let found =
            check(lanes, |lane| lane.path.clone()).with_context(|| format!("mounted with {options}"))?;
        for (lane, (found, before)) in found.iter().zip(before).enumerate() {
            ensure!(
                found >= before,
                "{options}: lane {lane} ends at {found}, {before} were durable before the point"
            );
        }
        mount.unmount()?;
    }
    kind.check(disk.device()).context("fsck")
}

fn a_frozen_point(kind: FileSystem, source: &str) -> anyhow::Result<()> {
    let mut site = Site::make(kind)?;
    let mut system = site.replicate(source, "budget_ms = 20000")?;
    run("cp", &["-r", "/usr/include/linux", text(&site.point)])?;
    start(&mut system)?;
    let lanes: Vec<Lane> = [512, 4096, 40 * 1024]
        .into_iter()
        .enumerate()
        .map(|(index, record_bytes)| {
            let path = site.point.join(format!("lane{index}"));
            Lane { index, path, offset: 0, slots: 100, record_bytes, direct: false }
        })
        .collect();
    // Slow enough that a bitmap is read faster than it is written.
    let writers = Writers::start(&lanes, 2000)?;
    let mut taken = Vec::new();
    for number in 0..4 {
        run("rm", &["-rf", text(&site.point.join("again"))])?;
        run("cp", &["-r", "/usr/include/linux", text(&site.point.join("again"))])?;
        let before = writers.counts();
        let label = format!("number {number}");
        let (point, code) = system.point(&["--consistency", "filesystem", "--label", &label, "--wait"])?;
        is(&point, "filesystem", "")?;
        ensure!(code == 0 && point["applied"] == true && point["label"] == label.as_str(), "{point}");
        ensure!(point["frozen_us"].as_u64().is_some_and(|us| us > 0), "{point}");
        ensure!(point["filesystems"][0] == text(&site.point), "{point}");
        // The target keeps and shows the same.
        let kept = system.point_at_target(&point["epoch"])?;
        for field in ["consistency", "label", "frozen_us", "filesystems", "cut_time"] {
            ensure!(kept[field] == point[field], "{field}: {kept} and not {point}");
        }
        println!("{} {source}: point {} frozen for {} us", kind.name(), point["epoch"], point["frozen_us"]);
        taken.push((point["epoch"].as_u64().context("epoch")?, before));
    }
    // That the check can fail: a point that nothing was frozen for, after changes that are in the log. Nobody writes any more: without
    // write data, and on a busy machine, it would be left to chance whether there is an instant at which nothing is left to read.
    run("cp", &["-r", "/usr/include/linux", text(&site.point.join("unfrozen"))])?;
    run("sync", &["-f", text(&site.point)])?;
    writers.stop()?;
    let (unfrozen, _) = system.point(&["--consistency", "crash", "--wait"])?;
    let unfrozen_image = system.dir().join("restored-unfrozen");
    system.restore(&site.files_name, unfrozen["epoch"].as_u64().context("epoch")?, &unfrozen_image)?;
    let mut images = Vec::new();
    for (epoch, before) in taken {
        let image = system.dir().join(format!("restored-{epoch}"));
        system.restore(&site.files_name, epoch, &image)?;
        images.push((image, before));
    }
    system.stop(Part::Agent)?;
    site.leave()?;
    if kind != FileSystem::Btrfs {
        // Btrfs has a log to replay only for an instant after each fsync.
        let found = check_frozen(kind, &site, &unfrozen_image, &lanes, &[0; 3]);
        let fault = found.expect_err("unfrozen, the journal has to be replayed").to_string();
        ensure!(fault.contains("would be replayed") || fault.contains("more than the superblock"), "{fault}");
    }
    for (image, before) in &images {
        check_frozen(kind, &site, image, &lanes, before).with_context(|| image.display().to_string())?;
    }
    Ok(())
}

#[test]
fn kernel_a_frozen_ext4_needs_no_replay() -> anyhow::Result<()> {
    if root("kernel_a_frozen_ext4_needs_no_replay") {
        a_frozen_point(FileSystem::Ext4, "ebpf")
    } else {
        Ok(())
    }
}

#[test]
fn kernel_a_frozen_xfs_needs_no_replay() -> anyhow::Result<()> {
    if root("kernel_a_frozen_xfs_needs_no_replay") { a_frozen_point(FileSystem::Xfs, "ebpf") } else { Ok(()) }
}

#[test]
fn kernel_a_frozen_btrfs_needs_no_replay() -> anyhow::Result<()> {
    if root("kernel_a_frozen_btrfs_needs_no_replay") {
        a_frozen_point(FileSystem::Btrfs, "ebpf")
    } else {
        Ok(())
    }
}

/// Without write data: what is dirty is drained in rounds, and the rest is read while everything is frozen.
#[test]
fn kernel_a_frozen_point_without_write_data() -> anyhow::Result<()> {
    let test = "kernel_a_frozen_point_without_write_data";
    if root(test) { a_frozen_point(FileSystem::Ext4, "ebpf-bitmap") } else { Ok(()) }
}

/// Every freeze lasts its whole budget: without write data, and with a disk in the group that cannot be read at one place, something is
/// always left to read.
fn long_freeze(budget_ms: u64) -> anyhow::Result<(Site, System, Beat)> {
    let site = Site::make(FileSystem::Ext4)?;
    let mut system = site.replicate("ebpf-bitmap", &format!("budget_ms = {budget_ms}"))?;
    start(&mut system)?;
    let beat = Beat::start(&site.point.join("beat"))?;
    site.raw.stick()?;
    // The agent has seen the failed write.
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        let status = system.operator("status", &[])?;
        let volumes = status["process_server"]["groups"][0]["report"]["volumes"].as_array().cloned();
        if volumes.context("volumes")?.iter().any(|volume| volume["dirty_bytes"].as_u64() > Some(0)) {
            return Ok((site, system, beat));
        }
        ensure!(Instant::now() < limit, "the disk is not stuck: {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn kernel_a_freeze_ends_with_its_budget() -> anyhow::Result<()> {
    if !root("kernel_a_freeze_ends_with_its_budget") {
        return Ok(());
    }
    let (site, system, beat) = long_freeze(2000)?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let asked = scope.spawn(|| system.point(&["--consistency", "filesystem"]));
        beat.wait_frozen()?;
        beat.wait_thawed()?;
        // A crash-consistent one comes when the writes end.
        site.raw.mend()?;
        let (point, code) = asked.join().expect("asking does not panic")?;
        is(&point, "crash", "were still to be read from the disks; thawed after")?;
        ensure!(code == 3 && point.get("frozen_us").is_none(), "{point} {code}");
        Ok(())
    })?;
    beat.stop()
}

#[test]
fn kernel_a_killed_agent_leaves_nothing_frozen() -> anyhow::Result<()> {
    if !root("kernel_a_killed_agent_leaves_nothing_frozen") {
        return Ok(());
    }
    // Far longer than what is waited for: it is the agent's end that thaws, not the budget.
    let (site, mut system, beat) = long_freeze(60_000)?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let (socket, seawall) = (system.socket(), seawall_tests::system::program("seawall")?);
        let asked = scope.spawn(move || {
            let mut command = std::process::Command::new(&seawall);
            command.args(["point", "now", "--consistency", "filesystem", "--socket"]).arg(&socket).output()
        });
        beat.wait_frozen()?;
        system.kill(Part::Agent)?;
        let took = beat.wait_thawed()?;
        ensure!(took < Duration::from_secs(30), "thawed {took:?} after the agent was killed");
        println!("thawed {took:?} after the agent was killed");
        let said = asked.join().expect("asking does not panic")?;
        ensure!(
            said.status.code() == Some(1),
            "there is no point: {}",
            String::from_utf8_lossy(&said.stdout)
        );
        Ok(())
    })?;
    site.raw.mend()?;
    beat.stop()?;
    fs::write(site.point.join("after"), "writes go on")?;
    // The next agent takes points again.
    system.start(Part::Agent)?;
    let (point, _) = again(&system, &["--consistency", "filesystem"])?;
    is(&point, "filesystem", "")
}

/// Agent and watchdog are killed in the same instant: the next agent finds what they left frozen.
#[test]
fn kernel_an_agent_thaws_what_its_predecessor_left() -> anyhow::Result<()> {
    if !root("kernel_an_agent_thaws_what_its_predecessor_left") {
        return Ok(());
    }
    let (site, mut system, beat) = long_freeze(60_000)?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let (socket, seawall) = (system.socket(), seawall_tests::system::program("seawall")?);
        let asked = scope.spawn(move || {
            let mut command = std::process::Command::new(&seawall);
            command.args(["point", "now", "--consistency", "filesystem", "--socket"]).arg(&socket).output()
        });
        beat.wait_frozen()?;
        let watchdog = run("pgrep", &["--parent", &system.pid(Part::Agent)?.to_string()])?;
        // Stopped first, so that neither sees the other go.
        run("kill", &["-STOP", watchdog.trim()])?;
        system.kill(Part::Agent)?;
        run("kill", &["-KILL", watchdog.trim()])?;
        site.raw.mend()?;
        asked.join().expect("asking does not panic")?;
        std::thread::sleep(Duration::from_millis(300));
        beat.wait_frozen()?;
        system.start(Part::Agent)?;
        let took = beat.wait_thawed()?;
        println!("thawed {took:?} after the agent was started");
        Ok(())
    })?;
    beat.stop()?;
    let (point, _) = again(&system, &["--consistency", "filesystem"])?;
    is(&point, "filesystem", "")?;
    let left = system.socket().with_extension("frozen");
    ensure!(!left.exists(), "{} is left", left.display());
    Ok(())
}

/// A point from an agent that has just started: it must compare its disks first.
fn again(system: &System, arguments: &[&str]) -> anyhow::Result<(Value, i32)> {
    let limit = Instant::now() + Duration::from_secs(120);
    loop {
        match system.point(arguments) {
            Err(error) if Instant::now() > limit => return Err(error),
            Ok((point, 3))
                if Instant::now() < limit && point["reason"].to_string().contains("to be read") => {}
            Ok(taken) => return Ok(taken),
            Err(_) => {}
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Stopped in its tracks the agent does nothing at all; the watchdog thaws when the budget has passed.
#[test]
fn kernel_a_stopped_agent_leaves_nothing_frozen() -> anyhow::Result<()> {
    if !root("kernel_a_stopped_agent_leaves_nothing_frozen") {
        return Ok(());
    }
    let (site, system, beat) = long_freeze(4000)?;
    let agent = system.pid(Part::Agent)?.to_string();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let asked = scope.spawn(|| system.point(&["--consistency", "filesystem"]));
        beat.wait_frozen()?;
        run("kill", &["-STOP", &agent])?;
        let thawed = beat.wait_thawed();
        run("kill", &["-CONT", &agent])?;
        thawed?;
        site.raw.mend()?;
        let (point, _) = asked.join().expect("asking does not panic")?;
        is(&point, "crash", "were still to be read from the disks; thawed after")
    })?;
    beat.stop()
}

/// Without its watchdog the agent thaws by itself.
#[test]
fn kernel_a_killed_watchdog_leaves_nothing_frozen() -> anyhow::Result<()> {
    if !root("kernel_a_killed_watchdog_leaves_nothing_frozen") {
        return Ok(());
    }
    let (site, system, beat) = long_freeze(4000)?;
    let agent = system.pid(Part::Agent)?.to_string();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let asked = scope.spawn(|| system.point(&["--consistency", "filesystem"]));
        beat.wait_frozen()?;
        let watchdog = run("pgrep", &["--parent", &agent, "--full", "freeze-watchdog"])?;
        run("kill", &["-KILL", &watchdog])?;
        beat.wait_thawed()?;
        site.raw.mend()?;
        let (point, _) = asked.join().expect("asking does not panic")?;
        is(&point, "crash", "were still to be read from the disks; thawed after")
    })?;
    beat.stop()
}

/// The agent's program, configuration and log lie on the filesystem that it freezes, and it logs everything.
#[test]
fn kernel_an_agent_freezes_what_it_stands_on() -> anyhow::Result<()> {
    if !root("kernel_an_agent_freezes_what_it_stands_on") {
        return Ok(());
    }
    let site = Site::make(FileSystem::Ext4)?;
    let mut system = site.replicate("ebpf", "budget_ms = 5000")?;
    system.move_agent(&site.point.join("agent"))?;
    start(&mut system)?;
    let beat = Beat::start(&site.point.join("beat"))?;
    for _ in 0..5 {
        let (point, _) = system.point(&["--consistency", "filesystem"])?;
        is(&point, "filesystem", "")?;
        beat.wait_thawed()?;
        println!("frozen for {} us", point["frozen_us"]);
    }
    beat.stop()?;
    ensure!(system.logged(Part::Agent).contains("point taken"), "it logs to what it freezes");
    // Gone before its home is unmounted.
    system.stop(Part::Agent)
}

#[test]
fn kernel_hooks_decide_what_a_point_is() -> anyhow::Result<()> {
    if !root("kernel_hooks_decide_what_a_point_is") {
        return Ok(());
    }
    let site = Site::make(FileSystem::Ext4)?;
    let mut system = site.replicate("ebpf", "hook_timeout_ms = 1500")?;
    start(&mut system)?;
    let beat = Beat::start(&site.point.join("beat"))?;
    let log = system.dir().join("hooks.log");
    let note = format!("echo $SEAWALL_HOOK $1 >> {}", log.display());
    let told = || fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>();
    let take = || -> anyhow::Result<Value> {
        let _ = fs::remove_file(&log);
        let (point, code) = system.point(&["--label", "hooked"])?;
        ensure!((code == 0) == (point["consistency"] == "application"), "{code}: {point}");
        beat.wait_thawed()?;
        Ok(point)
    };
    let point = take()?;
    is(&point, "filesystem", "there are no hooks in")?;

    hook(&system, "10-a", &note)?;
    hook(&system, "20-b", &format!("{note}; [ $1 = pre-freeze ] && [ \"$FAIL\" ] && exit 7; exit 0"))?;
    hook(&system, "30-c.off", "exit 1")?;
    let point = take()?;
    is(&point, "application", "")?;
    ensure!(point["label"] == "hooked" && point["frozen_us"].as_u64() > Some(0), "{point}");
    ensure!(
        told() == ["10-a pre-freeze", "20-b pre-freeze", "20-b post-thaw", "10-a post-thaw"],
        "{:?}",
        told()
    );

    // One fails: nobody stays quiesced, and the freeze is had all the same.
    hook(&system, "20-b", &format!("{note}; echo the server is gone; [ $1 != pre-freeze ]"))?;
    is(&take()?, "filesystem", "hook 20-b failed at pre-freeze: exit status: 1: the server is gone")?;
    ensure!(told() == ["10-a pre-freeze", "20-b pre-freeze", "20-b abort", "10-a abort"], "{:?}", told());

    // One says afterwards that it did not hold.
    hook(&system, "20-b", &format!("{note}; [ $1 != post-thaw ] || {{ echo lost the lock; exit 9; }}"))?;
    is(&take()?, "filesystem", "hook 20-b failed at post-thaw: exit status: 9: lost the lock")?;

    // One hangs, before and after: killed at its time-out, and nothing is frozen meanwhile or afterwards.
    for (action, frozen) in [("pre-freeze", "abort"), ("post-thaw", "post-thaw")] {
        let hang = format!("while [ -e {} ]; do sleep 0.2; done", system.dir().display());
        hook(&system, "20-b", &format!("{note}; [ $1 != {action} ] || {hang}"))?;
        let began = Instant::now();
        let point = take()?;
        is(&point, "filesystem", &format!("hook 20-b failed at {action}: not done after 1500 ms; killed"))?;
        ensure!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
        ensure!(told().last().is_some_and(|last| *last == format!("10-a {frozen}")), "{:?}", told());
        ensure!(
            point["frozen_us"].as_u64() < Some(1_500_000),
            "a hook is not waited for while frozen: {point}"
        );
    }

    // One that others could have put there is not run.
    fs::set_permissions(system.place(Part::Agent).join("hooks/20-b"), fs::Permissions::from_mode(0o777))?;
    is(&take()?, "filesystem", "20-b can be written by others than its owner")?;
    ensure!(told().is_empty(), "{:?}", told());
    beat.stop()
}

#[test]
fn kernel_one_point_at_a_time_and_clear_answers() -> anyhow::Result<()> {
    if !root("kernel_one_point_at_a_time_and_clear_answers") {
        return Ok(());
    }
    let site = Site::make(FileSystem::Ext4)?;
    let mut system = site.replicate("ebpf", "every_s = 10\nconsistency = \"filesystem\"")?;
    let refused = system.point(&[]).unwrap_err().to_string();
    ensure!(refused.contains("does it run here"), "{refused}");
    start(&mut system)?;

    // The schedule: nobody asks, and there is one all the same.
    let limit = Instant::now() + Duration::from_secs(120);
    let scheduled = loop {
        let reply = system.operator("points", &[])?;
        let points = reply["groups"][0]["points"].as_array().context("points")?.clone();
        if let Some(point) = points.into_iter().find(|point| point["consistency"] == "filesystem") {
            break point;
        }
        ensure!(Instant::now() < limit, "no scheduled point: {}", system.logged(Part::Agent));
        std::thread::sleep(Duration::from_millis(200));
    };
    ensure!(scheduled["frozen_us"].as_u64() > Some(0) && scheduled.get("label").is_none(), "{scheduled}");

    // One at a time.
    let (begun, go_on) = (system.dir().join("begun"), system.dir().join("go-on"));
    hook(
        &system,
        "10-wait",
        &format!("touch {}; until [ -e {} ]; do sleep 0.05; done", begun.display(), go_on.display()),
    )?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let first = scope.spawn(|| again_if_busy(&system));
        let limit = Instant::now() + Duration::from_secs(60);
        while !begun.exists() {
            ensure!(Instant::now() < limit, "the hook is not run");
            std::thread::sleep(Duration::from_millis(10));
        }
        let second = system.point(&["--consistency", "crash"]).unwrap_err().to_string();
        ensure!(second.contains("another one (application \"first\")"), "{second}");
        fs::write(&go_on, "")?;
        let (point, _) = first.join().expect("asking does not panic")?;
        is(&point, "application", "")
    })?;

    // Somebody else's freeze is neither taken for ours nor thawed.
    run("fsfreeze", &["--freeze", text(&site.point)])?;
    let asked = system.point(&["--consistency", "filesystem"]);
    let thawed = run("fsfreeze", &["--unfreeze", text(&site.point)]);
    let (point, _) = asked?;
    is(&point, "crash", "is frozen already, by somebody else")?;
    thawed.context("it was still frozen")?;

    let (point, code) = system.point(&["--consistency", "crash", "--label", "plain", "--wait"])?;
    is(&point, "crash", "")?;
    ensure!(code == 0, "{code}");
    ensure!(system.point_at_target(&point["epoch"])?["label"] == "plain");
    let socket = fs::metadata(system.socket())?.permissions().mode() & 0o777;
    ensure!(socket == 0o600, "the socket's mode is {socket:o}");

    // Asked by who is not root.
    fs::set_permissions(system.socket(), fs::Permissions::from_mode(0o666))?;
    fs::set_permissions(system.dir(), fs::Permissions::from_mode(0o755))?;
    let seawall = system.dir().join("seawall-for-others");
    fs::copy(seawall_tests::system::program("seawall")?, &seawall)?;
    let said = run(
        "setpriv",
        &[
            "--reuid=65534",
            "--clear-groups",
            "--",
            text(&seawall),
            "point",
            "now",
            "--socket",
            text(&system.socket()),
        ],
    );
    let said = said.expect_err("nobody may command the agent").to_string();
    ensure!(said.contains("user 65534 is not root"), "{said}");
    Ok(())
}

/// A scheduled one may be on its way just now.
fn again_if_busy(system: &System) -> anyhow::Result<(Value, i32)> {
    loop {
        match system.point(&["--label", "first"]) {
            Err(error) if error.to_string().contains("another one") => {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

/// Filesystems are found through partitions, loop devices and other mount namespaces; each superblock once.
#[test]
fn kernel_filesystems_are_found_wherever_they_are_mounted() -> anyhow::Result<()> {
    if !root("kernel_filesystems_are_found_wherever_they_are_mounted") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 512 * MIB)?;
    let device = disk.device().to_owned();
    // Two partitions: one with a filesystem that is mounted twice, one whose filesystem is left out.
    run(
        "bash",
        &["-c", &format!("printf ',256M\\n,\\n' | sfdisk --quiet --no-tell-kernel {}", device.display())],
    )?;
    run("partx", &["--add", text(&device)])?;
    let [first, second] = [1, 2].map(|number| PathBuf::from(format!("{}p{number}", device.display())));
    FileSystem::Ext4.make(&first)?;
    FileSystem::Btrfs.make(&second)?;
    let lower = Mount::new(&first, &dir.path().join("lower"), "defaults")?;
    let bind = Mount::new(lower.point(), &dir.path().join("bind"), "bind")?;
    let left_out = Mount::new(&second, &dir.path().join("left out"), "defaults")?;
    // In a file there another one, which is only mounted in a namespace of its own.
    let inner = LoopDisk::create(&lower.point().join("inner.img"), 64 * MIB)?;
    FileSystem::Ext4.make(inner.device())?;
    let hidden = dir.path().join("hidden");
    fs::create_dir(&hidden)?;
    let mut elsewhere = std::process::Command::new("unshare")
        .args(["--mount", "bash", "-c"])
        .arg(format!("mount {} {} && echo ready && read -r _", inner.device().display(), hidden.display()))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let out = elsewhere.stdout.take().context("its output")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line)?;
    ensure!(line.trim() == "ready", "{line}");
    ensure!(fs::read_dir(&hidden)?.next().is_none(), "here it is not mounted");

    let result = (|| {
        let mut system = System::init(&[&device], 200)?;
        set(&system, "ebpf", &format!("leave_out = [{:?}]", left_out.point().display().to_string()))?;
        start(&mut system)?;
        let beat = Beat::start(&lower.point().join("beat"))?;
        let (point, _) = system.point(&["--consistency", "filesystem"])?;
        is(&point, "filesystem", "")?;
        let mut found: Vec<&str> = point["filesystems"]
            .as_array()
            .context("filesystems")?
            .iter()
            .filter_map(Value::as_str)
            .collect();
        found.sort_unstable();
        ensure!(found == [text(&hidden), text(lower.point())], "{point}");
        beat.wait_thawed()?;
        beat.stop()
    })();
    drop(elsewhere.stdin.take());
    elsewhere.wait()?;
    drop(inner);
    bind.unmount()?;
    left_out.unmount()?;
    lower.unmount()?;
    // The disk goes with its last user, and its partitions with it.
    run("partx", &["--delete", text(&device)])?;
    result
}
