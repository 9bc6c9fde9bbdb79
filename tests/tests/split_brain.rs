//! Both sides believe that they are the one: whatever an old source, an old process server, an old copy of a target or an operator tries,
//! nothing of one history gets into the other, and it is said.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use scratch::{LoopDisk, run};
use seawall_tests::system::{Part, System};
use seawall_tests::{content, name, random, root, text, wait_until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const DISK: u64 = 16 * MIB;
/// Longer than a sender waits before it tries again what was refused the first times.
const TRIES: Duration = Duration::from_secs(2);

fn write(disk: &LoopDisk, at: u64, bytes: u64) -> anyhow::Result<Vec<u8>> {
    let file = std::fs::OpenOptions::new().write(true).open(disk.device())?;
    file.write_all_at(&random(bytes)?, at)?;
    file.sync_all()?;
    content(disk.device())
}

fn group(system: &System) -> anyhow::Result<Value> {
    Ok(system.status()?["target_server"]["groups"][0].clone())
}

fn uri(volume: &str, socket: &Path) -> String {
    format!("nbd+unix:///{volume}?socket={}", text(socket))
}

fn qemu_io(uri: &str, commands: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]);
    for one in commands {
        command.args(["-c", one]);
    }
    let output = command.arg(uri).output()?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(
        output.status.success() && !said.contains("failed") && !said.contains("rror"),
        "{commands:?}: {said}"
    );
    Ok(())
}

fn set_generation(system: &System, generation: u64) -> anyhow::Result<()> {
    system.edit(Part::Agent, |text| {
        let line = text.lines().find(|line| line.starts_with("generation = ")).expect("it names one");
        text.replace(line, &format!("generation = {generation}"))
    })
}

/// The old source is there for a while: its process server with what it had, and its agent. It writes. What it says of itself must
/// contain `says`; the target is where it was.
fn returns(system: &mut System, disk: &LoopDisk, when: &str, says: &str) -> anyhow::Result<()> {
    let before = group(system)?;
    system.start(Part::ProcessServer)?;
    system.start(Part::Agent)?;
    for _ in 0..2 {
        write(disk, 9 * MIB, 100_000)?;
        std::thread::sleep(TRIES / 2);
    }
    wait_until(&format!("{when}: {says:?} is said"), || {
        let status = system.status()?;
        Ok(status["process_server"].to_string().contains(says))
    })
    .with_context(|| system.status().map_or_else(|error| error.to_string(), |status| status.to_string()))?;
    let after = group(system)?;
    for part in [Part::Agent, Part::ProcessServer] {
        system.kill(part)?;
    }
    let stays = |key: &str| before[key] == after[key];
    ensure!(
        ["generation", "applied", "points", "failover"].into_iter().all(stays)
            && before["promoted"].is_object() == after["promoted"].is_object(),
        "{when}: {before} has become {after}"
    );
    Ok(())
}

/// During a failover, when it is promoted, committed, demoted; with what its process server had not forwarded yet, after a restart of
/// its machine, with a process server that was lost; and when there is a new source: nothing of the old one is taken, and it says so.
#[test]
fn kernel_an_old_source_is_never_taken() -> anyhow::Result<()> {
    if !root("kernel_an_old_source_is_never_taken") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), DISK)?;
    let volume = name(disk.device());
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    let chosen = write(&disk, MIB, MIB)?;
    let point = system.wait_for_now()?;
    // What is under way when the sites lose each other.
    system.stop(Part::TargetServer)?;
    write(&disk, 3 * MIB, MIB)?;
    std::thread::sleep(Duration::from_secs(1));
    system.kill(Part::Agent)?;
    system.kill(Part::ProcessServer)?;
    system.start(Part::TargetServer)?;
    wait_until("the target server answers", || Ok(system.points().contains(&point)))?;

    system.failover(&["start", "--point", &point.to_string()])?;
    returns(&mut system, &disk, "failed over", "has been failed over")?;
    system.failover(&["promote"])?;
    returns(&mut system, &disk, "promoted", "is promoted")?;
    let socket = dir.path().join("nbd.sock");
    let export = system
        .operator("export", &[volume.as_str(), "--promoted", "--socket", text(&socket), "--detach"])?["export"]
        ["id"]
        .clone();
    qemu_io(&uri(&volume, &socket), &["write -P 7 5M 1M", "flush"])?;
    let mut at_b = chosen;
    at_b[5 * MIB as usize..6 * MIB as usize].fill(7);
    std::thread::sleep(TRIES);
    returns(&mut system, &disk, "promoted and written", "is promoted")?;
    system.failover(&["commit"])?;
    returns(&mut system, &disk, "promoted and committed", "is promoted")?;
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&uri(&volume, &socket), text(&copy)])?;
    ensure!(std::fs::read(&copy)? == at_b, "the promoted volume is what was chosen and written here");
    system.asked(&["export", "stop", &export.to_string()])?;
    system.failover(&["demote"])?;
    let newest = *system.points().last().context("a point")?;
    let is_ours = |system: &System, when: &str| -> anyhow::Result<()> {
        ensure!(system.restored(&volume, newest)? == at_b, "{when}");
        Ok(())
    };
    returns(&mut system, &disk, "committed", "fenced")?;
    is_ours(&system, "committed")?;
    system.detach()?;
    returns(&mut system, &disk, "its machine was started again", "fenced")?;
    is_ours(&system, "its machine was started again")?;
    system.detach()?;
    std::fs::remove_dir_all(system.place(Part::ProcessServer).join("cache"))?;
    returns(&mut system, &disk, "its process server was lost", "fenced")?;
    is_ours(&system, "its process server was lost")?;

    // There is a new source; what is there then is what it has.
    set_generation(&system, 2)?;
    system.start(Part::ProcessServer)?;
    system.start(Part::Agent)?;
    let new = system.wait_for_now()?;
    ensure!(system.restored(&volume, new)? == content(disk.device())?);
    for step in ["promote", "cancel", "commit", "demote"] {
        system.failover(&[step]).expect_err("a source has sent something since");
    }
    system.kill(Part::Agent)?;
    system.kill(Part::ProcessServer)?;
    set_generation(&system, 1)?;
    returns(&mut system, &disk, "there was a new source", "fenced")?;
    system.detach()
}

/// The target was given back from a copy of before its failover, failed over again, and written: the same generation by number, another
/// history. What the source of the first one goes on sending is not taken, although its epochs follow by number.
#[test]
fn kernel_a_target_from_an_older_copy_takes_nothing_of_another_history() -> anyhow::Result<()> {
    if !root("kernel_a_target_from_an_older_copy_takes_nothing_of_another_history") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), DISK)?;
    let volume = name(disk.device());
    let mut system = System::init(&[disk.device()], 100)?;
    system.start_all()?;
    write(&disk, MIB, MIB)?;
    system.wait_for_now()?;
    system.kill(Part::Agent)?;
    system.kill(Part::ProcessServer)?;
    system.stop(Part::TargetServer)?;
    let (data, backup) = (system.place(Part::TargetServer).join("data"), dir.path().join("backup"));
    run("cp", &["-a", "--sparse=always", text(&data), text(&backup)])?;
    system.start(Part::TargetServer)?;
    wait_until("the target server answers", || Ok(!system.points().is_empty()))?;
    system.failover(&["start"])?;
    system.failover(&["commit"])?;
    set_generation(&system, 2)?;
    system.start(Part::ProcessServer)?;
    system.start(Part::Agent)?;
    let first = system.wait_for_now()?;
    system.stop(Part::TargetServer)?;
    std::fs::remove_dir_all(&data)?;
    run("mv", &[text(&backup), text(&data)])?;

    // Only the process server is away while it is decided anew. The source goes on.
    system.start(Part::TargetServer)?;
    wait_until("the target server answers", || Ok(!system.points().is_empty()))?;
    system.failover(&["start"])?;
    system.failover(&["promote"])?;
    let socket = dir.path().join("nbd.sock");
    let export = system
        .operator("export", &[volume.as_str(), "--promoted", "--socket", text(&socket), "--detach"])?["export"]
        ["id"]
        .clone();
    let mut round = 0;
    wait_until("it is past the first history's epochs", || {
        round += 1;
        qemu_io(
            &uri(&volume, &socket),
            &[&format!("write -P {} {}k 64k", 1 + round % 200, 4096 + 64 * (round % 64)), "flush"],
        )?;
        Ok(group(&system)?["applied"].as_u64() > Some(first + 2))
    })?;
    write(&disk, 2 * MIB, MIB)?;
    system.asked(&["export", "stop", &export.to_string()])?;
    system.failover(&["demote"])?;
    system.failover(&["commit"])?;
    let decided = group(&system)?;
    let newest = decided["applied"].as_u64().context("applied")?;
    let ours = system.restored(&volume, newest)?;
    let held = system.status()?["process_server"]["groups"][0]["cached"].as_u64();
    ensure!(held > Some(newest), "what the source sent is not past {newest}: {held:?}");

    for _ in 0..2 {
        write(&disk, 12 * MIB, 50_000)?;
        std::thread::sleep(TRIES);
    }
    let now = group(&system)?;
    ensure!(now["applied"] == newest && now["generation"] == 2, "of the other history was taken: {now}");
    wait_until("it is said", || {
        let status = system.status()?;
        Ok(status["process_server"].to_string().contains("another history"))
    })?;
    ensure!(system.restored(&volume, newest)? == ours);
    // Also when both have been started again.
    for part in [Part::ProcessServer, Part::TargetServer] {
        system.stop(part)?;
        system.start(part)?;
    }
    wait_until("it is said again", || {
        let status = system.status()?;
        Ok(status["process_server"].to_string().contains("another history"))
    })?;
    ensure!(group(&system)?["applied"] == newest && system.restored(&volume, newest)? == ours);
    // Mended as it is said: by a new generation.
    system.stop(Part::Agent)?;
    system.failover(&["start"])?;
    system.failover(&["commit"])?;
    set_generation(&system, 3)?;
    system.start(Part::Agent)?;
    let last = system.wait_for_now()?;
    ensure!(
        system.restored(&volume, last)? == content(disk.device())?,
        "the replica follows the source again"
    );
    system.stop(Part::Agent)?;
    system.detach()
}

/// The disks that came home are not mistaken for what the other site runs: as long as nothing whole has come of it, `latest` is refused.
#[test]
fn kernel_what_was_found_is_not_taken_for_the_latest() -> anyhow::Result<()> {
    if !root("kernel_what_was_found_is_not_taken_for_the_latest") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let (old, new) = (dir.path().join("old.img"), dir.path().join("new.img"));
    std::fs::write(&old, random(DISK)?)?;
    std::fs::write(&new, random(DISK)?)?;
    let (home, away) = (LoopDisk::attach(&old, 512)?, LoopDisk::attach(&new, 512)?);
    let (found, running) = (content(home.device())?, content(away.device())?);
    let mut back = System::init(&[away.device()], 200)?;
    let volume = name(away.device());
    let adopt =
        format!("\n[[group.volume]]\nname = {volume:?}\ndevice = {:?}\nadopt = true\n", text(home.device()));
    back.edit(Part::TargetServer, |text| format!("{text}{adopt}"))?;
    back.start(Part::TargetServer)?;
    wait_until("it is adopted", || Ok(back.points() == [1]))?;
    for arguments in [&["start"][..], &["start", "--promote"]] {
        let refused = back.failover(arguments).expect_err("nothing of the source is there").to_string();
        ensure!(refused.contains("as found") && refused.contains("--point 1"), "{refused}");
    }
    back.failover(&["promote"]).expect_err("it is not failed over");
    ensure!(group(&back)?["generation"] == 1, "what was refused changes nothing");
    // Who names it means it, and may take it back.
    back.failover(&["start", "--point", "1"])?;
    back.failover(&["cancel"])?;
    back.start(Part::ProcessServer)?;
    back.start(Part::Agent)?;
    let points = back.wait_for_points("a point of the source", |points| points.len() > 1)?;
    back.failover(&["start"])?;
    let newest = *back.points().last().context("a point")?;
    ensure!(newest > points[1] && back.restored(&volume, newest)? == running);
    ensure!(back.restored(&volume, 1)? == found, "what was found is kept");
    back.stop(Part::Agent)?;
    back.detach()
}
