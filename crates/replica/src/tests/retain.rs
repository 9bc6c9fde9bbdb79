//! What stays and what goes, and what others may do in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{ByteCount, ByteOffset, Consistency, Epoch, UnixNanos};
use durable::{CrashStorage, OpenMode, Storage};

use super::model::{Fill, GROUP, Model, Step, Steps, Write, check_view, data, dir, open, options, volume_id};
use crate::layer::Layer;
use crate::shared::layers_dir;
use crate::{GroupReplica, Maintained, Options, PINS_MAX, Pace, ReplicaError, Retention, verify};

const SECTORS: [u64; 2] = [200, 64];

fn settle(replica: &GroupReplica) {
    while replica.maintain(&Pace::unbounded()).unwrap() != Maintained::Nothing {}
}

fn filled(storage: &CrashStorage, options: Options, epochs: u64) -> (GroupReplica, Model, Steps) {
    let mut model = Model::default();
    let mut steps = Steps(epochs * 17);
    let storage = Arc::new(storage.clone()) as Arc<dyn Storage>;
    let (replica, _) = GroupReplica::open(storage, data(), GROUP, options).unwrap();
    for _ in 0..epochs {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 8, 40)).apply(&replica).unwrap();
    }
    (replica, model, steps)
}

fn epochs(replica: &GroupReplica) -> Vec<u64> {
    replica.points().iter().map(|point| point.epoch.0).collect()
}

/// The layers that merging two points would take.
fn layers(replica: &GroupReplica, from: u64, to: u64) -> Vec<Arc<Layer>> {
    let shared = replica.core.shared.read();
    (from..=to).map(|epoch| shared.layer_of(Epoch(epoch)).unwrap().clone()).collect()
}

/// Past the space limit the oldest go, one after another; what is pinned and the newest stay even if that is too much.
#[test]
fn space_is_made_from_the_oldest_on() {
    let storage = CrashStorage::new();
    let (replica, model, _) = filled(&storage, options(1000), 30);
    replica.pin(Epoch(4), None, None).unwrap();
    let used = replica.layer_bytes();
    assert_eq!((replica.space().used, replica.space().warning), (used, None));
    drop(replica);
    for (percent, warns) in
        [(101, "go next"), (60, "are going"), (1, "1 are pinned, and they and the newest stay")]
    {
        let max = ByteCount(used.0 * percent / 100);
        let retention = Retention { points_max: 1000, space_max: Some(max), ..Retention::default() };
        let again = Arc::new(storage.clone()) as Arc<dyn Storage>;
        let options = Options { retention, ..options(1) };
        let (replica, _) = GroupReplica::open(again, data(), GROUP, options).unwrap();
        assert!(replica.space().warning.unwrap().contains(warns), "{percent}: {:?}", replica.space());
        let before = epochs(&replica);
        settle(&replica);
        let left = epochs(&replica);
        // 4, and a stretch up to the newest: nothing newer went before something older.
        let but_4 = |list: &[u64]| list.iter().copied().filter(|epoch| *epoch != 4).collect::<Vec<_>>();
        let (rest, all) = (but_4(&left), but_4(&before));
        assert_eq!(rest, all[all.len() - rest.len()..], "{left:?}");
        assert!(left.contains(&4));
        match percent {
            101 => assert_eq!(left, before),
            60 => assert!(replica.layer_bytes() <= max && left.len() > 5, "{left:?}"),
            _ => assert_eq!(left, [4, 30]),
        }
        model.check_offered(&replica);
    }
}

/// A view or a pin that comes while layers are being merged keeps the point; what was merged is thrown away.
#[test]
fn a_point_that_is_wanted_meanwhile_stays() {
    let storage = CrashStorage::new();
    let (replica, model, _) = filled(&storage, options(1000), 8);
    let names = || storage.list(&layers_dir(&dir())).unwrap();
    let before = names();
    let group = layers(&replica, 3, 5);
    let view = replica.view(volume_id(0), Epoch(4)).unwrap();
    assert_eq!(replica.merge(&group, &Pace::unbounded()).unwrap(), Maintained::Nothing);
    check_view(&view, &model.points[&Epoch(4)].1[0]);
    drop(view);
    replica.pin(Epoch(3), None, None).unwrap();
    assert_eq!(replica.merge(&group, &Pace::unbounded()).unwrap(), Maintained::Nothing);
    replica.unpin(Epoch(3)).unwrap();
    assert_eq!(names(), before);
    // Views on both sides of it are no hindrance, nor at the point that it ends at.
    let views = [2, 5].map(|epoch| (epoch, replica.view(volume_id(0), Epoch(epoch)).unwrap()));
    assert!(matches!(
        replica.merge(&group, &Pace::unbounded()).unwrap(),
        Maintained::Thinned { layers: 3, .. }
    ));
    for (epoch, view) in &views {
        check_view(view, &model.points[&Epoch(*epoch)].1[0]);
    }
    assert_eq!(epochs(&replica), [1, 2, 5, 6, 7, 8]);
    model.check_offered(&replica);
}

static CLOCK: AtomicU64 = AtomicU64::new(0);

/// Pinned points stay when number or age would drop them, until the pin expires.
#[test]
fn pins_hold_until_they_expire() {
    CLOCK.store(1_000_000_000_000, Ordering::SeqCst);
    let storage = CrashStorage::new();
    let options = || Options { clock: || UnixNanos(CLOCK.load(Ordering::SeqCst)), ..options(2) };
    let (replica, mut model, mut steps) = filled(&storage, options(), 3);
    let label = "before the upgrade".parse().unwrap();
    let pinned = replica.pin(Epoch(2), Some(label), Some(UnixNanos(1_000_000_000_500))).unwrap();
    assert_eq!(pinned.pin.unwrap().label.unwrap().as_str(), "before the upgrade");
    for _ in 0..4 {
        model.step(&steps.step(Consistency::Crash, &SECTORS, 8, 40)).apply(&replica).unwrap();
        settle(&replica);
    }
    assert_eq!(epochs(&replica), [2, 6, 7]);
    model.check_offered(&replica);
    let kept: Vec<_> = replica.kept_for().into_iter().map(|(_, why)| why.unwrap()).collect();
    assert_eq!(kept, ["pinned", "all", "newest"]);
    drop(replica);
    let again = Arc::new(storage.clone()) as Arc<dyn Storage>;
    let (replica, _) = GroupReplica::open(again, data(), GROUP, options()).unwrap();
    assert_eq!(replica.point(Epoch(2)).unwrap().pin.unwrap().expires, Some(UnixNanos(1_000_000_000_500)));
    CLOCK.store(1_000_000_000_500, Ordering::SeqCst);
    let mut unpinned = false;
    loop {
        match replica.maintain(&Pace::unbounded()).unwrap() {
            Maintained::Nothing => break,
            done => unpinned |= done == Maintained::Unpinned(vec![Epoch(2)]),
        }
    }
    assert!(unpinned);
    assert_eq!(epochs(&replica), [6, 7]);
    let error = replica.pin(Epoch(7), None, Some(UnixNanos(5))).unwrap_err().to_string();
    assert!(error.contains("in the past"), "{error}");
    let error = replica.pin(Epoch(2), None, None).unwrap_err();
    assert!(matches!(error, ReplicaError::NoSuchPoint { nearest: Some(Epoch(6)), .. }), "{error}");
}

#[test]
fn pins_have_a_limit() {
    let storage = CrashStorage::new();
    let small = |number| Step {
        consistency: Consistency::Crash,
        sectors: vec![16],
        writes: vec![Write { volume: 0, sector: 0, sectors: 1, fill: Fill::Noise(number) }],
    };
    let (replica, _) = open(&storage, 10_000).unwrap();
    let mut model = Model::default();
    for number in 0..=PINS_MAX as u64 {
        model.step(&small(number)).apply(&replica).unwrap();
    }
    for epoch in 1..=PINS_MAX as u64 {
        replica.pin(Epoch(epoch), None, None).unwrap();
    }
    let error = replica.pin(Epoch(PINS_MAX as u64 + 1), None, None).unwrap_err().to_string();
    assert!(error.contains("1024 points are pinned already; unpin one first"), "{error}");
    replica.pin(Epoch(5), Some("again".parse().unwrap()), None).unwrap();
}

/// A disk leaves the group. Older points that have it need what later epochs overwrote of it, also when layers are merged with one
/// that does not know it.
#[test]
fn old_content_of_a_volume_that_left_is_kept() {
    let storage = CrashStorage::new();
    let (replica, mut model, mut steps) = filled(&storage, options(1000), 5);
    for _ in 0..3 {
        let mut step = steps.step(Consistency::Crash, &SECTORS, 8, 40);
        step.writes.retain(|write| write.volume == 0);
        let mut made = model.step(&step);
        made.volumes.truncate(1);
        made.apply(&replica).unwrap();
    }
    for epoch in [4, 5, 6, 3] {
        replica.delete_point(Epoch(epoch), &Pace::unbounded()).unwrap();
    }
    settle(&replica);
    for reopened in [false, true] {
        let replica = match reopened {
            false => &replica,
            true => {
                let report = copy(&storage);
                &open(&report, 1000).unwrap().0
            }
        };
        assert_eq!(epochs(replica), [1, 2, 7, 8]);
        for epoch in [1, 2, 7, 8] {
            let volumes = if epoch < 6 { 2 } else { 1 };
            for volume in 0..volumes {
                let view = replica.view(volume_id(volume), Epoch(epoch)).unwrap();
                check_view(&view, &model.points[&Epoch(epoch)].1[volume]);
            }
            let gone = replica.view(volume_id(1), Epoch(epoch)).is_err();
            assert_eq!(gone, epoch >= 6, "volume 1 at {epoch}");
        }
    }
    drop(replica);
    assert_eq!(verify(&storage, &dir()).unwrap().problems, Vec::<String>::new());
}

/// What a process that starts now would find, while another still runs.
fn copy(storage: &CrashStorage) -> CrashStorage {
    let copy = CrashStorage::new();
    let mut dirs = vec![data().to_owned()];
    while let Some(dir) = dirs.pop() {
        copy.create_dir_all(&dir).unwrap();
        for name in storage.list(&dir).unwrap() {
            let path = dir.join(name);
            match storage.open(&path, OpenMode::Read) {
                Ok(file) => {
                    let mut bytes = vec![0; file.len().unwrap() as usize];
                    file.read_exact_at(&mut bytes, 0).unwrap();
                    copy.open(&path, OpenMode::CreateNew).unwrap().write_all_at(&bytes, 0).unwrap();
                }
                Err(_) => dirs.push(path),
            }
        }
    }
    copy
}

/// Headers come from the catalogue, are compared with their files when these are first read, and are not needed.
#[test]
fn a_catalogue_spares_reading_headers_and_is_not_trusted() {
    let storage = CrashStorage::new();
    let (replica, model, _) = filled(&storage, options(1000), 30);
    settle(&replica);
    drop(replica);
    let path = crate::catalogue::path(&dir());
    assert!(storage.exists(&path).unwrap());
    let (replica, _) = open(&storage, 1000).unwrap();
    model.check(&replica, 1000);
    drop(replica);
    // A header rots behind its back: opened all the same, and refused by name when the layer is read.
    let layer = layers_dir(&dir()).join(crate::layer::file_name(Epoch(9), Epoch(10)));
    let file = storage.open(&layer, OpenMode::ReadWrite).unwrap();
    file.write_all_at(&[0xff], 41).unwrap();
    let (replica, report) = open(&storage, 1000).unwrap();
    assert_eq!(report.damaged, []);
    let view = replica.view(volume_id(0), Epoch(9)).and_then(|view| {
        let mut content = vec![0; view.size().0 as usize];
        view.read_at(&mut content, ByteOffset(0))
    });
    let error = view.unwrap_err();
    assert!(error.to_string().contains("00000000000000000010.layer: header checksum"), "{error}");
    assert_eq!(replica.scrub(None, &Pace::unbounded(), &|_| {}).unwrap().findings.len(), 1);
    assert!(matches!(replica.view(volume_id(0), Epoch(9)), Err(ReplicaError::UnusablePoint { .. })));
    check_view(&replica.view(volume_id(0), Epoch(10)).unwrap(), &model.points[&Epoch(10)].1[0]);
    drop(replica);
    storage.remove(&path).unwrap();
    let (_, report) = open(&storage, 1000).unwrap();
    assert_eq!(report.damaged.len(), 1, "without it, headers are read");
}
