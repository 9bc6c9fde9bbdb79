//! The command itself: what it prints, how it exits, how it stops.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::support::{GENERATION, GROUP, Site, deliver, epochal, until_applied};
use rustix::process::{Pid, Signal, kill_process};
use wire::{Role, Sender, connect};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seawall-target-server"));
    command.args(arguments);
    command
}

fn output(arguments: &[&str]) -> (Output, String, String) {
    let output = command(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    (output, stdout, stderr)
}

/// A configuration file for the site's credentials and data.
fn write_config(site: &Site) -> PathBuf {
    let path = site.dir.path().join("target-server.toml");
    let text = format!(
        "listen = \"127.0.0.1:0\"\ncredentials = \"target\"\ndata = \"data\"\n\n[[group]]\nid = \"{GROUP}\"\n\
         key = \"{GROUP}.key\"\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn arguments<'a>(command: &'a str, config: &'a Path) -> [&'a str; 3] {
    [command, "--config", config.to_str().unwrap()]
}

/// Starts the server and gives it with its address, from its log.
fn run(config: &Path) -> (Child, String) {
    let mut run = command(&arguments("run", config));
    let mut child = run.args(["--log-format", "json"]).stderr(Stdio::piped()).spawn().unwrap();
    let log = child.stderr.take().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if let Some(local) = line["local"].as_str() {
                let _ = tell.send(local.to_owned());
            }
        }
    });
    let address = told.recv().unwrap();
    (child, address)
}

#[test]
fn help_has_examples() {
    let (output, stdout, _) = output(&["--help"]);
    assert!(output.status.success());
    for expected in ["run", "check-config", "verify", "Examples:", "--log-format"] {
        assert!(stdout.contains(expected), "{expected}");
    }
}

#[tokio::test]
async fn a_configuration_is_checked_with_all_it_names() {
    let mut site = Site::new().await;
    site.server.take().unwrap().shutdown().await;
    let config = write_config(&site);
    let (good, stdout, _) = output(&arguments("check-config", &config));
    assert!(good.status.success() && stdout.ends_with(": good\n"), "{stdout}");
    std::fs::remove_file(site.dir.path().join(format!("{GROUP}.key"))).unwrap();
    let (bad, _, stderr) = output(&arguments("check-config", &config));
    assert!(!bad.status.success());
    assert!(stderr.contains("load the key of group") && stderr.contains(".key"), "{stderr}");
    std::fs::write(&config, "lisen = 1").unwrap();
    let (bad, _, stderr) = output(&arguments("run", &config));
    assert!(!bad.status.success() && stderr.contains("lisen"), "{stderr}");
}

/// SIGTERM ends it in good order; SIGKILL at any moment loses nothing that was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_stops_when_told_and_survives_being_killed() {
    let mut site = Site::new().await;
    site.server.take().unwrap().shutdown().await;
    let config = write_config(&site);
    let mut acknowledged = 0;
    for round in 0..8_u64 {
        let (mut child, address) = run(&config);
        let connection = connect(&address, Role::TargetServer, &site.credentials("process")).await.unwrap();
        let (mut sender, mut receipts) = Sender::open(connection, GROUP, GENERATION).await.unwrap();
        let held = sender.held();
        assert!(
            held.applied.0 >= acknowledged,
            "epoch {acknowledged} was acknowledged, {} is held",
            held.applied
        );
        let until = held.applied.0 + 1 + round % 3;
        for epoch in held.applied.0 + 1..=until {
            deliver(&mut sender, &epochal(epoch)).await.unwrap();
        }
        until_applied(&mut receipts, block::Epoch(until), held).await;
        acknowledged = until;
        // These may or may not be applied.
        for epoch in until + 1..until + 5 {
            deliver(&mut sender, &epochal(epoch)).await.unwrap();
        }
        let pid = Pid::from_raw(child.id() as i32).unwrap();
        let gentle = round % 4 == 3;
        kill_process(pid, if gentle { Signal::TERM } else { Signal::KILL }).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.success(), gentle, "{status}");
        let (verified, stdout, stderr) = output(&arguments("verify", &config));
        assert!(verified.status.success(), "{stdout}{stderr}");
        assert!(stdout.contains("recovery points"), "{stdout}");
    }
    site.config.groups.truncate(1);
    site.start().await;
    let points = site.points().await;
    assert!(*points.last().unwrap() >= acknowledged);
    for epoch in points {
        let view = site.view(control::PointSelector::Epoch(block::Epoch(epoch))).await.unwrap();
        assert!(view == super::support::content(epoch), "epoch {epoch}");
    }
    // The server has the replica open.
    let (busy, _, stderr) = output(&arguments("verify", &config));
    assert!(!busy.status.success() && stderr.contains("another process has it open"), "{stderr}");
}
