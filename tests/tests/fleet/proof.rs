//! A boot proof that the config server asks for, with a real machine.

use control::fleet::{ProofPolicy, StartProof};

use super::*;

/// What a BIOS starts: it says a few words on the serial line, and stops.
fn boot_sector(says: &str) -> [u8; 512] {
    let mut sector = [0; 512];
    // xor ax, ax; mov ds, ax; mov si, 0x7c00 + text; mov dx, 0x3f8
    let begin = [0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x40, 0x7c, 0xba, 0xf8, 0x03];
    // next: lodsb; test al, al; jz end; out dx, al; jmp next; end: hlt; jmp end
    let each = [0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xf4, 0xeb, 0xfd];
    sector[..begin.len()].copy_from_slice(&begin);
    sector[begin.len()..begin.len() + each.len()].copy_from_slice(&each);
    sector[0x40..0x40 + says.len()].copy_from_slice(says.as_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// By command and by policy: what the machine must say counts, its time is shown, and what does not come up says what it said last.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_proven_to_come_up() {
    let qemu = std::process::Command::new("qemu-system-x86_64").arg("--version").output();
    if qemu.is_err() {
        seawall_tests::cannot_run(
            "a_machine_is_proven_to_come_up",
            "qemu-system-x86_64 (of qemu-system-x86)",
        );
        return;
    }
    let fleet = Fleet::new().await;
    let client = fleet.client().await;
    let web = fleet.machine("web").await;
    let disk = std::fs::OpenOptions::new().write(true).open(&web.disk).unwrap();
    disk.write_all_at(&boot_sector("GRUB\r\nweb login: "), 0).unwrap();
    let group = fleet.protect(&web).await;
    replicated(&fleet, &web, &group).await;
    let before = group.newest_point.as_ref().unwrap().epoch;

    let path = format!("/groups/{}/prove", group.id);
    let prove = async |expect: &str, within_s| {
        let asked = StartProof {
            expect: Some(vec![expect.into()]),
            within_s: Some(within_s),
            ..StartProof::default()
        };
        let job: JobInfo = client.post(&path, &asked).await.unwrap();
        ended(&client, &job).await
    };
    let job = prove("web login:", 60).await;
    assert_eq!(job.state, JobState::Done, "{job:#?}");
    let proof = until("the group tells of it", || async { fleet.group(&group).await.proof }).await;
    assert!(proof.epoch >= before && proof.took_ms > 0, "{proof:?}");
    assert_eq!(
        (proof.volumes.as_slice(), proof.operator.as_str()),
        (&["data".to_owned()][..], "the config server")
    );
    println!("{}", job.message);

    // It does not come up any more; replication goes on.
    disk.write_all_at(&boot_sector("GRUB\r\nKernel panic - not syncing"), 0).unwrap();
    replicated(&fleet, &web, &group).await;
    let job = prove("web login:", 60).await;
    assert_eq!(job.state, JobState::Failed, "{job:#?}");
    assert!(
        job.message.contains("the machine said \"Kernel panic\"") && job.message.contains("GRUB"),
        "{job:#?}"
    );
    let console =
        find(&fleet.base.path().join("dr/data").join(group.id.to_string()), "proof-console").unwrap();
    assert!(std::fs::read_to_string(console).unwrap().contains("Kernel panic"));
    assert_eq!(fleet.group(&group).await.proof, Some(proof.clone()), "the last that came up stays");
    replicated(&fleet, &web, &group).await;

    // Nothing of it is left: no export, no program, no overlay.
    let status = fleet.target.as_ref().unwrap().status().unwrap();
    assert!(status.exports.is_empty(), "{:#?}", status.exports);

    // As often as the policy says; by its count the first was just now.
    let policies: Vec<PolicyInfo> = client.get("/policies").await.unwrap();
    let mut policy = policies[0].policy.clone();
    policy.proof = Some(ProofPolicy { every_s: 600, ..ProofPolicy::default() });
    let changed = NewPolicy { name: policies[0].name.clone(), policy };
    let _: Value =
        client.call(Method::PUT, &format!("/policies/{}", policies[0].id), Some(&changed)).await.unwrap();
    let other = fleet.machine("db").await;
    let disk = std::fs::OpenOptions::new().write(true).open(&other.disk).unwrap();
    disk.write_all_at(&boot_sector("db login: "), 0).unwrap();
    let second = fleet.protect(&other).await;
    let proof = until("the policy's proof", || async { fleet.group(&second).await.proof }).await;
    assert_eq!(proof.volumes, ["data"]);
    fleet.end(vec![web, other]).await;
}
