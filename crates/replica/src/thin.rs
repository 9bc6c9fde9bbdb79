//! Work in the background: spans, retention in the middle of the list, deleting a point.
//!
//! A point goes by merging its layer with the one after it. The merged layer leads from the state after the later back to where the
//! earlier led; it takes the place of both.
//!
//! The order, and what breaks when it is changed:
//! 1. the merged layer is written beside its name and made durable, however long that takes; nothing sees it;
//! 2. its points are offered no more, unless one was pinned or is looked at by now: then the merged layer is thrown away
//!    (else somebody could be promised, between this and the next step, a point that a crash then takes away);
//! 3. it takes its name, which no other layer has, durably: from here on an opening would choose it over its parts;
//! 4. it takes their place in the list (before 3, a view could look for a file that a crash takes away);
//! 5. the parts are removed (before 3 is durable, a crash would break the way back).
//!
//! - Consistency: what a view at any remaining point reads is the same before and after each step; see the table at
//!   [`crate::view`].
//! - Crash consistency: before 3 the parts are found and the `.new` file removed; after it the merged layer is found and the parts are
//!   removed, whichever of them are left.
//! - Retries: all of it may be tried again. A failure leaves the points as they were, and never poisons apply.
//! - Cancellation: by the pace, during 1.
//!
//! | at the same time | |
//! |---|---|
//! | apply | goes on; it never waits for a merge. It may move the floor past the parts: then the merged layer is thrown away |
//! | roll back of an epoch | concerns the newest layer only, which is never merged: merging ends at a kept point |
//! | view at a point in the middle | the point stays until the view is closed |
//! | pin | counts from the moment it is in memory; what comes after step 2 is refused, for the point has gone |
//! | thin, delete, scrub | one at a time, by [`crate::shared::Core::upkeep`] |

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{ByteCount, Epoch};

use crate::error::Context;
use crate::group::GroupReplica;
use crate::layer::{EPOCHS_MAX, Layer, merge};
use crate::policy::Candidate;
use crate::retention::settle;
use crate::shared::{Core, Shared};
use crate::span::Span;
use crate::state::State;
use crate::{MERGE_LAYERS_MAX, Pace, ReplicaError, SPACE_WARNING_PERCENT, catalogue};

/// What one step of work in the background did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Maintained {
    /// There was nothing to do.
    Nothing,
    /// Built an index over a stretch of epochs, by which old points open fast.
    Span,
    /// Brought the checksums of the images up to date.
    Checksums,
    /// Wrote what is known of layers into one file, by which the replica opens fast.
    Catalogue,
    /// Points at the old end went.
    Dropped {
        /// The oldest point now.
        oldest: Epoch,
    },
    /// Points in the middle went.
    Thinned {
        /// How many layers became one.
        layers: usize,
        /// What they took.
        before: ByteCount,
        /// What the one takes.
        after: ByteCount,
    },
    /// Pins that had expired were taken away.
    Unpinned(Vec<Epoch>),
}

/// What undo layers take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// All of them together.
    pub used: ByteCount,
    /// The most they may take.
    pub max: Option<ByteCount>,
    /// For people: what will go, or cannot.
    pub warning: Option<String>,
}

/// Why a point is kept, for each point in order.
struct Kept {
    points: Vec<Candidate>,
    /// Whether it stays.
    stays: Vec<bool>,
}

impl GroupReplica {
    /// Does one step of what is to be done in the background: builds a span, lets points go, merges layers, takes expired pins away.
    /// To be called again and again, more seldom after [`Maintained::Nothing`]. Apply goes on meanwhile.
    ///
    /// # Errors
    /// When storage fails, a layer is damaged, or the pace says stop. It may be tried again; the replica is not poisoned, unless its
    /// state could not be written.
    pub fn maintain(&self, pace: &Pace) -> Result<Maintained, ReplicaError> {
        let outcome = self.maintain_once(pace);
        if let Err(ReplicaError::Corrupt { path, problem }) = &outcome {
            self.core.note_damage(path, problem);
        }
        outcome
    }

    fn maintain_once(&self, pace: &Pace) -> Result<Maintained, ReplicaError> {
        if self.core.shared.read().failover.is_some() {
            return Ok(Maintained::Nothing);
        }
        if self.core.build_span(pace)? {
            return Ok(Maintained::Span);
        }
        if self.update_checksums(false, pace)? {
            return Ok(Maintained::Checksums);
        }
        if self.write_catalogue()? {
            return Ok(Maintained::Catalogue);
        }
        let _upkeep = self.core.upkeep.lock();
        // Again, now that none can begin.
        if self.core.shared.read().failover.is_some() {
            return Ok(Maintained::Nothing);
        }
        let expired = self.expire_pins()?;
        if !expired.is_empty() {
            return Ok(Maintained::Unpinned(expired));
        }
        let kept = self.kept();
        let stays = || kept.points.iter().zip(&kept.stays).filter(|(_, stays)| **stays);
        let floor = self.core.shared.read().floor;
        if let Some((oldest, _)) = stays().next()
            && oldest.epoch > floor
        {
            self.raise_floor(oldest.epoch)?;
            return Ok(Maintained::Dropped { oldest: oldest.epoch });
        }
        let boundaries: BTreeSet<Epoch> = stays().map(|(point, _)| point.epoch).collect();
        let group = self.core.shared.read().group_to_merge(&boundaries);
        match group {
            Some(layers) => self.merge(&layers, pace),
            None => Ok(Maintained::Nothing),
        }
    }

    /// Lets a point go at once. Its undo layer becomes a part of the next one's, which costs as much as reading both and
    /// writing one.
    ///
    /// # Errors
    /// When there is no such point, it is the newest, pinned, or looked at, a layer is damaged, or storage fails; nothing
    /// changed then.
    pub fn delete_point(&self, epoch: Epoch, pace: &Pace) -> Result<Maintained, ReplicaError> {
        let _upkeep = self.core.upkeep.lock();
        let group = self.core.group;
        let stays =
            |problem: &str| Err(ReplicaError::PointStays { group, epoch, problem: problem.to_owned() });
        let (next, layers) = {
            let shared = self.core.shared.read();
            if let Some(failover) = shared.failover {
                return Err(ReplicaError::FailoverPending { group, point: failover.point });
            }
            if shared.point(epoch).is_none() {
                return Err(self.no_such_point(&shared, epoch));
            }
            let mut after = shared.points().map(|layer| layer.epoch()).skip_while(|point| *point <= epoch);
            let Some(next) = after.next() else {
                return stays("it is the newest, which never goes");
            };
            if shared.pins.contains_key(&epoch) {
                return stays("it is pinned; unpin it first");
            }
            if shared.views.contains_key(&epoch) {
                return stays("it is being read or exported; end that first");
            }
            let first = shared.layers.partition_point(|layer| layer.epoch() < epoch);
            let layers: Vec<Arc<Layer>> = shared.layers.range(first..).take(2).cloned().collect();
            (next, (epoch > shared.floor).then_some(layers))
        };
        let Some(layers) = layers else {
            self.raise_floor(next)?;
            return Ok(Maintained::Dropped { oldest: next });
        };
        match self.merge(&layers, pace)? {
            Maintained::Nothing => {
                stays("it was pinned or opened, or the replica changed, meanwhile; try again")
            }
            done => Ok(done),
        }
    }

    /// What undo layers take, and whether that is near the limit.
    pub fn space(&self) -> Space {
        let used = self.layer_bytes();
        let max = self.options.retention.space_max;
        let warning = max.and_then(|max| {
            let (used, percent) = (used.0, SPACE_WARNING_PERCENT);
            if used > max.0 {
                let pinned = self.core.shared.read().pins.len();
                Some(format!(
                    "undo layers take {} of at most {max}: the oldest recovery points that are not pinned are going; {pinned} \
                     are pinned, and they and the newest stay even if that is too much",
                    ByteCount(used)
                ))
            } else if used as u128 * 100 >= max.0 as u128 * u128::from(percent) {
                Some(format!(
                    "undo layers take {} of at most {max}: the oldest recovery points that are not pinned go next",
                    ByteCount(used)
                ))
            } else {
                None
            }
        });
        Space { used, max, warning }
    }

    /// For each point, oldest first: why retention keeps it; `None` for one that will go.
    pub fn kept_for(&self) -> Vec<(Epoch, Option<String>)> {
        let now = (self.options.clock)();
        let points = self.candidates();
        let pins: BTreeSet<Epoch> = {
            let shared = self.core.shared.read();
            shared.pins.iter().filter(|(_, pin)| !pin.is_expired(now)).map(|(epoch, _)| *epoch).collect()
        };
        let rules = self.options.retention.policy.as_ref().map(|policy| (policy, policy.keep(&points, now)));
        let newest = points.last().map(|point| point.epoch);
        let why = |(index, point): (usize, &Candidate)| {
            let why = match &rules {
                _ if pins.contains(&point.epoch) => Some("pinned".to_owned()),
                _ if Some(point.epoch) == newest => Some("newest".to_owned()),
                None => Some("all".to_owned()),
                Some((policy, kept)) => kept[index].map(|number| policy.rule(number)),
            };
            (point.epoch, why)
        };
        points.iter().enumerate().map(why).collect()
    }

    fn write_catalogue(&self) -> Result<bool, ReplicaError> {
        let core = &*self.core;
        let changes = core.uncatalogued.load(Ordering::Relaxed);
        let (generation, layers) = {
            let shared = core.shared.read();
            let Some(generation) =
                shared.generation.filter(|_| catalogue::is_due(shared.layers.len(), changes))
            else {
                return Ok(false);
            };
            // What is being applied may be taken back.
            let applied = shared.layers.iter().filter(|layer| layer.epoch() <= shared.applied);
            (generation, applied.cloned().collect::<Vec<_>>())
        };
        catalogue::write(&*core.storage, &core.dir, core.group, generation, &layers)?;
        core.uncatalogued.fetch_sub(changes, Ordering::Relaxed);
        Ok(true)
    }

    fn candidates(&self) -> Vec<Candidate> {
        let shared = self.core.shared.read();
        let candidate = |layer: &Arc<Layer>| {
            let meta = &layer.header.meta;
            Candidate { epoch: meta.epoch, cut: meta.cut_time, consistency: meta.consistency }
        };
        let mut points: Vec<Candidate> = shared.points().map(candidate).collect();
        drop(shared);
        settle(&mut points);
        points
    }

    fn expire_pins(&self) -> Result<Vec<Epoch>, ReplicaError> {
        let now = (self.options.clock)();
        let _pinning = self.core.pinning.lock();
        let (mut pins, expired) = {
            let shared = self.core.shared.read();
            let expired = shared.pins.iter().filter(|(_, pin)| pin.is_expired(now));
            let expired: Vec<Epoch> = expired.map(|(epoch, _)| *epoch).collect();
            (shared.pins.clone(), expired)
        };
        if !expired.is_empty() {
            pins.retain(|epoch, _| !expired.contains(epoch));
            self.write_pins(pins)?;
        }
        Ok(expired)
    }

    /// Which points stay. Number and age are apply's, but for pins in their way.
    fn kept(&self) -> Kept {
        let retention = &self.options.retention;
        let now = (self.options.clock)();
        let points = self.candidates();
        let mut stays = match &retention.policy {
            Some(policy) => policy.keep(&points, now).iter().map(Option::is_some).collect(),
            None => vec![true; points.len()],
        };
        let shared = self.core.shared.read();
        let listed = points.iter().map(|point| (point.epoch, point.cut));
        if let Some(oldest) = retention.floor(listed, points.len(), now) {
            for (point, stays) in points.iter().zip(&mut stays) {
                *stays &= point.epoch >= oldest;
            }
        }
        let pinned = |epoch: Epoch| shared.pins.get(&epoch).is_some_and(|pin| !pin.is_expired(now));
        for (point, stays) in points.iter().zip(&mut stays) {
            *stays |= pinned(point.epoch);
        }
        if let Some(max) = retention.space_max {
            shared.make_space(max, &points, &mut stays, pinned);
        }
        Kept { points, stays }
    }

    /// Makes a point the oldest. The layers before it go when no view needs them.
    fn raise_floor(&self, floor: Epoch) -> Result<(), ReplicaError> {
        let mut writer = self.writer.lock();
        self.core.check_poison()?;
        if floor <= writer.state.floor {
            return Ok(());
        }
        let state = State { floor, ..writer.state.clone() };
        if let Err(error) = writer.state_file.write(&state, &self.core.dir) {
            self.core.poison(error.to_string());
            return Err(error);
        }
        writer.state = state;
        let retired = {
            let mut shared = self.core.shared.write();
            shared.floor = floor;
            shared.retire()
        };
        self.remove_retired(&mut writer, retired);
        drop(writer);
        self.core.remove_useless_spans();
        Ok(())
    }

    /// Merges successive layers and lets their points but the last go. [`Maintained::Nothing`] when one of them may not go any more.
    pub(crate) fn merge(&self, layers: &[Arc<Layer>], pace: &Pace) -> Result<Maintained, ReplicaError> {
        let core = &*self.core;
        let Some(merged) = merge(&*core.storage, &core.layers_dir(), layers, pace)? else {
            return Ok(Maintained::Nothing);
        };
        let range = (merged.header.back, merged.header.meta.epoch);
        if !core.shared.write().let_go(layers, range) {
            merged.abandon(&*core.storage);
            return Ok(Maintained::Nothing);
        }
        let merged = match merged.name(&*core.storage) {
            Ok(merged) => merged,
            Err(error) => {
                core.shared.write().going = None;
                return Err(error);
            }
        };
        let durable = core.storage.sync_dir(&core.layers_dir());
        let (before, after) = (layers.iter().map(|layer| layer.bytes()).sum(), merged.bytes());
        let merged = Arc::new(merged);
        if !core.shared.write().replace(layers, &merged) {
            // Apply has moved the floor past some of them. What is left of them leads as far as is needed.
            core.storage.remove(&merged.path).context("remove undo layer", &merged.path)?;
            return Ok(Maintained::Nothing);
        }
        // If the name is not known to be durable, the parts stay; opening removes what turns out to be superfluous.
        durable.context("sync directory", &core.layers_dir())?;
        for layer in layers {
            core.forget_handle(layer.serial);
            if let Err(error) = core.storage.remove(&layer.path) {
                tracing::warn!(path = %layer.path.display(), %error, "remove merged undo layer; opening does it");
            }
        }
        core.uncatalogued.fetch_add(layers.len(), Ordering::Relaxed);
        core.remove_useless_spans();
        Ok(Maintained::Thinned { layers: layers.len(), before, after })
    }
}

impl Core {
    /// Removes the spans that spare no view anything any more.
    fn remove_useless_spans(&self) {
        let useless: Vec<Arc<Span>> = {
            let shared = self.shared.read();
            let useless =
                |span: &&Arc<Span>| span.first <= shared.floor || !shared.wants_span(span.first, span.level);
            shared.spans.values().filter(useless).cloned().collect()
        };
        if !useless.is_empty() {
            self.remove_spans(&useless);
        }
    }
}

impl Shared {
    /// Lets the oldest points go that may, until what their layers take is no more than a limit.
    fn make_space(
        &self,
        max: ByteCount,
        points: &[Candidate],
        stays: &mut [bool],
        pinned: impl Fn(Epoch) -> bool,
    ) {
        let used: u64 = self.layers.iter().map(|layer| layer.bytes().0).sum();
        let mut excess = used.saturating_sub(max.0);
        let mut layers = self.layers.iter().peekable();
        for index in 0..points.len().saturating_sub(1) {
            if excess == 0 {
                return;
            }
            if pinned(points[index].epoch) {
                // What is merged behind it frees what cannot be told before. One at a time.
                let next =
                    (index + 1..points.len() - 1).find(|next| stays[*next] && !pinned(points[*next].epoch));
                if let Some(next) = next {
                    stays[next] = false;
                }
                return;
            }
            stays[index] = false;
            let oldest = (index + 1..points.len()).find(|next| stays[*next]).unwrap_or(points.len() - 1);
            while let Some(layer) = layers.next_if(|layer| layer.epoch() < points[oldest].epoch) {
                excess = excess.saturating_sub(layer.bytes().0);
            }
        }
    }

    /// Successive layers that may become one: those after a point that stays, up to the next. Of many, a few of which the
    /// sum is least, so that each byte is merged a number of times that only grows with the logarithm of how many there are.
    fn group_to_merge(&self, boundaries: &BTreeSet<Epoch>) -> Option<Vec<Arc<Layer>>> {
        let first = self.layers.partition_point(|layer| layer.epoch() <= self.floor);
        let mut group: Vec<&Arc<Layer>> = Vec::new();
        for layer in self.layers.range(first..) {
            let epoch = layer.epoch();
            if epoch > self.applied {
                break;
            }
            group.push(layer);
            if !boundaries.contains(&epoch) && !self.views.contains_key(&epoch) {
                continue;
            }
            let points = group.iter().filter(|layer| layer.header.meta.consistency.is_point()).count();
            let sound = group.iter().all(|layer| layer.damage().is_none());
            if points > 1 && sound && epoch.0 - group[0].back().0 <= EPOCHS_MAX {
                let length = group.len().min(MERGE_LAYERS_MAX);
                let bytes = |window: &&[&Arc<Layer>]| window.iter().map(|layer| layer.bytes().0).sum::<u64>();
                let window = group.windows(length).min_by_key(bytes)?;
                return Some(window.iter().map(|layer| Arc::clone(layer)).collect());
            }
            group.clear();
        }
        None
    }

    /// Takes the points of layers but the last from the list, when none is pinned or looked at and the layers are all there.
    fn let_go(&mut self, layers: &[Arc<Layer>], (back, epoch): (Epoch, Epoch)) -> bool {
        let inside = (back.next(), epoch);
        let free = self.pins.range(inside.0..inside.1).next().is_none()
            && self.views.range(inside.0..inside.1).next().is_none()
            && back >= self.floor
            && self.position_of(layers).is_some();
        if free {
            self.going = Some((back, epoch));
        }
        free
    }

    /// Puts a merged layer in the place of its parts; `false` when they are not all there.
    fn replace(&mut self, layers: &[Arc<Layer>], merged: &Arc<Layer>) -> bool {
        self.going = None;
        let Some(first) = self.position_of(layers) else { return false };
        self.layers.drain(first + 1..first + layers.len());
        self.layers[first] = merged.clone();
        self.rewrites += 1;
        true
    }

    fn position_of(&self, layers: &[Arc<Layer>]) -> Option<usize> {
        let first = self.layers.partition_point(|layer| layer.epoch() < layers[0].epoch());
        let here = self.layers.iter().skip(first).take(layers.len());
        let same = here.clone().count() == layers.len()
            && here.zip(layers).all(|(here, layer)| here.serial == layer.serial);
        same.then_some(first)
    }
}
