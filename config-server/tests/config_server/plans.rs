//! Recovery plans: what their runs do, in which order, and that a run survives the config server at every step.

use std::sync::Arc;
use std::time::Duration;

use control::PointSelector;
use control::fleet::plan::{AnswerStep, NewPlan, PlanInfo, PlanRun, RunMode, RunPlan, RunStep};
use control::fleet::{Confirm, JobInfo, JobState, ResourceId, Role, StepState, TaskKind};
use enrol::Client;
use hyper::Method;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use crate::parts::{Parts, is_of};
use crate::support::{Site, on_both, problem, site, site_on_postgres};

on_both! {
    a_plan_is_kept_run_and_reported,
    a_run_survives_the_config_server_at_every_step,
    a_failed_run_goes_on_where_it_stopped
}

/// Longer waits nothing that is waited for.
const ROUNDS_MAX: usize = 1200;

/// A plan of these steps.
async fn keep(client: &Client, name: &str, steps: &str) -> PlanInfo {
    let text = format!("name: {name}\ngoals: {{rpo_s: 60, rto_s: 3600}}\nsteps:\n{steps}");
    client.post("/plans", &NewPlan { text }).await.unwrap()
}

async fn begin(client: &Client, plan: &PlanInfo, mode: RunMode) -> ResourceId {
    let asked = RunPlan { mode, confirm: plan.name.to_string() };
    let job: JobInfo = client.post(&format!("/plans/{}/run", plan.id), &asked).await.unwrap();
    job.id
}

async fn look(client: &Client, id: &ResourceId) -> PlanRun {
    client.get(&format!("/runs/{id}")).await.unwrap()
}

/// Goes on until the run is as wanted.
async fn until(
    parts: &mut Parts,
    client: &Client,
    id: &ResourceId,
    wanted: impl Fn(&PlanRun) -> bool,
) -> PlanRun {
    for _ in 0..ROUNDS_MAX {
        parts.round().await;
        let run = look(client, id).await;
        if wanted(&run) {
            return run;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it does not come so far: {:#?}", look(client, id).await);
}

async fn ended(parts: &mut Parts, client: &Client, id: &ResourceId, state: JobState) -> PlanRun {
    let run = until(parts, client, id, |run| run.job.state.ended()).await;
    assert_eq!(run.job.state, state, "{run:#?}");
    run
}

fn step<'a>(run: &'a PlanRun, id: &str) -> &'a RunStep {
    run.steps.iter().find(|step| step.id.as_str() == id).unwrap()
}

fn states(run: &PlanRun) -> String {
    let states = run.steps.iter().map(|step| format!("{} {}", step.id, step.state.as_str()));
    states.collect::<Vec<_>>().join(", ")
}

async fn answer(
    client: &Client,
    run: &ResourceId,
    step: &str,
    done: bool,
    note: &str,
) -> Result<(), enrol::EnrolError> {
    let asked = AnswerStep { step: step.parse().unwrap(), done, note: note.to_owned() };
    client.post::<_, Value>(&format!("/runs/{run}/answer"), &asked).await.map(drop)
}

/// What was posted: its key, its own header and its body.
type Told = Arc<Mutex<Vec<(String, String, String)>>>;

/// Takes what is sent; `refused` are answered with 503.
async fn receiver(mut refused: usize) -> (String, Told) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let told = Told::default();
    let taken = told.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut reader = BufReader::new(&mut stream);
            let (mut length, mut key, mut own, mut line) = (0, String::new(), String::new(), String::new());
            while line != "\r\n" {
                line.clear();
                if reader.read_line(&mut line).await.unwrap() == 0 {
                    break;
                }
                let (name, value) = line.split_once(':').unwrap_or(("", ""));
                match name.to_ascii_lowercase().as_str() {
                    "content-length" => length = value.trim().parse().unwrap(),
                    "idempotency-key" => key = value.trim().to_owned(),
                    "x-own" => own = value.trim().to_owned(),
                    _ => {}
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).await.unwrap();
            let status = if refused > 0 { "503 Service Unavailable" } else { "200 OK" };
            refused = refused.saturating_sub(1);
            taken.lock().push((key, own, String::from_utf8(body).unwrap()));
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (url, told)
}

async fn a_plan_is_kept_run_and_reported(site: Site) {
    let admin = site.administrator().await;
    let operator = site.make_user("olga", Role::Operator).await;
    let mut parts = Parts::enrol(&site).await;
    parts.protect(&admin).await;
    let (url, told) = receiver(1).await;
    let steps = format!(
        "- {{id: point, title: A last point, point: {{groups: [web], consistency: crash}}}}
- {{id: only-drill, when: drill, prove: {{groups: [web], point: application}}}}
- {{id: start, script: {{machine: web, command: start.sh, arguments: [a b, c]}}}}
- {{id: absent, on_failure: continue, script: {{machine: web, command: absent}}}}
- {{id: if-absent, only_if: {{step: absent, outcome: failed}}, wait: {{seconds: 1}}}}
- {{id: if-passed, only_if: {{step: absent, outcome: passed}}, wait: {{seconds: 1}}}}
- {{id: person, manual: {{text: 'Turn the key'}}}}
- {{id: tell, webhook: {{url: '{url}', headers: {{X-Own: mine}}, body: '{{\"a\": 1}}'}}}}
"
    );
    // Who runs plans does not write them.
    let text = format!("name: shop\nsteps:\n{steps}");
    let refused = operator.post::<_, Value>("/plans", &NewPlan { text }).await;
    assert_eq!(problem(refused).code, "forbidden");
    let wrong = NewPlan { text: "name: shop\nsteps:\n- {id: a, wait: {seconds: 0}}\n".into() };
    let wrong = problem(admin.post::<_, Value>("/plans", &wrong).await);
    assert!(wrong.detail.contains("step a (line 3): seconds is 0"), "{wrong:?}");
    let plan = keep(&admin, "shop", &steps).await;
    let again = NewPlan { text: plan.text.clone() };
    assert_eq!(problem(admin.post::<_, Value>("/plans", &again).await).code, "conflict");
    let not = RunPlan { mode: RunMode::Failover, confirm: "web".into() };
    assert_eq!(
        problem(operator.post::<_, Value>(&format!("/plans/{}/run", plan.id), &not).await).code,
        "not-confirmed"
    );

    let id = begin(&operator, &plan, RunMode::Failover).await;
    let twice = RunPlan { mode: RunMode::Drill, confirm: "shop".into() };
    assert_eq!(
        problem(operator.post::<_, Value>(&format!("/plans/{}/run", plan.id), &twice).await).code,
        "conflict"
    );
    let deleted = Confirm { confirm: "shop".into() };
    let deleted =
        admin.call::<_, Value>(Method::DELETE, &format!("/plans/{}", plan.id), Some(&deleted)).await;
    assert_eq!(problem(deleted).code, "conflict");
    assert_eq!(problem(answer(&operator, &id, "person", true, "").await).code, "conflict");

    let waits = |run: &PlanRun| step(run, "person").state == StepState::Running;
    let run = until(&mut parts, &operator, &id, waits).await;
    assert_eq!(
        states(&run),
        "point passed, only-drill skipped, start passed, absent failed, if-absent passed, if-passed skipped, person running, tell waiting"
    );
    assert_eq!(step(&run, "start").output, "start.sh a b c\n");
    let environment = parts.asked.iter().find_map(|(_, kind)| match kind {
        TaskKind::Script { command, environment, .. } if command == "start.sh" => Some(environment.clone()),
        _ => None,
    });
    let environment = environment.unwrap();
    assert_eq!(
        (environment["SEAWALL_PLAN"].as_str(), environment["SEAWALL_MODE"].as_str()),
        ("shop", "failover")
    );
    let child = &step(&run, "point").children[0];
    assert_eq!((child.group.as_str(), child.state), ("web", JobState::Done));
    let child: JobInfo = operator.get(&format!("/jobs/{}", child.job)).await.unwrap();
    assert_eq!((child.kind.as_str(), child.created_by.as_str()), ("point", "plan shop of user olga"));
    assert!(told.lock().is_empty(), "what comes later waits");
    answer(&operator, &id, "person", true, "turned twice").await.unwrap();
    assert_eq!(problem(answer(&admin, &id, "person", false, "").await).code, "conflict");

    // What the receiver did not take is sent again, and known by its key.
    let run = ended(&mut parts, &operator, &id, JobState::Done).await;
    let told = told.lock().clone();
    assert_eq!(told.len(), 2);
    assert_eq!(told[0], told[1]);
    assert_eq!(
        (told[0].0.as_str(), told[0].1.as_str(), told[0].2.as_str()),
        (format!("{id}-tell-1").as_str(), "mine", "{\"a\": 1}")
    );
    let given = step(&run, "person").answer.clone().unwrap();
    assert_eq!((given.who.as_str(), given.note.as_str()), ("user olga", "turned twice"));
    assert!(run.job.message.contains("1 of 8 steps failed and were passed over"), "{}", run.job.message);
    assert_eq!((run.rto_reached, run.rpo_reached), (Some(true), Some(true)));
    assert!(run.points[0].age_ms.is_some_and(|age| age >= 1000), "{:?}", run.points);

    // The report needs nothing else, and says what was printed as text.
    let page = seawall_config_server::report(&run);
    assert!(
        page.contains("turned twice") && page.contains("start.sh a b c") && !page.contains("<script"),
        "{page}"
    );
    assert!(!page.contains("href=") && !page.contains("src="), "{page}");
    let kept: PlanInfo = operator.get(&format!("/plans/{}", plan.id)).await.unwrap();
    assert_eq!(kept.last_run.unwrap().id, id);
    let runs: Vec<JobInfo> = operator.get(&format!("/plans/{}/runs", plan.id)).await.unwrap();
    assert_eq!(runs.len(), 1);

    // In a drill nobody is led away, and only what is for drills and for all runs is done.
    let id = begin(&operator, &plan, RunMode::Drill).await;
    let run = until(&mut parts, &operator, &id, waits).await;
    assert_eq!(step(&run, "only-drill").state, StepState::Passed);
    let started = |kind: &TaskKind| matches!(kind, TaskKind::Prove { point: PointSelector::Application, .. });
    assert!(parts.started.len() == 1 && started(&parts.started[0]), "{:?}", parts.started);
    operator.post::<_, Value>(&format!("/jobs/{id}/cancel"), &serde_json::json!({})).await.unwrap();
    assert_eq!(problem(answer(&operator, &id, "person", true, "").await).code, "conflict");
    let resumed = operator.post::<_, Value>(&format!("/runs/{id}/resume"), &serde_json::json!({})).await;
    assert_eq!(problem(resumed).code, "conflict");
    let confirm = Confirm { confirm: "shop".into() };
    admin.call::<_, Value>(Method::DELETE, &format!("/plans/{}", plan.id), Some(&confirm)).await.unwrap();
    assert_eq!(look(&operator, &id).await.job.state, JobState::Cancelled, "its runs stay");
}

/// The config server is gone in an instant at every step, and whoever goes on neither leaves one out nor does one twice.
async fn a_run_survives_the_config_server_at_every_step(mut site: Site) {
    let admin = site.administrator().await;
    let token = site.token(&admin, &[control::fleet::Scope::Operate, control::fleet::Scope::Read]).await;
    let mut parts = Parts::enrol(&site).await;
    parts.protect(&admin).await;
    let points_before = parts.asked.len();
    let (url, told) = receiver(0).await;
    let steps = format!(
        "- {{id: point, point: {{groups: [web], consistency: crash}}}}
- {{id: start, script: {{machine: web, command: start}}}}
- {{id: pause, wait: {{seconds: 2}}}}
- {{id: person, manual: {{text: Turn the key}}}}
- {{id: tell, webhook: {{url: '{url}'}}}}
- {{id: last, script: {{machine: web, command: last}}}}
"
    );
    let plan = keep(&admin, "shop", &steps).await;
    let id = begin(&token, &plan, RunMode::Planned).await;
    // No script ends before the config server was gone while it ran.
    parts.at_work = vec!["start", "last"];
    let mut killed = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let run = look(&token, &id).await;
        let running =
            run.steps.iter().find(|step| step.state == StepState::Running).map(|step| step.id.to_string());
        if let Some(step) = running.filter(|step| !killed.contains(step)) {
            killed.push(step.clone());
            parts.at_work.retain(|script| *script != step);
            site.stop().await;
            // As if its lease had run out.
            let pool = sqlx::AnyPool::connect(&site.config.database).await.unwrap();
            sqlx::query("UPDATE jobs SET lease_until = 0").execute(&pool).await.unwrap();
            pool.close().await;
            site.start().await;
            if step == "person" {
                answer(&token, &id, "person", true, "").await.unwrap();
            }
        }
        if run.job.state.ended() {
            break;
        }
        parts.round().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let run = ended(&mut parts, &token, &id, JobState::Done).await;
    assert_eq!(killed, ["point", "start", "pause", "person", "tell", "last"], "{run:#?}");
    assert_eq!(
        states(&run),
        "point passed, start passed, pause passed, person passed, tell passed, last passed"
    );
    assert!(run.steps.iter().all(|step| step.attempts == 1), "{run:#?}");
    for script in ["start", "last"] {
        assert_eq!(parts.asked.iter().filter(|(_, kind)| is_of(kind, script)).count(), 1, "{script}");
    }
    let points =
        parts.asked[points_before..].iter().filter(|(_, kind)| matches!(kind, TaskKind::Point { .. }));
    assert_eq!(points.count(), 1);
    // A message may come twice, and then has the same key.
    let keys: Vec<String> = told.lock().iter().map(|(key, ..)| key.clone()).collect();
    assert!(!keys.is_empty() && keys.iter().all(|key| *key == format!("{id}-tell-1")), "{keys:?}");
}

async fn a_failed_run_goes_on_where_it_stopped(site: Site) {
    let admin = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    parts.protect(&admin).await;
    let steps = "- {id: first, wait: {seconds: 1}}
- {id: broken, script: {machine: web, command: fails}}
- {id: person, manual: {text: Turn the key}}
- {id: short, timeout_s: 1, manual: {text: Be quick}}
- {id: last, wait: {seconds: 1}}
";
    let plan = keep(&admin, "shop", steps).await;
    let id = begin(&admin, &plan, RunMode::Failover).await;
    let resume =
        async || admin.post::<_, JobInfo>(&format!("/runs/{id}/resume"), &serde_json::json!({})).await;
    assert_eq!(problem(resume().await).code, "conflict");
    let run = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert_eq!(states(&run), "first passed, broken failed, person skipped, short skipped, last skipped");
    assert!(run.job.message.contains("The step broken failed"), "{}", run.job.message);
    assert_eq!((step(&run, "broken").output.as_str(), run.rto_reached), ("fails \n", Some(false)));

    resume().await.unwrap();
    // While it goes on, it is the plan's one run.
    let other = RunPlan { mode: RunMode::Drill, confirm: "shop".into() };
    assert_eq!(
        problem(admin.post::<_, Value>(&format!("/plans/{}/run", plan.id), &other).await).code,
        "conflict"
    );
    let waits = |run: &PlanRun| step(run, "person").state == StepState::Running;
    let run = until(&mut parts, &admin, &id, waits).await;
    assert_eq!((step(&run, "first").attempts, step(&run, "broken").attempts), (1, 2));
    answer(&admin, &id, "person", false, "the key is lost").await.unwrap();
    let run = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert!(step(&run, "person").message.contains("Refused by user admin. the key is lost"), "{run:#?}");

    // Asked again, and answered otherwise; then nobody answers in time.
    resume().await.unwrap();
    until(&mut parts, &admin, &id, waits).await;
    answer(&admin, &id, "person", true, "").await.unwrap();
    let run = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert!(step(&run, "short").message.starts_with("Not done after 1 s."), "{run:#?}");
    // Another run meanwhile keeps this one from going on.
    let drill = begin(&admin, &plan, RunMode::Drill).await;
    assert_eq!(problem(resume().await).code, "conflict");
    admin.post::<_, Value>(&format!("/jobs/{drill}/cancel"), &serde_json::json!({})).await.unwrap();
    resume().await.unwrap();
    let quick = |run: &PlanRun| step(run, "short").state == StepState::Running;
    until(&mut parts, &admin, &id, quick).await;
    answer(&admin, &id, "short", true, "").await.unwrap();
    let run = ended(&mut parts, &admin, &id, JobState::Done).await;
    assert_eq!(states(&run), "first passed, broken passed, person passed, short passed, last passed");
    assert_eq!(step(&run, "short").attempts, 2);
}

/// Of groups that are done at once, none waits for another; one that is not there fails the step when the others have ended.
#[tokio::test]
async fn groups_of_a_step_are_done_at_once_and_not_again() {
    let site = site().await;
    let admin = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    let group = parts.protect(&admin).await;
    let steps = "- {id: points, point: {groups: [web, missing], consistency: crash}}\n";
    let plan = keep(&admin, "shop", steps).await;
    // Somebody has asked for the same: ours comes after it.
    parts.answers = false;
    let asked = serde_json::json!({ "consistency": "crash" });
    let theirs: JobInfo = admin.post(&format!("/groups/{}/point", group.id), &asked).await.unwrap();
    let id = begin(&admin, &plan, RunMode::Planned).await;
    let waits = |run: &PlanRun| run.steps[0].message.contains("web (another job is under way for it)");
    until(&mut parts, &admin, &id, waits).await;
    parts.answers = true;
    let run = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert_eq!(run.steps[0].children.len(), 1);
    assert_ne!(run.steps[0].children[0].job, theirs.id);
    assert!(run.steps[0].message.contains("missing: There is no group missing"), "{run:#?}");
    assert_eq!(run.rpo_reached, Some(false), "a group without a point reaches no goal");
    // Resumed, what is done stays done.
    admin.post::<_, Value>(&format!("/runs/{id}/resume"), &serde_json::json!({})).await.unwrap();
    let again = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert_eq!(again.steps[0].children[0].job, run.steps[0].children[0].job);
    assert_eq!(again.steps[0].attempts, 2);
}

/// A dry run does nothing, looks at everything, and says all that is wrong.
#[tokio::test]
async fn a_dry_run_looks_and_does_nothing() {
    let site = site().await;
    let admin = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    parts.protect(&admin).await;
    let asked_before = parts.asked.len();
    let (url, told) = receiver(0).await;
    let steps = format!(
        "- {{id: good, point: {{groups: [web]}}}}
- {{id: bad, when: drill, point: {{groups: [web, nobody]}}}}
- {{id: there, script: {{machine: web, command: start}}}}
- {{id: not-there, script: {{machine: web, command: absent}}}}
- {{id: no-machine, script: {{machine: nobody, command: start}}}}
- {{id: person, only_if: {{step: bad, outcome: failed}}, manual: {{text: Turn the key}}}}
- {{id: hook, webhook: {{url: '{url}'}}}}
- {{id: no-host, timeout_s: 1, webhook: {{url: 'http://no-such-host.invalid/'}}}}
- {{id: no-key, dns: {{server: 127.0.0.1, zone: example.com, key: none, records: [{{name: www, type: A, values: [192.0.2.1]}}]}}}}
- {{id: no-server, timeout_s: 1, dns: {{server: '127.0.0.1:1', zone: example.com, records: [{{name: www, type: A, values: []}}]}}}}
"
    );
    let plan = keep(&admin, "shop", &steps).await;
    parts.age = Some(Duration::from_secs(30));
    let job: JobInfo = admin
        .post(&format!("/plans/{}/run", plan.id), &RunPlan { mode: RunMode::DryRun, confirm: String::new() })
        .await
        .unwrap();
    let run = ended(&mut parts, &admin, &job.id, JobState::Failed).await;
    assert_eq!(
        states(&run),
        "good passed, bad failed, there passed, not-there failed, no-machine failed, person passed, hook passed, \
         no-host failed, no-key failed, no-server failed"
    );
    assert!(step(&run, "bad").message.contains("There is no group nobody"), "{run:#?}");
    assert!(step(&run, "no-key").message.contains("dns_keys"), "{run:#?}");
    assert!(step(&run, "no-server").message.contains("Connection refused"), "{run:#?}");
    assert!(run.job.message.contains("6 of 10"), "{}", run.job.message);
    let did = |kind: &TaskKind| !matches!(kind, TaskKind::CheckScript { .. });
    assert!(!parts.asked[asked_before..].iter().any(|(_, kind)| did(kind)), "{:?}", parts.asked);
    assert!(told.lock().is_empty());
    let resumed = admin.post::<_, Value>(&format!("/runs/{}/resume", job.id), &serde_json::json!({})).await;
    assert_eq!(problem(resumed).code, "conflict");

    // Points that are too old for the goal.
    parts.age = Some(Duration::from_secs(600));
    let old = keep(&admin, "old", "- {id: good, point: {groups: [web]}}\n").await;
    parts.round().await;
    let id = begin(&admin, &old, RunMode::DryRun).await;
    let run = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert!(run.steps[0].message.contains("the goal is 60 s"), "{run:#?}");
    assert_eq!(run.rpo_reached, Some(false));
}

/// Of two config servers one is gone for good, and its lease runs out by itself.
#[tokio::test(flavor = "multi_thread")]
async fn another_config_server_goes_on_with_a_run() {
    let Some(mut site) = site_on_postgres("another_config_server_goes_on_with_a_run").await else { return };
    let admin = site.administrator().await;
    let made = control::fleet::NewApiToken {
        name: "program".parse().unwrap(),
        scopes: vec![control::fleet::Scope::Read, control::fleet::Scope::Operate],
        days: 1,
    };
    let made: control::fleet::MadeToken = admin.post("/tokens", &made).await.unwrap();
    let steps = "- {id: person, manual: {text: Turn the key}}\n- {id: last, wait: {seconds: 1}}\n";
    let plan = keep(&admin, "shop", steps).await;
    let id = begin(&admin, &plan, RunMode::Planned).await;
    while look(&admin, &id).await.steps[0].state != StepState::Running {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (second, url) = site.another_server().await;
    site.stop().await;
    let there = Client::new(url, &site.trust(), None, Some(made.token)).unwrap();
    answer(&there, &id, "person", true, "").await.unwrap();
    let mut rounds = 0;
    let run = loop {
        let run = look(&there, &id).await;
        if run.job.state.ended() {
            break run;
        }
        rounds += 1;
        assert!(rounds < ROUNDS_MAX, "{run:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!((run.job.state, states(&run).as_str()), (JobState::Done, "person passed, last passed"));
    second.shutdown().await;
}

/// A failover by a plan is the one that anybody would ask for: planned with the machine's hand-over, unplanned without, and in a drill not at
/// all.
#[tokio::test]
async fn groups_are_failed_over_and_committed() {
    let site = site().await;
    let admin = site.administrator().await;
    let mut parts = Parts::enrol(&site).await;
    parts.protect(&admin).await;
    let steps = "- {id: over, failover: {groups: [web], promote: true}}
- {id: decide, when: unplanned, manual: {text: Decide}}
- {id: for-good, when: unplanned, commit: {groups: [web]}}
";
    let plan = keep(&admin, "shop", steps).await;
    let id = begin(&admin, &plan, RunMode::Drill).await;
    let run = ended(&mut parts, &admin, &id, JobState::Done).await;
    assert!(
        step(&run, "over").message.starts_with("Nothing was failed over, because this is a drill."),
        "{run:#?}"
    );
    assert!(parts.done_at_target.is_empty() && !parts.handed_over, "{:?}", parts.done_at_target);

    let id = begin(&admin, &plan, RunMode::Planned).await;
    let run = ended(&mut parts, &admin, &id, JobState::Done).await;
    assert_eq!(states(&run), "over passed, decide skipped, for-good skipped");
    assert!(parts.handed_over && run.points.is_empty() && run.rpo_reached.is_none(), "{run:#?}");
    assert_eq!(parts.done_at_target.len(), 2, "{:?}", parts.done_at_target);
    let child: JobInfo = admin.get(&format!("/jobs/{}", step(&run, "over").children[0].job)).await.unwrap();
    assert_eq!((child.kind.as_str(), child.created_by.as_str()), ("failover", "plan shop of user admin"));

    // What the group's state does not allow is refused at once, with what to do.
    let id = begin(&admin, &plan, RunMode::Failover).await;
    let run = ended(&mut parts, &admin, &id, JobState::Failed).await;
    assert!(
        step(&run, "over").message.contains("is promoted") && step(&run, "over").message.contains("Demote"),
        "{run:#?}"
    );
    let group = parts_group(&admin).await;
    let confirm = Confirm { confirm: "web".into() };
    for act in ["demote", "failover/cancel"] {
        let path = format!("/groups/{group}/{act}");
        let job: JobInfo = match act {
            "demote" => admin.post(&path, &serde_json::json!({})).await.unwrap(),
            _ => admin.post(&path, &confirm).await.unwrap(),
        };
        parts.until_ended(&admin, job).await;
    }
    admin.post::<_, Value>(&format!("/runs/{id}/resume"), &serde_json::json!({})).await.unwrap();
    let decides = |run: &PlanRun| step(run, "decide").state == StepState::Running;
    let run = until(&mut parts, &admin, &id, decides).await;
    assert_eq!((run.points.len(), run.rpo_reached), (1, Some(true)));
    answer(&admin, &id, "decide", true, "").await.unwrap();
    let run = ended(&mut parts, &admin, &id, JobState::Done).await;
    assert_eq!(states(&run), "over passed, decide passed, for-good passed");
    assert!(parts.standing.failover.is_none() && parts.standing.generation == 2, "{:?}", parts.standing);
}

async fn parts_group(client: &Client) -> block::GroupId {
    let groups: control::fleet::Page<control::fleet::GroupInfo> = client.get("/groups").await.unwrap();
    groups.items[0].id
}
