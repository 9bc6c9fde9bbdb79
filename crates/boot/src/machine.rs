//! QEMU: what it is told, and how it ends.

use std::path::{Path, PathBuf};

use block::ByteCount;
use control::fleet::{BootBus, BootFirmware};
use tokio::process::{Child, Command};

use crate::BootError;
use crate::firmware::{self, Head};

/// What runs a machine's processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM where it works, else emulation.
    #[default]
    Auto,
    /// KVM, or fail.
    Kvm,
    /// Emulation, which works everywhere and is slow.
    Tcg,
}

/// What a machine consists of besides its disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// `none`; `isolated`: a network that leads nowhere; or the name of a bridge of this machine.
    pub network: String,
    /// What starts the system.
    pub firmware: BootFirmware,
    /// What the disks are connected by.
    pub bus: BootBus,
    /// What runs the processor.
    pub accelerator: Accelerator,
    /// Memory.
    pub memory: ByteCount,
    /// Processors.
    pub cpus: u32,
    /// The program.
    pub qemu: PathBuf,
    /// More of its arguments.
    pub more: Vec<String>,
}

/// A machine's disks.
#[derive(Clone, Copy, Debug)]
pub struct Disks<'a> {
    /// What the machine is called.
    pub machine: &'a str,
    /// Where they are served over NBD.
    pub socket: &'a Path,
    /// What they are called there; the machine starts from the first.
    pub names: &'a [&'a str],
    /// The beginning of the first.
    pub head: Head,
}

/// A machine that can be started.
#[derive(Debug)]
pub struct Machine {
    program: PathBuf,
    arguments: Vec<String>,
    firmware: String,
}

impl Machine {
    /// `dir`: what lives as long as the machine. `attended`: somebody is there who looks at its console, and types.
    ///
    /// # Errors
    /// When the disk does not say how it is started, firmware is not there, or the network has no name.
    pub fn new(
        hardware: &Hardware,
        disks: Disks<'_>,
        dir: &Path,
        attended: bool,
    ) -> Result<Machine, BootError> {
        let (uefi, why) = disks.head.choose(hardware.firmware)?;
        let pflash = if uefi { Some(firmware::uefi(dir)?) } else { None };
        let arguments = arguments(hardware, disks, pflash.as_ref(), attended)?;
        let firmware = format!("{} ({why})", if uefi { "UEFI" } else { "BIOS" });
        Ok(Machine { program: hardware.qemu.clone(), arguments, firmware })
    }

    /// What starts it, and why that.
    pub fn firmware(&self) -> &str {
        &self.firmware
    }

    /// What runs it. It is killed when this process is.
    pub fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        // On the program's first thread, whose end is the program's: that is what the kernel looks at.
        command.args(["--pdeathsig", "KILL"]).arg(&self.program).args(&self.arguments).kill_on_drop(true);
        command
    }
}

/// Ends a machine, and lets QEMU give the terminal back.
///
/// # Errors
/// When it cannot be waited for.
pub async fn end(machine: &mut Child) -> Result<(), BootError> {
    if let Some(pid) = machine.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    machine.wait().await.map_err(BootError::io("wait for QEMU"))?;
    Ok(())
}

fn arguments(
    hardware: &Hardware,
    disks: Disks<'_>,
    pflash: Option<&(PathBuf, PathBuf)>,
    attended: bool,
) -> Result<Vec<String>, BootError> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-name", disks.machine, "-nodefaults", "-no-user-config", "-machine", "q35"]);
    let kvm = match hardware.accelerator {
        Accelerator::Kvm => true,
        Accelerator::Tcg => false,
        Accelerator::Auto => std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok(),
    };
    if kvm {
        add(&["-accel", "kvm"]);
    }
    if !kvm || hardware.accelerator == Accelerator::Auto {
        // Also when there is a device and it does not work.
        add(&["-accel", "tcg"]);
    }
    add(&["-cpu", "max", "-smp", &hardware.cpus.to_string()]);
    add(&["-m", &format!("{}B", hardware.memory.0), "-device", "virtio-rng-pci"]);
    // A screen for those who insist on one; what counts is the serial line.
    add(&["-vga", "std", "-display", "none"]);
    if attended {
        add(&["-serial", "mon:stdio"]);
    } else {
        add(&["-serial", "stdio", "-monitor", "none"]);
    }
    match hardware.network.as_str() {
        "none" => add(&["-nic", "none"]),
        // It has an address and reaches nothing.
        "isolated" => add(&["-nic", "user,model=virtio-net-pci,restrict=on"]),
        bridge if bridge.chars().all(|char| char.is_ascii_alphanumeric() || "-_.".contains(char)) => {
            add(&["-nic", &format!("bridge,model=virtio-net-pci,br={bridge}")]);
        }
        other => return Err(BootError::Network(other.to_owned())),
    }
    if let Some((code, variables)) = pflash {
        for (unit, file, more) in [(0, code, ",readonly=on"), (1, variables, "")] {
            // A comma in a value is written twice.
            let file = file.display().to_string().replace(',', ",,");
            add(&["-drive", &format!("if=pflash,format=raw,unit={unit},file={file}{more}")]);
        }
    }
    if hardware.bus == BootBus::Scsi {
        add(&["-device", "virtio-scsi-pci,id=scsi0"]);
    }
    for (index, name) in disks.names.iter().enumerate() {
        let disk = serde_json::json!({
            "driver": "nbd",
            "node-name": format!("disk{index}"),
            "server": { "type": "unix", "path": disks.socket },
            "export": name,
            "discard": "unmap",
        });
        add(&["-blockdev", &disk.to_string()]);
        let device = match hardware.bus {
            BootBus::Virtio => "virtio-blk-pci".to_owned(),
            BootBus::Scsi => "scsi-hd,bus=scsi0.0".to_owned(),
            BootBus::Sata => format!("ide-hd,bus=ide.{index}"),
        };
        let sectors = match disks.head.sector_bytes {
            4096 => ",logical_block_size=4096,physical_block_size=4096",
            _ => "",
        };
        add(&["-device", &format!("{device},drive=disk{index},bootindex={}{sectors}", index + 1)]);
    }
    all.extend(hardware.more.iter().cloned());
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(change: impl FnOnce(&mut Hardware)) -> Result<String, BootError> {
        let mut hardware = Hardware {
            network: "none".into(),
            firmware: BootFirmware::Auto,
            bus: BootBus::Virtio,
            accelerator: Accelerator::Tcg,
            memory: ByteCount::gib(2),
            cpus: 2,
            qemu: "qemu-system-x86_64".into(),
            more: Vec::new(),
        };
        change(&mut hardware);
        let head = Head { efi: true, bios: false, sector_bytes: 4096 };
        let disks = Disks { machine: "seawall-7", socket: Path::new("/s"), names: &["vda", "vd b"], head };
        let pflash = (PathBuf::from("/code"), PathBuf::from("/t,mp/vars"));
        Ok(arguments(&hardware, disks, Some(&pflash), false)?.join(" "))
    }

    #[test]
    fn a_machine_reaches_nobody_unless_told() {
        let none = line(|_| {}).unwrap();
        assert!(none.contains("-nic none") && !none.contains("kvm"), "{none}");
        assert!(none.contains("file=/t,,mp/vars") && none.contains("logical_block_size=4096"), "{none}");
        assert!(none.contains(r#""export":"vd b""#) && none.contains("bootindex=2"), "{none}");
        let network = |name: &str| line(|hardware| hardware.network = name.to_owned());
        assert!(network("isolated").unwrap().contains("restrict=on"));
        assert!(network("br0").unwrap().contains("br=br0"));
        assert!(matches!(network("br0,script=/x"), Err(BootError::Network(_))));
        let more = line(|hardware| {
            hardware.bus = BootBus::Scsi;
            hardware.more = vec!["-snapshot".to_owned()];
        });
        assert!(more.unwrap().ends_with("-snapshot"));
    }
}
