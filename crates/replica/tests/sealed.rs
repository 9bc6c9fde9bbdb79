//! Real changesets on the real file system: sealed, opened, applied, viewed.

use std::path::Path;
use std::sync::Arc;

use block::{ByteCount, ByteOffset, Consistency, Epoch, Extent, Generation, GroupId, UnixNanos, VolumeId};
use changeset::{Changeset, Fold, GroupKey, Level, Opener, SealOptions, Stamp, VolumeInfo, seal};
use durable::RealStorage;
use replica::{GroupReplica, Options, ReplicaError, verify};

const GROUP: GroupId = GroupId([5; 16]);
const VOLUME: VolumeId = VolumeId([6; 16]);
const SIZE: u64 = 64 << 20;

fn key() -> GroupKey {
    GroupKey::from_bytes([3; 32])
}

fn changeset(epoch: u64, fill: impl FnOnce(&mut Fold)) -> Changeset {
    let mut fold = Fold::new();
    fill(&mut fold);
    let stamp = Stamp {
        group: GROUP,
        generation: Generation(1),
        epoch: Epoch(epoch),
        consistency: Consistency::Crash,
        cut_time: UnixNanos(epoch),
    };
    let volumes =
        [VolumeInfo { id: VOLUME, name: "sda".to_owned(), size: ByteCount(SIZE), logical_block: 512 }];
    let sealed =
        seal(&stamp, &volumes, &fold, &key(), SealOptions { level: Level::default(), threads: 1 }).unwrap();
    let mut opener = Opener::new(key(), GROUP, 1);
    for piece in sealed.pieces {
        opener.push(piece).unwrap();
    }
    opener.finish().unwrap()
}

fn open(data: &Path) -> GroupReplica {
    GroupReplica::open(Arc::new(RealStorage), data, GROUP, Options::default()).unwrap().0
}

#[test]
fn points_of_sealed_changesets_on_a_real_file_system() {
    let data = tempfile::tempdir().unwrap();
    let replica = open(data.path());
    let whole = |byte: u8| move |fold: &mut Fold| fold.write(0, ByteOffset(0), &vec![byte; 3 << 20]);
    replica.apply(&changeset(1, whole(1))).unwrap();
    replica.apply(&changeset(2, |fold| fold.write(0, ByteOffset(1 << 20), &[2; 4096]))).unwrap();
    replica
        .apply(&changeset(3, |fold| {
            fold.zero(0, Extent::new(ByteOffset(0), ByteCount(SIZE)).unwrap());
            fold.write(0, ByteOffset(32 << 20), &[3; 512]);
        }))
        .unwrap();
    let again = replica.apply(&changeset(3, whole(9))).unwrap_err();
    assert!(matches!(again, ReplicaError::Replayed { .. }));

    let check = |replica: &GroupReplica| {
        let mut block = [0; 4096];
        let expected = [(1, 1, 3 << 20), (2, 2, 3 << 20), (3, 0, (32 << 20) + (1 << 20))];
        for (epoch, byte, data_end) in expected {
            let view = replica.view(VOLUME, Epoch(epoch)).unwrap();
            view.read_at(&mut block, ByteOffset(1 << 20)).unwrap();
            assert_eq!(block, [byte; 4096], "epoch {epoch}");
            let mut end = ByteOffset(0);
            while let Some(extent) = view.next_data(end).unwrap() {
                end = extent.end();
            }
            assert_eq!(end, ByteOffset(data_end), "epoch {epoch}");
        }
    };
    check(&replica);
    drop(replica);
    check(&open(data.path()));
    let report = verify(&RealStorage, &data.path().join(GROUP.to_string())).unwrap();
    assert_eq!((report.problems.len(), report.layers.len()), (0, 3));

    // The newest state is a plain raw image, sparse again where it was discarded.
    let image =
        data.path().join(GROUP.to_string()).join("volumes").join(VOLUME.to_string()).join("replica.img");
    let content = std::fs::read(&image).unwrap();
    assert_eq!(content.len() as u64, SIZE);
    assert_eq!(content.iter().filter(|byte| **byte != 0).count(), 512);
}
