//! Making spans.

use std::collections::BTreeSet;
use std::sync::Arc;

use block::{Epoch, VolumeId};
use changeset::VOLUMES_MAX;
use durable::OpenMode;

use super::format::{SECTORS_MAX, SpanHeader, SpanRecord, file_name};
use super::{Span, length};
use crate::error::Context;
use crate::layer::TEMPORARY_SUFFIX;
use crate::segment::{Segment, joined};
use crate::shared::{Core, Shared, Stretch};
use crate::sweep::Sweep;
use crate::tree::TreeWriter;
use crate::{Pace, ReplicaError, SPAN_LEVELS};

/// Remembers up to where each level was looked after, so that finding the next span to build costs nothing.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    done: [Epoch; SPAN_LEVELS as usize],
}

/// A span that is to be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) first: Epoch,
    pub(crate) level: u32,
}

impl Builder {
    /// The next span that is wanted and not there, lower levels first: they are what the higher are made of.
    pub(crate) fn next(&mut self, shared: &Shared) -> Option<Needed> {
        for level in 1..=SPAN_LEVELS {
            let epochs = length(level);
            let done = &mut self.done[level as usize - 1];
            // A view at the floor looks at what comes after it.
            *done = Epoch(done.0.max(shared.floor.0 / epochs * epochs));
            while done.0 + epochs <= shared.applied.0 {
                let first = done.next();
                let useful = shared.floor > Epoch::NONE && first > shared.floor;
                if useful && !shared.spans.contains_key(&(first, level)) && shared.wants_span(first, level) {
                    return Some(Needed { first, level });
                }
                *done = Epoch(done.0 + epochs);
            }
        }
        None
    }

    /// Passes over a span that was built, or cannot be.
    pub(crate) fn pass(&mut self, span: Needed) {
        let done = &mut self.done[span.level as usize - 1];
        *done = Epoch(done.0.max(span.first.0 + length(span.level) - 1));
    }

    /// Looks after everything again: something was removed.
    pub(crate) fn look_again(&mut self) {
        *self = Builder::default();
    }
}

/// Builds a span and puts it into the list. `false` when it cannot be built from what there is: a layer of it is damaged, so that
/// no view can need it, or it would have too many volumes.
///
/// # Errors
/// When storage fails, or the pace says stop. Nothing is left then.
pub(crate) fn build(core: &Core, needed: Needed, pace: &Pace) -> Result<bool, ReplicaError> {
    let Needed { first, level } = needed;
    let last = Epoch(first.0 + length(level) - 1);
    let (generation, parts) = {
        let shared = core.shared.read();
        let Some(generation) = shared.generation else { return Ok(false) };
        (generation, shared.stretch(Epoch(first.0 - 1), last, level - 1))
    };
    let mut volumes = BTreeSet::new();
    for part in &parts {
        match part {
            Stretch::Layer(layer) if layer.damage().is_some() => return Ok(false),
            Stretch::Layer(layer) => {
                volumes.extend(layer.header.trees().filter(|(_, tree)| tree.records > 0).map(|(id, _)| id));
            }
            Stretch::Span(span) => {
                volumes.extend(span.header(|| core.span_handle(span))?.volumes.iter().map(|(id, _)| *id));
            }
        }
    }
    if volumes.len() > VOLUMES_MAX {
        return Ok(false);
    }
    let mut header = SpanHeader {
        group: core.group,
        generation,
        first,
        last,
        volumes: volumes.iter().map(|volume| (*volume, 0)).collect(),
        index_crc: 0,
    };
    // Twice: how many records there will be decides where they lie.
    for number in 0..header.volumes.len() {
        let volume = header.volumes[number].0;
        for segment in merged(core, &parts, volume)? {
            segment?;
            header.volumes[number].1 += 1;
        }
    }
    let path = core.spans_dir().join(file_name(first, last));
    let mut temporary = path.clone().into_os_string();
    temporary.push(TEMPORARY_SUFFIX);
    let temporary = std::path::PathBuf::from(temporary);
    let mut write = || -> Result<(), ReplicaError> {
        let file =
            core.storage.open(&temporary, OpenMode::CreateOrOpen).context("create span", &temporary)?;
        file.set_len(0).context("cut span", &temporary)?;
        let mut sink = |position: u64, bytes: &[u8]| {
            pace.spend(bytes.len() as u64)?;
            file.write_all_at(bytes, position).context("write span", &temporary)
        };
        let trees: Vec<_> = header.trees().collect();
        for (volume, shape) in trees {
            let mut tree = TreeWriter::new::<SpanRecord>(&shape);
            for segment in merged(core, &parts, volume)? {
                tree.push(&SpanRecord::of(&segment?, first), &mut sink)?;
            }
            let crc = tree.finish(&mut sink)?;
            header.index_crc = crc32c::crc32c_append(header.index_crc, &crc.to_le_bytes());
        }
        sink(0, &header.encode())?;
        file.sync_data().context("sync span", &temporary)?;
        core.storage.rename(&temporary, &path).context("name span", &path)
    };
    if let Err(error) = write() {
        // Derived, and removed when the replica is opened anyway.
        let _ = core.storage.remove(&temporary);
        return Err(error);
    }
    let mut shared = core.shared.write();
    shared.spans.insert((first, level), Arc::new(Span::new(first, level, path)));
    Ok(true)
}

/// What the parts say of a volume together.
fn merged(
    core: &Core,
    parts: &[Stretch],
    volume: VolumeId,
) -> Result<impl Iterator<Item = Result<Segment, ReplicaError>> + use<>, ReplicaError> {
    let mut lists = Vec::new();
    for part in parts {
        lists.extend(core.segments(part, volume)?);
    }
    Ok(joined(Sweep::new(lists), SECTORS_MAX))
}
