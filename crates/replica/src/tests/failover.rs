//! A failover gives the chosen point and loses nothing; cancelling gives back what was; the old generation is kept out.

use block::{Consistency, Epoch, Generation, HistoryId};
use durable::CrashStorage;

use super::model::{GENERATION, Model, Steps, check_view, dir, open, volume_id};
use crate::{FailedOver, GroupReplica, Maintained, Pace, ReplicaError, verify};

pub(crate) const SECTORS: [u64; 2] = [160, 50];
pub(crate) const NEXT: Generation = Generation(GENERATION.0 + 1);

pub(crate) fn history(storage: &CrashStorage, seed: u64, epochs: u64) -> (GroupReplica, Model, Steps) {
    let (mut model, mut steps) = (Model::default(), Steps(seed));
    let (replica, _) = open(storage, 1000).unwrap();
    for number in 0..epochs {
        let none = number > 0 && number % 4 == seed % 4;
        let consistency = if none { Consistency::None } else { Consistency::Crash };
        // One volume grows on the way.
        let sectors = if number < epochs / 2 { [SECTORS[0] - 16, SECTORS[1]] } else { SECTORS };
        model.step(&steps.step(consistency, &sectors, 5, 30)).apply(&replica).unwrap();
        if number == epochs / 2 && seed.is_multiple_of(2) {
            while replica.maintain(&Pace::unbounded()).unwrap() != Maintained::Nothing {}
        }
    }
    (replica, model, steps)
}

pub(crate) fn chosen(model: &Model, steps: &mut Steps) -> Epoch {
    let points: Vec<Epoch> = model.points.keys().copied().collect();
    points[steps.below(points.len() as u64) as usize]
}

pub(crate) fn fail_over(replica: &GroupReplica, point: Epoch) -> Result<FailedOver, ReplicaError> {
    replica.fail_over(point, NEXT, &Pace::unbounded())
}

/// The history goes on from a point: what the volumes have behind their size then, they keep.
pub(crate) fn gone_on(model: &Model, replica: &GroupReplica, point: Epoch) -> Model {
    let mut after = model.clone();
    after.epoch = replica.applied().1;
    let (consistency, images) = model.points[&point].clone();
    for (now, then) in after.current.iter_mut().zip(&images) {
        now[..then.len()].copy_from_slice(then);
    }
    after.points.insert(after.epoch, (consistency, after.current.clone()));
    after
}

/// What one generation sends is refused, and changes nothing.
pub(crate) fn is_refused(replica: &GroupReplica, model: &Model, steps: &mut Steps, generation: Generation) {
    let before = replica.applied();
    let mut model = model.clone();
    let mut made = model.step(&steps.step(Consistency::Crash, &SECTORS, 3, 9));
    made.stamp.generation = generation;
    let refused = made.apply(replica).unwrap_err();
    let pending = replica.failover().is_some();
    let right = match &refused {
        ReplicaError::FailoverPending { .. } => pending,
        ReplicaError::WrongGeneration { .. } => !pending,
        ReplicaError::Promoted { .. } => replica.promoted().is_some(),
        _ => false,
    };
    assert!(right && replica.applied() == before, "{refused}");
}

/// Which history it is depends on what was decided of what, not on where; what is written here makes it another one, and cancelling gives
/// back the one before. All of it outlives the process.
#[test]
fn a_history_is_named_by_what_began_it() {
    let storage = CrashStorage::new();
    let (replica, model, _) = history(&storage, 3, 8);
    let (older, newest) = (*model.points.keys().next().unwrap(), *model.points.keys().next_back().unwrap());
    assert_eq!(replica.standing(GENERATION).unwrap().history, HistoryId::SOURCE);
    drop(replica);
    let decided = |seed: u64, point: Epoch, promote: bool| {
        let (replica, _) = open(&storage.crash(seed), 1000).unwrap();
        assert_eq!(replica.applied().1, model.epoch);
        fail_over(&replica, point).unwrap();
        if promote {
            replica.promote().unwrap();
            replica.demote().unwrap();
        }
        replica.commit_failover().unwrap();
        replica.standing(NEXT).unwrap().history
    };
    let plain = decided(0, older, false);
    assert_eq!(plain, decided(1, older, false), "two targets that decide alike go on alike");
    assert!(plain != HistoryId::SOURCE && plain != decided(2, newest, false));
    assert_ne!(plain, decided(3, older, true), "what is written there is there alone");

    let storage = storage.crash(4);
    let (replica, _) = open(&storage, 1000).unwrap();
    fail_over(&replica, older).unwrap();
    replica.promote().unwrap();
    drop(replica);
    let (replica, _) = open(&storage, 1000).unwrap();
    replica.demote().unwrap();
    replica.cancel_failover().unwrap();
    assert_eq!(replica.standing(GENERATION).unwrap().history, HistoryId::SOURCE);
    fail_over(&replica, older).unwrap();
    replica.commit_failover().unwrap();
    drop(replica);
    let (replica, _) = open(&storage, 1000).unwrap();
    assert_eq!(replica.standing(NEXT).unwrap().history, plain);
}

#[test]
fn a_failover_is_the_point_and_may_be_taken_back() {
    for seed in 0..40 {
        let storage = CrashStorage::new();
        let (replica, mut model, mut steps) = history(&storage, seed, 5 + seed % 9);
        let point = chosen(&model, &mut steps);
        assert!(matches!(replica.commit_failover(), Err(ReplicaError::NoFailover { .. })));
        assert!(matches!(replica.cancel_failover(), Err(ReplicaError::NoFailover { .. })));
        assert!(matches!(
            replica.fail_over(point, GENERATION, &Pace::unbounded()),
            Err(ReplicaError::NotNewer { .. })
        ));
        assert!(matches!(fail_over(&replica, Epoch(999)), Err(ReplicaError::NoSuchPoint { .. })));
        assert_eq!(replica.applied(), (Some(GENERATION), model.epoch));

        let done = fail_over(&replica, point).unwrap();
        let over = gone_on(&model, &replica, point);
        assert_eq!(done.epoch, over.epoch);
        over.check(&replica, 1000);
        is_refused(&replica, &model, &mut steps, GENERATION);
        is_refused(&replica, &over, &mut steps, NEXT);
        assert!(matches!(
            replica.scrub(None, &Pace::unbounded(), &|_| {}),
            Err(ReplicaError::FailoverPending { .. })
        ));
        assert_eq!(replica.maintain(&Pace::unbounded()).unwrap(), Maintained::Nothing);
        let other = model.points.keys().copied().find(|other| *other != point).unwrap();
        assert!(matches!(fail_over(&replica, other), Err(ReplicaError::FailoverPending { .. })));
        assert!(matches!(
            replica.delete_point(other, &Pace::unbounded()),
            Err(ReplicaError::FailoverPending { .. })
        ));

        // It outlives the process.
        drop(replica);
        assert_eq!(verify(&storage, &dir()).unwrap().problems, Vec::<String>::new());
        let (replica, _) = open(&storage, 1000).unwrap();
        assert!(replica.failover().unwrap().1);
        over.check(&replica, 1000);

        if seed % 2 == 0 {
            let view = replica.view(volume_id(0), over.epoch).unwrap();
            assert!(matches!(replica.cancel_failover(), Err(ReplicaError::InUse { .. })));
            drop(view);
            assert_eq!(replica.cancel_failover().unwrap(), GENERATION);
        } else {
            assert_eq!(replica.commit_failover().unwrap(), NEXT);
            assert!(matches!(replica.cancel_failover(), Err(ReplicaError::NoFailover { .. })));
            is_refused(&replica, &model, &mut steps, GENERATION);
            model = over;
        }
        model.check(&replica, 1000);
        go_on(&storage, replica, model, &mut steps, 3);
    }
}

/// Epochs follow, work in the background is done, and all points stay what they were, also when it is opened again.
fn go_on(
    storage: &CrashStorage,
    mut replica: GroupReplica,
    mut model: Model,
    steps: &mut Steps,
    rounds: u32,
) {
    assert_eq!(replica.failover(), None);
    for round in 0..rounds {
        for _ in 0..6 {
            let mut made = model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20));
            made.stamp.generation = replica.applied().0.unwrap();
            made.apply(&replica).unwrap();
        }
        while replica.maintain(&Pace::unbounded()).unwrap() != Maintained::Nothing {}
        let report = replica.scrub(None, &Pace::unbounded(), &|_| {}).unwrap();
        assert_eq!(report.findings, [], "round {round}");
        model.check(&replica, 1000);
        drop(replica);
        let found = verify(storage, &dir()).unwrap();
        assert_eq!(found.problems, Vec::<String>::new());
        (replica, _) = open(storage, 1000).unwrap();
        model.check(&replica, 1000);
    }
}

/// The machine stops in any step of failing over, committing or cancelling: it is one or the other, or pending and goes on either way.
#[test]
fn a_crash_at_any_step_of_a_failover_is_no_harm() {
    let mut pending = 0;
    for case in 0..3 {
        for stop in 0.. {
            let storage = CrashStorage::new();
            let (replica, model, mut steps) = history(&storage, case, 6);
            let point = chosen(&model, &mut steps);
            storage.stop_at(storage.operations() + stop);
            let at = storage.operations() + stop;
            let done = fail_over(&replica, point).and_then(|_| match case {
                0 => Ok(()),
                1 => replica.commit_failover().map(drop),
                _ => replica.cancel_failover().map(drop),
            });
            let stopped = storage.operations() > at;
            assert!(stopped || done.is_ok(), "{done:?}");
            drop(replica);
            for seed in 0..4 {
                let crashed = storage.crash(seed);
                assert_eq!(verify(&crashed, &dir()).unwrap().problems, Vec::<String>::new());
                let (replica, report) = open(&crashed, 1000).unwrap();
                assert_eq!(report.damaged, []);
                let mut steps = Steps(seed);
                let after = match (replica.failover(), replica.applied().0) {
                    (None, Some(GENERATION)) => {
                        assert!(done.is_err() || case == 2);
                        model.clone()
                    }
                    (None, _) => gone_on(&model, &replica, point),
                    (Some((failover, complete)), _) => {
                        pending += 1;
                        assert_eq!((failover.point, failover.ended), (point, model.epoch));
                        assert!(complete || replica.commit_failover().is_err());
                        is_refused(&replica, &model, &mut steps, GENERATION);
                        // Every point from before is what it was, however far it had come.
                        for (epoch, (_, images)) in &model.points {
                            check_view(&replica.view(volume_id(0), *epoch).unwrap(), &images[0]);
                        }
                        if seed % 2 == 0 {
                            fail_over(&replica, point).unwrap();
                            replica.commit_failover().unwrap();
                            let mut over = gone_on(&model, &replica, point);
                            // When it was complete, failing over again makes one more point of the same.
                            for point in replica.points() {
                                if point.epoch > model.epoch {
                                    let newest = over.points[&over.epoch].clone();
                                    over.points.insert(point.epoch, newest);
                                }
                            }
                            over
                        } else {
                            replica.cancel_failover().unwrap();
                            model.clone()
                        }
                    }
                };
                after.check(&replica, 1000);
                go_on(&crashed, replica, after, &mut steps, 1);
            }
            if !stopped {
                break;
            }
        }
    }
    assert!(pending > 50, "{pending}");
}

/// Retention does not take the place to which cancelling leads back.
#[test]
fn retention_waits_for_the_verdict() {
    let storage = CrashStorage::new();
    let (mut model, mut steps) = (Model::default(), Steps(5));
    let (replica, _) = open(&storage, 2).unwrap();
    for _ in 0..6 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica).unwrap();
    }
    fail_over(&replica, Epoch(5)).unwrap();
    assert_eq!(replica.points().iter().map(|point| point.epoch.0).next(), Some(5));
    replica.cancel_failover().unwrap();
    model.check(&replica, 2);
}
