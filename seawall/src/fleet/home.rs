//! `seawall group reverse`: what runs in place of a failed-over group is protected, onto the disks of the original site.

use anyhow::{Context, ensure};
use clap::Args;
use control::fleet::{JobInfo, Protect, VolumeChoice};

use super::group::{Followed, Which};
use super::{Fleet, job};
use crate::exit::Exit;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  web has failed over, and that is committed. Its volume vda is in use as /dev/nbd0 of the machine web-dr; at the original site a target
  server, web-home, was enrolled with --adoptable /dev/vda:
    seawall group reverse web --machine web-dr --disk vda=/dev/nbd0 --target-server web-home --watch
  The original disk has another name by now:
    seawall group reverse web --machine web-dr --disk vda=/dev/nbd0 --home vda=/dev/sda --target-server web-home --watch
  And when it is time to go home:
    seawall group failback web --watch

Only what differs from the original disks is sent. What the machine had written after the point of the failover stays there as a pinned
recovery point, named `as found`, until the group is home. docs/lifecycle.md, \"The way home\".")]
pub(crate) struct ReverseOptions {
    #[command(flatten)]
    which: Which,
    /// Machine on which its volumes are in use now, by name or id
    #[arg(long, value_name = "MACHINE")]
    machine: String,
    /// Where a volume is in use on that machine; once for each volume
    #[arg(long = "disk", value_name = "VOLUME=DISK", required = true, value_parser = named)]
    disks: Vec<(String, String)>,
    /// Target server at the original site, by name
    #[arg(long, value_name = "NAME")]
    target_server: String,
    /// A volume's original disk, by its path at that target server [default: as the group has it]
    #[arg(long = "home", value_name = "VOLUME=DISK", value_parser = named)]
    homes: Vec<(String, String)>,
    /// Process server, by name [default: the one with the fewest groups]
    #[arg(long, value_name = "NAME")]
    process_server: Option<String>,
    /// Go on although checks warn
    #[arg(long)]
    despite_warnings: bool,
    #[command(flatten)]
    followed: Followed,
}

fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((volume, disk)) if !volume.is_empty() && !disk.is_empty() => {
            Ok((volume.to_owned(), disk.to_owned()))
        }
        _ => Err("expected VOLUME=DISK, as in vda=/dev/nbd0".to_owned()),
    }
}

impl ReverseOptions {
    pub(crate) fn json(&self) -> bool {
        self.followed.json()
    }
}

pub(crate) async fn reverse(options: &ReverseOptions) -> anyhow::Result<Exit> {
    let ReverseOptions {
        which,
        machine,
        disks,
        target_server,
        homes,
        process_server,
        despite_warnings,
        followed,
    } = options;
    let fleet = Fleet::open(followed.place())?;
    let group = which.find(&fleet).await?;
    let machine = fleet.machine(machine).await?;
    let of = |all: &[(String, String)], volume: &str| {
        all.iter().find(|(name, _)| name == volume).map(|(_, disk)| disk.clone())
    };
    let known = |name: &String| group.volumes.iter().any(|volume| volume.name == *name);
    if let Some((unknown, _)) = disks.iter().chain(homes).find(|(name, _)| !known(name)) {
        let names: Vec<&str> = group.volumes.iter().map(|volume| volume.name.as_str()).collect();
        anyhow::bail!("{} has no volume {unknown:?}; it has {}", group.name, names.join(", "));
    }
    let mut volumes = Vec::new();
    for volume in &group.volumes {
        let name = &volume.name;
        let device = of(disks, name).with_context(|| {
            format!("where is volume {name} of {} in use? --disk {name}=DISK", group.name)
        })?;
        let home = of(homes, name).unwrap_or_else(|| volume.device.clone());
        ensure!(
            home.starts_with('/'),
            "the original disk of {name} is known as {home}, which is no path at the target server; say --home {name}=PATH"
        );
        volumes.push(VolumeChoice { device, name: Some(name.parse()?), adopt: Some(home) });
    }
    let process_server = match process_server {
        Some(named) => {
            Some(super::protect::server(&fleet, "process server", "/process-servers", named).await?)
        }
        None => None,
    };
    let asked = Protect {
        volumes,
        policy: Some(group.policy.clone()),
        process_server,
        target_servers: vec![
            super::protect::server(&fleet, "target server", "/target-servers", target_server).await?,
        ],
        despite_warnings: *despite_warnings,
        reverses: Some(group.id),
    };
    let begun: JobInfo = fleet.post(&format!("/machines/{}/protect", machine.id), &asked).await?;
    job::follow(&fleet, begun, followed.watch(), followed.json()).await
}
