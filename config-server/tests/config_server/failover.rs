use control::fleet::{
    Confirm, GroupInfo, JobInfo, JobState, Protect, StartFailover, StepState, VolumeChoice,
};
use control::{PointSelector, StateCode};
use enrol::{Client, EnrolError};
use serde::Serialize;
use serde_json::{Value, json};

use crate::parts::Parts;
use crate::support::{Site, on_both, problem};

on_both! {
    a_group_goes_over_step_by_step_and_nothing_is_done_out_of_order,
    a_planned_failover_hands_over_first_and_goes_to_that_point,
    every_step_outlives_the_config_server_and_is_done_once
}

fn sure() -> Confirm {
    Confirm { confirm: "web".into() }
}

fn over() -> StartFailover {
    StartFailover {
        confirm: "web".into(),
        point: PointSelector::Latest,
        planned: false,
        promote: false,
        target_server: None,
    }
}

async fn ask(
    operator: &Client,
    group: &GroupInfo,
    act: &str,
    body: impl Serialize,
) -> Result<JobInfo, EnrolError> {
    operator.post(&format!("/groups/{}/{act}", group.id), &body).await
}

async fn refused(operator: &Client, group: &GroupInfo, act: &str, body: impl Serialize, says: &str) {
    let problem = problem(ask(operator, group, act, body).await);
    assert!(problem.detail.contains(says), "{act}: {problem:?}");
}

async fn now(operator: &Client, group: &GroupInfo) -> GroupInfo {
    operator.get(&format!("/groups/{}", group.id)).await.unwrap()
}

async fn a_group_goes_over_step_by_step_and_nothing_is_done_out_of_order(site: Site) {
    let operator = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&operator).await;
    assert!(group.failover.is_none());
    for act in ["failover/commit", "failover/cancel"] {
        refused(&operator, &group, act, sure(), "has not failed over").await;
    }
    refused(&operator, &group, "promote", json!({}), "has not failed over").await;
    refused(&operator, &group, "demote", json!({}), "is not promoted").await;
    refused(&operator, &group, "release", json!({}), "not handed over").await;
    let wrong = StartFailover { confirm: "dr".into(), ..over() };
    refused(&operator, &group, "failover", wrong, "not the name").await;
    let named = StartFailover { target_server: Some(group.machine.clone()), ..over() };
    refused(&operator, &group, "failover", named, "does not keep").await;

    let job = ask(&operator, &group, "failover", over()).await.unwrap();
    refused(&operator, &group, "failover", over(), "under way").await;
    let job = parts.until_ended(&operator, job).await;
    assert!(job.message.contains("Commit it, or cancel it"), "{job:?}");
    let standing = now(&operator, &group).await.failover.unwrap();
    assert_eq!((standing.generation.0, standing.failover.unwrap().point.0), (2, 7));
    assert!(!standing.committed && standing.promoted.is_none());

    // Another point: the first failover is taken back.
    let other = StartFailover { point: PointSelector::Epoch(block::Epoch(5)), promote: true, ..over() };
    let job = ask(&operator, &group, "failover", other).await.unwrap();
    let job = parts.until_ended(&operator, job).await;
    let codes: Vec<&str> = job.steps.iter().map(|step| step.code.as_str()).collect();
    assert_eq!(codes, ["take-back", "fail-over", "promote"]);
    assert_eq!(now(&operator, &group).await.failover.unwrap().failover.unwrap().point.0, 5);
    refused(&operator, &group, "failover/cancel", sure(), "is promoted").await;
    refused(&operator, &group, "failover", over(), "is promoted").await;
    parts.standing.promoted.as_mut().unwrap().open = 1;
    parts.round().await;
    refused(&operator, &group, "demote", json!({}), "exported").await;
    parts.standing.promoted.as_mut().unwrap().open = 0;
    parts.round().await;
    let job = ask(&operator, &group, "demote", json!({})).await.unwrap();
    parts.until_ended(&operator, job).await;
    let job = ask(&operator, &group, "failover/cancel", sure()).await.unwrap();
    parts.until_ended(&operator, job).await;
    let back = now(&operator, &group).await;
    assert!(back.failover.is_none() && back.protected);

    // For good: the machine is let go, and protecting it again is not done unawares.
    let job = ask(&operator, &group, "failover", over()).await.unwrap();
    parts.until_ended(&operator, job).await;
    let job = ask(&operator, &group, "failover/commit", sure()).await.unwrap();
    parts.until_ended(&operator, job).await;
    let kept = now(&operator, &group).await;
    assert!(
        !kept.protected && kept.generation.0 == 2 && kept.failover.as_ref().unwrap().committed,
        "{kept:?}"
    );
    let disk = VolumeChoice::of("/dev/vdb");
    let mut again = Protect {
        volumes: vec![disk],
        policy: None,
        process_server: None,
        target_servers: vec![],
        despite_warnings: false,
        reverses: None,
    };
    let protect = format!("/machines/{}/protect", group.machine);
    let job: JobInfo = operator.post(&protect, &again).await.unwrap();
    let job = parts.until(&operator, job, JobState::Failed).await;
    let history = job.steps.iter().find(|step| step.code == "history").unwrap();
    assert_eq!(history.state, StepState::Warned, "{job:#?}");
    again.despite_warnings = true;
    let job: JobInfo = operator.post(&protect, &again).await.unwrap();
    parts.until_ended(&operator, job).await;
    let again = now(&operator, &group).await;
    assert!(again.protected && again.generation.0 == 2 && again.failover.is_none(), "{again:?}");
    let expected = [
        "fail-over",
        "cancel-failover",
        "fail-over",
        "promote",
        "demote",
        "cancel-failover",
        "fail-over",
        "commit-failover",
    ];
    assert_eq!(parts.done_at_target, expected);
}

async fn a_planned_failover_hands_over_first_and_goes_to_that_point(site: Site) {
    let operator = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&operator).await;
    let planned = StartFailover { planned: true, promote: true, ..over() };
    let pointed = StartFailover { point: PointSelector::Application, ..planned.clone() };
    refused(&operator, &group, "failover", pointed, "leave out the point").await;
    let job = ask(&operator, &group, "failover", planned.clone()).await.unwrap();
    let job = parts.until_ended(&operator, job).await;
    let codes: Vec<&str> = job.steps.iter().map(|step| step.code.as_str()).collect();
    assert_eq!(codes, ["hand-over", "fail-over", "promote"]);
    let there = now(&operator, &group).await;
    assert!(there.handed_over, "{there:?}");
    assert_eq!(there.failover.unwrap().failover.unwrap().point.0, 9, "the point that was handed over");
    refused(&operator, &group, "failover", planned, "is promoted").await;
    let job = ask(&operator, &group, "release", json!({})).await.unwrap();
    parts.until_ended(&operator, job).await;
    assert!(!now(&operator, &group).await.handed_over);
    assert_eq!(parts.agent_state, StateCode::Replicating);
}

/// At each step the config server is ended when it has asked and not heard: another goes on, and the step is not done twice.
async fn every_step_outlives_the_config_server_and_is_done_once(mut site: Site) {
    let mut operator = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&operator).await;
    let promoted = StartFailover { promote: true, ..over() };
    let steps: [(&str, Value, &[&str]); 4] = [
        ("failover", json!(promoted), &["fail-over", "promote"]),
        ("demote", json!({}), &["demote"]),
        ("failover/cancel", json!(sure()), &["cancel-failover"]),
        ("failover", json!(StartFailover { planned: true, ..over() }), &["fail-over"]),
    ];
    for (act, body, done) in steps {
        parts.done_at_target.clear();
        let job = ask(&operator, &group, act, body).await.unwrap();
        // What the target does, nobody hears of.
        parts.mute_target = true;
        for _ in 0..200 {
            parts.round().await;
            if !parts.done_at_target.is_empty() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(parts.done_at_target.len(), 1, "{act}");
        site.stop().await;
        site.start().await;
        operator = site.administrator().await;
        parts.mute_target = false;
        parts.until_ended(&operator, job).await;
        assert_eq!(parts.done_at_target, done, "{act}");
    }
}
