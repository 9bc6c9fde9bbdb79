//! The API against its own document: every act, with what the document allows and with all that it does not, as administrator,
//! viewer, part and nobody. Whatever comes, the config server does not fail, every refusal is a problem document, and every answer is
//! what the document says. SEAWALL_API_SEED gives other values than the usual ones.

mod schema;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use control::fleet::{PolicyInfo, ProblemCode, Role, Scope, UserInfo};
use enrol::Client;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use crate::parts::Parts;
use crate::support::{Site, on_both};
use schema::{Dice, Document};

on_both! { every_act_is_as_the_document_says }

/// Bodies as the document says, of each act.
const VALID: usize = 4;
/// Bodies of each act in which something was changed.
const CHANGED: usize = 14;
/// Queries of each act.
const QUERIES: usize = 6;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Nobody,
    Viewer,
    Administrator,
    Part,
}

/// A request, and what must come of it.
#[derive(Clone, Debug)]
struct Asked {
    who: Who,
    method: String,
    path: String,
    kind: Option<&'static str>,
    body: Vec<u8>,
    /// It must be refused.
    refused: Option<String>,
    /// With this status.
    status: Option<u16>,
}

struct Conversation<'a> {
    site: &'a Site,
    document: &'a Document,
    part: wire::Credentials,
    tokens: [String; 2],
    connections: [Option<SendRequest<Full<Bytes>>>; 2],
    asked: usize,
    /// Answers by hundreds of their status.
    answers: [usize; 6],
    /// Answers that should not have come.
    wrong: Vec<String>,
}

impl Conversation<'_> {
    /// A connection; parts show their certificate.
    async fn connect(&self, who: Who) -> SendRequest<Full<Bytes>> {
        let shown = (who == Who::Part).then_some(&self.part);
        let (config, name) = wire::web_client(&self.site.trust(), shown).unwrap();
        let stream = tokio::net::TcpStream::connect(&self.site.config.listen).await.unwrap();
        let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.unwrap();
        let (sending, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sending
    }

    async fn ask(&mut self, operation: &Value, asked: &Asked) {
        self.asked += 1;
        let place = usize::from(asked.who == Who::Part);
        let mut kept = self.connections[place].take();
        if let Some(sending) = &mut kept
            && sending.ready().await.is_err()
        {
            kept = None;
        }
        let mut sending = match kept {
            Some(kept) => kept,
            None => self.connect(asked.who).await,
        };
        let mut request = Request::builder()
            .method(asked.method.to_uppercase().as_str())
            .uri(&asked.path)
            .header("host", &self.site.config.listen);
        if let Some(kind) = asked.kind {
            request = request.header("content-type", kind);
        }
        if matches!(asked.who, Who::Viewer | Who::Administrator) {
            let token = &self.tokens[usize::from(asked.who == Who::Administrator)];
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Full::new(Bytes::from(asked.body.clone()))).unwrap();
        let response =
            sending.send_request(request).await.unwrap_or_else(|error| panic!("{asked:?}: {error}"));
        let (head, body) = response.into_parts();
        let kind = head.headers.get("content-type").map(|kind| kind.to_str().unwrap().to_owned());
        let kind = kind.unwrap_or_default();
        let status = head.status.as_u16();
        self.answers[usize::from(status / 100).min(5)] += 1;
        if kind.starts_with("text/event-stream") {
            assert_eq!(status, 200, "{asked:?}");
            assert!(operation["responses"]["200"]["content"]["text/event-stream"].is_object(), "{asked:?}");
            return; // It does not end; the connection goes.
        }
        let body = body.collect().await.unwrap().to_bytes();
        self.connections[place] = Some(sending);
        if let Err(error) = judge(self.document, operation, asked, status, &kind, &body) {
            let text: String = String::from_utf8_lossy(&body).chars().take(1000).collect();
            self.wrong.push(format!("{error:#}\n  {}\n  {status} {kind} {text}", shown(asked)));
        }
    }
}

/// Whether an answer is one that may come.
fn judge(
    document: &Document,
    operation: &Value,
    asked: &Asked,
    status: u16,
    kind: &str,
    body: &[u8],
) -> anyhow::Result<()> {
    ensure!(status < 500, "the config server failed");
    ensure!(asked.status.is_none_or(|expected| status == expected), "it is not {:?}", asked.status);
    if status >= 400 {
        ensure!(kind == "application/problem+json", "a refusal is a problem document");
        let problem: Value = serde_json::from_slice(body)?;
        let wrong = document.violations(&json!({ "$ref": "#/components/schemas/Problem" }), &problem);
        ensure!(wrong.is_empty(), "{wrong:?}");
        let code = ProblemCode::ALL.iter().find(|code| problem["code"] == code.code());
        let code = code.context("an unknown code")?;
        ensure!(code.status() == status && problem["status"] == status, "the code has another status");
        ensure!(problem["type"] == format!("urn:seawall:problem:{}", code.code()), "the type is another");
        for field in ["detail", "mend"] {
            ensure!(problem[field].as_str().is_some_and(|text| text.len() > 10), "{field} says nothing");
        }
        return Ok(());
    }
    if let Some(why) = &asked.refused {
        bail!("it was done although {why}");
    }
    let documented = &operation["responses"][status.to_string()];
    ensure!(documented.is_object(), "the status is not in the document");
    let Some((documented_kind, content)) =
        documented["content"].as_object().and_then(|kinds| kinds.iter().next())
    else {
        ensure!(body.is_empty(), "the document tells of no body");
        return Ok(());
    };
    ensure!(kind == documented_kind, "the type is not {documented_kind}");
    let value: Value = serde_json::from_slice(body)?;
    if content["schema"]["type"] != "string" {
        let wrong = document.violations(&content["schema"], &value);
        ensure!(wrong.is_empty(), "{wrong:#?}");
    }
    Ok(())
}

fn shown(asked: &Asked) -> String {
    let body: String = String::from_utf8_lossy(&asked.body).chars().take(2000).collect();
    format!("{:?} asked {} {} with {:?} {body}", asked.who, asked.method, asked.path, asked.kind)
}

/// Bytes as they go into a path or a query.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// Whom an act is for.
fn for_whom(operation: &Value) -> Who {
    let says = operation["description"].as_str().unwrap_or_default();
    match says {
        _ if says.starts_with("For anybody") => Who::Nobody,
        _ if says.starts_with("For a part") => Who::Part,
        _ if says.starts_with("For a viewer") => Who::Viewer,
        _ => Who::Administrator,
    }
}

/// Everything that is asked of one act.
fn requests(document: &Document, dice: &mut Dice, method: &str, path: &str, operation: &Value) -> Vec<Asked> {
    let needed = for_whom(operation);
    let who = if needed == Who::Viewer { Who::Administrator } else { needed };
    let mut ids: Vec<String> = document.ids.clone();
    let has_id = path.contains("{id}");
    if !has_id {
        ids.truncate(1);
    }
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    let with = |dice: &mut Dice, who: Who, body: &Value| Asked {
        who,
        method: method.to_owned(),
        path: path.replace("{id}", dice.pick::<String>(&ids)),
        kind: schema.is_object().then_some("application/json"),
        body: if schema.is_object() { body.to_string().into_bytes() } else { Vec::new() },
        refused: None,
        status: None,
    };
    let body = |dice: &mut Dice| match schema.is_object() {
        true => document.valid(dice, schema),
        false => Value::Null,
    };
    let mut all = Vec::new();
    // Whoever may not is told so before anything else is looked at.
    let value = body(dice);
    if !matches!(needed, Who::Nobody) {
        all.push(Asked { status: Some(401), ..with(dice, Who::Nobody, &value) });
    }
    if matches!(needed, Who::Administrator) {
        all.push(Asked { status: Some(403), ..with(dice, Who::Viewer, &value) });
    }
    // As the document says: of every thing that there is, and then some.
    if method == "get" {
        all.extend(ids.iter().map(|id| Asked { path: path.replace("{id}", id), ..with(dice, who, &value) }));
    }
    for _ in 0..VALID {
        let value = body(dice);
        all.push(with(dice, who, &value));
    }
    if has_id {
        for odd in ["0", "..%2F..%2Fx", "%00", "%C3%28", "%F0%9F%98%80", &"a".repeat(5000), &"0".repeat(32)] {
            let path = path.replace("{id}", odd);
            all.push(Asked { path, refused: Some("nothing has this id".into()), ..with(dice, who, &value) });
        }
    }
    // Queries: those that there are, with anything; and one that there is not.
    let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
    let parameters: Vec<&Value> = parameters.iter().filter(|one| one["in"] == "query").collect();
    let asked = with(dice, who, &value);
    let path_of = asked.path.clone();
    all.push(Asked {
        path: format!("{path_of}?unheard={}", dice.roll(9)),
        refused: Some("there is no such parameter".into()),
        ..asked.clone()
    });
    for parameter in parameters {
        for _ in 0..QUERIES {
            let valid = document.valid(dice, &parameter["schema"]);
            let value = match dice.roll(2) {
                0 => valid,
                _ => document.changed(dice, &valid),
            };
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let name = parameter["name"].as_str().unwrap();
            let is_number = parameter["schema"]["type"] == "integer";
            let meant = if is_number {
                text.parse::<i64>().map_or(text.as_str().into(), Value::from)
            } else {
                text.as_str().into()
            };
            let wrong = document.violations(&parameter["schema"], &meant);
            // Nothing, where nothing may be given, is left out.
            let refused = (!wrong.is_empty() && !text.is_empty()).then(|| format!("{wrong:?}"));
            all.push(Asked {
                path: format!("{path_of}?{name}={}", escaped(&text)),
                refused,
                ..asked.clone()
            });
        }
    }
    if !schema.is_object() {
        return all;
    }
    for _ in 0..CHANGED {
        let valid = document.valid(dice, schema);
        let changed = document.changed(dice, &valid);
        let wrong = document.violations(schema, &changed);
        let refused = (!wrong.is_empty()).then(|| format!("{wrong:?}"));
        all.push(Asked { refused, ..with(dice, who, &changed) });
    }
    // What is refused for a limit must not have been refused anyway.
    let full = document.full(dice, schema);
    let accepted = path.ends_with("/part/check-in").then_some(200);
    all.push(Asked { status: accepted, ..with(dice, who, &full) });
    for past in document.beyond(&full, schema) {
        let wrong = document.violations(schema, &past);
        assert!(!wrong.is_empty(), "{method} {path}: {past} is past a limit");
        all.push(Asked { refused: Some(format!("{wrong:?}")), ..with(dice, who, &past) });
    }
    let text = value.to_string();
    let deep = "[".repeat(100_000);
    let mut late = text.clone().into_bytes();
    late.push(0xff);
    for (kind, body, why) in [
        (Some("application/json"), Vec::new(), "there is no body"),
        (Some("application/json"), text.as_bytes()[..text.len() - 1].to_vec(), "the body ends early"),
        (Some("application/json"), format!("{text}{text}").into_bytes(), "there are two bodies"),
        (Some("application/json"), late, "it is not UTF-8"),
        (Some("application/json"), deep.into_bytes(), "it is too deep"),
        (Some("application/json"), format!("[{text}]").into_bytes(), "it is in an array"),
        (Some("text/plain"), text.clone().into_bytes(), "its type is another"),
        (Some("application/x-www-form-urlencoded"), b"name=x".to_vec(), "it is a form"),
        (None, text.clone().into_bytes(), "it has no type"),
    ] {
        all.push(Asked { kind, body, refused: Some(why.into()), ..asked.clone() });
    }
    if needed != Who::Part {
        let large = json!({ "name": "x".repeat(300 * 1024) }).to_string().into_bytes();
        all.push(Asked { body: large, status: Some(413), refused: Some("it is too large".into()), ..asked });
    }
    all
}

async fn every_act_is_as_the_document_says(site: Site) {
    let seed = match std::env::var("SEAWALL_API_SEED") {
        Ok(text) => text.parse().expect("SEAWALL_API_SEED is a number"),
        Err(_) => 0x5ea_3a11,
    };
    println!("SEAWALL_API_SEED={seed}");
    let mut dice = Dice::new(seed);
    let administrator = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&administrator).await;
    let viewer = site.make_user("looks", Role::Viewer).await;
    let token = async |client: &Client, scope| {
        let new = json!({ "name": "asks", "scopes": [scope], "days": 1 });
        let made: Value = client.post("/tokens", &new).await.unwrap();
        made["token"].as_str().unwrap().to_owned()
    };
    let tokens = [token(&viewer, Scope::Read).await, token(&administrator, Scope::Administer).await];
    // Of everything one, whose end does not end the conversation.
    let victim: UserInfo = administrator
        .post("/users", &json!({ "name": "victim", "role": "operator", "password": "correct horse battery" }))
        .await
        .unwrap();
    let policies: Vec<PolicyInfo> = administrator.get("/policies").await.unwrap();
    let made = json!({ "name": "spare", "policy": policies[0].policy });
    let spare: PolicyInfo = administrator.post("/policies", &made).await.unwrap();
    let text =
        "name: shop\nsteps:\n- {id: key, manual: {text: Turn it}}\n- {id: point, point: {groups: [web]}}\n";
    let plan: Value = administrator.post("/plans", &json!({ "text": text })).await.unwrap();
    let run = format!("/plans/{}/run", plan["id"].as_str().unwrap());
    administrator.post::<_, Value>(&run, &json!({ "mode": "planned", "confirm": "shop" })).await.unwrap();
    site.enrol_token(control::fleet::PartRole::Agent).await;
    let of = async |path: &str| -> Vec<String> {
        let found: Value = administrator.get(path).await.unwrap();
        let found = found.get("items").unwrap_or(&found).as_array().cloned().unwrap_or_default();
        found.iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect()
    };
    let mut ids = vec![victim.id.to_string(), spare.id.to_string(), group.id.to_string()];
    for path in
        ["/machines", "/process-servers", "/target-servers", "/policies", "/plans", "/jobs", "/enrol-tokens"]
    {
        ids.extend(of(path).await);
    }
    ids.push("0123456789abcdef0123456789abcdef".into());
    let names =
        ["web", "hub", "dr", "victim", "spare", "default", "asks", "shop", "key"].map(str::to_owned).to_vec();
    let document = Document { root: seawall_config_server::openapi(), names, ids };
    let lone = site.enrol(control::fleet::PartRole::Agent, "lone").await;
    let part = wire::Credentials::load(&lone.join(enrol::CURRENT)).unwrap();
    let mut conversation = Conversation {
        site: &site,
        document: &document,
        part,
        tokens,
        connections: [None, None],
        asked: 0,
        answers: [0; 6],
        wrong: Vec::new(),
    };
    let mut acts: Vec<(&str, &str, &Value)> = Vec::new();
    for (path, methods) in document.root["paths"].as_object().unwrap() {
        acts.extend(
            methods.as_object().unwrap().iter().map(|(method, act)| (method.as_str(), path.as_str(), act)),
        );
    }
    // What takes away comes last.
    acts.sort_by_key(|(method, ..)| {
        ["get", "put", "post", "patch", "delete"].iter().position(|one| one == method)
    });
    for (method, path, operation) in &acts {
        for asked in requests(&document, &mut dice, method, path, operation) {
            conversation.ask(operation, &asked).await;
        }
    }
    let nowhere = Asked {
        who: Who::Administrator,
        method: "get".into(),
        path: "/api/v1/nowhere".into(),
        kind: None,
        body: Vec::new(),
        refused: None,
        status: Some(StatusCode::NOT_FOUND.as_u16()),
    };
    conversation.ask(&Value::Null, &nowhere).await;
    let elsewhere =
        Asked { method: "put".into(), path: "/api/v1/overview".into(), status: Some(405), ..nowhere };
    conversation.ask(&Value::Null, &elsewhere).await;
    let [.., done, _, refused, _] = conversation.answers;
    println!("{} requests to {} acts: {done} were done, {refused} refused", conversation.asked, acts.len());
    let wrong = &conversation.wrong;
    let some: Vec<&str> = wrong.iter().take(40).map(String::as_str).collect();
    assert!(
        wrong.is_empty(),
        "{} answers should not have come, among them:\n{}",
        wrong.len(),
        some.join("\n")
    );
    assert!(acts.len() > 50 && done > 100 && refused > 500);
}
