//! `seawall prove`: boot proof. A machine is started on a point, and its console tells whether it has come up.
//!
//! The time counts from the command's beginning: what somebody would have waited for, had it been the worst day.

use std::fs::File;
use std::io::{IsTerminal as _, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use ::boot::{Console, TEXT_BYTES_MAX, Watch, Why, end};
use anyhow::Context;
use clap::Args;
use control::{OperatorRequest, ProofInfo};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::boot::{Machine, MachineOptions};
use crate::exit::Exit;
use crate::text;

/// Lines of its console that are shown when it was in vain.
const LINES_SHOWN: usize = 20;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Does the newest point come up, and how long does that take?
    seawall prove vda --point latest --expect login:
  As a scheduled job, with the console kept and a program that has to find everything in order:
    seawall prove vda vdb --point latest --expect multi-user.target --within 15m --console /var/log/proof.log \\
      --network br-test --probe /usr/local/bin/probe --json

Proven is a point when the machine has said every --expect on its serial console in time, no --never, and the --probe, started after
that, has ended with 0. Exit status 3: it is not. The machine runs as with `seawall boot`: on overlays, reaching nobody unless it is
given a network; it is ended at the end. The target server keeps the last proof of a group; `seawall status` shows it.
The probe finds SEAWALL_GROUP, SEAWALL_POINT and SEAWALL_CONSOLE in its environment.")]
pub(crate) struct ProveOptions {
    #[command(flatten)]
    pub(crate) machine: MachineOptions,
    /// What its console must say; may be given several times
    #[arg(long, value_name = "TEXT", required = true, value_parser = sought)]
    pub(crate) expect: Vec<String>,
    /// What its console must not say; may be given several times
    #[arg(long, value_name = "TEXT", default_values = ["Kernel panic", "emergency mode"], value_parser = sought)]
    pub(crate) never: Vec<String>,
    /// How long it may take, the probe included
    #[arg(long, value_name = "SPAN", default_value = "10m", value_parser = seawall_target_server::parse_span)]
    pub(crate) within: Duration,
    /// Write all that its console says to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,
    /// A program of this machine that tells whether all is well
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) probe: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

fn sought(text: &str) -> Result<String, String> {
    match text.len() {
        1..=TEXT_BYTES_MAX => Ok(text.to_owned()),
        length => Err(format!("{length} bytes; expected 1 to {TEXT_BYTES_MAX}")),
    }
}

pub(crate) async fn run(options: &ProveOptions) -> anyhow::Result<Exit> {
    // Before anything is started, so that no signal is lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let began = Instant::now();
    let mut log = match &options.console {
        Some(path) => Some(File::create(path).with_context(|| format!("create {}", path.display()))?),
        None => None,
    };
    let mut prepared = Machine::prepare(&options.machine, false).await?;
    let info = prepared.held.info.clone();
    let bar = match options.json || !std::io::stderr().is_terminal() {
        true => ProgressBar::hidden(),
        false => ProgressBar::new_spinner()
            .with_style(ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}")?),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut command = prepared.command();
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut machine = command.spawn().context("run setpriv (of util-linux)")?;
    let console = machine.stdout.take().context("the machine's console")?;
    let mut watch = Watch::new(&options.expect, &options.never);
    let listening = Console {
        watch: &mut watch,
        log: log.as_mut().map(|log| log as &mut (dyn Write + Send)),
        began,
        shown: &mut |last| bar.set_message(last.to_owned()),
    };
    let probing = options.probe.as_deref().map(|program| probe(program, options, &info));
    let proving = listening.listen::<_, anyhow::Error>(console, probing);
    let within = text::span(options.within);
    let outcome: anyhow::Result<Result<(), Why>> = tokio::select! {
        outcome = tokio::time::timeout(options.within.saturating_sub(began.elapsed()), proving) => match outcome {
            Ok(outcome) => outcome,
            Err(_) if watch.all_seen() => Ok(Err(format!("the probe has not ended within {within}"))),
            Err(_) => Ok(Err(format!("it has not said {} within {within}", watch.missing()))),
        },
        _ = terminate.recv() => Err(anyhow::anyhow!("prove the point: ended by SIGTERM")),
        _ = interrupt.recv() => Err(anyhow::anyhow!("prove the point: ended by SIGINT")),
        error = prepared.held.ended() => Err(error),
    };
    let took = began.elapsed();
    bar.finish_and_clear();
    end(&mut machine).await?;
    let outcome = outcome?;
    let kept = match outcome.is_ok() {
        true => keep(&prepared, took).await.map(Some).unwrap_or_else(|error| {
            tracing::warn!("tell the target server that the point is proven: {error:#}");
            None
        }),
        false => None,
    };
    report(options, &prepared, &watch, outcome, took, kept.as_ref())
}

async fn probe(
    program: &std::path::Path,
    options: &ProveOptions,
    info: &control::ExportInfo,
) -> anyhow::Result<Result<(), Why>> {
    let mut command = Command::new(program);
    command.env("SEAWALL_GROUP", info.group.to_string()).env("SEAWALL_POINT", info.point.epoch.to_string());
    if let Some(console) = &options.console {
        command.env("SEAWALL_CONSOLE", std::path::absolute(console)?);
    }
    // What it says is for people, and standard output may be a program's.
    command.stdin(Stdio::null()).stdout(Stdio::from(std::io::stderr())).kill_on_drop(true);
    let status = command.status().await.with_context(|| format!("run {}", program.display()))?;
    Ok(if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", program.display())) })
}

/// The target server remembers it, and shows it.
async fn keep(machine: &Machine, took: Duration) -> anyhow::Result<ProofInfo> {
    let info = &machine.held.info;
    let request = OperatorRequest::Proven {
        group: info.group,
        epoch: info.point.epoch,
        volumes: info.volumes.iter().map(|volume| volume.id).collect(),
        took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    };
    machine.servers.change(&request).await
}

fn report(
    options: &ProveOptions,
    machine: &Machine,
    watch: &Watch<'_>,
    outcome: Result<(), Why>,
    took: Duration,
    kept: Option<&ProofInfo>,
) -> anyhow::Result<Exit> {
    let info = &machine.held.info;
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let exit = if outcome.is_ok() { Exit::Done } else { Exit::Short };
    if options.json {
        let seen: Vec<serde_json::Value> = watch
            .expected()
            .iter()
            .map(|(text, seen)| serde_json::json!({ "text": text, "after_ms": seen.map(ms) }))
            .collect();
        let volumes: Vec<&str> = info.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let said = serde_json::json!({
            "proven": outcome.is_ok(), "why": outcome.err(), "group": info.group, "point": info.point.epoch,
            "cut_time": info.point.cut_time, "volumes": volumes, "took_ms": ms(took), "expected": seen,
            "console": options.console, "kept": kept.is_some(),
        });
        text::say(&format!("{said}\n"))?;
        return Ok(exit);
    }
    let mut out = String::new();
    for (text, seen) in watch.expected() {
        let when = seen.map_or_else(|| "not said".to_owned(), |seen| format!("after {}", text::span(seen)));
        out += &format!("  {text:?}: {when}\n");
    }
    match outcome {
        Ok(()) => out += &format!("Proven: {} has come up in {}.\n", machine.told(), text::span(took)),
        Err(why) => {
            for line in watch.last_lines(LINES_SHOWN) {
                out += &format!("  | {line}\n");
            }
            out += &format!("Not proven: {}: {why}.\n", machine.told());
        }
    }
    text::say(&out)?;
    Ok(exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_a_length() {
        assert!(sought("").is_err() && sought(&"x".repeat(TEXT_BYTES_MAX + 1)).is_err());
        assert!(sought("login:").is_ok());
    }
}
