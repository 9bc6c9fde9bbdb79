//! `seawall-agent check` on this machine: with all privileges, with some, and with none.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, ensure};
use scratch::LoopDisk;
use seawall_tests::root;
use seawall_tests::system::program;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Runs the check through `setpriv` with these options, and gives its answer and exit status.
fn check(options: &[&str], program: &Path, arguments: &[&str]) -> anyhow::Result<(Value, i32)> {
    let mut command = Command::new("setpriv");
    let output = command.args(options).arg(program).args(["check", "--json"]).args(arguments).output()?;
    let said = said(&output);
    ensure!(!said.contains("panicked"), "{said}");
    let answer = serde_json::from_slice(&output.stdout).with_context(|| said.clone())?;
    Ok((answer, output.status.code().with_context(|| said)?))
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn found<'a>(answer: &'a Value, name: &str) -> &'a Value {
    let facts = answer["facts"].as_array().map(Vec::as_slice).unwrap_or_default();
    facts.iter().find(|fact| fact["name"] == name).unwrap_or(&Value::Null)
}

fn has(value: &Value, text: &str) -> anyhow::Result<()> {
    ensure!(value.to_string().contains(text), "{text:?} is not in {value}");
    Ok(())
}

#[test]
fn kernel_check_says_which_mode_and_why() -> anyhow::Result<()> {
    if !root("kernel_check_says_which_mode_and_why") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 16 * MIB)?;
    let device = disk.device().to_str().context("a device's name")?;
    let agent = program("seawall-agent")?;

    let (answer, status) = check(&[], &agent, &[device])?;
    ensure!(status == 0 && answer["devices"][0]["mode"] == "data", "{status}: {answer}");

    // A file is no disk: it can be scanned.
    let file = dir.path().join("file");
    std::fs::write(&file, [0; 4096])?;
    let (answer, status) = check(&[], &agent, &[device, file.to_str().context("path")?])?;
    ensure!(status == 1 && answer["devices"][1]["mode"] == "scan", "{status}: {answer}");
    has(&answer["devices"][1]["why"], "not a block device")?;

    let (answer, status) = check(&[], &agent, &["/dev/no-such-disk"])?;
    ensure!(status == 2 && answer["devices"][0]["mode"].is_null(), "{status}: {answer}");
    has(&answer["devices"][0]["why"], "No such file")
}

/// Root without a privilege, and somebody else: words, not a panic, and the lower mode.
#[test]
fn kernel_check_without_privilege_names_what_is_missing() -> anyhow::Result<()> {
    if !root("kernel_check_without_privilege_names_what_is_missing") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), 16 * MIB)?;
    let device = disk.device().to_str().context("a device's name")?;
    // Where everybody can run it.
    let agent = dir.path().join("seawall-agent");
    std::fs::copy(program("seawall-agent")?, &agent)?;
    scratch::run("chmod", &["755", dir.path().to_str().context("path")?, agent.to_str().context("path")?])?;

    // Root owns the disk, so it can be read.
    let (answer, status) = check(&["--bounding-set=-all", "--inh-caps=-all"], &agent, &[device])?;
    ensure!(status == 1 && answer["devices"][0]["mode"] == "scan", "{status}: {answer}");
    has(found(&answer, "privileges"), "missing: CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN")?;
    has(&answer["devices"][0]["why"], "CAP_BPF")?;
    has(&answer["devices"][0]["advice"], "Run as root")?;

    // Enough for eBPF, but the kernel hides where pages are.
    let some = "-all,+bpf,+perfmon";
    let bounded = format!("--bounding-set={some}");
    let (answer, status) = check(&[&bounded, &format!("--inh-caps={some}")], &agent, &[device])?;
    ensure!(status == 1 && answer["devices"][0]["mode"] == "bitmap", "{status}: {answer}");
    has(&answer["devices"][0]["why"], "CAP_SYS_ADMIN")?;

    let (answer, status) = check(&["--reuid=65534", "--clear-groups"], &agent, &[device])?;
    ensure!(status == 2 && answer["devices"][0]["mode"].is_null(), "{status}: {answer}");
    has(&answer["devices"][0]["why"], "Permission denied")?;
    has(found(&answer, "ring of write records"), "refuses")
}

/// What `seawall status` shows of it is in the agent's report.
#[test]
fn kernel_status_says_why_a_mode_is_active() -> anyhow::Result<()> {
    use seawall_tests::system::{Part, System};
    if !root("kernel_status_says_why_a_mode_is_active") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("disk.img");
    std::fs::write(&file, vec![1; MIB as usize])?;
    let mut system = System::init(&[&file], 200)?;
    system.start_all()?;
    system.wait_for_points("a first point", |points| !points.is_empty())?;
    let status = system.operator("status", &[])?;
    has(&status["groups"][0]["capture_notes"], "not a block device")?;
    system.stop(Part::Agent)
}

/// A disk whose writes the kernel does not count is followed, and status says what is missing.
#[test]
fn kernel_status_says_that_the_second_witness_is_off() -> anyhow::Result<()> {
    use seawall_tests::system::{Part, System};
    if !root("kernel_status_says_that_the_second_witness_is_off") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let disk = scratch::LoopDisk::create(&dir.path().join("disk.img"), 8 * MIB)?;
    let name = disk.device().file_name().expect("a device has a name").to_string_lossy().into_owned();
    let switch = format!("/sys/block/{name}/queue/iostats");
    std::fs::write(&switch, "0")?;
    let followed = (|| {
        let mut system = System::init(&[disk.device()], 200)?;
        system.start_all()?;
        system.wait_for_points("a first point", |points| !points.is_empty())?;
        let status = system.operator("status", &[])?;
        has(&status["groups"][0]["capture_notes"], "queue/iostats")?;
        system.stop(Part::Agent)
    })();
    std::fs::write(&switch, "1")?; // the device may be used again
    followed
}
