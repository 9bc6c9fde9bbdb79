//! `seawall group`: what is protected, and what can be done with it.

use std::time::Duration;

use block::{ByteCount, Label};
use clap::{Args, Subcommand};
use control::PointSelector;
use control::fleet::{
    ChangeGroup, ChangeTargets, Confirm, GroupInfo, JobInfo, PointList, PointNow, ResourceId, SampleInfo,
    ServerInfo, StartProof, UnixMillis,
};
use hyper::Method;
use serde::Serialize;
use serde_json::json;

use super::change::{Certain, Common, Watched};
use super::{Fleet, id_of, job, moment, not_there, say_json};
use crate::exit::Exit;
use crate::point::WantedConsistency;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall group list --watch
  seawall group show web
  seawall group point web --consistency application --label before-upgrade --watch
  seawall group change web --policy gold

A group has the name of its machine.")]
pub(crate) struct GroupOptions {
    #[command(subcommand)]
    command: GroupCommand,
}

#[derive(Debug, Subcommand)]
enum GroupCommand {
    /// All of them: how old the newest recovery point is, and why
    #[command(after_help = "Examples:\n  seawall group list\n  seawall group list --watch")]
    List(Watched),
    /// One over all stages, from the disk to the target
    #[command(after_help = "Example:\n  seawall group show web --watch")]
    Show {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        watched: Watched,
    },
    /// Its recovery points, as its target told them last; looking makes it tell them anew within seconds
    #[command(
        after_help = "Examples:\n  seawall group points web\n  seawall group points web --json | jq '.points[-1].epoch'"
    )]
    Points {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        watched: Watched,
    },
    /// Its figures over time: age of the newest point, churn, sent
    #[command(after_help = "Example:\n  seawall group samples web --hours 24 --json")]
    Samples {
        #[command(flatten)]
        which: Which,
        /// The last so many hours; beyond 6 there is a figure each ten minutes
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2160))]
        hours: u32,
        #[command(flatten)]
        common: Common,
    },
    /// Take a recovery point now
    #[command(after_help = "Examples:
  seawall group point web
  seawall group point web --consistency crash --label before-upgrade --watch")]
    Point {
        #[command(flatten)]
        which: Which,
        /// What it should be
        #[arg(long, value_enum, default_value_t)]
        consistency: WantedConsistency,
        /// What to call it
        #[arg(long, value_name = "TEXT", value_parser = crate::point::parse_label)]
        label: Option<Label>,
        #[command(flatten)]
        followed: Followed,
    },
    /// Compare the disks with the replica, and send what differs
    #[command(after_help = "Example:\n  seawall group resync web --watch")]
    Resync {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        followed: Followed,
    },
    /// Try a recovery out: serve its volumes at a point, writable, for a while
    Drill(super::drill::GroupDrillOptions),
    /// Start a machine on a point at its target, and look whether it comes up
    #[command(after_help = "Examples:
  seawall group prove web --watch
  seawall group prove web --point application --expect multi-user.target --within 15m --watch

The machine runs on overlays and without a network; replication goes on, and nothing of it stays but the time that it took, which the
group shows. What is not said is as the group's policy says; a policy can ask for proofs regularly:
  seawall policy change default --set 'proof={\"every_s\":86400,\"expect\":[\"login:\"]}'
Exit status with --watch: 0 when it came up, 3 when it did not. Needs qemu-system-x86 at the target server.")]
    Prove {
        #[command(flatten)]
        which: Which,
        /// Recovery point: latest, application (the newest that is application-consistent), or an epoch's number
        #[arg(long, value_name = "POINT", default_value_t)]
        point: PointSelector,
        /// What its serial console must say; may be given several times
        #[arg(long, value_name = "TEXT")]
        expect: Vec<String>,
        /// How long that may take, as in 15m
        #[arg(long, value_name = "SPAN", value_parser = seawall_target_server::parse_span)]
        within: Option<Duration>,
        /// Which of its target servers starts it, by name
        #[arg(long, value_name = "NAME")]
        target_server: Option<String>,
        #[command(flatten)]
        followed: Followed,
    },
    /// After a committed failover: protect what runs in its place, onto the original disks
    Reverse(super::home::ReverseOptions),
    /// Bring it home: what runs in its place is handed over to the original disks, and its machine is protected again
    #[command(after_help = "Example:
  Stop what runs at the recovery site and unmount its disks, then:
    seawall group failback web --watch

Nothing is lost: the disks are compared until they are equal. Exit status with --watch: 0 when the machine is protected again, 3 when
it could not be done; what was done before stays, and asking again goes on.")]
    Failback {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        followed: Followed,
    },
    /// Fail over to its target, and decide what becomes of that
    Failover(super::failover::GroupFailoverOptions),
    /// Give it another policy or process server
    #[command(after_help = "Examples:
  seawall group change web --policy gold
  seawall group change web --process-server cache2

Exit status 7 when that would shorten retention and a second person must approve it.")]
    Change {
        #[command(flatten)]
        which: Which,
        /// Policy to follow, by name
        #[arg(long, value_name = "NAME", required_unless_present = "process_server")]
        policy: Option<String>,
        /// Process server to go through, by name
        #[arg(long, value_name = "NAME")]
        process_server: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Give it other target servers
    #[command(after_help = "Examples:
  Keep it at two sites:
    seawall group targets web --target-server dr --target-server dr2 --watch
  Move it from dr to dr2:
    seawall group targets web --target-server dr2 --watch

A new one is compared with the disks before it has a point. While that is done no target has new points; those from before stay.
Target servers that are not named are left when every new one has a point; their files stay until a person deletes them there.")]
    Targets {
        #[command(flatten)]
        which: Which,
        /// Target server that is to keep it, by name; may be given several times, and names all of them
        #[arg(long = "target-server", value_name = "NAME", required = true)]
        target_servers: Vec<String>,
        /// Go on although checks warn
        #[arg(long)]
        despite_warnings: bool,
        #[command(flatten)]
        followed: Followed,
    },
    /// Let the fleet forget a group that is not protected any more
    #[command(after_help = "Example:
  seawall group remove web --yes

Its servers serve it no more; their files stay until a person deletes them there.")]
    Remove {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub(super) struct Which {
    /// Group, by its machine's name or by id
    #[arg(value_name = "GROUP")]
    group: String,
}

#[derive(Debug, Serialize)]
struct Listed {
    groups: Vec<GroupInfo>,
}

/// Of what begins a job.
#[derive(Debug, Args)]
pub(super) struct Followed {
    /// Show how it goes on until it has ended
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    common: Common,
}

impl Followed {
    pub(super) fn json(&self) -> bool {
        self.common.json
    }

    pub(super) fn watch(&self) -> bool {
        self.watch
    }

    pub(super) fn place(&self) -> &super::ProfilePlace {
        &self.common.place
    }
}

impl GroupOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            GroupCommand::List(watched)
            | GroupCommand::Show { watched, .. }
            | GroupCommand::Points { watched, .. } => watched.common.json,
            GroupCommand::Point { followed, .. }
            | GroupCommand::Resync { followed, .. }
            | GroupCommand::Failback { followed, .. }
            | GroupCommand::Prove { followed, .. }
            | GroupCommand::Targets { followed, .. } => followed.common.json,
            GroupCommand::Reverse(options) => options.json(),
            GroupCommand::Failover(options) => options.json(),
            GroupCommand::Drill(options) => options.json(),
            GroupCommand::Samples { common, .. }
            | GroupCommand::Change { common, .. }
            | GroupCommand::Remove { common, .. } => common.json,
        }
    }
}

impl Which {
    pub(super) async fn find(&self, fleet: &Fleet) -> anyhow::Result<GroupInfo> {
        let groups: Vec<GroupInfo> = fleet.all("/groups").await?;
        let named =
            |group: &&GroupInfo| group.name.as_str() == self.group || group.id.to_string() == self.group;
        match groups.iter().find(named) {
            Some(group) => Ok(group.clone()),
            None => Err(not_there("group", &self.group, groups.iter().map(|group| group.name.as_str()))),
        }
    }
}

pub(crate) async fn run(options: &GroupOptions) -> anyhow::Result<Exit> {
    match &options.command {
        GroupCommand::List(watched) => {
            let fleet = Fleet::open(&watched.common.place)?;
            let look = || async { Ok(Listed { groups: fleet.all("/groups").await? }) };
            watched.show(look, |listed| render(&listed.groups)).await
        }
        GroupCommand::Show { which, watched } => {
            let fleet = Fleet::open(&watched.common.place)?;
            let path = format!("/groups/{}", which.find(&fleet).await?.id);
            watched.show(|| fleet.get::<GroupInfo>(&path), super::machine::render_group).await
        }
        GroupCommand::Points { which, watched } => {
            let fleet = Fleet::open(&watched.common.place)?;
            let path = format!("/groups/{}/points", which.find(&fleet).await?.id);
            watched.show(|| fleet.get::<PointList>(&path), render_points).await
        }
        GroupCommand::Samples { which, hours, common } => {
            let fleet = Fleet::open(&common.place)?;
            let group = which.find(&fleet).await?;
            let step = if *hours <= 6 { 30 } else { 600 };
            let from = UnixMillis::now().0 - i64::from(*hours) * 3_600_000;
            let path = format!("/groups/{}/samples?step_s={step}&from={from}", group.id);
            let samples: Vec<SampleInfo> = fleet.get(&path).await?;
            match common.json {
                true => say_json(&json!({ "samples": samples }))?,
                false => text::say(&render_samples(&samples))?,
            }
            Ok(Exit::Done)
        }
        GroupCommand::Point { which, consistency, label, followed } => {
            let asked = PointNow { consistency: (*consistency).into(), label: label.clone() };
            begin(which, "point", &json!(asked), followed).await
        }
        GroupCommand::Failover(options) => super::failover::run(options).await,
        GroupCommand::Resync { which, followed } => begin(which, "resync", &json!({}), followed).await,
        GroupCommand::Change { which, policy, process_server, common } => {
            let fleet = Fleet::open(&common.place)?;
            let group = which.find(&fleet).await?;
            let mut asked = ChangeGroup::default();
            if let Some(named) = policy {
                asked.policy = Some(super::policy::find(&fleet, named).await?.id);
            }
            if let Some(named) = process_server {
                let servers: Vec<ServerInfo> = fleet.all("/process-servers").await?;
                let servers = servers.iter().map(|server| (server.name.as_str(), &server.id));
                asked.process_server = Some(id_of("process server", named, servers)?);
            }
            let acted = fleet.act(Method::PATCH, &format!("/groups/{}", group.id), &asked).await?;
            acted.say(common, &format!("{} is changed.", group.name))
        }
        GroupCommand::Targets { which, target_servers, despite_warnings, followed } => {
            let fleet = Fleet::open(followed.place())?;
            let mut asked = ChangeTargets { target_servers: Vec::new(), despite_warnings: *despite_warnings };
            for named in target_servers {
                asked.target_servers.push(target_named(&fleet, named).await?);
            }
            begin(which, "targets", &json!(asked), followed).await
        }
        GroupCommand::Drill(options) => super::drill::run(options).await,
        GroupCommand::Reverse(options) => super::home::reverse(options).await,
        GroupCommand::Prove { which, point, expect, within, target_server, followed } => {
            let asked = StartProof {
                point: *point,
                expect: (!expect.is_empty()).then(|| expect.clone()),
                within_s: within.map(|within| within.as_secs()),
                target_server: match target_server {
                    Some(named) => Some(target_named(&Fleet::open(followed.place())?, named).await?),
                    None => None,
                },
            };
            begin(which, "prove", &json!(asked), followed).await
        }
        GroupCommand::Failback { which, certain, followed } => {
            let group = which.find(&Fleet::open(followed.place())?).await?;
            let about = "What runs in its place is closed to everybody, and its machine's disks become what that has.";
            certain.ask("bring home", group.name.as_str(), about)?;
            let asked = Confirm { confirm: group.name.to_string() };
            begin(which, "failback", &json!(asked), followed).await
        }
        GroupCommand::Remove { which, certain, common } => {
            let fleet = Fleet::open(&common.place)?;
            let group = which.find(&fleet).await?;
            certain.ask(
                "remove group",
                group.name.as_str(),
                "The fleet will forget this group; files at its target stay.",
            )?;
            let acted = fleet.destroy(&format!("/groups/{}", group.id), group.name.as_str()).await?;
            acted.say(common, &format!("The group {} is removed.", group.name))
        }
    }
}

/// The target server of this name.
pub(super) async fn target_named(fleet: &Fleet, named: &str) -> anyhow::Result<ResourceId> {
    let servers: Vec<ServerInfo> = fleet.all("/target-servers").await?;
    id_of("target server", named, servers.iter().map(|server| (server.name.as_str(), &server.id)))
}

pub(super) async fn begin(
    which: &Which,
    act: &str,
    asked: &serde_json::Value,
    followed: &Followed,
) -> anyhow::Result<Exit> {
    let fleet = Fleet::open(&followed.common.place)?;
    let group = which.find(&fleet).await?;
    let begun: JobInfo = fleet.post(&format!("/groups/{}/{act}", group.id), asked).await?;
    job::follow(&fleet, begun, followed.watch, followed.common.json).await
}

fn age(ms: Option<i64>) -> String {
    ms.map_or("none".to_owned(), |ms| {
        text::span(Duration::from_millis(u64::try_from(ms).unwrap_or_default()))
    })
}

fn render(groups: &[GroupInfo]) -> String {
    if groups.is_empty() {
        return "Nothing is protected; `seawall protect MACHINE DISK...` does it.\n".to_owned();
    }
    let mut table = text::table(
        &["Group", "State", "Newest point", "Points", "Policy", "Churn", "Not applied", "What to do"],
        &[2, 3, 5, 6],
    );
    for group in groups {
        table.add_row([
            group.name.to_string(),
            if group.protected { group.state.to_string() } else { "not protected".to_owned() },
            age(group.rpo_ms),
            group.points.to_string(),
            group.policy_name.to_string(),
            text::rate(group.churn_bytes_per_s),
            ByteCount(group.lag_bytes).to_string(),
            group.what_to_do.clone(),
        ]);
    }
    format!("{table}\n")
}

fn render_points(list: &PointList) -> String {
    let Some(told) = list.time else {
        return "No target has told its points yet; ask again in a few seconds.\n".to_owned();
    };
    let mut table = text::table(&["Point", "Time", "Consistency", "Label"], &[0]);
    for point in &list.points {
        let label = point.note.label.as_ref();
        table.add_row([
            point.epoch.to_string(),
            text::instant(point.cut_time).0,
            point.consistency.to_string(),
            label.map(ToString::to_string).unwrap_or_default(),
        ]);
    }
    let more = match list.omitted {
        0 => String::new(),
        omitted => format!("{omitted} more are not listed; `seawall points` at the target shows all.\n"),
    };
    format!("As told at {}:\n{table}\n{more}", moment(told))
}

fn render_samples(samples: &[SampleInfo]) -> String {
    if samples.is_empty() {
        return "There are no figures of that time.\n".to_owned();
    }
    let mut table =
        text::table(&["Time", "Newest point", "Written", "Sent", "To be read", "Not sent"], &[1, 2, 3, 4, 5]);
    let bytes = |bytes: i64| ByteCount(u64::try_from(bytes).unwrap_or_default()).to_string();
    for sample in samples {
        table.add_row([
            moment(sample.time),
            age(Some(sample.rpo_ms).filter(|ms| *ms >= 0)),
            text::rate(sample.churn_bytes_per_s as f64),
            text::rate(sample.sent_bytes_per_s as f64),
            bytes(sample.dirty_bytes),
            bytes(sample.unsent_bytes),
        ]);
    }
    format!("{table}\n")
}
