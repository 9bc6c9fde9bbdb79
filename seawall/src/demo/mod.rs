//! `seawall demo`: the whole way in one minute on one machine. A source disk with a real writer, all parts on loopback,
//! the source destroyed in mid-write, two recovery points restored and proven.
//!
//! Leaves nothing behind: everything is below one temporary directory; mounts are made in a mount namespace of the demo's own
//! where the system allows it, and loop devices clear themselves when their last user is gone, so that even a killed demo leaves
//! neither. Its directory is removed by the next demo.

mod proof;
mod source;

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use block::{ByteCount, Epoch, UnixNanos};
use control::{PointInfo, PointSelector, TargetGroup};
use indicatif::{ProgressBar, ProgressStyle};
use seawall_agent::{Agent, AgentConfig, SourceChoice};
use seawall_process_server::ProcessServer;
use seawall_target_server::TargetServer;
use serde::Serialize;

use crate::cli::{DemoOptions, DemoSource, InitOptions, Place, RestoreFormat, RestoreOptions};
use crate::{init, restore, text};
use source::{Scenario, Source};

/// How often the recovery point objective is sampled.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// The initial copy of the demo's small disk takes seconds; past this something is wrong.
const FIRST_POINT_MAX: Duration = Duration::from_secs(120);
/// After the source is gone, what is cached is applied within this, or something is wrong.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// The last line with --json.
#[derive(Debug, Serialize)]
struct Outcome {
    mode: String,
    seconds: u64,
    initial_copy_s: f64,
    points: u64,
    rpo_ms_p50: u64,
    rpo_ms_p99: u64,
    bytes_written: ByteCount,
    bytes_sent: ByteCount,
    records_written: u64,
    records_in_newest: u64,
    lost_ms: u64,
    restored: Vec<Restored>,
    verified: bool,
}

#[derive(Debug, Serialize)]
struct Restored {
    point: Epoch,
    age_ms: u64,
    restore_s: f64,
    records: u64,
    verified: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
}

/// Tells the story to a person; a program gets only the last line.
struct Teller {
    quiet: bool,
}

impl Teller {
    fn say(&self, line: &str) {
        if !self.quiet {
            println!("{line}");
        }
    }

    fn bar(&self, length: u64, template: &str) -> ProgressBar {
        if self.quiet {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template(template).expect("the demo's templates are sound");
        ProgressBar::new(length).with_style(style.progress_chars("━╸ "))
    }
}

/// Set in the demo that runs in its own mount namespace.
const OWN_NAMESPACE: &str = "SEAWALL_DEMO_OWN_NAMESPACE";

/// Goes on in a mount namespace of its own, where the system lets it: its mounts then end with it, also when it is killed.
fn enter_own_namespace() -> anyhow::Result<()> {
    let mut unshare = std::process::Command::new("unshare");
    unshare.args(["--mount", "--propagation", "private", "--"]);
    let allowed = std::process::Command::new("unshare").args(["--mount", "true"]).output();
    if !scratch::is_root()
        || std::env::var_os(OWN_NAMESPACE).is_some()
        || !allowed.is_ok_and(|output| output.status.success())
    {
        return Ok(());
    }
    let program = std::env::current_exe().context("find the running program")?;
    let error = unshare.arg(program).args(std::env::args_os().skip(1)).env(OWN_NAMESPACE, "1").exec();
    Err(error).context("go on in a mount namespace of the demo's own")
}

pub(crate) async fn run(options: DemoOptions) -> anyhow::Result<()> {
    enter_own_namespace()?;
    let work = async {
        let dir = source::directory()?;
        match options.source {
            DemoSource::Scan => play(&options, dir.path(), Scenario::Scan).await,
            DemoSource::Ebpf => play(&options, dir.path(), Scenario::Ebpf).await,
            DemoSource::Auto if !scratch::is_root() => {
                Teller { quiet: options.json }.say("Not root: an image file, followed by checksums (scan).");
                play(&options, dir.path(), Scenario::Scan).await
            }
            DemoSource::Auto => match source::why_not_ebpf(dir.path()) {
                None => play(&options, dir.path(), Scenario::Ebpf).await,
                Some(why) => {
                    let line =
                        format!("No eBPF capture here ({why}): an image file, followed by checksums (scan).");
                    Teller { quiet: options.json }.say(&line);
                    play(&options, dir.path(), Scenario::Scan).await
                }
            },
        }
    };
    tokio::select! {
        outcome = work => {
            let outcome = outcome?;
            if options.json {
                println!("{}", serde_json::to_string(&outcome)?);
            }
            ensure!(outcome.verified, "a restored point did not pass its checks");
            Ok(())
        }
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted; everything is cleaned up"),
    }
}

/// The parts, all in this process, on loopback.
struct Parts {
    agent: Agent,
    process: seawall_process_server::Handle,
    target: seawall_target_server::Handle,
}

async fn start(dir: &Path, device: &Path, choice: SourceChoice) -> anyhow::Result<Parts> {
    let (process_address, target_address) = (free_address()?, free_address()?);
    init::make(
        &InitOptions {
            dir: dir.to_owned(),
            devices: vec![device.to_owned()],
            name: "demo".into(),
            process_server: process_address,
            target_server: target_address,
        },
        dir,
    )?;
    let target = seawall_target_server::Config::load(&dir.join("target-server/target-server.toml"))?;
    let target = TargetServer::start(target).await?;
    let process = seawall_process_server::Config::load(&dir.join("process-server/process-server.toml"))?;
    let process = ProcessServer::start(process).await?;
    let mut agent = AgentConfig::load(&dir.join("agent/agent.toml"))?;
    agent.agent.source = choice;
    agent.agent.keep_tracking = false; // the demo leaves nothing behind
    agent.agent.control_socket = Some(dir.join("agent.sock"));
    let agent = tokio::task::block_in_place(|| Agent::start(agent))?;
    Ok(Parts { agent, process, target })
}

/// An address on loopback that nobody uses just now.
fn free_address() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port on loopback")?;
    Ok(listener.local_addr()?.to_string())
}

fn group(parts: &Parts) -> Option<TargetGroup> {
    parts.target.status().groups.into_iter().next()
}

async fn play(options: &DemoOptions, dir: &Path, scenario: Scenario) -> anyhow::Result<Outcome> {
    let teller = Teller { quiet: options.json };
    let source = tokio::task::block_in_place(|| Source::make(dir, scenario))?;
    teller.say(&format!("1. Source: {}", source.description()));
    let parts = start(&dir.join("seawall"), source.device(), scenario.choice()).await?;
    teller.say("2. Target server, process server and agent run on loopback, each with its own TLS identity.");

    let writers = source.write()?;
    let began = Instant::now();
    copy(&teller, &parts, began).await?;
    let initial_copy = began.elapsed();
    teller.say(&format!(
        "3. Initial copy of {} while the writer wrote: {:.1} s to the first recovery point.",
        source.size(),
        initial_copy.as_secs_f64()
    ));

    let mut lags = live(&teller, &parts, Duration::from_secs(options.seconds)).await;
    lags.sort_unstable();
    let percentile =
        |percent: usize| lags.get((lags.len() * percent / 100).min(lags.len().saturating_sub(1)));
    let (p50, p99) = (percentile(50).copied().unwrap_or(0), percentile(99).copied().unwrap_or(0));

    // The disaster: agent and disk are gone while the writer writes.
    let records = writers.counts();
    let destroyed = UnixNanos::now();
    let Parts { agent, process, target } = parts;
    let report = agent.report();
    tokio::task::block_in_place(|| {
        agent.shutdown();
        source.destroy(writers)
    })?;
    teller.say(&format!(
        "4. Replicated for {} s: lag p50 {p50} ms, p99 {p99} ms. Then the source was destroyed in mid-write: agent gone, \
         disk overwritten.",
        options.seconds
    ));
    let (points, newest) = settle(&target, report.cached).await?;
    let lost = destroyed.since(newest.cut_time);
    let older = older_point(&dir.join("seawall"), newest.clone()).await?;

    let mut restored = Vec::new();
    for point in [newest, older] {
        let out = dir.join(format!("restored-{}.img", point.epoch));
        let began = Instant::now();
        restore::run(&RestoreOptions {
            place: Place { dir: Some(dir.join("seawall")) },
            volume: source.volume_name(),
            group: None,
            point: PointSelector::Epoch(point.epoch),
            out: out.clone(),
            format: RestoreFormat::Raw,
            delta: false,
            verify: false,
            force: false,
            json: options.json,
        })
        .await?;
        let restore_s = began.elapsed().as_secs_f64();
        let proof = tokio::task::block_in_place(|| proof::prove(&source, &out));
        let (count, fault) = match &proof {
            Ok(counts) => (counts.iter().sum(), None),
            Err(error) => (0, Some(format!("{error:#}"))),
        };
        let age = destroyed.since(point.cut_time);
        teller.say(&match &fault {
            None => format!("   {}: {}", source.claims(), proof::sentence(count, records.iter().sum(), age)),
            Some(fault) => format!("   NOT PROVEN: {fault}"),
        });
        let age_ms = age.as_millis() as u64;
        restored.push(Restored {
            point: point.epoch,
            age_ms,
            restore_s,
            records: count,
            verified: fault.is_none(),
            fault,
        });
    }
    process.shutdown().await?;
    target.shutdown().await;

    let verified =
        restored.iter().all(|restored| restored.verified) && restored[0].records >= restored[1].records;
    let outcome = Outcome {
        mode: report.mode().to_string(),
        seconds: options.seconds,
        initial_copy_s: initial_copy.as_secs_f64(),
        points,
        rpo_ms_p50: p50,
        rpo_ms_p99: p99,
        bytes_written: report.written_bytes_total,
        bytes_sent: report.sent_bytes_total,
        records_written: records.iter().sum(),
        records_in_newest: restored[0].records,
        lost_ms: lost.as_millis() as u64,
        restored,
        verified,
    };
    if verified {
        teller.say(&format!(
            "5. Proven: {} recovery points; the newest was {} ms old when the disk died and has {} of {} durable records, \
             in order. Written {}, sent {}.",
            outcome.points,
            outcome.lost_ms,
            outcome.records_in_newest,
            outcome.records_written,
            outcome.bytes_written,
            outcome.bytes_sent
        ));
    }
    Ok(outcome)
}

/// Waits for the first recovery point, with a bar.
async fn copy(teller: &Teller, parts: &Parts, began: Instant) -> anyhow::Result<()> {
    let bar = teller.bar(1, "   {bar:30} {bytes}/{total_bytes} {msg} {eta} left");
    loop {
        let report = parts.agent.report();
        if group(parts).is_some_and(|group| group.newest_point.is_some()) {
            bar.finish_and_clear();
            return Ok(());
        }
        let total: ByteCount = report.volumes.iter().map(|volume| volume.volume.size).sum();
        bar.set_length(total.0);
        bar.set_position(total.saturating_sub(report.remaining_bytes()).0);
        bar.set_message(text::rate(report.sent_bytes_per_s) + " sent");
        ensure!(
            began.elapsed() < FIRST_POINT_MAX,
            "wait for the first recovery point: none after {} s; the agent says: {} {}",
            FIRST_POINT_MAX.as_secs(),
            report.state.meaning(),
            report.last_error.unwrap_or_default()
        );
        tokio::time::sleep(SAMPLE_EVERY).await;
    }
}

/// Shows how replication goes, and samples how old the newest recovery point is, in milliseconds.
async fn live(teller: &Teller, parts: &Parts, time: Duration) -> Vec<u64> {
    let bar = teller.bar(time.as_millis() as u64, "   {bar:30} {msg}");
    let began = Instant::now();
    let mut lags = Vec::new();
    while began.elapsed() < time {
        tokio::time::sleep(SAMPLE_EVERY).await;
        let Some(group) = group(parts) else { continue };
        let lag = group
            .newest_point
            .map_or(u64::MAX, |point| UnixNanos::now().since(point.cut_time).as_millis() as u64);
        lags.push(lag);
        let report = parts.agent.report();
        bar.set_position(began.elapsed().as_millis() as u64);
        bar.set_message(format!(
            "{}: lag {lag} ms, churn {}, {} points, epoch {}",
            report.state,
            text::rate(report.churn_bytes_per_s),
            group.points,
            group.applied
        ));
    }
    bar.finish_and_clear();
    lags
}

/// Waits until everything that is cached is applied, and gives the number of points and the newest.
async fn settle(target: &seawall_target_server::Handle, cached: Epoch) -> anyhow::Result<(u64, PointInfo)> {
    let began = Instant::now();
    let mut stable = (Epoch::NONE, Instant::now());
    loop {
        let group =
            target.status().groups.into_iter().next().context("the target server has lost its group")?;
        if group.applied != stable.0 {
            stable = (group.applied, Instant::now());
        }
        // The last epoch may have been cached without the agent having heard of it.
        if group.applied >= cached && stable.1.elapsed() > Duration::from_millis(500) {
            let newest = group.newest_point.context("there is no recovery point")?;
            return Ok((group.points, newest));
        }
        ensure!(
            began.elapsed() < SETTLE_MAX,
            "wait until epoch {cached} is applied: the target server is at {}: {}",
            group.applied,
            group.last_error.unwrap_or_default()
        );
        tokio::time::sleep(SAMPLE_EVERY).await;
    }
}

/// A point from the middle of the history.
async fn older_point(dir: &Path, newest: PointInfo) -> anyhow::Result<PointInfo> {
    let servers = crate::ask::Servers::load(&Place { dir: Some(dir.to_owned()) })?;
    let points = servers.points(None).await?.groups.into_iter().next().map(|group| group.points);
    let points = points.context("the target server lists no group")?;
    Ok(points.get(points.len() / 2).cloned().unwrap_or(newest))
}
