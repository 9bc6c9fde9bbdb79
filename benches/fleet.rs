//! A config server with 2,000 machines that report every 5 s, the process server and the target server that serve all of them, and
//! somebody who looks at the console's figures, all on this machine: how long requests take (those of the machines and those of who
//! looks), and what processor time and memory the config server needs. Quick: 200 machines for 10 s.
//!
//! The config server is a process of its own: this program started again. Machines enrol, are protected and report by the code that
//! real ones use (`enrol::Member`), over connections of their own that stay open; only what they report is made up. Times are
//! taken at the machine, from before the request is written until after the answer is read and kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use control::fleet::{AlertInfo, AlertKind, EventInfo, GroupInfo, Overview, Page, PartRole};
use enrol::Client;
use seawall_benches::fleet::{Figures, LATE_EVERY, Meter, World};
use seawall_benches::site::{self, Server, Site};
use seawall_benches::{quick, result};

/// Between two rounds of who looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// What the aim allows: for 99 of 100 requests, and for memory.
const LATENCY_AIM: Duration = Duration::from_millis(100);
const MEMORY_AIM_BYTES: f64 = 500e6;

fn main() -> anyhow::Result<()> {
    site::run(measure())
}

async fn measure() -> anyhow::Result<()> {
    let (machines, warm_up, time) = match quick() {
        true => (200, Duration::from_secs(6), Duration::from_secs(10)),
        false => (2000, Duration::from_secs(15), Duration::from_secs(60)),
    };
    let base = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (server, site) = site::start(base.path()).await?;
    let client = site.client().await?;
    let world = World::new();
    let meter = Arc::new(Meter::default());

    let began = Instant::now();
    site::allow_rpo(&client).await?;
    for (role, name) in [(PartRole::TargetServer, "target"), (PartRole::ProcessServer, "process")] {
        site.join(&client, role, name, &world, &meter).await?;
    }
    site.join_machines(0..machines, &world, &meter).await?;
    println!("fleet: {machines} machines enrolled in {:.0} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    site::protect_all(&client, machines).await?;
    println!("fleet: {machines} machines protected in {:.0} s", began.elapsed().as_secs_f64());

    tokio::time::sleep(warm_up).await;
    let following = follow(&site).await?;
    let before = (server.processor_time()?, server.looks()?.len());
    meter.begin();
    let looking = tokio::time::timeout(time, look(&client, &meter)).await;
    // It goes on until the time is over, unless something fails.
    if let Ok(failed) = looking {
        failed?;
    }
    let measured = meter.end();
    let (used, looks) = (server.processor_time()? - before.0, server.looks()?.split_off(before.1));
    let events = following.abort_and_count();

    report(&measured, time, used, &server, looks, events)?;
    check(&client, machines, &measured, time).await
}

fn report(
    measured: &Figures,
    time: Duration,
    used: Duration,
    server: &Server,
    mut looks: Vec<f64>,
    events: usize,
) -> anyhow::Result<()> {
    println!("{:<26} {:>8} {:>9} {:>9} {:>9}", "request", "count", "p50 ms", "p99 ms", "max ms");
    for (what, times) in measured.by_request() {
        let at = |part: f64| times.at(part).as_secs_f64() * 1e3;
        println!("{what:<26} {:>8} {:>9.1} {:>9.1} {:>9.1}", times.len(), at(0.5), at(0.99), at(1.0));
    }
    looks.sort_by(f64::total_cmp);
    ensure!(!looks.is_empty(), "the config server has not looked for what is wrong");
    println!(
        "a look for what is wrong: median {:.1} ms, longest {:.1} ms of {}; {events} events on the stream",
        looks[looks.len() / 2],
        looks[looks.len() - 1],
        looks.len()
    );
    println!(
        "the config server used {:.1} s of processor time in {:.0} s",
        used.as_secs_f64(),
        time.as_secs_f64()
    );
    let all = measured.all();
    result("fleet_api_p99", LATENCY_AIM.as_secs_f64() * 1e3, "ms allowed", all.at(0.99).as_secs_f64() * 1e3)?;
    result("fleet_memory", MEMORY_AIM_BYTES / 1e6, "MB allowed", server.memory_bytes()? / 1e6)
}

/// That it was not fast by leaving something out.
async fn check(client: &Client, machines: usize, measured: &Figures, time: Duration) -> anyhow::Result<()> {
    let expected = machines as f64 * time.as_secs_f64() / 5.0;
    let heard = measured.check_ins() as f64;
    ensure!(heard > expected * 0.9, "{heard} check-ins were answered, of {expected}");
    ensure!(measured.failed() == 0, "{} check-ins failed", measured.failed());
    let overview: Overview = client.get("/overview").await?;
    ensure!(overview.groups == machines as i64 && overview.silent_parts == 0, "{overview:?}");
    let alerts: Vec<AlertInfo> = client.get("/alerts").await?;
    let late =
        alerts.iter().filter(|alert| alert.kind == AlertKind::PointAge && alert.cleared.is_none()).count();
    ensure!(late == machines.div_ceil(LATE_EVERY), "{late} groups are told to be late");
    Ok(())
}

/// Somebody who looks, one request after the other.
async fn look(client: &Client, meter: &Meter) -> anyhow::Result<()> {
    loop {
        let timed = async |what: &'static str, path: &str| -> anyhow::Result<serde_json::Value> {
            let began = Instant::now();
            let answer = client.get(path).await.with_context(|| format!("look at {path}"))?;
            meter.took(what, began.elapsed());
            Ok(answer)
        };
        timed("GET /overview", "/overview").await?;
        timed("GET /machines", "/machines").await?;
        let groups: Page<GroupInfo> = serde_json::from_value(timed("GET /groups", "/groups").await?)?;
        // What the console's first page asks for.
        timed("GET /groups by attention", "/groups?order=attention&limit=50").await?;
        let group = groups.items.first().context("there are no groups")?;
        timed("GET /groups/{id}", &format!("/groups/{}", group.id)).await?;
        timed("GET /alerts", "/alerts").await?;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

struct Following {
    task: tokio::task::JoinHandle<()>,
    seen: Arc<std::sync::atomic::AtomicUsize>,
}

impl Following {
    fn abort_and_count(self) -> usize {
        self.task.abort();
        self.seen.load(std::sync::atomic::Ordering::Relaxed)
    }
}

async fn follow(site: &Site) -> anyhow::Result<Following> {
    let client = site.client().await?;
    let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = seen.clone();
    let task = tokio::spawn(async move {
        let followed = client
            .follow("/events/stream", |data| {
                let known = serde_json::from_str::<EventInfo>(data).is_ok();
                counted.fetch_add(usize::from(known), std::sync::atomic::Ordering::Relaxed);
                true
            })
            .await;
        if let Err(error) = followed {
            eprintln!("fleet: the stream of events ended: {error}");
        }
    });
    Ok(Following { task, seen })
}
