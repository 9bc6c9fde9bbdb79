//! What the application keeps when the way is starved: the mean latency of 4 KiB random direct writes at a steady rate, native and while the
//! agent, with little memory and a small ring, cannot reach its process server, in turn. The ratio is native to starved.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use scratch::LoopDisk;
use seawall_agent::{Agent, AgentConfig};
use seawall_benches::{quick, result};

const DISK_BYTES: u64 = 512 << 20;

fn main() -> anyhow::Result<()> {
    if !scratch::is_root() {
        println!("back_pressure: NOT RUN: it needs root, for loop devices and eBPF");
        return Ok(());
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let disk = LoopDisk::create(&dir.path().join("disk.img"), DISK_BYTES)?;
    scratch::run("losetup", &["--direct-io=on", disk.device().to_str().context("path")?])?;
    // Allocated, so that no round pays for that.
    scratch::run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", disk.device().display()),
            "bs=1M",
            "count=512",
            "oflag=direct",
        ],
    )?;
    let config = config(dir.path(), disk.device())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (rounds, seconds) = if quick() { (2, 3) } else { (7, 6) };
    let (mut native, mut starved, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let alone = latency_us(disk.device(), seconds)?;
        let agent = {
            let _runtime = runtime.enter();
            Agent::start(config.clone())?
        };
        // Fills ring and memory, so that what follows is missed and noted.
        latency_us(disk.device(), 1)?;
        let with = latency_us(disk.device(), seconds)?;
        let report = agent.report();
        ensure!(report.missed_writes_total > 0, "nothing was starved: {report:?}");
        agent.shutdown();
        native.push(alone);
        starved.push(with);
        ratios.push(with / alone);
    }
    ratios.sort_by(f64::total_cmp);
    let ratio = ratios[ratios.len() / 2];
    println!(
        "back_pressure: latency {ratio:.3} times native (rounds {:.2} to {:.2})",
        ratios[0],
        ratios[ratios.len() - 1]
    );
    native.sort_by(f64::total_cmp);
    let native = native[native.len() / 2];
    // Less is better, so that the ratio is native to starved.
    result("back_pressure", native, "us native", native * ratio)
}

/// An agent whose process server is not there, with as little memory as goes.
fn config(dir: &Path, device: &Path) -> anyhow::Result<AgentConfig> {
    let authority = wire::Authority::create(&dir.join("authority"))?;
    let group = block::GroupId([7; 16]);
    authority.issue(&wire::Identity::new(wire::Role::Agent, "bench", Some(group))?, &dir.join("agent"))?;
    let key = dir.join("agent/group.key");
    std::fs::write(&key, changeset::GroupKey::generate()?.to_hex().as_bytes())?;
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    // Nobody listens at a port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let path = dir.join("agent/agent.toml");
    std::fs::write(
        &path,
        format!(
            "[agent]\ngroup = \"{group}\"\ngroup_key = \"group.key\"\ncredentials = \".\"\n\
             process_server = \"127.0.0.1:{port}\"\nepoch_interval_ms = 500\nring_bytes = \"1MiB\"\n\
             epoch_memory_bytes = \"24MiB\"\nsource = \"ebpf\"\nkeep_tracking = false\n\
             control_socket = {:?}\n[[volume]]\nname = \"data\"\ndevice = {device:?}\n",
            dir.join("agent.sock")
        ),
    )?;
    Ok(AgentConfig::load(&path)?)
}

/// The mean latency of writes at a rate that the disk takes easily.
fn latency_us(device: &Path, seconds: u64) -> anyhow::Result<f64> {
    let output = Command::new("fio")
        .args(["--name=w", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=4"])
        .args(["--rate_iops=4000", "--time_based", "--output-format=json", "--norandommap"])
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--filename={}", device.display()))
        .output()
        .context("run fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    said["jobs"][0]["write"]["clat_ns"]["mean"].as_f64().map(|ns| ns / 1000.0).context("latency")
}
