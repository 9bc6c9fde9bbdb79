//! The program itself: killed at random moments, and told to stop.

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::*;
use wire::Role;

/// How often the server is killed.
const KILLS: u64 = 15;

fn write_config(world: &World, target: &Target) -> std::path::PathBuf {
    let credentials = world.credentials(Role::ProcessServer, "ps", None);
    let text = format!(
        "[process_server]\nlisten = \"127.0.0.1:0\"\ncredentials = {:?}\ncache = \"cache\"\ncache_bytes = \"192MiB\"\n\
         [[group]]\nid = \"{}\"\ntargets = [{:?}]\n",
        credentials,
        group(1),
        target.address
    );
    let path = world.dir.path().join("process-server.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Starts the program and waits until it says where it listens.
fn start(config: &std::path::Path) -> (Child, String) {
    let mut child = Command::new(program())
        .args(["run", "--log-format", "json", "--config"])
        .arg(config)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let local = loop {
        let line = lines.next().expect("it ended").unwrap();
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        if let Some(local) = json["local"].as_str() {
            break local.to_owned();
        }
    };
    // Keeps its log from filling the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (child, local)
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments_it_loses_nothing_acknowledged() {
    let world = World::new();
    let target = world.target("a").await;
    let config = write_config(&world, &target);
    let acknowledged = Arc::new(AtomicU64::new(0));
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..KILLS {
        let (mut child, address) = start(&config);
        let known = acknowledged.clone();
        let agent = world.agent(&address, 1, 1).await.unwrap();
        let held = agent.held.held.0;
        assert!(held >= known.load(Ordering::SeqCst), "round {round}: {held} held, {known:?} acknowledged");
        let Agent { mut sender, mut receipts, .. } = agent;
        let listening = tokio::spawn(async move {
            while let Ok(held) = receipts.next().await {
                known.store(held.held.0, Ordering::SeqCst);
            }
        });
        let pushing = tokio::spawn(async move {
            for next in held + 1.. {
                let size = size(next);
                let pieces = [content(1, next, size)];
                if sender.deliver(block::Epoch(next), block::ByteCount(size as u64), pieces).await.is_err() {
                    return;
                }
            }
        });
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        tokio::time::sleep(Duration::from_millis(20 + random % 250)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        pushing.await.unwrap();
        listening.await.unwrap();
    }
    let (mut child, address) = start(&config);
    let mut agent = world.agent(&address, 1, 1).await.unwrap();
    let last = agent.held.held.0;
    assert!(last >= acknowledged.load(Ordering::SeqCst) && last > 0);
    agent.wait_applied(last).await;
    target.assert_got(1, &(1..=last).map(|epoch| (1, epoch, size(epoch))).collect::<Vec<_>>());
    drop(agent);
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success(), "it stops in good order");
    let verified = Command::new(program()).args(["verify", "--config"]).arg(&config).output().unwrap();
    let text = String::from_utf8(verified.stdout).unwrap();
    assert!(verified.status.success() && !text.contains("PROBLEM"), "{text}");
}

fn size(epoch: u64) -> usize {
    [100, 70_000, 3_000_000, 1][epoch as usize % 4]
}

#[test]
fn wrong_configurations_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.toml");
    std::fs::write(&path, "[process_server]\nlisten = \"a:1\"\ncolour = 1\n").unwrap();
    let output = Command::new(program()).args(["check-config", "--config"]).arg(&path).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("colour") && text.contains("p.toml"), "{text}");
    let help = Command::new(program()).arg("--help").output().unwrap();
    assert!(String::from_utf8(help.stdout).unwrap().contains("Examples:"));
}
