//! A volume's newest state: a sparse raw file, or a block device that the operator named.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use durable::{OpenMode, Storage, StorageFile};

use crate::delta::{Change, Content};
use crate::error::Context;
use crate::{IMAGE_BATCH_BYTES, ReplicaError, SLICES_MAX};

/// Where a volume's image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// In `replica.img`.
    File = 0,
    /// On a block device that the operator named.
    Device = 1,
}

impl Place {
    pub(crate) fn from_byte(byte: u8) -> Option<Place> {
        match byte {
            0 => Some(Place::File),
            1 => Some(Place::Device),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Image {
    file: Arc<dyn StorageFile>,
    pub(crate) path: PathBuf,
    pub(crate) place: Place,
}

impl Image {
    pub(crate) fn open(storage: &dyn Storage, path: &Path, place: Place) -> Result<Image, ReplicaError> {
        let file = storage.open(path, OpenMode::ReadWrite).context("open replica image", path)?;
        Ok(Image { file, path: path.to_owned(), place })
    }

    /// An empty file image of a volume that the replica does not have, durable by name. What an unfinished apply left
    /// there is dropped.
    pub(crate) fn create(storage: &dyn Storage, path: &Path) -> Result<Image, ReplicaError> {
        let dir = path.parent().expect("an image lies in a directory");
        storage.create_dir_all(dir).context("create directory", dir)?;
        let file = storage.open(path, OpenMode::CreateOrOpen).context("create replica image", path)?;
        file.set_len(0).context("cut replica image", path)?;
        storage.sync_dir(dir).context("sync directory", dir)?;
        Ok(Image { file, path: path.to_owned(), place: Place::File })
    }

    pub(crate) fn len(&self) -> Result<u64, ReplicaError> {
        self.file.len().context("measure replica image", &self.path)
    }

    /// Makes room for a volume that had `before` bytes and has `size`: what is new reads as zeroes. A new volume's
    /// device is left as it is: the epochs before its first point write all of it.
    pub(crate) fn grow(&self, before: Option<u64>, size: u64) -> Result<(), ReplicaError> {
        match (self.place, before) {
            (Place::File, _) if self.len()? < size => {
                self.file.set_len(size).context("extend replica image", &self.path)
            }
            (Place::Device, Some(before)) if before < size => {
                self.zero(before, size - before, &mut DataCursor::default())
            }
            _ => Ok(()),
        }
    }

    /// Cuts a file image that is longer than `size`.
    pub(crate) fn cut(&self, size: u64) -> Result<(), ReplicaError> {
        if self.place == Place::File && self.len()? > size {
            self.file.set_len(size).context("cut replica image", &self.path)?;
        }
        Ok(())
    }

    /// Fills the buffer; what lies past the image's end reads as zeroes.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), ReplicaError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match self.file.read_at(&mut buffer[done..], at).context("read replica image", &self.path)? {
                0 => {
                    buffer[done..].fill(0);
                    break;
                }
                count => done += count,
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, data: &[u8], offset: u64) -> Result<(), ReplicaError> {
        self.file.write_all_at(data, offset).context("write replica image", &self.path)
    }

    /// Makes a range read as zeroes. Costs nothing where a file has holes.
    pub(crate) fn zero(&self, start: u64, length: u64, cursor: &mut DataCursor) -> Result<(), ReplicaError> {
        match cursor.data(self, start)? {
            Some((data, _)) if data < start + length => {
                let data = data.max(start);
                self.file.zero_range(data, start + length - data).context("zero replica image", &self.path)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>, ReplicaError> {
        self.file.next_data(offset).context("find data in replica image", &self.path)
    }

    /// Writes changes, sorted and disjoint; data that is adjacent goes in one call.
    pub(crate) fn write_changes(&self, changes: &[Change<'_>]) -> Result<(), ReplicaError> {
        let mut slices: Vec<IoSlice<'_>> = Vec::new();
        let (mut start, mut length) = (0, 0_u64);
        // What is written here lies behind the cursor, so its answers stay right.
        let mut cursor = DataCursor::default();
        for change in changes {
            match change.content {
                Content::Zeroes => self.zero(change.start, change.length, &mut cursor)?,
                Content::Data(data) => {
                    let full = slices.len() == SLICES_MAX || length >= IMAGE_BATCH_BYTES.0;
                    if full || start + length != change.start {
                        self.write_slices(&slices, start)?;
                        slices.clear();
                        (start, length) = (change.start, 0);
                    }
                    slices.push(IoSlice::new(data));
                    length += data.len() as u64;
                }
            }
        }
        self.write_slices(&slices, start)
    }

    fn write_slices(&self, slices: &[IoSlice<'_>], offset: u64) -> Result<(), ReplicaError> {
        if slices.is_empty() {
            return Ok(());
        }
        self.file.write_all_vectored_at(slices, offset).context("write replica image", &self.path)
    }

    pub(crate) fn sync(&self) -> Result<(), ReplicaError> {
        self.file.sync_data().context("sync replica image", &self.path)
    }
}

/// What an image holds from a place on, up to an end.
pub(crate) enum Segment {
    Zeroes(u64),
    Data(u64),
}

/// Remembers the last answer about an image's holes. Finding one may cost the file system a walk over all that
/// follows, so a caller that goes forwards asks once for each stretch of data and not for each extent.
#[derive(Debug, Default)]
pub(crate) struct DataCursor {
    /// From where the answer holds, and the answer.
    known: Option<(u64, Option<(u64, u64)>)>,
}

impl DataCursor {
    /// The first range that may hold data and ends after `at`.
    pub(crate) fn data(&mut self, image: &Image, at: u64) -> Result<Option<(u64, u64)>, ReplicaError> {
        match self.known {
            Some((from, answer)) if at >= from && answer.is_none_or(|(_, end)| at < end) => Ok(answer),
            _ => {
                let answer = image.next_data(at)?;
                self.known = Some((at, answer));
                Ok(answer)
            }
        }
    }

    pub(crate) fn segment(&mut self, image: &Image, at: u64) -> Result<Segment, ReplicaError> {
        Ok(match self.data(image, at)? {
            None => Segment::Zeroes(u64::MAX),
            Some((start, _)) if at < start => Segment::Zeroes(start),
            Some((_, end)) => Segment::Data(end),
        })
    }
}
