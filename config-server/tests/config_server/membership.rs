use std::time::Duration;

use control::fleet::UnixMillis;
use control::fleet::{
    CheckIn, CheckInReply, Confirm, Desired, EventInfo, MachineInfo, Page, PartRole, Renew, Renewed,
    ResourceId,
};
use hyper::Method;
use serde_json::Value;

use crate::support::{Site, on_both, problem};

on_both! { a_token_enrols_one_part_once, parts_report_renew_and_are_revoked, events_are_streamed_in_order_and_without_gaps }

fn said() -> CheckIn {
    CheckIn { version: "1".into(), time: UnixMillis::now(), ..CheckIn::default() }
}

async fn a_token_enrols_one_part_once(site: Site) {
    let token = site.enrol_token(PartRole::Agent).await;
    let dir = |name: &str| site.base.path().join(name);
    let join = |token: String, role: PartRole, name: &'static str| {
        let (url, state) = (site.url.clone(), dir(name));
        async move { enrol::join(url, &token, role, name.parse().unwrap(), &state).await }
    };
    // For another kind of part, or with another server's fingerprint, it is none.
    assert_eq!(problem(join(token.clone(), PartRole::TargetServer, "t").await).code, "unauthenticated");
    let (secret, fingerprint) = token.split_once('.').unwrap();
    let other = fingerprint.replace(['0', '1', '2', '3'], "f");
    let error = join(format!("{secret}.{other}"), PartRole::Agent, "m").await.unwrap_err();
    assert!(matches!(error, enrol::EnrolError::Tls { .. }), "{error}");
    assert!(!dir("m").exists() && !dir("t").exists());
    // Of many who come at once with the same token, one gets in.
    let (a, b, c) = tokio::join!(
        join(token.clone(), PartRole::Agent, "a"),
        join(token.clone(), PartRole::Agent, "b"),
        join(token.clone(), PartRole::Agent, "c")
    );
    assert_eq!([&a, &b, &c].iter().filter(|joined| joined.is_ok()).count(), 1);
    let machines: Page<MachineInfo> = site.administrator().await.get("/machines").await.unwrap();
    assert_eq!(machines.items.len(), 1);
    let name = machines.items[0].name.clone();
    assert_eq!([a, b, c].into_iter().flatten().next().unwrap().group, Some(machines.items[0].group));
    // A name that is taken is refused, and the token is not used up by it.
    let token = site.enrol_token(PartRole::Agent).await;
    let again = enrol::join(site.url.clone(), &token, PartRole::Agent, name, &dir("again")).await;
    assert_eq!(problem(again).code, "conflict");
    join(token, PartRole::Agent, "d").await.unwrap();
}

async fn parts_report_renew_and_are_revoked(site: Site) {
    let state = site.enrol(PartRole::Agent, "web").await;
    let other = site.enrol(PartRole::TargetServer, "dr").await;
    let agent = site.part(&state);
    let reply: CheckInReply = agent.post("/part/check-in", &said()).await.unwrap();
    let Some(Desired::Agent(desired)) = reply.desired else { panic!("{reply:?}") };
    assert!(desired.protection.is_none());
    // Told once.
    let again: CheckInReply =
        agent.post("/part/check-in", &CheckIn { digest: reply.digest.clone(), ..said() }).await.unwrap();
    assert_eq!((again.desired, again.digest), (None, reply.digest));

    // Without a certificate, or with a person's session, nobody is a part; and a part is no person.
    assert_eq!(
        problem(site.stranger().post::<_, Value>("/part/check-in", &said()).await).code,
        "unauthenticated"
    );
    let administrator = site.administrator().await;
    assert_eq!(
        problem(administrator.post::<_, Value>("/part/check-in", &said()).await).code,
        "unauthenticated"
    );
    assert_eq!(problem(agent.get::<Value>("/machines").await).code, "unauthenticated");

    let (_, request) = wire::new_request().unwrap();
    let renewed: Renewed = agent.post("/part/renew", &Renew { request: request.clone() }).await.unwrap();
    assert!(renewed.certificate.contains("BEGIN CERTIFICATE"));
    let damaged = Renew { request: request.replace("MI", "MJ") };
    assert_eq!(problem(agent.post::<_, Value>("/part/renew", &damaged).await).code, "invalid");

    let machines: Page<MachineInfo> = administrator.get("/machines").await.unwrap();
    let machine = &machines.items[0];
    assert!(machine.seen.is_some());
    let path = format!("/machines/{}", machine.id);
    let wrong = Confirm { confirm: "dr".into() };
    assert_eq!(
        problem(administrator.call::<_, Value>(Method::DELETE, &path, Some(&wrong)).await).code,
        "not-confirmed"
    );
    let right = Confirm { confirm: "web".into() };
    administrator.call::<_, Value>(Method::DELETE, &path, Some(&right)).await.unwrap();
    assert_eq!(problem(agent.post::<_, Value>("/part/check-in", &said()).await).code, "revoked");
    // The others hear of both certificates.
    let reply: CheckInReply = site.part(&other).post("/part/check-in", &said()).await.unwrap();
    let revoked = reply.revoked.unwrap();
    assert_eq!(revoked.serials.len(), 2, "{revoked:?}");
    let serial = wire::Credentials::load(&state.join(enrol::CURRENT)).unwrap().serial().as_str().to_owned();
    assert!(revoked.serials.contains(&serial));
    let reply: CheckInReply = site
        .part(&other)
        .post("/part/check-in", &CheckIn { revoked_version: revoked.version, ..said() })
        .await
        .unwrap();
    assert_eq!(reply.revoked, None);
    // The name can be used again, by another.
    let fresh = site.enrol_token(PartRole::Agent).await;
    let again = site.base.path().join("web-2");
    enrol::join(site.url.clone(), &fresh, PartRole::Agent, "web".parse().unwrap(), &again).await.unwrap();
}

async fn events_are_streamed_in_order_and_without_gaps(site: Site) {
    let token = site.token(&site.administrator().await, &[control::fleet::Scope::Read]).await;
    let (seen, mut events) = tokio::sync::mpsc::unbounded_channel();
    let following = tokio::spawn(async move {
        token
            .follow("/events/stream?after=0", |event| {
                seen.send(serde_json::from_str::<EventInfo>(event).unwrap()).is_ok()
            })
            .await
    });
    site.enrol(PartRole::Agent, "one").await;
    site.enrol(PartRole::Agent, "two").await;
    let mut last: i64 = 0;
    let mut messages = Vec::new();
    while !messages.iter().any(|message: &String| message.contains("agent two enrolled")) {
        let event = tokio::time::timeout(Duration::from_secs(20), events.recv()).await.unwrap().unwrap();
        assert_eq!(event.id, last + 1);
        last = event.id;
        messages.push(event.message);
    }
    assert!(messages.iter().any(|message| message.contains("agent one enrolled")), "{messages:?}");
    following.abort();
    // The newest few, without reading all that were before.
    let client = site.administrator().await;
    let newest: Page<EventInfo> = client.get("/events?last=2").await.unwrap();
    let ids: Vec<i64> = newest.items.iter().map(|event| event.id).collect();
    assert!(ids == [ids[0], ids[0] + 1] && ids[1] >= last && newest.next.is_none(), "{ids:?}");
    for bad in ["last=0", "last=1001", "last=1&after=0", "last=1&limit=1"] {
        let refused = client.get::<Page<EventInfo>>(&format!("/events?{bad}")).await;
        assert_eq!(problem(refused).code, "invalid", "{bad}");
    }
    let _: ResourceId = "0".repeat(32).parse().unwrap();
}
