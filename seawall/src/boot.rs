//! `seawall boot`: a machine on a point, in QEMU.
//!
//! Its disks are overlays at the target, reached through a bridge; what it writes is dropped with them. It has no network
//! unless it is given one. QEMU is killed when this command is.

use std::path::PathBuf;
use std::process::Stdio;

use ::boot::{Accelerator, Disks, HEAD_BYTES, Hardware, Head, end};
use anyhow::{Context, ensure};
use block::{ByteCount, ByteOffset, GroupId};
use clap::{Args, ValueEnum};
use control::fleet::{BootBus, BootFirmware};
use control::{ExportInfo, ExportPlace, ExportRequest, OperatorRequest, PointSelector, ViewHead, ViewRange};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::ask::{Held, Servers};
use crate::bridge::Bridge;
use crate::config::Place;
use crate::exit::Exit;
use crate::export::find_all;
use crate::text;

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
    /// What starts the system: UEFI when there is an EFI system partition, else BIOS; or one of them
    #[arg(long, value_name = "auto|bios|uefi", default_value = "auto")]
    pub(crate) firmware: BootFirmware,
    /// What the disks are connected by; sata is for systems from physical machines
    #[arg(long, value_name = "virtio|scsi|sata", default_value = "virtio")]
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
    machine: ::boot::Machine,
}

impl MachineOptions {
    fn hardware(&self) -> Hardware {
        Hardware {
            network: self.network.clone(),
            firmware: self.firmware,
            bus: self.bus,
            accelerator: match self.accel {
                BootAccelerator::Auto => Accelerator::Auto,
                BootAccelerator::Kvm => Accelerator::Kvm,
                BootAccelerator::Tcg => Accelerator::Tcg,
            },
            memory: self.memory,
            cpus: self.cpus,
            qemu: self.qemu.clone(),
            more: self.more.clone(),
        }
    }
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
        let info = &held.info;
        let names: Vec<&str> = info.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let name = format!("seawall-{}", info.point.epoch);
        let disks = Disks { machine: &name, socket: bridge.socket(), names: &names, head };
        let machine = ::boot::Machine::new(&options.hardware(), disks, &dir, attended)?;
        Ok(Machine { servers, held, _bridge: bridge, machine })
    }

    /// Its disks, point and firmware, for people.
    pub(crate) fn told(&self) -> String {
        let info = &self.held.info;
        let names: Vec<&str> = info.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let (local, _) = text::instant(info.point.cut_time);
        let firmware = self.machine.firmware();
        format!("{} as of point {} ({local}) with {firmware}", names.join(", "), info.point.epoch)
    }

    /// What runs it. It is killed when this process is.
    pub(crate) fn command(&self) -> Command {
        self.machine.command()
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
        _ = terminate.recv() => return Ok(end(&mut machine).await.map(|()| Exit::Done)?),
        _ = interrupt.recv() => return Ok(end(&mut machine).await.map(|()| Exit::Done)?),
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

fn at_terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// The beginning of the first volume.
async fn head(servers: &Servers, info: &ExportInfo) -> anyhow::Result<Head> {
    let volume = info.volumes.first().context("the target server exported nothing")?;
    let length = ByteCount(HEAD_BYTES.min(volume.size.0));
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
