//! Finding records in a tree, and reading it from one end to the other.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use durable::StorageFile;

use super::{CRC_BYTES, KEY_BYTES, Kind, Level, PAGE_BYTES, Place, Record, Shape, page_crc};
use crate::ReplicaError;
use crate::bytes::{get_u32, get_u64};
use crate::recent::Recent;

/// Pages read in one call when a tree is read from one end to the other.
const STREAM_PAGES: u64 = 16;

/// Pages in memory, by the serial number of their file and their place in it. They were checked.
pub(crate) type Pages = Recent<(u64, u64), Arc<[u8]>>;

/// A file whose trees are looked at.
pub(crate) trait Source {
    fn pages(&self) -> &Pages;
    fn serial(&self) -> u64;
    fn path(&self) -> &Path;
    fn open(&self) -> Result<Arc<dyn StorageFile>, ReplicaError>;
}

fn read(file: &dyn StorageFile, bytes: &mut [u8], position: u64, path: &Path) -> Result<(), ReplicaError> {
    file.read_exact_at(bytes, position).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => ReplicaError::corrupt(path, "cut short within its index"),
        _ => ReplicaError::io("read index", path, error),
    })
}

/// Checks a page's checksum, and gives what it holds.
fn checked<'a>(place: Place, bytes: &'a [u8], kind: Kind, path: &Path) -> Result<&'a [u8], ReplicaError> {
    if kind == Kind::Bare {
        return Ok(bytes);
    }
    let (items, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
    if page_crc(place.ordinal, items) != get_u32(crc, 0) {
        let problem =
            format!("checksum of the index page at byte {} does not match (damaged)", place.position);
        return Err(ReplicaError::corrupt(path, problem));
    }
    Ok(items)
}

/// Checks what a right checksum does not tell.
fn check_records<R: Record>(items: &[u8], shape: &Shape, path: &Path) -> Result<(), ReplicaError> {
    let mut end = 0;
    for record in items.chunks_exact(R::BYTES).map(R::decode) {
        if !record.is_valid(&shape.limits) || record.start() < end {
            let problem = format!("index entry at sector {} is out of range", record.start());
            return Err(ReplicaError::corrupt(path, problem));
        }
        end = record.end();
    }
    Ok(())
}

/// The last of `count` items whose key is at most `at`, or the first.
fn child(count: usize, at: u64, key: impl Fn(usize) -> u64) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        match key(middle) <= at {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    low.saturating_sub(1)
}

/// A place in a tree, that goes forwards.
pub(crate) struct Cursor<R> {
    leaves: Option<Level>,
    shape: Shape,
    /// The page at hand, and its number among the leaves.
    page: Arc<[u8]>,
    index: u64,
    item: usize,
    record: PhantomData<R>,
}

impl<R: Record> Cursor<R> {
    /// At the first record that ends after sector `at`.
    pub(crate) fn seek(shape: &Shape, source: &impl Source, at: u64) -> Result<Cursor<R>, ReplicaError> {
        let levels = shape.levels(R::BYTES);
        let mut cursor = Cursor {
            leaves: levels.first().copied(),
            shape: shape.clone(),
            page: Arc::default(),
            index: 0,
            item: 0,
            record: PhantomData,
        };
        let Some(leaves) = levels.first() else { return Ok(cursor) };
        match shape.kind {
            Kind::Paged => {
                for level in levels[1..].iter().rev() {
                    let page = cursor.load(source, *level, cursor.index)?;
                    let keys = page.len() / KEY_BYTES;
                    let below = child(keys, at, |item| get_u64(&page, item * KEY_BYTES)) as u64;
                    cursor.index = cursor.index * level.capacity() + below;
                }
            }
            Kind::Bare => {
                let (mut low, mut high) = (0, leaves.pages());
                while low < high {
                    let middle = low.midpoint(high);
                    let page = cursor.load(source, *leaves, middle)?;
                    match R::decode(&page[..R::BYTES]).start() <= at {
                        true => low = middle + 1,
                        false => high = middle,
                    }
                }
                cursor.index = low.saturating_sub(1);
            }
        }
        if cursor.index >= leaves.pages() {
            return Err(ReplicaError::corrupt(source.path(), "its index leads past its end"));
        }
        cursor.page = cursor.load(source, *leaves, cursor.index)?;
        let start = |item: usize| R::decode(&cursor.page[item * R::BYTES..][..R::BYTES]).start();
        cursor.item = child(cursor.page.len() / R::BYTES, at, start);
        while let Some(record) = cursor.peek(source)?
            && record.end() <= at
        {
            cursor.item += 1;
        }
        Ok(cursor)
    }

    /// The record at hand; `None` at the end.
    pub(crate) fn peek(&mut self, source: &impl Source) -> Result<Option<R>, ReplicaError> {
        let Some(leaves) = self.leaves else { return Ok(None) };
        if self.item * R::BYTES >= self.page.len() {
            if self.index + 1 >= leaves.pages() {
                return Ok(None);
            }
            self.index += 1;
            self.page = self.load(source, leaves, self.index)?;
            self.item = 0;
        }
        Ok(Some(R::decode(&self.page[self.item * R::BYTES..][..R::BYTES])))
    }

    /// The record at hand, and goes on to the next.
    pub(crate) fn next(&mut self, source: &impl Source) -> Result<Option<R>, ReplicaError> {
        let record = self.peek(source)?;
        self.item += usize::from(record.is_some());
        Ok(record)
    }

    fn load(&self, source: &impl Source, level: Level, index: u64) -> Result<Arc<[u8]>, ReplicaError> {
        let place = level.page(index);
        let key = (source.serial(), place.position);
        if let Some(page) = source.pages().get(&key) {
            return Ok(page);
        }
        let mut bytes = [0; PAGE_BYTES];
        let bytes = &mut bytes[..place.length];
        read(&*source.open()?, bytes, place.position, source.path())?;
        let items = checked(place, bytes, self.shape.kind, source.path())?;
        if self.leaves.is_some_and(|leaves| leaves.position == level.position) {
            check_records::<R>(items, &self.shape, source.path())?;
        }
        let page: Arc<[u8]> = items.into();
        source.pages().insert(key, page.clone());
        Ok(page)
    }
}

/// All records of a tree in order, in constant memory.
pub(crate) struct Stream<R> {
    file: Arc<dyn StorageFile>,
    path: PathBuf,
    leaves: Option<Level>,
    shape: Shape,
    buffer: Vec<u8>,
    /// Where in the buffer the next record is.
    at: usize,
    /// The next page to read.
    next: u64,
    end: u64,
    record: PhantomData<R>,
}

impl<R: Record> Stream<R> {
    pub(crate) fn new(shape: Shape, file: Arc<dyn StorageFile>, path: &Path) -> Stream<R> {
        let leaves = shape.levels(R::BYTES).first().copied();
        Stream {
            file,
            path: path.to_owned(),
            leaves,
            shape,
            buffer: Vec::new(),
            at: 0,
            next: 0,
            end: 0,
            record: PhantomData,
        }
    }

    fn fill(&mut self) -> Result<bool, ReplicaError> {
        let Some(leaves) = self.leaves.filter(|leaves| self.next < leaves.pages()) else { return Ok(false) };
        let last = (self.next + STREAM_PAGES).min(leaves.pages());
        let (first, end) = (leaves.page(self.next), leaves.page(last - 1));
        let mut bytes = vec![0; (end.position - first.position) as usize + end.length];
        read(&*self.file, &mut bytes, first.position, &self.path)?;
        self.buffer.clear();
        self.at = 0;
        for index in self.next..last {
            let place = leaves.page(index);
            let from = (place.position - first.position) as usize;
            let items = checked(place, &bytes[from..from + place.length], self.shape.kind, &self.path)?;
            check_records::<R>(items, &self.shape, &self.path)?;
            self.buffer.extend_from_slice(items);
        }
        self.next = last;
        Ok(true)
    }

    fn step(&mut self) -> Result<Option<R>, ReplicaError> {
        if self.at >= self.buffer.len() && !self.fill()? {
            return Ok(None);
        }
        let record = R::decode(&self.buffer[self.at..][..R::BYTES]);
        self.at += R::BYTES;
        if record.start() < self.end {
            let problem = format!("index entry at sector {} is out of order", record.start());
            return Err(ReplicaError::corrupt(&self.path, problem));
        }
        self.end = record.end();
        Ok(Some(record))
    }
}

impl<R: Record> Iterator for Stream<R> {
    type Item = Result<R, ReplicaError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// Reads every page of a tree, checks that the upper levels say what the lower ones are, and gives the checksum over
/// all pages' checksums, as the writer does.
pub(crate) fn check_whole<R: Record>(
    shape: &Shape,
    file: &Arc<dyn StorageFile>,
    path: &Path,
) -> Result<u32, ReplicaError> {
    for record in Stream::<R>::new(shape.clone(), file.clone(), path) {
        record?;
    }
    let mut crc = 0;
    let levels = shape.levels(R::BYTES);
    let mut bytes = [0; PAGE_BYTES];
    for (number, level) in levels.iter().enumerate() {
        let mut level_crc = 0;
        let above = levels.get(number + 1);
        for index in 0..level.pages() {
            let place = level.page(index);
            let page = &mut bytes[..place.length];
            read(&**file, page, place.position, path)?;
            checked(place, page, shape.kind, path)?;
            level_crc = crc32c::crc32c_append(level_crc, &page[place.length - CRC_BYTES..]);
            let first = match number {
                0 => R::decode(&page[..R::BYTES]).start(),
                _ => get_u64(page, 0),
            };
            if let Some(above) = above {
                let mut key = [0; KEY_BYTES];
                let (page, item) = (index / above.capacity(), index % above.capacity());
                read(&**file, &mut key, above.page(page).position + item * KEY_BYTES as u64, path)?;
                if u64::from_le_bytes(key) != first {
                    let problem = format!("its index does not lead to the page at byte {}", place.position);
                    return Err(ReplicaError::corrupt(path, problem));
                }
            }
        }
        crc = crc32c::crc32c_append(crc, &level_crc.to_le_bytes());
    }
    Ok(crc)
}
