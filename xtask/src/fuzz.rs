//! `cargo xtask fuzz`: arbitrary bytes for every decoder, on the stable toolchain.
//!
//! fuzz/ has one program for all targets. It is built here with the compiler's coverage, which libFuzzer steers by; stable Rust has
//! that too. What a run has found out is kept in fuzz/corpus, and the next one goes on from there. What broke a decoder once is in
//! fuzz/regressions, and tried first by every run.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Args;

use crate::{find, root, step};

/// How the compiler makes a program tell libFuzzer where it comes by.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// The longest input, in bytes.
const INPUT_BYTES_MAX: u32 = 8192;
/// What one input may take, in seconds. More counts as a hang.
const INPUT_SECONDS_MAX: u32 = 10;
/// What a target may take of memory, in MiB.
const MEMORY_MIB_MAX: u32 = 1024;
/// Lines of a target's output that are shown when it finds something.
const OUTPUT_LINES: usize = 60;

#[derive(Args)]
pub(crate) struct Options {
    /// For each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where the random choices begin, so that a run can be had again; from 1. Each run begins elsewhere when left out
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    seed: Option<u32>,
    /// Targets at a time; as many as there are cores when left out.
    #[arg(long)]
    jobs: Option<usize>,
    /// Only say which targets there are.
    #[arg(long)]
    list: bool,
    /// Which targets, by name; all when none is named.
    targets: Vec<String>,
}

/// What became of a target.
struct Outcome {
    target: String,
    runs: String,
    coverage: String,
    /// The end of what it said, when it found something.
    found: Option<String>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let program = build()?;
    let known = Command::new(&program).output().context("ask for the targets")?;
    let known = String::from_utf8(known.stdout).context("read the targets")?;
    let known: Vec<&str> = known.lines().collect();
    ensure!(!known.is_empty(), "{} names no targets", program.display());
    if let Some(unknown) = options.targets.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no target is called {unknown:?}; there are: {}", known.join(", "));
    }
    let is_wanted =
        |name: &&&str| options.targets.is_empty() || options.targets.iter().any(|wanted| wanted == *name);
    let wanted: VecDeque<String> = known.iter().filter(is_wanted).map(|name| (*name).to_owned()).collect();
    if options.list {
        wanted.iter().for_each(|target| println!("{target}"));
        return Ok(());
    }
    let seeds = root().join("fuzz/target/seeds");
    step("seeds", Command::new(&program).env("SEAWALL_FUZZ_SEEDS", &seeds))?;

    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = options.jobs.unwrap_or(cores).clamp(1, wanted.len());
    let count = wanted.len();
    let least = count.div_ceil(jobs) as u64 * options.seconds;
    println!("{count} targets, {} s each, {jobs} at a time: {least} s", options.seconds);
    let begun = Instant::now();
    let (waiting, outcomes) = (Mutex::new(wanted), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        let work = || -> anyhow::Result<()> {
            loop {
                let Some(target) = waiting.lock().expect("nobody panics with it").pop_front() else {
                    return Ok(());
                };
                let outcome = fuzz(&program, target, options)?;
                let mark = if outcome.found.is_some() { "FOUND SOMETHING" } else { "" };
                println!(
                    "{:<20} {:>10} runs {:>7} places {mark}",
                    outcome.target, outcome.runs, outcome.coverage
                );
                outcomes.lock().expect("nobody panics with it").push(outcome);
            }
        };
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    println!("{count} targets in {} s", begun.elapsed().as_secs());
    let outcomes = outcomes.into_inner().expect("nobody panics with it");
    let found: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.found.is_some()).collect();
    for outcome in &found {
        eprintln!("\n== {}\n{}", outcome.target, outcome.found.as_deref().unwrap_or_default());
    }
    ensure!(
        found.is_empty(),
        "{} broke. The input is in fuzz/artifacts/<target>/; the same again: SEAWALL_FUZZ_TARGET=<target> {} INPUT. \
         When it is mended, keep the input in fuzz/regressions/<target>/",
        found.iter().map(|outcome| outcome.target.as_str()).collect::<Vec<_>>().join(", "),
        program.display()
    );
    Ok(())
}

/// Builds the program of all targets.
fn build() -> anyhow::Result<PathBuf> {
    ensure!(
        find("c++").is_some(),
        "fuzz: libFuzzer is C++; install a compiler: apt-get install build-essential"
    );
    let host =
        Command::new("rustc").args(["--print", "host-tuple"]).output().context("ask rustc for its host")?;
    let host = String::from_utf8(host.stdout).context("read rustc's host")?;
    let host = host.trim();
    // With --target, build scripts and macros are built without coverage.
    let mut command = crate::cargo();
    command
        .current_dir(root().join("fuzz"))
        .args(["build", "--release", "--quiet", "--locked", "--target", host])
        .env("RUSTFLAGS", COVERAGE)
        .env_remove("CARGO_TARGET_DIR");
    step("build with coverage", &mut command)?;
    Ok(root().join("fuzz/target").join(host).join("release/decoders"))
}

/// The fuzz targets are a workspace of their own, whose lock file nothing else looks at.
pub(crate) fn lock_is_current() -> anyhow::Result<()> {
    let mut command = crate::cargo();
    command.current_dir(root().join("fuzz")).stdout(Stdio::null());
    command.args(["metadata", "--locked", "--quiet", "--format-version", "1"]);
    step("lock file of the fuzz targets (mend: cargo generate-lockfile, in fuzz/)", &mut command)
}

fn fuzz(program: &Path, target: String, options: &Options) -> anyhow::Result<Outcome> {
    let dir = |kind: &str| root().join("fuzz").join(kind).join(&target);
    let (corpus, artifacts) = (dir("corpus"), dir("artifacts"));
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let mut command = Command::new(program);
    command
        .env("SEAWALL_FUZZ_TARGET", &target)
        // Backtraces of what is found; the rest is quick without them.
        .env("RUST_BACKTRACE", "1")
        .arg(format!("-max_total_time={}", options.seconds))
        // 0: another one each time.
        .arg(format!("-seed={}", options.seed.unwrap_or(0)))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-use_value_profile=1"])
        .arg(&corpus)
        .args(
            [dir("regressions"), root().join("fuzz/target/seeds").join(&target)]
                .iter()
                .filter(|dir| dir.is_dir()),
        )
        .stdout(Stdio::null());
    let output = command.stderr(Stdio::piped()).output().with_context(|| format!("fuzz {target}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let runs = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let coverage = said.lines().rev().find_map(|line| line.split("cov: ").nth(1)?.split(' ').next());
    let lines: Vec<&str> = said.lines().collect();
    let end = lines[lines.len().saturating_sub(OUTPUT_LINES)..].join("\n");
    Ok(Outcome {
        runs: runs.unwrap_or("?").trim().to_owned(),
        coverage: coverage.unwrap_or("?").to_owned(),
        found: (!output.status.success()).then_some(end),
        target,
    })
}
