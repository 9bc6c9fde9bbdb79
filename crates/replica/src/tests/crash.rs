use block::{Consistency, Epoch};
use durable::{CrashStorage, OpenMode, Storage};

use super::model::{Model, Step, Steps, dir, open, volume_id};
use crate::shared::image_path;
use crate::{ReplicaError, verify};

const SECTORS: [u64; 2] = [96, 40];

/// Steps in which everything happens: epochs before the first point, the first point, epochs that are none, a volume
/// that grows, one that appears, points dropped (two are kept).
fn steps(seed: u64) -> Vec<Step> {
    use Consistency::{Crash, Filesystem, None};
    let mut steps = Steps(seed);
    let kinds = [None, Crash, None, Filesystem, Crash, None, Crash, Crash];
    let mut all = Vec::new();
    for (index, consistency) in kinds.into_iter().enumerate() {
        let sectors = match index {
            0 => SECTORS[..1].to_vec(),
            1..=3 => SECTORS.to_vec(),
            4 => vec![130, 40],
            _ => vec![130, 40, 50],
        };
        all.push(steps.step(consistency, &sectors, 6, 24));
    }
    all
}

/// The machine stops in every operation of every apply, and every medium that this can leave is opened: the replica
/// is at N-1 or at N, every point of that state is offered and is what was, and the next epochs go on from there.
#[test]
fn a_crash_at_any_step_leaves_one_epoch_or_the_next() {
    let mut crashes = 0;
    for case in 0..3 {
        let steps = steps(1000 * case);
        for upto in 0..steps.len() {
            for stop in 0.. {
                let storage = CrashStorage::new();
                let mut before = Model::default();
                let (replica, _) = open(&storage, 2).unwrap();
                for step in &steps[..upto] {
                    before.step(step).apply(&replica).unwrap();
                }
                let mut after = before.clone();
                let made = after.step(&steps[upto]);
                let stop = storage.operations() + stop;
                storage.stop_at(stop);
                let finished = made.apply(&replica).is_ok();
                let stopped = storage.operations() > stop;
                assert!(finished || stopped);
                drop(replica);
                for seed in 0..6 {
                    let crashed = storage.crash(seed);
                    crashes += 1;
                    check_and_go_on(&crashed, &before, &after, finished, &steps[upto..]);
                }
                if !stopped {
                    break;
                }
            }
        }
    }
    assert!(crashes > 2000, "{crashes} crashes");
}

fn check_and_go_on(storage: &CrashStorage, before: &Model, after: &Model, finished: bool, rest: &[Step]) {
    let found = verify(storage, &dir()).unwrap();
    assert_eq!(found.problems, Vec::<String>::new());
    let (replica, report) = open(storage, 2).unwrap();
    assert_eq!(report.damaged, []);
    let applied = replica.applied().1;
    assert!(applied == after.epoch || (applied == before.epoch && !finished), "found epoch {applied}");
    let mut model = if applied == after.epoch { after.clone() } else { before.clone() };
    if let Some(epoch) = report.rolled_back {
        assert_eq!(epoch, before.epoch.next());
        assert_eq!(applied, before.epoch);
        for (index, content) in before.current.iter().enumerate() {
            let path = image_path(&dir(), volume_id(index));
            let length = storage.open(&path, OpenMode::Read).unwrap().len().unwrap();
            assert_eq!(length, content.len() as u64, "an image is as long as its volume again");
        }
    }
    model.check(&replica, 2);
    let left = if applied == after.epoch { &rest[1..] } else { rest };
    for step in left.iter().take(2) {
        model.step(step).apply(&replica).unwrap();
        model.check(&replica, 2);
    }
}

/// A crash, then crashes at every step of the roll back that follows.
#[test]
fn a_crash_while_rolling_back_is_rolled_back_again() {
    let steps = steps(77);
    let upto = 4;
    let mut rolled_back = 0;
    for stop in 0.. {
        let storage = CrashStorage::new();
        let mut before = Model::default();
        let (replica, _) = open(&storage, 2).unwrap();
        for step in &steps[..upto] {
            before.step(step).apply(&replica).unwrap();
        }
        let mut after = before.clone();
        let made = after.step(&steps[upto]);
        storage.stop_at(storage.operations() + stop);
        let finished = made.apply(&replica).is_ok();
        drop(replica);
        for seed in [1, 2, 3] {
            for again in 0.. {
                let crashed = storage.crash(seed);
                crashed.stop_at(again);
                match open(&crashed, 2) {
                    Ok((_, report)) => {
                        rolled_back += u32::from(report.rolled_back.is_some());
                        break;
                    }
                    Err(ReplicaError::Io { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
                for seed in 0..4 {
                    check_and_go_on(&crashed.crash(seed), &before, &after, finished, &steps[upto..]);
                }
            }
        }
        if finished {
            break;
        }
    }
    assert!(rolled_back > 10, "{rolled_back} rolled back");
}

/// A crash in the middle of making a replica leaves something that opens as an empty one.
#[test]
fn a_crash_while_making_a_replica_leaves_none_or_an_empty_one() {
    for stop in 0.. {
        let storage = CrashStorage::new();
        storage.stop_at(stop);
        let made = open(&storage, 2).is_ok();
        for seed in 0..10 {
            let (replica, _) = open(&storage.crash(seed), 2).unwrap();
            assert_eq!(replica.applied(), (None, Epoch::NONE));
        }
        if made {
            break;
        }
    }
}

/// A process that dies leaves what it wrote in the page cache, synced or not: all of it is found.
#[test]
fn a_killed_process_is_a_crash_that_loses_nothing() {
    let steps = steps(3);
    for stop in 0..40 {
        let storage = CrashStorage::new();
        let mut before = Model::default();
        let (replica, _) = open(&storage, 2).unwrap();
        for step in &steps[..5] {
            before.step(step).apply(&replica).unwrap();
        }
        let mut after = before.clone();
        let made = after.step(&steps[5]);
        storage.stop_at(storage.operations() + stop);
        let finished = made.apply(&replica).is_ok();
        drop(replica);
        check_and_go_on(&storage.crash(1), &before, &after, finished, &steps[5..]);
    }
}
