//! Several successive layers as one, in constant memory.
//!
//! The merged layer leads from the state after the newest back to the state that the oldest leads to: for a block in several, the
//! oldest's content is the one. It is written beside its own name, which no other layer has, so nothing that is in use is touched.
//! How many entries and how much data there will be is found by a walk over the indexes first; then data and index are
//! written in one pass.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{ByteCount, Epoch, SECTOR_BYTES, VolumeId};
use changeset::{VOLUMES_MAX, VolumeInfo};
use durable::{OpenMode, Storage, StorageFile};

use super::format::{self, Header, Meta};
use super::write::{seal, temporary};
use super::{Entry, Layer, check_run};
use crate::error::Context;
use crate::sweep::{Piece, Sweep};
use crate::tree::{Kind, TreeWriter};
use crate::{LAYER_BATCH_BYTES, MERGE_SYNC_BYTES, MERGE_WINDOW_BYTES, Pace, ReplicaError};

/// A part of an entry of one of the layers.
#[derive(Clone, Copy)]
struct Part {
    layer: usize,
    entry: Entry,
    start: u64,
    end: u64,
}

impl Piece for Part {
    fn start(&self) -> u64 {
        self.start
    }

    fn end(&self) -> u64 {
        self.end
    }

    fn cut(&self, start: u64, end: u64) -> Part {
        Part { start, end, ..*self }
    }
}

/// One of the layers, with what was last read of it.
struct Input<'a> {
    layer: &'a Layer,
    file: Arc<dyn StorageFile>,
    window: Vec<u8>,
    window_at: u64,
}

impl Input<'_> {
    /// The data of an entry, checked.
    fn data(&mut self, entry: &Entry, pace: &Pace) -> Result<&[u8], ReplicaError> {
        let (start, length) = (entry.position, entry.length());
        let end = start + length;
        if start < self.window_at || end > self.window_at + self.window.len() as u64 {
            let all = self.layer.header.index_position();
            let window = MERGE_WINDOW_BYTES.0.max(length).min(all - start);
            self.window.resize(window as usize, 0);
            self.window_at = start;
            pace.spend(window)?;
            self.file.read_exact_at(&mut self.window, start).context("read undo layer", &self.layer.path)?;
        }
        let from = (start - self.window_at) as usize;
        let data = &self.window[from..from + length as usize];
        check_run(entry, data, &self.layer.path)?;
        Ok(data)
    }
}

/// A merged layer that is durable and has no name yet.
pub(crate) struct Merged {
    pub(crate) header: Header,
    temporary: PathBuf,
    path: PathBuf,
}

impl Merged {
    /// Removes it.
    pub(crate) fn abandon(&self, storage: &dyn Storage) {
        if let Err(error) = storage.remove(&self.temporary)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.temporary.display(), %error, "remove unfinished undo layer");
        }
    }

    /// Gives it its name, which is durable when the directory is. After an error it is gone.
    pub(crate) fn name(self, storage: &dyn Storage) -> Result<Layer, ReplicaError> {
        if let Err(error) = storage.rename(&self.temporary, &self.path) {
            self.abandon(storage);
            return Err(ReplicaError::io("name undo layer", &self.path, error));
        }
        Ok(Layer::new(self.header, self.path))
    }
}

/// Merges successive layers, oldest first, into one that is durable beside its name when this returns. `None` when their
/// volumes together are more than a layer can have. The layers stay: who takes the new one for them removes them then.
///
/// # Errors
/// When storage fails, a layer is damaged, or the pace says stop. Nothing is left then.
pub(crate) fn merge(
    storage: &dyn Storage,
    dir: &Path,
    layers: &[Arc<Layer>],
    pace: &Pace,
) -> Result<Option<Merged>, ReplicaError> {
    let (Some(first), Some(last)) = (layers.first(), layers.last()) else { return Ok(None) };
    debug_assert!(layers.windows(2).all(|pair| pair[0].epoch() == pair[1].back()), "successive");
    let mut inputs = Vec::with_capacity(layers.len());
    for layer in layers {
        let file = storage.open(&layer.path, OpenMode::Read).context("open undo layer", &layer.path)?;
        layer.check_unread(&*file)?;
        inputs.push(Input { layer, file, window: Vec::new(), window_at: 0 });
    }
    let Some(header) = plan(&inputs, first.back(), &last.header.meta)? else { return Ok(None) };
    let path = dir.join(format::file_name(header.back, header.meta.epoch));
    let temporary = temporary(&path);
    let mut merged = Merged { header, temporary, path };
    let written = write(storage, &mut inputs, &mut merged.header, &merged.temporary, pace)
        .and_then(|file| seal(&*file, &merged.header, &merged.temporary));
    if let Err(error) = written {
        merged.abandon(storage);
        return Err(error);
    }
    Ok(Some(merged))
}

fn parts(inputs: &[Input<'_>], volume: VolumeId) -> impl Iterator<Item = Result<Part, ReplicaError>> + use<> {
    let list = |(layer, input): (usize, &Input<'_>)| {
        let stream = input.layer.entries(volume, input.file.clone());
        stream.map(move |entry| {
            let entry = entry?;
            let start = entry.start_sector;
            Ok(Part { layer, entry, start, end: start + u64::from(entry.sectors) })
        })
    };
    Sweep::new(inputs.iter().enumerate().map(list).collect())
}

/// What the merged layer's header will say, but for the checksum of its index.
fn plan(inputs: &[Input<'_>], back: Epoch, last: &Meta) -> Result<Option<Header>, ReplicaError> {
    let mut known: HashSet<VolumeId> = last.volumes.iter().map(|info| info.id).collect();
    let mut gone: Vec<VolumeInfo> = Vec::new();
    for input in inputs.iter().rev() {
        let header = &input.layer.header;
        for (info, entries) in header.rows().zip(&header.entries) {
            if *entries > 0 && known.insert(info.id) {
                gone.push(info.clone());
            }
        }
    }
    if known.len() > VOLUMES_MAX {
        return Ok(None);
    }
    let sum = |of: fn(&Meta) -> ByteCount| -> ByteCount {
        inputs.iter().map(|input| of(&input.layer.header.meta)).sum()
    };
    let meta = Meta { written: sum(|meta| meta.written), zeroed: sum(|meta| meta.zeroed), ..last.clone() };
    let mut header = Header {
        back,
        entries: vec![0; meta.volumes.len() + gone.len()].into(),
        gone: gone.into(),
        data_bytes: 0,
        index_crc: 0,
        file_bytes: 0,
        note_bytes: changeset::encode_note(&meta.note).len(),
        kind: Kind::Paged,
        meta,
    };
    let volumes: Vec<VolumeId> = header.rows().map(|info| info.id).collect();
    for (number, volume) in volumes.into_iter().enumerate() {
        for part in parts(inputs, volume) {
            let part = part?;
            header.entries[number] += 1;
            if !part.entry.is_zeroes() {
                header.data_bytes += (part.end - part.start) * SECTOR_BYTES;
            }
        }
    }
    let index: u64 = header.trees().map(|(_, shape)| shape.bytes::<Entry>()).sum();
    header.file_bytes = header.index_position() + index;
    Ok(Some(header))
}

/// Writes data and index.
fn write(
    storage: &dyn Storage,
    inputs: &mut [Input<'_>],
    header: &mut Header,
    temporary: &Path,
    pace: &Pace,
) -> Result<Arc<dyn StorageFile>, ReplicaError> {
    let file = storage.open(temporary, OpenMode::CreateOrOpen).context("create undo layer", temporary)?;
    let mut out = Output { file: &*file, path: temporary, pace, unsynced: 0 };
    let mut buffer: Vec<u8> = Vec::new();
    let mut position = header.data_position();
    let trees: Vec<_> = header.trees().collect();
    for (volume, shape) in trees {
        if shape.records == 0 {
            continue;
        }
        let mut tree = TreeWriter::new::<Entry>(&shape);
        for part in parts(inputs, volume) {
            let Part { layer, entry, start, end } = part?;
            // No longer than it was.
            let sectors = (end - start) as u32;
            let entry = if entry.is_zeroes() {
                Entry::zeroes(start, sectors)
            } else {
                let data = inputs[layer].data(&entry, pace)?;
                let from = ((start - entry.start_sector) * SECTOR_BYTES) as usize;
                let data = &data[from..from + sectors as usize * SECTOR_BYTES as usize];
                let crc = if sectors == entry.sectors { entry.crc } else { crc32c::crc32c(data) };
                let at = position + buffer.len() as u64;
                buffer.extend_from_slice(data);
                Entry { start_sector: start, position: at, sectors, crc, known_bad: entry.known_bad }
            };
            if buffer.len() as u64 >= LAYER_BATCH_BYTES.0 {
                out.write(position, &buffer)?;
                position += buffer.len() as u64;
                buffer.clear();
            }
            tree.push(&entry, &mut |position, bytes| out.write(position, bytes))?;
        }
        let crc = tree.finish(&mut |position, bytes| out.write(position, bytes))?;
        header.index_crc = crc32c::crc32c_append(header.index_crc, &crc.to_le_bytes());
    }
    out.write(position, &buffer)?;
    debug_assert_eq!(position + buffer.len() as u64, header.index_position());
    Ok(file)
}

struct Output<'a> {
    file: &'a dyn StorageFile,
    path: &'a Path,
    pace: &'a Pace,
    unsynced: u64,
}

impl Output<'_> {
    /// Syncs now and then, so that the last sync, during which others may have to wait for theirs, is short.
    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), ReplicaError> {
        self.pace.spend(bytes.len() as u64)?;
        self.file.write_all_at(bytes, position).context("write undo layer", self.path)?;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= MERGE_SYNC_BYTES.0 {
            self.file.sync_data().context("sync undo layer", self.path)?;
            self.unsynced = 0;
        }
        Ok(())
    }
}
