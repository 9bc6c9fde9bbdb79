use std::sync::atomic::{AtomicBool, Ordering};

use block::{ByteOffset, Consistency};
use durable::{CrashStorage, Fault};

use super::model::{Fill, Model, Step, Steps, Write, check_view, open, volume_id};

const SECTORS: [u64; 2] = [400, 100];

/// Readers of old points, opened before and during the applies, while epochs are applied, some refused for want of
/// space and taken back, and points dropped.
#[test]
fn views_are_right_while_epochs_are_applied() {
    for seed in 0..4 {
        let storage = CrashStorage::new();
        let (replica, _) = open(&storage, 4).unwrap();
        let mut model = Model::default();
        let mut steps = Steps(seed * 1_000_003);
        for _ in 0..3 {
            model.step(&steps.step(Consistency::Crash, &SECTORS, 12, 80)).apply(&replica).unwrap();
        }
        let epochs: Vec<_> = (0..60)
            .map(|_| {
                let made = model.step(&steps.step(Consistency::Crash, &SECTORS, 12, 80));
                (made, steps.below(6) == 0)
            })
            .collect();
        let points = &model.points;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for reader in 0..3 {
                let (replica, done) = (&replica, &done);
                scope.spawn(move || {
                    let mut luck = Steps(reader * 7 + seed);
                    let kept = replica.points()[0].epoch;
                    let long = replica.view(volume_id(0), kept).unwrap();
                    while !done.load(Ordering::Relaxed) {
                        check_view(&long, &points[&kept].1[0]);
                        let offered = replica.points();
                        let point = offered[luck.below(offered.len() as u64) as usize].epoch;
                        let volume = luck.below(2) as usize;
                        // The point may have been dropped since.
                        let Ok(view) = replica.view(volume_id(volume), point) else { continue };
                        check_view(&view, &points[&point].1[volume]);
                        let newest = replica.points().last().unwrap().epoch;
                        let Ok(view) = replica.view(volume_id(volume), newest) else { continue };
                        let content = &points[&newest].1[volume];
                        for _ in 0..20 {
                            let at = luck.below(content.len() as u64 - 5000);
                            let mut part = [0; 5000];
                            view.read_at(&mut part, ByteOffset(at)).unwrap();
                            assert!(
                                part == content[at as usize..at as usize + 5000],
                                "at {newest}, byte {at}"
                            );
                        }
                    }
                });
            }
            for (made, fail) in &epochs {
                if *fail {
                    // Within the writes to the images: after the layer's.
                    storage.fail_at(storage.operations() + 9, Fault::NoSpace);
                }
                let outcome = made.apply(&replica);
                storage.mend();
                if let Err(error) = outcome {
                    assert!(error.is_retryable(), "{error}");
                    made.apply(&replica).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        model.check(&replica, 4);
    }
}

/// A discard takes the data out of the image while a reader of an older point asks where data lies.
#[test]
fn data_of_a_point_is_found_while_it_is_discarded() {
    let storage = CrashStorage::new();
    let (replica, _) = open(&storage, 4).unwrap();
    let mut model = Model::default();
    let mut whole = |fill| {
        let writes = vec![Write { volume: 0, sector: 0, sectors: 16, fill }];
        model.step(&Step { consistency: Consistency::Crash, sectors: vec![16], writes })
    };
    whole(Fill::Noise(1)).apply(&replica).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let newest = replica.points().last().unwrap().epoch;
                let Ok(view) = replica.view(volume_id(0), newest) else { continue };
                // Odd epochs are all data, even ones all zeroes.
                for _ in 0..20 {
                    assert_eq!(view.next_data(ByteOffset(0)).unwrap().is_some(), newest.0 % 2 == 1);
                }
            }
        });
        for round in 0..1500 {
            whole(Fill::Zero).apply(&replica).unwrap();
            whole(Fill::Noise(round)).apply(&replica).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}
