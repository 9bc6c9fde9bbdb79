//! A Debian that is replicated while it works, started again from an older point and from the newest.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use scratch::{LoopDisk, Mount};
use seawall_tests::bootable::{self, PROGRAMS, ROOT_OFFSET, WORK_DIR};
use seawall_tests::system::{Part, System, program};
use seawall_tests::{cannot_run, root, text};

const TEST: &str = "kernel_points_of_a_working_machine_boot";
/// For a machine to start, check its files and end, under software emulation.
const BOOT_SECONDS: &str = "400";
/// Files that are there before a point is taken.
const FILES_MIN: u64 = 20;

/// Writes files, and a line into the manifest when a file is durable, until there are enough; then the same file over and over, since
/// the disk is small and machines may be slow. Until told to stop.
fn work(dir: &Path, stop: &AtomicBool, enough: &AtomicBool, lines: &AtomicU64) -> anyhow::Result<()> {
    let mut manifest = fs::OpenOptions::new().create(true).append(true).open(dir.join("manifest"))?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0_u64.. {
        if stop.load(SeqCst) {
            return Ok(());
        }
        let mut bytes = Vec::new();
        while bytes.len() < 4000 + (number as usize * 7919) % 150_000 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(number | 1);
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        if !enough.load(SeqCst) {
            let name = format!("file{number}");
            let mut file = fs::File::create(dir.join(&name))?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            let sum = Command::new("sha256sum").arg(&name).current_dir(dir).output()?;
            ensure!(sum.status.success(), "sha256sum: {sum:?}");
            manifest.write_all(&sum.stdout)?;
            manifest.sync_all()?;
            lines.store(number + 1, SeqCst);
        }
        // Something that no line speaks of, and that is never the same.
        fs::write(dir.join("churn"), &bytes)?;
        std::thread::sleep(Duration::from_millis(30));
    }
    Ok(())
}

/// Replaces the state, durably and in one step.
fn set_state(dir: &Path, state: &str) -> anyhow::Result<()> {
    let mut file = fs::File::create(dir.join("state.new"))?;
    file.write_all(state.as_bytes())?;
    file.sync_all()?;
    fs::rename(dir.join("state.new"), dir.join("state"))?;
    Ok(fs::File::open(dir)?.sync_all()?)
}

/// What the guest says.
#[derive(Debug)]
struct Said(String);

impl Said {
    fn of(console: &str) -> Option<Said> {
        let said = console.lines().find_map(|line| line.split_once("SEAWALL-CHECK "))?;
        Some(Said(said.1.to_owned()))
    }

    fn value(&self, key: &str) -> &str {
        let word = self.0.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        word.unwrap_or_default()
    }

    fn lines(&self) -> u64 {
        self.value("lines").parse().unwrap_or(0)
    }
}

fn boot(system: &System, volume: &str, point: u64, firmware: &str) -> anyhow::Result<Said> {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", BOOT_SECONDS]).arg(program("seawall")?);
    command.args(["boot", volume, "--point", &point.to_string(), "--accel", "tcg", "--memory", "768MiB"]);
    command.args(["--firmware", firmware, "--dir"]).arg(system.dir().join("seawall"));
    let output = command.stdin(Stdio::null()).output().context("run seawall boot")?;
    let console = String::from_utf8_lossy(&output.stdout);
    let told = String::from_utf8_lossy(&output.stderr);
    let last: String = console.chars().rev().take(6000).collect::<Vec<_>>().into_iter().rev().collect();
    ensure!(output.status.success(), "boot point {point}: {}: {told}\n{last}", output.status);
    Said::of(&console).with_context(|| format!("point {point} said nothing:\n{last}"))
}

/// The boot proof of a point, and what its machine said.
fn prove(system: &System, volume: &str, point: u64) -> anyhow::Result<Said> {
    let (console, probe) = (system.dir().join("console"), system.dir().join("probe"));
    // What the machine says while it runs is in the file: the console is read meanwhile.
    let waits =
        "until grep -q 'net=lo,' \"$SEAWALL_CONSOLE\"; do sleep 0.2; done; test \"$SEAWALL_POINT\" -gt 0";
    fs::write(&probe, format!("#!/bin/sh\n{waits}\n"))?;
    fs::set_permissions(&probe, fs::Permissions::from_mode(0o755))?;
    let prove = |more: &[&str]| -> anyhow::Result<(serde_json::Value, Option<i32>)> {
        let mut command = Command::new(program("seawall")?);
        command.args([
            "prove",
            volume,
            "--point",
            &point.to_string(),
            "--accel",
            "tcg",
            "--memory",
            "768MiB",
        ]);
        command.args(["--firmware", "bios", "--json", "--dir"]).arg(system.dir().join("seawall")).args(more);
        let output = command.output().context("run seawall prove")?;
        let said = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok((said, output.status.code()))
    };
    let within = format!("{BOOT_SECONDS}s");
    let files = ["--console", text(&console), "--probe", text(&probe), "--within", &within];
    let (said, code) = prove(&[&["--expect", "Linux version"], &files[..]].concat())?;
    ensure!(said["proven"] == true && code == Some(0) && said["point"] == point, "{said}");
    ensure!(said["expected"][0]["after_ms"].as_f64() < said["took_ms"].as_f64(), "{said}");
    println!("proven: {} ms", said["took_ms"]);
    let kept = || -> anyhow::Result<serde_json::Value> {
        Ok(system.operator("status", &[])?["groups"][0]["proof"].clone())
    };
    let proof = kept()?;
    ensure!(proof["epoch"] == point && proof["volumes"][0] == volume && said["kept"] == true, "{proof}");

    let (not, code) = prove(&["--expect", "never said", "--within", "5s"])?;
    ensure!(not["proven"] == false && code == Some(3), "{not}");
    ensure!(not["why"].as_str().is_some_and(|why| why.contains("has not said \"never said\"")), "{not}");
    let (not, code) = prove(&["--expect", "never said", "--never", "Linux version"])?;
    ensure!(code == Some(3) && not["why"] == "the machine said \"Linux version\"", "{not}");
    ensure!(kept()? == proof, "what was not proven counts for nothing");
    let console = fs::read(&console)?;
    Said::of(&String::from_utf8_lossy(&console)).context("the console tells of the check")
}

/// kill -9 while the machine runs: the machine ends, and its export.
fn killed(system: &System, volume: &str) -> anyhow::Result<()> {
    let mut command = Command::new(program("seawall")?);
    command.args(["boot", volume, "--point", "latest", "--accel", "tcg", "--firmware", "bios", "--dir"]);
    command.arg(system.dir().join("seawall")).stdin(Stdio::null()).stdout(Stdio::piped());
    // What it leaves when it is killed goes with the test.
    command.env("TMPDIR", system.dir());
    let mut child = command.stderr(Stdio::null()).spawn()?;
    let mut console = child.stdout.take().context("a console")?;
    // The kernel's first words.
    console.read_exact(&mut [0; 100])?;
    child.kill()?;
    child.wait()?;
    // It ends when the last who could write to it has ended.
    console.read_to_end(&mut Vec::new())?;
    let limit = Instant::now() + Duration::from_secs(60);
    while system.operator("status", &[])?["target_server"]["exports"]
        .as_array()
        .is_some_and(|all| !all.is_empty())
    {
        ensure!(Instant::now() < limit, "the export does not end");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn kernel_points_of_a_working_machine_boot() -> anyhow::Result<()> {
    if !root(TEST) {
        return Ok(());
    }
    let others = [("qemu-system-x86_64", ""), ("setpriv", "")];
    let missing: Vec<_> = PROGRAMS
        .iter()
        .chain(&others)
        .filter(|(program, _)| {
            !["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
                .iter()
                .any(|dir| Path::new(dir).join(program).exists())
        })
        .collect();
    if !missing.is_empty() {
        cannot_run(TEST, &format!("not installed: {missing:?}"));
        return Ok(());
    }
    let image = bootable::image()?;
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("disk.img");
    scratch::run(
        "cp",
        &["--sparse=always", image.to_str().context("path")?, copy.to_str().context("path")?],
    )?;
    let disk = LoopDisk::attach(&copy, 512)?;
    let size = fs::metadata(&copy)?.len();
    let partition = LoopDisk::attach_part(disk.device(), ROOT_OFFSET, size - ROOT_OFFSET - (1 << 20))?;
    let mut system = System::init(&[disk.device()], 500)?;
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    let mount = Mount::new(partition.device(), &dir.path().join("mnt"), "rw")?;
    let place = mount.point().join(WORK_DIR);
    set_state(&place, "older")?;

    // It works from before the first point on until the last machine has ended.
    let (stop, enough) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let lines = Arc::new(AtomicU64::new(0));
    let worker = {
        let (place, stop, enough, lines) = (place.clone(), stop.clone(), enough.clone(), lines.clone());
        std::thread::spawn(move || work(&place, &stop, &enough, &lines))
    };
    let outcome = (|| {
        system.start_all()?;
        system.wait_for_points("a first point", |points| !points.is_empty())?;
        let written = |more: u64| {
            let wanted = lines.load(SeqCst) + more;
            while lines.load(SeqCst) < wanted && !worker.is_finished() {
                std::thread::sleep(Duration::from_millis(20));
            }
            lines.load(SeqCst)
        };
        let older_lines = written(FILES_MIN);
        let older = system.wait_for_now()?;
        written(FILES_MIN);
        set_state(&place, "newest")?;
        let newest_lines = written(FILES_MIN);
        let newest = system.wait_for_now()?;
        enough.store(true, SeqCst);
        let volume = disk.device().file_name().context("a name")?.to_string_lossy().into_owned();

        let said = boot(&system, &volume, older, "bios")?;
        println!("older: {said:?}");
        ensure!(said.value("state") == "older" && said.value("result") == "sound", "{said:?}");
        ensure!(
            said.lines() >= older_lines && said.lines() < newest_lines,
            "{said:?}, {older_lines} to {newest_lines}"
        );
        ensure!(said.value("firmware") == "bios" && said.value("net") == "lo,", "{said:?}");
        let said = boot(&system, &volume, newest, "auto")?;
        println!("newest: {said:?}");
        ensure!(said.value("state") == "newest" && said.value("result") == "sound", "{said:?}");
        ensure!(said.lines() >= newest_lines, "{said:?}, at least {newest_lines}");
        ensure!(said.value("firmware") == "uefi" && said.value("net") == "lo,", "{said:?}");
        // What the machine wrote is gone with it, and was never in the replica.
        let said = prove(&system, &volume, newest)?;
        ensure!(said.value("touched") == "no" && said.value("result") == "sound", "{said:?}");
        killed(&system, &volume)?;
        // Replication went on.
        system.wait_for_now()?;
        Ok(())
    })();
    stop.store(true, SeqCst);
    let worked = worker.join().map_err(|_| anyhow::anyhow!("the workload panicked"))?;
    mount.unmount()?;
    outcome.and(worked)
}
