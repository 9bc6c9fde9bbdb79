use block::{Consistency, Epoch};
use durable::{CrashStorage, Fault, OpenMode, Storage};

use super::model::{Fill, Model, Step, Steps, Write, check_view, dir, open, volume_id};
use crate::layer::file_name;
use crate::shared::layers_dir;
use crate::{GroupReplica, ReplicaError, verify};

const SECTORS: [u64; 2] = [200, 80];

fn filled(storage: &CrashStorage, epochs: u64) -> (GroupReplica, Model, Steps) {
    let mut model = Model::default();
    let mut steps = Steps(epochs * 31);
    let (replica, _) = open(storage, 9).unwrap();
    for _ in 0..epochs {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 8, 30)).apply(&replica).unwrap();
    }
    (replica, model, steps)
}

/// The disk fills in the middle of an apply, at every operation: refused, nothing changed, views still right; when there is
/// space again the same epoch is applied. Before the first point (0 epochs) as well as after.
#[test]
fn a_full_disk_is_refused_and_can_be_tried_again() {
    filling(Fault::NoSpace);
}

/// The same when each write that fails has written its first half.
#[test]
fn a_short_write_is_refused_and_can_be_tried_again() {
    filling(Fault::ShortWrite);
}

fn filling(fault: Fault) {
    for epochs in [0, 3] {
        for lasting in [false, true] {
            let mut refused = 0;
            for at in 0.. {
                let storage = CrashStorage::new();
                let (replica, before, mut steps) = filled(&storage, epochs);
                let mut after = before.clone();
                let made = after.step(&steps.step(Consistency::Crash, &[240, 80, 16], 10, 30));
                let operations = storage.operations();
                match lasting {
                    true => storage.fail_from(operations + at, fault),
                    false => storage.fail_at(operations + at, fault),
                }
                let outcome = made.apply(&replica);
                let untouched = storage.operations() <= operations + at;
                match outcome {
                    Ok(_) => after.check(&replica, 9),
                    Err(error) if error.is_retryable() => {
                        refused += 1;
                        before.check(&replica, 9);
                        storage.mend();
                        made.apply(&replica).unwrap();
                        after.check(&replica, 9);
                        let next = after.step(&steps.step(Consistency::Crash, &[240, 80, 16], 10, 30));
                        next.apply(&replica).unwrap();
                        after.check(&replica, 9);
                    }
                    Err(error) => {
                        // Only the state file, which has its space, answers so.
                        assert!(error.to_string().contains("state"), "{error}");
                        assert!(replica.poisoned().is_some());
                    }
                }
                drop(replica);
                storage.mend();
                let (replica, _) = open(&storage, 9).unwrap();
                let model = if replica.applied().1 == before.epoch { &before } else { &after };
                assert!(model.epoch <= replica.applied().1);
                if model.epoch == replica.applied().1 {
                    model.check(&replica, 9);
                }
                if untouched {
                    break;
                }
            }
            assert!(refused >= 5, "{refused}");
        }
    }
}

/// EIO at any operation: the replica is poisoned, says why, and views stay right; opened again it is at N-1 or N.
#[test]
fn a_failing_disk_poisons_until_opened_again() {
    for at in 0.. {
        let storage = CrashStorage::new();
        let (replica, before, mut steps) = filled(&storage, 4);
        let mut after = before.clone();
        let made = after.step(&steps.step(Consistency::Crash, &SECTORS, 10, 30));
        let operations = storage.operations();
        storage.fail_at(operations + at, Fault::InputOutput);
        match made.apply(&replica) {
            Ok(_) => {
                after.check(&replica, 9);
                if storage.operations() <= operations + at {
                    break;
                }
                continue;
            }
            Err(error) => assert!(matches!(error, ReplicaError::Io { .. }), "{error}"),
        }
        let again = made.apply(&replica).unwrap_err();
        assert!(matches!(again, ReplicaError::Poisoned { .. }), "{again}");
        assert!(again.to_string().contains("mend the storage"));
        before.check(&replica, 9);
        drop(replica);
        let (replica, _) = open(&storage, 9).unwrap();
        let model = if replica.applied().1 == after.epoch { &after } else { &before };
        model.check(&replica, 9);
        if model.epoch == before.epoch {
            made.apply(&replica).unwrap();
        }
        after.check(&replica, 9);
    }
}

fn flip(storage: &CrashStorage, epoch: u64, at: u64) {
    let path = layers_dir(&dir()).join(file_name(Epoch(epoch - 1), Epoch(epoch)));
    let file = storage.open(&path, OpenMode::ReadWrite).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// A layer whose header rotted: points from it on back are gone and named, the others and the newest state are not.
#[test]
fn a_damaged_layer_costs_the_points_before_it_and_no_more() {
    let storage = CrashStorage::new();
    let (replica, mut model, mut steps) = filled(&storage, 6);
    drop(replica);
    flip(&storage, 4, 41);
    assert!(verify(&storage, &dir()).unwrap().problems[0].contains("header checksum"));
    let (replica, report) = open(&storage, 9).unwrap();
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(report.damaged[0].epoch, Epoch(4));
    let unusable: Vec<(u64, bool)> =
        replica.points().iter().map(|point| (point.epoch.0, point.unusable.is_some())).collect();
    // Nobody knows whether 4 was a point.
    assert_eq!(unusable, [(1, true), (2, true), (3, true), (5, false), (6, false)]);
    assert!(replica.points()[0].unusable.as_ref().unwrap().contains("4.layer is damaged: header checksum"));
    let error = replica.view(volume_id(0), Epoch(3)).unwrap_err();
    assert!(matches!(error, ReplicaError::UnusablePoint { .. }), "{error}");
    let error = replica.view(volume_id(0), Epoch(4)).unwrap_err();
    assert!(matches!(error, ReplicaError::NoSuchPoint { nearest: Some(Epoch(5)), .. }), "{error}");
    model.step(&steps.step(Consistency::Crash, &SECTORS, 8, 30)).apply(&replica).unwrap();
    for epoch in 5..=7 {
        for volume in 0..2 {
            let view = replica.view(volume_id(volume), Epoch(epoch)).unwrap();
            check_view(&view, &model.points[&Epoch(epoch)].1[volume]);
        }
    }
    drop(replica);
    // Retention that passes the damaged one removes it.
    let (replica, _) = open(&storage, 2).unwrap();
    model.step(&steps.step(Consistency::Crash, &SECTORS, 8, 30)).apply(&replica).unwrap();
    model.check(&replica, 2);
    drop(replica);
    assert_eq!(verify(&storage, &dir()).unwrap().problems, Vec::<String>::new());
}

/// Old content that rotted is refused when it is read, never given out.
#[test]
fn damaged_old_content_is_refused_by_name() {
    let storage = CrashStorage::new();
    let (replica, model, _) = filled(&storage, 3);
    flip(&storage, 3, 4096 + 10);
    let mut refused = 0;
    for volume in 0..2 {
        let view = replica.view(volume_id(volume), Epoch(2)).unwrap();
        let mut content = vec![0; view.size().0 as usize];
        match view.read_at(&mut content, block::ByteOffset(0)) {
            Ok(()) => assert!(content == model.points[&Epoch(2)].1[volume]),
            Err(error) => {
                assert!(error.to_string().contains("00000000000000000003.layer: checksum of the"), "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 1);
    drop(replica);
    assert!(verify(&storage, &dir()).unwrap().problems[0].contains("checksum of the"));
}

/// The layer that a roll back needs rotted: the replica does not open, for its images are no state of the source.
#[test]
fn a_roll_back_that_cannot_be_done_is_refused_before_it_begins() {
    let (_, mut model, mut steps) = filled(&CrashStorage::new(), 3);
    let made = model.step(&steps.step(Consistency::Crash, &SECTORS, 10, 30));
    let (crashed, at) = (0..)
        .find_map(|at| {
            let storage = CrashStorage::new();
            let (replica, _, _) = filled(&storage, 3);
            storage.stop_at(storage.operations() + at);
            made.apply(&replica).unwrap_err();
            let crashed = storage.crash(1);
            let layer = layers_dir(&dir()).join(file_name(Epoch(3), Epoch(4)));
            crashed.exists(&layer).unwrap().then_some((crashed, at))
        })
        .unwrap();
    flip(&crashed, 4, 4096 + 5);
    let error = open(&crashed, 9).unwrap_err();
    assert!(matches!(error, ReplicaError::Unusable { .. }), "{error} (stopped at {at})");
    assert!(error.to_string().contains("start a new replica"), "{error}");
}

/// An epoch discards data and then finds no space, nor can it be taken back at once. A view that asked meanwhile where
/// data lies must not remember what it saw in the image once the epoch is taken back.
#[test]
fn a_view_forgets_the_holes_of_an_epoch_that_was_taken_back() {
    let step = |writes: Vec<(u64, u64, Fill)>| {
        let write = |(sector, sectors, fill)| Write { volume: 0, sector, sectors, fill };
        let writes = writes.into_iter().map(write).collect();
        Step { consistency: Consistency::Crash, sectors: vec![200], writes }
    };
    let mut met = 0;
    for at in 0..20 {
        let storage = CrashStorage::new();
        let (replica, _) = open(&storage, 9).unwrap();
        let mut model = Model::default();
        model.step(&step(vec![(0, 8, Fill::Noise(1))])).apply(&replica).unwrap();
        let view = replica.view(volume_id(0), Epoch(1)).unwrap();
        let discard = model.clone().step(&step(vec![(0, 8, Fill::Zero), (100, 8, Fill::Noise(2))]));
        storage.fail_from(storage.operations() + at, Fault::NoSpace);
        let Err(error) = discard.apply(&replica) else { continue };
        met += u32::from(error.to_string().contains("write replica image"));
        check_view(&view, &model.points[&Epoch(1)].1[0]);
        storage.mend();
        if replica.poisoned().is_some() {
            continue;
        }
        model.step(&step(vec![(150, 8, Fill::Noise(3))])).apply(&replica).unwrap();
        check_view(&view, &model.points[&Epoch(1)].1[0]);
        model.check(&replica, 9);
    }
    assert!(met > 0);
}
