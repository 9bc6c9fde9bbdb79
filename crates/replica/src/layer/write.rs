//! Writing a layer.

use std::io::IoSlice;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BLOCK_BYTES, Epoch, SECTOR_BYTES};
use durable::{OpenMode, Storage, StorageFile};

use super::format::{self, Header, Meta};
use super::{Entry, Layer, TEMPORARY_SUFFIX};
use crate::bad::BadBlocks;
use crate::bytes::is_zero;
use crate::error::Context;
use crate::image::{DataCursor, Image, Segment};
use crate::tree::{Kind, TreeWriter};
use crate::{LAYER_BATCH_BYTES, LAYER_SPLITS_MAX, RUN_BYTES_MAX, ReplicaError, SLICES_MAX, SPARE_BYTES_MAX};

/// What is used for one layer after another.
#[derive(Default)]
pub(crate) struct Scratch {
    buffer: Vec<u8>,
    entries: Vec<Entry>,
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
    entries: &'a mut Vec<Entry>,
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
        let path = dir.join(format::file_name(Epoch(meta.epoch.0 - 1), meta.epoch));
        let temporary = temporary(&path);
        if let Some(spare) = scratch.spare.take() {
            storage.rename(&spare, &temporary).context("reuse undo layer", &spare)?;
        }
        let file =
            storage.open(&temporary, OpenMode::CreateOrOpen).context("create undo layer", &temporary)?;
        scratch.buffer.resize(LAYER_BATCH_BYTES.0 as usize, 0);
        scratch.entries.clear();
        let note_bytes = changeset::encode_note(&meta.note).len();
        Ok(LayerWriter {
            storage,
            path,
            temporary,
            file,
            position: format::data_position(meta.volumes.len(), note_bytes),
            note_bytes,
            entries: &mut scratch.entries,
            counts: vec![0; meta.volumes.len()].into(),
            meta,
            volume: 0,
            buffer: &mut scratch.buffer,
            used: 0,
            slices: Vec::new(),
        })
    }

    /// Keeps what the image holds in a range of a volume. Volumes come in the order of the table, ranges in order. What is kept of
    /// blocks that are known to be damaged is marked, so that no view takes it for what was.
    pub(crate) fn keep(
        &mut self,
        volume: usize,
        range: Range<u64>,
        image: &Image,
        cursor: &mut DataCursor,
        bad_blocks: Option<&BadBlocks>,
    ) -> Result<(), ReplicaError> {
        debug_assert!(volume >= self.volume, "volumes come in order");
        self.volume = volume;
        let mut at = range.start;
        for block in bad_blocks.into_iter().flat_map(|bad| bad.within(blocks(&range))) {
            let (start, end) = ((block * BLOCK_BYTES).max(at), ((block + 1) * BLOCK_BYTES).min(range.end));
            self.keep_sound(at..start, image, cursor)?;
            self.keep_bad(start..end, image)?;
            at = end;
        }
        self.keep_sound(at..range.end, image, cursor)
    }

    fn keep_bad(&mut self, range: Range<u64>, image: &Image) -> Result<(), ReplicaError> {
        self.flush()?;
        let length = (range.end - range.start) as usize;
        image.read(&mut self.buffer[..length], range.start)?;
        self.used = length;
        self.push_data(range, 0);
        if let Some(entry) = self.entries.last_mut() {
            entry.known_bad = true;
        }
        Ok(())
    }

    fn keep_sound(
        &mut self,
        range: Range<u64>,
        image: &Image,
        cursor: &mut DataCursor,
    ) -> Result<(), ReplicaError> {
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
            known_bad: false,
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
    pub(crate) fn finish(&mut self) -> Result<Layer, ReplicaError> {
        self.flush()?;
        let mut header = Header {
            back: Epoch(self.meta.epoch.0 - 1),
            gone: Box::default(),
            data_bytes: self.position - format::data_position(self.meta.volumes.len(), self.note_bytes),
            note_bytes: self.note_bytes,
            entries: self.counts.clone(),
            index_crc: 0,
            file_bytes: 0,
            kind: Kind::Paged,
            meta: self.meta.clone(),
        };
        let mut index = Vec::new();
        let mut first = 0;
        let trees: Vec<_> = header.trees().filter(|(_, shape)| shape.records > 0).collect();
        for (_, shape) in trees {
            let base = index.len();
            index.resize(base + shape.bytes::<Entry>() as usize, 0);
            let mut tree = TreeWriter::new::<Entry>(&shape);
            let mut sink = |position: u64, bytes: &[u8]| {
                let at = base + (position - shape.base) as usize;
                index[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            };
            for entry in &self.entries[first..first + shape.records as usize] {
                tree.push(entry, &mut sink)?;
            }
            let crc = tree.finish(&mut sink)?;
            header.index_crc = crc32c::crc32c_append(header.index_crc, &crc.to_le_bytes());
            first += shape.records as usize;
        }
        header.file_bytes = self.position + index.len() as u64;
        self.file.write_all_at(&index, self.position).context("write undo layer index", &self.temporary)?;
        seal(&*self.file, &header, &self.temporary)?;
        self.storage.rename(&self.temporary, &self.path).context("name undo layer", &self.path)?;
        let dir = self.path.parent().expect("a layer lies in a directory");
        self.storage.sync_dir(dir).context("sync directory", dir)?;
        Ok(Layer::new(header, self.path.clone()))
    }
}

/// The blocks that a range of bytes touches.
pub(crate) fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

/// What a file is called until it is complete.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let mut temporary = path.to_owned().into_os_string();
    temporary.push(TEMPORARY_SUFFIX);
    PathBuf::from(temporary)
}

/// Gives a layer whose data and index were written its header, and makes it durable.
pub(super) fn seal(file: &dyn StorageFile, header: &Header, temporary: &Path) -> Result<(), ReplicaError> {
    let head = header.encode();
    let gap = vec![0; header.data_position() as usize - head.len()];
    file.write_all_vectored_at(&[IoSlice::new(&head), IoSlice::new(&gap)], 0)
        .context("write undo layer header", temporary)?;
    if file.len().context("measure undo layer", temporary)? != header.file_bytes {
        file.set_len(header.file_bytes).context("cut undo layer", temporary)?;
    }
    file.sync_data().context("sync undo layer", temporary)
}
