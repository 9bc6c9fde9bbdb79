//! `seawall discover`: what could be protected.

use block::ByteCount;
use clap::Args;
use control::fleet::{DiskInfo, DiskUse, GroupInfo, GuestInfo, MachineInfo, Name};
use serde::Serialize;

use super::Fleet;
use super::change::Watched;
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall discover
  seawall discover web --watch
  seawall discover --json | jq -r '.machines[] | .name as $m | .disks[] | select(.protected | not) | [$m, .device] | @tsv'

Disks of enrolled machines with what is on them and how much is written to them, by the kernel's count over the last minutes; and, of
hosts where libvirt's virsh is there, their guests. A machine comes into the fleet with `seawall machine push` or `seawall token create`.")]
pub(crate) struct DiscoverOptions {
    /// Only this machine, by name or id
    #[arg(value_name = "MACHINE")]
    machine: Option<String>,
    #[command(flatten)]
    watched: Watched,
}

impl DiscoverOptions {
    pub(crate) fn json(&self) -> bool {
        self.watched.common.json
    }
}

#[derive(Debug, Serialize)]
struct Discovered {
    machines: Vec<Candidates>,
}

/// A machine with its disks.
#[derive(Debug, Serialize)]
struct Candidates {
    name: Name,
    /// Whether it has ever reported.
    reports: bool,
    disks: Vec<Candidate>,
    guests: Vec<GuestInfo>,
}

#[derive(Debug, Serialize)]
struct Candidate {
    #[serde(flatten)]
    disk: DiskInfo,
    protected: bool,
}

pub(crate) async fn run(options: &DiscoverOptions) -> anyhow::Result<Exit> {
    let fleet = Fleet::open(&options.watched.common.place)?;
    let look = || async {
        let mut machines = Vec::new();
        match &options.machine {
            Some(named) => machines.push(candidates(&fleet, fleet.machine(named).await?).await?),
            None => {
                // Lists leave disks out.
                for machine in fleet.all::<MachineInfo>("/machines").await? {
                    let machine = fleet.get(&format!("/machines/{}", machine.id)).await?;
                    machines.push(candidates(&fleet, machine).await?);
                }
            }
        }
        Ok(Discovered { machines })
    };
    options.watched.show(look, render).await
}

async fn candidates(fleet: &Fleet, machine: MachineInfo) -> anyhow::Result<Candidates> {
    let group: Option<GroupInfo> = match machine.protected {
        true => Some(fleet.get(&format!("/groups/{}", machine.group)).await?),
        false => None,
    };
    let volumes = group.map(|group| group.volumes).unwrap_or_default();
    // By whichever name it was protected.
    let protected = |disk: &DiskInfo| {
        let known_by = |name: &str| !disk.known_by.is_empty() && name == disk.known_by;
        volumes.iter().any(|volume| volume.device == disk.device || known_by(&volume.device))
    };
    let disks =
        machine.disks.into_iter().map(|disk| Candidate { protected: protected(&disk), disk }).collect();
    Ok(Candidates { name: machine.name, reports: machine.seen.is_some(), disks, guests: machine.guests })
}

/// `ext4 on /`, `swap`, `LVM`, `part of an array`.
fn used(part: &DiskUse) -> String {
    let kind = match part.kind.as_str() {
        "LVM2_member" => "LVM",
        "linux_raid_member" => "part of an array",
        "crypto_LUKS" => "encrypted (LUKS)",
        "" => "unknown",
        kind => kind,
    };
    match part.mounted.as_str() {
        "" => format!("{}: {kind}", part.device),
        "[SWAP]" => format!("{}: swap, in use", part.device),
        mounted => format!("{}: {kind} on {mounted}", part.device),
    }
}

fn render(found: &Discovered) -> String {
    if found.machines.is_empty() {
        return "No machine has enrolled; `seawall machine push USER@HOST` or `seawall token create` brings one.\n"
            .to_owned();
    }
    let mut table =
        text::table(&["Machine", "Disk", "Size", "Written", "Protected", "On it", "Known by"], &[2, 3]);
    let mut guests = text::table(&["Host", "Guest", "State", "Disks"], &[]);
    let (mut any, mut any_guest) = (false, false);
    let mut silent = String::new();
    for machine in &found.machines {
        if machine.disks.is_empty() {
            let why = if machine.reports {
                "reports no disk that could be protected"
            } else {
                "has not reported yet"
            };
            silent += &format!("{} {why}.\n", machine.name);
        }
        for Candidate { disk, protected } in &machine.disks {
            any = true;
            let uses: Vec<String> = disk.uses.iter().map(used).collect();
            table.add_row([
                machine.name.to_string(),
                disk.device.clone(),
                ByteCount(disk.bytes).to_string(),
                disk.written_bytes_per_s.map_or("not known yet".to_owned(), |rate| text::rate(rate as f64)),
                if *protected { "yes" } else { "no" }.to_owned(),
                uses.join("\n"),
                disk.known_by.clone(),
            ]);
        }
        for guest in &machine.guests {
            any_guest = true;
            let disks: Vec<String> =
                guest.disks.iter().map(|disk| format!("{}: {}", disk.target, disk.source)).collect();
            guests.add_row([
                machine.name.to_string(),
                guest.name.clone(),
                guest.state.clone(),
                disks.join("\n"),
            ]);
        }
    }
    let mut shown = String::new();
    if any {
        shown += &format!("{table}\n");
    }
    shown += &silent;
    if any_guest {
        shown += &format!("{guests}\nA guest is protected by an agent inside it.\n");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_a_disk_is_said_in_words() {
        let part = |kind: &str, mounted: &str| {
            used(&DiskUse { device: "/dev/sda1".into(), kind: kind.into(), mounted: mounted.into() })
        };
        assert_eq!(part("ext4", "/srv"), "/dev/sda1: ext4 on /srv");
        assert_eq!(part("swap", "[SWAP]"), "/dev/sda1: swap, in use");
        assert_eq!(part("LVM2_member", ""), "/dev/sda1: LVM");
        assert_eq!(part("linux_raid_member", ""), "/dev/sda1: part of an array");
    }
}
