//! The model test of capture: a simulated kernel, simulated disks and the real [`capture::Tracker`], in random schedules.
//!
//! - `SEAWALL_MODEL_SCHEDULES=N` runs N schedules instead of the usual number.
//! - `SEAWALL_MODEL_MUTATION=NAME` tries that mutation alone.
//! - `SEAWALL_MODEL_SEED=N` runs that seed alone, as a failure prints it.
//!
//! Rooms: `kernel` is the machine and its disks, `programs` the two capture programs step by step, `ring` their ring,
//! `tap` the agent's side of it, `traps` what random steps meet too rarely, `oracle` what a power cut could have left,
//! `mutation` the rules that can be switched off, `schedule` one run of it all, `met` what the runs have met.
//!
//! The agent is killed at any step of its calls into the tap and the disks, and another one takes up what it left.
//!
//! Not modelled: memory that an application changes while it is being written; a requeue that the program does not see,
//! followed by an issue that no copy of its program sees; writes that nobody sees while others are counted twice; writes that race on a sector, but for the test that shows the
//! limit; the kernel's sums over processors, which are single counts here; programs exchanged for others (an upgrade).

mod kernel;
mod met;
mod mutation;
mod oracle;
mod programs;
mod ring;
mod rng;
mod schedule;
mod tap;
mod traps;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use met::Met;
use mutation::Mutation;

/// Schedules that each run must pass.
const SCHEDULES: u64 = 100_000;
/// A mutation must be caught within so many.
const SCHEDULES_PER_MUTATION_MAX: u64 = 300_000;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text:?} is no number")))
}

/// Runs schedules on all processors until one fails. The sums of what they met, and the lowest seed that failed.
fn run(from: u64, count: u64, mutation: Option<Mutation>) -> (Vec<Met>, Option<(u64, String)>) {
    let (next, stop) = (AtomicU64::new(from), AtomicBool::new(false));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let results: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            let (mut all, mut failure, mut folds) = (Vec::new(), None, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= from + count {
                    break;
                }
                match schedule::run(seed, mutation, &mut folds) {
                    Ok(met) => all.push(met),
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        failure = Some((seed, error));
                    }
                }
            }
            (all, failure)
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no schedule panics")).collect()
    });
    let (mut all, mut failure) = (Vec::new(), None);
    for (met, failed) in results {
        all.extend(met);
        failure = match (failure, failed) {
            (Some((a, x)), Some((b, _))) if a < b => Some((a, x)),
            (_, Some(failed)) => Some(failed),
            (failure, None) => failure,
        };
    }
    (all, failure)
}

#[test]
fn every_point_is_a_state_that_a_power_cut_could_have_left() {
    let (from, count) = match number("SEAWALL_MODEL_SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("SEAWALL_MODEL_SCHEDULES").unwrap_or(SCHEDULES)),
    };
    let begun = Instant::now();
    let (all, failure) = run(from, count, None);
    if let Some((seed, error)) = failure {
        panic!(
            "{error}\nreplay: SEAWALL_MODEL_SEED={seed} cargo nextest run -p capture --test model every_point"
        );
    }
    let met = Met::sum(&all);
    println!("{} schedules in {:.1?}: {met:#?}", all.len(), begun.elapsed());
    if count >= 1000 {
        met.assert_all();
    }
}

#[test]
fn every_rule_is_missed() {
    let mut late = Vec::new();
    let most = number("SEAWALL_MODEL_SCHEDULES").unwrap_or(SCHEDULES_PER_MUTATION_MAX);
    let only = std::env::var("SEAWALL_MODEL_MUTATION").ok();
    for mutation in Mutation::RULES {
        if only.as_ref().is_some_and(|only| *only != format!("{mutation:?}")) {
            continue;
        }
        let (all, failure) = run(mutation.first_seed(), most, Some(*mutation));
        match failure {
            Some((seed, error)) => {
                let line = error.lines().next().unwrap_or_default();
                // For the right reason: a point that is wrong, not a model that came to a stop.
                let memory = line.starts_with("memory was full");
                assert!(
                    !line.contains("but no point after")
                        && memory == (*mutation == Mutation::MemoryUnbounded),
                    "{mutation:?}, seed {seed}: {error}"
                );
                println!("{mutation:?}: caught after {} schedules, by seed {seed}: {line}", all.len() + 1);
            }
            None => late.push(mutation),
        }
    }
    assert!(late.is_empty(), "not caught in {SCHEDULES_PER_MUTATION_MAX} schedules: {late:?}");
}

/// Not a rule but a limit: two writes of one sector that are in flight at the same time reach the disk in an order that the
/// kernel does not promise and nobody can see. File systems and databases never do that. A replica then holds either.
#[test]
fn writes_that_race_on_a_sector_are_a_limit() {
    let (_, failure) = run(1, SCHEDULES_PER_MUTATION_MAX, Some(Mutation::WritesRace));
    let (_, error) = failure.expect("the replica holds the other one of two racing writes");
    assert!(error.starts_with("at rest, but sector"), "{error}");
}
