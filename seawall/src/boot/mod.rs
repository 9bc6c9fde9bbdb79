//! `seawall boot`: a machine on a point, in QEMU.
//!
//! Its disks are overlays at the target, reached through a bridge; what it writes is dropped with them. It has no network
//! unless it is given one. QEMU is killed when this command is.

mod firmware;

use crate::config::Place;
use block::GroupId;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail, ensure};
use block::{ByteCount, ByteOffset};
use control::{ExportInfo, ExportPlace, ExportRequest, OperatorRequest, PointSelector, ViewHead, ViewRange};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::ask::{Held, Servers};
use crate::bridge::Bridge;
use crate::exit::Exit;
use crate::export::find_all;
use crate::text;
use firmware::Head;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Does the newest point start?
    seawall boot vda --point latest
  A machine with two disks, as it was, with more memory:
    seawall boot vda vdb --point 1207 --memory 8GiB --cpus 4
  On a disk bus that the system knows, and with a way into a test network:
    seawall boot sda --point latest --bus sata --network br-test

The first volume is the one that the machine starts from. What the machine writes goes into overlays at the target and is dropped
when it ends; the replica does not change, and replication goes on. The serial console is shown here: the system must use it
(console=ttyS0). qemu-system-x86 is needed, for UEFI also ovmf.")]
pub(crate) struct BootOptions {
    #[command(flatten)]
    pub(crate) machine: MachineOptions,
}

/// Which machine, of which disks.
#[derive(Debug, Args)]
pub(crate) struct MachineOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volumes of one group, by name or identity
    #[arg(value_name = "VOLUME", required = true)]
    pub(crate) volumes: Vec<String>,
    /// Recovery point: `latest`, `application` (the newest application-consistent one), or the number of an epoch
    #[arg(long, value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// `none`; `isolated`: a network that leads nowhere; or the name of a bridge of this machine
    #[arg(long, value_name = "none|isolated|NAME", default_value = "none")]
    pub(crate) network: String,
    /// What starts the system
    #[arg(long, value_enum, default_value_t)]
    pub(crate) firmware: BootFirmware,
    /// What the disks are connected by
    #[arg(long, value_enum, default_value_t)]
    pub(crate) bus: BootBus,
    /// What runs the processor
    #[arg(long, value_enum, default_value_t)]
    pub(crate) accel: BootAccelerator,
    /// Memory, such as 2GiB
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    pub(crate) memory: ByteCount,
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=255))]
    pub(crate) cpus: u32,
    /// What the machine may write to each volume, such as 10GiB [default: 16GiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) limit: Option<ByteCount>,
    /// QEMU
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub(crate) qemu: PathBuf,
    /// More arguments for QEMU, after `--`
    #[arg(last = true, value_name = "ARGUMENT")]
    pub(crate) more: Vec<String>,
}

/// What starts a system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootFirmware {
    /// UEFI when there is an EFI system partition, else BIOS
    #[default]
    Auto,
    /// The BIOS that QEMU has
    Bios,
    /// OVMF
    Uefi,
}

/// What disks are connected by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootBus {
    /// virtio-blk; every Linux that ran in a virtual machine knows it
    #[default]
    Virtio,
    /// virtio-scsi
    Scsi,
    /// AHCI; for systems from physical machines
    Sata,
}

/// What runs a machine's processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootAccelerator {
    /// KVM where it works, else emulation
    #[default]
    Auto,
    /// KVM, or fail
    Kvm,
    /// Emulation, which works everywhere and is slow
    Tcg,
}

/// A machine that can be started; its disks go when this is dropped.
pub(crate) struct Machine {
    pub(crate) servers: Servers,
    pub(crate) held: Held,
    _bridge: Bridge,
    program: PathBuf,
    arguments: Vec<String>,
    /// What starts it, and why that.
    firmware: String,
}

impl Machine {
    /// Opens its disks. `attended`: somebody is there who looks at it, and types.
    pub(crate) async fn prepare(options: &MachineOptions, attended: bool) -> anyhow::Result<Machine> {
        let servers = Servers::load(&options.place)?;
        let (group, volumes) = find_all(&servers.points(options.group).await?, &options.volumes)?;
        let request = ExportRequest {
            writable: true,
            overlay_limit: options.limit,
            ..ExportRequest::new(group, volumes, options.point, ExportPlace::Beside)
        };
        let held = servers.export(request).await?;
        let bridge = servers.bridge(&held.info, None)?;
        let dir = bridge.socket().parent().context("the bridge's directory")?.to_owned();
        let head = head(&servers, &held.info).await?;
        let (uefi, why) = head.choose(options.firmware)?;
        let pflash = if uefi { Some(firmware::uefi(&dir)?) } else { None };
        let arguments = arguments(options, &held.info, bridge.socket(), head, pflash.as_ref(), attended)?;
        let firmware = format!("{} ({why})", if uefi { "UEFI" } else { "BIOS" });
        Ok(Machine { servers, held, _bridge: bridge, program: options.qemu.clone(), arguments, firmware })
    }

    /// Its disks, point and firmware, for people.
    pub(crate) fn told(&self) -> String {
        let info = &self.held.info;
        let names: Vec<&str> = info.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let (local, _) = text::instant(info.point.cut_time);
        format!("{} as of point {} ({local}) with {}", names.join(", "), info.point.epoch, self.firmware)
    }

    /// What runs it. It is killed when this process is.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        // On the program's first thread, whose end is the program's: that is what the kernel looks at.
        command.args(["--pdeathsig", "KILL"]).arg(&self.program).args(&self.arguments).kill_on_drop(true);
        command
    }
}

pub(crate) async fn run(options: &BootOptions) -> anyhow::Result<Exit> {
    let options = &options.machine;
    // Before anything is started, so that no signal is lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let mut prepared = Machine::prepare(options, at_terminal()).await?;
    // With what has been learnt, before the machine has the screen.
    eprintln!(
        "Booting {}, network: {}.{}",
        prepared.told(),
        options.network,
        if at_terminal() { " Ctrl-A X ends it." } else { "" },
    );
    let mut command = prepared.command();
    if !at_terminal() {
        command.stdin(Stdio::null());
    }
    let mut machine = command.spawn().context("run setpriv (of util-linux)")?;
    let status = tokio::select! {
        status = machine.wait() => status.context("wait for QEMU")?,
        _ = terminate.recv() => return end(&mut machine).await,
        _ = interrupt.recv() => return end(&mut machine).await,
        error = prepared.held.ended() => {
            end(&mut machine).await?;
            return Err(error);
        }
    };
    ensure!(
        status.success(),
        "run {}: {status}; is it installed? On Debian it is in qemu-system-x86",
        options.qemu.display()
    );
    Ok(Exit::Done)
}

/// Lets QEMU give the terminal back.
pub(crate) async fn end(machine: &mut tokio::process::Child) -> anyhow::Result<Exit> {
    if let Some(pid) = machine.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    machine.wait().await.context("wait for QEMU")?;
    Ok(Exit::Done)
}

fn at_terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// The beginning of the first volume.
async fn head(servers: &Servers, info: &ExportInfo) -> anyhow::Result<Head> {
    let volume = info.volumes.first().context("the target server exported nothing")?;
    let length = ByteCount(firmware::HEAD_BYTES.min(volume.size.0));
    let request = OperatorRequest::ReadView {
        group: info.group,
        volume: volume.id,
        point: PointSelector::Epoch(info.point.epoch),
        ranges: vec![ViewRange { offset: ByteOffset(0), length }],
    };
    let mut view = servers.view(&request).await?;
    let sent: ViewHead = serde_json::from_str(view.head()).context("read what the view is")?;
    ensure!(
        sent.volume.id == volume.id,
        "read the beginning of {}: the server sent another volume",
        volume.name
    );
    let mut bytes = vec![0; length.0 as usize];
    while let Some((offset, piece)) = view.next().await? {
        let place = offset.0 as usize..offset.0 as usize + piece.len();
        bytes.get_mut(place).context("read the view: bytes out of place")?.copy_from_slice(&piece);
    }
    Ok(Head::of(&bytes))
}

fn arguments(
    options: &MachineOptions,
    info: &ExportInfo,
    socket: &Path,
    head: Head,
    pflash: Option<&(PathBuf, PathBuf)>,
    attended: bool,
) -> anyhow::Result<Vec<String>> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    add(&[
        "-name",
        &format!("seawall-{}", info.point.epoch),
        "-nodefaults",
        "-no-user-config",
        "-machine",
        "q35",
    ]);
    let kvm = match options.accel {
        BootAccelerator::Kvm => true,
        BootAccelerator::Tcg => false,
        BootAccelerator::Auto => std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok(),
    };
    if kvm {
        add(&["-accel", "kvm"]);
    }
    if !kvm || options.accel == BootAccelerator::Auto {
        // Also when there is a device and it does not work.
        add(&["-accel", "tcg"]);
    }
    add(&["-cpu", "max", "-smp", &options.cpus.to_string()]);
    add(&["-m", &format!("{}B", options.memory.0), "-device", "virtio-rng-pci"]);
    // A screen for those who insist on one; what counts is the serial line.
    add(&["-vga", "std", "-display", "none"]);
    if attended {
        add(&["-serial", "mon:stdio"]);
    } else {
        add(&["-serial", "stdio", "-monitor", "none"]);
    }
    match options.network.as_str() {
        "none" => add(&["-nic", "none"]),
        // It has an address and reaches nothing.
        "isolated" => add(&["-nic", "user,model=virtio-net-pci,restrict=on"]),
        bridge if bridge.chars().all(|char| char.is_ascii_alphanumeric() || "-_.".contains(char)) => {
            add(&["-nic", &format!("bridge,model=virtio-net-pci,br={bridge}")]);
        }
        other => bail!("connect the machine to {other:?}: that is no name of a bridge"),
    }
    if let Some((code, variables)) = pflash {
        for (unit, file, more) in [(0, code, ",readonly=on"), (1, variables, "")] {
            // A comma in a value is written twice.
            let file = file.display().to_string().replace(',', ",,");
            add(&["-drive", &format!("if=pflash,format=raw,unit={unit},file={file}{more}")]);
        }
    }
    if options.bus == BootBus::Scsi {
        add(&["-device", "virtio-scsi-pci,id=scsi0"]);
    }
    for (index, volume) in info.volumes.iter().enumerate() {
        let disk = serde_json::json!({
            "driver": "nbd",
            "node-name": format!("disk{index}"),
            "server": { "type": "unix", "path": socket },
            "export": volume.name,
            "discard": "unmap",
        });
        add(&["-blockdev", &disk.to_string()]);
        let device = match options.bus {
            BootBus::Virtio => "virtio-blk-pci".to_owned(),
            BootBus::Scsi => "scsi-hd,bus=scsi0.0".to_owned(),
            BootBus::Sata => format!("ide-hd,bus=ide.{index}"),
        };
        let sectors = match head.sector_bytes {
            4096 => ",logical_block_size=4096,physical_block_size=4096",
            _ => "",
        };
        add(&["-device", &format!("{device},drive=disk{index},bootindex={}{sectors}", index + 1)]);
    }
    all.extend(options.more.iter().cloned());
    Ok(all)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::export::tests::info;

    fn options(more: &[&str]) -> MachineOptions {
        let words = ["seawall", "boot", "vda", "--point", "latest"];
        match Cli::try_parse_from(words.iter().chain(more)).unwrap().command {
            Command::Boot(options) => options.machine,
            other => panic!("{other:?}"),
        }
    }

    fn line(more: &[&str]) -> String {
        let head = Head { efi: true, bios: false, sector_bytes: 4096 };
        let pflash = (PathBuf::from("/code"), PathBuf::from("/t,mp/vars"));
        let info = info(ExportPlace::Beside);
        arguments(&options(more), &info, Path::new("/s"), head, Some(&pflash), false).unwrap().join(" ")
    }

    #[test]
    fn a_drill_reaches_nobody_unless_told() {
        let none = line(&["--accel", "tcg"]);
        assert!(none.contains("-nic none") && !none.contains("kvm"), "{none}");
        assert!(none.contains("file=/t,,mp/vars") && none.contains("logical_block_size=4096"), "{none}");
        assert!(none.contains(r#""export":"vd b""#) && none.contains("bootindex=2"), "{none}");
        assert!(line(&["--network", "isolated"]).contains("restrict=on"));
        assert!(line(&["--network", "br0"]).contains("br=br0"));
        assert!(line(&["--bus", "scsi", "--", "-snapshot"]).ends_with("-snapshot"));
        let head = Head { efi: false, bios: true, sector_bytes: 512 };
        let evil = options(&["--network", "br0,script=/x"]);
        assert!(arguments(&evil, &info(ExportPlace::Beside), Path::new("/s"), head, None, false).is_err());
    }
}
