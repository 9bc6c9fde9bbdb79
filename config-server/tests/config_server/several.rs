//! Several config servers with one PostgreSQL: it does not matter which of them is asked.

use std::collections::BTreeSet;
use std::time::Duration;

use control::fleet::{
    CheckIn, Confirm, EventInfo, GroupInfo, MachineInfo, NewPolicy, Page, PartRole, Policy, PolicyInfo,
    Scope, UnixMillis, UserInfo,
};
use enrol::Client;
use hyper::Method;
use serde_json::Value;

use crate::support::{login, problem, site_on_postgres};

/// Acts that are asked of each at the same time.
const ACTS: usize = 12;

#[tokio::test(flavor = "multi_thread")]
async fn either_of_two_servers_may_be_asked() {
    let Some(mut site) = site_on_postgres("either_of_two_servers_may_be_asked").await else { return };
    let (second, url) = site.another_server().await;
    let trust = site.trust();
    let other =
        |token: Option<&str>| Client::new(url.clone(), &trust, None, token.map(str::to_owned)).unwrap();

    // What one gives out the other knows: sessions by token, tokens for parts, users.
    let here = site.administrator().await;
    let made: control::fleet::MadeToken = here
        .post(
            "/tokens",
            &control::fleet::NewApiToken {
                name: "program".parse().unwrap(),
                scopes: vec![Scope::Read, Scope::Operate, Scope::Administer],
                days: 1,
            },
        )
        .await
        .unwrap();
    let there = other(Some(&made.token));
    assert_eq!(there.get::<UserInfo>("/me").await.unwrap(), here.get::<UserInfo>("/me").await.unwrap());

    // A token for one part lets in one, whoever is asked at once.
    let token = site.enrol_token(PartRole::Agent).await;
    let join = |url: enrol::ServerUrl, name: &'static str| {
        let (token, state) = (token.clone(), site.base.path().join(name));
        async move { enrol::join(url, &token, PartRole::Agent, name.parse().unwrap(), &state).await }
    };
    let (a, b, c, d) = tokio::join!(
        join(site.url.clone(), "a"),
        join(url.clone(), "b"),
        join(site.url.clone(), "c"),
        join(url.clone(), "d")
    );
    assert_eq!([&a, &b, &c, &d].iter().filter(|joined| joined.is_ok()).count(), 1);

    // Events: acts on both at once, one order that both tell, without gaps.
    let (seen, mut events) = tokio::sync::mpsc::unbounded_channel();
    let follower = other(Some(&made.token));
    let following = tokio::spawn(async move {
        follower
            .follow("/events/stream?after=0", |event| {
                seen.send(serde_json::from_str::<EventInfo>(event).unwrap()).is_ok()
            })
            .await
    });
    let make = |client: Client, side: &'static str| async move {
        for number in 0..ACTS {
            let name = format!("{side}-{number}").parse().unwrap();
            let new = NewPolicy { name, policy: Policy::default() };
            client.post::<_, PolicyInfo>("/policies", &new).await.unwrap();
        }
    };
    tokio::join!(make(site.with_token(&made.token), "here"), make(other(Some(&made.token)), "there"));
    let mut told = BTreeSet::new();
    let mut last = 0;
    while told.len() < 2 * ACTS {
        let event = tokio::time::timeout(Duration::from_secs(30), events.recv()).await.unwrap().unwrap();
        assert_eq!(event.id, last + 1, "{event:?}");
        last = event.id;
        if event.message.contains("here-") || event.message.contains("there-") {
            told.insert(event.message);
        }
    }
    following.abort();
    let all: Page<EventInfo> = here.get("/events?last=1000").await.unwrap();
    assert!(all.items.windows(2).all(|pair| pair[1].id == pair[0].id + 1));

    // A part says how it is to one, and is thrown out by the other.
    let state = site.enrol(PartRole::Agent, "web").await;
    let credentials = wire::Credentials::load(&state.join(enrol::CURRENT)).unwrap();
    let part = Client::new(url.clone(), &trust, Some(&credentials), None).unwrap();
    let said = CheckIn { version: "2".into(), time: UnixMillis::now(), ..CheckIn::default() };
    part.post::<_, Value>("/part/check-in", &said).await.unwrap();
    let machines: Page<MachineInfo> = here.get("/machines").await.unwrap();
    let machine = machines.items.iter().find(|machine| machine.name.as_str() == "web").unwrap();
    assert!(machine.seen.is_some(), "{machine:?}");
    let path = format!("/machines/{}", machine.id);
    let confirmed = Confirm { confirm: "web".into() };
    here.call::<_, Value>(Method::DELETE, &path, Some(&confirmed)).await.unwrap();
    assert_eq!(problem(part.post::<_, Value>("/part/check-in", &said).await).code, "revoked");

    // Guesses are counted together.
    let mut codes = Vec::new();
    for number in 0..8 {
        let stranger = if number % 2 == 0 { site.stranger() } else { other(None) };
        codes.push(problem(stranger.login(&login("admin", "wrong horse battery")).await).code);
    }
    assert_eq!(codes.last().unwrap(), "too-many", "{codes:?}");

    // When one is gone, the other goes on.
    site.stop().await;
    assert!(here.get::<UserInfo>("/me").await.is_err());
    let policies: Vec<PolicyInfo> = there.get("/policies").await.unwrap();
    assert!(policies.len() > 2 * ACTS);
    second.shutdown().await;
}

/// What a server has at hand is never older than what another one was told.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_to_one_is_seen_at_the_other() {
    let Some(site) = site_on_postgres("what_is_told_to_one_is_seen_at_the_other").await else { return };
    let (second, url) = site.another_server().await;
    let here = site.administrator().await;
    let there = Client::new(url, &site.trust(), None, None).unwrap();
    there.login(&login("admin", crate::support::PASSWORD)).await.unwrap();
    let mut parts = crate::parts::Parts::enrol(&site).await;
    let group = parts.protect(&here).await;
    let paths = [format!("/groups/{}", group.id), "/groups".into(), "/groups?order=attention".into()];
    let seen = async |client: &Client| -> Vec<GroupInfo> {
        let mut seen = vec![client.get(&paths[0]).await.unwrap()];
        for path in &paths[1..] {
            seen.extend(client.get::<Page<GroupInfo>>(path).await.unwrap().items);
        }
        assert_eq!(seen.len(), 3);
        seen
    };
    // Reports go to the first only; each looks before and after.
    for age in [3600, 1, 7200, 2] {
        parts.age = Some(Duration::from_secs(age));
        parts.round().await;
        for client in [&here, &there] {
            for group in seen(client).await {
                let told = group.rpo_ms.unwrap() / 1000;
                assert!((age as i64..age as i64 + 60).contains(&told), "{told} s old, {age} s were told");
            }
        }
    }
    // What is declared at the second is seen at the first.
    for allowed in [7, 8] {
        let policy = Policy { rpo_s_max: allowed, ..Policy::default() };
        let new = NewPolicy { name: format!("allows-{allowed}").parse().unwrap(), policy };
        let made: PolicyInfo = there.post("/policies", &new).await.unwrap();
        let changed = serde_json::json!({ "policy": made.id });
        there.call::<_, Value>(Method::PATCH, &paths[0], Some(&changed)).await.unwrap();
        for client in [&there, &here] {
            for group in seen(client).await {
                assert_eq!((group.rpo_ms_max, &group.policy), (allowed as i64 * 1000, &made.id));
            }
        }
    }
    second.shutdown().await;
}
