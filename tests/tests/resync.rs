//! Resync by checksum, with the real programs: what did not change is not sent.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use scratch::lanes::{Lane, Writers, check};
use scratch::{LoopDisk, run};
use seawall_tests::system::{Part, System, program};
use seawall_tests::{name, random, root, text};

const MIB: u64 = 1 << 20;

/// The agent is stopped and its tracking ended, as a reboot does.
fn lose_tracking(system: &mut System) -> anyhow::Result<()> {
    system.stop(Part::Agent)?;
    let config = system.config(Part::Agent);
    let output =
        Command::new(program("seawall-agent")?).args(["detach", "--config"]).arg(&config).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn report(system: &System) -> anyhow::Result<serde_json::Value> {
    let status = system.operator("status", &[])?;
    Ok(status["process_server"]["groups"][0]["report"].clone())
}

fn equal(system: &System, disk: &LoopDisk, point: u64) -> anyhow::Result<()> {
    let out = system.dir().join("restored");
    system.restore(&name(disk.device()), point, &out)?;
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    run("cmp", &[text(disk.device()), text(&out)]).context("the newest point against the disk").map(drop)
}

/// Tracking is lost while a few places of the disk change. Afterwards only those are sent, under writes; points from before
/// stay as they were, and every new one holds.
#[test]
fn kernel_a_resync_sends_only_what_differs() -> anyhow::Result<()> {
    if !root("kernel_a_resync_sends_only_what_differs") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    std::fs::write(&image, random(192 * MIB)?)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let lane = |index: usize, place: u64| Lane {
        index,
        path: disk.device().to_owned(),
        offset: place * MIB,
        slots: 64,
        record_bytes: [4096, 20 * 1024][index],
        direct: true,
    };
    let lanes = [lane(0, 20), lane(1, 140)];
    let writers = Writers::start(&lanes, 1000)?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let mut counts = writers.stop()?;
    let before = system.wait_for_now()?;
    // A report may be older than the point.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while report(&system)?["sent_bytes_total"].as_u64() <= Some(190 * MIB) {
        ensure!(std::time::Instant::now() < limit, "the first copy is sent whole: {}", report(&system)?);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }

    lose_tracking(&mut system)?;
    let old = dir.path().join("old");
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    run("cp", &["--sparse=always", text(&image), text(&old)])?;
    // In three places; one of them becomes zeroes, one is at the very end.
    let raw = OpenOptions::new().write(true).open(disk.device())?;
    raw.write_all_at(&random(MIB)?, 50 * MIB)?;
    raw.write_all_at(&vec![0; 200_000], 100 * MIB + 4096)?;
    raw.write_all_at(&random(4096)?, 192 * MIB - 4096)?;
    raw.sync_all()?;
    drop(raw);

    let writers = Writers::go_on(&lanes, 1000, &counts)?;
    system.start(Part::Agent)?;
    let points = system.wait_for_points("points after the resync", |points| {
        points.iter().filter(|point| **point > before).count() >= 4
    })?;
    counts = writers.stop()?;
    let newest = system.wait_for_now()?;
    std::thread::sleep(std::time::Duration::from_secs(1)); // a report may be older than the point
    let said = report(&system)?;
    let sent = said["sent_bytes_total"].as_u64().context("bytes sent")?;
    // What differed, what the writers wrote meanwhile (their lanes have 1.5 MiB), and the checksums.
    let written = said["written_bytes_total"].as_u64().context("bytes written")?;
    ensure!(sent < 24 * MIB + 2 * written, "{sent} bytes sent for 1.3 MiB that differ and {written} written");
    ensure!(said["compared_bytes"].as_u64() >= Some(190 * MIB), "{said}");
    ensure!(said["different_bytes"].as_u64() < Some(16 * MIB), "{said}");

    equal(&system, &disk, newest)?;
    let out = system.dir().join("point");
    let mut seen = 0;
    for point in points.into_iter().filter(|point| *point > before) {
        system.restore(&name(disk.device()), point, &out)?;
        let records: u64 = check(&lanes, |_| out.clone())?.iter().sum();
        ensure!(records >= seen, "points go back");
        seen = records;
    }
    system.restore(&name(disk.device()), before, &out)?;
    run("cmp", &[text(&old), text(&out)]).context("the point from before")?;
    ensure!(seen > 0 && counts.iter().sum::<u64>() >= seen);
    Ok(())
}

/// Servers and agent are killed in the middle of a resync: it goes on, and nothing is taken for equal that is not.
#[test]
fn kernel_an_interrupted_resync_goes_on() -> anyhow::Result<()> {
    if !root("kernel_an_interrupted_resync_goes_on") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    std::fs::write(&image, random(384 * MIB)?)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mut system = System::init(&[disk.device()], 100)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    system.start_all()?;
    let before = system.wait_for_now()?;
    for round in 0..3 {
        lose_tracking(&mut system)?;
        let raw = OpenOptions::new().write(true).open(disk.device())?;
        for place in 0..12 {
            raw.write_all_at(&random(65536)?, place * 32 * MIB + round * 65536 + 512)?;
        }
        raw.sync_all()?;
        system.start(Part::Agent)?;
        for part in [Part::Agent, Part::ProcessServer, Part::TargetServer, Part::Agent] {
            std::thread::sleep(std::time::Duration::from_millis(60 + 40 * round));
            system.kill(part)?;
            system.start(part)?;
        }
        let newest = system.wait_for_now()?;
        ensure!(newest > before);
        equal(&system, &disk, newest).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// What a scrub says: its findings, and whether the exit status says the same.
fn scrub(system: &System) -> anyhow::Result<serde_json::Value> {
    let mut command = Command::new(program("seawall")?);
    let output = command.args(["scrub", "--json", "--dir"]).arg(system.dir().join("seawall")).output()?;
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let findings = answer["findings"].as_array().context("findings")?.len();
    ensure!(output.status.success() == (findings == 0), "{:?}: {answer}", output.status);
    Ok(answer["findings"].clone())
}

/// Somebody has damaged the replica: a scrub finds it, and a resync by command mends it.
#[test]
fn kernel_a_resync_by_command_mends_the_replica() -> anyhow::Result<()> {
    if !root("kernel_a_resync_by_command_mends_the_replica") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    std::fs::write(&image, random(64 * MIB)?)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mut system = System::init(&[disk.device()], 100)?;
    // What the scrub finds would be mended by itself: not now.
    system.close_hours()?;
    system.start_all()?;
    let first = system.wait_for_now()?;
    ensure!(scrub(&system)? == serde_json::json!([]), "nothing is damaged yet");
    let replica = find(&system.place(Part::TargetServer), "replica.img")?.context("the replica's image")?;
    let file = OpenOptions::new().write(true).open(&replica)?;
    file.write_all_at(b"damage", 33 * MIB + 77)?;
    file.sync_all()?;
    equal(&system, &disk, first).expect_err("the damage is there");
    let findings = scrub(&system)?;
    ensure!(findings.as_array().is_some_and(|findings| findings.len() == 1), "{findings}");
    let refused =
        format!("{:#}", equal(&system, &disk, first).expect_err("what is damaged is not given out"));
    println!("found: {findings}\nrefused: {refused}");

    let ask = |arguments: &[&str]| {
        let mut command = Command::new(program("seawall")?);
        command.arg("resync").args(arguments).arg("--socket").arg(system.socket());
        command.output().context("run seawall resync")
    };
    let refused = ask(&["--volume", "other"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains(&name(disk.device())), "{said}");
    let asked = ask(&["--json"])?;
    ensure!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&asked.stdout)?;
    ensure!(answer["bytes"] == 64 * MIB && answer["volumes"][0] == name(disk.device()), "{answer}");
    // The block is given out again when its new checksum is known, some epochs later.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let mended = system.wait_for_now()?;
        match equal(&system, &disk, mended) {
            Err(error) if std::time::Instant::now() > limit => return Err(error),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(300)),
            Ok(()) => break,
        }
    }
    ensure!(scrub(&system)? == serde_json::json!([]), "it is mended");
    // A report may be older than the point.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let said = report(&system)?;
        if said["compared_bytes"] == 64 * MIB {
            ensure!(said["different_bytes"] == 65536, "{said}");
            return system.stop(Part::Agent);
        }
        ensure!(std::time::Instant::now() < limit, "{said}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// The resync that the agent's report shows, once it satisfies the condition.
fn wait_for_resync(
    system: &System,
    holds: impl Fn(&serde_json::Value) -> bool,
) -> anyhow::Result<serde_json::Value> {
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let said = report(system)?;
        if holds(&said["resync"]) {
            return Ok(said["resync"].clone());
        }
        ensure!(std::time::Instant::now() < limit, "the resync is not as expected: {said}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Tracking was lost outside the hours for resyncs: it waits, says why, until when and how much; no point is offered, and those
/// from before stay. A command begins it.
#[test]
fn kernel_a_resync_waits_for_its_hours_or_a_command() -> anyhow::Result<()> {
    if !root("kernel_a_resync_waits_for_its_hours_or_a_command") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    std::fs::write(&image, random(64 * MIB)?)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mut system = System::init(&[disk.device()], 100)?;
    system.close_hours()?;
    // The first copy is none, and waits for nothing.
    system.start_all()?;
    let before = system.wait_for_now()?;
    lose_tracking(&mut system)?;
    let old = dir.path().join("old");
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    run("cp", &["--sparse=always", text(&image), text(&old)])?;
    let raw = OpenOptions::new().write(true).open(disk.device())?;
    raw.write_all_at(&random(MIB)?, 20 * MIB)?;
    raw.sync_all()?;
    system.start(Part::Agent)?;
    let waits = wait_for_resync(&system, |resync| resync["stage"] == "waiting-for-window")?;
    ensure!(waits["reason"] == "tracking-ended" && waits["bytes"] == 64 * MIB, "{waits}");
    ensure!(waits["begins"].as_u64() > Some(block::UnixNanos::now().0), "{waits}");
    ensure!(waits["seconds_estimate"].as_u64() > Some(0), "{waits}");
    // Written meanwhile: it is in no point, and will be in the next.
    raw.write_all_at(&random(MIB)?, 40 * MIB)?;
    raw.sync_all()?;
    let newest = *system.points().last().context("points")?;
    std::thread::sleep(std::time::Duration::from_secs(2)); // twenty epochs
    ensure!(system.points().last() == Some(&newest), "a point while tracking has a gap");
    let said = report(&system)?;
    ensure!(said["state"] == "resync" && said["compared_bytes"] == 0, "{said}");
    let out = system.dir().join("point");
    system.restore(&name(disk.device()), before, &out)?;
    run("cmp", &[text(&old), text(&out)]).context("the point from before")?;

    let mut command = Command::new(program("seawall")?);
    let asked = command.args(["resync", "--now", "--json", "--socket"]).arg(system.socket()).output()?;
    ensure!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    let point = system.wait_for_now()?;
    ensure!(point > newest);
    equal(&system, &disk, point)?;
    wait_for_resync(&system, serde_json::Value::is_null)?;

    // Asked for in the hours, it waits too; but tracking is whole, so that points go on.
    let mut command = Command::new(program("seawall")?);
    let asked = command.args(["resync", "--window", "--json", "--socket"]).arg(system.socket()).output()?;
    let answer: serde_json::Value = serde_json::from_slice(&asked.stdout)?;
    ensure!(answer["begins"].as_u64() > Some(block::UnixNanos::now().0), "{answer}");
    let waits = wait_for_resync(&system, |resync| resync["stage"] == "waiting-for-window")?;
    ensure!(waits["reason"] == "command", "{waits}");
    let point = system.wait_for_now()?;
    equal(&system, &disk, point)?;
    system.stop(Part::Agent)
}

/// A scrub's findings start a resync of just those granules by themselves.
#[test]
fn kernel_what_a_scrub_finds_is_mended_by_itself() -> anyhow::Result<()> {
    if !root("kernel_what_a_scrub_finds_is_mended_by_itself") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    std::fs::write(&image, random(64 * MIB)?)?;
    let disk = LoopDisk::attach(&image, 512)?;
    let mut system = System::init(&[disk.device()], 100)?;
    system.start_all()?;
    system.wait_for_now()?;
    ensure!(scrub(&system)? == serde_json::json!([]), "nothing is damaged yet");
    let replica = find(&system.place(Part::TargetServer), "replica.img")?.context("the replica's image")?;
    let file = OpenOptions::new().write(true).open(&replica)?;
    file.write_all_at(b"damage", 33 * MIB + 77)?;
    file.write_all_at(b"damage", 50 * MIB + 5)?;
    file.sync_all()?;
    let findings = scrub(&system)?;
    ensure!(findings.as_array().is_some_and(|findings| !findings.is_empty()), "{findings}");
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let mended = system.wait_for_now()?;
        match equal(&system, &disk, mended) {
            Err(error) if std::time::Instant::now() > limit => return Err(error),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(300)),
            Ok(()) => break,
        }
    }
    ensure!(scrub(&system)? == serde_json::json!([]), "it is mended");
    let said = report(&system)?;
    ensure!(said["compared_bytes"] == 2 * 65536 && said["different_bytes"] == 2 * 65536, "{said}");
    wait_for_resync(&system, serde_json::Value::is_null)?;
    system.stop(Part::Agent)
}

/// The first file of this name below a directory.
fn find(dir: &Path, name: &str) -> anyhow::Result<Option<std::path::PathBuf>> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if path.file_name().is_some_and(|found| found == name) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
