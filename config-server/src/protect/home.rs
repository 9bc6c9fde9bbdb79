//! The job that brings a group home: what runs in its place is handed over with proof that nothing is lost, the original disks become
//! that, and its machine is protected as before.
//!
//! The order, and what breaks when it is changed: what runs is closed before its last point is made (else what is written after that is
//! lost), nothing is let go at the original site before the failover there is committed (else the side that ran could still send), and
//! before writes at the recovery site's target have ended (else there were two writable sides). The machine is protected last: from then on
//! its disks are the newest state.

use std::collections::BTreeMap;

use block::{Epoch, Generation, GroupId};
use control::PointSelector;
use control::fleet::{
    EventKind, GroupInfo, JobInfo, JobKind, JobState, PartRole, ProtectedVolume, ResourceId, StepInfo,
    StepState, TaskKind,
};
use serde::{Deserialize, Serialize};

use super::Plan;
use super::failover::{by, nothing_under_way, reports, taken_up};
use crate::app::App;
use crate::fault::{Answer, conflict, internal};
use crate::job::{Held, NewJob, insert_job, step, task_of};
use crate::store::{Act, Counter, Said, count, say};
use crate::view;

/// What the job is to do, with everything chosen, and how far it has come.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Home {
    group: GroupId,
    /// What runs in its place, and where that is kept: on the original disks.
    reverse: GroupId,
    other: ResourceId,
    target: ResourceId,
    /// The last state of what runs, from the hand-over on.
    point: Option<Epoch>,
    /// How the machine was protected, and is to be again.
    plan: Plan,
    machine: ResourceId,
    /// The job that does it, from when it has begun.
    protecting: Option<ResourceId>,
}

/// Makes the job, when what the parts reported last lets it.
pub(crate) async fn begin(app: &App, act: &mut Act, id: &GroupId, created_by: String) -> Answer<JobInfo> {
    let group = view::group(&app.store, id).await?;
    let name = &group.name;
    let Some(reverse) = group.reversed_by else {
        return Err(conflict(
            format!("Nothing is protected in place of {name}"),
            "Protect what runs in its place, and have it adopt the original disks: `seawall group reverse`, or the group's page.",
        ));
    };
    let reverse = view::group(&app.store, &reverse).await?;
    let [target] = reverse.target_servers.as_slice() else {
        return Err(conflict(
            format!(
                "{} target servers keep {}; the original disks are at one",
                reverse.target_servers.len(),
                reverse.name
            ),
            "Give it the one at the original site only: `seawall group targets`.",
        ));
    };
    let over = reverse.failover.as_ref().is_some_and(|standing| standing.failover.is_some());
    if !over && !reverse.handed_over && (reverse.newest_point.is_none() || reverse.points < 2) {
        // The first one is what was found on the original disks.
        return Err(conflict(
            format!("The original disks of {name} are not what {} has", reverse.name),
            "Wait for the first recovery point of what runs; `seawall group show` says how far it is.",
        ));
    }
    for machine in [&reverse.machine, &group.machine] {
        let machine = view::machine(&app.store, machine).await?;
        reports(machine.seen, &format!("The agent of {}", machine.name), "Start seawall-agent there.")?;
    }
    for server in [target].into_iter().chain(&group.target_servers) {
        let server = view::server(&app.store, PartRole::TargetServer, server).await?;
        reports(server.seen, &format!("The target server {}", server.name), "Start it.")?;
    }
    for group in [&group, &reverse] {
        nothing_under_way(act, group).await?;
    }
    let home = Home {
        group: *id,
        reverse: reverse.id,
        other: reverse.machine.clone(),
        target: target.clone(),
        point: None,
        plan: as_before(&group),
        machine: group.machine.clone(),
        protecting: None,
    };
    let new = NewJob {
        kind: JobKind::FailBack,
        subject: name.to_string(),
        subject_id: id.to_string(),
        body: write(&home)?,
        steps: steps(),
        created_by,
    };
    insert_job(act, new).await
}

/// A protection as the group's last one; that a failover was committed is what it is about.
fn as_before(group: &GroupInfo) -> Plan {
    let volume = |volume: &control::fleet::VolumeInfo| ProtectedVolume {
        name: volume.name.clone(),
        device: volume.device.clone(),
    };
    Plan {
        group: group.id,
        volumes: group.volumes.iter().map(volume).collect(),
        policy: group.policy.clone(),
        process_server: group.process_server.clone(),
        target_servers: group.target_servers.clone(),
        despite_warnings: true,
        protected: false,
        leaving: Vec::new(),
        adopt: BTreeMap::new(),
        reverses: None,
    }
}

fn write(home: &Home) -> Answer<String> {
    serde_json::to_string(home).map_err(|error| internal("keep a job", error))
}

fn steps() -> Vec<StepInfo> {
    vec![
        step("hand-over", "What runs in its place is handed over, and proven to be equal"),
        step("fail-over", "The original disks become that"),
        step("commit", "It is kept for good"),
        step("demote", "Nothing is written at the recovery site any more"),
        step("declare", "What ran in its place is not protected any more"),
        step("free", "The original disks are let go"),
        step("protect", "The machine is protected as before"),
    ]
}

/// Brings the job as far as it comes now.
pub(super) async fn advance(app: &App, act: &mut Act, held: &mut Held) -> Answer<()> {
    let mut home: Home = serde_json::from_str(&held.body).map_err(|error| internal("read a job", error))?;
    if held.step("declare").state != StepState::Passed {
        return advance_there(app, act, held, &mut home).await;
    }
    if held.step("free").state != StepState::Passed {
        // A process server that forgets a group starts anew, and the machine is to reach it.
        let waits_for = match (
            taken_up(app, act, &home.target, PartRole::TargetServer).await?.0,
            taken_up(app, act, &home.plan.process_server, PartRole::ProcessServer).await?.0,
        ) {
            (false, _) => Some("Waiting for the target server at the original site to let go of the disks."),
            (true, false) => Some("Waiting for the process server to hear of it."),
            (true, true) => None,
        };
        if let Some(message) = waits_for {
            held.job.message = message.to_owned();
            held.set("free", StepState::Running, message, "");
            return Ok(());
        }
        held.set("free", StepState::Passed, "The machine may use its disks.", "");
        held.job.percent = 70;
    }
    advance_protection(app, act, held, &mut home).await
}

/// Until the original disks are the newest state, and nothing is written anywhere else.
async fn advance_there(app: &App, act: &mut Act, held: &mut Held, home: &mut Home) -> Answer<()> {
    let (target, reverse) = (home.target.clone(), home.reverse);
    let point = match home.point {
        Some(point) => point,
        None => {
            let Some(asked) = by(app, act, held, "hand-over", &home.other, TaskKind::HandOver).await? else {
                return Ok(());
            };
            let Some(epoch) = asked.result["epoch"].as_u64() else {
                held.set("hand-over", StepState::Failed, "The agent names no point.", "Upgrade the agent.");
                held.fail("The machine handed over, and did not say to which point; release its disks.");
                return Ok(());
            };
            // Kept with the job: whoever goes on with it must not hand over again.
            home.point = Some(Epoch(epoch));
            held.body = write(home)?;
            held.job.percent = 30;
            Epoch(epoch)
        }
    };
    let task = TaskKind::FailOver { group: reverse, point: PointSelector::Epoch(point) };
    let Some(over) = by(app, act, held, "fail-over", &target, task).await? else { return Ok(()) };
    let generation = Generation(over.result["generation"].as_u64().unwrap_or_default());
    let task = TaskKind::CommitFailover { group: reverse, generation };
    if by(app, act, held, "commit", &target, task).await?.is_none() {
        return Ok(());
    }
    if held.step("demote").state != StepState::Passed && !demoted(app, act, held, home).await? {
        return Ok(());
    }
    sqlx::query("UPDATE protection_groups SET state = 'removed' WHERE id = $1")
        .bind(reverse.to_string())
        .execute(&mut **act)
        .await?;
    sqlx::query("UPDATE protection_groups SET reversed_by = '' WHERE id = $1")
        .bind(home.group.to_string())
        .execute(&mut **act)
        .await?;
    count(act, Counter::Declared).await?;
    let message = format!("{} has come home: its original disks are the newest state", held.job.subject);
    say(act, Said::new(EventKind::Declared, format!("groups/{}", home.group), message)).await?;
    held.set(
        "declare",
        StepState::Passed,
        "What it has captured and kept is let go; its files stay where they are.",
        "",
    );
    held.job.percent = 60;
    // What is declared counts from the end of this act on.
    Ok(())
}

/// Whether nothing is written at the recovery site's target any more.
async fn demoted(app: &App, act: &mut Act, held: &mut Held, home: &Home) -> Answer<bool> {
    let group = view::group(&app.store, &home.group).await?;
    // Once it was asked its answer counts, whatever is reported meanwhile.
    let asked = task_of(act, &held.job, "demote").await?.is_some();
    let Some(standing) = group.failover.filter(|standing| asked || standing.promoted.is_some()) else {
        held.set("demote", StepState::Passed, "Its volumes are not written there.", "");
        return Ok(true);
    };
    match standing.promoted {
        Some(promoted) if promoted.open > 0 && !asked => {
            let message =
                format!("Waiting until {} volumes are not exported for writing any more.", promoted.open);
            held.job.message.clone_from(&message);
            let mend = "Disconnect what used them (as with nbd-client -d), and end the exports: `seawall export stop` at the target.";
            held.set("demote", StepState::Running, message, mend);
            Ok(false)
        }
        _ => {
            let task = TaskKind::Demote { group: home.group };
            Ok(by(app, act, held, "demote", &standing.target_server, task).await?.is_some())
        }
    }
}

async fn advance_protection(app: &App, act: &mut Act, held: &mut Held, home: &mut Home) -> Answer<()> {
    let Some(id) = &home.protecting else {
        if view::group(&app.store, &home.group).await?.protected {
            held.set("protect", StepState::Passed, "Somebody has protected it meanwhile.", "");
            held.done(format!("{} is home, and protected.", held.job.subject));
            return Ok(());
        }
        let plan = serde_json::to_string(&home.plan).map_err(|error| internal("keep a job", error))?;
        let new = NewJob {
            kind: JobKind::Protect,
            subject: held.job.subject.clone(),
            subject_id: home.machine.to_string(),
            body: plan,
            steps: super::steps(),
            created_by: held.job.created_by.clone(),
        };
        match insert_job(act, new).await {
            Ok(job) => {
                held.set("protect", StepState::Running, format!("Job {} does it.", job.id), "");
                home.protecting = Some(job.id);
                held.body = write(home)?;
            }
            // Somebody is about to.
            Err(fault) if fault.is(control::fleet::ProblemCode::Conflict) => {
                let message = fault.problem.detail;
                held.set("protect", StepState::Running, message, "");
            }
            Err(fault) => return Err(fault),
        }
        return Ok(());
    };
    let row = sqlx::query("SELECT * FROM jobs WHERE id = $1").bind(id.as_str()).fetch_one(&mut **act).await?;
    let job = view::job_of_row(&row, true)?;
    match job.state {
        JobState::Done => {
            held.set("protect", StepState::Passed, job.message, "");
            held.done(format!("{} is home, and protected.", held.job.subject));
        }
        JobState::Failed | JobState::Cancelled => {
            let failed = job.steps.iter().find(|step| step.state == StepState::Failed);
            let why = failed.map_or(job.message, |step| step.message.clone());
            let mend = failed.map_or("", |step| step.mend.as_str());
            let mend = format!("{mend} Then protect the machine again (despite the warning of its history).");
            held.set("protect", StepState::Failed, why.clone(), mend.trim_start());
            held.fail(format!("{} is home, and not protected: {why}", held.job.subject));
        }
        _ => {
            held.job.message.clone_from(&job.message);
            held.set("protect", StepState::Running, job.message, "");
        }
    }
    Ok(())
}
