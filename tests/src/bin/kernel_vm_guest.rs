//! The guest's part of `cargo xtask kernel-test`: the first and only program of a small Debian machine. It does what the
//! host asks through one TCP connection. When it ends, the machine does.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use scratch::lanes::Writers;
use scratch::run;
use seawall_tests::guest::{
    Answer, CONTROL_PARAMETER, DATA_DISK, DATA_MOUNT, NULL_DISK, NULL_DISK_MIB, Order, ROOT_DISK,
    SPARE_DISKS, TOOLS_MOUNT, lanes,
};
use serde_json::{Value, json};

/// Where the agent's directory is copied to: the disk it comes on is read-only.
const AGENT_DIR: &str = "/run/seawall-test/agent";
const AGENT_CONFIG: &str = "/run/seawall-test/agent/agent.toml";
const AGENT: &str = "/tools/seawall-agent";
/// What is copied and removed again and again.
const CHURN_FROM: &str = "/usr/share/zoneinfo";
/// Between two records of a lane, and between two copies: under emulation, on a slow machine, the agent takes about 2 MB/s with ease, and
/// a point is wanted every few seconds. How it does under more is tried on the host's kernel.
const WRITER_PAUSE_US: u64 = 100_000;
const CHURN_PAUSE: Duration = Duration::from_secs(5);
/// For each disk.
const HAMMER_THREADS: usize = 3;
/// How much of each disk is read: all of them are larger.
const HAMMER_BLOCKS: u64 = 4096;
/// For direct reads of every disk.
const ALIGNMENT: usize = 4096;
/// How long the kernel may take to find a disk.
const SCAN_LIMIT: Duration = Duration::from_secs(30);
/// How long the agent may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(60);

fn main() {
    if let Err(error) = serve() {
        println!("guest: {error:#}");
    }
    // Returning would be the end of the first process: a kernel panic, which ends the machine.
    std::thread::sleep(Duration::from_millis(500));
}

fn serve() -> anyhow::Result<()> {
    let host = prepare()?;
    let stream = TcpStream::connect(&host).with_context(|| format!("reach the host at {host}"))?;
    let mut guest = Guest::default();
    let mut answers = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let order: Order = serde_json::from_str(&line?)?;
        if order != Order::Written {
            println!("guest: {order:?}");
        }
        let answer = match guest.carry_out(&order) {
            Ok(value) => Answer::Done(value),
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        answers.write_all(format!("{}\n", serde_json::to_string(&answer)?).as_bytes())?;
    }
    Ok(())
}

/// Network, mounts and the disk in memory; gives the address where the host waits.
fn prepare() -> anyhow::Result<String> {
    let parameters = fs::read_to_string("/proc/cmdline")?;
    let host = parameters.split_whitespace().find_map(|word| word.strip_prefix(CONTROL_PARAMETER));
    let host = host.context("find the host's address in the kernel's parameters")?.to_owned();
    run("modprobe", &["virtio_net"])?;
    let mut cards = fs::read_dir("/sys/class/net")?.flatten().map(|entry| entry.file_name());
    let card = cards.find(|name| name != "lo").context("find a network card")?;
    let card = card.to_string_lossy();
    run("ip", &["address", "add", "10.0.2.15/24", "dev", &card])?;
    run("ip", &["link", "set", &card, "up"])?;
    run("ip", &["link", "set", "lo", "up"])?;
    run("mount", &["-t", "bpf", "bpf", "/sys/fs/bpf"])?;
    run("mount", &["-t", "securityfs", "securityfs", "/sys/kernel/security"])?;
    run("modprobe", &["configfs"])?;
    run("mount", &["-t", "configfs", "configfs", "/sys/kernel/config"])?;
    fs::create_dir_all(DATA_MOUNT)?;
    run("mount", &["-t", "ext4", "-o", "discard", DATA_DISK, DATA_MOUNT])?;
    for lane in lanes().iter().filter(|lane| !lane.direct) {
        fs::create_dir_all(lane.path.parent().context("a lane's directory")?)?;
    }
    null_disk()?;
    // Counts how often each program runs.
    fs::write("/proc/sys/kernel/bpf_stats_enabled", "1")?;
    fs::create_dir_all(Path::new(AGENT_DIR).parent().context("the agent's directory")?)?;
    run("cp", &["-a", &format!("{TOOLS_MOUNT}/agent"), AGENT_DIR])?;
    Ok(host)
}

/// A disk in memory. Its requests end in a timer's hard interrupt, on top of whatever runs there.
fn null_disk() -> anyhow::Result<()> {
    run("modprobe", &["null_blk", "nr_devices=0"])?;
    let dir = Path::new("/sys/kernel/config/nullb/nullb0");
    fs::create_dir_all(dir).context("make a null_blk disk")?;
    let size = NULL_DISK_MIB.to_string();
    let attributes = [
        ("size", size.as_str()),
        ("memory_backed", "1"),
        ("irqmode", "2"),
        ("completion_nsec", "20000"),
        ("power", "1"),
    ];
    for (name, value) in attributes {
        fs::write(dir.join(name), value).with_context(|| format!("set null_blk's {name} to {value}"))?;
    }
    Ok(())
}

#[derive(Default)]
struct Guest {
    agent: Option<Child>,
    writers: Option<Writers>,
    churn: Vec<JoinHandle<anyhow::Result<()>>>,
    stop_churn: Arc<AtomicBool>,
}

impl Guest {
    fn carry_out(&mut self, order: &Order) -> anyhow::Result<Value> {
        match order {
            Order::Kernel => {
                let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
                let processor = fs::read_to_string("/proc/cpuinfo")?;
                let wide = processor.split_whitespace().any(|flag| flag == "la57");
                Ok(json!({ "release": release, "page_table_levels": if wide { 5 } else { 4 } }))
            }
            Order::Check => {
                Ok(serde_json::from_str(&run(AGENT, &["check", "--json", "--config", AGENT_CONFIG])?)?)
            }
            Order::Stack => stack(),
            Order::RemoveDataDisk => {
                fs::write("/sys/block/sda/device/delete", "1")?;
                Ok(Value::Null)
            }
            Order::ReturnDataDisk => return_data_disk(),
            Order::StartAgent => {
                let agent = Command::new(AGENT).args(["run", "--config", AGENT_CONFIG]).spawn();
                self.agent = Some(agent.context("start the agent")?);
                Ok(Value::Null)
            }
            Order::StartWriters => self.start_writers(),
            Order::Written => {
                let agent = self.agent.as_mut().context("no agent")?;
                if let Some(status) = agent.try_wait()? {
                    bail!("the agent has ended: {status}");
                }
                Ok(json!(self.writers.as_ref().context("no writers")?.written()))
            }
            Order::Quiesce => self.quiesce(),
            Order::Hammer { seconds } => hammer(Duration::from_secs(*seconds)),
            Order::SkippedRuns => skipped_runs(),
            Order::Hash { device } => hash(device),
            Order::StopAgent => self.stop_agent(),
        }
    }

    fn start_writers(&mut self) -> anyhow::Result<Value> {
        self.writers = Some(Writers::start(&lanes(), WRITER_PAUSE_US)?);
        for dir in ["/var/churn", "/data/churn"] {
            let stop = self.stop_churn.clone();
            self.churn.push(std::thread::spawn(move || churn(Path::new(dir), &stop)));
        }
        Ok(Value::Null)
    }

    fn quiesce(&mut self) -> anyhow::Result<Value> {
        self.stop_churn.store(true, Ordering::SeqCst);
        for thread in self.churn.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        let counts = self.writers.take().context("no writers")?.stop()?;
        run("sync", &[])?;
        for mount in [DATA_MOUNT, "/"] {
            run("fsfreeze", &["--freeze", mount])?;
        }
        Ok(json!({ "counts": counts, "time": block::UnixNanos::now().0 }))
    }

    fn stop_agent(&mut self) -> anyhow::Result<Value> {
        let mut agent = self.agent.take().context("no agent")?;
        let process = rustix::process::Pid::from_child(&agent);
        rustix::process::kill_process(process, rustix::process::Signal::TERM)?;
        let limit = Instant::now() + STOP_LIMIT;
        loop {
            if let Some(status) = agent.try_wait()? {
                ensure!(status.success(), "the agent ended with {status}");
                return Ok(Value::Null);
            }
            ensure!(Instant::now() < limit, "the agent did not stop within {STOP_LIMIT:?} of SIGTERM");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Files made and removed, with a trim now and then.
fn churn(dir: &Path, stop: &AtomicBool) -> anyhow::Result<()> {
    fs::create_dir_all(dir)?;
    let text = dir.to_str().context("a path of ours is UTF-8")?;
    for round in 0_u64.. {
        if stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        let copy = format!("{text}/{round}");
        run("cp", &["-r", CHURN_FROM, &copy])?;
        run("sync", &["-f", &copy])?;
        if round > 0 {
            fs::remove_dir_all(dir.join((round - 1).to_string()))?;
        }
        if round % 3 == 2 {
            run("fstrim", &[text])?;
        }
        std::thread::sleep(CHURN_PAUSE);
    }
    Ok(())
}

/// There is no udev here, so LVM makes its names itself.
const LVM_CONFIG: &str = "activation { udev_sync=0 udev_rules=0 } \
    devices { obtain_device_list_from_udev=0 external_device_info_source=\"none\" }";

fn stack() -> anyhow::Result<Value> {
    let [one, two] = SPARE_DISKS;
    run("modprobe", &["raid1"])?;
    let options = ["--create", "/dev/md0", "--run", "--level=1", "--raid-devices=2", "--metadata=1.2"];
    run("mdadm", &[&options[..], &[one, two]].concat())?;
    run("modprobe", &["dm-mod"])?;
    let lvm = |arguments: &[&str]| {
        run("lvm", &[&arguments[..1], &["--config", LVM_CONFIG], &arguments[1..]].concat())
    };
    lvm(&["pvcreate", "/dev/md0"])?;
    lvm(&["vgcreate", "group", "/dev/md0"])?;
    lvm(&["lvcreate", "--wipesignatures", "n", "--extents", "100%FREE", "--name", "volume", "group"])?;
    Ok(serde_json::from_str(&run(AGENT, &["check", "--json", "/dev/md0", "/dev/group/volume"])?)?)
}

fn return_data_disk() -> anyhow::Result<Value> {
    let names = || -> anyhow::Result<Vec<String>> {
        let entries = fs::read_dir("/sys/block")?.flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|name| name.starts_with("sd")).collect())
    };
    fs::write("/sys/class/scsi_host/host0/scan", "- - -")?;
    let limit = Instant::now() + SCAN_LIMIT;
    loop {
        // Its file system is still mounted, so it cannot have its old name.
        if let Some(name) = names()?.iter().find(|name| *name != "sda") {
            return Ok(json!({ "device": format!("/dev/{name}"), "time": block::UnixNanos::now().0 }));
        }
        ensure!(Instant::now() < limit, "the disk did not come back within {SCAN_LIMIT:?}: {:?}", names()?);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Reads all disks at once, as fast as they go, so that requests end on top of each other. Gives the number of reads.
fn hammer(time: Duration) -> anyhow::Result<Value> {
    let end = Instant::now() + time;
    let readers = [ROOT_DISK, DATA_DISK, NULL_DISK].repeat(HAMMER_THREADS);
    let threads: Vec<_> = readers
        .into_iter()
        .map(|device| {
            std::thread::spawn(move || -> anyhow::Result<u64> {
                let disk = OpenOptions::new().read(true).custom_flags(direct()).open(device)?;
                let mut memory = vec![0; 2 * ALIGNMENT];
                let aligned = memory.as_ptr().align_offset(ALIGNMENT);
                let mut count = 0;
                while Instant::now() < end {
                    let at = count % HAMMER_BLOCKS * ALIGNMENT as u64;
                    disk.read_exact_at(&mut memory[aligned..aligned + ALIGNMENT], at)?;
                    count += 1;
                }
                Ok(count)
            })
        })
        .collect();
    let mut reads = 0;
    for thread in threads {
        reads += thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(json!(reads))
}

fn direct() -> i32 {
    rustix::fs::OFlags::DIRECT.bits().cast_signed()
}

fn skipped_runs() -> anyhow::Result<Value> {
    let shown: Value = serde_json::from_str(&run("bpftool", &["--json", "prog", "show"])?)?;
    let ours = shown
        .as_array()
        .context("a list of programs")?
        .iter()
        .filter(|program| program["name"].as_str().is_some_and(|name| name.starts_with("on_")));
    Ok(ours
        .map(|program| {
            let (name, skipped) = (&program["name"], program["recursion_misses"].as_u64().unwrap_or(0));
            json!({ "name": name, "skipped": skipped, "runs": program["run_cnt"] })
        })
        .collect())
}

/// Read with O_DIRECT, as it is written: the page cache knows nothing of it.
fn hash(device: &Path) -> anyhow::Result<Value> {
    const STEP: usize = 1 << 20;
    let mut disk = OpenOptions::new().read(true).custom_flags(direct()).open(device)?;
    let mut memory = vec![0; STEP + ALIGNMENT];
    let aligned = memory.as_ptr().align_offset(ALIGNMENT);
    let mut hasher = blake3::Hasher::new();
    loop {
        let buffer = &mut memory[aligned..aligned + STEP];
        match disk.read(buffer)? {
            0 => return Ok(json!(hasher.finalize().to_hex().to_string())),
            count => hasher.update(&buffer[..count]),
        };
    }
}
