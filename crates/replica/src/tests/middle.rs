//! A replica that begins in the middle of a history offers nothing before all of it has come, whatever comes between.

use block::{ByteCount, Consistency, Epoch, GRANULE_BYTES, Generation, Granule, HistoryId};
use durable::CrashStorage;

use super::model::{GENERATION, Model, Step, Steps, open};
use crate::delta::{Change, Content, Delta};
use crate::{GroupReplica, ReplicaError};

const SECTORS: [u64; 2] = [600, 300];
const HISTORY: HistoryId = HistoryId(9);

/// A source with a history of its own, of which nothing arrived anywhere.
fn source(seed: u64) -> (Model, Steps) {
    let (mut model, mut steps) = (Model::default(), Steps(seed));
    for _ in 0..6 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 8, 60));
    }
    (model, steps)
}

fn begin(replica: &GroupReplica, model: &Model) -> Result<(), ReplicaError> {
    replica.begin_after(GENERATION, model.epoch, HISTORY)
}

fn granules() -> Vec<(usize, Granule)> {
    let of = |volume: usize| {
        (0..(SECTORS[volume] * 512).div_ceil(GRANULE_BYTES)).map(move |at| (volume, Granule(at)))
    };
    (0..SECTORS.len()).flat_map(of).collect()
}

fn range(model: &Model, (volume, granule): (usize, Granule)) -> std::ops::Range<usize> {
    let start = granule.offset().0 as usize;
    start..model.current[volume].len().min(start + GRANULE_BYTES as usize)
}

/// An epoch that sends these granules whole.
fn send(
    replica: &GroupReplica,
    model: &mut Model,
    granules: &[(usize, Granule)],
    consistency: Consistency,
) -> Result<(), ReplicaError> {
    let made = model.step(&Step { consistency, sectors: SECTORS.to_vec(), writes: Vec::new() });
    let mut delta = Delta::new(made.stamp, &made.volumes);
    for at in granules {
        let range = range(model, *at);
        let (start, length) = (range.start as u64, range.len() as u64);
        delta
            .push(at.0, Change { start, length, content: Content::Data(&model.current[at.0][range]) })
            .unwrap();
    }
    replica.apply_delta(&delta).map(drop)
}

/// Nothing but what was since it is proven is offered, and that is right.
fn check(replica: &GroupReplica, model: &Model, proven: Option<Epoch>) {
    let mut model = model.clone();
    model.points.retain(|epoch, _| proven.is_some_and(|proven| *epoch >= proven));
    model.check(replica, 1000);
    assert_eq!(replica.unproven() == ByteCount::ZERO, proven.is_some());
}

#[test]
fn nothing_is_a_point_before_all_has_come() {
    for seed in 0..30 {
        let storage = CrashStorage::new();
        let (mut model, mut steps) = source(1000 * seed);
        let (replica, _) = open(&storage, 1000).unwrap();
        assert!(replica.is_blank());
        begin(&replica, &model).unwrap();
        assert!(!replica.is_blank());
        assert_eq!(replica.standing(GENERATION).unwrap().history, HISTORY);
        assert_eq!((replica.applied(), replica.applied_cut_time()), ((Some(GENERATION), model.epoch), None));
        check(&replica, &model, None);
        model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica).unwrap();
        check(&replica, &model, None);

        // All but one: still it is no point.
        let all = granules();
        let last = all[steps.below(all.len() as u64) as usize];
        let others: Vec<_> = all.iter().copied().filter(|at| *at != last).collect();
        send(&replica, &mut model, &others, Consistency::None).unwrap();
        model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica).unwrap();
        check(&replica, &model, None);
        assert!(replica.unproven() <= ByteCount(GRANULE_BYTES));

        // What is known of what has come ends with the process.
        let again = seed % 3 == 0;
        let replica = match again {
            true => {
                drop(replica);
                let (replica, _) = open(&storage, 1000).unwrap();
                assert!(replica.unproven() > ByteCount(GRANULE_BYTES));
                replica
            }
            false => replica,
        };
        let rest = if again { all.clone() } else { vec![last] };
        send(&replica, &mut model, &rest, Consistency::None).unwrap();
        let made = model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30));
        made.apply(&replica).unwrap();
        let proven = Some(model.epoch);
        check(&replica, &model, proven);
        model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica).unwrap();
        check(&replica, &model, proven);
        drop(replica);
        check(&open(&storage, 1000).unwrap().0, &model, proven);
    }
}

/// What the source sends whole is right without a comparison.
#[test]
fn what_is_overwritten_needs_no_comparison() {
    let storage = CrashStorage::new();
    let (mut model, mut steps) = source(5);
    let (replica, _) = open(&storage, 1000).unwrap();
    begin(&replica, &model).unwrap();
    let all = granules();
    let (some, rest) = all.split_at(all.len() / 2);
    send(&replica, &mut model, some, Consistency::Crash).unwrap();
    send(&replica, &mut model, rest, Consistency::Crash).unwrap();
    check(&replica, &model, None);
    model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica).unwrap();
    let proven = Some(model.epoch);
    check(&replica, &model, proven);
}

#[test]
fn only_a_blank_replica_begins_in_the_middle() {
    let storage = CrashStorage::new();
    let (mut model, mut steps) = source(6);
    let (replica, _) = open(&storage, 1000).unwrap();
    let early = model.clone().step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica);
    assert!(matches!(early, Err(ReplicaError::Gap { .. })), "{early:?}");
    begin(&replica, &model).unwrap();
    assert!(matches!(begin(&replica, &model), Err(ReplicaError::Gap { .. })));
    let other = replica.begin_after(Generation(GENERATION.0 + 1), model.epoch, HISTORY);
    assert!(matches!(other, Err(ReplicaError::WrongGeneration { .. })), "{other:?}");
    model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica).unwrap();
    assert!(matches!(begin(&replica, &model), Err(ReplicaError::Gap { .. })));
    check(&replica, &model, None);
}

/// The machine stops in every operation of a beginning, the epochs after it, the comparison and the first point: whatever is found
/// offers no point, or that one; and it goes on.
#[test]
fn a_crash_at_any_step_proves_nothing() {
    let (mut crashes, mut with_point) = (0, 0);
    for stop in 0.. {
        let storage = CrashStorage::new();
        let (mut model, mut steps) = source(77);
        let (replica, _) = open(&storage, 1000).unwrap();
        let stop = storage.operations() + stop;
        storage.stop_at(stop);
        let begins = model.epoch;
        let mut goes = || -> Result<(), ReplicaError> {
            begin(&replica, &model)?;
            model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica)?;
            send(&replica, &mut model, &granules(), Consistency::None)?;
            model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 30)).apply(&replica)?;
            Ok(())
        };
        let finished = goes().is_ok();
        drop(replica);
        for seed in 0..4 {
            crashes += 1;
            let (replica, report) = open(&storage.crash(seed), 1000).unwrap();
            assert_eq!(report.damaged, []);
            let applied = replica.applied().1;
            assert!(
                applied == Epoch::NONE || (begins..=model.epoch).contains(&applied),
                "found epoch {applied}"
            );
            assert!(!finished || applied == model.epoch);
            let points: Vec<Epoch> = replica.points().iter().map(|point| point.epoch).collect();
            match points[..] {
                [] => assert!(
                    applied == Epoch::NONE && replica.is_blank() || replica.unproven() > ByteCount::ZERO
                    // Proven by the epoch after the comparison, which was none.
                    || applied.next() == model.epoch || applied == model.epoch
                ),
                [point] => {
                    with_point += 1;
                    assert_eq!(point, Epoch(begins.0 + 3));
                    let mut model = model.clone();
                    model.points.retain(|epoch, _| *epoch == point);
                    model.check(&replica, 1000);
                }
                _ => panic!("points {points:?}"),
            }
        }
        if storage.operations() <= stop {
            assert!(finished);
            break;
        }
    }
    assert!(crashes > 50 && with_point > 0, "{crashes} crashes, {with_point} with a point");
}
