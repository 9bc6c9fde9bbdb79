//! Where a replica stands. The byte table is docs/formats/replica-state.md; it is the payload of a
//! [`durable::RecordFile`], so one write and one sync for each epoch, and a torn write leaves the state before.

use std::path::{Path, PathBuf};

use block::{ByteCount, Consistency, Epoch, Generation, GroupId, HistoryId, UnixNanos, VolumeId};
use changeset::{NAME_BYTES_MAX, VOLUMES_MAX, VolumeInfo};
use durable::{RECORD_PAYLOAD_BYTES_MAX, RecordError, RecordFile, Storage};

use crate::bytes::{get, get_u16, get_u32, get_u64, put};
use crate::failover::Failover;
use crate::image::Place;
use crate::{ReplicaError, layer};

pub(crate) const FILE_NAME: &str = "state";
const MAGIC: [u8; 8] = *b"SEAWREPL";
/// 1: the first. 2: a failover that is pending. 3: which history of its generation it is. 4: that it began in the middle of one.
const VERSION: u32 = 4;
/// Of versions 1 and 2.
const HEAD_BYTES_1: usize = 80;
const HEAD_BYTES_2: usize = 104;
const HEAD_BYTES: usize = 120;
/// Of a volume, before its name.
const VOLUME_BYTES: usize = 32;
const CRC_BYTES: usize = 4;

/// What is known of a replica apart from its content.
///
/// Invariants, checked before writing and after reading: `floor <= applied`; a generation is known once an epoch is
/// applied; volumes have distinct ids, sizes in whole sectors and names within the limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) group: GroupId,
    /// `None` until the first changeset arrives.
    pub(crate) generation: Option<Generation>,
    /// Which history of that generation.
    pub(crate) history: HistoryId,
    /// While a failover is pending, that of the generation before it.
    pub(crate) history_before: HistoryId,
    /// The last epoch that the images hold, whole and durable.
    pub(crate) applied: Epoch,
    /// The oldest recovery point; 0 before the first. Layers before it are leftovers.
    pub(crate) floor: Epoch,
    /// Of the applied epoch.
    pub(crate) cut_time: UnixNanos,
    /// Of the applied epoch.
    pub(crate) consistency: Consistency,
    /// Neither committed nor cancelled.
    pub(crate) failover: Option<Failover>,
    /// It began in the middle of a history, and not everything has come since: what the images hold is no
    /// state of the disks, and no epoch is a point.
    pub(crate) unproven: bool,
    /// Every volume that has an image, in the order they first came.
    pub(crate) volumes: Vec<VolumeState>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeState {
    pub(crate) info: VolumeInfo,
    pub(crate) place: Place,
}

impl State {
    pub(crate) fn new(group: GroupId) -> State {
        State {
            group,
            generation: None,
            history: HistoryId::SOURCE,
            history_before: HistoryId::SOURCE,
            applied: Epoch::NONE,
            floor: Epoch::NONE,
            cut_time: UnixNanos(0),
            consistency: Consistency::None,
            failover: None,
            unproven: false,
            volumes: Vec::new(),
        }
    }

    pub(crate) fn volume(&self, id: VolumeId) -> Option<&VolumeState> {
        self.volumes.iter().find(|volume| volume.info.id == id)
    }

    /// The first invariant that does not hold.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.floor > self.applied {
            return Err(format!("oldest point {} is past the applied epoch {}", self.floor, self.applied));
        }
        if self.generation.is_none() && self.applied > Epoch::NONE {
            return Err(format!("epoch {} is applied without a generation", self.applied));
        }
        if let Some(Failover { point, from, ended }) = self.failover
            && (point < self.floor || point > ended || ended > self.applied || Some(from) >= self.generation)
        {
            return Err(format!(
                "a failover to point {point}, from generation {from} that ended at {ended}, is none of this history"
            ));
        }
        if self.unproven && self.floor > Epoch::NONE {
            return Err(format!(
                "point {} is offered of a replica that has not got everything yet",
                self.floor
            ));
        }
        if self.failover.is_none() && self.history_before != HistoryId::SOURCE {
            return Err("a history before a failover is named, and there is no failover".to_owned());
        }
        layer::check_volumes(self.volumes.iter().map(|volume| &volume.info))?;
        match self.length() {
            length if length > RECORD_PAYLOAD_BYTES_MAX => Err(format!(
                "{} volumes with their names take {length} bytes, more than {RECORD_PAYLOAD_BYTES_MAX}; \
                 shorten their names",
                self.volumes.len()
            )),
            _ => Ok(()),
        }
    }

    fn length(&self) -> usize {
        let volumes: usize = self.volumes.iter().map(|volume| VOLUME_BYTES + volume.info.name.len()).sum();
        HEAD_BYTES + volumes + CRC_BYTES
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        assert_eq!(self.check(), Ok(()), "a replica's state is sound before it is written");
        let mut bytes = vec![0; self.length()];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 12, &(self.volumes.len() as u32).to_le_bytes());
        put(&mut bytes, 16, &self.group.0);
        put(&mut bytes, 32, &self.generation.map_or(0, |generation| generation.0).to_le_bytes());
        put(&mut bytes, 40, &self.applied.0.to_le_bytes());
        put(&mut bytes, 48, &self.floor.0.to_le_bytes());
        put(&mut bytes, 56, &self.cut_time.0.to_le_bytes());
        bytes[64] = self.consistency as u8;
        bytes[65] = u8::from(self.generation.is_some());
        bytes[67] = u8::from(self.unproven);
        if let Some(Failover { point, from, ended }) = self.failover {
            bytes[66] = 1;
            put(&mut bytes, 80, &point.0.to_le_bytes());
            put(&mut bytes, 88, &from.0.to_le_bytes());
            put(&mut bytes, 96, &ended.0.to_le_bytes());
        }
        put(&mut bytes, 104, &self.history.0.to_le_bytes());
        put(&mut bytes, 112, &self.history_before.0.to_le_bytes());
        let mut at = HEAD_BYTES;
        for VolumeState { info, place } in &self.volumes {
            put(&mut bytes, at, &info.id.0);
            put(&mut bytes, at + 16, &info.size.0.to_le_bytes());
            put(&mut bytes, at + 24, &info.logical_block.to_le_bytes());
            bytes[at + 28] = *place as u8;
            put(&mut bytes, at + 30, &(info.name.len() as u16).to_le_bytes());
            put(&mut bytes, at + VOLUME_BYTES, info.name.as_bytes());
            at += VOLUME_BYTES + info.name.len();
        }
        let crc = crc32c::crc32c(&bytes[..at]);
        put(&mut bytes, at, &crc.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<State, String> {
        if bytes.len() < HEAD_BYTES_1 + CRC_BYTES {
            return Err(format!("{} bytes are too short for a replica's state", bytes.len()));
        }
        if bytes[..8] != MAGIC {
            return Err("not a replica's state (wrong magic)".to_owned());
        }
        let version = get_u32(bytes, 8);
        let head = match version {
            1 => HEAD_BYTES_1,
            2 => HEAD_BYTES_2,
            3..=VERSION => HEAD_BYTES,
            _ => {
                return Err(format!(
                    "state version {version} is not known; this program reads versions 1 to {VERSION}"
                ));
            }
        };
        let body = bytes.len() - CRC_BYTES;
        if crc32c::crc32c(&bytes[..body]) != get_u32(bytes, body) {
            return Err("checksum does not match (damaged)".to_owned());
        }
        let count = get_u32(bytes, 12) as usize;
        if count > VOLUMES_MAX {
            return Err(format!("{count} volumes, at most {VOLUMES_MAX} are possible"));
        }
        let known = match bytes[65] {
            0 => false,
            1 => true,
            byte => return Err(format!("generation flag {byte} means nothing")),
        };
        let consistency = Consistency::from_byte(bytes[64])
            .ok_or_else(|| format!("consistency {} means nothing", bytes[64]))?;
        let Some(mut rest) = bytes[..body].get(head..) else {
            return Err(format!("{} bytes are too short for a replica's state", bytes.len()));
        };
        let failover = match bytes[66] {
            0 => None,
            1 if version > 1 => Some(Failover {
                point: Epoch(get_u64(bytes, 80)),
                from: Generation(get_u64(bytes, 88)),
                ended: Epoch(get_u64(bytes, 96)),
            }),
            byte => return Err(format!("failover flag {byte} means nothing")),
        };
        let unproven = match bytes[67] {
            0 => false,
            1 if version > 3 => true,
            byte => return Err(format!("flag {byte} of a beginning in the middle means nothing")),
        };
        let history = |at| HistoryId(if version > 2 { get_u64(bytes, at) } else { 0 });
        let mut volumes = Vec::with_capacity(count);
        for _ in 0..count {
            let short = || "cut short within the volumes".to_owned();
            let (volume, after) = rest.split_at_checked(VOLUME_BYTES).ok_or_else(short)?;
            let (name, after) = after.split_at_checked(get_u16(volume, 30).into()).ok_or_else(short)?;
            volumes.push(VolumeState {
                info: VolumeInfo {
                    id: VolumeId(get(volume, 0)),
                    name: layer::decode_name(name)?,
                    size: ByteCount(get_u64(volume, 16)),
                    logical_block: get_u32(volume, 24),
                },
                place: Place::from_byte(volume[28])
                    .ok_or_else(|| format!("place {} means nothing", volume[28]))?,
            });
            rest = after;
        }
        if !rest.is_empty() {
            return Err(format!("{} bytes follow the volumes", rest.len()));
        }
        let state = State {
            group: GroupId(get(bytes, 16)),
            generation: known.then(|| Generation(get_u64(bytes, 32))),
            history: history(104),
            history_before: history(112),
            applied: Epoch(get_u64(bytes, 40)),
            floor: Epoch(get_u64(bytes, 48)),
            cut_time: UnixNanos(get_u64(bytes, 56)),
            consistency,
            failover,
            unproven,
            volumes,
        };
        state.check()?;
        Ok(state)
    }
}

const _: () = assert!(NAME_BYTES_MAX <= u16::MAX as usize);

/// The open state file.
#[derive(Debug)]
pub(crate) struct StateFile(RecordFile);

impl StateFile {
    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join(FILE_NAME)
    }

    /// A new file, durable when this returns.
    pub(crate) fn create(
        storage: &dyn Storage,
        dir: &Path,
        state: &State,
    ) -> Result<StateFile, ReplicaError> {
        let path = StateFile::path(dir);
        RecordFile::create(storage, &path, &state.encode()).map(StateFile).map_err(|error| from(error, &path))
    }

    /// An existing file and what it says.
    pub(crate) fn open(storage: &dyn Storage, dir: &Path) -> Result<(StateFile, State), ReplicaError> {
        let path = StateFile::path(dir);
        let (file, payload) = RecordFile::open(storage, &path).map_err(|error| from(error, &path))?;
        let state = State::decode(&payload).map_err(|problem| ReplicaError::corrupt(&path, problem))?;
        Ok((StateFile(file), state))
    }

    /// Replaces the state, durably. After a failure either state may be found, and the file takes no more.
    pub(crate) fn write(&mut self, state: &State, dir: &Path) -> Result<(), ReplicaError> {
        self.0.write(&state.encode()).map_err(|error| from(error, &StateFile::path(dir)))
    }
}

fn from(error: RecordError, path: &Path) -> ReplicaError {
    match error {
        RecordError::Io { action, source, .. } => {
            ReplicaError::Io { doing: action, path: path.to_owned(), source }
        }
        other => ReplicaError::corrupt(path, other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            group: GroupId([0x11; 16]),
            generation: Some(Generation(2)),
            history: HistoryId::SOURCE,
            history_before: HistoryId::SOURCE,
            applied: Epoch(0x0a0b),
            floor: Epoch(9),
            cut_time: UnixNanos(0x0102_0304_0506_0708),
            consistency: Consistency::Filesystem,
            failover: None,
            unproven: false,
            volumes: vec![VolumeState {
                info: VolumeInfo {
                    id: VolumeId([0x22; 16]),
                    name: "sda".to_owned(),
                    size: ByteCount(1 << 30),
                    logical_block: 4096,
                },
                place: Place::Device,
            }],
        }
    }

    /// The bytes of docs/formats/replica-state.md. A change here breaks every replica there is.
    #[test]
    fn golden_bytes() {
        assert_eq!(State::decode(&golden(1, &[0; 14], GOLDEN_CRC_1)).unwrap(), state());
        let failover = Failover { point: Epoch(10), from: Generation(1), ended: Epoch(0x0a00) };
        let state = State { failover: Some(failover), ..state() };
        assert_eq!(State::decode(&golden(2, &failed_over(), GOLDEN_CRC_2)).unwrap(), state);
        let mut more = failed_over();
        more.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 8, 5, 0, 0, 0, 0, 0, 0, 6]);
        let older = State::decode(&golden(3, &more, GOLDEN_CRC_3)).unwrap();
        let bytes = golden(4, &more, GOLDEN_CRC);
        let (history, before) = (HistoryId(0x0800_0000_0000_0007), HistoryId(0x0600_0000_0000_0005));
        let state = State { history, history_before: before, ..state };
        assert_eq!(older, state);
        assert_eq!(state.encode(), bytes);
        assert_eq!(State::decode(&bytes).unwrap(), state);
        let begun = State {
            unproven: true,
            floor: Epoch::NONE,
            failover: None,
            history_before: HistoryId::SOURCE,
            ..state
        };
        assert_eq!((begun.encode()[67], State::decode(&begun.encode()).unwrap()), (1, begun));
    }

    fn failed_over() -> Vec<u8> {
        let mut more = vec![1];
        more.resize(14, 0);
        more.extend_from_slice(&[10, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0]);
        more
    }

    fn golden(version: u8, more: &[u8], crc: [u8; 4]) -> Vec<u8> {
        let mut golden = Vec::new();
        golden.extend_from_slice(b"SEAWREPL");
        golden.extend_from_slice(&[version, 0, 0, 0, 1, 0, 0, 0]);
        golden.extend_from_slice(&[0x11; 16]);
        golden.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[0x0b, 0x0a, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[9, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[8, 7, 6, 5, 4, 3, 2, 1]);
        golden.extend_from_slice(&[2, 1]);
        golden.extend_from_slice(more);
        golden.extend_from_slice(&[0x22; 16]);
        golden.extend_from_slice(&[0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0, 3, 0]);
        golden.extend_from_slice(b"sda");
        golden.extend_from_slice(&crc);
        golden
    }

    const GOLDEN_CRC_1: [u8; 4] = [0x8a, 0x0c, 0xb5, 0x74];
    const GOLDEN_CRC_2: [u8; 4] = [231, 58, 78, 163];
    const GOLDEN_CRC_3: [u8; 4] = [231, 115, 242, 2];
    const GOLDEN_CRC: [u8; 4] = [80, 195, 88, 239];

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let bytes = state().encode();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(State::decode(&bytes).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(State::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn contradictions_are_refused_although_the_checksum_is_right() {
        let seal = |mut bytes: Vec<u8>| {
            let body = bytes.len() - CRC_BYTES;
            let crc = crc32c::crc32c(&bytes[..body]);
            put(&mut bytes, body, &crc.to_le_bytes());
            State::decode(&bytes).unwrap_err()
        };
        let with = |at: usize, value: u8| {
            let mut bytes = state().encode();
            bytes[at] = value;
            seal(bytes)
        };
        assert!(with(54, 1).contains("oldest point"));
        assert!(with(64, 4).contains("consistency 4"));
        assert!(with(65, 0).contains("without a generation"));
        assert!(with(66, 2).contains("failover flag 2"));
        assert!(with(67, 1).contains("has not got everything"));
        assert!(with(67, 2).contains("flag 2 of a beginning"));
        assert!(with(112, 2).contains("there is no failover"));
        assert!(with(66, 1).contains("is none of this history"));
        assert!(with(12, 2).contains("cut short"));
        assert!(with(12, 0).contains("follow the volumes"));
        assert!(with(13, 255).contains("volumes, at most"));
        assert!(with(HEAD_BYTES + 16, 1).contains("multiple of 512"));
        assert!(with(HEAD_BYTES + 28, 9).contains("place 9"));
        assert!(with(HEAD_BYTES + VOLUME_BYTES, 0xff).contains("UTF-8"));
    }
}
