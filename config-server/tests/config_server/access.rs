use control::fleet::{
    Approval, ApprovalAnswer, ApprovalState, AuditEntry, ChangeUser, Confirm, NewApiToken, NewPolicy,
    NewUser, Page, Policy, PolicyInfo, Role, Scope, Settings, UserInfo,
};
use hyper::Method;
use serde_json::{Value, json};

use crate::support::{ADMINISTRATOR, PASSWORD, Site, login, on_both, problem};

on_both! { only_the_password_lets_in_and_guessing_is_stopped, roles_and_scopes_allow_what_they_say, what_is_asked_is_read_strictly, every_act_is_in_the_audit_log_whether_it_was_done_or_not, a_second_person_approves_what_destroys, a_session_without_its_second_secret_changes_nothing }

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

/// What a browser got.
struct Got {
    status: u16,
    head: String,
    body: Value,
}

/// One request as a browser sends it: the cookie goes by itself, other headers are what the page adds.
async fn by_browser(site: &Site, method: &str, path: &str, headers: &str, body: Value) -> Got {
    let (config, name) = wire::web_client(&site.trust(), None).unwrap();
    let address = site.server.as_ref().unwrap().local_addr();
    let body = body.to_string();
    let request = format!(
        "{method} /api/v1{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    let answer = tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        let connection = rustls::ClientConnection::new(config, name).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, std::net::TcpStream::connect(address).unwrap());
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    });
    let answer = answer.await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Got { status, head: head.to_owned(), body: serde_json::from_str(body).unwrap_or(Value::Null) }
}

/// The cookie's header and the second secret of a new session.
async fn session(site: &Site) -> (String, String) {
    let got =
        by_browser(site, "POST", "/login", "", json!({ "name": ADMINISTRATOR, "password": PASSWORD })).await;
    let cookie = got.head.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
    for rule in ["Secure", "HttpOnly", "SameSite=Strict", "Path=/"] {
        assert!(cookie.split("; ").any(|found| found == rule), "{cookie}");
    }
    let cookie = format!("Cookie: {}\r\n", cookie.split(';').next().unwrap());
    (cookie, got.body["csrf"].as_str().unwrap().to_owned())
}

/// Another site's page can make a browser send the session's cookie, but it knows no secret of the session. So whatever changes
/// something is refused without that, act by act of the API's own document.
async fn a_session_without_its_second_secret_changes_nothing(site: Site) {
    let ((cookie, csrf), (_, other)) = (session(&site).await, session(&site).await);
    let get_me = async || by_browser(&site, "GET", "/me", &cookie, Value::Null).await.status;
    assert_eq!(get_me().await, 200, "reading needs the cookie only");

    let document = by_browser(&site, "GET", "/openapi.json", &cookie, Value::Null).await.body;
    let mut tried = 0;
    for (path, acts) in document["paths"].as_object().unwrap() {
        for (method, act) in acts.as_object().unwrap() {
            let ways = act["security"].as_array().unwrap();
            if method == "get" || !ways.iter().any(|way| way.get("session").is_some()) {
                continue;
            }
            let (method, path) = (method.to_uppercase(), path.replace("{id}", &"0a".repeat(16)));
            let path = path.strip_prefix("/api/v1").unwrap();
            for header in ["", "X-Seawall-CSRF: \r\n", &format!("X-Seawall-CSRF: {other}\r\n")] {
                let got = by_browser(&site, &method, path, &format!("{cookie}{header}"), json!({})).await;
                let code = got.body["code"].as_str().unwrap_or_default();
                assert_eq!(
                    (got.status, code),
                    (403, "csrf"),
                    "{method} {path} with {header:?}: {}",
                    got.body
                );
            }
            tried += 1;
        }
    }
    assert!(tried >= 20, "{tried} acts change something");
    // Not even the session was ended; with its own secret it ends.
    assert_eq!(get_me().await, 200);
    let own = format!("{cookie}X-Seawall-CSRF: {csrf}\r\n");
    assert!(by_browser(&site, "POST", "/logout", &own, json!({})).await.status < 300);
    assert_eq!(get_me().await, 401);
}
