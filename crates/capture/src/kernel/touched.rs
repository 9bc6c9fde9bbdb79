//! Granules that were consumed from the ring or drained, and of which nobody has said yet that they are held durably (R8).
//!
//! Two sets: the young one is being filled; the old one waits until the epochs it belongs to are acknowledged, is
//! cleared, and then takes its turn as the young one. An agent that starts again finds both and reads them from the disk.
//! They are kept in a BPF map pinned beside the others, so that they live exactly as long as the tracking they complete.
//!
//! Crash: a bit is set before the ring's consumer position passes its record, and before a draining bit is cleared.

use std::sync::atomic::Ordering;

use block::{Extent, GRANULE_BYTES};

use super::layout::{Kept, TouchedWord, VolumeEntry};
use super::memory::Shared;

/// Words that are remembered one by one; past it, a set is cleared by going through all words.
const LIST_MAX: usize = 1 << 16;

pub(super) struct Touched {
    words: Shared<TouchedWord>,
    young: usize,
    /// Words of each set that have bits; `None` when they are too many to list, or an earlier process set them.
    listed: [Option<Vec<usize>>; 2],
}

impl Touched {
    pub(super) fn new(words: Shared<TouchedWord>, kept: &Kept) -> Touched {
        Touched { words, young: (kept.young.load(Ordering::SeqCst) & 1) as usize, listed: [None, None] }
    }

    /// Both sets' bits of a word.
    pub(super) fn word(&self, at: usize) -> u64 {
        self.words[at].bits.iter().map(|bits| bits.load(Ordering::SeqCst)).fold(0, |all, bits| all | bits)
    }

    /// Adds an extent's granules to the young set.
    pub(super) fn insert(&mut self, entry: &VolumeEntry, extent: Extent) {
        let end = extent.end().0.div_ceil(GRANULE_BYTES).min(entry.granules);
        let mut granule = extent.offset().0 / GRANULE_BYTES;
        while granule < end {
            let (word, bit) = (granule / 64, granule % 64);
            let count = (end - granule).min(64 - bit);
            let mask = (u64::MAX >> (64 - count)) << bit;
            self.insert_word((entry.first_word + word) as usize, mask);
            granule += count;
        }
    }

    fn insert_word(&mut self, at: usize, mask: u64) {
        let word = &self.words[at].bits[self.young];
        let before = word.load(Ordering::Relaxed);
        if before & mask == mask {
            return;
        }
        // Nobody else writes it.
        word.store(before | mask, Ordering::SeqCst);
        if before == 0
            && let Some(list) = &mut self.listed[self.young]
        {
            list.push(at);
            if list.len() > LIST_MAX {
                self.listed[self.young] = None;
            }
        }
    }

    /// What the old set holds is acknowledged: it is cleared, and is the young one from now on.
    pub(super) fn age(&mut self, kept: &Kept) {
        self.young = 1 - self.young;
        self.clear(self.young);
        kept.young.store(self.young as u64, Ordering::SeqCst);
    }

    /// Clears both.
    pub(super) fn clear_all(&mut self) {
        self.clear(0);
        self.clear(1);
    }

    fn clear(&mut self, set: usize) {
        match self.listed[set].take() {
            Some(mut list) => {
                for at in list.drain(..) {
                    self.words[at].bits[set].store(0, Ordering::SeqCst);
                }
                self.listed[set] = Some(list);
            }
            None => {
                self.words.iter().for_each(|word| word.bits[set].store(0, Ordering::SeqCst));
                self.listed[set] = Some(Vec::new());
            }
        }
    }
}
