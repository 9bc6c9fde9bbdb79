//! Failing over: the history goes on from an older point, in a new generation, and the old generation is fenced.
//!
//! What was after the point is not lost: going back is applied like any change, so its undo layers lead forward again, and every point
//! from before stays a point. Until it is committed it can be cancelled, which takes exactly these layers back.
//!
//! The order of [`GroupReplica::fail_over`], and what breaks when it is changed:
//! 1. the state names the new generation, the point and where the old generation ended, durably: from here on nothing of the old
//!    generation is taken (else what the old source still sends would land on top of what was chosen);
//! 2. what differs from the point is applied, in epochs that are no points, so that memory is bounded;
//! 3. the last of them is a point, and the replica is failed over.
//!
//! - Crash consistency: after 1 it is pending, and failing over to the same point again goes on: only what still differs is applied.
//!   Cancelling takes one epoch back at a time, as an epoch is taken back that found no space; a crash between leaves the epochs
//!   before it, and cancelling again goes on. The old generation is named again last.
//! - Consistency: while it is pending no points go, no layers are merged and no checksums are brought up to date, since all of that
//!   could reach over the place to which cancelling leads back.
//! - Retries: all of it may be asked again. A failure of storage poisons as it does while applying.
//! - Cancellation: none while it runs, but it may be cancelled when it has failed half-way.
//!
//! | at the same time | |
//! |---|---|
//! | apply | of any generation is refused until it is committed, and while it is promoted |
//! | views | go on; at a point of the new generation they keep it from being cancelled |
//! | thin, delete, scrub | refused, or wait until it is committed or cancelled |

use block::{
    BLOCK_BYTES, ByteCount, ByteOffset, Consistency, Epoch, Generation, HistoryId, Label, PointNote, VolumeId,
};
use changeset::{Stamp, VolumeInfo};

use crate::delta::{Change, Content, Delta};
use crate::group::{GroupReplica, Writer};
use crate::segment::joined;
use crate::span::Span;
use crate::state::State;
use crate::sweep::Sweep;
use crate::view::View;
use crate::{FAILOVER_EPOCH_BYTES, Pace, ReplicaError, SCRUB_CHUNK_BYTES, SPAN_LEVELS};

/// A failover that is neither committed nor cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failover {
    /// The point that was chosen.
    pub point: Epoch,
    /// The history before.
    pub from: Generation,
    /// Its last epoch.
    pub ended: Epoch,
}

/// What failing over did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedOver {
    /// The recovery point that is as the chosen one was.
    pub epoch: Epoch,
    /// What differed from the newest state, and was put back.
    pub changed: ByteCount,
}

/// What differs, collected for one epoch.
#[derive(Default)]
struct Batch {
    data: Vec<u8>,
    /// Volume, start and length in bytes; where the data lies, or zeroes.
    changes: Vec<(usize, u64, u64, Option<usize>)>,
    bytes: u64,
}

impl Batch {
    fn push(&mut self, volume: usize, start: u64, content: &[u8]) {
        self.bytes += content.len() as u64;
        let zero = crate::bytes::is_zero(content);
        let at = self.data.len();
        if !zero {
            self.data.extend_from_slice(content);
        }
        match self.changes.last_mut() {
            Some((last, from, length, data))
                if *last == volume && *from + *length == start && data.is_none() == zero =>
            {
                *length += content.len() as u64;
            }
            _ => self.changes.push((volume, start, content.len() as u64, (!zero).then_some(at))),
        }
    }
}

impl GroupReplica {
    /// The failover that is pending, and whether it is complete, so that it may be committed.
    pub fn failover(&self) -> Option<(Failover, bool)> {
        let shared = self.core.shared.read();
        let failover = shared.failover?;
        let complete = shared.applied > failover.ended && shared.point(shared.applied).is_some();
        Some((failover, complete))
    }

    /// What has been written since a failover was complete, by epochs that cancelling would take back.
    pub fn written_since_failover(&self) -> ByteCount {
        let shared = self.core.shared.read();
        let Some(failover) = shared.failover else { return ByteCount::ZERO };
        // The epochs that put back are no points, but for the last.
        let points = shared.points().filter(|layer| layer.epoch() > failover.ended).skip(1);
        points.map(|layer| layer.header.meta.written.saturating_add(layer.header.meta.zeroed)).sum()
    }

    /// Makes the images what they were at a point, in a new generation; nothing of the old one is taken any more. What a volume has
    /// got behind the size that it had at the point stays, and so does a volume that was not there.
    ///
    /// # Errors
    /// When the generation is not newer, there is no such point or it cannot be read, or another failover is pending: nothing changed.
    /// When storage fails on the way: it is pending, and may be asked again or cancelled.
    pub fn fail_over(
        &self,
        point: Epoch,
        generation: Generation,
        pace: &Pace,
    ) -> Result<FailedOver, ReplicaError> {
        let _upkeep = self.core.upkeep.lock();
        let _checksums = self.core.checksums.lock();
        self.core.check_poison()?;
        let group = self.core.group;
        let volumes: Vec<VolumeInfo> =
            self.core.shared.read().volumes.iter().map(|volume| volume.info.clone()).collect();
        // Opened before anything changes, so that a point that cannot be read is refused. It also keeps the point.
        let views = self.views_at(point, &volumes)?;
        let failover = {
            let mut writer = self.writer.lock();
            if self.core.shared.read().promoted {
                return Err(ReplicaError::Promoted { group });
            }
            self.roll_back_unfinished(&mut writer)?;
            match (writer.state.failover, writer.state.generation) {
                (Some(pending), Some(known)) if (pending.point, known) == (point, generation) => pending,
                (Some(pending), _) => {
                    return Err(ReplicaError::FailoverPending { group, point: pending.point });
                }
                (None, known) => {
                    let from = known.filter(|known| *known < generation);
                    let from = from.ok_or(ReplicaError::NotNewer { group, known, asked: generation })?;
                    let failover = Failover { point, from, ended: writer.state.applied };
                    // The same wherever the same is decided of the same: two targets that fail over to one point go on alike.
                    let before = writer.state.history;
                    let now = &writer.state;
                    let begun = [generation.0, point.0, now.applied.0, now.cut_time.0];
                    let state = State {
                        generation: Some(generation),
                        history: before.begun_by(&begun),
                        history_before: before,
                        failover: Some(failover),
                        ..writer.state.clone()
                    };
                    self.write_state(&mut writer, state)?;
                    failover
                }
            }
        };
        let mut batch = Batch::default();
        let mut changed = 0;
        for (index, view) in &views {
            changed += self.revert(*index, view, failover, &volumes, &mut batch, pace)?;
        }
        let (consistency, label) = {
            let shared = self.core.shared.read();
            let consistency = shared.layer_of(point).map(|layer| layer.header.meta.consistency);
            (consistency.unwrap_or(Consistency::Crash), Label::try_from(format!("failover to {point}")).ok())
        };
        let note = PointNote { label, ..PointNote::default() };
        self.apply_batch(&mut batch, &volumes, consistency, note)?;
        Ok(FailedOver { epoch: self.applied().1, changed: ByteCount(changed) })
    }

    fn views_at(&self, point: Epoch, volumes: &[VolumeInfo]) -> Result<Vec<(usize, View)>, ReplicaError> {
        let mut views = Vec::new();
        for (index, info) in volumes.iter().enumerate() {
            match View::open(&self.core, info.id, point) {
                Ok(view) => views.push((index, view)),
                Err(ReplicaError::NoSuchVolume { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(views)
    }

    /// Applies what of a volume differs from a view, but for a last part that stays in the batch. Gives how much differs.
    fn revert(
        &self,
        index: usize,
        view: &View,
        failover: Failover,
        volumes: &[VolumeInfo],
        batch: &mut Batch,
        pace: &Pace,
    ) -> Result<u64, ReplicaError> {
        let mut lists = Vec::new();
        for part in self.core.shared.read().stretch(failover.point, failover.ended, SPAN_LEVELS) {
            lists.extend(self.core.segments(&part, view.volume())?);
        }
        let mut changed = 0;
        let mut next = 0;
        let (mut old, mut new) = (Vec::new(), Vec::new());
        for segment in joined(Sweep::new(lists), u64::MAX) {
            let segment = segment?;
            // Whole blocks, each once although several segments may lie in it.
            let mut at = (segment.offset() / BLOCK_BYTES * BLOCK_BYTES).max(next);
            let end = segment.end_offset().next_multiple_of(BLOCK_BYTES).min(view.size().0);
            next = end.max(next);
            while at < end {
                let length = (end - at).min(SCRUB_CHUNK_BYTES.0) as usize;
                old.resize(length, 0);
                new.resize(length, 0);
                pace.spend(2 * length as u64)?;
                view.read_at(&mut old, ByteOffset(at))?;
                self.read_current(view.volume(), &mut new, at)?;
                let blocks = old.chunks(BLOCK_BYTES as usize).zip(new.chunks(BLOCK_BYTES as usize));
                for ((was, is), start) in blocks.zip((at..).step_by(BLOCK_BYTES as usize)) {
                    if was == is {
                        continue;
                    }
                    changed += was.len() as u64;
                    batch.push(index, start, was);
                    if batch.bytes >= FAILOVER_EPOCH_BYTES.0 {
                        self.apply_batch(batch, volumes, Consistency::None, PointNote::default())?;
                    }
                }
                at += length as u64;
            }
        }
        Ok(changed)
    }

    fn read_current(&self, volume: VolumeId, buffer: &mut [u8], at: u64) -> Result<(), ReplicaError> {
        // Nobody else writes to images now: apply is refused.
        let image = self.core.shared.read().images.get(&volume).cloned().expect("a volume has an image");
        image.read(buffer, at)
    }

    fn apply_batch(
        &self,
        batch: &mut Batch,
        volumes: &[VolumeInfo],
        consistency: Consistency,
        note: PointNote,
    ) -> Result<(), ReplicaError> {
        let (generation, applied) = self.applied();
        let stamp = Stamp {
            group: self.core.group,
            generation: generation.expect("a generation is named before"),
            epoch: applied.next(),
            consistency,
            cut_time: (self.options.clock)().max(self.applied_cut_time().unwrap_or_default()),
        };
        let mut delta = Delta::new(stamp, volumes);
        delta.note = note;
        for (volume, start, length, data) in &batch.changes {
            let content = match data {
                Some(at) => Content::Data(&batch.data[*at..*at + *length as usize]),
                None => Content::Zeroes,
            };
            let change = Change { start: *start, length: *length, content };
            delta.push(*volume, change).map_err(|problem| ReplicaError::Invalid {
                group: stamp.group,
                epoch: stamp.epoch,
                problem,
            })?;
        }
        self.apply_own(&delta)?;
        *batch = Batch { data: std::mem::take(&mut batch.data), ..Batch::default() };
        batch.data.clear();
        Ok(())
    }

    /// Keeps the new generation: it cannot be cancelled any more, and its epochs are taken.
    ///
    /// # Errors
    /// When none is pending, or it is not complete: nothing changed.
    pub fn commit_failover(&self) -> Result<Generation, ReplicaError> {
        let group = self.core.group;
        let mut writer = self.writer.lock();
        self.core.check_poison()?;
        let Some((pending, complete)) = self.failover() else {
            return Err(ReplicaError::NoFailover { group });
        };
        if !complete {
            return Err(ReplicaError::FailoverPending { group, point: pending.point });
        }
        self.mark_own(&writer.state)?;
        let state = State { failover: None, history_before: HistoryId::SOURCE, ..writer.state.clone() };
        self.write_state(&mut writer, state)?;
        Ok(writer.state.generation.expect("a failover names one"))
    }

    /// Takes a failover back: the newest state of the old generation is the newest again, and its epochs are taken.
    ///
    /// # Errors
    /// When none is pending, it is promoted, or somebody looks at a point of the new generation: nothing changed.
    pub fn cancel_failover(&self) -> Result<Generation, ReplicaError> {
        let group = self.core.group;
        let _upkeep = self.core.upkeep.lock();
        let _checksums = self.core.checksums.lock();
        let mut writer = self.writer.lock();
        self.core.check_poison()?;
        if self.core.shared.read().promoted {
            return Err(ReplicaError::Promoted { group });
        }
        let Some(failover) = writer.state.failover else { return Err(ReplicaError::NoFailover { group }) };
        let outcome = self.cancel_locked(&mut writer, failover);
        if let Err(error @ (ReplicaError::Io { .. } | ReplicaError::Corrupt { .. })) = &outcome {
            self.core.poison(error.to_string());
        }
        outcome
    }

    fn cancel_locked(&self, writer: &mut Writer, failover: Failover) -> Result<Generation, ReplicaError> {
        let group = self.core.group;
        self.roll_back_unfinished(writer)?;
        // Views build spans, which would reach over epochs that are to come again.
        let mut building = self.core.building.lock();
        let spans: Vec<std::sync::Arc<Span>> = {
            let mut shared = self.core.shared.write();
            if let Some((epoch, _)) = shared.views.range(failover.ended.next()..).next() {
                return Err(ReplicaError::InUse { group, epoch: *epoch });
            }
            // Nobody may begin to look at them from here on.
            shared.going = Some((failover.ended, Epoch(u64::MAX)));
            shared.spans.values().filter(|span| span.last() > failover.ended).cloned().collect()
        };
        let taken_back = self.take_back(writer, failover, &spans);
        building.look_again();
        self.core.shared.write().going = None;
        taken_back?;
        let state = State {
            generation: Some(failover.from),
            history: writer.state.history_before,
            history_before: HistoryId::SOURCE,
            failover: None,
            ..writer.state.clone()
        };
        self.write_state(writer, state)?;
        Ok(failover.from)
    }

    fn take_back(
        &self,
        writer: &mut Writer,
        failover: Failover,
        spans: &[std::sync::Arc<Span>],
    ) -> Result<(), ReplicaError> {
        self.core.remove_spans(spans);
        while writer.state.applied > failover.ended {
            let (newest, before) = {
                let shared = self.core.shared.read();
                let newest = shared.layers.back().cloned().expect("an epoch of a failover has a layer");
                let before = shared.layers.iter().rev().nth(1).cloned();
                (newest, before.expect("a failover begins at an epoch that has a layer"))
            };
            let meta = &before.header.meta;
            let state = State {
                applied: before.epoch(),
                cut_time: meta.cut_time,
                consistency: meta.consistency,
                ..writer.state.clone()
            };
            self.write_state(writer, state)?;
            // As after an epoch that found no space: the layer of the epoch after the applied one is rolled back. A crash
            // here leaves what opening takes back in the same way.
            writer.unfinished = Some(newest);
            self.roll_back_unfinished(writer)?;
        }
        Ok(())
    }

    /// Writes the state and what all see of it.
    pub(crate) fn write_state(&self, writer: &mut Writer, state: State) -> Result<(), ReplicaError> {
        if let Err(error) = writer.state_file.write(&state, &self.core.dir) {
            self.core.poison(error.to_string());
            return Err(error);
        }
        {
            let mut shared = self.core.shared.write();
            shared.generation = state.generation;
            shared.history = state.history;
            shared.applied = state.applied;
            shared.cut_time = state.cut_time;
            shared.failover = state.failover;
        }
        writer.state = state;
        Ok(())
    }
}
