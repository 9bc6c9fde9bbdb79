use crate::Granule;

/// A set of granules of one volume, one bit each.
///
/// Memory: one bit a granule, 2 MiB for a volume of 1 TiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    granules: u64,
}

impl Bitmap {
    /// A set of none out of `granules`.
    pub fn empty(granules: u64) -> Bitmap {
        Bitmap { words: vec![0; granules.div_ceil(64) as usize], granules }
    }

    /// How many granules the volume has.
    pub fn granules(&self) -> u64 {
        self.granules
    }

    /// Adds a granule. Granules past the volume's end are ignored.
    pub fn insert(&mut self, granule: Granule) {
        if granule.0 < self.granules {
            self.words[(granule.0 / 64) as usize] |= 1 << (granule.0 % 64);
        }
    }

    /// Adds the 64 granules from `word * 64` whose bits are set. Bits past the volume's end are ignored.
    pub fn insert_word(&mut self, word: u64, bits: u64) {
        let first = word.saturating_mul(64);
        if first < self.granules {
            let left = self.granules - first;
            self.words[word as usize] |= if left >= 64 { bits } else { bits & ((1 << left) - 1) };
        }
    }

    /// Takes a granule out.
    pub fn remove(&mut self, granule: Granule) {
        if granule.0 < self.granules {
            self.words[(granule.0 / 64) as usize] &= !(1 << (granule.0 % 64));
        }
    }

    /// Whether the granule is in the set.
    pub fn contains(&self, granule: Granule) -> bool {
        granule.0 < self.granules && self.words[(granule.0 / 64) as usize] >> (granule.0 % 64) & 1 == 1
    }

    /// Adds all.
    pub fn fill(&mut self) {
        for granule in (0..self.granules).step_by(64) {
            let left = self.granules - granule;
            self.words[(granule / 64) as usize] = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        }
    }

    /// How many are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether none is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The first member at or after `from`.
    pub fn next(&self, from: Granule) -> Option<Granule> {
        let mut index = (from.0 / 64) as usize;
        let mut word = self.words.get(index)? & (u64::MAX << (from.0 % 64));
        loop {
            if word != 0 {
                return Some(Granule(index as u64 * 64 + u64::from(word.trailing_zeros())));
            }
            index += 1;
            word = *self.words.get(index)?;
        }
    }

    /// The members, in order.
    pub fn iter(&self) -> impl Iterator<Item = Granule> + '_ {
        let mut from = Some(Granule(0));
        std::iter::from_fn(move || {
            let found = self.next(from?);
            from = found.map(|granule| Granule(granule.0 + 1));
            found
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filled_sets_end_at_the_volume() {
        for granules in [0, 1, 63, 64, 65, 128, 1000] {
            let mut set = Bitmap::empty(granules);
            set.fill();
            assert_eq!(set.count(), granules);
            assert_eq!(set.iter().count() as u64, granules);
            assert!(!set.contains(Granule(granules)));
        }
    }

    #[test]
    fn members_come_in_order() {
        let mut set = Bitmap::empty(300);
        for granule in [299, 0, 64, 63, 130] {
            set.insert(Granule(granule));
        }
        set.insert(Granule(300));
        set.remove(Granule(63));
        assert_eq!(set.iter().map(Granule::get).collect::<Vec<_>>(), [0, 64, 130, 299]);
        assert_eq!(set.next(Granule(65)), Some(Granule(130)));
    }
}
