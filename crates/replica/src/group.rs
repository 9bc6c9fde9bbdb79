//! The replica of one group.
//!
//! - Consistency: the images hold exactly the applied epoch, or that and a part of the next, whose layer is then in the
//!   list; so a view is right at every moment. Epochs are applied without gaps.
//! - Crash consistency: see [`GroupReplica::apply`] for the order; opening leaves either epoch N-1 or N.
//! - Retries: a refusal changes nothing. Without space an epoch is taken back and may be applied again. Any other
//!   failure of storage poisons the replica until it is opened again; nothing is guessed about what reached the medium.
//! - Cancellation: none, calls block and run to their end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::{ByteCount, ByteOffset, Epoch, Generation, GroupId, HistoryId, UnixNanos, VolumeId};
use changeset::{Changeset, Payload, VolumeInfo};
use durable::{Storage, fault_point};
use parking_lot::{Mutex, RwLock};

use crate::delta::{Change, Content, Delta, ranges};
use crate::image::{DataCursor, Image, Place};
use crate::layer::{Layer, LayerWriter, Meta, Scratch};
use crate::promoted::Promoted;
use crate::recover::{self, OpenReport};
use crate::shared::{Core, image_path};
use crate::state::{State, StateFile, VolumeState};
use crate::{IMAGE_THREADS_MAX, ReplicaError, Retention, VolumeProblem};

/// How a replica is kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// Block devices that hold the images of volumes, by the volume's name. The others are sparse files.
    pub devices: BTreeMap<String, PathBuf>,
    /// Which points are kept.
    pub retention: Retention,
    /// This machine's clock.
    pub clock: fn() -> UnixNanos,
}

impl Default for Options {
    fn default() -> Options {
        Options { devices: BTreeMap::new(), retention: Retention::default(), clock: UnixNanos::now }
    }
}

/// Where a replica stands for the source that it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The last epoch that it holds, durably.
    pub applied: Epoch,
    /// Which history of the generation it has.
    pub history: HistoryId,
    /// How often what had been applied was taken back, by a failover or for want of space.
    pub taken_back: u64,
}

/// What applying an epoch did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The epoch, now held.
    pub epoch: Epoch,
    /// Data written to the images.
    pub written: ByteCount,
    /// What was made to read as zeroes.
    pub zeroed: ByteCount,
    /// The size of its undo layer; `None` before the first recovery point.
    pub layer: Option<ByteCount>,
    /// The oldest recovery point kept; `None` when there is none yet.
    pub oldest_kept: Option<Epoch>,
}

/// The replica of one group. Shared between threads: one applies, any number look.
#[derive(Debug)]
pub struct GroupReplica {
    pub(crate) core: Arc<Core>,
    pub(crate) options: Options,
    pub(crate) writer: Mutex<Writer>,
    /// While its volumes are written here.
    pub(crate) promoted: RwLock<Option<Arc<Promoted>>>,
}

pub(crate) struct Writer {
    pub(crate) state: State,
    pub(crate) state_file: StateFile,
    scratch: Scratch,
    /// A layer that is in the list and whose epoch is to be taken back.
    pub(crate) unfinished: Option<Arc<Layer>>,
    /// Layer files to remove once the floor is past them.
    leftovers: Vec<(Epoch, PathBuf)>,
    /// An apply is under way; found set at the start of one, the one before did not end.
    busy: bool,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("state", &self.state).finish_non_exhaustive()
    }
}

/// An epoch that was checked and can be applied.
struct Plan {
    /// The state once it is applied, but for the floor.
    state: State,
    /// An image for each of the changeset's volumes.
    images: Vec<Arc<Image>>,
    /// Which of them the replica had before.
    known: Vec<bool>,
}

impl GroupReplica {
    /// Opens the replica of a group in `<data>/<group id>`, making it when it is not there, and repairs what a crash
    /// left.
    ///
    /// # Errors
    /// When storage fails, another process has it open, a file is damaged beyond what can be repaired, or the devices
    /// named are not those it was made with.
    pub fn open(
        storage: Arc<dyn Storage>,
        data: &Path,
        group: GroupId,
        options: Options,
    ) -> Result<(GroupReplica, OpenReport), ReplicaError> {
        let dir = data.join(group.to_string());
        let opened = recover::open(storage, &dir, group, &options)?;
        let writer = Writer {
            state: opened.state,
            state_file: opened.state_file,
            scratch: Scratch::default(),
            unfinished: None,
            leftovers: Vec::new(),
            busy: false,
        };
        let replica = GroupReplica {
            core: Arc::new(opened.core),
            options,
            writer: Mutex::new(writer),
            promoted: RwLock::default(),
        };
        replica.open_promoted()?;
        Ok((replica, opened.report))
    }

    /// The group.
    pub fn group(&self) -> GroupId {
        self.core.group
    }

    /// The history it follows (`None` until the first changeset) and the last epoch that it holds, durably.
    pub fn applied(&self) -> (Option<Generation>, Epoch) {
        let shared = self.core.shared.read();
        (shared.generation, shared.applied)
    }

    /// Where it stands, for the source of one generation. While two of them are equal but for what is applied, what was
    /// read in between from the images is of that generation's history.
    ///
    /// # Errors
    /// When a failover is pending, it is promoted, or it follows another generation: nothing that this source sends or asks counts.
    pub fn standing(&self, generation: Generation) -> Result<Standing, ReplicaError> {
        let (group, shared) = (self.core.group, self.core.shared.read());
        if shared.promoted {
            return Err(ReplicaError::Promoted { group });
        }
        if let Some(failover) = shared.failover {
            return Err(ReplicaError::FailoverPending { group, point: failover.point });
        }
        match shared.generation {
            Some(expected) if expected != generation => {
                Err(ReplicaError::OtherGeneration { group, expected, found: generation })
            }
            _ => Ok(Standing {
                applied: shared.applied,
                history: shared.history,
                taken_back: shared.rollbacks,
            }),
        }
    }

    /// When the applied epoch was cut; `None` before the first.
    pub fn applied_cut_time(&self) -> Option<UnixNanos> {
        let shared = self.core.shared.read();
        // One that began in the middle of a history knows no time until it has applied something.
        (shared.applied > Epoch::NONE && shared.cut_time > UnixNanos(0)).then_some(shared.cut_time)
    }

    /// The failure that poisoned it, if any.
    pub fn poisoned(&self) -> Option<String> {
        self.core.poison_reason().map(str::to_owned)
    }

    /// Reads the newest state, which is that of the applied epoch where the epoch being applied changes nothing.
    ///
    /// # Errors
    /// When there is no such volume, or its image cannot be read.
    pub fn read_newest(
        &self,
        volume: VolumeId,
        buffer: &mut [u8],
        offset: ByteOffset,
    ) -> Result<(), ReplicaError> {
        let image = self.core.shared.read().images.get(&volume).cloned();
        let image = image.ok_or(ReplicaError::NoSuchVolume {
            group: self.core.group,
            volume,
            epoch: self.applied().1,
        })?;
        image.read(buffer, offset.0)
    }

    /// Applies the next epoch. When this returns the replica holds it, durably.
    ///
    /// The order, and what breaks when it is changed:
    /// 1. everything is verified before the first byte is written (a [`Changeset`] exists only verified; else a bad
    ///    one could be half-applied before that is seen);
    /// 2. the undo layer is complete and durable, and in the list that views read (else a crash or a view meets an
    ///    image that was changed without a way back);
    /// 3. the extents are written to the images and synced (else the state would speak of content that a crash takes
    ///    away);
    /// 4. the state says that the epoch is applied (else an epoch that the sender has let go of could be rolled back);
    ///    only then are layers removed that the new floor makes superfluous.
    ///
    /// Before the first recovery point there is nothing to go back to and step 2 is left out. A crash then leaves the
    /// images with a part of the next epoch; while that may be so no point exists, and applying it again repairs it.
    /// The layer of the first point only says what the point is.
    ///
    /// # Errors
    /// A refusal by name when the epoch is not the next one of this history or does not fit; nothing changed.
    /// [`ReplicaError::NoSpace`]: nothing changed, may be applied again. Anything else poisons the replica.
    pub fn apply(&self, changeset: &Changeset) -> Result<Applied, ReplicaError> {
        let stamp = changeset.header.stamp;
        let mut delta = Delta::new(stamp, &changeset.volumes);
        delta.note = changeset.note.clone();
        for change in changeset.changes() {
            let (start, length) = (change.extent.offset().0, change.extent.length().0);
            let content = match change.payload {
                Payload::Data(data) => Content::Data(data),
                Payload::Zero => Content::Zeroes,
            };
            delta.push(change.volume.into(), Change { start, length, content }).map_err(|problem| {
                ReplicaError::Invalid { group: stamp.group, epoch: stamp.epoch, problem }
            })?;
        }
        self.apply_delta(&delta)
    }

    pub(crate) fn apply_delta(&self, delta: &Delta<'_>) -> Result<Applied, ReplicaError> {
        let mut writer = self.writer.lock();
        if self.core.shared.read().promoted {
            return Err(ReplicaError::Promoted { group: self.core.group });
        }
        if let Some(failover) = writer.state.failover {
            return Err(ReplicaError::FailoverPending { group: self.core.group, point: failover.point });
        }
        self.apply_to(&mut writer, delta)
    }

    /// The same while a failover is pending, by whoever does that.
    pub(crate) fn apply_own(&self, delta: &Delta<'_>) -> Result<Applied, ReplicaError> {
        self.apply_to(&mut self.writer.lock(), delta)
    }

    fn apply_to(&self, writer: &mut Writer, delta: &Delta<'_>) -> Result<Applied, ReplicaError> {
        if writer.busy {
            self.core.poison("applying an epoch ended half-way".to_owned());
        }
        self.core.check_poison()?;
        writer.busy = true;
        let applied = self.apply_locked(writer, delta);
        writer.busy = false;
        if let Err(error @ (ReplicaError::Io { .. } | ReplicaError::Corrupt { .. })) = &applied {
            self.core.poison(error.to_string());
        }
        applied
    }

    fn apply_locked(&self, writer: &mut Writer, delta: &Delta<'_>) -> Result<Applied, ReplicaError> {
        let mut plan = self.plan(writer, delta)?;
        let muted;
        let delta = if writer.state.unproven && !self.all_arrived(&plan.state.volumes) {
            // What the source calls a point is none of a replica that lacks what came before.
            muted = delta.without_point();
            plan.state.consistency = muted.stamp.consistency;
            &muted
        } else {
            plan.state.unproven = false;
            delta
        };
        self.roll_back_unfinished(writer)?;
        if writer.state.generation.is_none() && !delta.changes.is_empty() {
            // Before an image is touched: what is in it belongs to this history from now on.
            let state = State { generation: Some(delta.stamp.generation), ..writer.state.clone() };
            writer.state_file.write(&state, &self.core.dir)?;
            writer.state = state;
        }
        fault_point("before-layer");
        let layer = match writer.state.floor > Epoch::NONE || delta.stamp.consistency.is_point() {
            true => Some(self.write_layer(writer, delta, &plan)?),
            false => None,
        };
        let bytes = layer.as_ref().map(|layer| layer.bytes());
        if let Some(layer) = &layer {
            self.core.shared.write().layers.push_back(layer.clone());
        }
        fault_point("after-layer");
        match self.write_images(&writer.state, delta, &plan) {
            Err(error) if error.is_retryable() => {
                writer.unfinished = layer;
                // The space that the epoch took is wanted; when that fails it is tried again before the next apply.
                if let Err(again) = self.roll_back_unfinished(writer)
                    && !again.is_retryable()
                {
                    return Err(again);
                }
                return Err(error);
            }
            other => other?,
        }
        fault_point("after-image");
        let floor = self.floor_after(&writer.state, delta);
        let proven = writer.state.unproven && !plan.state.unproven;
        let state = State { floor, ..plan.state };
        writer.state_file.write(&state, &self.core.dir)?;
        fault_point("after-state");
        self.publish(writer, state, delta, plan.images);
        if proven {
            self.core.arrived.lock().clear();
        } else if writer.state.unproven {
            self.arrived(delta);
        }
        self.core.uncatalogued.fetch_add(usize::from(bytes.is_some()), Ordering::Relaxed);
        Ok(Applied {
            epoch: delta.stamp.epoch,
            written: delta.written(),
            zeroed: delta.zeroed(),
            layer: bytes,
            oldest_kept: (floor > Epoch::NONE).then_some(floor),
        })
    }

    /// Checks that the epoch is the next one and fits, and says what applying it means. Changes nothing but that it
    /// makes an empty image for a new volume.
    fn plan(&self, writer: &Writer, delta: &Delta<'_>) -> Result<Plan, ReplicaError> {
        let Delta { stamp, volumes, .. } = delta;
        let (group, epoch, applied) = (self.core.group, stamp.epoch, writer.state.applied);
        if stamp.group != group {
            return Err(ReplicaError::WrongGroup { expected: group, found: stamp.group, epoch });
        }
        if let Some(expected) = writer.state.generation.filter(|generation| *generation != stamp.generation) {
            return Err(ReplicaError::WrongGeneration { group, expected, found: stamp.generation, epoch });
        }
        if epoch <= applied {
            return Err(ReplicaError::Replayed { group, epoch, applied });
        }
        if epoch != applied.next() {
            return Err(ReplicaError::Gap { group, epoch, applied });
        }
        let mut state = State {
            generation: Some(stamp.generation),
            applied: epoch,
            cut_time: stamp.cut_time,
            consistency: stamp.consistency,
            ..writer.state.clone()
        };
        let refused = |info: &VolumeInfo, problem| {
            Err(ReplicaError::Volume { epoch, id: info.id, name: info.name.clone(), problem })
        };
        let mut known = Vec::with_capacity(volumes.len());
        for info in *volumes {
            let before = state.volumes.iter_mut().find(|volume| volume.info.id == info.id);
            known.push(before.is_some());
            match before {
                Some(before) if before.info.size > info.size => {
                    let problem = VolumeProblem::Shrunk { before: before.info.size, after: info.size };
                    return refused(info, problem);
                }
                Some(before) => {
                    // A device is named by the volume's name, so a place does not follow a new name.
                    let name = match before.place {
                        Place::File => info.name.clone(),
                        Place::Device => before.info.name.clone(),
                    };
                    before.info = VolumeInfo { name, ..info.clone() };
                }
                None => {
                    let device = self.options.devices.contains_key(&info.name);
                    let taken =
                        |volume: &VolumeState| volume.place == Place::Device && volume.info.name == info.name;
                    if device && let Some(other) = state.volumes.iter().find(|volume| taken(volume)) {
                        return refused(info, VolumeProblem::DeviceTaken { other: other.info.id });
                    }
                    let place = if device { Place::Device } else { Place::File };
                    state.volumes.push(VolumeState { info: info.clone(), place });
                }
            }
        }
        state.check().map_err(|problem| ReplicaError::Invalid { group, epoch, problem })?;
        let mut images = Vec::with_capacity(volumes.len());
        for info in *volumes {
            let image = self.image(info)?;
            let size = image.len()?;
            if image.place == Place::Device && size < info.size.0 {
                let path = image.path.clone();
                let problem =
                    VolumeProblem::DeviceTooSmall { path, size: ByteCount(size), needed: info.size };
                return refused(info, problem);
            }
            images.push(image);
        }
        Ok(Plan { state, images, known })
    }

    /// The image of a volume, a new one when the replica has none.
    fn image(&self, info: &VolumeInfo) -> Result<Arc<Image>, ReplicaError> {
        if let Some(image) = self.core.shared.read().images.get(&info.id) {
            return Ok(image.clone());
        }
        let storage = &*self.core.storage;
        let image = match self.options.devices.get(&info.name) {
            Some(device) => Image::open(storage, device, Place::Device)
                .map_err(|error| ReplicaError::unusable(device, format!("{error}; name the right device")))?,
            None => Image::create(storage, &image_path(&self.core.dir, info.id))?,
        };
        Ok(Arc::new(image))
    }

    fn write_layer(
        &self,
        writer: &mut Writer,
        delta: &Delta<'_>,
        plan: &Plan,
    ) -> Result<Arc<Layer>, ReplicaError> {
        let volumes = match self.core.shared.read().layers.back() {
            Some(last) if *last.header.meta.volumes == *delta.volumes => last.header.meta.volumes.clone(),
            _ => delta.volumes.into(),
        };
        let meta = Meta {
            group: delta.stamp.group,
            generation: delta.stamp.generation,
            epoch: delta.stamp.epoch,
            cut_time: delta.stamp.cut_time,
            consistency: delta.stamp.consistency,
            note: delta.note.clone(),
            written: delta.written(),
            zeroed: delta.zeroed(),
            volumes,
        };
        let first = writer.state.floor == Epoch::NONE;
        let dir = self.core.layers_dir();
        let storage = &*self.core.storage;
        let mut layer = LayerWriter::create(storage, &dir, meta, &mut writer.scratch)?;
        let bad_blocks = self.core.shared.read().bad_blocks.clone();
        let written = (|| {
            for (volume, changes) in &delta.changes {
                // There is nothing to go back to before the first point, or before the volume's first epoch.
                if first || !plan.known[*volume] {
                    continue;
                }
                let mut cursor = DataCursor::default();
                let bad = bad_blocks.get(&delta.volumes[*volume].id);
                for range in ranges(changes) {
                    layer.keep(*volume, range, &plan.images[*volume], &mut cursor, bad)?;
                }
            }
            layer.finish()
        })();
        if written.is_err() {
            layer.abandon();
        }
        Ok(Arc::new(written?))
    }

    /// Writes the changes to the images and syncs them, several images at a time.
    fn write_images(&self, before: &State, delta: &Delta<'_>, plan: &Plan) -> Result<(), ReplicaError> {
        let mut changes: Vec<&[Change<'_>]> = vec![&[]; delta.volumes.len()];
        for (volume, changed) in &delta.changes {
            changes[*volume] = changed;
        }
        struct Job<'a> {
            image: &'a Image,
            before: Option<u64>,
            size: u64,
            changes: &'a [Change<'a>],
        }
        let jobs = delta.volumes.iter().zip(&plan.images).zip(changes).map(|((info, image), changes)| {
            let before = before.volume(info.id).map(|volume| volume.info.size.0);
            Job { image, before, size: info.size.0, changes }
        });
        let jobs: Vec<Job<'_>> =
            jobs.filter(|job| !job.changes.is_empty() || job.before != Some(job.size)).collect();
        let run = |job: &Job<'_>| {
            job.image.grow(job.before, job.size)?;
            job.image.write_changes(job.changes)?;
            fault_point("before-image-sync");
            job.image.sync()
        };
        if let [job] = &jobs[..] {
            return run(job);
        }
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                run(job)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (1..jobs.len().min(IMAGE_THREADS_MAX)).map(|_| scope.spawn(work)).collect();
            let mut outcome = work();
            for thread in threads {
                let other = thread.join().expect("writing an image does not panic");
                // What poisons says more than what may be tried again.
                if outcome.as_ref().err().is_none_or(ReplicaError::is_retryable) && other.is_err() {
                    outcome = other;
                }
            }
            outcome
        })
    }

    fn floor_after(&self, before: &State, delta: &Delta<'_>) -> Epoch {
        if !delta.stamp.consistency.is_point() || before.failover.is_some() {
            return before.floor;
        }
        let retention = &self.options.retention;
        let shared = self.core.shared.read();
        let points = shared.points().map(|layer| (layer.epoch(), layer.header.meta.cut_time));
        let points = points.chain([(delta.stamp.epoch, delta.stamp.cut_time)]);
        let now = (self.options.clock)();
        let mut pinned = shared.pins.range(before.floor..).filter(|(_, pin)| !pin.is_expired(now));
        let pinned = pinned.find(|(epoch, _)| shared.point(**epoch).is_some()).map(|(epoch, _)| *epoch);
        let floor = retention.floor(points, shared.layers.len() + 1, now);
        let floor = floor.unwrap_or(delta.stamp.epoch);
        pinned.map_or(floor, |pinned| pinned.min(floor)).max(before.floor)
    }

    fn publish(&self, writer: &mut Writer, state: State, delta: &Delta<'_>, images: Vec<Arc<Image>>) {
        let retired = {
            let mut shared = self.core.shared.write();
            shared.generation = state.generation;
            shared.history = state.history;
            shared.applied = state.applied;
            shared.cut_time = state.cut_time;
            shared.unproven = state.unproven;
            shared.floor = state.floor;
            for (info, image) in delta.volumes.iter().zip(images) {
                shared.images.entry(info.id).or_insert(image);
            }
            shared.volumes.clone_from(&state.volumes);
            shared.retire()
        };
        writer.state = state;
        self.remove_retired(writer, retired);
    }

    /// Removes the files of layers that nobody needs any more.
    pub(crate) fn remove_retired(&self, writer: &mut Writer, retired: Vec<Arc<Layer>>) {
        for layer in retired {
            self.core.forget_handle(layer.serial);
            writer.leftovers.push((layer.epoch(), layer.path.clone()));
        }
        let Writer { leftovers, scratch, state, .. } = writer;
        let storage = &*self.core.storage;
        leftovers.retain(|(epoch, path)| {
            if *epoch >= state.floor {
                return true;
            }
            let gone = match scratch.keep_spare(storage, path) {
                Ok(true) => Ok(()),
                Ok(false) | Err(_) => storage.remove(path),
            };
            match gone {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "remove undo layer; tried again later");
                    true
                }
                _ => false,
            }
        });
    }

    /// Takes back an epoch that found no space half-way.
    pub(crate) fn roll_back_unfinished(&self, writer: &mut Writer) -> Result<(), ReplicaError> {
        let Some(layer) = &writer.unfinished else {
            return Ok(());
        };
        let images = self.core.shared.read().images.clone();
        let file = self.core.handle(layer)?;
        recover::roll_back(&file, layer, &writer.state, &images)?;
        // The images are as before: readers may do without the layer. One that read an image in between starts anew.
        {
            let mut shared = self.core.shared.write();
            shared.layers.pop_back();
            shared.rollbacks += 1;
        }
        self.core.forget_handle(layer.serial);
        let path = layer.path.clone();
        writer.unfinished = None;
        let remove = || {
            self.core.storage.remove(&path)?;
            self.core.storage.sync_dir(&self.core.layers_dir())
        };
        remove().map_err(|error| ReplicaError::io("remove undo layer", &path, error))
    }
}
