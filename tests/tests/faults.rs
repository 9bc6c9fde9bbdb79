//! Rows of the table in docs/reliability.md that need the whole system: the real programs, killed at each step of their crash
//! orders, cut off, and given back what is too old.
//!
//! `SEAWALL_SEED` chooses at which time a step is the one: `cargo xtask faults --seed N`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use scratch::lanes::check;
use scratch::{LoopDisk, run};
use seawall_tests::chance::Chance;
use seawall_tests::followed::{Followed, path, wait_until};
use seawall_tests::proxy::{Proxy, Weather};
use seawall_tests::root;
use seawall_tests::system::{Part, System};

const MIB: u64 = 1 << 20;

/// A part is killed at each of these steps of its crash orders while applications write, started again, and goes on.
fn killed_at(part: Part, test: &str, steps: &[&str]) -> anyhow::Result<()> {
    if !root(test) {
        return Ok(());
    }
    let mut chance = Chance::from_environment();
    let mut followed = Followed::start()?;
    for step in steps {
        let fault = format!("{step}:{}", 1 + chance.below(4));
        println!("{fault}");
        followed
            .while_written(|system| {
                system.stop(part)?;
                system.start_with(part, &[(durable::FAULT_VARIABLE, &fault)])?;
                system.wait_killed(part).with_context(|| format!("come to {fault}"))?;
                // The others notice.
                std::thread::sleep(Duration::from_millis(chance.below(300)));
                system.start(part)
            })
            .with_context(|| fault.clone())?;
        followed.holds().with_context(|| format!("after it was killed at {fault}"))?;
    }
    Ok(())
}

#[test]
fn kernel_the_agent_killed_at_each_step() -> anyhow::Result<()> {
    let steps = [
        "before-cut",
        "after-cut",
        "after-seal",
        "before-delivery",
        "after-delivery",
        "before-acknowledged",
        "after-acknowledged",
    ];
    killed_at(Part::Agent, "kernel_the_agent_killed_at_each_step", &steps)
}

#[test]
fn kernel_the_process_server_killed_at_each_step() -> anyhow::Result<()> {
    let steps = [
        "before-segment-sync",
        "before-cache-write",
        "after-cache-write",
        "after-cache-sync",
        "before-cursors",
        "before-rename",
        "after-rename",
        "after-cursors",
    ];
    killed_at(Part::ProcessServer, "kernel_the_process_server_killed_at_each_step", &steps)
}

#[test]
fn kernel_the_target_server_killed_at_each_step() -> anyhow::Result<()> {
    let steps = ["before-layer", "after-layer", "before-image-sync", "after-image", "after-state"];
    killed_at(Part::TargetServer, "kernel_the_target_server_killed_at_each_step", &steps)
}

/// An agent is killed at the steps of a resync.
#[test]
fn kernel_the_agent_killed_in_a_resync() -> anyhow::Result<()> {
    if !root("kernel_the_agent_killed_in_a_resync") {
        return Ok(());
    }
    let mut chance = Chance::from_environment();
    let mut followed = Followed::start()?;
    for step in ["before-resync", "before-answer"] {
        followed.while_written(|system| {
            system.stop(Part::Agent)?;
            system.detach()?;
            let times = if step == "before-answer" { 1 + chance.below(3) } else { 1 };
            system.start_with(Part::Agent, &[(durable::FAULT_VARIABLE, &format!("{step}:{times}"))])?;
            system.wait_killed(Part::Agent).context(step)?;
            system.start(Part::Agent)
        })?;
        followed.holds().context(step)?;
    }
    Ok(())
}

/// The process server's disk is lost with all that it had acknowledged and not forwarded. An empty one takes its place: it learns from
/// the target where to go on, and the agent compares all.
#[test]
fn kernel_an_empty_process_server_takes_the_place_of_one_that_is_lost() -> anyhow::Result<()> {
    if !root("kernel_an_empty_process_server_takes_the_place_of_one_that_is_lost") {
        return Ok(());
    }
    let mut followed = Followed::start()?;
    followed.holds()?;
    followed.while_written(|system| {
        // What is cached from now on is at no target.
        system.kill(Part::TargetServer)?;
        let before = cached(system)?;
        wait_until("more is cached", || Ok(cached(system)? >= before + 5))?;
        system.kill(Part::ProcessServer)?;
        std::fs::remove_dir_all(system.place(Part::ProcessServer).join("cache"))?;
        system.start(Part::TargetServer)?;
        system.start(Part::ProcessServer)
    })?;
    followed.holds()?;
    // With nothing lost there is nothing to compare: the epochs simply go on.
    let before = compared(&followed.system)?;
    followed.system.stop(Part::Agent)?;
    let caught_up = || {
        let status = followed.system.status()?;
        let group = &status["process_server"]["groups"][0];
        Ok(group["cached"] == group["targets"][0]["applied"])
    };
    wait_until("all is applied", caught_up)?;
    followed.system.kill(Part::ProcessServer)?;
    std::fs::remove_dir_all(followed.system.place(Part::ProcessServer).join("cache"))?;
    followed.system.start(Part::ProcessServer)?;
    followed.system.start(Part::Agent)?;
    followed.holds()?;
    ensure!(before > 0 && compared(&followed.system)? == 0, "nothing was lost, and yet it was compared");
    Ok(())
}

/// The target's files are put back to what they were some time ago. What is missing is freed at the process server: no epoch is applied,
/// no point is offered that is not whole, and the state says what a person must do.
#[test]
fn kernel_a_target_restored_from_an_old_backup_is_refused() -> anyhow::Result<()> {
    if !root("kernel_a_target_restored_from_an_old_backup_is_refused") {
        return Ok(());
    }
    let mut followed = Followed::start()?;
    followed.holds()?;
    let system = &mut followed.system;
    system.stop(Part::TargetServer)?;
    let data = system.place(Part::TargetServer).join("data");
    let backup = system.dir().join("backup");
    run("cp", &["-a", "--sparse=always", path(&data)?, path(&backup)?])?;
    system.start(Part::TargetServer)?;
    followed.while_written(|system| system.wait_for_now().map(drop))?;
    followed.holds()?;
    let system = &mut followed.system;
    let old = system.points();
    system.stop(Part::TargetServer)?;
    // What was applied is freed.
    std::thread::sleep(Duration::from_millis(2500));
    std::fs::remove_dir_all(&data)?;
    run("mv", &[path(&backup)?, path(&data)?])?;
    system.start(Part::TargetServer)?;
    wait_until("the gap is said", || {
        let status = system.status()?;
        Ok(status["process_server"]["groups"][0]["targets"][0]["state"] == "gap")
    })?;
    let points = system.points();
    ensure!(!points.is_empty() && points.iter().all(|point| old.contains(point)), "{points:?} of {old:?}");
    let newest = *points.last().context("points")?;
    let out = system.dir().join("restored");
    let name = followed.disk.device().file_name().context("a name")?.to_string_lossy().into_owned();
    system.restore(&name, newest, &out)?;
    check(&followed.lanes, |_| out.clone())?;
    Ok(())
}

/// The target's file system is full for a while: nothing acknowledged is lost, the state says so, and it goes on by itself.
#[test]
fn kernel_a_full_disk_at_the_target_passes() -> anyhow::Result<()> {
    if !root("kernel_a_full_disk_at_the_target_passes") {
        return Ok(());
    }
    let mut followed = Followed::start()?;
    let system = &mut followed.system;
    system.stop(Part::TargetServer)?;
    let data = system.place(Part::TargetServer).join("data");
    let small = LoopDisk::create(&system.dir().join("small.img"), 160 * MIB)?;
    run("mkfs.ext4", &["-q", path(small.device())?])?;
    let kept = system.dir().join("kept");
    run("mv", &[path(&data)?, path(&kept)?])?;
    std::fs::create_dir(&data)?;
    let mounted = scratch::Mount::new(small.device(), &data, "")?;
    run("cp", &["-a", "--sparse=always", &format!("{}/.", path(&kept)?), path(&data)?])?;
    let ballast = data.join("ballast");
    run("chmod", &["0700", path(&data)?])?;
    system.start(Part::TargetServer)?;
    followed.holds()?;
    // Somebody fills the disk up; later there is room again.
    let free = free_bytes(&data)?;
    run("fallocate", &["-l", &free.saturating_sub(300_000).to_string(), path(&ballast)?])?;
    followed.while_written(|system| {
        wait_until("the target says that it is full", || {
            let status = system.status()?;
            let said = status.to_string();
            Ok(said.contains("\"target-full\""))
        })?;
        std::fs::remove_file(&ballast)?;
        Ok(())
    })?;
    followed.holds()?;
    followed.system.stop(Part::TargetServer)?;
    drop(mounted);
    Ok(())
}

/// Connections end in the midst of frames, again and again, while applications write; then the network is well.
#[test]
fn kernel_links_cut_in_the_middle_of_frames() -> anyhow::Result<()> {
    if !root("kernel_links_cut_in_the_middle_of_frames") {
        return Ok(());
    }
    let mut chance = Chance::from_environment();
    let mut followed = Followed::start()?;
    for behind in [Part::ProcessServer, Part::TargetServer] {
        let proxy = Proxy::before(&mut followed.system, behind)?;
        followed.holds()?;
        followed.while_written(|_| {
            for _ in 0..6 {
                proxy.set(Weather::Down);
                let before = proxy.connections();
                proxy.set(Weather::Cut(2_000 + chance.below(400_000)));
                wait_until("it connects again, and is cut", || Ok(proxy.connections() >= before + 2))?;
            }
            proxy.set(Weather::Clear);
            Ok(())
        })?;
        followed.holds().with_context(|| format!("behind the proxy: {behind:?}"))?;
        proxy.take_away(&mut followed.system, behind)?;
        followed.holds()?;
    }
    Ok(())
}

/// A connection's beginning is recorded and said again on others, and connections overtake each other: nothing is taken twice.
#[test]
fn kernel_replayed_and_reordered_connections() -> anyhow::Result<()> {
    if !root("kernel_replayed_and_reordered_connections") {
        return Ok(());
    }
    let mut followed = Followed::start()?;
    for behind in [Part::ProcessServer, Part::TargetServer] {
        let proxy = Proxy::before(&mut followed.system, behind)?;
        followed.holds()?;
        followed.while_written(|_| {
            for weather in [Weather::Replayed, Weather::Delayed(150), Weather::Delayed(60), Weather::Replayed]
            {
                proxy.set(Weather::Down);
                let (before, passed) = (proxy.connections(), proxy.passed());
                proxy.set(weather);
                wait_until("something passes", || {
                    Ok(proxy.connections() > before && proxy.passed() > passed + 20_000)
                })?;
            }
            proxy.set(Weather::Clear);
            Ok(())
        })?;
        followed.holds().with_context(|| format!("behind the proxy: {behind:?}"))?;
        proxy.take_away(&mut followed.system, behind)?;
        followed.holds()?;
    }
    Ok(())
}

/// The network swallows everything and tells nobody. Both ends notice by the silence, and meet again when it is over.
#[test]
fn kernel_half_open_connections_are_noticed() -> anyhow::Result<()> {
    if !root("kernel_half_open_connections_are_noticed") {
        return Ok(());
    }
    let mut followed = Followed::start()?;
    for behind in [Part::ProcessServer, Part::TargetServer] {
        let proxy = Proxy::before(&mut followed.system, behind)?;
        followed.holds()?;
        followed.while_written(|system| {
            proxy.set(Weather::Silent);
            let seen = match behind {
                // It cannot say anything to anybody; but the process server has lost it.
                Part::ProcessServer => "/agent",
                _ => "/targets/0/connected",
            };
            wait_until("the silence is noticed", || {
                let group = system.status()?["process_server"]["groups"][0].clone();
                Ok(group.pointer(seen).is_none_or(|seen| seen.is_null() || *seen == false))
            })?;
            // Those that are open stay so: nothing comes out of them any more.
            proxy.set(Weather::Down);
            proxy.set(Weather::Clear);
            Ok(())
        })?;
        followed.holds().with_context(|| format!("behind the proxy: {behind:?}"))?;
        proxy.take_away(&mut followed.system, behind)?;
        followed.holds()?;
    }
    Ok(())
}

/// A part whose clock is what a file says, in seconds from the machine's.
fn start_with_clock(system: &mut System, part: Part, clock: &Path) -> anyhow::Result<()> {
    let variables = [
        ("LD_PRELOAD", FAKE_TIME),
        ("FAKETIME_TIMESTAMP_FILE", path(clock)?),
        // Looked at each time; and what measures durations is not changed by a clock that is set.
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    system.start_with(part, &variables)
}

const FAKE_TIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
/// By how much clocks jump, in seconds: more than the day for which the target keeps all points.
const JUMP: &str = "90000";

/// The clock of each part jumps ahead by more than a day and is put right, and back and is put right: points go on in order and stay, and
/// nothing is compared for it. What a source cuts while its own clock is behind says that it is old, and goes as such once the clock is
/// right; all else stays.
#[test]
fn kernel_clocks_that_jump_lose_nothing() -> anyhow::Result<()> {
    let test = "kernel_clocks_that_jump_lose_nothing";
    if !root(test) {
        return Ok(());
    }
    if !Path::new(FAKE_TIME).exists() {
        seawall_tests::cannot_run(test, "libfaketime is not installed");
        return Ok(());
    }
    // Not so many points that the oldest would go by number.
    let slowly = |text: &str| text.replace("epoch_interval_ms = 100", "epoch_interval_ms = 500");
    let mut followed = Followed::start_as(|system| system.edit(Part::Agent, slowly))?;
    followed.holds()?;
    let parts = [Part::TargetServer, Part::ProcessServer, Part::Agent];
    let clock = |system: &System, part: Part| system.dir().join(format!("clock-{}", part.name()));
    let set = |system: &System, part: Part, seconds: &str| -> anyhow::Result<()> {
        let (file, new) = (clock(system, part), system.dir().join("clock-new"));
        std::fs::write(&new, seconds)?;
        Ok(std::fs::rename(new, file)?)
    };
    for part in parts {
        set(&followed.system, part, "+0")?;
        followed.system.stop(part)?;
        let clock = clock(&followed.system, part);
        start_with_clock(&mut followed.system, part, &clock)?;
    }
    followed.holds()?;
    for part in parts {
        let mut seemingly_old: Vec<u64> = Vec::new();
        for seconds in [format!("+{JUMP}"), "+0".to_owned(), format!("-{JUMP}"), "+0".to_owned()] {
            let what = format!("{} at {seconds} s", part.name());
            let before = followed.system.points();
            set(&followed.system, part, &seconds)?;
            // Long enough for the target to look after its points.
            followed.while_written(|_| {
                std::thread::sleep(Duration::from_secs(3));
                Ok(())
            })?;
            let (point, _) = followed.system.point(&["--wait"]).with_context(|| what.clone())?;
            followed
                .holds_at(point["epoch"].as_u64().context("a point has an epoch")?)
                .context(what.clone())?;
            let after = followed.system.points();
            let may_go = |point: &u64| after.contains(point) || seemingly_old.contains(point);
            let lost: Vec<&u64> = before.iter().filter(|point| !may_go(point)).collect();
            ensure!(lost.is_empty(), "{what}: points {lost:?} are gone");
            ensure!(after.last() > before.last(), "{what}: no new points");
            if part == Part::Agent && seconds.starts_with('-') {
                seemingly_old = after.into_iter().filter(|point| !before.contains(point)).collect();
            }
            if part == Part::Agent {
                // Else nothing was tried.
                let cut = followed.system.point_at_target(&point["epoch"])?["cut_time"].as_u64();
                let off = cut.context("a time")? as i64 / 1_000_000_000
                    - block::UnixNanos::now().0 as i64 / 1_000_000_000;
                let expected: i64 = seconds.parse()?;
                ensure!((off - expected).abs() < 600, "{what}: the clock is off by {off} s");
            }
        }
    }
    followed.holds()?;
    ensure!(compared(&followed.system)? == 0, "a clock is no reason to compare");
    Ok(())
}

/// Identities are replaced while everything runs, the group's key between two runs. Nothing is compared for it, and a changeset under the
/// old key is refused.
#[test]
fn kernel_keys_and_identities_are_rotated_without_a_resync() -> anyhow::Result<()> {
    if !root("kernel_keys_and_identities_are_rotated_without_a_resync") {
        return Ok(());
    }
    let mut followed = Followed::start()?;
    followed.holds()?;
    let authority = wire::Authority::load(&followed.system.dir().join("seawall/ca"))?;
    for part in [Part::Agent, Part::ProcessServer] {
        let place = followed.system.place(part);
        let identity = wire::Credentials::load(&place)?.identity().clone();
        let new = followed.system.dir().join(format!("new-{part:?}"));
        authority.issue(&identity, &new)?;
        for file in [wire::CERT_FILE, wire::KEY_FILE] {
            std::fs::copy(new.join(file), place.join(file))?;
        }
    }
    // They count from the next connection on, as soon as it was looked at them again.
    followed.while_written(|system| {
        system.kill(Part::TargetServer)?;
        system.start(Part::TargetServer)?;
        wait_until("the agent takes them", || {
            system.kill(Part::ProcessServer)?;
            system.start(Part::ProcessServer)?;
            std::thread::sleep(Duration::from_millis(700));
            Ok(system.logged(Part::Agent).contains("credentials renewed"))
        })
    })?;
    followed.holds()?;

    followed.system.stop(Part::Agent)?;
    let caught_up = || {
        let status = followed.system.status()?;
        let group = &status["process_server"]["groups"][0];
        Ok(group["cached"] == group["targets"][0]["applied"])
    };
    wait_until("all is applied", caught_up)?;
    let before = followed.system.points();
    followed.system.stop(Part::TargetServer)?;
    let key = changeset::GroupKey::generate()?.to_hex();
    // First at the source only: the target refuses what it cannot open, and applies nothing of it.
    std::fs::write(followed.system.place(Part::Agent).join("group.key"), key.as_bytes())?;
    followed.system.start(Part::TargetServer)?;
    followed.system.start(Part::Agent)?;
    wait_until("the wrong key is named", || {
        Ok(followed.system.status()?.to_string().contains("unauthorised"))
    })?;
    ensure!(followed.system.points() == before, "something was applied under another key");
    followed.system.stop(Part::TargetServer)?;
    std::fs::write(followed.system.place(Part::TargetServer).join("group.key"), key.as_bytes())?;
    followed.system.start(Part::TargetServer)?;
    // Who was refused looks again when the peer is back, or is started again.
    followed.system.stop(Part::ProcessServer)?;
    followed.system.start(Part::ProcessServer)?;
    followed.while_written(|system| system.wait_for_now().map(drop))?;
    followed.holds()?;
    ensure!(compared(&followed.system)? == 0, "a new key is no reason to compare");
    Ok(())
}

fn free_bytes(dir: &Path) -> anyhow::Result<u64> {
    let said = run("df", &["--output=avail", "-B1", path(dir)?])?;
    said.lines().last().and_then(|line| line.trim().parse().ok()).context("free bytes")
}

fn cached(system: &System) -> anyhow::Result<u64> {
    let status = system.status()?;
    status["process_server"]["groups"][0]["cached"].as_u64().with_context(|| format!("cached in {status}"))
}

/// What the running agent has compared, as it says from now on: a report may be older than a point.
fn compared(system: &System) -> anyhow::Result<u64> {
    let now = block::UnixNanos::now().0;
    let mut compared = 0;
    wait_until("a report from now on", || {
        let report = system.status()?["process_server"]["groups"][0]["report"].clone();
        compared =
            report["compared_bytes"].as_u64().with_context(|| format!("compared_bytes in {report}"))?;
        Ok(report["time"].as_u64() > Some(now))
    })?;
    Ok(compared)
}
