//! Random histories against a map of vectors.

mod support;

use std::collections::BTreeMap;

use block::{ByteCount, Epoch};
use cache::{AppendError, Cache, ReadError};
use durable::CrashStorage;
use proptest::prelude::*;
use support::*;

#[derive(Clone, Debug)]
enum Step {
    /// Offer an epoch: this far from the one that comes next.
    Put {
        group: u8,
        off: i64,
        size: usize,
    },
    HalfPut {
        group: u8,
        size: usize,
    },
    NextGeneration {
        group: u8,
    },
    Apply {
        group: u8,
        target: usize,
        how_many: usize,
    },
    Reopen,
    Crash {
        seed: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let group = 1u8..4;
    prop_oneof![
        8 => (group.clone(), prop_oneof![9 => Just(0i64), 1 => -3i64..4], 0usize..30_000)
            .prop_map(|(group, off, size)| Step::Put { group, off, size }),
        1 => (group.clone(), 1usize..30_000).prop_map(|(group, size)| Step::HalfPut { group, size }),
        1 => group.clone().prop_map(|group| Step::NextGeneration { group }),
        4 => (group, 0usize..2, 0usize..6).prop_map(|(group, target, how_many)| Step::Apply { group, target, how_many }),
        1 => Just(Step::Reopen),
        1 => any::<u64>().prop_map(|seed| Step::Crash { seed }),
    ]
}

/// What a cache should hold: the whole history, and how far each target is.
#[derive(Default)]
struct Model {
    history: Vec<((u64, u64), usize)>,
    applied: [usize; 2],
}

const TARGETS: [&str; 2] = ["a", "b"];

fn opened(storage: &CrashStorage) -> Cache {
    let (cache, report) = open(storage, options(64 << 20, 32 << 10, &TARGETS)).unwrap();
    assert!(report.is_sound(), "{report:?}");
    cache
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_cache_is_a_map_of_vectors(steps in proptest::collection::vec(step(), 1..80)) {
        let mut storage = CrashStorage::new();
        let mut cache = opened(&storage);
        let mut models: BTreeMap<u8, Model> = BTreeMap::new();
        let mut generations: BTreeMap<u8, u64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Put { group: number, off, size } => {
                    let generation = *generations.entry(number).or_insert(1);
                    let model = models.entry(number).or_default();
                    let last = model.history.last().filter(|((g, _), _)| *g == generation).map_or(0, |((_, e), _)| *e);
                    let mut source = Source::open(&cache, group(number), generation).unwrap();
                    prop_assert_eq!(source.appender.held(), Epoch(last));
                    let epoch = (last as i64 + 1 + off).max(0) as u64;
                    match source.give(epoch, size) {
                        Ok(()) => {
                            prop_assert_eq!(epoch, last + 1);
                            prop_assert!(source.wait_held(epoch));
                            model.history.push(((generation, epoch), size));
                        }
                        Err(AppendError::Replayed { .. }) => prop_assert!(epoch <= last),
                        Err(AppendError::Gap { .. }) => prop_assert!(epoch > last + 1),
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Step::HalfPut { group: number, size } => {
                    let generation = *generations.entry(number).or_insert(1);
                    let mut source = Source::open(&cache, group(number), generation).unwrap();
                    let next = source.appender.held().next();
                    source.appender.begin(next, ByteCount(size as u64 + 1)).unwrap();
                    source.appender.push(content(group(number), at(99, 99), size)).unwrap();
                }
                Step::NextGeneration { group: number } => *generations.entry(number).or_insert(1) += 1,
                Step::Apply { group: number, target, how_many } => {
                    let model = models.entry(number).or_default();
                    model.applied[target] = (model.applied[target] + how_many).min(model.history.len());
                    if let Some(((generation, epoch), _)) = model.applied[target].checked_sub(1).map(|at| model.history[at]) {
                        cache.contact(group(number), TARGETS[target], at(1, 0)).ok();
                        cache.applied(group(number), TARGETS[target], at(generation, epoch)).unwrap();
                    }
                }
                Step::Reopen => {
                    cache.close().unwrap();
                    cache = opened(&storage);
                }
                Step::Crash { seed } => {
                    let image = storage.crash(seed);
                    drop(cache);
                    storage = image;
                    cache = opened(&storage);
                    // The cursors are written lazily: what a crash takes back the targets tell again.
                    for (number, model) in &models {
                        for (target, applied) in TARGETS.iter().zip(model.applied) {
                            if let Some(((generation, epoch), _)) = applied.checked_sub(1).map(|at| model.history[at]) {
                                cache.contact(group(*number), target, at(generation, epoch)).unwrap();
                            }
                        }
                    }
                }
            }
            for (number, model) in &models {
                let floor = model.applied.into_iter().min().unwrap_or(0);
                let position = |index: usize| {
                    index.checked_sub(1).map_or(at(0, 0), |index| at(model.history[index].0.0, model.history[index].0.1))
                };
                let expected: Vec<_> =
                    model.history[floor..].iter().map(|((g, e), size)| (at(*g, *e), *size)).collect();
                prop_assert_eq!(held_after(&cache, group(*number), position(floor)), expected);
                prop_assert_eq!(cache.held(group(*number)), position(model.history.len()));
                if floor > 1 && floor < model.history.len() {
                    let too_early = cache.next_after(group(*number), position(floor - 1));
                    let follows = model.history[floor].0.1 == 1;
                    let refused = matches!(too_early, Err(ReadError::TooLate { .. }));
                    prop_assert!(follows || refused);
                }
            }
        }
    }
}
