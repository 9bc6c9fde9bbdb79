//! Each stage of the way is starved in turn while applications write as fast as they can: memory stays inside its limits, status says
//! which stage it is and what is coalesced, and everything catches up by itself afterwards. What it costs the
//! application is measured by the bench `back_pressure`.

use std::process::Command;

use anyhow::{Context, ensure};
use scratch::run;
use seawall_tests::chance::Chance;
use seawall_tests::followed::{Followed, wait_until};
use seawall_tests::proxy::{Proxy, Weather};
use seawall_tests::root;
use seawall_tests::system::{Part, System};

const MIB: u64 = 1 << 20;
/// What a process may need besides its buffers: its program, its threads' stacks, what the allocator keeps.
const BESIDES: u64 = 192 * MIB;

/// Memory that is a process's own: not of files, not shared with the kernel side.
fn own_memory(system: &System, part: Part) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", system.pid(part)?))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("RssAnon")?;
    Ok(kib * 1024)
}

/// No part has more memory than it may.
fn memory_is_inside(system: &System, epoch_memory: u64) -> anyhow::Result<()> {
    // Open, sealing and unsent epochs, and requests that are not complete.
    let agent = own_memory(system, Part::Agent)?;
    ensure!(agent <= epoch_memory + 64 * MIB + BESIDES, "the agent has {} MiB", agent / MIB);
    for part in [Part::ProcessServer, Part::TargetServer] {
        if let Ok(memory) = own_memory(system, part) {
            // Three changesets of at most 64 MiB, opened, and credit.
            ensure!(memory <= 3 * 64 * MIB + BESIDES, "{part:?} has {} MiB", memory / MIB);
        }
    }
    Ok(())
}

fn group(system: &System) -> anyhow::Result<serde_json::Value> {
    Ok(system.status()?["process_server"]["groups"][0].clone())
}

/// Writes until status is as it should be, with memory looked at all the time. Gives what is said of the bottleneck then.
fn flood_until(
    followed: &mut Followed,
    chance: &mut Chance,
    epoch_memory: u64,
    holds: impl Fn(&serde_json::Value) -> bool,
) -> anyhow::Result<serde_json::Value> {
    // A test that hangs must end.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(90);
    loop {
        followed.flood(16 * MIB, chance)?;
        memory_is_inside(&followed.system, epoch_memory)?;
        let said = followed.system.status()?["process_server"].clone();
        let report = &said["groups"][0]["report"];
        ensure!(
            report["epoch_memory_used"].as_u64() <= report["epoch_memory_limit"].as_u64(),
            "more than the limit: {report}"
        );
        if holds(&said) {
            return Ok(said["groups"][0]["bottleneck"].clone());
        }
        ensure!(std::time::Instant::now() < limit, "the bottleneck is not as expected: {said}");
    }
}

/// The stage is named, and something is coalesced because of it.
fn named(stage: &str) -> impl Fn(&serde_json::Value) -> bool {
    move |said| {
        let found = &said["groups"][0]["bottleneck"];
        found["stage"] == *stage && found["coalesced"].as_u64() > Some(0)
    }
}

/// Everything is applied, and nothing is named any more.
fn catches_up(followed: &mut Followed) -> anyhow::Result<()> {
    followed.holds()?;
    wait_until("no stage is named", || Ok(group(&followed.system)?["bottleneck"].is_null()))
}

#[test]
fn kernel_a_slow_target() -> anyhow::Result<()> {
    if !root("kernel_a_slow_target") {
        return Ok(());
    }
    let mut chance = Chance::from_environment();
    let mut followed = Followed::start_as(|system| {
        // So small that it is full soon.
        system.edit(Part::ProcessServer, |text| {
            text.replace("cache_bytes = \"16GiB\"", "cache_bytes = \"192MiB\"")
        })
    })?;
    let proxy = Proxy::before(&mut followed.system, Part::TargetServer)?;
    followed.holds()?;
    proxy.set(Weather::Slow(400_000));
    let said = flood_until(&mut followed, &mut chance, 256 * MIB, named("target"))?;
    println!("{said}");
    proxy.set(Weather::Clear);
    catches_up(&mut followed)
}

/// The cache is full because the target is away; then the process server is stopped, too.
#[test]
fn kernel_a_full_cache_and_a_stopped_process_server() -> anyhow::Result<()> {
    if !root("kernel_a_full_cache_and_a_stopped_process_server") {
        return Ok(());
    }
    let mut chance = Chance::from_environment();
    let mut followed = Followed::start_as(|system| {
        system.edit(Part::ProcessServer, |text| {
            text.replace("cache_bytes = \"16GiB\"", "cache_bytes = \"192MiB\"")
        })?;
        // Nearly nothing at the agent.
        system.edit(Part::Agent, |text| {
            let text = text.replace("epoch_memory_bytes = \"256MiB\"", "epoch_memory_bytes = \"24MiB\"");
            text.replace("ring_bytes = \"128MiB\"", "ring_bytes = \"1MiB\"")
        })
    })?;
    followed.holds()?;
    followed.system.stop(Part::TargetServer)?;
    let said = flood_until(&mut followed, &mut chance, 24 * MIB, |said| {
        said["state"] == "cache-full" && named("target")(said)
    })?;
    println!("{said}");
    // Longer than all memory at the agent.
    followed.system.stop(Part::ProcessServer)?;
    for _ in 0..12 {
        followed.flood(16 * MIB, &mut chance)?;
        memory_is_inside(&followed.system, 24 * MIB)?;
    }
    followed.system.start(Part::ProcessServer)?;
    followed.system.start(Part::TargetServer)?;
    catches_up(&mut followed)?;
    let report = group(&followed.system)?["report"].clone();
    ensure!(report["missed_writes_total"].as_u64() > Some(0), "nothing was starved: {report}");
    Ok(())
}

/// A network of its own for the agent, with so many bits a second. Taken down when dropped.
struct SlowNetwork {
    name: String,
    /// Of this side.
    address: String,
}

impl SlowNetwork {
    fn make(rate: &str) -> anyhow::Result<SlowNetwork> {
        let number = std::process::id() % 250 + 1;
        let (name, outside, inside) =
            (format!("swtest{number}"), format!("swo{number}"), format!("swi{number}"));
        let network = SlowNetwork { name, address: format!("10.231.{number}.1") };
        run("ip", &["netns", "add", &network.name])?;
        run(
            "ip",
            &["link", "add", &outside, "type", "veth", "peer", "name", &inside, "netns", &network.name],
        )?;
        run("ip", &["addr", "add", &format!("{}/24", network.address), "dev", &outside])?;
        run("ip", &["link", "set", &outside, "up"])?;
        let within = |arguments: &[&str]| {
            let all: Vec<&str> = ["-n", &network.name].into_iter().chain(arguments.iter().copied()).collect();
            run("ip", &all).map(drop)
        };
        within(&["addr", "add", &format!("10.231.{number}.2/24"), "dev", &inside])?;
        within(&["link", "set", &inside, "up"])?;
        within(&["link", "set", "lo", "up"])?;
        let limit = [
            "qdisc", "add", "dev", &inside, "root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms",
        ];
        let all: Vec<&str> = ["-n", &network.name].into_iter().chain(limit).collect();
        run("tc", &all)?;
        Ok(network)
    }

    fn lift(&self) -> anyhow::Result<()> {
        let inside = self.name.replace("swtest", "swi");
        run("tc", &["-n", &self.name, "qdisc", "del", "dev", &inside, "root"]).map(drop)
    }
}

impl Drop for SlowNetwork {
    fn drop(&mut self) {
        // With it goes its end of the cable, and so the other end.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[test]
fn kernel_a_slow_link() -> anyhow::Result<()> {
    if !root("kernel_a_slow_link") {
        return Ok(());
    }
    let mut chance = Chance::from_environment();
    let network = SlowNetwork::make("20mbit")?;
    let mut followed = Followed::start()?;
    followed.holds()?;
    let system = &mut followed.system;
    system.stop(Part::Agent)?;
    system.stop(Part::ProcessServer)?;
    let listens = system.listens(Part::ProcessServer)?;
    let port = listens.rsplit(':').next().context("a port")?.to_owned();
    system.edit(Part::ProcessServer, |text| text.replace(&listens, &format!("0.0.0.0:{port}")))?;
    system.edit(Part::Agent, |text| {
        text.replace(&format!("127.0.0.1:{port}"), &format!("{}:{port}", network.address))
    })?;
    system.enter_network(&format!("/run/netns/{}", network.name));
    system.start(Part::ProcessServer)?;
    system.start(Part::Agent)?;
    followed.holds()?;
    let said = flood_until(&mut followed, &mut chance, 256 * MIB, named("link"))?;
    println!("{said}");
    network.lift()?;
    catches_up(&mut followed)?;
    followed.system.stop(Part::Agent)
}
