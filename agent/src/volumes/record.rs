//! Which disks were protected, by their marks; the payload of a record file. The byte table is in docs/formats/disks.md.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use capture::Identity;
use durable::{RealStorage, RecordError, RecordFile};

const MAGIC: &[u8; 8] = b"SEAWDISK";
/// 1: first.
const VERSION: u16 = 1;
/// More disks than a group can have are no record of ours.
const DISKS_MAX: usize = 1024;

/// A disk as it was when it was last protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecordedDisk {
    /// Name of the volume in the configuration.
    pub(super) configured: String,
    /// Name of the disk's volume.
    pub(super) volume: String,
    /// Where it was.
    pub(super) path: String,
    pub(super) identity: Identity,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) disks: Vec<RecordedDisk>,
}

impl Record {
    /// What was saved last; empty when nothing was.
    pub(super) fn load(path: &Path) -> anyhow::Result<Record> {
        let payload = match RecordFile::open(&RealStorage, path) {
            Ok((_, payload)) => payload,
            Err(RecordError::Missing(_)) => return Ok(Record::default()),
            Err(error) => {
                return Err(error).context(
                    "read which disks were protected; without it, protection begins anew: all disks are read again",
                );
            }
        };
        Record::decode(&payload)
            .with_context(|| format!("read which disks were protected in {}", path.display()))
    }

    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        RecordFile::create(&RealStorage, path, &self.encode())?;
        Ok(())
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.disks.len() as u16).to_le_bytes());
        for disk in &self.disks {
            let Identity { wwn, serial, pt_uuid, fs_uuid } = &disk.identity;
            let marks = [wwn, serial, pt_uuid, fs_uuid].map(|mark| mark.as_deref().unwrap_or_default());
            for text in [disk.configured.as_str(), &disk.volume, &disk.path].into_iter().chain(marks) {
                let text = &text.as_bytes()[..text.len().min(u16::MAX.into())];
                bytes.extend((text.len() as u16).to_le_bytes());
                bytes.extend(text);
            }
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> anyhow::Result<Record> {
        let mut rest = bytes;
        ensure!(take(&mut rest, MAGIC.len())? == MAGIC, "it is something else");
        let version = number(&mut rest)?;
        if version != VERSION {
            bail!("version {version} is not this program's {VERSION}");
        }
        let count = usize::from(number(&mut rest)?);
        ensure!(count <= DISKS_MAX, "{count} disks are more than {DISKS_MAX}");
        let mut disks = Vec::with_capacity(count);
        for _ in 0..count {
            let mut text = || -> anyhow::Result<String> {
                let length = number(&mut rest)?;
                Ok(std::str::from_utf8(take(&mut rest, length.into())?)?.to_owned())
            };
            let (configured, volume, path) = (text()?, text()?, text()?);
            let mut mark = || text().map(|text| (!text.is_empty()).then_some(text));
            let identity = Identity { wwn: mark()?, serial: mark()?, pt_uuid: mark()?, fs_uuid: mark()? };
            disks.push(RecordedDisk { configured, volume, path, identity });
        }
        ensure!(rest.is_empty(), "{} bytes too many", rest.len());
        Ok(Record { disks })
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> anyhow::Result<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count).context("too short")?;
    *rest = left;
    Ok(taken)
}

fn number(rest: &mut &[u8]) -> anyhow::Result<u16> {
    Ok(u16::from_le_bytes(take(rest, 2)?.try_into().expect("2 bytes")))
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing {
    use super::*;

    /// The record of the disks that were protected.
    pub fn disks(data: &[u8]) {
        if let Ok(record) = Record::decode(data) {
            assert_eq!(Record::decode(&record.encode()).expect("what is written can be read"), record);
        }
    }

    /// What [`disks`] begins with.
    pub fn disks_seeds() -> Vec<Vec<u8>> {
        let identity = Identity { serial: Some("S1".into()), wwn: Some("w".into()), ..Identity::default() };
        let disk = |number: u8| RecordedDisk {
            configured: "d".into(),
            volume: format!("d.{number}"),
            path: format!("/dev/vd{number}"),
            identity: identity.clone(),
        };
        vec![Record { disks: vec![disk(1), disk(2)] }.encode(), Record::default().encode()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Record {
        let identity =
            Identity { serial: Some("S1".into()), fs_uuid: Some("f".into()), ..Identity::default() };
        let disk =
            RecordedDisk { configured: "d".into(), volume: "d.2".into(), path: "/dev/vdb".into(), identity };
        Record { disks: vec![disk] }
    }

    #[test]
    fn golden_bytes() {
        let golden = b"SEAWDISK\x01\x00\x01\x00\x01\x00d\x03\x00d.2\x08\x00/dev/vdb\x00\x00\x02\x00S1\x00\x00\x01\x00f";
        assert_eq!(example().encode(), golden);
        assert_eq!(Record::decode(golden).unwrap(), example());
        fuzzing::disks_seeds().iter().for_each(|seed| fuzzing::disks(seed));
    }

    #[test]
    fn what_is_cut_or_changed_is_refused() {
        let bytes = example().encode();
        for length in 0..bytes.len() {
            assert!(Record::decode(&bytes[..length]).is_err(), "{length}");
        }
        for (at, value) in [(0, 2), (8, 2), (10, 2), (11, 200), (12, 0xff)] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            assert!(Record::decode(&bytes).is_err(), "byte {at}");
        }
        assert!(Record::decode(&[bytes, vec![0]].concat()).is_err());
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disks");
        assert_eq!(Record::load(&path).unwrap(), Record::default());
        example().save(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap(), example());
        std::fs::write(&path, "other").unwrap();
        assert!(Record::load(&path).is_err());
    }
}
