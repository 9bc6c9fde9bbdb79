//! Several target servers: a group that two keep, and one that moves from one to another.

use control::fleet::{ChangeTargets, Policy, ResourceId};

use seawall_tests::{GRANULE, random, root};

use super::*;

impl Fleet {
    /// One more target server, by its name.
    async fn another_target(&self, name: &str) -> (FleetTargetServer, ResourceId) {
        let rest = "listen = \"127.0.0.1:0\"\ncredentials = \"state/credentials\"\ndata = \"data\"\n";
        let file = self.enrol(PartRole::TargetServer, name, rest).await;
        let config = seawall_target_server::Config::load(&file).unwrap();
        std::fs::create_dir(&config.data).unwrap();
        (FleetTargetServer::start(config).await.unwrap(), self.target_named(name).await)
    }

    async fn target_named(&self, name: &str) -> ResourceId {
        let servers: Page<ServerInfo> = self.client().await.get("/target-servers").await.unwrap();
        servers.items.into_iter().find(|server| server.name.as_str() == name).unwrap().id
    }

    async fn protect_at(&self, machine: &Machine, targets: Vec<ResourceId>) -> GroupInfo {
        let client = self.client().await;
        until("the targets report", || async {
            let servers: Page<ServerInfo> = client.get("/target-servers").await.unwrap();
            servers.items.iter().all(|server| server.seen.is_some()).then_some(())
        })
        .await;
        self.reporting(&client).await;
        let asked = Protect {
            volumes: vec![VolumeChoice {
                name: Some("data".parse().unwrap()),
                ..VolumeChoice::of(machine.disk.display().to_string())
            }],
            policy: None,
            process_server: None,
            target_servers: targets,
            despite_warnings: true,
            reverses: None,
        };
        let job: JobInfo =
            client.post(&format!("/machines/{}/protect", machine.info.id), &asked).await.unwrap();
        let job = ended(&client, &job).await;
        assert_eq!(job.state, JobState::Done, "{job:#?}");
        client.get(&format!("/groups/{}", machine.info.group)).await.unwrap()
    }

    async fn arrives_at(&self, name: &str, machine: &Machine, group: &GroupInfo) {
        let dir = self.base.path().join(name).join("data").join(group.id.to_string());
        until(&format!("what the machine wrote is at {name}"), || async {
            let image = find(&dir, "replica.img")?;
            (std::fs::read(image).ok()? == machine.content()).then_some(())
        })
        .await;
    }
}

/// A group is kept by two targets from its beginning, and by one that comes later: that gets everything, and what it is to leave stays
/// until it has a point.
#[tokio::test(flavor = "multi_thread")]
async fn targets_come_and_go() {
    let fleet = Fleet::new().await;
    let (second, second_id) = fleet.another_target("dr2").await;
    let first_id = fleet.target_named("dr").await;
    let both = fleet.machine("web").await;
    let group = fleet.protect_at(&both, vec![first_id.clone(), second_id.clone()]).await;
    both.write(50);
    for name in ["dr", "dr2"] {
        fleet.arrives_at(name, &both, &group).await;
    }

    // One more, while it is protected. What was written long before it came is there.
    let one = fleet.machine("db").await;
    let group = fleet.protect_at(&one, vec![first_id.clone()]).await;
    one.write(51);
    fleet.arrives_at("dr", &one, &group).await;
    let client = fleet.client().await;
    let to = |targets: &[&ResourceId]| ChangeTargets {
        target_servers: targets.iter().map(|target| (*target).clone()).collect(),
        despite_warnings: true,
    };
    let path = format!("/groups/{}/targets", group.id);
    let job: JobInfo = client.post(&path, &to(&[&first_id, &second_id])).await.unwrap();
    let job = ended(&client, &job).await;
    assert_eq!(job.state, JobState::Done, "{job:#?}");
    for name in ["dr", "dr2"] {
        fleet.arrives_at(name, &one, &group).await;
    }
    let same: Result<JobInfo, EnrolError> = client.post(&path, &to(&[&second_id, &first_id])).await;
    assert!(same.unwrap_err().to_string().contains("already"), "it goes there");
    // From one to the other.
    let job: JobInfo = client.post(&path, &to(&[&second_id])).await.unwrap();
    assert_eq!(ended(&client, &job).await.state, JobState::Done);
    let group: GroupInfo = client.get(&format!("/groups/{}", group.id)).await.unwrap();
    assert_eq!(group.target_servers, std::slice::from_ref(&second_id));
    assert!(group.newest_point.is_some(), "it had one before it was left alone");
    one.write(52);
    fleet.arrives_at("dr2", &one, &group).await;

    // A protection that has ended goes on where it is wanted, too.
    let job: JobInfo = client
        .post(&format!("/groups/{}/unprotect", group.id), &Unprotect { confirm: "db".into() })
        .await
        .unwrap();
    assert_eq!(ended(&client, &job).await.state, JobState::Done);
    // Nobody names one: it is the one that it had, whatever has more room by now.
    let group = fleet.protect_at(&one, Vec::new()).await;
    assert_eq!(group.target_servers, [second_id]);
    one.write(53);
    fleet.arrives_at("dr2", &one, &group).await;
    second.shutdown().await;
    fleet.end(vec![both, one]).await;
}

/// The source has lost its tracking, and one of two targets has nothing yet: what is the same there says nothing of the other one, which
/// has missed just that.
#[tokio::test(flavor = "multi_thread")]
async fn kernel_tracking_is_lost_while_a_target_is_blank() -> anyhow::Result<()> {
    if !root("kernel_tracking_is_lost_while_a_target_is_blank") {
        return Ok(());
    }
    let fleet = Fleet::new().await;
    let (second, second_id) = fleet.another_target("dr2").await;
    let first_id = fleet.target_named("dr").await;
    // Nothing that can be compressed, and so slow that all of it takes seconds.
    let client = fleet.client().await;
    let policies: Vec<PolicyInfo> = client.get("/policies").await?;
    let policy = Policy { bandwidth_bytes_s: Some(DISK_BYTES as u64 / 8), ..policies[0].policy.clone() };
    let slow = NewPolicy { name: policies[0].name.clone(), policy };
    let _: Value = client.call(Method::PUT, &format!("/policies/{}", policies[0].id), Some(&slow)).await?;
    let image = fleet.base.path().join("web.img");
    std::fs::write(&image, random(DISK_BYTES as u64)?)?;
    let disk = scratch::LoopDisk::attach(&image, 512)?;
    let mut web = fleet.machine_with("web", "ebpf", disk.device()).await;
    let group = fleet.protect_at(&web, vec![first_id.clone()]).await;
    web.write(1);
    fleet.arrives_at("dr", &web, &group).await;

    // The other one begins, and is not sent half of it before nobody follows the disk. What is written then is what a blank image has there.
    let asked = ChangeTargets { target_servers: vec![first_id, second_id], despite_warnings: true };
    let job: JobInfo = client.post(&format!("/groups/{}/targets", group.id), &asked).await?;
    let blank = fleet.base.path().join("dr2/data").join(group.id.to_string());
    until("the other target has begun", || async { find(&blank, "replica.img") }).await;
    web.agent.take().unwrap().shutdown().await;
    let bpf = fleet.base.path().join(format!("web{BPF}"));
    capture::detach(&bpf.join("seawall"), Some(&group.id.to_string()))?;
    let file = std::fs::OpenOptions::new().write(true).open(&web.disk)?;
    file.write_all_at(&vec![0; 4 * GRANULE], (DISK_BYTES - 4 * GRANULE) as u64)?;
    file.sync_all()?;
    web.agent = Some(start_agent(&web.file));
    let job = ended(&client, &job).await;
    assert_eq!(job.state, JobState::Done, "{job:#?}");
    for name in ["dr", "dr2"] {
        fleet.arrives_at(name, &web, &group).await;
    }
    // And it goes on as it was.
    web.write(2);
    for name in ["dr", "dr2"] {
        fleet.arrives_at(name, &web, &group).await;
    }
    second.shutdown().await;
    fleet.end(vec![web]).await;
    Ok(())
}
