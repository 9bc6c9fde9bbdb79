//! What the layers after a point hold of a volume: a few sorted lists, the oldest first.

use std::sync::Arc;

use block::{Epoch, VolumeId};

use crate::layer::{Entry, Layer};
use crate::segment::{Segment, joined};
use crate::shared::{Core, Stretch};
use crate::span::{Span, SpanRecord};
use crate::sweep::{Piece, Sweep};
use crate::tree::{Cursor, Shape};
use crate::{ReplicaError, VIEW_SEGMENTS_MAX};

/// One list: in memory, or looked up in its file.
#[derive(Debug)]
pub(super) enum Part {
    Memory(Vec<Segment>),
    Layer(Arc<Layer>, Shape),
    Span(Arc<Span>, Shape),
}

/// A place in a part, that goes forwards.
pub(super) enum PartCursor<'a> {
    Memory(std::slice::Iter<'a, Segment>),
    Layer(&'a Layer, Cursor<Entry>),
    Span(&'a Span, Cursor<SpanRecord>),
}

impl Part {
    /// At the first segment that ends after sector `at`.
    pub(super) fn seek(&self, core: &Core, at: u64) -> Result<PartCursor<'_>, ReplicaError> {
        Ok(match self {
            Part::Memory(segments) => {
                let first = segments.partition_point(|segment| segment.end() <= at);
                PartCursor::Memory(segments[first..].iter())
            }
            Part::Layer(layer, shape) => {
                PartCursor::Layer(layer, Cursor::seek(shape, &core.source(layer.serial, &layer.path), at)?)
            }
            Part::Span(span, shape) => {
                PartCursor::Span(span, Cursor::seek(shape, &core.source(span.serial, &span.path), at)?)
            }
        })
    }

    fn in_memory(&self) -> Option<&Vec<Segment>> {
        match self {
            Part::Memory(segments) => Some(segments),
            _ => None,
        }
    }
}

impl PartCursor<'_> {
    pub(super) fn next(&mut self, core: &Core) -> Result<Option<Segment>, ReplicaError> {
        Ok(match self {
            PartCursor::Memory(segments) => segments.next().copied(),
            PartCursor::Layer(layer, cursor) => cursor
                .next(&core.source(layer.serial, &layer.path))?
                .map(|entry| Segment::of(&entry, layer.epoch())),
            PartCursor::Span(span, cursor) => {
                cursor.next(&core.source(span.serial, &span.path))?.map(|record| record.segment(span.first))
            }
        })
    }
}

/// Makes parts of a stretch. The smallest come into memory, as far as the budget of [`VIEW_SEGMENTS_MAX`] reaches, and those that
/// are neighbours become one; so where little has changed since the point, there is one part, in memory.
pub(super) fn assemble(
    core: &Core,
    volume: VolumeId,
    stretch: &[Stretch],
    budget: usize,
) -> Result<Vec<Arc<Part>>, ReplicaError> {
    let mut sizes = Vec::with_capacity(stretch.len());
    for part in stretch {
        sizes.push(core.segments_of(part, volume)?);
    }
    let mut by_size: Vec<usize> = (0..stretch.len()).filter(|index| sizes[*index] > 0).collect();
    by_size.sort_unstable_by_key(|index| sizes[*index]);
    let mut left = budget as u64;
    let mut into_memory = vec![false; stretch.len()];
    for index in by_size {
        let Some(rest) = left.checked_sub(sizes[index]) else { break };
        left = rest;
        into_memory[index] = true;
    }
    let mut parts = Vec::new();
    let mut lists = Vec::new();
    for (index, part) in stretch.iter().enumerate() {
        if sizes[index] == 0 {
            continue;
        }
        if into_memory[index] {
            lists.extend(core.segments(part, volume)?);
            continue;
        }
        push_memory(&mut parts, &mut lists)?;
        let shape = match part {
            Stretch::Layer(layer) => layer.header.tree(volume).map(|shape| Part::Layer(layer.clone(), shape)),
            Stretch::Span(span) => {
                span.tree(volume, || core.span_handle(span))?.map(|shape| Part::Span(span.clone(), shape))
            }
        };
        parts.extend(shape.map(Arc::new));
    }
    push_memory(&mut parts, &mut lists)?;
    Ok(parts)
}

fn push_memory(
    parts: &mut Vec<Arc<Part>>,
    lists: &mut Vec<crate::shared::SegmentList>,
) -> Result<(), ReplicaError> {
    if !lists.is_empty() {
        let segments = joined(Sweep::new(std::mem::take(lists)), u64::MAX);
        parts.push(Arc::new(Part::Memory(segments.collect::<Result<_, _>>()?)));
    }
    Ok(())
}

/// Adds the part of a layer that was applied since, joined with the one before where both are small and in memory.
pub(super) fn append(parts: &mut Vec<Arc<Part>>, added: Vec<Arc<Part>>) -> Result<(), ReplicaError> {
    for part in added {
        let small = |part: &Part| part.in_memory().is_some_and(|list| list.len() <= VIEW_SEGMENTS_MAX / 8);
        match parts.last() {
            Some(last) if small(last) && small(&part) => {
                let list = |part: &Part| {
                    let segments = part.in_memory().cloned().unwrap_or_default();
                    Box::new(segments.into_iter().map(Ok)) as crate::shared::SegmentList
                };
                let both = joined(Sweep::new(vec![list(last), list(&part)]), u64::MAX);
                let both = both.collect::<Result<_, _>>()?;
                parts.pop();
                parts.push(Arc::new(Part::Memory(both)));
            }
            _ => parts.push(part),
        }
    }
    Ok(())
}

/// The newest epoch of a list of layers and spans.
pub(super) fn newest(stretch: &[Stretch]) -> Option<Epoch> {
    stretch.last().map(|part| match part {
        Stretch::Layer(layer) => layer.epoch(),
        Stretch::Span(span) => span.last(),
    })
}
