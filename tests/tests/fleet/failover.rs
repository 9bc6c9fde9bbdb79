//! Failovers that the config server leads, with real parts.

use anyhow::ensure;
use block::Generation;
use control::PointSelector;
use control::fleet::{StartFailover, StepInfo};
use scratch::{LoopDisk, run};
use seawall_tests::{root, text};
use serde::Serialize;

use super::*;

pub(super) fn over() -> StartFailover {
    StartFailover {
        confirm: "web".into(),
        point: PointSelector::Latest,
        planned: false,
        promote: false,
        target_server: None,
    }
}

impl Fleet {
    /// Does an act on a group, and waits until its job has ended well.
    pub(super) async fn act(&self, group: &GroupInfo, act: &str, body: impl Serialize) -> JobInfo {
        let client = self.client().await;
        let began = Instant::now();
        let job: JobInfo = client.post(&format!("/groups/{}/{act}", group.id), &body).await.unwrap();
        let job = ended(&client, &job).await;
        println!("{act}: {} ms", began.elapsed().as_millis());
        assert_eq!(job.state, JobState::Done, "{act}: {job:#?}");
        job
    }

    pub(super) async fn group(&self, group: &GroupInfo) -> GroupInfo {
        self.client().await.get(&format!("/groups/{}", group.id)).await.unwrap()
    }

    /// Starts the target server again, as after its machine did.
    async fn restart_target(&mut self) {
        self.target.take().unwrap().shutdown().await;
        let file = self.base.path().join("dr/part.toml");
        let config = seawall_target_server::Config::load(&file).unwrap();
        self.target = Some(FleetTargetServer::start(config).await.unwrap());
    }
}

/// Unplanned: cancelled, decided anew, kept for good, and protected again; the target server is started again in between.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_goes_over_and_back_or_for_good() {
    let mut fleet = Fleet::new().await;
    let machine = fleet.machine("web").await;
    let group = fleet.protect(&machine).await;
    machine.write(90);
    replicated(&fleet, &machine, &group).await;
    let before = machine.content();

    fleet.act(&group, "failover", StartFailover { promote: true, ..over() }).await;
    let standing = fleet.group(&group).await.failover.unwrap();
    assert!(standing.promoted.is_some() && standing.generation == Generation(2), "{standing:?}");
    machine.write(91);
    fleet.restart_target().await;
    // The source is out, also after the restart.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(fleet.replica(&group), before);
    until("the target reports again", || async {
        let standing = fleet.group(&group).await.failover?;
        standing.promoted.map(|_| ())
    })
    .await;
    fleet.act(&group, "demote", serde_json::json!({})).await;
    fleet.act(&group, "failover/cancel", Confirm { confirm: "web".into() }).await;
    assert!(fleet.group(&group).await.failover.is_none());
    replicated(&fleet, &machine, &group).await;

    let before = machine.content();
    fleet.act(&group, "failover", over()).await;
    machine.write(92);
    let job = fleet.act(&group, "failover/commit", Confirm { confirm: "web".into() }).await;
    let states: Vec<StepState> = job.steps.iter().map(|step: &StepInfo| step.state).collect();
    assert_eq!(states, [StepState::Passed; 3], "{job:#?}");
    let kept = fleet.group(&group).await;
    assert!(!kept.protected && kept.generation == Generation(2), "{kept:#?}");
    assert_eq!(fleet.replica(&group), before, "what the machine wrote later is given up");

    // The machine's disk is the newest again because somebody has decided it: only what differs moves, in the new history.
    let again = fleet.protect(&machine).await;
    assert!(again.generation == Generation(2) && again.failover.is_none(), "{again:#?}");
    replicated(&fleet, &machine, &group).await;
    fleet.end(vec![machine]).await;
}

/// Planned, on a real disk: handed over with proof, over, released, and home again; the agent is started again while the disk is handed
/// over, and keeps following it.
#[tokio::test(flavor = "multi_thread")]
async fn kernel_a_planned_failover_loses_nothing() -> anyhow::Result<()> {
    if !root("kernel_a_planned_failover_loses_nothing") {
        return Ok(());
    }
    let fleet = Fleet::new().await;
    let disk = LoopDisk::create(&fleet.base.path().join("disk.img"), DISK_BYTES as u64)?;
    let mut machine = fleet.machine_with("web", "ebpf", disk.device()).await;
    let group = fleet.protect(&machine).await;
    machine.write(90);
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    let job = fleet.act(&group, "failover", StartFailover { planned: true, ..over() }).await;
    ensure!(
        job.steps[0].code == "hand-over" && job.steps[0].message.contains("4.0 MiB compared"),
        "{job:#?}"
    );
    let there = fleet.group(&group).await;
    ensure!(there.handed_over && there.failover.is_some(), "{there:#?}");
    ensure!(fleet.replica(&group) == machine.content());
    let refused = std::fs::OpenOptions::new().write(true).open(disk.device()).and_then(|file| {
        file.write_all_at(&[1; 4096], 0)?;
        file.sync_all()
    });
    ensure!(refused.is_err(), "nothing can be written to a disk that was handed over");

    // The disk stays what it is while its agent is away, and the agent follows it again: a scan would be another capture.
    machine.agent.take().unwrap().shutdown().await;
    machine.agent = Some(start_agent(&machine.file));
    until("the agent reports the disk as handed over", || async {
        let report = machine.agent.as_ref()?.report()?;
        (report.handed_over && report.mode() != control::CaptureMode::Scan && !report.volumes.is_empty())
            .then_some(())
    })
    .await;
    until("the config server hears of it", || async { fleet.group(&group).await.handed_over.then_some(()) })
        .await;

    fleet.act(&group, "failover/cancel", Confirm { confirm: "web".into() }).await;
    fleet.act(&group, "release", serde_json::json!({})).await;
    ensure!(!fleet.group(&group).await.handed_over);
    machine.write(91);
    run("blockdev", &["--flushbufs", text(disk.device())])?;
    replicated(&fleet, &machine, &group).await;

    // For good: the agent follows nothing any more, and the disk is released all the same.
    fleet.act(&group, "failover", StartFailover { planned: true, promote: true, ..over() }).await;
    fleet.act(&group, "failover/commit", Confirm { confirm: "web".into() }).await;
    ensure!(!fleet.group(&group).await.protected);
    ensure!(fleet.group(&group).await.failover.is_some_and(|standing| standing.committed));
    fleet.act(&group, "release", serde_json::json!({})).await;
    machine.write(92);
    fleet.end(vec![machine]).await;
    Ok(())
}
