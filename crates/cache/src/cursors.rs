//! What is known of each group besides its segments: what was freed, what each target has applied.
//!
//! One small file, replaced whole. The byte table is in docs/formats/cache-segment.md.

use std::collections::BTreeMap;

use block::{Epoch, Generation, GroupId, HistoryId};

use crate::Position;
use crate::format::Flaw;

/// The longest name of a target, in bytes. A longer one is refused by name when the cache is opened.
pub const TARGET_NAME_BYTES_MAX: usize = 255;

const MAGIC: &[u8; 8] = b"SWCURSOR";
/// 1: first. 2: which history of its generation a group has.
const VERSION: u16 = 2;
const HEAD: usize = 40;
const GROUP: usize = 88;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursors {
    /// Of segment `segment` all before `durable` is durable.
    pub(crate) segment: u64,
    pub(crate) durable: u64,
    pub(crate) groups: BTreeMap<GroupId, GroupCursor>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GroupCursor {
    /// All targets have applied it; changesets up to it are freed.
    pub(crate) base: Position,
    /// At least this was held when the file was written.
    pub(crate) held: Position,
    /// Nothing of this generation or an older one is accepted: held changesets of it were lost from here on.
    pub(crate) lost: Option<Position>,
    /// Which history of the generation the targets have; of the newest that one has told of.
    pub(crate) history: Option<(Generation, HistoryId)>,
    pub(crate) targets: BTreeMap<String, Position>,
}

impl Cursors {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.groups.len() * (GROUP + 80));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 6]);
        for value in [self.segment, self.durable, self.groups.len() as u64] {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        for (id, group) in &self.groups {
            bytes.extend_from_slice(&id.0);
            position(&mut bytes, group.base);
            position(&mut bytes, group.held);
            position(&mut bytes, group.lost.unwrap_or(Position::NONE));
            let (generation, history) = group.history.unwrap_or_default();
            bytes.extend_from_slice(&generation.0.to_le_bytes());
            bytes.extend_from_slice(&history.0.to_le_bytes());
            bytes.extend_from_slice(&(group.targets.len() as u64).to_le_bytes());
            for (name, applied) in &group.targets {
                bytes.push(name.len() as u8);
                bytes.extend_from_slice(name.as_bytes());
                position(&mut bytes, *applied);
            }
        }
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Cursors, Flaw> {
        if bytes.len() < HEAD + 4 {
            return Err(Flaw::Short);
        }
        if bytes[..8] != *MAGIC {
            return Err(Flaw::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if !(1..=VERSION).contains(&version) {
            return Err(Flaw::Version(version));
        }
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(Flaw::Short)?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return Err(Flaw::Checksum);
        }
        let mut rest = Rest(&body[16..]);
        let (segment, durable) = (rest.word()?, rest.word()?);
        let mut cursors = Cursors { segment, durable, groups: BTreeMap::new() };
        for _ in 0..rest.word()? {
            let id = GroupId(rest.take()?);
            let mut group = GroupCursor {
                base: rest.position()?,
                held: rest.position()?,
                lost: Some(rest.position()?).filter(|lost| *lost != Position::NONE),
                history: match version {
                    1 => None,
                    _ => Some((Generation(rest.word()?), HistoryId(rest.word()?)))
                        .filter(|(generation, _)| *generation != Generation(0)),
                },
                targets: BTreeMap::new(),
            };
            for _ in 0..rest.word()? {
                let [length] = rest.take::<1>()?;
                let name = rest.bytes(usize::from(length))?;
                let name = std::str::from_utf8(name).map_err(|_| Flaw::Range("a target's name"))?.to_owned();
                group.targets.insert(name, rest.position()?);
            }
            cursors.groups.insert(id, group);
        }
        if rest.0.is_empty() { Ok(cursors) } else { Err(Flaw::Range("the number of groups")) }
    }
}

fn position(bytes: &mut Vec<u8>, position: Position) {
    bytes.extend_from_slice(&position.generation.0.to_le_bytes());
    bytes.extend_from_slice(&position.epoch.0.to_le_bytes());
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Flaw> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Flaw::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Flaw> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Flaw::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn word(&mut self) -> Result<u64, Flaw> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn position(&mut self) -> Result<Position, Flaw> {
        Ok(Position { generation: Generation(self.word()?), epoch: Epoch(self.word()?) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(generation: u64, epoch: u64) -> Position {
        Position { generation: Generation(generation), epoch: Epoch(epoch) }
    }

    /// The table of docs/formats/cache-segment.md, byte for byte.
    #[test]
    fn golden_bytes() {
        let group = GroupCursor {
            base: at(1, 5),
            held: at(1, 7),
            lost: Some(at(1, 8)),
            history: None,
            targets: [("site-b".to_owned(), at(1, 6))].into(),
        };
        let cursors = |group| Cursors {
            segment: 3,
            durable: 0x1000,
            groups: [(GroupId(*b"0123456789abcdef"), group)].into(),
        };
        assert_eq!(Cursors::decode(&golden(1, &[], CHECKSUM_1)), Ok(cursors(group.clone())));
        let bytes = golden(2, &[1, 0x77], CHECKSUM);
        let cursors = cursors(GroupCursor { history: Some((Generation(1), HistoryId(0x77))), ..group });
        assert_eq!(cursors.encode(), bytes);
        assert_eq!(Cursors::decode(&bytes), Ok(cursors));
        for cut in 0..bytes.len() {
            assert!(Cursors::decode(&bytes[..cut]).is_err());
        }
    }

    fn golden(version: u8, history: &[u64], checksum: u32) -> Vec<u8> {
        let mut bytes = b"SWCURSOR".to_vec();
        bytes.extend_from_slice(&[version, 0, 0, 0, 0, 0, 0, 0]);
        for word in [3u64, 0x1000, 1] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(b"0123456789abcdef");
        for word in [1u64, 5, 1, 7, 1, 8].iter().chain(history).chain(&[1]) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(b"\x06site-b\x01\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0");
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    const CHECKSUM_1: u32 = 0x3659_ee64;
    const CHECKSUM: u32 = 0x8df3_ee18;

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Cursors::decode(&bytes);
            if bytes.len() > 60 {
                bytes[..10].copy_from_slice(b"SWCURSOR\x02\0");
                let end = bytes.len() - 4;
                let checksum = crc32c::crc32c(&bytes[..end]);
                bytes[end..].copy_from_slice(&checksum.to_le_bytes());
                let _ = Cursors::decode(&bytes);
            }
        }
    }
}
