use control::fleet::{
    Approval, ApprovalAnswer, ApprovalState, AuditEntry, ChangeUser, Confirm, NewApiToken, NewPolicy,
    NewUser, Page, Policy, PolicyInfo, Role, Scope, Settings, UserInfo,
};
use hyper::Method;
use serde_json::{Value, json};

use crate::support::{ADMINISTRATOR, PASSWORD, Site, login, on_both, problem};

on_both! { only_the_password_lets_in_and_guessing_is_stopped, roles_and_scopes_allow_what_they_say, what_is_asked_is_read_strictly, every_act_is_in_the_audit_log_whether_it_was_done_or_not, a_second_person_approves_what_destroys }

async fn only_the_password_lets_in_and_guessing_is_stopped(site: Site) {
    let stranger = site.stranger();
    assert_eq!(problem(stranger.get::<Value>("/me").await).code, "unauthenticated");
    for name in ["admin", "nobody"] {
        let refused = problem(stranger.login(&login(name, "wrong horse battery")).await);
        assert_eq!((refused.code.as_str(), refused.status), ("unauthenticated", 401));
        assert_eq!(refused.detail, "The name or the password is wrong");
    }
    let client = site.administrator().await;
    assert_eq!(client.get::<UserInfo>("/me").await.unwrap().name.as_str(), ADMINISTRATOR);
    let mut codes = Vec::new();
    for _ in 0..7 {
        codes.push(problem(stranger.login(&login("admin", "wrong horse battery")).await).code);
    }
    assert_eq!(codes.last().unwrap(), "too-many", "{codes:?}");
    // Not even the right password, and others are not kept out.
    assert_eq!(problem(stranger.login(&login("admin", PASSWORD)).await).code, "too-many");
    // The session from before goes on, and ends when it is told to.
    client.get::<UserInfo>("/me").await.unwrap();
    client.call::<(), Value>(Method::POST, "/logout", None).await.unwrap();
    assert_eq!(problem(client.get::<Value>("/me").await).code, "unauthenticated");
}

async fn roles_and_scopes_allow_what_they_say(site: Site) {
    let viewer = site.make_user("vera", Role::Viewer).await;
    let operator = site.make_user("otto", Role::Operator).await;
    let new = NewPolicy { name: "gold".parse().unwrap(), policy: Policy::default() };
    assert_eq!(problem(viewer.post::<_, Value>("/policies", &new).await).code, "forbidden");
    operator.post::<_, PolicyInfo>("/policies", &new).await.unwrap();
    viewer.get::<Vec<PolicyInfo>>("/policies").await.unwrap();
    assert_eq!(problem(operator.get::<Value>("/users").await).code, "forbidden");
    assert_eq!(problem(operator.get::<Value>("/audit").await).code, "forbidden");

    let reader = site.token(&operator, &[Scope::Read]).await;
    reader.get::<Vec<PolicyInfo>>("/policies").await.unwrap();
    let other = NewPolicy { name: "silver".parse().unwrap(), policy: Policy::default() };
    assert_eq!(problem(reader.post::<_, Value>("/policies", &other).await).code, "forbidden");
    // A token makes no stronger one, and its user's role is its end.
    let stronger = NewApiToken { name: "more".parse().unwrap(), scopes: vec![Scope::Operate], days: 1 };
    assert_eq!(problem(reader.post::<_, Value>("/tokens", &stronger).await).code, "forbidden");
    let all = site.token(&viewer, &[Scope::Administer]).await;
    assert_eq!(problem(all.post::<_, Value>("/policies", &other).await).code, "forbidden");

    // Disabled: sessions and tokens end at once.
    let administrator = site.administrator().await;
    let users: Page<UserInfo> = administrator.get("/users").await.unwrap();
    let otto = users.items.iter().find(|user| user.name.as_str() == "otto").unwrap();
    let change = ChangeUser { disabled: Some(true), ..ChangeUser::default() };
    administrator
        .call::<_, UserInfo>(Method::PATCH, &format!("/users/{}", otto.id), Some(&change))
        .await
        .unwrap();
    assert_eq!(problem(operator.get::<Value>("/policies").await).code, "unauthenticated");
    assert_eq!(problem(reader.get::<Value>("/policies").await).code, "unauthenticated");
    // Somebody must be left who can undo it.
    let admin = users.items.iter().find(|user| user.name.as_str() == ADMINISTRATOR).unwrap();
    let path = format!("/users/{}", admin.id);
    assert_eq!(
        problem(administrator.call::<_, Value>(Method::PATCH, &path, Some(&change)).await).code,
        "conflict"
    );
}

async fn what_is_asked_is_read_strictly(site: Site) {
    let client = site.administrator().await;
    let refused = async |path: &str, body: Value| {
        let problem = problem(client.post::<_, Value>(path, &body).await);
        (problem.status, problem.detail)
    };
    let (status, detail) =
        refused("/users", json!({ "name": "x", "role": "viewer", "password": PASSWORD, "colour": 1 })).await;
    assert!(status == 400 && detail.contains("colour"), "{detail}");
    let (status, detail) =
        refused("/users", json!({ "name": "x", "role": "king", "password": PASSWORD })).await;
    assert!(status == 400 && detail.contains("king"), "{detail}");
    let (status, detail) =
        refused("/users", json!({ "name": "x", "role": "viewer", "password": "short" })).await;
    assert!(status == 422 && detail.contains("5 bytes"), "{detail}");
    let mut policy = serde_json::to_value(Policy::default()).unwrap();
    policy["epoch_interval_ms"] = 1.into();
    let (status, detail) = refused("/policies", json!({ "name": "x", "policy": policy })).await;
    assert!(status == 422 && detail.contains("epoch_interval_ms"), "{detail}");
    let long = json!({ "name": "x", "role": "viewer", "password": "p".repeat(300_000) });
    assert_eq!(refused("/users", long).await.0, 413);
    assert_eq!(problem(client.get::<Value>("/machines?limit=0").await).status, 422);
    assert_eq!(problem(client.get::<Value>("/machines?colour=1").await).status, 400);
    assert_eq!(problem(client.get::<Value>("/machines/xyz").await).status, 404);
    assert_eq!(problem(client.get::<Value>("/nothing").await).status, 404);
    assert_eq!(problem(client.call::<(), Value>(Method::DELETE, "/users", None).await).status, 405);
    // A body that is no JSON by its type: nothing is guessed.
    assert_eq!(problem(client.call::<(), Value>(Method::POST, "/users", None).await).status, 415);
}

async fn every_act_is_in_the_audit_log_whether_it_was_done_or_not(site: Site) {
    let viewer = site.make_user("vera", Role::Viewer).await;
    let new = NewUser { name: "eve".parse().unwrap(), role: Role::Administrator, password: PASSWORD.into() };
    problem(viewer.post::<_, Value>("/users", &new).await);
    problem(site.stranger().post::<_, Value>("/users", &new).await);
    let log: Page<AuditEntry> = site.administrator().await.get("/audit?limit=10").await.unwrap();
    let acts: Vec<_> = log
        .items
        .iter()
        .filter(|entry| entry.act == "POST /api/v1/users")
        .map(|entry| (entry.who.as_str(), entry.status, entry.problem.as_str()))
        .collect();
    assert_eq!(
        acts,
        [("nobody", 401, "unauthenticated"), ("user vera", 403, "forbidden"), ("user admin", 201, "")],
        "{log:?}"
    );
    assert!(log.items.iter().all(|entry| entry.address == "127.0.0.1"));
    let text = serde_json::to_string(&log).unwrap();
    assert!(!text.contains(PASSWORD));
}

async fn a_second_person_approves_what_destroys(site: Site) {
    let first = site.administrator().await;
    let second = site.make_user("berta", Role::Administrator).await;
    let settings = Settings { second_person: true };
    first.call::<_, Value>(Method::PUT, "/settings", Some(&settings)).await.unwrap();
    let new = NewPolicy { name: "gold".parse().unwrap(), policy: Policy::default() };
    let policy: PolicyInfo = first.post("/policies", &new).await.unwrap();
    let path = format!("/policies/{}", policy.id);

    // The name must be typed.
    let wrong = Confirm { confirm: "silver".into() };
    let refused = problem(first.call::<_, Value>(Method::DELETE, &path, Some(&wrong)).await);
    assert_eq!(refused.code, "not-confirmed");
    let right = Confirm { confirm: "gold".into() };
    let approval: Approval = first.call(Method::DELETE, &path, Some(&right)).await.unwrap();
    assert_eq!(approval.state, ApprovalState::Waiting);
    // Nothing has happened, and who asked cannot approve.
    first.get::<PolicyInfo>(&path).await.unwrap();
    let answer = format!("/approvals/{}", approval.id);
    let yes = ApprovalAnswer { approve: true };
    assert_eq!(problem(first.post::<_, Value>(&answer, &yes).await).code, "forbidden");
    first.get::<PolicyInfo>(&path).await.unwrap();
    let approved: Approval = second.post(&answer, &yes).await.unwrap();
    assert_eq!(
        (approved.state, approved.answered_by.as_deref()),
        (ApprovalState::Approved, Some("user berta"))
    );
    assert_eq!(problem(first.get::<Value>(&path).await).code, "not-found");
    assert_eq!(problem(second.post::<_, Value>(&answer, &yes).await).code, "conflict");

    // To need nobody any more needs somebody as well.
    let off = Settings { second_person: false };
    let approval: Approval = first.call(Method::PUT, "/settings", Some(&off)).await.unwrap();
    assert!(first.get::<Settings>("/settings").await.unwrap().second_person);
    let no = ApprovalAnswer { approve: false };
    let answer = format!("/approvals/{}", approval.id);
    assert_eq!(first.post::<_, Approval>(&answer, &no).await.unwrap().state, ApprovalState::Rejected);
    assert!(first.get::<Settings>("/settings").await.unwrap().second_person);
}
