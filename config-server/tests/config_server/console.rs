//! The console as a browser sees it, request by request; tests/tests/console.rs has a real browser.

use std::collections::HashMap;

use control::fleet::{CheckIn, EnrolTokenInfo, PartRole, PolicyInfo, Role};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{ADMINISTRATOR, PASSWORD, Site, problem, site};

/// What came back.
#[derive(Debug)]
pub(crate) struct Got {
    status: u16,
    heads: HashMap<String, String>,
    pub(crate) body: String,
}

impl Got {
    fn head(&self, name: &str) -> &str {
        self.heads.get(name).map_or("", String::as_str)
    }
}

/// Somebody with a browser: keeps the session's cookie.
pub(crate) struct Visitor<'a> {
    site: &'a Site,
    cookie: String,
}

impl Visitor<'_> {
    async fn ask(&self, method: &str, path: &str, heads: &str, body: &str) -> Got {
        let (config, name) = wire::web_client(&self.site.trust(), None).unwrap();
        let address = self.site.config.listen.clone();
        let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\ncookie: {}\r\ncontent-length: {}\r\n\
             content-type: application/x-www-form-urlencoded\r\nconnection: close\r\n{heads}\r\n{body}",
            self.cookie,
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let heads = lines.filter_map(|line| line.split_once(": "));
        let heads = heads.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        Got { status, heads, body: body.to_owned() }
    }

    pub(crate) async fn get(&self, path: &str) -> Got {
        self.ask("GET", path, "", "").await
    }

    async fn post(&self, path: &str, body: &str) -> Got {
        self.ask("POST", path, "", body).await
    }

    /// The second secret, as the page's forms have it.
    async fn csrf(&self) -> String {
        let page = self.get("/").await;
        let (_, rest) = page.body.split_once("name=\"csrf\" value=\"").unwrap();
        rest.split_once('"').unwrap().0.to_owned()
    }
}

fn stranger(site: &Site) -> Visitor<'_> {
    Visitor { site, cookie: String::new() }
}

pub(crate) async fn visitor<'a>(site: &'a Site, name: &str) -> Visitor<'a> {
    let mut visitor = stranger(site);
    let password = PASSWORD.replace(' ', "+");
    let got = visitor.post("/login", &format!("name={name}&password={password}&next=%2Fjobs")).await;
    assert_eq!((got.status, got.head("location")), (303, "/jobs"), "{got:?}");
    let cookie = got.head("set-cookie");
    assert!(
        cookie.contains("HttpOnly") && cookie.contains("Secure") && cookie.contains("SameSite=Strict"),
        "{cookie}"
    );
    visitor.cookie = cookie.split(';').next().unwrap().to_owned();
    visitor
}

/// Whoever can make a browser send its cookie cannot make it do anything.
#[tokio::test]
async fn nothing_is_done_without_the_pages_own_secret() {
    let site = site().await;
    let admin = visitor(&site, ADMINISTRATOR).await;
    let csrf = admin.csrf().await;
    let id = "0123456789abcdef0123456789abcdef";
    let acts = [
        ("/logout".to_owned(), ""),
        (format!("/machines/{id}/protect"), "disk=%2Fdev%2Fvda"),
        (format!("/machines/{id}/remove"), "confirm=web"),
        (format!("/groups/{id}/point"), "consistency=crash"),
        (format!("/groups/{id}/resync"), ""),
        (format!("/groups/{id}/unprotect"), "confirm=web"),
        (format!("/groups/{id}/remove"), "confirm=web"),
        (format!("/servers/target-servers/{id}/remove"), "confirm=dr"),
        (format!("/jobs/{id}/cancel"), ""),
        ("/enrol".to_owned(), "role=agent&minutes=5"),
        (format!("/enrol/{id}/delete"), ""),
        (
            "/policies".to_owned(),
            "name=gold&epoch_interval_ms=1000&rpo_s_max=60&application_every_s=0&all=1d",
        ),
        (format!("/policies/{id}/delete"), "confirm=gold"),
        ("/plans".to_owned(), "text=name%3A+x"),
        (format!("/plans/{id}"), "text=name%3A+x"),
        (format!("/plans/{id}/run"), "mode=drill&confirm=x"),
        (format!("/plans/{id}/delete"), "confirm=x"),
        (format!("/runs/{id}/answer"), "step=x&done=yes"),
        (format!("/runs/{id}/resume"), ""),
        ("/settings".to_owned(), "second_person=on"),
        ("/settings/password".to_owned(), "old=a&new=b"),
        ("/settings/tokens".to_owned(), "name=t&scope=read&days=1"),
        (format!("/settings/tokens/{id}/delete"), ""),
        ("/users".to_owned(), "name=eve&role=administrator&password=long+enough+password"),
        (format!("/users/{id}"), "role=viewer"),
        (format!("/approvals/{id}"), "answer=approve"),
    ];
    let others = "f".repeat(csrf.len());
    for (path, body) in &acts {
        for forged in [body.to_string(), format!("{body}&csrf={others}")] {
            let got = admin.post(path, &forged).await;
            assert_eq!(got.status, 403, "{path}: {got:?}");
            assert!(got.body.contains("<code>csrf</code>"), "{path}: {got:?}");
        }
        // From another site's page it is not even looked at.
        let heads = "origin: https://evil.example\r\n";
        let got = admin.ask("POST", path, heads, &format!("{body}&csrf={csrf}")).await;
        assert_eq!(got.status, 403, "{path}: {got:?}");
        assert!(got.body.contains("another site"), "{path}: {got:?}");
    }
    let login = format!("name={ADMINISTRATOR}&password={}", PASSWORD.replace(' ', "+"));
    let got = stranger(&site).ask("POST", "/login", "sec-fetch-site: cross-site\r\n", &login).await;
    assert!(got.status == 403 && got.head("set-cookie").is_empty(), "{got:?}");
    let tokens: Vec<EnrolTokenInfo> = site.administrator().await.get("/enrol-tokens").await.unwrap();
    assert!(tokens.is_empty(), "nothing was done: {tokens:?}");

    // With it, the same is done, once for each.
    let got = admin.post("/enrol", &format!("role=agent&minutes=5&csrf={csrf}")).await;
    assert!(
        got.status == 200 && got.body.contains("seawall-agent enroll --server https://127.0.0.1:"),
        "{got:?}"
    );
    let tokens: Vec<EnrolTokenInfo> = site.administrator().await.get("/enrol-tokens").await.unwrap();
    assert_eq!(tokens.len(), 1);
    let got = admin.post("/logout", &format!("csrf={csrf}")).await;
    assert_eq!((got.status, got.head("location")), (303, "/login"));
    assert_eq!(admin.get("/").await.head("location"), "/login", "the session has ended");
}

#[tokio::test]
async fn whoever_is_not_logged_in_is_led_to_the_login_and_back() {
    let site = site().await;
    let nobody = stranger(&site);
    let got = nobody.get("/groups/1?x=%22%3E").await;
    assert_eq!((got.status, got.head("location")), (303, "/login?next=/groups/1%3Fx%3D%2522%253E"));
    let page = nobody.get(got.head("location")).await;
    assert!(page.status == 200 && page.body.contains("value=\"/groups/1?x=%22%3E\""), "{page:?}");
    // A part of a page that is fetched anew takes the whole page there.
    let got = nobody.ask("GET", "/jobs", "hx-request: true\r\n", "").await;
    assert_eq!((got.status, got.head("hx-redirect")), (401, "/login?next=/jobs"));
    let got =
        nobody.post("/login", "name=admin&password=wrong+and+long+enough&next=%2F%2Fevil.example").await;
    assert!(got.status == 401 && got.head("set-cookie").is_empty(), "{got:?}");
    assert!(got.body.contains("The name or the password is wrong") && !got.body.contains("evil"), "{got:?}");
    // The API stays the API.
    let got = nobody.get("/api/v2").await;
    assert_eq!((got.status, got.head("content-type")), (404, "application/problem+json"));
    let got = nobody.get("/nothing").await;
    assert!(got.status == 404 && got.body.contains("<h1>"), "{got:?}");
}

/// Every page: for its readers only, and nothing in it that its policy would have to let through.
#[tokio::test]
async fn pages_are_for_their_readers_and_run_no_text() {
    let site = site().await;
    site.make_user("vera", Role::Viewer).await;
    site.make_user("otto", Role::Operator).await;
    let (vera, otto, admin) =
        (visitor(&site, "vera").await, visitor(&site, "otto").await, visitor(&site, ADMINISTRATOR).await);
    let pages = [
        ("/", Role::Viewer),
        ("/machines", Role::Viewer),
        ("/servers", Role::Viewer),
        ("/jobs", Role::Viewer),
        ("/events", Role::Viewer),
        ("/policies", Role::Viewer),
        ("/settings", Role::Viewer),
        ("/enrol", Role::Operator),
        ("/approvals", Role::Operator),
        ("/plans", Role::Operator),
        ("/users", Role::Administrator),
        ("/audit", Role::Administrator),
    ];
    for (path, needed) in pages {
        for (who, role) in [(&vera, Role::Viewer), (&otto, Role::Operator), (&admin, Role::Administrator)] {
            let got = who.get(path).await;
            assert_eq!(got.status, if role >= needed { 200 } else { 403 }, "{path} for a {role}: {got:?}");
            let policy = got.head("content-security-policy");
            assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{path}: {policy}");
            assert_eq!(got.head("cache-control"), "no-store", "{path}");
            let scripts = got.body.matches("<script").count();
            assert_eq!(scripts, got.body.matches("></script>").count(), "{path} has a script in its text");
            for inline in [" style=\"", "<style", " onclick=", "javascript:"] {
                assert!(!got.body.contains(inline), "{path} has {inline}");
            }
        }
    }
    // A viewer's page offers nothing that a viewer may not do.
    let page = vera.get("/policies").await;
    assert!(
        !page.body.contains("Make a policy") && otto.get("/policies").await.body.contains("Make a policy")
    );
    let refused = vera.post("/policies", &format!("csrf={}&name=x", vera.csrf().await)).await;
    assert!(refused.status >= 400 && refused.status != 500, "{refused:?}");
    // Names in a path lead to no other act of the API.
    for path in ["/machines/..%2Fusers", "/groups/%2E%2E/points/1", "/jobs/a%3Fb"] {
        let got = admin.get(path).await;
        assert_eq!(got.status, 404, "{path}: {got:?}");
    }
}

#[tokio::test]
async fn files_have_their_contents_in_their_address() {
    let site = site().await;
    let nobody = stranger(&site);
    let page = nobody.get("/login").await;
    let mut found = 0;
    for part in page.body.split("/assets/").skip(1) {
        let name = part.split('"').next().unwrap();
        let got = nobody.get(&format!("/assets/{name}")).await;
        assert!(got.status == 200 && got.head("cache-control").contains("immutable"), "{name}: {got:?}");
        let other = format!("/assets/{}", name.replacen(|digit: char| digit.is_ascii_hexdigit(), "x", 1));
        assert_eq!(nobody.get(&other).await.status, 404, "{other}");
        found += 1;
    }
    assert!(found >= 4, "{}", page.body);
}

/// A policy is made and changed by its form as it reads there, and what it makes no sense of is refused by name.
#[tokio::test]
async fn a_policys_form_says_what_the_api_says() {
    let site = site().await;
    let admin = visitor(&site, ADMINISTRATOR).await;
    let csrf = admin.csrf().await;
    let form = |more: &str| {
        format!("csrf={csrf}&name=gold&epoch_interval_ms=5000&rpo_s_max=60&application_every_s=0&{more}")
    };
    let got = admin.post("/policies", &form("all=36h&daily=30d")).await;
    assert_eq!((got.status, got.head("location")), (303, "/policies"), "{got:?}");
    assert!(admin.get("/policies").await.body.contains("all for 36h, daily for 30d"));
    for (more, named) in [
        ("all=36x", "36x"),
        ("all=30d&daily=1d", "follow each other"),
        ("all=1d&cpu_percent=1", "cpu_percent is 1"),
        ("all=1d&resync_windows=at+night", "are no hours"),
        ("all=1d&resync_windows=25:00-26:00", "no time of day"),
        ("all=1d&proof_every=1m", "every_s of the proof is 60"),
    ] {
        let got = admin.post("/policies", &form(more)).await;
        assert!(got.status == 422 && got.body.contains(named), "{more}: {got:?}");
    }

    // Proofs and hours come back as they were typed; what the form does not say of them stays.
    let operator = site.administrator().await;
    let policies: Vec<PolicyInfo> = operator.get("/policies").await.unwrap();
    let gold = policies.iter().find(|policy| policy.name.as_str() == "gold").unwrap();
    assert_eq!((&gold.policy.proof, &gold.policy.resync_windows), (&None, &None));
    let page = format!("/policies/{}", gold.id);
    let said = "all=36h&daily=30d&proof_every=7d&proof_expect=up%0D%0Arunning&proof_within_s=90\
                &resync_windows=sat+sun+00:00-00:00%0D%0A22:00-06:00";
    assert_eq!(admin.post(&page, &form(said)).await.status, 303);
    let gold: PolicyInfo = operator.get(&page).await.unwrap();
    let proof = gold.policy.proof.unwrap();
    assert_eq!(
        (proof.every_s, proof.expect, proof.within_s),
        (604_800, vec!["up".into(), "running".into()], 90)
    );
    assert_eq!(gold.policy.resync_windows.unwrap().len(), 2);
    let shown = admin.get(&page).await.body;
    assert!(shown.contains("value=\"7d\"") && shown.contains("sat sun 00:00-00:00\n22:00-06:00"), "{shown}");
    let got = admin.post(&page, &form("all=36h&daily=30d&resync_windows=always")).await;
    assert_eq!(got.status, 303, "{got:?}");
    let gold: PolicyInfo = operator.get(&page).await.unwrap();
    assert_eq!(gold.policy.resync_windows, Some(Vec::new()));
    assert!(gold.policy.proof.is_some());
}

/// Recovery points are a target's to tell, and few of them.
#[tokio::test]
async fn only_targets_tell_recovery_points() {
    let site = site().await;
    let agent = site.enrol(PartRole::Agent, "web").await;
    let target = site.enrol(PartRole::TargetServer, "dr").await;
    let list = |points: usize| control::GroupPoints {
        group: block::GroupId([7; 16]),
        generation: block::Generation(1),
        volumes: Vec::new(),
        points: vec![
            control::PointInfo {
                epoch: block::Epoch(1),
                cut_time: block::UnixNanos(1),
                consistency: block::Consistency::Crash,
                note: block::PointNote::default(),
                changed_bytes: block::ByteCount(1),
                pin: None,
                kept_for: None,
                unusable: None,
            };
            points
        ],
        omitted: 0,
    };
    let said = |lists: Vec<control::GroupPoints>| CheckIn { points: lists, ..CheckIn::default() };
    let told = |state: &std::path::Path, said: CheckIn| {
        let part = site.part(state);
        async move { part.post::<_, serde_json::Value>("/part/check-in", &said).await }
    };
    assert_eq!(problem(told(&agent, said(vec![list(1)])).await).code, "invalid");
    assert_eq!(problem(told(&target, said(vec![list(401)])).await).code, "invalid");
    assert_eq!(problem(told(&target, said(vec![list(1); 17])).await).code, "invalid");
    // Of a group that is not its own they go nowhere.
    told(&target, said(vec![list(400)])).await.unwrap();
}

/// Of more machines than a page shows, those that need a look come first, and every one is found by its name.
#[tokio::test]
async fn a_large_fleet_is_shown_in_pages() {
    const OTHERS: usize = 120;
    let site = site().await;
    let administrator = site.administrator().await;
    let mut parts = crate::parts::Parts::enrol(&site).await;
    parts.protect(&administrator).await;
    // Machines like it, which have no recovery point.
    let pool = sqlx::AnyPool::connect(&site.config.database).await.unwrap();
    for number in 0..OTHERS {
        let (machine, group) = (format!("{number:032x}"), format!("{:032x}", 0xfff0_0000 + number));
        for sql in [
            "INSERT INTO parts SELECT $1, role, $3, $3, $2, enrolled, removed, address, sealing_key, version, seen, silent,
                 clock_ahead, certificate_expires, state, trouble, digest, report, disks, bytes_total, bytes_free, guests
             FROM parts WHERE name = 'web'",
            "INSERT INTO protection_groups (id, machine_id, generation, state, policy_id, process_id, created)
             SELECT $2, $1, 1, 'protected', policy_id, process_id, created FROM protection_groups WHERE $3 <> '' LIMIT 1",
        ] {
            let query = sqlx::query(sql).bind(&machine).bind(&group).bind(format!("other-{number:03}"));
            query.execute(&pool).await.unwrap();
        }
    }
    sqlx::query("UPDATE counters SET value = value + 1 WHERE name = 'declared'")
        .execute(&pool)
        .await
        .unwrap();
    pool.close().await;

    let admin = visitor(&site, ADMINISTRATOR).await;
    let shown = |body: &str| body.matches("<td data-label=\"Machine\"").count();
    let first = admin.get("/").await;
    assert!(first.body.contains("Not as it should be: 120 of 121 need a look"), "{}", first.body);
    assert!(shown(&first.body) == 50 && first.body.contains("other-000") && !first.body.contains(">web<"));
    let (_, next) = first.body.split_once("href=\"/?from=50&amp;name=\" rel=\"next\"").unwrap();
    assert!(!next.contains("rel=\"next\""));
    assert_eq!(shown(&admin.get("/?from=50&name=").await.body), 50);
    let last = admin.get("/?from=100&name=").await.body;
    assert!(shown(&last) == 21 && last.contains(">web<") && !last.contains("rel=\"next\""), "{last}");
    let found = admin.get("/?name=WEB").await.body;
    assert!(shown(&found) == 1 && found.contains(">web<"), "{found}");
    assert_eq!(shown(&admin.get("/?name=nobody").await.body), 0);
    assert_eq!(shown(&admin.get("/?from=100000").await.body), 0);
}

/// Who is told of alerts is changed by a form, which an administrator has.
#[tokio::test]
async fn who_is_told_of_alerts_is_set_by_a_form() {
    let site = site().await;
    let admin = visitor(&site, ADMINISTRATOR).await;
    let csrf = admin.csrf().await;
    let form = |rest: &str| {
        format!(
            "csrf={csrf}&application_point_age_s=3600&cache_used_percent=70&store_free_percent=5&certificate_days=9&security=starttls&port=25{rest}"
        )
    };
    let good = "&webhooks=http%3A%2F%2F127.0.0.1%3A9%2Fa%0D%0A%0D%0Ahttp%3A%2F%2F127.0.0.1%3A9%2Fb&server=mail.invalid\
        &user=u&password=secret+word&from=a%40example.org&to=b%40example.org%0Ac%40example.org";
    let got = admin.post("/settings/alerts", &form(good)).await;
    assert_eq!((got.status, got.head("location")), (303, "/settings/alerts"), "{got:?}");
    let kept: control::fleet::AlertSettings =
        site.administrator().await.get("/settings/alerts").await.unwrap();
    assert_eq!((kept.cache_used_percent, kept.certificate_days), (70, 9));
    let urls: Vec<&str> = kept.webhooks.iter().map(|webhook| webhook.url.as_str()).collect();
    assert_eq!(urls, ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b"]);
    assert_eq!(kept.mail.unwrap().to, ["b@example.org", "c@example.org"]);
    let page = admin.get("/settings/alerts").await.body;
    assert!(page.contains("3 receivers are told") && !page.contains("secret word"), "{page}");
    let got = admin.post("/settings/alerts/test", &format!("csrf={csrf}")).await;
    assert_eq!((got.status, got.head("location")), (303, "/settings/alerts?sent=true"), "{got:?}");
    let bad = admin.post("/settings/alerts", &form("&webhooks=ftp%3A%2F%2Fx&server=")).await;
    assert!(bad.status == 422 && bad.body.contains("ftp"), "{bad:?}");
    site.make_user("operates", Role::Operator).await;
    let operator = visitor(&site, "operates").await;
    assert!(operator.get("/settings/alerts").await.body.contains("An administrator may change them"));
    let csrf = operator.csrf().await;
    let got = operator
        .post(
            "/settings/alerts",
            &form("&server=").replacen(&form("")[..5 + csrf.len()], &format!("csrf={csrf}"), 1),
        )
        .await;
    assert_eq!(got.status, 403, "{got:?}");
}

/// A plan is kept, run, answered and reported with the console alone.
#[tokio::test]
async fn a_plan_is_run_from_its_pages() {
    let site = site().await;
    let admin = visitor(&site, ADMINISTRATOR).await;
    let csrf = admin.csrf().await;
    let text = "name%3A+shop%0D%0Asteps%3A%0D%0A-+%7Bid%3A+key%2C+manual%3A+%7Btext%3A+%22Turn+%3Cit%3E%22%7D%7D%0D%0A";
    let wrong = admin.post("/plans", &format!("csrf={csrf}&text=name%3A+shop")).await;
    assert!(wrong.status == 422 && wrong.body.contains("steps"), "{wrong:?}");
    let kept = admin.post("/plans", &format!("csrf={csrf}&text={text}")).await;
    assert_eq!(kept.status, 303, "{kept:?}");
    let plan = kept.head("location").to_owned();
    let page = admin.get(&plan).await;
    assert!(page.body.contains("seawall plan run shop --mode dry-run --watch"), "{page:?}");
    assert!(page.body.contains("Turn &lt;it&gt;") && !page.body.contains("Turn <it>"), "{page:?}");
    let refused = admin.post(&format!("{plan}/run"), &format!("csrf={csrf}&mode=drill&confirm=sohp")).await;
    assert!(refused.status == 422 || refused.status == 409, "{refused:?}");
    let begun = admin.post(&format!("{plan}/run"), &format!("csrf={csrf}&mode=drill&confirm=shop")).await;
    assert_eq!(begun.status, 303, "{begun:?}");
    let run = begun.head("location").to_owned();
    let waits = async |wanted: &str| {
        for _ in 0..600 {
            let page = admin.get(&run).await;
            if page.body.contains(wanted) {
                return page;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("{:?}", admin.get(&run).await);
    };
    let page = waits("It is done").await;
    assert!(page.body.contains("seawall plan confirm shop --step key"), "{page:?}");
    let given = admin.post(&format!("{run}/answer"), &format!("csrf={csrf}&step=key&done=&note=lost")).await;
    assert_eq!((given.status, given.head("location")), (303, run.as_str()), "{given:?}");
    waits("Go on at the failed step").await;
    let resumed = admin.post(&format!("{run}/resume"), &format!("csrf={csrf}")).await;
    assert_eq!((resumed.status, resumed.head("location")), (303, run.as_str()), "{resumed:?}");
    waits("It is done").await;
    admin.post(&format!("{run}/answer"), &format!("csrf={csrf}&step=key&done=yes&note=found")).await;
    waits("data-state=\"done\"").await;
    // The report has its own style, which its policy names, and nothing else.
    let report = admin.get(&format!("{run}/report")).await;
    let policy = report.head("content-security-policy");
    assert!(
        policy.contains("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert!(report.body.contains("Confirmed by user admin. found"), "{report:?}");
    let gone = admin.post(&format!("{plan}/delete"), &format!("csrf={csrf}&confirm=shop")).await;
    assert_eq!((gone.status, gone.head("location")), (303, "/plans"), "{gone:?}");
    assert_eq!(admin.get(&run).await.status, 200, "its run stays");
}
