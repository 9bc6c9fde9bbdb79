//! Failing over to a point, with the real programs: the source is kept out, nothing is lost, and it can be taken back.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use scratch::{LoopDisk, run};
use seawall_tests::root;
use seawall_tests::system::{Part, System, program};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn name(disk: &LoopDisk) -> String {
    disk.device().file_name().expect("a device has a name").to_string_lossy().into_owned()
}

/// Writes to the disk, and gives all of it.
fn write(disk: &LoopDisk, at: u64, byte: u8) -> anyhow::Result<Vec<u8>> {
    let file = std::fs::OpenOptions::new().write(true).open(disk.device())?;
    file.write_all_at(&vec![byte; 3 * MIB / 2 + 4096], at)?;
    file.sync_all()?;
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    Ok(std::fs::read(disk.device())?)
}

/// `seawall failover`, what it answers.
fn failover(system: &System, arguments: &[&str]) -> anyhow::Result<Value> {
    let mut command = Command::new(program("seawall")?);
    command.arg("failover").args(arguments).arg("--dir").arg(system.dir().join("seawall"));
    let output = command.args(["--yes", "--json"]).output()?;
    let answer: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    match answer["error"].as_str() {
        Some(error) => bail!("{error}"),
        None => Ok(answer),
    }
}

fn restored(system: &System, disk: &LoopDisk, point: u64) -> anyhow::Result<Vec<u8>> {
    let out = system.dir().join("restored");
    system.restore(&name(disk), point, &out)?;
    Ok(std::fs::read(out)?)
}

fn group(system: &System) -> anyhow::Result<Value> {
    Ok(system.operator("status", &[])?["target_server"]["groups"][0].clone())
}

fn wait_until(what: &str, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let limit = Instant::now() + Duration::from_secs(90);
    while !holds()? {
        ensure!(Instant::now() < limit, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn kernel_a_failover_keeps_the_source_out_until_it_is_cancelled() -> anyhow::Result<()> {
    if !root("kernel_a_failover_keeps_the_source_out_until_it_is_cancelled") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 32 * MIB as u64)?;
    let mut system = System::init(&[disk.device()], 200)?;
    system.start_all()?;
    let first = write(&disk, 5 * MIB as u64, 1)?;
    let older = system.wait_for_now()?;
    let second = write(&disk, 6 * MIB as u64, 2)?;
    let newer = system.wait_for_now()?;
    ensure!(restored(&system, &disk, older)? == first && restored(&system, &disk, newer)? == second);
    for (step, says) in [("commit", "nothing to commit"), ("cancel", "nothing to commit")] {
        let refused = failover(&system, &[step]).expect_err("there is none").to_string();
        ensure!(refused.contains(says), "{refused}");
    }

    let over = failover(&system, &["start", "--point", &older.to_string()])?;
    let chosen = over["point"]["epoch"].as_u64().context("the new point")?;
    ensure!(chosen > newer && over["generation"] == 2, "{over}");
    ensure!(over["changed_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{over}");
    ensure!(restored(&system, &disk, chosen)? == first, "the volume is what it was at the point");
    ensure!(restored(&system, &disk, newer)? == second, "what came after it is not lost");
    // The source goes on, and nothing of it arrives.
    let third = write(&disk, 7 * MIB as u64, 3)?;
    std::thread::sleep(Duration::from_secs(2));
    let state = group(&system)?;
    ensure!(state["applied"] == chosen && state["state"] == "failed-over", "{state}");
    ensure!(state["failover"]["point"] == older && state["failover"]["complete"] == true, "{state}");
    // It outlives the server.
    system.kill(Part::TargetServer)?;
    system.start(Part::TargetServer)?;
    wait_until("the target server is back", || {
        Ok(group(&system).is_ok_and(|state| state["applied"] == chosen))
    })?;
    ensure!(restored(&system, &disk, chosen)? == first);

    failover(&system, &["cancel"])?;
    let back = system.wait_for_now()?;
    ensure!(restored(&system, &disk, back)? == third, "replication goes on where it was");
    ensure!(restored(&system, &disk, newer)? == second && restored(&system, &disk, older)? == first);

    // For good: the source is fenced, also when its agent starts again.
    failover(&system, &["start", "--point", "latest"])?;
    let committed = failover(&system, &["commit"])?;
    let chosen = committed["point"]["epoch"].as_u64().context("the newest point")?;
    write(&disk, 8 * MIB as u64, 4)?;
    for _ in 0..2 {
        system.stop(Part::Agent)?;
        system.start(Part::Agent)?;
        std::thread::sleep(Duration::from_secs(2));
        let state = group(&system)?;
        ensure!(state["applied"] == chosen && state["generation"] == committed["generation"], "{state}");
    }
    wait_until("the refusal is told", || {
        let status = system.operator("status", &[])?;
        Ok(status.to_string().contains("generation"))
    })?;
    ensure!(restored(&system, &disk, chosen)? == third);
    failover(&system, &["cancel"]).expect_err("it was committed");
    system.stop(Part::Agent)
}
