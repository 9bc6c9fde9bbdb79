//! An adopted disk is the first point, stays one whatever comes after, and a crash while adopting is no harm.

use std::path::PathBuf;
use std::sync::Arc;

use block::{ByteCount, Consistency, Epoch, UnixNanos};
use changeset::VolumeInfo;
use durable::{CrashStorage, OpenMode, Storage};

use super::model::{GENERATION, GROUP, Model, Steps, check_view, data, dir, noise, options, volume_id};
use crate::{GroupReplica, Options, ReplicaError, verify};

const SECTORS: [u64; 2] = [160, 50];

fn path(volume: usize) -> PathBuf {
    PathBuf::from(format!("/sd{volume}"))
}

fn open(storage: &CrashStorage, points_max: usize) -> Result<GroupReplica, ReplicaError> {
    let devices = (0..2).map(|volume| (format!("disk{volume}"), path(volume))).collect();
    let options = Options { devices, clock: || UnixNanos(7), ..options(points_max) };
    let storage = Arc::new(storage.clone()) as Arc<dyn Storage>;
    GroupReplica::open(storage, data(), GROUP, options).map(|(replica, _)| replica)
}

/// Disks with content, as they were found.
fn found(seed: u64) -> (CrashStorage, Model) {
    let storage = CrashStorage::new();
    let mut model = Model { epoch: Epoch(1), ..Model::default() };
    for (volume, sectors) in SECTORS.iter().enumerate() {
        let mut content = vec![0; *sectors as usize * 512];
        noise(seed + volume as u64, &mut content);
        let device = storage.open(&path(volume), OpenMode::CreateNew).unwrap();
        device.write_all_at(&content, 0).unwrap();
        device.sync_data().unwrap();
        storage.sync_dir("/".as_ref()).unwrap();
        model.current.push(content);
    }
    model.points.insert(Epoch(1), (Consistency::Crash, model.current.clone()));
    (storage, model)
}

fn volumes(model: &Model) -> Vec<VolumeInfo> {
    let volume = |(index, content): (usize, &Vec<u8>)| VolumeInfo {
        id: volume_id(index),
        name: format!("disk{index}"),
        size: ByteCount(content.len() as u64),
        logical_block: 512,
    };
    model.current.iter().enumerate().map(volume).collect()
}

fn adopt(replica: &GroupReplica, model: &Model) -> Result<(), ReplicaError> {
    let label = "as found".parse().unwrap();
    replica.adopt(GENERATION, &volumes(model), label).map(drop)
}

#[test]
fn what_was_found_is_a_point_and_stays() {
    for seed in 0..20 {
        let (storage, mut model) = found(seed);
        let mut steps = Steps(seed);
        let was = model.current.clone();
        let replica = open(&storage, 3).unwrap();
        adopt(&replica, &model).unwrap();
        model.check(&replica, 3);
        let point = replica.points().remove(0);
        assert_eq!(point.note.label.as_ref().map(ToString::to_string).as_deref(), Some("as found"));
        assert!(point.pin.is_some(), "nobody has looked at it yet");
        assert!(matches!(adopt(&replica, &model), Err(ReplicaError::Invalid { .. })), "there is a history");
        for _ in 0..9 {
            model.step(&steps.step(Consistency::Crash, &SECTORS, 5, 40)).apply(&replica).unwrap();
        }
        drop(replica);
        assert_eq!(verify(&storage, &dir()).unwrap().problems, Vec::<String>::new());
        // Three points are kept, and this one.
        let replica = open(&storage, 3).unwrap();
        for (volume, content) in was.iter().enumerate() {
            check_view(&replica.view(volume_id(volume), Epoch(1)).unwrap(), content);
        }
        let kept: Vec<Epoch> = replica.points().iter().map(|point| point.epoch).collect();
        assert!(kept.contains(&Epoch(1)) && kept.contains(&Epoch(10)), "{kept:?}");
    }
}

#[test]
fn a_history_is_not_adopted_over_and_a_file_is_no_disk() {
    let (storage, mut model) = found(3);
    let replica = open(&storage, 5).unwrap();
    let mut elsewhere = volumes(&model);
    elsewhere[1].name = "other".to_owned();
    let error = replica.adopt(GENERATION, &elsewhere, "x".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("no device that could be adopted"), "{error}");
    let mut large = volumes(&model);
    large[0].size = ByteCount(161 * 512);
    let error = replica.adopt(GENERATION, &large, "x".parse().unwrap()).unwrap_err();
    assert!(matches!(error, ReplicaError::Volume { .. }), "{error}");
    assert_eq!(replica.applied(), (None, Epoch::NONE), "nothing changed");
    // The first epoch of a source that came first.
    model.epoch = Epoch::NONE;
    model.step(&Steps(1).step(Consistency::Crash, &SECTORS, 5, 40)).apply(&replica).unwrap();
    let error = adopt(&replica, &model).unwrap_err();
    assert!(error.to_string().contains("has a history already"), "{error}");
}

/// The machine stops in every operation; whatever that leaves, the disks are as they were, and adopting again gives the same.
#[test]
fn a_crash_at_any_step_of_adopting_is_no_harm() {
    let mut crashes = 0;
    for stop in 0.. {
        let (storage, model) = found(stop);
        let replica = open(&storage, 5).unwrap();
        let at = storage.operations() + stop;
        storage.stop_at(at);
        let finished = adopt(&replica, &model).is_ok();
        let stopped = storage.operations() > at;
        assert!(finished || stopped);
        drop(replica);
        for seed in 0..6 {
            let crashed = storage.crash(seed);
            crashes += 1;
            let replica = open(&crashed, 5).unwrap();
            match replica.applied().1 {
                Epoch::NONE if !finished => adopt(&replica, &model).unwrap(),
                Epoch(1) => {}
                other => panic!("epoch {other} is applied"),
            }
            let mut model = model.clone();
            model.check(&replica, 5);
            assert!(replica.points()[0].pin.is_some());
            model.step(&Steps(seed).step(Consistency::Crash, &SECTORS, 5, 40)).apply(&replica).unwrap();
            model.check(&replica, 5);
            drop(replica);
            assert_eq!(verify(&crashed, &dir()).unwrap().problems, Vec::<String>::new());
        }
        if !stopped {
            break;
        }
    }
    assert!(crashes > 30, "{crashes} crashes");
}
