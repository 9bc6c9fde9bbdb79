use control::fleet::{GroupInfo, JobInfo, Overview, Page, PointNow, ResourceId, Unprotect};
use hyper::Method;
use serde_json::Value;

use crate::parts::Parts;
use crate::support::{Site, on_both, problem};

on_both! { a_machine_is_protected_watched_and_let_go }

async fn a_machine_is_protected_watched_and_let_go(site: Site) {
    let operator = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&operator).await;
    assert_eq!((group.name.as_str(), group.volumes.len(), group.points), ("web", 1, 1));
    assert!(group.rpo_ms.is_some_and(|age| age >= 1000), "{group:?}");
    let path = format!("/groups/{}", group.id);
    assert_eq!(
        problem(
            operator
                .post::<_, Value>(&format!("/machines/{}/protect", group.machine), &protect_again())
                .await
        )
        .code,
        "conflict"
    );

    // Figures of all parts, over time.
    let samples: Value = operator.get(&format!("{path}/samples?step_s=30")).await.unwrap();
    let newest = samples.as_array().and_then(|all| all.last()).unwrap_or_else(|| panic!("{samples}"));
    assert_eq!(newest["churn_bytes_per_s"], 1_000_000);
    assert!(newest["rpo_ms"].as_i64().unwrap() >= 1000, "{newest}");
    let overview: Overview = operator.get("/overview").await.unwrap();
    assert_eq!((overview.groups, overview.groups_recoverable, overview.groups_in_trouble), (1, 1, 0));
    assert!(overview.worst_rpo_ms.is_some());

    // A point and a comparison are asked of the agent.
    let point =
        PointNow { consistency: block::Consistency::Application, label: Some("nightly".parse().unwrap()) };
    let job: JobInfo = operator.post(&format!("{path}/point"), &point).await.unwrap();
    parts.until_ended(&operator, job).await;
    let job: JobInfo = operator.call(Method::POST, &format!("{path}/resync"), None::<&()>).await.unwrap();
    parts.until_ended(&operator, job).await;

    // Ending it needs the name, and leaves the points.
    let wrong = Unprotect { confirm: "dr".into() };
    assert_eq!(
        problem(operator.post::<_, Value>(&format!("{path}/unprotect"), &wrong).await).code,
        "not-confirmed"
    );
    let right = Unprotect { confirm: "web".into() };
    let job: JobInfo = operator.post(&format!("{path}/unprotect"), &right).await.unwrap();
    parts.until_ended(&operator, job).await;
    let jobs: Page<JobInfo> = operator.get("/jobs").await.unwrap();
    assert_eq!(jobs.items.len(), 4);
    let kept: GroupInfo = operator.get(&path).await.unwrap();
    assert_eq!(kept.points, 1);
    let _: ResourceId = kept.machine;
}

fn protect_again() -> Value {
    serde_json::json!({"volumes": [{"device": "/dev/vdc"}]})
}
