//! `seawall prove`: boot proof. A machine is started on a point, and its console tells whether it has come up.
//!
//! The time counts from the command's beginning: what somebody would have waited for, had it been the worst day.

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use control::{OperatorRequest, ProofInfo};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::boot::{Machine, MachineOptions, end};
use crate::exit::Exit;
use crate::text;

/// What is kept of the console to be shown when it was in vain, in bytes.
const TAIL_BYTES: usize = 4096;
/// What is read of the console at a time, in bytes.
const READ_BYTES: usize = 16 * 1024;
/// The longest text to look for, in bytes.
const TEXT_BYTES_MAX: usize = 1024;

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

/// What a console has said.
struct Watch<'a> {
    expect: Vec<(&'a str, Option<Duration>)>,
    never: &'a [String],
    /// The end of it, in which a text may have begun.
    tail: Vec<u8>,
}

impl Watch<'_> {
    fn new<'a>(expect: &'a [String], never: &'a [String]) -> Watch<'a> {
        Watch { expect: expect.iter().map(|text| (text.as_str(), None)).collect(), never, tail: Vec::new() }
    }

    /// Takes what it says at a time. `Err`: what it should never have said.
    fn hear(&mut self, said: &[u8], at: Duration) -> Result<(), String> {
        self.tail.extend_from_slice(said);
        // Older bytes were looked at, but for a text that goes on here.
        let from = self.tail.len().saturating_sub(said.len() + TEXT_BYTES_MAX);
        let new = &self.tail[from..];
        let has = |text: &str| new.windows(text.len()).any(|window| window == text.as_bytes());
        let bad = self.never.iter().find(|text| has(text)).cloned();
        for (text, seen) in self.expect.iter_mut().filter(|(_, seen)| seen.is_none()) {
            *seen = has(text).then_some(at);
        }
        let surplus = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
        bad.map_or(Ok(()), Err)
    }

    fn all_seen(&self) -> bool {
        self.expect.iter().all(|(_, seen)| seen.is_some())
    }

    fn missing(&self) -> String {
        let missing = self.expect.iter().filter(|(_, seen)| seen.is_none());
        missing.map(|(text, _)| format!("{text:?}")).collect::<Vec<_>>().join(", ")
    }
}

/// Why a point is not proven.
type Why = String;
/// A probe that runs.
type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Result<(), Why>>> + 'a>>;

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
    let mut console = machine.stdout.take().context("the machine's console")?;
    let mut watch = Watch::new(&options.expect, &options.never);
    // It is read to the end, also while the probe runs: a console that nobody reads makes its machine wait.
    let proving = async {
        let mut bytes = vec![0; READ_BYTES];
        let mut probing: Option<Running<'_>> = None;
        loop {
            if watch.all_seen() && probing.is_none() {
                match &options.probe {
                    None => return Ok(Ok(())),
                    Some(program) => probing = Some(Box::pin(probe(program, options, &info))),
                }
            }
            let length = tokio::select! {
                length = console.read(&mut bytes) => length.context("read the machine's console")?,
                probed = ended(&mut probing) => return probed,
            };
            if length == 0 {
                let before = if probing.is_some() {
                    "the probe ended".to_owned()
                } else {
                    format!("it said {}", watch.missing())
                };
                return Ok(Err(format!("the machine ended before {before}")));
            }
            if let Some(log) = &mut log {
                log.write_all(&bytes[..length]).context("write the console's file")?;
            }
            if let Err(bad) = watch.hear(&bytes[..length], began.elapsed()) {
                return Ok(Err(format!("the machine said {bad:?}")));
            }
            bar.set_message(last_line(&watch.tail));
        }
    };
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

/// Waits for a probe that runs; for ever when none does.
async fn ended(running: &mut Option<Running<'_>>) -> anyhow::Result<Result<(), Why>> {
    match running {
        Some(running) => running.await,
        None => std::future::pending().await,
    }
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
            .expect
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
    for (text, seen) in &watch.expect {
        let when = seen.map_or_else(|| "not said".to_owned(), |seen| format!("after {}", text::span(seen)));
        out += &format!("  {text:?}: {when}\n");
    }
    match outcome {
        Ok(()) => out += &format!("Proven: {} has come up in {}.\n", machine.told(), text::span(took)),
        Err(why) => {
            let tail = String::from_utf8_lossy(&watch.tail);
            let last: Vec<&str> = tail.lines().rev().take(20).collect();
            for line in last.iter().rev() {
                out += &format!("  | {line}\n");
            }
            out += &format!("Not proven: {}: {why}.\n", machine.told());
        }
    }
    text::say(&out)?;
    Ok(exit)
}

/// What a terminal can show of it.
fn last_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let line = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.chars().filter(|char| !char.is_control()).take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn texts_are_found_however_the_console_is_cut() {
        let (expect, never) = (texts(&["debian login:", "Reached target"]), texts(&["panic"]));
        let said = format!("{}Reached target Basic.\r\n\u{1b}[0mdebian login:", "x".repeat(3 * TAIL_BYTES));
        for piece in [1, 2, 7, 4096, said.len()] {
            let mut watch = Watch::new(&expect, &never);
            for (index, piece) in said.as_bytes().chunks(piece).enumerate() {
                assert!(!watch.all_seen(), "not before the end");
                watch.hear(piece, Duration::from_secs(index as u64)).unwrap();
            }
            assert!(watch.all_seen() && watch.missing().is_empty(), "in pieces of {piece}");
            assert!(watch.expect[1].1 <= watch.expect[0].1 && watch.tail.len() <= TAIL_BYTES);
        }
    }

    #[test]
    fn what_must_not_be_said_counts_even_with_what_must() {
        let (expect, never) = (texts(&["login:"]), texts(&["Kernel panic"]));
        let mut watch = Watch::new(&expect, &never);
        watch.hear(b"Kernel pan", Duration::ZERO).unwrap();
        assert_eq!(watch.hear(b"ic - not syncing\nlogin:", Duration::ZERO).unwrap_err(), "Kernel panic");
        assert_eq!(Watch::new(&expect, &never).missing(), "\"login:\"");
    }

    #[test]
    fn texts_have_a_length() {
        assert!(sought("").is_err() && sought(&"x".repeat(TEXT_BYTES_MAX + 1)).is_err());
        assert!(sought("login:").is_ok());
    }
}
