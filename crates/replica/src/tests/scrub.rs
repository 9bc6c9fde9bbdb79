//! What rots is found, says what it concerns, and leaves the rest alone.

use block::{ByteOffset, Consistency, Epoch};
use durable::{CrashStorage, OpenMode, Storage};

use super::model::{Fill, Model, Step, Steps, Write, check_view, dir, open, volume_id};
use crate::shared::{image_path, layers_dir};
use crate::{GroupReplica, Maintained, Pace, ReplicaError, ScrubReport, sums, verify};

const SECTORS: [u64; 2] = [400, 100];

fn scrub(replica: &GroupReplica) -> ScrubReport {
    replica.scrub(None, &Pace::unbounded(), &|_| {}).unwrap()
}

fn filled(storage: &CrashStorage, epochs: u64) -> (GroupReplica, Model, Steps) {
    let mut model = Model::default();
    let mut steps = Steps(epochs * 13);
    let (replica, _) = open(storage, 1000).unwrap();
    let whole =
        (0..2).map(|volume| Write { volume, sector: 0, sectors: 400, fill: Fill::Noise(volume as u64) });
    let first = Step { consistency: Consistency::Crash, sectors: SECTORS.to_vec(), writes: whole.collect() };
    model.step(&first).apply(&replica).unwrap();
    for _ in 1..epochs {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
    }
    (replica, model, steps)
}

fn flip(storage: &CrashStorage, path: &std::path::Path, at: u64) {
    let file = storage.open(path, OpenMode::ReadWrite).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[test]
fn what_is_sound_is_sound() {
    let storage = CrashStorage::new();
    let (replica, mut model, mut steps) = filled(&storage, 5);
    let first = scrub(&replica);
    assert_eq!((first.findings.len(), first.notes.len(), first.layers), (0, 0, 5));
    assert_eq!(first.new_checksums.0, 500 * 512, "nothing was known of what came before the first scrub");
    for round in 0..60 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
        if round % 3 == 0 {
            replica.maintain(&Pace::unbounded()).unwrap();
        }
        if round % 7 == 0 {
            let again = scrub(&replica);
            assert_eq!((again.findings, again.new_checksums.0), (vec![], 0));
        }
    }
    model.check(&replica, 1000);
    drop(replica);
    // What was known survives.
    let (replica, _) = open(&storage, 1000).unwrap();
    let again = scrub(&replica);
    assert_eq!((again.findings, again.new_checksums.0, again.layers), (vec![], 0, 65));
    drop(replica);
    assert_eq!(verify(&storage, &dir()).unwrap().problems, Vec::<String>::new());
}

/// A bit anywhere in an image: found; views that come to it are refused it, and read all else; an epoch that writes over it mends it.
#[test]
fn a_flipped_bit_in_an_image_is_found_and_costs_that_block_alone() {
    let storage = CrashStorage::new();
    let (mut replica, mut model, mut steps) = filled(&storage, 6);
    scrub(&replica);
    for _ in 0..3 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
    }
    for block in [0_u64, 7, 20, 49] {
        // Checksums come up to date some epochs after apply, or when a scrub begins.
        replica.update_checksums(true, &Pace::unbounded()).unwrap();
        let path = image_path(&dir(), volume_id(0));
        flip(&storage, &path, block * 4096 + 17);
        let report = scrub(&replica);
        assert_eq!(report.findings.len(), 1, "{report:?}");
        let found = &report.findings[0];
        let (volume, extents) = found.blocks.as_ref().unwrap();
        assert_eq!((*volume, extents.len(), extents[0].offset().0), (volume_id(0), 1, block * 4096));
        assert!(found.problem.contains("1 blocks of 4096 bytes are not what was written"));
        assert_eq!(replica.damaged_blocks(volume_id(0)), *extents);
        let (first, last) = found.points.unwrap();
        assert_eq!(last, model.epoch);
        let (mut refused, mut right) = (0, 0);
        for point in replica.points() {
            let content = &model.points[&point.epoch].1[0];
            let view = replica.view(volume_id(0), point.epoch).unwrap();
            let mut bytes = vec![0; 4096];
            match view.read_at(&mut bytes, ByteOffset(block * 4096)) {
                Ok(()) => {
                    assert!(bytes == content[block as usize * 4096..][..4096]);
                    assert!(point.epoch < first, "{} is told to be concerned", point.epoch);
                    right += 1;
                }
                Err(ReplicaError::DamagedImage { .. }) => {
                    assert!(point.epoch >= first, "{} is not told to be concerned", point.epoch);
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
            let mut rest = vec![0; content.len() - (block as usize + 1) * 4096];
            view.read_at(&mut rest, ByteOffset((block + 1) * 4096)).unwrap();
            assert!(rest == content[(block as usize + 1) * 4096..]);
        }
        assert!(refused > 0 && refused + right == model.points.len());
        // That survives.
        let extents = extents.clone();
        drop(replica);
        replica = open(&storage, 1000).unwrap().0;
        assert_eq!(replica.damaged_blocks(volume_id(0)), extents);
        // A part of it is written: it stays bad. All of it is: it is mended.
        for (sectors, bad) in [(3, 1), (8, 0)] {
            let write = Write { volume: 0, sector: block * 8, sectors, fill: Fill::Noise(block + 1000) };
            let step =
                Step { consistency: Consistency::Crash, sectors: SECTORS.to_vec(), writes: vec![write] };
            model.step(&step).apply(&replica).unwrap();
            assert_eq!(scrub(&replica).findings.len(), bad, "block {block}, {sectors} sectors written");
            assert_eq!(replica.damaged_blocks(volume_id(0)).len(), bad);
        }
        check_view(&replica.view(volume_id(0), model.epoch).unwrap(), &model.current[0]);
        // What the damage left in undo layers is not taken for what was, merged or not; all else of these points is right.
        replica.delete_point(Epoch(model.epoch.0 - 1), &Pace::unbounded()).unwrap();
        model.points.remove(&Epoch(model.epoch.0 - 1));
        for point in replica.points() {
            let content = &model.points[&point.epoch].1[0];
            let view = replica.view(volume_id(0), point.epoch).unwrap();
            for number in 0..50 {
                let mut bytes = vec![0; 4096];
                let outcome = view.read_at(&mut bytes, ByteOffset(number * 4096));
                let concerned = number == block && point.epoch >= first && point.epoch < model.epoch;
                assert_eq!(outcome.is_err(), concerned, "block {number} at {}: {outcome:?}", point.epoch);
                assert!(concerned || bytes == content[number as usize * 4096..][..4096]);
            }
        }
        // So that the next round begins with none of them.
        for point in replica.points() {
            if point.epoch < model.epoch {
                replica.delete_point(point.epoch, &Pace::unbounded()).unwrap();
                model.points.remove(&point.epoch);
            }
        }
        for _ in 0..4 {
            model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
        }
        model.check(&replica, 1000);
    }
}

/// A bit anywhere in a layer: found; points before it are unusable and say why, the others are right.
#[test]
fn a_flipped_bit_in_a_layer_is_found_and_costs_the_points_before_it() {
    let names = |storage: &CrashStorage| storage.list(&layers_dir(&dir())).unwrap();
    for number in [1, 3, 4] {
        for part in 0..9 {
            let storage = CrashStorage::new();
            let (replica, model, _) = filled(&storage, 6);
            // Two of them merged.
            assert!(matches!(
                replica.delete_point(Epoch(3), &Pace::unbounded()).unwrap(),
                Maintained::Thinned { layers: 2, .. }
            ));
            let path = layers_dir(&dir()).join(&names(&storage)[number]);
            let length = storage.open(&path, OpenMode::Read).unwrap().len().unwrap();
            flip(&storage, &path, part * length / 9 + 5);
            let report = scrub(&replica);
            assert_eq!(report.findings.len(), 1, "{part}: {report:?}");
            assert_eq!(report.findings[0].path, path);
            let damaged = [0, 2, 0, 5, 6][number];
            assert_eq!(report.findings[0].points.map(|(first, _)| first), Some(Epoch(1)));
            for point in replica.points() {
                assert_eq!(point.unusable.is_some(), point.epoch.0 < damaged, "{}", point.epoch);
                let view = replica.view(volume_id(0), point.epoch);
                match view {
                    Ok(view) => check_view(&view, &model.points[&point.epoch].1[0]),
                    Err(error) => {
                        assert!(matches!(error, ReplicaError::UnusablePoint { .. }), "{error}");
                        assert!(point.epoch.0 < damaged);
                    }
                }
            }
        }
    }
}

/// The index of a layer rots before what it says was taken into account. Work in the background says so, and goes on; nothing that is
/// sound is accused.
#[test]
fn a_damaged_layer_does_not_stop_upkeep() {
    let storage = CrashStorage::new();
    let (replica, mut model, mut steps) = filled(&storage, 3);
    scrub(&replica);
    for _ in 0..20 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
    }
    let path = layers_dir(&dir()).join(crate::layer::file_name(Epoch(14), Epoch(15)));
    let length = storage.open(&path, OpenMode::Read).unwrap().len().unwrap();
    flip(&storage, &path, length - 10);
    let mut errors = Vec::new();
    loop {
        match replica.maintain(&Pace::unbounded()) {
            Ok(Maintained::Nothing) => break,
            Ok(_) => {}
            Err(error) => errors.push(error.to_string()),
        }
        assert!(errors.len() < 3, "{errors:?}");
    }
    assert!(errors.iter().all(|error| error.contains("00000000000000000015.layer")), "{errors:?}");
    let report = scrub(&replica);
    assert_eq!(report.findings.iter().map(|found| &found.path).collect::<Vec<_>>(), [&path]);
    for _ in 0..20 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
        replica.maintain(&Pace::unbounded()).unwrap();
    }
    assert_eq!(scrub(&replica).findings.len(), 1);
    for point in replica.points() {
        assert_eq!(point.unusable.is_some(), point.epoch.0 < 15);
        if point.unusable.is_none() {
            check_view(&replica.view(volume_id(0), point.epoch).unwrap(), &model.points[&point.epoch].1[0]);
        }
    }
}

/// Checksums that rotted are not taken for a damaged image.
#[test]
fn damaged_checksums_are_made_again() {
    let storage = CrashStorage::new();
    let (replica, model, _) = filled(&storage, 6);
    scrub(&replica);
    drop(replica);
    flip(&storage, &sums::path(&dir(), volume_id(0)), 4096 + 13);
    let report = verify(&storage, &dir()).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    assert!(report.notes[0].contains("made again"), "{:?}", report.notes);
    let (replica, _) = open(&storage, 1000).unwrap();
    let report = scrub(&replica);
    assert_eq!((report.findings.len(), report.new_checksums.0), (0, 400 * 512));
    assert!(report.notes[0].contains("was not checked"), "{:?}", report.notes);
    assert_eq!(scrub(&replica).new_checksums.0, 0);
    model.check(&replica, 1000);
}

/// The machine stops at any step of bringing checksums up to date: no sound block is ever told to be damaged.
#[test]
fn a_crash_while_checksums_are_written_accuses_nobody() {
    for stop in 0.. {
        let storage = CrashStorage::new();
        let (replica, mut model, mut steps) = filled(&storage, 4);
        scrub(&replica);
        for _ in 0..4 {
            model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
        }
        storage.stop_at(storage.operations() + stop);
        let finished = replica.scrub(None, &Pace::unbounded(), &|_| {}).is_ok();
        drop(replica);
        for seed in 0..6 {
            let crashed = storage.crash(seed);
            let (replica, _) = open(&crashed, 1000).unwrap();
            let mut model = model.clone();
            for round in 0..2 {
                let report = scrub(&replica);
                assert_eq!(report.findings, vec![], "stopped at {stop}, seed {seed}, round {round}");
                model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
            }
            model.check(&replica, 1000);
        }
        if finished {
            break;
        }
    }
}

/// The verdict on each point, without opening the replica, against what a view of it gives: no point is accused that is right, and none
/// that is wrong is passed, wherever a bit flips.
#[test]
fn offline_verdicts_are_those_of_views() {
    let mut spared = 0;
    for seed in 0..60 {
        let storage = CrashStorage::new();
        let (replica, mut model, mut steps) = filled(&storage, 6 + seed % 5);
        scrub(&replica);
        // What was written after the checksums is not known; nothing of it may be accused.
        for _ in 0..seed % 3 {
            model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20)).apply(&replica).unwrap();
        }
        let floor = replica.points()[0].epoch;
        drop(replica);
        let sound = verify(&storage, &dir()).unwrap();
        assert_eq!((sound.problems.len(), sound.unusable.len()), (0, 0), "seed {seed}: {sound:?}");
        let path = match seed % 4 {
            0 => layers_dir(&dir()).join(crate::layer::file_name(Epoch(2), Epoch(3))),
            other => image_path(&dir(), volume_id(usize::from(other == 1))),
        };
        let length = storage.open(&path, OpenMode::Read).unwrap().len().unwrap();
        flip(&storage, &path, seed * 7919 % length);
        let report = verify(&storage, &dir()).unwrap();
        let (replica, _) = match open(&storage, 1000) {
            Ok(opened) => opened,
            Err(error) => panic!("seed {seed}: {error}"),
        };
        // From then on a view refuses what is damaged; of a block it cannot tell which byte is.
        scrub(&replica);
        for (epoch, (_, images)) in model.points.iter().filter(|(epoch, _)| **epoch >= floor) {
            assert!(report.is_point(*epoch) || seed % 4 == 0, "seed {seed}, point {epoch}");
            for (volume, image) in images.iter().enumerate() {
                let id = volume_id(volume);
                let right = replica.view(id, *epoch).is_ok_and(|view| {
                    let mut found = vec![0; view.size().0 as usize];
                    view.read_at(&mut found, ByteOffset(0)).is_ok() && found == *image
                });
                let accused: Vec<&str> = report.wrong_at(*epoch, Some(id)).collect();
                // A layer of which a point reads nothing that is damaged still counts as damaged for it.
                let layer = seed % 4 == 0 && *epoch <= Epoch(3);
                assert!(right || !accused.is_empty() || seed % 3 > 0, "seed {seed}, point {epoch}: passed");
                assert!(!right || accused.is_empty() || layer, "seed {seed}, point {epoch}: {accused:?}");
                spared += u32::from(right && !report.unusable.is_empty());
            }
        }
    }
    assert!(spared > 100, "damage that spares no point shows nothing: {spared}");
}
