use std::time::Duration;

use control::PointSelector;
use control::fleet::{
    Confirm, GroupInfo, JobInfo, JobState, MachineInfo, Page, Protect, ResourceId, ServerInfo, StartFailover,
    StepState, VolumeChoice,
};
use enrol::Client;
use serde_json::json;

use crate::parts::Parts;
use crate::support::{Site, on_both, problem};

on_both! {
    a_group_comes_home_and_its_machine_is_protected_again,
    the_way_home_outlives_the_config_server_at_every_step
}

fn sure() -> Confirm {
    Confirm { confirm: "web".into() }
}

/// The original site, the other one, and what a person does.
struct Two {
    operator: Client,
    /// The machine web, kept at dr.
    web: Parts,
    group: GroupInfo,
    /// The machine spare, and the target server at the original site.
    spare: Parts,
    spare_id: ResourceId,
    home: ResourceId,
}

impl Two {
    /// The machine web has failed over, for good.
    async fn committed(site: &Site) -> Two {
        let operator = site.administrator().await;
        let mut web = Parts::enrol(site).await;
        let group = web.protect(&operator).await;
        let path = format!("/groups/{}", group.id);
        let over = StartFailover {
            confirm: "web".into(),
            point: PointSelector::Latest,
            planned: false,
            promote: false,
            target_server: None,
        };
        let job: JobInfo = operator.post(&format!("{path}/failover"), &over).await.unwrap();
        web.until_ended(&operator, job).await;
        let job: JobInfo = operator.post(&format!("{path}/failover/commit"), &sure()).await.unwrap();
        web.until_ended(&operator, job).await;
        let mut spare = Parts::enrol_as(site, ["spare", "hub2", "home"]).await;
        spare.round().await;
        let machines: Page<MachineInfo> = operator.get("/machines").await.unwrap();
        let spare_id =
            machines.items.iter().find(|machine| machine.name.as_str() == "spare").unwrap().id.clone();
        let servers: Page<ServerInfo> = operator.get("/target-servers").await.unwrap();
        let home = servers.items.iter().find(|server| server.name.as_str() == "home").unwrap().id.clone();
        web.done_at_target.clear();
        Two { operator, web, group, spare, spare_id, home }
    }

    fn reverse(&self) -> Protect {
        let disk = VolumeChoice { adopt: Some("/dev/vdb".into()), ..VolumeChoice::of("/dev/nbd0") };
        Protect {
            volumes: vec![disk],
            policy: None,
            process_server: None,
            target_servers: vec![self.home.clone()],
            despite_warnings: false,
            reverses: Some(self.group.id),
        }
    }

    async fn protect_spare(&self, asked: &Protect) -> Result<JobInfo, enrol::EnrolError> {
        self.operator.post(&format!("/machines/{}/protect", self.spare_id), asked).await
    }

    async fn refused(&self, asked: Protect, says: &str) {
        let problem = problem(self.protect_spare(&asked).await);
        assert!(problem.detail.contains(says), "{problem:?}");
    }

    async fn fail_back(&self) -> Result<JobInfo, enrol::EnrolError> {
        self.operator.post(&format!("/groups/{}/failback", self.group.id), &sure()).await
    }

    async fn now(&self) -> GroupInfo {
        self.operator.get(&format!("/groups/{}", self.group.id)).await.unwrap()
    }

    async fn job(&self, job: &JobInfo) -> JobInfo {
        self.operator.get(&format!("/jobs/{}", job.id)).await.unwrap()
    }

    async fn round(&mut self) {
        self.web.round().await;
        self.spare.round().await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }

    async fn until(&mut self, job: &JobInfo, state: JobState) -> JobInfo {
        for _ in 0..600 {
            self.round().await;
            let job = self.job(job).await;
            if job.state.ended() {
                assert_eq!(job.state, state, "{job:#?}");
                return job;
            }
        }
        panic!("the job does not end: {:#?}", self.job(job).await);
    }
}

fn state(job: &JobInfo, code: &str) -> StepState {
    job.steps.iter().find(|step| step.code == code).unwrap().state
}

async fn a_group_comes_home_and_its_machine_is_protected_again(site: Site) {
    let mut two = Two::committed(&site).await;
    let nothing = problem(two.fail_back().await);
    assert!(nothing.detail.contains("Nothing is protected in place of web"), "{nothing:?}");

    // What does not make sense is refused, and says what would.
    let mut plain = two.reverse();
    plain.volumes = vec![VolumeChoice::of("/dev/nbd0")];
    two.refused(plain, "no disk adopts one").await;
    let mut some = two.reverse();
    some.volumes.push(VolumeChoice::of("/dev/nbd1"));
    two.refused(some, "1 of 2 disks").await;
    let mut relative = two.reverse();
    relative.volumes[0].adopt = Some("serial:1234".into());
    two.refused(relative, "no path of a disk").await;
    two.refused(Protect { target_servers: vec![], ..two.reverse() }, "disks are adopted at one").await;
    let own = problem(
        two.operator
            .post::<_, JobInfo>(&format!("/machines/{}/protect", two.group.machine), &two.reverse())
            .await,
    );
    assert!(own.detail.contains("protected before"), "{own:?}");

    // Its volumes are written at the recovery site meanwhile.
    let path = format!("/groups/{}", two.group.id);
    let job: JobInfo = two.operator.post(&format!("{path}/promote"), &json!({})).await.unwrap();
    two.until(&job, JobState::Done).await;
    two.web.standing.promoted.as_mut().unwrap().open = 1;
    let job = two.protect_spare(&two.reverse()).await.unwrap();
    two.until(&job, JobState::Done).await;
    let told = two.spare.told_target.groups[0].adopt.clone();
    assert_eq!((told[0].name.as_str(), told[0].device.as_str(), told.len()), ("nbd0", "/dev/vdb", 1));
    assert!(two.web.told_target.groups[0].adopt.is_empty());
    let reverse = two.now().await.reversed_by.unwrap();
    two.refused(two.reverse(), "is protected already").await;

    // Its own machine is not protected beside that.
    let disk = VolumeChoice::of("/dev/vdb");
    let beside = Protect {
        volumes: vec![disk],
        target_servers: vec![],
        despite_warnings: true,
        reverses: None,
        ..two.reverse()
    };
    two.web.standing.promoted.as_mut().unwrap().open = 0;
    let job: JobInfo =
        two.operator.post(&format!("/machines/{}/protect", two.group.machine), &beside).await.unwrap();
    let job = two.until(&job, JobState::Failed).await;
    assert_eq!(state(&job, "history"), StepState::Failed);
    two.web.standing.promoted.as_mut().unwrap().open = 1;

    // Not before the original disks have more than what was found on them.
    let early = problem(two.fail_back().await);
    assert!(early.detail.contains("are not what spare has"), "{early:?}");
    two.spare.points = 2;
    two.round().await;
    let wrong: Result<JobInfo, _> =
        two.operator.post(&format!("{path}/failback"), &Confirm { confirm: "spare".into() }).await;
    assert!(problem(wrong).detail.contains("not the name"));
    let job = two.fail_back().await.unwrap();
    let promote: Result<JobInfo, _> = two.operator.post(&format!("{path}/demote"), &json!({})).await;
    let under_way = problem(promote);
    assert!(under_way.detail.contains("exported") || under_way.detail.contains("under way"), "{under_way:?}");

    // What is written at the recovery site is waited for, and nothing is let go before.
    for _ in 0..100 {
        two.round().await;
        if state(&two.job(&job).await, "demote") == StepState::Running {
            break;
        }
    }
    for _ in 0..10 {
        two.round().await;
    }
    let waits = two.job(&job).await;
    assert_eq!(
        (state(&waits, "commit"), state(&waits, "demote")),
        (StepState::Passed, StepState::Running),
        "{waits:#?}"
    );
    assert!(waits.message.contains("exported for writing"), "{waits:#?}");
    assert_eq!(two.spare.told_target.groups.len(), 1, "the disks are still held");
    assert!(two.spare.handed_over && !two.now().await.protected);
    two.web.standing.promoted.as_mut().unwrap().open = 0;
    let done = two.until(&job, JobState::Done).await;
    assert!(done.steps.iter().all(|step| step.state == StepState::Passed), "{done:#?}");
    assert_eq!(two.spare.done_at_target, ["fail-over", "commit-failover"]);
    assert_eq!(two.web.done_at_target, ["promote", "demote"]);
    assert!(two.spare.told_target.groups.is_empty(), "the disks are let go");
    let home = two.now().await;
    assert!(home.protected && home.reversed_by.is_none() && home.failover.is_none(), "{home:?}");
    assert_eq!(home.generation.0, 2, "what its target follows");
    let gone = problem(two.operator.get::<GroupInfo>(&format!("/groups/{reverse}")).await);
    assert_eq!(gone.code.as_str(), "not-found");
}

/// At each step the config server is ended when it has asked and not heard: it goes on, and no step is done twice.
async fn the_way_home_outlives_the_config_server_at_every_step(mut site: Site) {
    let mut two = Two::committed(&site).await;
    let job = two.protect_spare(&two.reverse()).await.unwrap();
    two.until(&job, JobState::Done).await;
    two.spare.points = 2;
    two.round().await;
    let job = two.fail_back().await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..600 {
        let now = two.job(&job).await;
        if now.state.ended() {
            break;
        }
        let steps: Vec<StepState> = now.steps.iter().map(|step| step.state).collect();
        if seen.last() != Some(&steps) {
            seen.push(steps);
            site.stop().await;
            site.start().await;
            two.operator = site.administrator().await;
        }
        two.round().await;
    }
    let done = two.job(&job).await;
    assert_eq!(done.state, JobState::Done, "{done:#?}");
    assert!(seen.len() >= 3, "it was ended at {} steps", seen.len());
    assert_eq!(two.spare.done_at_target, ["fail-over", "commit-failover"]);
    let handed: Vec<_> =
        two.spare.asked.iter().filter(|(_, kind)| *kind == control::fleet::TaskKind::HandOver).collect();
    assert_eq!(handed.len(), 1);
    assert!(two.now().await.protected);
    let jobs: Page<JobInfo> = two.operator.get("/jobs").await.unwrap();
    let protections =
        jobs.items.iter().filter(|job| job.kind == control::fleet::JobKind::Protect && job.subject == "web");
    assert_eq!(protections.count(), 2, "the first one, and one more");
}
