use std::path::PathBuf;
use std::sync::Arc;

use block::{ByteCount, Consistency, Epoch, Generation, GroupId};
use durable::{CrashStorage, OpenMode, Storage};

use super::model::{GROUP, Made, Model, Step, Steps, data, dir, open, options};
use crate::{GroupReplica, Options, ReplicaError, VolumeProblem};

fn step() -> Step {
    Steps(1).step(Consistency::Crash, &[64], 5, 9)
}

/// What an epoch says of itself decides, and nothing changes.
#[test]
fn epochs_that_are_not_the_next_are_refused_by_name() {
    let storage = CrashStorage::new();
    let (replica, _) = open(&storage, 5).unwrap();
    let mut model = Model::default();
    let first = model.step(&step());
    first.apply(&replica).unwrap();
    model.step(&step()).apply(&replica).unwrap();
    let before = model.clone();
    let next = model.step(&step());
    let operations = storage.operations();
    type Case = (&'static str, fn(&mut Made), fn(&ReplicaError) -> bool);
    let cases: [Case; 5] = [
        (
            "group",
            |made| made.stamp.group = GroupId([9; 16]),
            |e| matches!(e, ReplicaError::WrongGroup { .. }),
        ),
        (
            "older",
            |made| made.stamp.generation = Generation(2),
            |e| {
                matches!(
                    e,
                    ReplicaError::WrongGeneration { expected: Generation(3), found: Generation(2), .. }
                )
            },
        ),
        (
            "newer",
            |made| made.stamp.generation = Generation(4),
            |e| matches!(e, ReplicaError::WrongGeneration { .. }),
        ),
        (
            "replay",
            |made| made.stamp.epoch = Epoch(2),
            |e| matches!(e, ReplicaError::Replayed { epoch: Epoch(2), applied: Epoch(2), .. }),
        ),
        (
            "gap",
            |made| made.stamp.epoch = Epoch(4),
            |e| matches!(e, ReplicaError::Gap { epoch: Epoch(4), applied: Epoch(2), .. }),
        ),
    ];
    for (name, change, expected) in cases {
        let mut made = next.clone();
        change(&mut made);
        let error = made.apply(&replica).unwrap_err();
        assert!(expected(&error), "{name}: {error}");
        assert!(!error.is_retryable());
    }
    assert!(matches!(first.apply(&replica), Err(ReplicaError::Replayed { epoch: Epoch(1), .. })));
    let mut shrunk = next.clone();
    shrunk.volumes[0].size = ByteCount(63 * 512);
    let error = shrunk.delta_of_nothing(&replica).unwrap_err();
    assert!(matches!(error, ReplicaError::Volume { problem: VolumeProblem::Shrunk { .. }, .. }), "{error}");
    assert_eq!(storage.operations(), operations, "a refusal writes nothing");
    before.check(&replica, 5);
    next.apply(&replica).unwrap();
    model.check(&replica, 5);
}

impl Made {
    fn delta_of_nothing(&self, replica: &GroupReplica) -> Result<crate::Applied, ReplicaError> {
        replica.apply_delta(&crate::delta::Delta::new(self.stamp, &self.volumes))
    }
}

#[test]
fn a_fresh_replica_starts_with_the_first_epoch() {
    let storage = CrashStorage::new();
    let (replica, _) = open(&storage, 5).unwrap();
    let mut made = Model::default().step(&step());
    made.stamp.epoch = Epoch(2);
    assert!(matches!(made.apply(&replica), Err(ReplicaError::Gap { .. })));
}

/// The history is fixed by the first changeset that may have touched an image, applied or not.
#[test]
fn another_history_cannot_follow_a_half_applied_epoch() {
    let storage = CrashStorage::new();
    let (replica, _) = open(&storage, 5).unwrap();
    let mut made = Model::default().step(&Steps(4).step(Consistency::None, &[64], 5, 9));
    storage.fail_at(storage.operations() + 8, durable::Fault::NoSpace);
    let error = made.apply(&replica).unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("image"), "{error}");
    storage.mend();
    drop(replica);
    let (replica, _) = open(&storage, 5).unwrap();
    made.stamp.generation = Generation(9);
    assert!(matches!(made.apply(&replica), Err(ReplicaError::WrongGeneration { .. })));
}

#[test]
fn one_process_at_a_time() {
    let storage = CrashStorage::new();
    let (replica, _) = open(&storage, 5).unwrap();
    let error = open(&storage, 5).unwrap_err();
    assert!(error.to_string().contains("another process has it open"), "{error}");
    drop(replica);
    open(&storage, 5).unwrap();
}

#[test]
fn a_replica_of_another_group_is_not_opened() {
    let storage = CrashStorage::new();
    drop(open(&storage, 5).unwrap());
    let other = GroupId([8; 16]);
    let theirs = data().join(other.to_string());
    storage.create_dir_all(&theirs).unwrap();
    storage.rename(&dir().join("state"), &theirs.join("state")).unwrap();
    let error = GroupReplica::open(Arc::new(storage), data(), other, options(5)).unwrap_err();
    assert!(matches!(error, ReplicaError::Unusable { .. }), "{error}");
}

#[test]
fn a_lost_state_is_not_taken_for_a_new_replica() {
    let storage = CrashStorage::new();
    let (replica, _) = open(&storage, 5).unwrap();
    Model::default().step(&step()).apply(&replica).unwrap();
    drop(replica);
    storage.remove(&dir().join("state")).unwrap();
    let error = open(&storage, 5).unwrap_err().to_string();
    assert!(error.contains("the state file is not"), "{error}");
}

fn with_device(storage: &CrashStorage, name: &str, path: &str) -> Result<GroupReplica, ReplicaError> {
    let options = Options { devices: [(name.to_owned(), PathBuf::from(path))].into(), ..options(5) };
    let storage = Arc::new(storage.clone()) as Arc<dyn Storage>;
    GroupReplica::open(storage, data(), GROUP, options).map(|(replica, _)| replica)
}

/// A device (here a file in its place) holds whatever it held before; what the epochs say wins, old points included.
#[test]
fn a_named_device_holds_the_image() {
    let storage = CrashStorage::new();
    let device = storage.open("/sdx".as_ref(), OpenMode::CreateNew).unwrap();
    device.write_all_at(&[0xdd; 100 * 512], 0).unwrap();
    let mut model = Model::default();
    let mut steps = Steps(8);
    {
        let replica = with_device(&storage, "disk1", "/sdx").unwrap();
        let mut first = steps.step(Consistency::Crash, &[64, 90], 0, 1);
        first.writes = (0..2)
            .map(|volume| super::model::Write {
                volume,
                sector: 0,
                sectors: 100,
                fill: super::model::Fill::Zero,
            })
            .collect();
        model.step(&first).apply(&replica).unwrap();
        for _ in 0..3 {
            model.step(&steps.step(Consistency::Crash, &[64, 95], 6, 20)).apply(&replica).unwrap();
        }
        model.check(&replica, 5);
        let error = model
            .clone()
            .step(&steps.step(Consistency::Crash, &[64, 101], 1, 2))
            .apply(&replica)
            .unwrap_err();
        assert!(
            matches!(error, ReplicaError::Volume { problem: VolumeProblem::DeviceTooSmall { .. }, .. }),
            "{error}"
        );
        assert!(replica.poisoned().is_none());
    }
    assert_eq!(device.len().unwrap(), 100 * 512, "a device is never cut or extended");
    let error = open(&storage, 5).unwrap_err().to_string();
    assert!(error.contains("the configuration names none"), "{error}");
    let error = with_device(&storage, "disk0", "/sdx").unwrap_err().to_string();
    assert!(error.contains("replicated to a file"), "{error}");
    let replica = with_device(&storage, "disk1", "/sdx").unwrap();
    model.check(&replica, 5);
}

#[test]
fn a_device_that_is_not_there_is_refused_and_does_not_poison() {
    let storage = CrashStorage::new();
    let replica = with_device(&storage, "disk0", "/nothing").unwrap();
    let error = Model::default().step(&step()).apply(&replica).unwrap_err();
    assert!(error.to_string().contains("name the right device"), "{error}");
    assert!(replica.poisoned().is_none());
}
