//! `seawall demo`: the whole way in one minute on one machine. A source disk with a real writer; a site as `seawall server` runs
//! it, an agent that enrolled there, a disk protected by one request to the config server, all on loopback; the source destroyed in mid-write, two recovery points restored and proven.
//!
//! Leaves nothing behind: everything is below one temporary directory; mounts are made in a mount namespace of the demo's own
//! where the system allows it, and loop devices clear themselves when their last user is gone, so that even a killed demo leaves
//! neither. Its directory is removed by the next demo.

mod parts;
mod proof;
mod source;

use clap::{Args, ValueEnum};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use block::{ByteCount, Epoch, UnixNanos};
use control::fleet::JobInfo;
use control::{PointInfo, PointSelector};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Place;
use crate::restore::{RestoreFormat, RestoreOptions};
use crate::server::Site;
use crate::{restore, text};
use parts::Parts;
use source::{Scenario, Source};

/// What the demo is asked to do.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  seawall demo
  seawall demo --seconds 60 --json | tail -1 | jq .verified
  To look at the console afterwards; ends with Ctrl-C:
    seawall demo --hold

As root it makes a disk with a filesystem and captures it with eBPF; otherwise it protects an image file by scanning.
Exit status 0 only if everything was proven.")]
pub(crate) struct DemoOptions {
    /// How long the writer writes
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// One JSON object as the last line
    #[arg(long)]
    pub(crate) json: bool,
    /// How changes are found
    #[arg(long, value_enum, default_value_t)]
    pub(crate) source: DemoSource,
    /// At the end, keep the site with its console up until Ctrl-C or SIGTERM
    #[arg(long)]
    pub(crate) hold: bool,
}

/// How the demo's agent finds changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoSource {
    /// eBPF when allowed, else scan
    #[default]
    Auto,
    /// eBPF, or fail
    Ebpf,
    /// Checksums, without privileges
    Scan,
}

/// How often the recovery point objective is sampled.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// The initial copy of the demo's small disk takes seconds; past this something is wrong.
const FIRST_POINT_MAX: Duration = Duration::from_secs(120);
/// After the source is gone, what is cached is applied within this, or something is wrong.
const SETTLE_MAX: Duration = Duration::from_secs(60);
/// How often the config server is asked how the protection goes.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    console: String,
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
    let mut stop = Stop::new()?;
    let work = async {
        let dir = source::directory()?;
        let (outcome, site) = choose(&options, dir.path()).await?;
        anyhow::Ok((dir, outcome, site))
    };
    let (dir, outcome, site) = tokio::select! {
        played = work => played?,
        () = stop.asked() => anyhow::bail!("interrupted; everything is cleaned up"),
    };
    if options.json {
        println!("{}", serde_json::to_string(&outcome)?);
    }
    if outcome.verified && options.hold {
        Teller { quiet: options.json }.say(&format!(
            "6. The site stays up with its recovery points: {} until Ctrl-C. For the commands with --dir: {}",
            outcome.console,
            site.path().display()
        ));
        stop.asked().await;
    }
    site.shutdown().await;
    drop(dir);
    ensure!(outcome.verified, "a restored point did not pass its checks");
    Ok(())
}

/// Ctrl-C, or SIGTERM.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> anyhow::Result<Stop> {
        let terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
        Ok(Stop { terminate, interrupt: signal(SignalKind::interrupt()).context("wait for SIGINT")? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

async fn choose(options: &DemoOptions, dir: &Path) -> anyhow::Result<(Outcome, Site)> {
    match options.source {
        DemoSource::Scan => play(options, dir, Scenario::Scan).await,
        DemoSource::Ebpf => play(options, dir, Scenario::Ebpf).await,
        DemoSource::Auto if !scratch::is_root() => {
            Teller { quiet: options.json }.say("Not root: an image file, followed by checksums (scan).");
            play(options, dir, Scenario::Scan).await
        }
        DemoSource::Auto => match source::why_not_ebpf(dir) {
            None => play(options, dir, Scenario::Ebpf).await,
            Some(why) => {
                let line =
                    format!("No eBPF capture here ({why}): an image file, followed by checksums (scan).");
                Teller { quiet: options.json }.say(&line);
                play(options, dir, Scenario::Scan).await
            }
        },
    }
}

async fn play(options: &DemoOptions, dir: &Path, scenario: Scenario) -> anyhow::Result<(Outcome, Site)> {
    let teller = Teller { quiet: options.json };
    let source = tokio::task::block_in_place(|| Source::make(dir, scenario))?;
    teller.say(&format!("1. Source: {}", source.description()));
    let parts = Parts::start(dir, scenario).await?;
    let console = format!("{}/", parts.site.url());
    teller.say(&format!(
        "2. Config server, process server, target server and agent run on loopback, each with its own TLS identity.\n   \
         The console: {console} (user admin, password {}).",
        parts.password
    ));

    let writers = source.write()?;
    let job = parts.protect(source.device()).await?;
    let initial_copy = copy(&teller, &parts, &job).await?;
    teller.say(&format!(
        "3. Protected by one request to the config server: checks, keys and the first copy of {} while the writer wrote took \
         {:.1} s to the first recovery point.",
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
    let report = parts.report();
    let Parts { agent, site, .. } = parts;
    agent.shutdown().await;
    tokio::task::block_in_place(|| source.destroy(writers))?;
    teller.say(&format!(
        "4. Replicated for {} s: lag p50 {p50} ms, p99 {p99} ms. Then the source was destroyed in mid-write: agent gone, \
         disk overwritten.",
        options.seconds
    ));
    let (points, newest) = settle(&site, report.cached).await?;
    let lost = destroyed.since(newest.cut_time);
    let older = older_point(site.path(), newest.epoch).await?;

    let mut restored = Vec::new();
    for point in std::iter::once(newest).chain(older) {
        let out = dir.join(format!("restored-{}.img", point.epoch));
        let began = Instant::now();
        restore::run(&RestoreOptions {
            place: Place { dir: Some(site.path().to_owned()) },
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
    // The newest comes first.
    let verified = restored.iter().all(|restored| restored.verified)
        && restored.is_sorted_by(|newer, older| newer.records >= older.records);
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
        console,
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
    Ok((outcome, site))
}

/// Waits for the first recovery point, with a bar; how long it took since it was asked for, checks and keys included.
async fn copy(teller: &Teller, parts: &Parts, job: &JobInfo) -> anyhow::Result<Duration> {
    let bar = teller.bar(1, "   {bar:30} {bytes}/{total_bytes} {msg} {eta} left");
    let (asked, mut looked) = (Instant::now(), Instant::now());
    loop {
        if looked.elapsed() >= LOOK_EVERY {
            parts.look_at(job).await?;
            looked = Instant::now();
        }
        let report = parts.report();
        if parts.group().is_some_and(|group| group.newest_point.is_some()) {
            bar.finish_and_clear();
            return Ok(asked.elapsed());
        }
        let total: ByteCount = report.volumes.iter().map(|volume| volume.volume.size).sum();
        bar.set_length(total.0);
        bar.set_position(total.saturating_sub(report.remaining_bytes()).0);
        bar.set_message(text::rate(report.sent_bytes_per_s) + " sent");
        ensure!(
            asked.elapsed() < FIRST_POINT_MAX,
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
        let Some(group) = parts.group() else { continue };
        let lag = group
            .newest_point
            .map_or(u64::MAX, |point| UnixNanos::now().since(point.cut_time).as_millis() as u64);
        lags.push(lag);
        let report = parts.report();
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
async fn settle(site: &Site, cached: Epoch) -> anyhow::Result<(u64, PointInfo)> {
    let began = Instant::now();
    let mut stable = (Epoch::NONE, Instant::now());
    loop {
        let status = site.target().and_then(seawall_target_server::FleetTargetServer::status);
        let group = status.and_then(|status| status.groups.into_iter().next());
        let group = group.context("the target server has lost its group")?;
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

/// A point from the middle of the history; none when it has only its newest yet.
async fn older_point(dir: &Path, newest: Epoch) -> anyhow::Result<Option<PointInfo>> {
    let servers = crate::ask::Servers::load(&Place { dir: Some(dir.to_owned()) })?;
    let points = servers.points(None).await?.groups.into_iter().next().map(|group| group.points);
    let points = points.context("the target server lists no group")?;
    Ok(points.get(points.len() / 2).filter(|point| point.epoch != newest).cloned())
}
