//! Spans, thinning, pins, deleting: whatever is done and whenever it stops, every point that is offered is what was.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Consistency, Epoch, UnixNanos};
use durable::{CrashStorage, Fault, OpenMode, Storage};
use proptest::prelude::*;

use super::model::{Model, Steps, check_view, dir, open, open_policy, volume_id};
use crate::shared::{layers_dir, spans_dir};
use crate::{GroupReplica, Maintained, Pace, ReplicaError, View, verify};

/// A cut every second; so slots of a few seconds.
const POLICY: &str = "all for 6s, every 4s for 20s, every 8s for 60s";

fn sectors() -> Vec<u64> {
    vec![200, 64]
}

fn apply(model: &mut Model, replica: &GroupReplica, steps: &mut Steps) {
    let consistency = match steps.below(6) {
        0 => Consistency::None,
        1 => Consistency::Application,
        _ => Consistency::Crash,
    };
    let sectors = if steps.below(4) == 0 { vec![200] } else { sectors() };
    model.step(&steps.step(consistency, &sectors, 6, 30)).apply(replica).unwrap();
}

fn settle(replica: &GroupReplica) {
    while replica.maintain(&Pace::unbounded()).unwrap() != Maintained::Nothing {}
}

#[derive(Clone, Debug)]
enum Do {
    Apply(u64),
    Fail(u64, u64),
    Maintain,
    Settle,
    Pin(usize, bool),
    Unpin,
    Delete(usize),
    Open(usize),
    Close,
    Reopen,
}

fn what() -> impl Strategy<Value = Do> {
    prop_oneof![
        12 => any::<u64>().prop_map(Do::Apply),
        1 => (any::<u64>(), 0_u64..14).prop_map(|(seed, at)| Do::Fail(seed, at)),
        6 => Just(Do::Maintain),
        1 => Just(Do::Settle),
        1 => (0_usize..40, any::<bool>()).prop_map(|(point, expires)| Do::Pin(point, expires)),
        1 => Just(Do::Unpin),
        1 => (0_usize..40).prop_map(Do::Delete),
        1 => (0_usize..40).prop_map(Do::Open),
        1 => Just(Do::Close),
        1 => Just(Do::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Anything in any order.
    #[test]
    fn every_view_is_what_was_whatever_is_done(todo in prop::collection::vec(what(), 1..110)) {
        let storage = CrashStorage::new();
        let mut model = Model::default();
        let (mut replica, _) = open_policy(&storage, POLICY).unwrap();
        let mut views: Vec<(View, Vec<u8>)> = Vec::new();
        let mut pins: BTreeMap<Epoch, bool> = BTreeMap::new();
        for what in todo {
            let points = replica.points();
            let pick = |index: usize| (!points.is_empty()).then(|| points[index % points.len()].epoch);
            match what {
                Do::Apply(seed) => apply(&mut model, &replica, &mut Steps(seed)),
                // Before the first point there is nothing to go back to: the same epoch must come again.
                Do::Fail(..) if model.points.is_empty() => {}
                Do::Fail(seed, at) => {
                    let made = model.clone().step(&Steps(seed).step(Consistency::Crash, &sectors(), 6, 30));
                    storage.fail_at(storage.operations() + at, Fault::NoSpace);
                    let outcome = made.apply(&replica);
                    storage.mend();
                    if outcome.is_ok() || replica.poisoned().is_some() {
                        // It got through, or hit the state file, which has its space in reality.
                        return Ok(());
                    }
                }
                Do::Maintain => drop(replica.maintain(&Pace::unbounded()).unwrap()),
                Do::Settle => settle(&replica),
                Do::Pin(index, expires) => if let Some(epoch) = pick(index) {
                    let expires = expires.then_some(UnixNanos(u64::MAX));
                    // The tests' clock stands at the end of time.
                    let pinned = replica.pin(epoch, Some("kept".parse().unwrap()), expires);
                    prop_assert_eq!(pinned.is_ok(), expires.is_none());
                    if pinned.is_ok() {
                        pins.insert(epoch, true);
                    }
                },
                Do::Unpin => if let Some((epoch, _)) = pins.pop_first() {
                    replica.unpin(epoch).unwrap();
                },
                Do::Delete(index) => if let Some(epoch) = pick(index) {
                    let newest = points.last().unwrap().epoch == epoch;
                    let viewed = views.iter().any(|(view, _)| view.epoch() == epoch);
                    let stays = newest || viewed || pins.contains_key(&epoch);
                    match replica.delete_point(epoch, &Pace::unbounded()) {
                        Err(ReplicaError::PointStays { .. }) => prop_assert!(stays),
                        other => {
                            other.unwrap();
                            prop_assert!(!stays && replica.points().iter().all(|point| point.epoch != epoch));
                        }
                    }
                },
                Do::Open(index) => if let Some(epoch) = pick(index) {
                    let volume = index % model.points[&epoch].1.len();
                    // A volume that left the group is not one of the point's.
                    if let Ok(view) = replica.view(volume_id(volume), epoch) {
                        views.push((view, model.points[&epoch].1[volume].clone()));
                    }
                },
                Do::Close => if !views.is_empty() {
                    views.remove(0);
                },
                Do::Reopen => {
                    views.clear();
                    drop(replica);
                    let report;
                    (replica, report) = open_policy(&storage, POLICY).unwrap();
                    prop_assert_eq!((report.rolled_back, report.damaged.len()), (None, 0));
                }
            }
            for (view, content) in &views {
                check_view(view, content);
            }
            if model.points.is_empty() {
                continue;
            }
            let offered = model.check_offered(&replica);
            for pin in pins.keys() {
                prop_assert!(offered.contains(pin), "pinned {} went", pin);
            }
        }
        settle(&replica);
        for (epoch, why) in replica.kept_for() {
            let viewed = views.iter().any(|(view, _)| view.epoch() == epoch);
            prop_assert!(why.is_some() || viewed, "{} is still there", epoch);
        }
        drop(views);
        drop(replica);
        let report = verify(&storage, &dir()).unwrap();
        prop_assert_eq!(report.problems, Vec::<String>::new());
    }
}

/// Something that is done to a replica, and must be right wherever it stops.
type Operation = fn(&GroupReplica) -> Result<(), ReplicaError>;

const OPERATIONS: [(&str, Operation); 6] = [
    ("maintain", |replica| replica.maintain(&Pace::unbounded()).map(drop)),
    ("maintain twice", |replica| {
        replica.maintain(&Pace::unbounded())?;
        replica.maintain(&Pace::unbounded()).map(drop)
    }),
    ("settle", |replica| {
        while replica.maintain(&Pace::unbounded())? != Maintained::Nothing {}
        Ok(())
    }),
    ("delete", |replica| {
        let point = replica.points()[3].epoch;
        replica.delete_point(point, &Pace::unbounded()).map(drop)
    }),
    ("delete the oldest", |replica| {
        let point = replica.points()[0].epoch;
        replica.delete_point(point, &Pace::unbounded()).map(drop)
    }),
    ("pin and unpin", |replica| {
        let point = replica.points()[2].epoch;
        replica.pin(point, Some("audit".parse().unwrap()), None)?;
        replica.unpin(replica.points()[1].epoch).map(drop)
    }),
];

/// A replica with points to thin, spans to build and a pin.
fn ready(storage: &CrashStorage, epochs: u64) -> (GroupReplica, Model, Steps) {
    let mut model = Model::default();
    let mut steps = Steps(epochs * 7);
    let (replica, _) = open_policy(storage, POLICY).unwrap();
    for epoch in 1..=epochs {
        apply(&mut model, &replica, &mut steps);
        if epoch % 5 == 0 {
            replica.maintain(&Pace::unbounded()).unwrap();
        }
    }
    replica.pin(replica.points()[1].epoch, None, None).unwrap();
    (replica, model, steps)
}

fn offered(replica: &GroupReplica) -> Vec<Epoch> {
    replica.points().iter().map(|point| point.epoch).collect()
}

/// The machine stops in every operation of everything that is done in the background or by command: whatever that leaves opens, is
/// sound, offers only what was, and all of that which had to stay.
#[test]
fn a_crash_at_any_step_of_upkeep_loses_nothing_that_stays() {
    let mut crashes = 0;
    for (name, operation) in OPERATIONS {
        for stop in 0.. {
            let storage = CrashStorage::new();
            let (replica, model, steps) = ready(&storage, 33);
            let before = offered(&replica);
            let pinned: Vec<Epoch> =
                replica.points().iter().filter(|p| p.pin.is_some()).map(|p| p.epoch).collect();
            let stop = storage.operations() + stop;
            storage.stop_at(stop);
            let finished = operation(&replica).is_ok();
            let stopped = storage.operations() > stop;
            assert!(finished || stopped, "{name}");
            let after = offered(&replica);
            drop(replica);
            for seed in 0..5 {
                let crashed = storage.crash(seed);
                crashes += 1;
                let found = verify(&crashed, &dir()).unwrap();
                assert_eq!(found.problems, Vec::<String>::new(), "{name} stopped at {stop}, seed {seed}");
                let (replica, report) = open_policy(&crashed, POLICY).unwrap();
                assert_eq!((report.rolled_back, report.damaged.len()), (None, 0));
                let mut model = model.clone();
                model.check_offered(&replica);
                let points = offered(&replica);
                for epoch in &after {
                    let gone = before.contains(epoch) && !points.contains(epoch);
                    // What was about to go may be gone; what is pinned may not.
                    assert!(!gone || !finished, "{name}: {epoch} went");
                }
                for epoch in &before {
                    if finished && !after.contains(epoch) {
                        assert!(!points.contains(epoch), "{name}: {epoch} came back");
                    }
                }
                if name != "pin and unpin" {
                    assert!(pinned.iter().all(|epoch| points.contains(epoch)), "{name}: a pinned point went");
                } else if finished {
                    let pins: Vec<bool> = replica.points().iter().map(|point| point.pin.is_some()).collect();
                    assert_eq!(pins[1..3], [false, true]);
                }
                // And all goes on.
                let mut steps = Steps(steps.0);
                for _ in 0..3 {
                    apply(&mut model, &replica, &mut steps);
                    settle(&replica);
                }
                model.check_offered(&replica);
            }
            if !stopped {
                break;
            }
        }
    }
    assert!(crashes > 300, "{crashes} crashes");
}

/// The disk fails or is full in every operation of the same: the replica goes on applying, and offers what was.
#[test]
fn a_failure_in_upkeep_leaves_apply_alone() {
    for (name, operation) in OPERATIONS {
        for fault in [Fault::NoSpace, Fault::InputOutput] {
            let mut failed = 0;
            for at in 0.. {
                let storage = CrashStorage::new();
                let (replica, mut model, mut steps) = ready(&storage, 33);
                let operations = storage.operations();
                storage.fail_at(operations + at, fault);
                let outcome = operation(&replica);
                let untouched = storage.operations() <= operations + at;
                storage.mend();
                failed += u32::from(outcome.is_err());
                model.check_offered(&replica);
                if let Some(reason) = replica.poisoned() {
                    // Where the state file stands is not known: that is the one thing that apply cannot go on after.
                    assert!(reason.contains("state"), "{name}: {reason}");
                } else {
                    apply(&mut model, &replica, &mut steps);
                    settle(&replica);
                    model.check_offered(&replica);
                }
                drop(replica);
                let (replica, report) = open_policy(&storage, POLICY).unwrap();
                assert_eq!(report.damaged, [], "{name} failed at {at}");
                if replica.applied().1 == model.epoch {
                    model.check_offered(&replica);
                }
                if untouched {
                    break;
                }
            }
            assert!(failed > 0 || fault == Fault::NoSpace, "{name}: nothing failed");
        }
    }
}

/// Readers of old points, while epochs are applied, some taken back, points thinned, pinned and deleted, spans built and removed.
#[test]
fn views_are_right_while_everything_goes_on() {
    for seed in 0..3 {
        let storage = CrashStorage::new();
        let (replica, _) = open_policy(&storage, "all for 6s, every 4s for 40s").unwrap();
        let mut model = Model::default();
        let mut steps = Steps(seed * 1_000_003);
        for _ in 0..8 {
            model.step(&steps.step(Consistency::Crash, &sectors(), 12, 80)).apply(&replica).unwrap();
        }
        let epochs: Vec<_> = (0..80)
            .map(|_| {
                let made = model.step(&steps.step(Consistency::Crash, &sectors(), 12, 80));
                (made, steps.below(8) == 0)
            })
            .collect();
        let points = &model.points;
        let done = AtomicBool::new(false);
        let thinned = std::thread::scope(|scope| {
            for reader in 0..2 {
                let (replica, done) = (&replica, &done);
                scope.spawn(move || {
                    let mut luck = Steps(reader * 7 + seed);
                    let kept = replica.points()[2].epoch;
                    let long = replica.view(volume_id(0), kept).unwrap();
                    while !done.load(Ordering::Relaxed) {
                        check_view(&long, &points[&kept].1[0]);
                        let offered = replica.points();
                        let point = offered[luck.below(offered.len() as u64) as usize].epoch;
                        let volume = luck.below(2) as usize;
                        match luck.below(8) {
                            // It may have gone since, or be looked at.
                            0 => drop(replica.delete_point(point, &Pace::unbounded())),
                            1 if replica.pin(point, None, None).is_ok() => {
                                let view =
                                    replica.view(volume_id(volume), point).expect("a pinned point stays");
                                check_view(&view, &points[&point].1[volume]);
                                // Another reader may have taken it away.
                                drop(replica.unpin(point));
                            }
                            _ => {}
                        }
                        let Ok(view) = replica.view(volume_id(volume), point) else { continue };
                        check_view(&view, &points[&point].1[volume]);
                    }
                });
            }
            let keeper = scope.spawn(|| {
                let mut thinned = 0;
                while !done.load(Ordering::Relaxed) {
                    match replica.maintain(&Pace::unbounded()) {
                        Ok(Maintained::Thinned { .. }) => thinned += 1,
                        Ok(_) => {}
                        // A failure meant for apply may have hit this instead.
                        Err(error) => assert!(error.is_retryable(), "{error}"),
                    }
                }
                thinned
            });
            for (made, fail) in &epochs {
                if *fail {
                    storage.fail_at(storage.operations() + 9, Fault::NoSpace);
                }
                let outcome = made.apply(&replica);
                storage.mend();
                if let Err(error) = outcome {
                    assert!(error.is_retryable(), "{error}");
                    made.apply(&replica).unwrap();
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            done.store(true, Ordering::Relaxed);
            keeper.join().unwrap()
        });
        settle(&replica);
        assert!(thinned > 3, "{thinned} thinned");
        model.check_offered(&replica);
    }
}

/// Spans are derived. Whatever happens to them, nothing but time is lost.
#[test]
fn damaged_and_missing_spans_are_made_again() {
    let storage = CrashStorage::new();
    let mut model = Model::default();
    let mut steps = Steps(9);
    let (replica, _) = open(&storage, 1000).unwrap();
    for _ in 0..40 {
        model.step(&steps.step(Consistency::Crash, &sectors(), 8, 60)).apply(&replica).unwrap();
    }
    settle(&replica);
    let spans = || storage.list(&spans_dir(&dir())).unwrap();
    let all = spans();
    assert!(all.len() > 25, "{all:?}");
    drop(replica);
    for (number, name) in all.iter().enumerate() {
        let path = spans_dir(&dir()).join(name);
        let file = storage.open(&path, OpenMode::ReadWrite).unwrap();
        let at = number as u64 * 37 % file.len().unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
        if number % 3 == 0 {
            storage.remove(&path).unwrap();
        }
    }
    let report = verify(&storage, &dir()).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert!(
        report.notes.iter().filter(|note| note.contains("made again")).count() > 15,
        "{:?}",
        report.notes
    );
    let (replica, _) = open(&storage, 1000).unwrap();
    model.check(&replica, 1000);
    settle(&replica);
    model.check(&replica, 1000);
    drop(replica);
    // Those that no view came by are still damaged.
    let (replica, _) = open(&storage, 1000).unwrap();
    model.check(&replica, 1000);
}

/// A stopped merge leaves nothing behind.
#[test]
fn a_merge_that_is_told_to_stop_stops() {
    let storage = CrashStorage::new();
    let (replica, mut model, mut steps) = ready(&storage, 33);
    // There is more than one to merge.
    while !matches!(replica.maintain(&Pace::unbounded()).unwrap(), Maintained::Thinned { .. }) {}
    let pace = Pace::unbounded();
    pace.stop();
    let before = offered(&replica);
    assert!(matches!(replica.maintain(&pace), Err(ReplicaError::Stopped)));
    assert!(matches!(replica.delete_point(before[2], &pace), Err(ReplicaError::Stopped)));
    assert_eq!(offered(&replica), before);
    let names = storage.list(&layers_dir(&dir())).unwrap();
    assert!(names.iter().all(|name| name.ends_with(".layer") || name == "spare.new"), "{names:?}");
    apply(&mut model, &replica, &mut steps);
    model.check_offered(&replica);
}
