//! The way home that the config server leads, with real parts and disks.

use anyhow::{Context, ensure};
use control::fleet::StartFailover;
use scratch::LoopDisk;
use seawall_tests::{content, differing, root};

use super::failover::over;
use super::*;

/// The machine web is lost, and spare runs its disk; what web had written after the point is kept, only what differs moves home, nothing that
/// spare has written is lost, and web is protected as before.
#[tokio::test(flavor = "multi_thread")]
async fn kernel_a_group_comes_home_by_its_config_server() -> anyhow::Result<()> {
    if !root("kernel_a_group_comes_home_by_its_config_server") {
        return Ok(());
    }
    let fleet = Fleet::new().await;
    let client = fleet.client().await;
    let disk = LoopDisk::create(&fleet.base.path().join("web.img"), DISK_BYTES as u64)?;
    let web = fleet.machine_with("web", "ebpf", disk.device()).await;
    web.write(3);
    let group = fleet.protect(&web).await;
    replicated(&fleet, &web, &group).await;
    fleet.act(&group, "failover", StartFailover { promote: true, ..over() }).await;
    fleet.act(&group, "failover/commit", Confirm { confirm: "web".into() }).await;
    web.write(4);
    let lost = web.content();

    // The other site has the image on a disk of the machine spare.
    let image = fleet.base.path().join("spare.img");
    std::fs::write(&image, fleet.replica(&group))?;
    let spare_disk = LoopDisk::attach(&image, 512)?;
    let spare = fleet.machine_with("spare", "ebpf", spare_disk.device()).await;
    spare.write(5);

    // At the original site a target server, which allows nothing yet.
    let rest = format!(
        "listen = \"127.0.0.1:0\"\ncredentials = \"state/credentials\"\ndata = \"data\"\nadoptable_devices = [{:?}]\n",
        disk.device()
    );
    let file = fleet.enrol(PartRole::TargetServer, "home", &rest).await;
    let allowing = seawall_target_server::Config::load(&file)?;
    std::fs::create_dir(&allowing.data)?;
    let strict = seawall_target_server::Config { adoptable_devices: Vec::new(), ..allowing.clone() };
    let home = FleetTargetServer::start(strict).await?;
    let home_id = until("the target server reports", || async {
        let servers: Page<ServerInfo> = client.get("/target-servers").await.unwrap();
        let home = servers
            .items
            .into_iter()
            .find(|server| server.name.as_str() == "home" && server.seen.is_some())?;
        (!home.address.is_empty()).then_some(home.id)
    })
    .await;
    let asked = Protect {
        volumes: vec![VolumeChoice {
            name: Some("data".parse()?),
            adopt: Some(disk.device().display().to_string()),
            ..VolumeChoice::of(spare_disk.device().display().to_string())
        }],
        policy: None,
        process_server: None,
        target_servers: vec![home_id],
        despite_warnings: true,
        reverses: Some(group.id),
    };
    let job: JobInfo = client.post(&format!("/machines/{}/protect", spare.info.id), &asked).await?;
    until("the target's refusal is shown", || async {
        let job: JobInfo = client.get(&format!("/jobs/{}", job.id)).await.unwrap();
        job.message.contains("adoptable_devices").then_some(())
    })
    .await;
    ensure!(content(disk.device())? == lost, "nothing is written that is not allowed");
    home.shutdown().await;
    let home = FleetTargetServer::start(allowing).await?;
    let job = ended(&client, &job).await;
    ensure!(job.state == JobState::Done, "{job:#?}");
    let reverse = fleet.group(&group).await.reversed_by.context("what protects in its place")?;
    ensure!(reverse == spare.info.group);
    becomes_equal(&fleet, &reverse, || (content(disk.device()).unwrap(), spare.content())).await;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
    let busy = rustix::fs::open(disk.device(), flags, rustix::fs::Mode::empty());
    ensure!(busy.is_err(), "nobody mounts a disk that is a replica");
    let sent =
        spare.agent.as_ref().and_then(|agent| agent.report()).context("a report")?.sent_bytes_total.get();
    let differed = differing(&lost, &spare.content());
    println!("{sent} bytes moved, {differed} differed: {:.3}", sent as f64 / differed as f64);
    ensure!(
        sent > 0 && sent <= differed * 11 / 10 + DISK_BYTES as u64 / 1000,
        "{sent} bytes moved for {differed}"
    );
    until("a point of what runs", || async {
        let there: GroupInfo = client.get(&format!("/groups/{reverse}")).await.unwrap();
        (there.points > 1).then_some(())
    })
    .await;

    // Home, with what was written until then.
    spare.write(6);
    let last = spare.content();
    let job = fleet.act(&group, "failback", Confirm { confirm: "web".into() }).await;
    ensure!(job.steps.iter().all(|step| step.state == StepState::Passed), "{job:#?}");
    ensure!(content(disk.device())? == last, "web's disk is spare's, byte for byte");
    let again = fleet.group(&group).await;
    ensure!(again.protected && again.reversed_by.is_none() && again.failover.is_none(), "{again:#?}");
    web.write(7);
    replicated(&fleet, &web, &group).await;
    home.shutdown().await;
    fleet.end(vec![web, spare]).await;
    Ok(())
}
