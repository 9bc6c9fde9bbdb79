use block::Consistency;
use durable::CrashStorage;
use proptest::prelude::*;

use super::model::{Fill, Model, Step, Steps, Write, check_view, dir, open, volume_id};
use crate::verify;

fn write() -> impl Strategy<Value = Write> {
    let fill = prop_oneof![
        3 => any::<u64>().prop_map(Fill::Noise),
        1 => Just(Fill::ZeroData),
        1 => Just(Fill::Zero),
    ];
    let sectors = prop_oneof![1_u64..9, Just(8), 100_u64..300];
    (0_usize..3, prop_oneof![0_u64..600, (0_u64..75).prop_map(|block| block * 8)], sectors, fill)
        .prop_map(|(volume, sector, sectors, fill)| Write { volume, sector, sectors, fill })
}

fn step() -> impl Strategy<Value = Step> {
    let consistency = prop_oneof![
        1 => Just(Consistency::None),
        3 => Just(Consistency::Crash),
        1 => Just(Consistency::Application),
    ];
    // Sizes only ever grow: the model takes the largest so far.
    (consistency, prop::collection::vec(1_u64..600, 1..4), prop::collection::vec(write(), 0..12))
        .prop_map(|(consistency, sectors, writes)| Step { consistency, sectors, writes })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Any epochs, any retention, reopened at any time: every point offered is what was.
    #[test]
    fn every_view_is_what_was(
        steps in prop::collection::vec((step(), prop::bool::weighted(0.3)), 1..14),
        points_max in 1_usize..10,
    ) {
        let storage = CrashStorage::new();
        let mut model = Model::default();
        let (mut replica, _) = open(&storage, points_max).unwrap();
        for (step, reopen) in &steps {
            let applied = model.step(step).apply(&replica).unwrap();
            assert_eq!(applied.epoch, model.epoch);
            if *reopen {
                drop(replica);
                let (reopened, report) = open(&storage, points_max).unwrap();
                assert_eq!((report.rolled_back, report.damaged.len()), (None, 0));
                replica = reopened;
            }
            model.check(&replica, points_max);
        }
        drop(replica);
        let report = verify(&storage, &dir()).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.applied, model.epoch);
    }
}

/// Old content larger than every buffer: several batches, runs cut by their ends, zeroes in and between them.
#[test]
fn large_epochs_keep_large_layers() {
    let storage = CrashStorage::new();
    let sectors = [40_000, 24_001];
    let mut model = Model::default();
    let mut steps = Steps(99);
    let (replica, _) = open(&storage, 10).unwrap();
    let fill = |volume, sector, sectors, fill| Write { volume, sector, sectors, fill };
    let mut first = steps.step(Consistency::Crash, &sectors, 0, 1);
    first.writes = vec![fill(0, 0, 40_000, Fill::Noise(1)), fill(1, 3, 23_990, Fill::Noise(2))];
    model.step(&first).apply(&replica).unwrap();
    let mut second = steps.step(Consistency::Crash, &sectors, 200, 700);
    second.writes.push(fill(0, 5, 39_000, Fill::Noise(3)));
    second.writes.push(fill(1, 0, 24_001, Fill::Zero));
    model.step(&second).apply(&replica).unwrap();
    let third = steps.step(Consistency::Crash, &sectors, 60, 9000);
    model.step(&third).apply(&replica).unwrap();
    model.check(&replica, 10);
}

/// A view keeps what it needs while retention drops the layers after it, and goes on being right.
#[test]
fn an_open_view_outlives_its_point() {
    let storage = CrashStorage::new();
    let sectors = [300, 64];
    let mut model = Model::default();
    let mut steps = Steps(5);
    let (replica, _) = open(&storage, 2).unwrap();
    for _ in 0..3 {
        model.step(&steps.step(Consistency::Crash, &sectors, 10, 40)).apply(&replica).unwrap();
    }
    let point = replica.points()[0].epoch;
    let content = model.points[&point].1.clone();
    let views = [0, 1].map(|index| replica.view(volume_id(index), point).unwrap());
    for _ in 0..6 {
        model.step(&steps.step(Consistency::Crash, &sectors, 10, 40)).apply(&replica).unwrap();
        model.check(&replica, 2);
        for (view, content) in views.iter().zip(&content) {
            check_view(view, content);
        }
    }
    let files = || crate::recover::layer_files(&storage, &crate::shared::layers_dir(&dir())).unwrap().len();
    // The view at 2 needs those after it, up to 9.
    assert_eq!(files(), 7);
    drop(views);
    model.step(&steps.step(Consistency::Crash, &sectors, 10, 40)).apply(&replica).unwrap();
    assert_eq!(files(), 2);
    model.check(&replica, 2);
}
