//! Plans that change DNS, at a real server: BIND, with a key of its own tsig-keygen.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use control::fleet::plan::{NewPlan, PlanInfo, PlanRun, RunMode, RunPlan};
use control::fleet::{JobInfo, JobState, StepState};
use enrol::Client;
use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use tokio::net::UdpSocket;

use crate::support::site;

const NAMED: &str = "/usr/sbin/named";
const KEYGEN: &str = "/usr/sbin/tsig-keygen";

/// A DNS server, stopped when dropped.
struct Named {
    child: Child,
    port: u16,
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A key as tsig-keygen writes it.
fn make_key(dir: &Path, name: &str) -> PathBuf {
    let output = Command::new(KEYGEN).args(["-a", "hmac-sha256", name]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = dir.join(format!("{name}.key"));
    fs::write(&path, output.stdout).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path
}

impl Named {
    async fn start(dir: &Path, key: &Path) -> Named {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        fs::write(
            dir.join("example.com.zone"),
            "$TTL 300\n@ IN SOA ns hostmaster 1 3600 900 86400 300\n@ IN NS ns\nns IN A 127.0.0.1\nshop IN A 192.0.2.1\nshop IN A 192.0.2.2\nshop IN AAAA 2001:db8::1\n",
        )
        .unwrap();
        let conf = format!(
            "include \"{key}\";\noptions {{ directory \"{dir}\"; pid-file none; session-keyfile \"{dir}/session.key\";\n\
             listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }}; recursion no; dnssec-validation no; notify no; }};\n\
             controls {{ }};\nzone \"example.com\" {{ type primary; file \"example.com.zone\"; allow-update {{ key \"seawall\"; }}; }};\n",
            key = key.display(),
            dir = dir.display(),
        );
        fs::write(dir.join("named.conf"), conf).unwrap();
        let log = fs::File::create(dir.join("named.log")).unwrap();
        let mut command = Command::new(NAMED);
        command.args(["-g", "-n", "1", "-c"]).arg(dir.join("named.conf")).stdout(Stdio::null()).stderr(log);
        let named = Named { child: command.spawn().unwrap(), port };
        for _ in 0..600 {
            if named.ask("ns", RecordType::A).await.is_some() {
                return named;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{}", fs::read_to_string(dir.join("named.log")).unwrap());
    }

    /// What is there, sorted; `None` while nobody answers.
    async fn ask(&self, name: &str, kind: RecordType) -> Option<Vec<String>> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(("127.0.0.1", self.port)).await.unwrap();
        let mut question = Message::new(7, MessageType::Query, OpCode::Query);
        question.add_query(Query::query(Name::from_ascii(format!("{name}.example.com.")).unwrap(), kind));
        socket.send(&question.to_vec().unwrap()).await.ok()?;
        let mut answer = vec![0; 4096];
        let length =
            tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut answer)).await.ok()?.ok()?;
        let answer = Message::from_vec(&answer[..length]).unwrap();
        let mut found: Vec<String> =
            answer.answers.iter().map(|record| format!("{} {}", record.ttl, record.data)).collect();
        found.sort();
        Some(found)
    }
}

async fn run(client: &Client, text: String, mode: RunMode) -> PlanRun {
    let plans: Vec<PlanInfo> = client.get("/plans").await.unwrap();
    for plan in plans {
        let confirm = control::fleet::Confirm { confirm: plan.name.to_string() };
        let path = format!("/plans/{}", plan.id);
        client.call::<_, serde_json::Value>(hyper::Method::DELETE, &path, Some(&confirm)).await.unwrap();
    }
    let plan: PlanInfo = client.post("/plans", &NewPlan { text }).await.unwrap();
    let asked = RunPlan { mode, confirm: plan.name.to_string() };
    let job: JobInfo = client.post(&format!("/plans/{}/run", plan.id), &asked).await.unwrap();
    for _ in 0..1200 {
        let run: PlanRun = client.get(&format!("/runs/{}", job.id)).await.unwrap();
        if run.job.state.ended() {
            return run;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it does not end: {:#?}", client.get::<PlanRun>(&format!("/runs/{}", job.id)).await);
}

#[tokio::test]
async fn names_are_led_to_the_other_site() {
    if !Path::new(NAMED).exists() || !Path::new(KEYGEN).exists() {
        let why = format!("names_are_led_to_the_other_site needs {NAMED} and {KEYGEN} (of bind9)");
        eprintln!("NOT RUN: {why}");
        assert!(std::env::var_os("CI").is_none(), "it must run in CI, but: {why}");
        return;
    }
    let mut site = site().await;
    let keys = site.base.path().join("dns-keys");
    fs::create_dir(&keys).unwrap();
    let key = make_key(&keys, "seawall");
    make_key(&keys, "stranger");
    let dir = site.base.path().join("named");
    fs::create_dir(&dir).unwrap();
    let named = Named::start(&dir, &key).await;
    site.stop().await;
    site.config.dns_keys = Some(keys.clone());
    site.start().await;
    let admin = site.administrator().await;
    let plan = |key: &str, more: &str, zone: &str| {
        format!(
            "name: shop\nsteps:\n- id: names\n  timeout_s: 60\n{more}  dns:\n    server: 127.0.0.1:{}\n    zone: {zone}\n    key: {key}\n    records:\n    \
             - {{name: shop, type: A, ttl_s: 30, values: [203.0.113.10]}}\n    - {{name: shop, type: AAAA, values: []}}\n    - {{name: note, type: TXT, values: ['moved; once']}}\n",
            named.port
        )
    };
    let before = ["300 192.0.2.1", "300 192.0.2.2"];
    assert_eq!(named.ask("shop", RecordType::A).await.unwrap(), before);

    // Looked at, tried in a drill, refused: nothing is changed.
    let looked = run(&admin, plan("seawall", "", "example.com"), RunMode::DryRun).await;
    assert_eq!(looked.job.state, JobState::Done, "{looked:#?}");
    assert!(looked.steps[0].message.contains("is an authority for example.com"), "{looked:#?}");
    let looked = run(&admin, plan("seawall", "", "example.org"), RunMode::DryRun).await;
    assert_eq!(looked.job.state, JobState::Failed);
    assert!(
        looked.steps[0].message.contains("REFUSED") || looked.steps[0].message.contains("Refused"),
        "{looked:#?}"
    );
    let drilled = run(&admin, plan("seawall", "", "example.com"), RunMode::Drill).await;
    assert!(
        drilled.steps[0].message.starts_with("Nothing was changed, because this is a drill."),
        "{drilled:#?}"
    );
    let strange = run(&admin, plan("stranger", "", "example.com"), RunMode::Failover).await;
    assert_eq!((strange.job.state, strange.steps[0].state), (JobState::Failed, StepState::Failed));
    assert!(strange.steps[0].message.contains("compare key and zone"), "{strange:#?}");
    fs::set_permissions(keys.join("stranger.key"), PermissionsExt::from_mode(0o644)).unwrap();
    let open = run(&admin, plan("stranger", "", "example.com"), RunMode::Failover).await;
    assert!(open.steps[0].message.contains("chmod o-rwx"), "{open:#?}");
    assert_eq!(named.ask("shop", RecordType::A).await.unwrap(), before);

    // Done twice, it is as done once.
    for _ in 0..2 {
        let done = run(&admin, plan("seawall", "", "example.com"), RunMode::Failover).await;
        assert_eq!(
            done.job.state,
            JobState::Done,
            "{done:#?}\n{}",
            fs::read_to_string(dir.join("named.log")).unwrap()
        );
        assert_eq!(named.ask("shop", RecordType::A).await.unwrap(), ["30 203.0.113.10"]);
        assert!(named.ask("shop", RecordType::AAAA).await.unwrap().is_empty());
        assert_eq!(named.ask("note", RecordType::TXT).await.unwrap().len(), 1);
    }
    // A step that is for drills changes it in a drill.
    let text = plan("seawall", "  when: drill\n", "example.com").replace("203.0.113.10", "203.0.113.99");
    let drilled = run(&admin, text, RunMode::Drill).await;
    assert_eq!(drilled.job.state, JobState::Done, "{drilled:#?}");
    assert_eq!(named.ask("shop", RecordType::A).await.unwrap(), ["30 203.0.113.99"]);
}
