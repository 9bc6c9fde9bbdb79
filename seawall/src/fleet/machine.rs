//! `seawall machine`: the machines of the fleet.

use std::time::Duration;

use block::ByteCount;
use clap::{Args, Subcommand};
use control::fleet::{GroupInfo, MachineInfo};
use serde::Serialize;

use super::change::{Certain, Common, Watched};
use super::{Fleet, ago};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall machine list
  seawall machine show web
  seawall machine list --json | jq -r '.machines[].name'")]
pub(crate) struct MachineOptions {
    #[command(subcommand)]
    command: MachineCommand,
}

#[derive(Debug, Subcommand)]
enum MachineCommand {
    /// All of them, and how each is
    #[command(after_help = "Example:\n  seawall machine list --json")]
    List(Watched),
    /// Bring one into the fleet over SSH, or its agent's program up to date
    Push(super::push::PushOptions),
    /// Take one that is not protected out of the fleet, and revoke its certificates
    #[command(after_help = "Example:\n  seawall machine remove web --yes")]
    Remove {
        /// Which, by name or id
        machine: String,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        common: Common,
    },
    /// One with its disks, and how its protection is, stage by stage
    #[command(after_help = "Example:\n  seawall machine show web")]
    Show {
        /// Which, by name or id
        machine: String,
        #[command(flatten)]
        watched: Watched,
    },
}

impl MachineOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            MachineCommand::List(watched) | MachineCommand::Show { watched, .. } => watched.common.json,
            MachineCommand::Remove { common, .. } => common.json,
            MachineCommand::Push(options) => options.common.json,
        }
    }
}

/// What `show` fetches.
#[derive(Debug, Serialize)]
struct Shown {
    machine: MachineInfo,
    group: Option<GroupInfo>,
}

#[derive(Debug, Serialize)]
struct Listed {
    machines: Vec<MachineInfo>,
}

pub(crate) async fn run(options: &MachineOptions) -> anyhow::Result<Exit> {
    match &options.command {
        MachineCommand::List(watched) => {
            let fleet = Fleet::open(&watched.common.place)?;
            let look = || async { Ok(Listed { machines: fleet.all("/machines").await? }) };
            watched.show(look, |listed| render(&listed.machines)).await
        }
        MachineCommand::Show { machine, watched } => {
            let fleet = Fleet::open(&watched.common.place)?;
            let look = || async {
                let machine = fleet.machine(machine).await?;
                let group = match machine.protected {
                    true => Some(fleet.get(&format!("/groups/{}", machine.group)).await?),
                    false => None,
                };
                Ok(Shown { machine, group })
            };
            watched.show(look, |shown| render_one(&shown.machine, shown.group.as_ref())).await
        }
        MachineCommand::Push(options) => super::push::run(options).await,
        MachineCommand::Remove { machine, certain, common } => {
            let fleet = Fleet::open(&common.place)?;
            let machine = fleet.machine(machine).await?;
            let name = machine.name.as_str();
            certain.ask("remove machine", name, "Its certificates will be revoked.")?;
            let acted = fleet.destroy(&format!("/machines/{}", machine.id), name).await?;
            acted.say(common, &format!("The machine {name} is removed."))
        }
    }
}

fn render(machines: &[MachineInfo]) -> String {
    if machines.is_empty() {
        return "No machine has enrolled; `seawall machine push USER@HOST` or `seawall token create` brings one.\n".to_owned();
    }
    let mut table =
        text::table(&["Machine", "Protected", "State", "Last report", "Version", "What to do"], &[]);
    for machine in machines {
        table.add_row([
            machine.name.to_string(),
            if machine.protected { "yes" } else { "no" }.to_owned(),
            machine.state.to_string(),
            machine.seen.map_or("never".to_owned(), ago),
            machine.version.clone(),
            machine.trouble.clone().unwrap_or_else(|| machine.what_to_do.clone()),
        ]);
    }
    format!("{table}\n")
}

fn render_one(machine: &MachineInfo, group: Option<&GroupInfo>) -> String {
    let mut shown = format!(
        "Machine {} ({}), version {}, last report {}\nState: {}: {}\n",
        machine.name,
        machine.id,
        machine.version,
        machine.seen.map_or("never".to_owned(), ago),
        machine.state,
        machine.meaning
    );
    if !machine.what_to_do.is_empty() {
        shown += &format!("To do: {}\n", machine.what_to_do);
    }
    if let Some(trouble) = &machine.trouble {
        shown += &format!("Trouble: {trouble}\n");
    }
    let mut disks = text::table(&["Disk", "Size", "Known by", "Use"], &[1]);
    for disk in &machine.disks {
        let uses = disk.uses.iter().map(|part| match part.mounted.as_str() {
            "" => format!("{} {}", part.device, part.kind),
            mounted => format!("{} {} on {mounted}", part.device, part.kind),
        });
        let uses: Vec<String> = uses.collect();
        disks.add_row([
            disk.device.clone(),
            ByteCount(disk.bytes).to_string(),
            disk.known_by.clone(),
            uses.join("\n"),
        ]);
    }
    if !machine.disks.is_empty() {
        shown += &format!("{disks}\n");
    }
    match group {
        None => shown += &format!("Not protected; `seawall protect {} DISK...` does it.\n", machine.name),
        Some(group) => shown += &render_group(group),
    }
    shown
}

/// A time that the config server counts in milliseconds; clocks that disagree can make it negative.
fn time(ms: i64) -> String {
    text::span(Duration::from_millis(u64::try_from(ms).unwrap_or_default()))
}

pub(super) fn render_group(group: &GroupInfo) -> String {
    let mut volumes = text::table(&["Volume", "Disk", "Size", "Capture", "Still to read"], &[2, 4]);
    for volume in &group.volumes {
        volumes.add_row([
            volume.name.clone(),
            volume.device.clone(),
            ByteCount(volume.bytes).to_string(),
            volume.mode.map_or("-".to_owned(), |mode| mode.to_string()),
            ByteCount(volume.dirty_bytes).to_string(),
        ]);
    }
    let newest = match (&group.newest_point, group.rpo_ms) {
        (Some(point), Some(age)) => {
            format!("{} recovery points, the newest (epoch {}) {} old", group.points, point.epoch, time(age))
        }
        _ => "no recovery point yet".to_owned(),
    };
    let mut shown = format!(
        "Protected as group {} by policy {}: {newest}\nState: {}: {}\n{volumes}\n",
        group.id, group.policy_name, group.state, group.meaning
    );
    let mut stages = text::table(&["Stage", "Its part", "State", "What it does"], &[1]);
    for stage in &group.rpo_stages {
        let what = match &stage.last_error {
            Some(error) => format!("{} Last error: {error}", stage.explanation),
            None => stage.explanation.clone(),
        };
        stages.add_row([
            stage.stage.clone(),
            stage.ms.map_or("-".to_owned(), time),
            stage.state.to_string(),
            what,
        ]);
    }
    shown += &format!("{stages}\n");
    shown += &super::failover::render_standing(group);
    shown += &super::drill::render(group);
    for warning in &group.warnings {
        shown += &format!("Warning: {warning}\n");
    }
    shown
}
