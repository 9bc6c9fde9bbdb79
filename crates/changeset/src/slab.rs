//! Large buffers that frames are written into one behind the other, and that are used again.
//!
//! A changeset touches tens of megabytes, and fresh ones cost the kernel a page fault for every 4 KiB: a sixth of the
//! time of sealing and a third of the time of opening, *measured*. So slabs that are done with are kept for the next
//! changeset of the process.

use std::sync::{Mutex, PoisonError};

/// Bytes of a slab that is used again. A smaller changeset gets a buffer of its size, which is not kept.
const SLAB_BYTES: usize = 8 << 20;
/// Slabs kept by the process, 64 MiB; more are given back to the system.
const SLABS_KEPT: usize = 8;

/// Slabs that nobody uses, empty.
static KEPT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// A buffer that returns to those kept when it is dropped.
#[derive(Debug)]
pub(crate) struct Slab(Vec<u8>);

/// Where a frame lies in the slabs of one worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) slab: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// The slabs that one worker fills.
#[derive(Debug, Default)]
pub(crate) struct Slabs(Vec<Slab>);

impl Slabs {
    /// A buffer with room for `needed` more bytes, and its number. `total` is the most that this worker will ever need.
    pub(crate) fn room(&mut self, needed: usize, total: usize) -> (usize, &mut Vec<u8>) {
        let fits = self.0.last().is_some_and(|Slab(bytes)| bytes.capacity() - bytes.len() >= needed);
        if !fits {
            self.0.push(Slab::new(needed.max(total.min(SLAB_BYTES))));
        }
        let last = self.0.len() - 1;
        (last, &mut self.0[last].0)
    }

    /// The slabs, without what they do not use where they are not kept.
    pub(crate) fn finish(mut self) -> Vec<Slab> {
        for Slab(bytes) in &mut self.0 {
            if bytes.capacity() < SLAB_BYTES {
                bytes.shrink_to_fit();
            }
        }
        self.0
    }
}

impl Slab {
    fn new(capacity: usize) -> Slab {
        let kept = if capacity == SLAB_BYTES { kept().pop() } else { None };
        Slab(kept.unwrap_or_else(|| Vec::with_capacity(capacity)))
    }

    pub(crate) fn capacity(&self) -> usize {
        self.0.capacity()
    }
}

impl AsRef<[u8]> for Slab {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if self.0.capacity() == SLAB_BYTES {
            let mut kept = kept();
            if kept.len() < SLABS_KEPT {
                self.0.clear();
                kept.push(std::mem::take(&mut self.0));
            }
        }
    }
}

/// Nothing panics while it holds the lock, so a poisoned one is whole.
fn kept() -> std::sync::MutexGuard<'static, Vec<Vec<u8>>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}
