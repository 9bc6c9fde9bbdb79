//! The host's part of `cargo xtask kernel-test`: starts a small Debian machine under software emulation, in which an agent
//! protects the machine's own disks, with the servers out here; then proves that what arrived is what the disks hold.
//!
//! The disks are files of ours, so both sides can be compared: the guest's writers stop, its file systems are frozen, the
//! point after that is awaited, and the machine is ended without thawing. What its disks hold then is that point.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use scratch::lanes::{Lane, check};
use scratch::{FileSystem, Mount, run};
use seawall_tests::guest::{
    Answer, CONTROL_PARAMETER, DATA_DISK, DATA_MOUNT, NULL_DISK, Order, ROOT_DISK, ROOT_LANES, SPARE_DISKS,
    TOOLS_LABEL, lanes,
};
use seawall_tests::system::{Part, System, program};
use serde_json::Value;

/// Where the root disk's only partition begins.
const ROOT_PARTITION_BYTES: u64 = 1 << 20;
const DATA_DISK_BYTES: u64 = 192 << 20;
const SPARE_DISK_BYTES: u64 = 48 << 20;
const TOOLS_SLACK_BYTES: u64 = 16 << 20;
const GUEST_MEMORY: &str = "1536M";
const GUEST_CPUS: &str = "2";
/// How the guest reaches this machine through QEMU's user network.
const HOST_SEEN_BY_GUEST: &str = "10.0.2.2";
const EPOCH_MS: u64 = 500;
/// Points that must be offered while everything writes.
const POINTS_UNDER_LOAD: usize = 6;
/// Points that are restored and checked, the newest among them.
const POINTS_CHECKED: usize = 4;
/// How long the disks are read as fast as they go.
const HAMMER_S: u64 = 5;
/// From starting the machine until the guest's program answers.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// For anything that is asked of the guest.
const ORDER_LIMIT: Duration = Duration::from_secs(300);
/// For the first copy, and for the points under load: emulation on a loaded machine takes four times as long as on a free one.
const POINTS_LIMIT: Duration = Duration::from_secs(600);
/// Lines of the console that are shown when something failed.
const CONSOLE_LINES: usize = 40;

/// Runs the agent on its own root disk in a virtual machine.
#[derive(Parser)]
struct Options {
    /// Image of a root disk that `cargo xtask kernel-test` made; it is copied.
    #[arg(long)]
    root: PathBuf,
    /// The kernel to start.
    #[arg(long)]
    kernel: PathBuf,
    /// Its initial file system.
    #[arg(long)]
    initrd: PathBuf,
    /// Directory for this run's files; it is emptied. What is left after a failure is named.
    #[arg(long)]
    work: PathBuf,
    /// QEMU's processor model.
    #[arg(long, default_value = "max,la57=off")]
    cpu: String,
    /// Leave the root disk alone: its first copy is most of a whole run's time, and is the same with every kernel.
    #[arg(long)]
    without_root: bool,
    /// Only look whether the kernel takes the programs and sees writes of every disk.
    #[arg(long)]
    check_only: bool,
}

impl Options {
    /// The disks that are protected.
    fn volumes(&self) -> &'static [&'static str] {
        const ALL: [&str; 3] = [ROOT_DISK, DATA_DISK, NULL_DISK];
        if self.without_root { &ALL[1..] } else { &ALL }
    }

    /// The lanes that are on protected disks.
    fn lanes(&self) -> Vec<Lane> {
        lanes().into_iter().filter(|lane| !self.without_root || !lane.path.starts_with(ROOT_LANES)).collect()
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let progress = Progress { since: Instant::now() };
    if options.work.exists() {
        fs::remove_dir_all(&options.work).context("remove what an earlier run left")?;
    }
    fs::create_dir_all(&options.work)?;
    let result = test(&options, &progress);
    let console = options.work.join("console.log");
    match &result {
        Ok(()) => fs::remove_dir_all(&options.work).context("clean up")?,
        Err(_) => {
            let text = fs::read(&console).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- the last lines of {}", console.display());
            lines[lines.len().saturating_sub(CONSOLE_LINES)..].iter().for_each(|line| eprintln!("{line}"));
            eprintln!("---");
        }
    }
    result
}

struct Progress {
    since: Instant,
}

impl Progress {
    fn say(&self, what: &str) {
        eprintln!("[{:5.1} s] {what}", self.since.elapsed().as_secs_f64());
    }
}

fn test(options: &Options, progress: &Progress) -> anyhow::Result<()> {
    let disks = Disks::make(options)?;
    let volumes: Vec<&Path> = options.volumes().iter().map(Path::new).collect();
    let mut system = System::init(&volumes, EPOCH_MS)?;
    // An error instead of a lower mode.
    system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
    system.edit(Part::Agent, |text| text.replace("127.0.0.1", HOST_SEEN_BY_GUEST))?;
    // The guest's root is frozen when the agent stops there; what the agent removes then must lie elsewhere.
    let (socket, tracking) = (system.socket(), system.tracking());
    system.edit(Part::Agent, |text| {
        text.replace(&socket.display().to_string(), "/dev/shm/agent.sock")
            .replace(&tracking.display().to_string(), "/sys/fs/bpf/seawall")
    })?;
    disks.make_tools(&system)?;
    system.start(Part::TargetServer)?;
    system.start(Part::ProcessServer)?;
    progress.say("starting the machine");
    let mut machine = Machine::start(options, &disks)?;
    let mut guest = machine.connect()?;
    let kernel = guest.ask(&Order::Kernel)?;
    progress.say(&format!(
        "started: Linux {}, {}-level page tables",
        kernel["release"], kernel["page_table_levels"]
    ));

    let checked = guest.ask(&Order::Check)?;
    let devices = checked["devices"].as_array().context("the disks")?;
    for device in devices {
        progress.say(&format!("check: {} in mode {}: {}", device["device"], device["mode"], device["why"]));
    }
    ensure!(
        devices.len() == options.volumes().len() && devices.iter().all(|device| device["mode"] == "data"),
        "not every disk can be captured with its data: {checked}"
    );
    check_stack(&guest.ask(&Order::Stack)?, progress)?;
    if options.check_only {
        return Ok(());
    }
    guest.ask(&Order::StartAgent)?;
    guest.ask(&Order::StartWriters)?;
    progress.say("the agent and the writers run");
    let captured = under_load(options, &mut guest, &system, progress)?;
    progress.say(&format!("{POINTS_UNDER_LOAD} points under load; {captured}"));

    let quiet = guest.ask(&Order::Quiesce)?;
    let time = quiet["time"].as_u64().context("the time of the freeze")?;
    let counts: Vec<u64> = serde_json::from_value(quiet["counts"].clone()).context("the records written")?;
    let newest = newest_after(&system, time)?;
    progress.say(&format!("frozen, with {} records; point {newest} is of that", counts.iter().sum::<u64>()));
    let null_hash = guest.ask(&Order::Hash { device: NULL_DISK.into() })?;
    let reads = guest.ask(&Order::Hammer { seconds: HAMMER_S })?;
    progress.say(&format!("{reads} reads of all disks at once in {HAMMER_S} s"));
    for program in guest.ask(&Order::SkippedRuns)?.as_array().context("the programs")? {
        progress.say(&format!(
            "program {}: the kernel ran it {} times and skipped it {} times",
            program["name"], program["runs"], program["skipped"]
        ));
    }
    let newest = disk_goes_and_returns(options, &mut guest, &system, progress)?;
    guest.ask(&Order::StopAgent)?;
    drop(guest);
    machine.end()?;
    progress.say("the machine is off");

    // Nobody writes any more, so points that came meanwhile are of the same state.
    let mut points = system.points();
    points.retain(|point| *point <= newest);
    ensure!(points.last() == Some(&newest), "point {newest} is not among {points:?}");
    compare(options, &system, newest, &disks, null_hash.as_str().context("the hash of the disk in memory")?)?;
    progress.say("the newest point is what the disks hold, byte for byte");
    check_points(options, &system, &points, &counts, progress)
}

/// A logical volume on an array means the disks below both.
fn check_stack(check: &Value, progress: &Progress) -> anyhow::Result<()> {
    let devices = check["devices"].as_array().context("the disks")?;
    let found: Vec<&str> = devices.iter().filter_map(|device| device["device"].as_str()).collect();
    let expected = SPARE_DISKS.repeat(2);
    ensure!(found == expected, "an array and a logical volume of {SPARE_DISKS:?} became {found:?}: {check}");
    for (device, what) in devices.iter().step_by(2).zip(["an array (md)", "a logical volume"]) {
        let note = device["note"].as_str().unwrap_or_default();
        ensure!(note.contains(what), "{what} is not in {note:?}");
        progress.say(note);
    }
    Ok(())
}

/// How long a disk is away: some epochs.
const DISK_AWAY: Duration = Duration::from_secs(3);

/// The data disk is taken away: that is said, the others are followed on, and nothing is offered as a point. It comes back
/// under another name: the agent knows it, and goes on by itself.
fn disk_goes_and_returns(
    options: &Options,
    guest: &mut Guest,
    system: &System,
    progress: &Progress,
) -> anyhow::Result<u64> {
    guest.ask(&Order::RemoveDataDisk)?;
    let group = status_when(system, "the loss is said", |group| mode_of(group, DATA_DISK) == "lost")?;
    let agent = &group["stages"][0];
    ensure!(agent["state"] == "source-failed", "{group}");
    let mut others = options.volumes().iter().filter(|device| **device != DATA_DISK);
    ensure!(others.all(|device| mode_of(&group, device) == "data"), "{group}");
    let before = system.points();
    progress.say(&format!("data disk removed: {}", agent["last_error"]));
    std::thread::sleep(DISK_AWAY);
    ensure!(system.points() == before, "a point was offered while a disk was away");
    let back = guest.ask(&Order::ReturnDataDisk)?;
    let (device, time) = (&back["device"], back["time"].as_u64().context("a time")?);
    let newest = newest_after(system, time)?;
    let status = system.operator("status", &[])?;
    let volume = volume_of(&status["groups"][0], DATA_DISK);
    ensure!(volume["device"] == *device && volume["mode"] == "data", "{status}");
    progress.say(&format!("it is back as {device}; point {newest} has it"));
    Ok(newest)
}

/// The volume that was protected as this device.
fn volume_of<'a>(group: &'a Value, device: &str) -> &'a Value {
    let volumes = group["volumes"].as_array().map(Vec::as_slice).unwrap_or_default();
    volumes.iter().find(|volume| volume["name"] == name(device)).unwrap_or(&Value::Null)
}

/// That volume's mode.
fn mode_of<'a>(group: &'a Value, device: &str) -> &'a str {
    volume_of(group, device)["mode"].as_str().unwrap_or("none")
}

fn status_when(system: &System, what: &str, holds: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    let limit = Instant::now() + ORDER_LIMIT;
    loop {
        let status = system.operator("status", &[])?;
        let group = &status["groups"][0];
        if holds(group) {
            return Ok(group.clone());
        }
        ensure!(Instant::now() < limit, "{what}: not within {ORDER_LIMIT:?}; status {status}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Waits for points while everything writes. Each volume must be followed with its data.
fn under_load(
    options: &Options,
    guest: &mut Guest,
    system: &System,
    progress: &Progress,
) -> anyhow::Result<String> {
    let count = options.volumes().len();
    let limit = Instant::now() + POINTS_LIMIT;
    let mut said = 0;
    loop {
        let written = guest.ask(&Order::Written)?.as_u64().context("a count")?;
        let points = system.points();
        let status = system.operator("status", &[])?;
        let group = &status["groups"][0];
        if points.len() > said {
            said = points.len();
            let missed = &group["capture"]["missed_writes_total"];
            let trouble = &group["stages"][0]["last_error"];
            progress.say(&format!(
                "{said} points, {written} records, {missed} writes missed so far; agent's last error: {trouble}"
            ));
        }
        let volumes = group["volumes"].as_array().cloned().unwrap_or_default();
        if points.len() >= POINTS_UNDER_LOAD && written >= 1000 && volumes.len() == count {
            ensure!(volumes.iter().all(|volume| volume["mode"] == "data"), "not in data mode: {volumes:?}");
            let captured = group["capture"]["written_bytes_total"].as_u64().unwrap_or_default();
            return Ok(format!("all {count} volumes in data mode, {} MiB captured", captured >> 20));
        }
        ensure!(Instant::now() < limit, "{} points after {POINTS_LIMIT:?}; status {status}", points.len());
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// The newest point, when its cut was taken after `time` of the guest's clock.
fn newest_after(system: &System, time: u64) -> anyhow::Result<u64> {
    let limit = Instant::now() + POINTS_LIMIT;
    loop {
        let reply = system.operator("points", &[])?;
        let newest = reply["groups"][0]["points"].as_array().and_then(|points| points.last().cloned());
        if let Some(newest) = newest.filter(|point| point["cut_time"].as_u64() > Some(time)) {
            return newest["epoch"].as_u64().context("a point has an epoch");
        }
        ensure!(Instant::now() < limit, "no point of the frozen disks within {POINTS_LIMIT:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn name(device: &str) -> &str {
    device.rsplit('/').next().unwrap_or(device)
}

fn compare(
    options: &Options,
    system: &System,
    point: u64,
    disks: &Disks,
    null_hash: &str,
) -> anyhow::Result<()> {
    let restored = system.dir().join("newest.img");
    let files = [(ROOT_DISK, &disks.root), (DATA_DISK, &disks.data)];
    for (device, image) in files.into_iter().filter(|(device, _)| options.volumes().contains(device)) {
        system.restore(name(device), point, &restored)?;
        run("cmp", &[text(image)?, text(&restored)?])
            .with_context(|| format!("the newest point against {device}"))?;
    }
    system.restore(name(NULL_DISK), point, &restored)?;
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut File::open(&restored)?, &mut hasher)?;
    let found = hasher.finalize().to_hex();
    ensure!(
        found.as_str() == null_hash,
        "the newest point of {NULL_DISK} hashes to {found}, the disk to {null_hash}"
    );
    fs::remove_file(&restored)?;
    Ok(())
}

/// Some points, oldest first: journal replayed, records before the oracle, file systems before their checker.
fn check_points(
    options: &Options,
    system: &System,
    points: &[u64],
    counts: &[u64],
    progress: &Progress,
) -> anyhow::Result<()> {
    let step = points.len().div_ceil(POINTS_CHECKED).max(1);
    let mut some: Vec<u64> = points.iter().rev().step_by(step).copied().collect();
    some.reverse();
    let mut last = Vec::new();
    for point in some {
        last = check_point(options, system, point).with_context(|| format!("point {point} of {points:?}"))?;
        progress.say(&format!(
            "point {point}: {} records, none without those before it; fsck clean",
            last.iter().sum::<u64>()
        ));
    }
    ensure!(
        options.lanes().iter().all(|lane| last[lane.index] == counts[lane.index]),
        "the newest point has {last:?}, written were {counts:?}"
    );
    Ok(())
}

fn check_point(options: &Options, system: &System, point: u64) -> anyhow::Result<Vec<u64>> {
    let dir = system.dir();
    let image = |device: &str| dir.join(format!("{}.img", name(device)));
    for device in options.volumes() {
        system.restore(name(device), point, &image(device))?;
    }
    // Mounting replays the journal.
    let mount = |device: &str, options: &str| Mount::new(&image(device), &dir.join(name(device)), options);
    let root = (!options.without_root)
        .then(|| mount(ROOT_DISK, &format!("loop,offset={ROOT_PARTITION_BYTES}")))
        .transpose()?;
    let data = mount(DATA_DISK, "loop")?;
    let place = |lane: &Lane| match (lane.path.strip_prefix(DATA_MOUNT), &root) {
        (Ok(file), _) => data.point().join(file),
        (Err(_), Some(root)) if lane.path != Path::new(NULL_DISK) => {
            root.point().join(lane.path.strip_prefix("/").unwrap_or(&lane.path))
        }
        (Err(_), _) => image(NULL_DISK),
    };
    let last = check(&options.lanes(), place)?;
    data.unmount()?;
    if let Some(root) = root {
        root.unmount()?;
        // As e2fsck wants to be told where in a file a file system begins.
        let root = PathBuf::from(format!("{}?offset={ROOT_PARTITION_BYTES}", text(&image(ROOT_DISK))?));
        FileSystem::Ext4.check(&root).context("fsck of the root file system")?;
    }
    FileSystem::Ext4.check(&image(DATA_DISK)).context("fsck of the data disk")?;
    Ok(last)
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("use path {}: it is not UTF-8", path.display()))
}

/// The machine's disks, as files.
struct Disks {
    root: PathBuf,
    data: PathBuf,
    spare: [PathBuf; SPARE_DISKS.len()],
    tools: PathBuf,
    tools_dir: PathBuf,
}

impl Disks {
    fn make(options: &Options) -> anyhow::Result<Disks> {
        let at = |name: &str| options.work.join(name);
        let disks = Disks {
            root: at("root.img"),
            data: at("data.img"),
            spare: [at("spare0.img"), at("spare1.img")],
            tools: at("tools.img"),
            tools_dir: at("tools"),
        };
        run("cp", &["--sparse=always", text(&options.root)?, text(&disks.root)?])?;
        File::create(&disks.data)?.set_len(DATA_DISK_BYTES)?;
        for spare in &disks.spare {
            File::create(spare)?.set_len(SPARE_DISK_BYTES)?;
        }
        run("mkfs.ext4", &["-q", "-F", "-b", "4096", text(&disks.data)?])?;
        Ok(disks)
    }

    /// The disk with the programs and the agent's directory.
    fn make_tools(&self, system: &System) -> anyhow::Result<()> {
        fs::create_dir_all(&self.tools_dir)?;
        let mut bytes = TOOLS_SLACK_BYTES;
        for name in ["seawall-agent", "kernel-vm-guest"] {
            bytes += fs::copy(program(name)?, self.tools_dir.join(name))?;
        }
        run("cp", &["-a", text(&system.place(Part::Agent))?, text(&self.tools_dir.join("agent"))?])?;
        File::create(&self.tools)?.set_len(bytes.next_multiple_of(1 << 20))?;
        let (dir, image) = (text(&self.tools_dir)?, text(&self.tools)?);
        run("mkfs.ext4", &["-q", "-F", "-L", TOOLS_LABEL, "-d", dir, image])?;
        fs::remove_dir_all(&self.tools_dir).context("clean up")
    }
}

/// A running QEMU. Dropping it kills it.
struct Machine {
    qemu: Child,
    control: TcpListener,
    errors: PathBuf,
}

impl Machine {
    fn start(options: &Options, disks: &Disks) -> anyhow::Result<Machine> {
        let control = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("{HOST_SEEN_BY_GUEST}:{}", control.local_addr()?.port());
        let drive = |name: &str, file: &Path, more: &str| -> anyhow::Result<String> {
            Ok(format!("file={},format=raw,if=none,id={name},discard=unmap{more}", text(file)?))
        };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-machine", "pc", "-accel", "tcg,thread=multi", "-nodefaults", "-no-user-config"]);
        qemu.args(["-display", "none", "-no-reboot", "-cpu", &options.cpu]);
        qemu.args(["-smp", GUEST_CPUS, "-m", GUEST_MEMORY]).arg("-kernel").arg(&options.kernel);
        qemu.arg("-initrd").arg(&options.initrd).arg("-append").arg(format!(
            "root={ROOT_DISK}1 rw console=ttyS0 panic=-1 init=/usr/sbin/seawall-guest {CONTROL_PARAMETER}{address}"
        ));
        qemu.arg("-serial").arg(format!("file:{}", text(&options.work.join("console.log"))?));
        qemu.arg("-drive").arg(drive("root", &disks.root, "")?);
        qemu.args(["-device", "virtio-blk-pci,drive=root,serial=SW-ROOT"]);
        qemu.arg("-drive").arg(drive("tools", &disks.tools, ",readonly=on")?);
        qemu.args(["-device", "virtio-blk-pci,drive=tools,serial=SW-TOOLS"]);
        for (index, spare) in disks.spare.iter().enumerate() {
            qemu.arg("-drive").arg(drive(&format!("spare{index}"), spare, "")?);
            qemu.arg("-device").arg(format!("virtio-blk-pci,drive=spare{index},serial=SW-SPARE-{index}"));
        }
        qemu.arg("-drive").arg(drive("data", &disks.data, "")?);
        let data = "scsi-hd,drive=data,serial=SW-DATA,logical_block_size=4096,physical_block_size=4096";
        qemu.args(["-device", "virtio-scsi-pci", "-device", data]);
        qemu.args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net"]);
        qemu.args(["-device", "virtio-rng-pci"]);
        let errors = options.work.join("qemu.log");
        qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&errors)?);
        let qemu = qemu.spawn().context("start qemu-system-x86_64: is it installed?")?;
        Ok(Machine { qemu, control, errors })
    }

    fn connect(&mut self) -> anyhow::Result<Guest> {
        self.control.set_nonblocking(true)?;
        let limit = Instant::now() + BOOT_LIMIT;
        loop {
            match self.control.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(ORDER_LIMIT))?;
                    return Ok(Guest { answers: BufReader::new(stream.try_clone()?), stream });
                }
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                    return Err(error).context("wait for the guest");
                }
                Err(_) => {}
            }
            if let Some(status) = self.qemu.try_wait()? {
                let errors = fs::read_to_string(&self.errors).unwrap_or_default();
                bail!("the machine ended while starting: {status} {}", errors.trim());
            }
            ensure!(Instant::now() < limit, "the guest's program did not start within {BOOT_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends QEMU in order, so that all that the guest wrote is in the disks' files.
    fn end(mut self) -> anyhow::Result<()> {
        run("kill", &["-TERM", &self.qemu.id().to_string()])?;
        let limit = Instant::now() + ORDER_LIMIT;
        while self.qemu.try_wait()?.is_none() {
            ensure!(Instant::now() < limit, "QEMU did not end within {ORDER_LIMIT:?} of SIGTERM");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Ended already, or ends now.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The guest's program.
struct Guest {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Guest {
    fn ask(&mut self, order: &Order) -> anyhow::Result<Value> {
        let fault = || format!("ask the guest: {order:?}");
        self.stream
            .write_all(format!("{}\n", serde_json::to_string(order)?).as_bytes())
            .with_context(fault)?;
        let mut line = String::new();
        let count = self.answers.read_line(&mut line).with_context(fault)?;
        ensure!(count > 0, "{}: the guest has gone", fault());
        match serde_json::from_str(&line).with_context(fault)? {
            Answer::Done(value) => Ok(value),
            Answer::Failed(reason) => bail!("{}: {reason}", fault()),
        }
    }
}
