//! Several config servers with one PostgreSQL: it does not matter which of them is asked.

use std::collections::BTreeSet;
use std::time::Duration;

use control::fleet::{
    CheckIn, Confirm, EventInfo, MachineInfo, NewPolicy, Page, PartRole, Policy, PolicyInfo, Scope,
    UnixMillis, UserInfo,
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
