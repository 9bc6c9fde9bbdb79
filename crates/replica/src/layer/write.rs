//! Writing a layer.

use std::io::IoSlice;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BLOCK_BYTES, SECTOR_BYTES};
use durable::{OpenMode, Storage, StorageFile};

use super::format::{self, Header, Meta};
use super::index::{ENTRY_BYTES, Entry, Index};
use super::{Layer, TEMPORARY_SUFFIX};
use crate::bytes::is_zero;
use crate::error::Context;
use crate::image::{DataCursor, Image, Segment};
use crate::{LAYER_BATCH_BYTES, LAYER_SPLITS_MAX, RUN_BYTES_MAX, ReplicaError, SLICES_MAX, SPARE_BYTES_MAX};

/// What is used for one layer after another.
#[derive(Default)]
pub(crate) struct Scratch {
    buffer: Vec<u8>,
    /// A file that is a layer no more. Writing over it spares the medium to find new blocks, and the kernel new pages.
    spare: Option<PathBuf>,
}

impl Scratch {
    /// Takes the file of a layer that nobody needs any more, to be written over. `false` when there is one already,
    /// or the file is too large to be kept for nothing.
    ///
    /// The state must say, durably, that it is before the floor: after a crash it is found under either name, and
    /// removed under both.
    pub(crate) fn keep_spare(&mut self, storage: &dyn Storage, layer: &Path) -> std::io::Result<bool> {
        if self.spare.is_some() || storage.open(layer, OpenMode::Read)?.len()? > SPARE_BYTES_MAX.0 {
            return Ok(false);
        }
        let path = layer.with_file_name(SPARE_NAME);
        storage.rename(layer, &path)?;
        self.spare = Some(path);
        Ok(true)
    }
}

/// Carries the suffix of what opening removes.
const SPARE_NAME: &str = "spare.new";

/// A layer that is being written, beside its name.
pub(crate) struct LayerWriter<'a> {
    storage: &'a dyn Storage,
    path: PathBuf,
    temporary: PathBuf,
    file: Arc<dyn StorageFile>,
    meta: Meta,
    note_bytes: usize,
    /// Where the next data goes.
    position: u64,
    entries: Vec<Entry>,
    counts: Box<[u64]>,
    volume: usize,
    buffer: &'a mut [u8],
    used: usize,
    /// What of the buffer is to be written; zeroes between are not.
    slices: Vec<Range<usize>>,
}

impl<'a> LayerWriter<'a> {
    /// Begins the layer of the epoch that `meta` names.
    pub(crate) fn create(
        storage: &'a dyn Storage,
        dir: &Path,
        meta: Meta,
        scratch: &'a mut Scratch,
    ) -> Result<LayerWriter<'a>, ReplicaError> {
        let path = dir.join(format::file_name(meta.epoch));
        let mut temporary = path.clone().into_os_string();
        temporary.push(TEMPORARY_SUFFIX);
        let temporary = PathBuf::from(temporary);
        if let Some(spare) = scratch.spare.take() {
            storage.rename(&spare, &temporary).context("reuse undo layer", &spare)?;
        }
        let file =
            storage.open(&temporary, OpenMode::CreateOrOpen).context("create undo layer", &temporary)?;
        scratch.buffer.resize(LAYER_BATCH_BYTES.0 as usize, 0);
        let note_bytes = changeset::encode_note(&meta.note).len();
        Ok(LayerWriter {
            storage,
            path,
            temporary,
            file,
            position: format::data_position(meta.volumes.len(), note_bytes),
            note_bytes,
            entries: Vec::new(),
            counts: vec![0; meta.volumes.len()].into(),
            meta,
            volume: 0,
            buffer: &mut scratch.buffer,
            used: 0,
            slices: Vec::new(),
        })
    }

    /// Keeps what the image holds in a range of a volume. Volumes come in the order of the table, ranges in order.
    pub(crate) fn keep(
        &mut self,
        volume: usize,
        range: Range<u64>,
        image: &Image,
        cursor: &mut DataCursor,
    ) -> Result<(), ReplicaError> {
        debug_assert!(volume >= self.volume, "volumes come in order");
        self.volume = volume;
        let mut at = range.start;
        while at < range.end {
            match cursor.segment(image, at)? {
                Segment::Zeroes(end) => {
                    let end = end.min(range.end);
                    self.push_zeroes(at, end - at);
                    at = end;
                }
                Segment::Data(end) => {
                    let end = end.min(range.end);
                    self.keep_data(at..end, image)?;
                    at = end;
                }
            }
        }
        Ok(())
    }

    fn keep_data(&mut self, range: Range<u64>, image: &Image) -> Result<(), ReplicaError> {
        let mut at = range.start;
        while at < range.end {
            if self.buffer.len() - self.used < RUN_BYTES_MAX.0 as usize {
                self.flush()?;
            }
            let space = (self.buffer.len() - self.used) as u64;
            let mut end = range.end.min(at + space);
            if end < range.end {
                // Not within a run: a short one would cost an entry more.
                end = (at + 1).max(end / RUN_BYTES_MAX.0 * RUN_BYTES_MAX.0);
            }
            let from = self.used;
            self.used += (end - at) as usize;
            image.read(&mut self.buffer[from..self.used], at)?;
            let mut start = at;
            while start < end {
                let run_end = end.min((start / RUN_BYTES_MAX.0 + 1) * RUN_BYTES_MAX.0);
                self.keep_run(start..run_end, from + (start - at) as usize);
                start = run_end;
            }
            at = end;
        }
        Ok(())
    }

    /// Stores a run of the buffer, blocks of zeroes without their data.
    fn keep_run(&mut self, range: Range<u64>, from: usize) {
        let split = self.entries.len() < LAYER_SPLITS_MAX;
        if !split {
            let data = &self.buffer[from..from + (range.end - range.start) as usize];
            match is_zero(data) {
                true => self.push_zeroes(range.start, range.end - range.start),
                false => self.push_data(range, from),
            }
            return;
        }
        let mut data_start = range.start;
        let mut at = range.start;
        let slice = |at: u64| from + (at - range.start) as usize;
        while at < range.end {
            let next = range.end.min((at / BLOCK_BYTES + 1) * BLOCK_BYTES);
            if is_zero(&self.buffer[slice(at)..slice(next)]) {
                if data_start < at {
                    self.push_data(data_start..at, slice(data_start));
                }
                self.push_zeroes(at, next - at);
                data_start = next;
            }
            at = next;
        }
        if data_start < range.end {
            self.push_data(data_start..range.end, slice(data_start));
        }
    }

    fn push_data(&mut self, range: Range<u64>, from: usize) {
        let length = (range.end - range.start) as usize;
        let crc = crc32c::crc32c(&self.buffer[from..from + length]);
        self.entries.push(Entry {
            start_sector: range.start / SECTOR_BYTES,
            position: self.position,
            sectors: (length as u64 / SECTOR_BYTES) as u32,
            crc,
        });
        self.counts[self.volume] += 1;
        self.position += length as u64;
        match self.slices.last_mut() {
            Some(last) if last.end == from => last.end += length,
            _ => self.slices.push(from..from + length),
        }
    }

    fn push_zeroes(&mut self, start: u64, length: u64) {
        let (mut start, mut sectors) = (start / SECTOR_BYTES, length / SECTOR_BYTES);
        if let Some(last) = self.entries.last_mut()
            && self.counts[self.volume] > 0
            && last.is_zeroes()
            && last.start_sector + u64::from(last.sectors) == start
        {
            let more = sectors.min(u64::from(u32::MAX - last.sectors));
            last.sectors += more as u32;
            start += more;
            sectors -= more;
        }
        while sectors > 0 {
            let part = sectors.min(u32::MAX.into());
            self.entries.push(Entry::zeroes(start, part as u32));
            self.counts[self.volume] += 1;
            start += part;
            sectors -= part;
        }
    }

    fn flush(&mut self) -> Result<(), ReplicaError> {
        let bytes: usize = self.slices.iter().map(Range::len).sum();
        let mut at = self.position - bytes as u64;
        for slices in self.slices.chunks(SLICES_MAX) {
            let slices: Vec<IoSlice> =
                slices.iter().map(|slice| IoSlice::new(&self.buffer[slice.clone()])).collect();
            self.file.write_all_vectored_at(&slices, at).context("write undo layer", &self.temporary)?;
            at += slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        }
        self.slices.clear();
        self.used = 0;
        Ok(())
    }

    /// Removes what was written.
    pub(crate) fn abandon(&self) {
        if let Err(error) = self.storage.remove(&self.temporary)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.temporary.display(), %error, "remove unfinished undo layer");
        }
    }

    /// Completes the layer: when this returns it is durable under its name.
    ///
    /// The order, and what breaks when it is changed:
    /// 1. data, index and header are written beside the name;
    /// 2. they are made durable (else the name could lead to a torn layer, which is taken for damage);
    /// 3. the file takes its name in one step;
    /// 4. the name is made durable (else the images could be changed without a way back).
    pub(crate) fn finish(&mut self) -> Result<(Layer, Arc<Index>), ReplicaError> {
        self.flush()?;
        let mut index = vec![0; self.entries.len() * ENTRY_BYTES];
        for (bytes, entry) in index.chunks_exact_mut(ENTRY_BYTES).zip(&self.entries) {
            entry.encode(bytes);
        }
        let header = Header {
            data_bytes: self.position - format::data_position(self.meta.volumes.len(), self.note_bytes),
            note_bytes: self.note_bytes,
            entries: self.counts.clone(),
            index_crc: crc32c::crc32c(&index),
            file_bytes: self.position + index.len() as u64,
            meta: self.meta.clone(),
        };
        let head = header.encode();
        let gap = vec![0; header.data_position() as usize - head.len()];
        self.file.write_all_at(&index, self.position).context("write undo layer index", &self.temporary)?;
        self.file
            .write_all_vectored_at(&[IoSlice::new(&head), IoSlice::new(&gap)], 0)
            .context("write undo layer header", &self.temporary)?;
        if self.file.len().context("measure undo layer", &self.temporary)? != header.file_bytes {
            self.file.set_len(header.file_bytes).context("cut undo layer", &self.temporary)?;
        }
        self.file.sync_data().context("sync undo layer", &self.temporary)?;
        self.storage.rename(&self.temporary, &self.path).context("name undo layer", &self.path)?;
        let dir = self.path.parent().expect("a layer lies in a directory");
        self.storage.sync_dir(dir).context("sync directory", dir)?;
        let index = Arc::new(Index::new(&header, std::mem::take(&mut self.entries)));
        Ok((Layer::new(header, self.path.clone(), Arc::downgrade(&index)), index))
    }
}
