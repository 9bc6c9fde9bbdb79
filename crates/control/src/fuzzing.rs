//! What the fuzzer throws at texts that others send: requests, reports, bodies of the config server's API. Built for it alone.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fleet::*;
use crate::{
    AgentAnswer, AgentReport, AgentRequest, OperatorRequest, PointSelector, ProcessServerStatus,
    TargetServerStatus,
};

/// What is read means the same when it is written and read again.
fn json<T: DeserializeOwned + Serialize>(data: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(data) {
        let text = serde_json::to_vec(&value).expect("what was read can be written");
        let again: T = serde_json::from_slice(&text).expect("what we write we read");
        assert_eq!(serde_json::to_vec(&again).expect("as before"), text);
    }
}

/// What operators and agents ask of a server, and what parts report to each other.
pub fn requests(data: &[u8]) {
    json::<OperatorRequest>(data);
    json::<AgentRequest>(data);
    json::<AgentAnswer>(data);
    json::<AgentReport>(data);
    json::<ProcessServerStatus>(data);
    json::<TargetServerStatus>(data);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(selector) = text.parse::<PointSelector>()
    {
        assert_eq!(selector.to_string().parse(), Ok(selector));
    }
}

/// What [`requests`] begins with.
pub fn requests_seeds() -> Vec<Vec<u8>> {
    [
        r#"{"request":"status"}"#,
        r#"{"request":"points","group":"00000000000000000000000000000001"}"#,
        r#"{"request":"resync","volume":"sda","when":"now"}"#,
        r#"{"state":"in-sync","volumes":[{"name":"sda","id":"00000000000000000000000000000001","bytes":1048576}]}"#,
        r#"{"state":"in-sync","groups":[]}"#,
        "latest",
        "2026-01-02T03:04:05Z",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

fn text(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("it can be written")
}

/// What parts send the config server when they enrol and check in, and what they are told.
pub fn parts(data: &[u8]) {
    json::<Enrol>(data);
    json::<Enrolled>(data);
    json::<Renew>(data);
    json::<Renewed>(data);
    json::<CheckIn>(data);
    json::<CheckInReply>(data);
    json::<Desired>(data);
    json::<Revoked>(data);
    json::<Task>(data);
}

/// What [`parts`] begins with.
pub fn parts_seeds() -> Vec<Vec<u8>> {
    let check_in = CheckIn {
        version: "0.1.0".into(),
        disks: Some(vec![DiskInfo {
            device: "/dev/sda".into(),
            known_by: "wwn".into(),
            bytes: 1 << 30,
            written_bytes_per_s: Some(7),
            uses: Vec::new(),
        }]),
        guests: Some(vec![GuestInfo {
            name: "db".into(),
            state: "shut off".into(),
            disks: vec![GuestDisk { target: "vda".into(), source: "/img".into() }],
        }]),
        capacity: Some(Capacity { bytes_total: 9, bytes_free: 3 }),
        ..CheckIn::default()
    };
    vec![
        text(&check_in),
        text(&CheckInReply::default()),
        text(&Desired::Agent(DesiredAgent::default())),
        text(&Desired::ProcessServer(DesiredProcessServer::default())),
        text(&Desired::TargetServer(DesiredTargetServer::default())),
        text(&Revoked { version: 3, serials: vec!["0aff".into()] }),
        br#"{"token":"t","role":"agent","name":"web-1","request":"pem"}"#.to_vec(),
        br#"{"request":"pem"}"#.to_vec(),
    ]
}

/// What people and programs send the config server.
pub fn api(data: &[u8]) {
    json::<Login>(data);
    json::<NewUser>(data);
    json::<ChangeUser>(data);
    json::<ChangePassword>(data);
    json::<NewApiToken>(data);
    json::<NewEnrolToken>(data);
    json::<NewPolicy>(data);
    json::<Protect>(data);
    json::<Unprotect>(data);
    json::<ChangeGroup>(data);
    json::<ChangeTargets>(data);
    json::<PointNow>(data);
    json::<ApprovalAnswer>(data);
    json::<Settings>(data);
    json::<Problem>(data);
    json::<plan::RunPlan>(data);
    json::<plan::AnswerStep>(data);
    // Whether a policy can be meant is said, whatever it is.
    if let Ok(policy) = serde_json::from_slice::<NewPolicy>(data) {
        let _ = policy.policy.check();
    }
    // What was read as a plan is one when it is written again.
    if let Ok(plan) = std::str::from_utf8(data).map_err(drop).and_then(|text| Plan::read(text).map_err(drop))
    {
        let text = serde_json::to_string(&plan).expect("a plan can be written");
        if text.len() <= plan::PLAN_TEXT_BYTES_MAX {
            assert_eq!(Plan::read(&text), Ok(plan));
        }
    }
}

/// What [`api`] begins with.
pub fn api_seeds() -> Vec<Vec<u8>> {
    let policy = serde_json::to_vec(&Policy::default()).expect("a policy can be written");
    let policy = String::from_utf8(policy).expect("JSON is UTF-8");
    [
        format!(r#"{{"name":"gold","policy":{policy}}}"#).as_str(),
        r#"{"name":"root","password":"secret"}"#,
        r#"{"name":"eve","role":"operator","password":"secret"}"#,
        r#"{"role":"agent","minutes":60}"#,
        r#"{"volumes":[],"policy":"00000000000000000000000000000001"}"#,
        r#"{"confirm":"web-1"}"#,
        include_str!("../../../docs/plan-example.yaml"),
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read() {
        let [requests_seeds, parts_seeds, api_seeds] = [requests_seeds(), parts_seeds(), api_seeds()];
        requests_seeds.iter().for_each(|seed| requests(seed));
        parts_seeds.iter().for_each(|seed| parts(seed));
        api_seeds.iter().for_each(|seed| api(seed));
        assert!(serde_json::from_slice::<OperatorRequest>(&requests_seeds[0]).is_ok());
        assert!(serde_json::from_slice::<CheckIn>(&parts_seeds[0]).is_ok());
        assert!(serde_json::from_slice::<Enrol>(&parts_seeds[6]).is_ok());
        assert!(serde_json::from_slice::<NewPolicy>(&api_seeds[0]).is_ok());
        assert!(serde_json::from_slice::<Login>(&api_seeds[1]).is_ok());
    }
}
