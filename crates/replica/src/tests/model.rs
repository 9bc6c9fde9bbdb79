//! The oracle: a full copy of every volume at every point.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use block::{ByteCount, ByteOffset, Consistency, Epoch, Generation, GroupId, UnixNanos, VolumeId};
use changeset::{Stamp, VolumeInfo};
use durable::{CrashStorage, Storage};

use crate::delta::{Change, Content, Delta};
use crate::{Applied, GroupReplica, OpenReport, Options, ReplicaError, Retention};

pub(crate) const GROUP: GroupId = GroupId([7; 16]);
pub(crate) const GENERATION: Generation = Generation(3);

pub(crate) fn data() -> &'static Path {
    Path::new("/data")
}

pub(crate) fn dir() -> std::path::PathBuf {
    data().join(GROUP.to_string())
}

pub(crate) fn options(points_max: usize) -> Options {
    Options {
        retention: Retention { points_max, ..Retention::default() },
        clock: || UnixNanos(u64::MAX),
        ..Options::default()
    }
}

pub(crate) fn open(
    storage: &CrashStorage,
    points_max: usize,
) -> Result<(GroupReplica, OpenReport), ReplicaError> {
    GroupReplica::open(Arc::new(storage.clone()) as Arc<dyn Storage>, data(), GROUP, options(points_max))
}

/// With a policy, and whatever number of points.
pub(crate) fn open_policy(
    storage: &CrashStorage,
    policy: &str,
) -> Result<(GroupReplica, OpenReport), ReplicaError> {
    let retention =
        Retention { points_max: 1_000_000, policy: Some(policy.parse().unwrap()), ..Retention::default() };
    let options = Options { retention, ..options(1) };
    GroupReplica::open(Arc::new(storage.clone()) as Arc<dyn Storage>, data(), GROUP, options)
}

pub(crate) fn volume_id(index: usize) -> VolumeId {
    VolumeId([index as u8 + 1; 16])
}

/// What to write, of a volume by index.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) volume: usize,
    pub(crate) sector: u64,
    pub(crate) sectors: u64,
    pub(crate) fill: Fill,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fill {
    /// Noise that this number decides.
    Noise(u64),
    /// Zeroes as data.
    ZeroData,
    /// A discard.
    Zero,
}

/// An epoch as it is made: the volumes' sizes (more volumes than before are new ones), and writes in order.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) consistency: Consistency,
    pub(crate) sectors: Vec<u64>,
    pub(crate) writes: Vec<Write>,
}

/// An epoch, folded.
#[derive(Clone)]
pub(crate) struct Made {
    pub(crate) stamp: Stamp,
    pub(crate) volumes: Vec<VolumeInfo>,
    changes: Vec<(usize, u64, u64, Option<Vec<u8>>)>,
}

impl Made {
    pub(crate) fn delta(&self) -> Delta<'_> {
        let mut delta = Delta::new(self.stamp, &self.volumes);
        for (volume, start, length, data) in &self.changes {
            let content = data.as_ref().map_or(Content::Zeroes, |data| Content::Data(data));
            delta.push(*volume, Change { start: *start, length: *length, content }).unwrap();
        }
        delta
    }

    pub(crate) fn apply(&self, replica: &GroupReplica) -> Result<Applied, ReplicaError> {
        replica.apply_delta(&self.delta())
    }
}

#[derive(Clone, Default)]
pub(crate) struct Model {
    pub(crate) epoch: Epoch,
    pub(crate) current: Vec<Vec<u8>>,
    pub(crate) points: BTreeMap<Epoch, (Consistency, Vec<Vec<u8>>)>,
}

pub(crate) fn noise(mut state: u64, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..chunk.len()]);
    }
}

impl Model {
    /// Makes the next epoch of a step, and takes it as applied.
    pub(crate) fn step(&mut self, step: &Step) -> Made {
        self.epoch = self.epoch.next();
        for (index, sectors) in step.sectors.iter().enumerate() {
            let bytes = *sectors as usize * 512;
            match self.current.get_mut(index) {
                Some(volume) => volume.resize(bytes.max(volume.len()), 0),
                None => self.current.push(vec![0; bytes]),
            }
        }
        // By sector: what it is now, and whether that is a discard.
        let mut touched: BTreeMap<(usize, u64), bool> = BTreeMap::new();
        for write in &step.writes {
            let Some(volume) = self.current.get_mut(write.volume) else { continue };
            let total = volume.len() as u64 / 512;
            let first = write.sector.min(total);
            let end = (first + write.sectors).min(total);
            let range = &mut volume[first as usize * 512..end as usize * 512];
            match write.fill {
                Fill::Noise(seed) => noise(seed, range),
                Fill::ZeroData | Fill::Zero => range.fill(0),
            }
            for sector in first..end {
                touched.insert((write.volume, sector), write.fill == Fill::Zero);
            }
        }
        let mut changes: Vec<(usize, u64, u64, Option<Vec<u8>>)> = Vec::new();
        for ((volume, sector), zero) in touched {
            let at = sector * 512;
            let data = &self.current[volume][at as usize..at as usize + 512];
            match changes.last_mut() {
                // Blocks apart as a fold leaves them, discards as long as they come.
                Some((last, start, length, content))
                    if *last == volume
                        && *start + *length == at
                        && content.is_none() == zero
                        && (zero || at % 4096 != 0) =>
                {
                    *length += 512;
                    if let Some(content) = content {
                        content.extend_from_slice(data);
                    }
                }
                _ => changes.push((volume, at, 512, (!zero).then(|| data.to_vec()))),
            }
        }
        if step.consistency.is_point() {
            self.points.insert(self.epoch, (step.consistency, self.current.clone()));
        }
        let volumes = self.current.iter().enumerate().map(|(index, content)| VolumeInfo {
            id: volume_id(index),
            name: format!("disk{index}"),
            size: ByteCount(content.len() as u64),
            logical_block: 512,
        });
        let stamp = Stamp {
            group: GROUP,
            generation: GENERATION,
            epoch: self.epoch,
            consistency: step.consistency,
            cut_time: UnixNanos(1_000_000_000 * self.epoch.0),
        };
        Made { stamp, volumes: volumes.collect(), changes }
    }

    /// Compares everything that the replica offers with what was.
    pub(crate) fn check(&self, replica: &GroupReplica, points_max: usize) {
        assert_eq!(replica.applied().1, self.epoch);
        let points = replica.points();
        let expected: Vec<Epoch> = self.points.keys().rev().take(points_max).rev().copied().collect();
        assert_eq!(points.iter().map(|point| point.epoch).collect::<Vec<_>>(), expected);
        for point in points {
            let (consistency, volumes) = &self.points[&point.epoch];
            assert_eq!(point.consistency, *consistency);
            assert_eq!(point.volumes.len(), volumes.len());
            for (index, content) in volumes.iter().enumerate() {
                check_view(&replica.view(volume_id(index), point.epoch).unwrap(), content);
            }
            assert!(matches!(
                replica.view(volume_id(volumes.len()), point.epoch),
                Err(ReplicaError::NoSuchVolume { .. })
            ));
        }
    }
}

impl Model {
    /// Compares everything that the replica offers, whichever points that are, with what was. The newest is among them.
    pub(crate) fn check_offered(&self, replica: &GroupReplica) -> BTreeSet<Epoch> {
        assert_eq!(replica.applied().1, self.epoch);
        let points = replica.points();
        assert_eq!(points.last().map(|point| point.epoch), self.points.keys().next_back().copied());
        for point in &points {
            let (consistency, volumes) = &self.points[&point.epoch];
            assert_eq!((point.consistency, &point.unusable), (*consistency, &None));
            for (index, content) in volumes.iter().enumerate() {
                check_view(&replica.view(volume_id(index), point.epoch).unwrap(), content);
            }
        }
        points.iter().map(|point| point.epoch).collect()
    }
}

/// Reads a view whole, in odd pieces, and by its data alone.
pub(crate) fn check_view(view: &crate::View, content: &[u8]) {
    let epoch = view.epoch();
    assert_eq!(view.size(), ByteCount(content.len() as u64), "size at {epoch}");
    let mut whole = vec![0xee; content.len()];
    view.read_at(&mut whole, ByteOffset(0)).unwrap();
    assert_same(&whole, content, epoch, "whole");

    let mut pieces = vec![0xee; content.len()];
    for (index, piece) in pieces.chunks_mut(1234).enumerate() {
        view.read_at(piece, ByteOffset(index as u64 * 1234)).unwrap();
    }
    assert_same(&pieces, content, epoch, "in pieces");

    let mut data = vec![0; content.len()];
    let mut at = ByteOffset(0);
    while let Some(extent) = view.next_data(at).unwrap() {
        assert!(extent.offset() >= at && extent.end().0 <= view.size().0);
        let range = extent.offset().0 as usize..extent.end().0 as usize;
        view.read_at(&mut data[range], extent.offset()).unwrap();
        at = extent.end();
    }
    assert_same(&data, content, epoch, "by data");
    assert!(matches!(view.read_at(&mut [0], ByteOffset(view.size().0)), Err(ReplicaError::PastEnd { .. })));
}

fn assert_same(found: &[u8], expected: &[u8], epoch: Epoch, how: &str) {
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("view at epoch {epoch} read {how}: byte {at} is {} and not {}", found[at], expected[at]);
    }
}

/// Steps that a number decides.
pub(crate) struct Steps(pub(crate) u64);

impl Steps {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let mut bytes = [0; 8];
        noise(self.0, &mut bytes);
        self.0 = self.0.wrapping_add(1);
        u64::from_le_bytes(bytes) % bound
    }

    /// Volumes of the sizes given, some writes of up to `longest` sectors.
    pub(crate) fn step(
        &mut self,
        consistency: Consistency,
        sectors: &[u64],
        writes: u64,
        longest: u64,
    ) -> Step {
        let writes = (0..writes).map(|_| {
            let volume = self.below(sectors.len() as u64) as usize;
            let block = self.below(2) == 0;
            let unit = if block { 8 } else { 1 };
            Write {
                volume,
                sector: self.below(sectors[volume]) / unit * unit,
                sectors: (1 + self.below(longest)).next_multiple_of(unit),
                fill: match self.below(5) {
                    0 => Fill::Zero,
                    1 => Fill::ZeroData,
                    _ => Fill::Noise(self.below(u64::MAX)),
                },
            }
        });
        let writes = writes.collect();
        Step { consistency, sectors: sectors.to_vec(), writes }
    }
}
