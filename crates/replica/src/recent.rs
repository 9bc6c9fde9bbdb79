//! A bounded map that keeps what was used lately.

use std::collections::HashMap;
use std::hash::Hash;

use parking_lot::Mutex;

/// At most a given number of values. What was not used while half as many others were is forgotten, cheaply: there are two
/// maps, and when the young one is half of the limit, it becomes the old one and the old one goes.
#[derive(Debug)]
pub(crate) struct Recent<K, V> {
    half: usize,
    maps: Mutex<Maps<K, V>>,
}

#[derive(Debug)]
struct Maps<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K: Hash + Eq + Copy, V: Clone> Recent<K, V> {
    /// For at most `limit` values, at least 2.
    pub(crate) fn new(limit: usize) -> Recent<K, V> {
        Recent {
            half: (limit / 2).max(1),
            maps: Mutex::new(Maps { young: HashMap::new(), old: HashMap::new() }),
        }
    }

    pub(crate) fn get(&self, key: &K) -> Option<V> {
        let mut maps = self.maps.lock();
        if let Some(value) = maps.young.get(key) {
            return Some(value.clone());
        }
        let value = maps.old.remove(key)?;
        self.put(&mut maps, *key, value.clone());
        Some(value)
    }

    pub(crate) fn insert(&self, key: K, value: V) {
        let mut maps = self.maps.lock();
        maps.old.remove(&key);
        self.put(&mut maps, key, value);
    }

    pub(crate) fn remove(&self, key: &K) {
        let mut maps = self.maps.lock();
        maps.young.remove(key);
        maps.old.remove(key);
    }

    fn put(&self, maps: &mut Maps<K, V>, key: K, value: V) {
        if maps.young.len() >= self.half && !maps.young.contains_key(&key) {
            maps.old = std::mem::take(&mut maps.young);
        }
        maps.young.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_than_its_limit_and_the_lately_used_stay() {
        let recent = Recent::new(8);
        for key in 0..1000 {
            recent.insert(key, key * 2);
            assert_eq!(recent.get(&0), Some(0), "used all the time");
            let maps = recent.maps.lock();
            assert!(maps.young.len() + maps.old.len() <= 8);
        }
        assert_eq!(recent.get(&500), None);
        assert_eq!(recent.get(&999), Some(1998));
        recent.remove(&999);
        assert_eq!(recent.get(&999), None);
    }
}
