//! What an epoch changes, as the replica works on it.

use std::ops::Range;

use block::{ByteCount, Consistency, PointNote, SECTOR_BYTES};
use changeset::{Stamp, VolumeInfo};

pub(crate) struct Delta<'a> {
    pub(crate) stamp: Stamp,
    pub(crate) note: PointNote,
    pub(crate) volumes: &'a [VolumeInfo],
    /// The changed volumes by index, in order, each with its changes.
    pub(crate) changes: Vec<(usize, Vec<Change<'a>>)>,
}

#[derive(Clone, Copy)]
pub(crate) struct Change<'a> {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) content: Content<'a>,
}

#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    Data(&'a [u8]),
    Zeroes,
}

impl Change<'_> {
    pub(crate) fn end(&self) -> u64 {
        self.start + self.length
    }
}

impl<'a> Delta<'a> {
    pub(crate) fn new(stamp: Stamp, volumes: &'a [VolumeInfo]) -> Delta<'a> {
        Delta { stamp, note: PointNote::default(), volumes, changes: Vec::new() }
    }

    /// Adds a change; refused, with the reason, when it is out of order or out of its volume.
    pub(crate) fn push(&mut self, volume: usize, change: Change<'a>) -> Result<(), String> {
        let Some(info) = self.volumes.get(volume) else {
            return Err(format!("a change names volume index {volume} of {}", self.volumes.len()));
        };
        let problem = |what: &str| {
            Err(format!(
                "a change of {} bytes at byte {} of {:?} {what}",
                change.length, change.start, info.name
            ))
        };
        let end = change.start.checked_add(change.length);
        if change.length == 0 || end.is_none_or(|end| end > info.size.0) {
            return problem("lies outside of the volume");
        }
        if !change.start.is_multiple_of(SECTOR_BYTES) || !change.length.is_multiple_of(SECTOR_BYTES) {
            return problem("is not of whole sectors");
        }
        let last = self.changes.last_mut();
        match last {
            Some((last, changes)) if *last == volume => {
                if changes.last().is_some_and(|last| last.end() > change.start) {
                    return problem("is out of order");
                }
                changes.push(change);
            }
            Some((last, _)) if *last > volume => return problem("is out of order"),
            _ => self.changes.push((volume, vec![change])),
        }
        Ok(())
    }

    /// The same changes, after which the disks are in no state that could be recovered.
    pub(crate) fn without_point(&self) -> Delta<'a> {
        let stamp = Stamp { consistency: Consistency::None, ..self.stamp };
        Delta { stamp, note: PointNote::default(), volumes: self.volumes, changes: self.changes.clone() }
    }

    pub(crate) fn written(&self) -> ByteCount {
        self.sum(|content| matches!(content, Content::Data(_)))
    }

    pub(crate) fn zeroed(&self) -> ByteCount {
        self.sum(|content| matches!(content, Content::Zeroes))
    }

    fn sum(&self, of: impl Fn(&Content<'_>) -> bool) -> ByteCount {
        let changes = self.changes.iter().flat_map(|(_, changes)| changes);
        ByteCount(changes.filter(|change| of(&change.content)).map(|change| change.length).sum())
    }
}

/// The ranges that changes cover, adjacent ones as one.
pub(crate) fn ranges(changes: &[Change<'_>]) -> impl Iterator<Item = Range<u64>> {
    let mut changes = changes.iter().peekable();
    std::iter::from_fn(move || {
        let first = changes.next()?;
        let mut end = first.end();
        while let Some(next) = changes.next_if(|next| next.start == end) {
            end = next.end();
        }
        Some(first.start..end)
    })
}
