use control::PointSelector;
use control::fleet::{
    AlertInfo, AlertKind, BootBus, JobInfo, JobKind, JobState, NewPolicy, Page, PolicyInfo, ProofPolicy,
    StartProof, TaskKind,
};
use enrol::Client;
use hyper::Method;
use serde_json::{Value, json};

use crate::parts::Parts;
use crate::support::{Site, on_both, problem};

on_both! { proofs_are_begun_as_the_policy_says_and_when_somebody_asks }

async fn proofs(operator: &Client) -> Vec<JobInfo> {
    let jobs: Page<JobInfo> = operator.get("/jobs").await.unwrap();
    jobs.items.into_iter().filter(|job| job.kind == JobKind::Prove).collect()
}

async fn until<T>(parts: &mut Parts, what: &str, look: impl AsyncFn(&Parts) -> Option<T>) -> T {
    for _ in 0..600 {
        parts.round().await;
        if let Some(found) = look(parts).await {
            return found;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("waited in vain: {what}");
}

async fn proofs_are_begun_as_the_policy_says_and_when_somebody_asks(site: Site) {
    let operator = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&operator).await;
    let path = format!("/groups/{}/prove", group.id);

    // Somebody asks; what is not said is as nobody has ever said it.
    let asked = StartProof { point: PointSelector::Application, within_s: Some(60), ..StartProof::default() };
    let job: JobInfo = operator.post(&path, &asked).await.unwrap();
    let again: Result<JobInfo, _> = operator.post(&path, &asked).await;
    assert!(problem(again).detail.contains("does that already"));
    let job = parts.until_ended(&operator, job).await;
    assert_eq!((job.kind, job.message.as_str()), (JobKind::Prove, "done at the target."));
    let expected = ProofPolicy { within_s: 60, ..ProofPolicy::default() };
    let Some(TaskKind::Prove { group: of, point, volumes, proof }) = parts.started.pop() else {
        panic!("the target was asked")
    };
    assert_eq!((of, point, proof), (group.id, PointSelector::Application, expected));
    assert_eq!(volumes, ["vdb"]);
    let none = StartProof { expect: Some(Vec::new()), ..StartProof::default() };
    assert!(problem(operator.post::<_, JobInfo>(&path, &none).await).detail.contains("0 texts"));
    let other = StartProof { target_server: Some(group.machine.clone()), ..StartProof::default() };
    assert!(problem(operator.post::<_, JobInfo>(&path, &other).await).detail.contains("does not keep"));

    // A drill is begun in the same way; one that is not there cannot be ended.
    let drill = format!("/groups/{}/drill", group.id);
    let begun: JobInfo = operator.post(&drill, &json!({ "name": "monthly", "lasts_s": 120 })).await.unwrap();
    let begun = parts.until_ended(&operator, begun).await;
    assert_eq!(begun.kind, JobKind::Drill);
    let Some(TaskKind::Drill { point, name, lasts_s, .. }) = parts.started.pop() else {
        panic!("the target was asked")
    };
    assert_eq!((point, name.as_str(), lasts_s), (PointSelector::Latest, "monthly", 120));
    let short = operator.post::<_, JobInfo>(&drill, &json!({ "lasts_s": 1 })).await;
    assert!(problem(short).detail.contains("lasts_s is 1"));
    let none = operator.post::<_, JobInfo>(&format!("{drill}/end"), &json!({})).await;
    assert_eq!(problem(none).code, "not-found");

    // The policy asks. It counts from the last one, whoever asked for that.
    let policies: Vec<PolicyInfo> = operator.get("/policies").await.unwrap();
    let says = |proof: ProofPolicy| {
        let policy = control::fleet::Policy { proof: Some(proof), ..policies[0].policy.clone() };
        NewPolicy { name: policies[0].name.clone(), policy }
    };
    let change = format!("/policies/{}", policies[0].id);
    let bad = says(ProofPolicy { every_s: 1, ..ProofPolicy::default() });
    let refused: Result<Value, _> = operator.call(Method::PUT, &change, Some(&bad)).await;
    assert!(problem(refused).detail.contains("every_s of the proof is 1"));
    let wanted = ProofPolicy {
        every_s: 600,
        expect: vec!["up and running".into()],
        bus: BootBus::Sata,
        isolated_network: true,
        ..ProofPolicy::default()
    };
    let _: Value = operator.call(Method::PUT, &change, Some(&says(wanted.clone()))).await.unwrap();
    // Long enough for it to be looked at.
    for _ in 0..130 {
        parts.round().await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(proofs(&operator).await.len(), 1, "it is not due");
    site.sql(&format!("UPDATE jobs SET created = created - 600000 WHERE id = '{}'", job.id)).await;
    parts.machine_fails = true;
    let begun = until(&mut parts, "a proof by the policy", async |_| {
        let jobs = proofs(&operator).await;
        jobs.into_iter().find(|other| other.id != job.id && other.state.ended())
    })
    .await;
    assert_eq!((begun.state, begun.created_by.as_str()), (JobState::Failed, "policy default"), "{begun:#?}");
    assert!(matches!(&parts.started[..], [TaskKind::Prove { proof, .. }] if *proof == wanted));
    let raised = until(&mut parts, "the alert", async |_| {
        let alerts: Vec<AlertInfo> = operator.get("/alerts").await.unwrap();
        alerts.into_iter().find(|alert| alert.kind == AlertKind::Proof && alert.cleared.is_none())
    })
    .await;
    assert!(
        raised.message.contains("web did not come up") && raised.message.contains("no disk"),
        "{raised:?}"
    );
    assert_eq!(raised.severity, "trouble");

    // It comes up again.
    parts.machine_fails = false;
    let job: JobInfo = operator.post(&path, &StartProof::default()).await.unwrap();
    parts.until_ended(&operator, job).await;
    until(&mut parts, "the end of the alert", async |_| {
        let alerts: Vec<AlertInfo> = operator.get("/alerts").await.unwrap();
        alerts.iter().all(|alert| alert.kind != AlertKind::Proof || alert.cleared.is_some()).then_some(())
    })
    .await;
}
