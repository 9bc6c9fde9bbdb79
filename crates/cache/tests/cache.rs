//! Order, space, targets and failures of a cache on a simulated disk and a real one.

mod support;

use std::sync::Arc;

use block::{ByteCount, Epoch, Generation, HistoryId};
use bytes::Bytes;
use cache::{AppendError, CHUNK_BYTES, Cache, CacheError, Closed, Damage, Event, ReadError, verify};
use durable::{CrashStorage, Fault, OpenMode, RealStorage, Storage};
use support::*;

const MIB: u64 = 1 << 20;

fn big() -> cache::Options {
    options(1 << 30, 8 * MIB, &["a"])
}

#[test]
fn what_was_held_is_read_back_in_order_also_after_opening_again() {
    let storage = CrashStorage::new();
    let (cache, report) = open(&storage, big()).unwrap();
    assert!(report.is_sound() && report.groups.is_empty());
    let sizes =
        [0, 1, 127, 128, 5000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 9_999_999];
    let mut one = Source::open(&cache, group(1), 7).unwrap();
    let mut two = Source::open(&cache, group(2), 1).unwrap();
    let mut expected = Vec::new();
    for (index, size) in sizes.into_iter().enumerate() {
        let epoch = index as u64 + 1;
        one.give(epoch, size).unwrap();
        two.give(epoch, 77).unwrap();
        expected.push((at(7, epoch), size));
    }
    assert!(one.wait_held(10) && two.wait_held(10));
    assert_eq!(held_after(&cache, group(1), at(7, 0)), expected);
    assert_eq!(held_after(&cache, group(1), at(7, 4)), expected[4..]);
    drop((one, two));
    cache.close().unwrap();
    assert!(verify(&storage, dir()).unwrap().is_sound());
    let (cache, report) = open(&storage, big()).unwrap();
    assert!(report.is_sound() && !report.torn_tail && report.segments > 1, "{report:?}");
    assert_eq!(held_after(&cache, group(1), at(7, 0)), expected);
    assert_eq!(held_after(&cache, group(2), at(1, 0)).len(), 10);
    assert_eq!(Source::open(&cache, group(1), 7).unwrap().appender.held(), Epoch(10));
    Source::open(&cache, group(1), 7).unwrap().put(11, 10);
}

#[test]
fn only_what_comes_next_is_accepted() {
    let (cache, _) = open(&CrashStorage::new(), big()).unwrap();
    let mut source = Source::open(&cache, group(1), 2).unwrap();
    let total = ByteCount(10);
    assert!(matches!(
        source.appender.begin(Epoch(2), total),
        Err(AppendError::Gap { expected: Epoch(1), .. })
    ));
    assert!(matches!(source.appender.begin(Epoch(0), total), Err(AppendError::Replayed { .. })));
    source.put(1, 10);
    assert!(matches!(
        source.appender.begin(Epoch(1), total),
        Err(AppendError::Replayed { held: Epoch(1), .. })
    ));
    assert!(matches!(
        source.appender.begin(Epoch(3), total),
        Err(AppendError::Gap { expected: Epoch(2), .. })
    ));
    let old = Source::open(&cache, group(1), 1).map(|_| ());
    assert!(matches!(old, Err(AppendError::OldGeneration { current: Generation(2), .. })));
    let mut next = Source::open(&cache, group(1), 5).unwrap();
    assert_eq!(next.appender.held(), Epoch::NONE);
    assert!(matches!(next.appender.begin(Epoch(2), total), Err(AppendError::Gap { expected: Epoch(1), .. })));
    next.put(1, 10);
    assert!(matches!(Source::open(&cache, group(1), 2), Err(AppendError::OldGeneration { .. })));
    assert_eq!(held_after(&cache, group(1), at(2, 0)), [(at(2, 1), 10), (at(5, 1), 10)]);
}

#[test]
fn bytes_must_match_the_announced_size() {
    let (cache, _) = open(&CrashStorage::new(), big()).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    assert!(matches!(source.appender.push(Bytes::from_static(b"x")), Err(AppendError::Protocol(_))));
    assert!(matches!(source.appender.end(), Err(AppendError::Protocol(_))));
    source.appender.begin(Epoch(1), ByteCount(3)).unwrap();
    assert!(matches!(source.appender.push(Bytes::from_static(b"1234")), Err(AppendError::Protocol(_))));
    source.appender.push(Bytes::from_static(b"12")).unwrap();
    assert!(matches!(source.appender.end(), Err(AppendError::Protocol(_))));
    assert_eq!(cache.status().bytes_reserved, ByteCount::ZERO);
    source.put(1, 3);
}

#[test]
fn an_abandoned_changeset_leaves_nothing() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, big()).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    source.put(1, 100);
    source.appender.begin(Epoch(2), ByteCount(5 * MIB)).unwrap();
    source.appender.push(content(group(1), at(1, 9), 3 << 20)).unwrap();
    drop(source);
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    assert_eq!(source.appender.held(), Epoch(1));
    assert_eq!(cache.status().bytes_reserved, ByteCount::ZERO);
    source.put(2, 50);
    drop(source);
    cache.close().unwrap();
    let (cache, report) = open(&storage, big()).unwrap();
    assert_eq!(report.half_received, 1);
    assert!(report.is_sound());
    assert_eq!(held_after(&cache, group(1), at(1, 0)), [(at(1, 1), 100), (at(1, 2), 50)]);
}

#[test]
fn a_new_appender_takes_over() {
    let (cache, _) = open(&CrashStorage::new(), big()).unwrap();
    let mut old = Source::open(&cache, group(1), 1).unwrap();
    old.give(1, 1000).unwrap();
    old.appender.begin(Epoch(2), ByteCount(5 * MIB)).unwrap();
    old.appender.push(content(group(1), at(1, 2), 2 << 20)).unwrap();
    let mut new = Source::open(&cache, group(1), 1).unwrap();
    assert_eq!(new.appender.held(), Epoch(1), "what was ended before is held when the new one starts");
    assert!(old.events.try_iter().any(|event| matches!(event, Event::Closed(Closed::Superseded))));
    let more = content(group(1), at(1, 2), 3 << 20);
    assert!(matches!(old.appender.push(more), Err(AppendError::Superseded)));
    assert!(matches!(old.appender.begin(Epoch(2), ByteCount(1)), Err(AppendError::Superseded)));
    new.put(2, 77);
    drop(old);
    new.put(3, 78);
    assert_eq!(held_after(&cache, group(1), at(1, 0)), [(at(1, 1), 1000), (at(1, 2), 77), (at(1, 3), 78)]);
    assert_eq!(cache.status().bytes_reserved, ByteCount::ZERO);
}

#[test]
fn a_full_cache_waits_and_goes_on_when_targets_apply() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(4 * MIB, 256 << 10, &["a", "b"])).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    let too_large = source.appender.begin(Epoch(1), ByteCount(4 * MIB));
    assert!(matches!(too_large, Err(AppendError::TooLarge { .. })));
    for target in ["a", "b"] {
        cache.contact(group(1), target, at(1, 0)).unwrap();
    }
    let size = 500 << 10;
    let mut epoch = 1;
    loop {
        match source.give(epoch, size) {
            Ok(()) => assert!(source.wait_held(epoch)),
            Err(AppendError::Full { needed, free }) => {
                assert!(needed > free);
                break;
            }
            Err(other) => panic!("{other}"),
        }
        epoch += 1;
    }
    assert!(epoch > 5);
    // A small one of another group waits its turn behind the large one.
    let mut other = Source::open(&cache, group(2), 1).unwrap();
    assert!(matches!(other.give(1, 10), Err(AppendError::Full { .. })));
    for applied in 1..epoch {
        cache.applied(group(1), "a", at(1, applied)).unwrap();
        assert!(matches!(source.give(epoch, size), Err(AppendError::Full { .. })), "b still needs it");
    }
    cache.applied(group(1), "b", at(1, 4)).unwrap();
    source.wait_room();
    source.put(epoch, size);
    other.wait_room();
    other.put(1, 10);
    let status = cache.status();
    assert!(status.bytes_used + status.bytes_reserved <= status.bytes_max);
    assert!(!status.waiting);
}

#[test]
fn one_slow_group_does_not_keep_the_space_of_the_others() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(16 * MIB, MIB, &["a"])).unwrap();
    let mut slow = Source::open(&cache, group(1), 1).unwrap();
    let mut fast = Source::open(&cache, group(2), 1).unwrap();
    cache.contact(group(2), "a", at(1, 0)).unwrap();
    // Every segment has something of the slow group, whose target applies nothing. Four times the cache goes through.
    let mut slow_epoch = 0;
    for epoch in 1..=256 {
        while let Err(error) = fast.give(epoch, 256 << 10) {
            assert!(matches!(error, AppendError::Full { .. }), "{error}");
            fast.wait_room();
        }
        assert!(fast.wait_held(epoch));
        cache.applied(group(2), "a", at(1, epoch)).unwrap();
        if epoch % 4 == 0 {
            slow_epoch += 1;
            while slow.give(slow_epoch, 20_000).is_err() {
                slow.wait_room();
            }
            assert!(slow.wait_held(slow_epoch));
        }
    }
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 64);
    drop((slow, fast));
    cache.close().unwrap();
    let report = verify(&storage, dir()).unwrap();
    assert!(report.is_sound(), "what was punched out is not damage: {report:?}");
    let (cache, report) = open(&storage, options(16 * MIB, MIB, &["a"])).unwrap();
    assert!(report.is_sound());
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 64);
}

#[test]
fn cursors_outlive_the_cache_and_free_segments() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(1 << 30, 64 << 10, &["a", "b"])).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    cache.contact(group(1), "a", at(1, 0)).unwrap();
    cache.contact(group(1), "b", at(1, 0)).unwrap();
    (1..=20).for_each(|epoch| source.put(epoch, 30_000));
    cache.applied(group(1), "a", at(1, 20)).unwrap();
    cache.applied(group(1), "b", at(1, 15)).unwrap();
    assert_eq!(cache.applied_by_all(group(1)), at(1, 15));
    assert!(matches!(cache.applied(group(1), "b", at(1, 21)), Err(ReadError::Ahead { .. })));
    assert!(matches!(cache.applied(group(1), "c", at(1, 1)), Err(ReadError::UnknownTarget { .. })));
    drop(source);
    cache.close().unwrap();
    let (cache, report) = open(&storage, options(1 << 30, 64 << 10, &["a", "b", "c"])).unwrap();
    assert!(report.is_sound() && report.segments < 6, "{report:?}");
    assert_eq!(cache.cursor(group(1), "b"), Some(at(1, 15)));
    assert_eq!(cache.held(group(1)), at(1, 20));
    assert_eq!(held_after(&cache, group(1), at(1, 15)).len(), 5);
    assert!(matches!(cache.next_after(group(1), at(1, 14)), Err(ReadError::TooLate { .. })));
    // A target that is new and empty comes too late, and must not hold the space of those that can be served.
    cache.contact(group(1), "c", at(1, 0)).unwrap();
    assert!(
        matches!(cache.next_after(group(1), at(1, 0)), Err(ReadError::TooLate { oldest, .. }) if oldest == at(1, 16))
    );
    cache.applied(group(1), "b", at(1, 20)).unwrap();
    assert_eq!(cache.status().groups[0].changesets, 0);
    // Now that all others have everything, it does not look as if it had everything too.
    for late in [at(1, 0), at(1, 19)] {
        let refused = cache.next_after(group(1), late);
        assert!(matches!(refused, Err(ReadError::TooLate { oldest, .. }) if oldest == at(1, 21)), "{late}");
    }
    assert!(cache.next_after(group(1), at(1, 20)).unwrap().is_none());
    assert_eq!(cache.held(group(1)), at(1, 20));
    // It begins after what is held, and from there on is one of them; that outlives the cache.
    assert_eq!(cache.join(group(1), "c").unwrap(), at(1, 20));
    assert!(matches!(cache.join(group(1), "d"), Err(ReadError::UnknownTarget { .. })));
    Source::open(&cache, group(1), 1).unwrap().put(21, 5);
    for target in ["a", "b"] {
        cache.applied(group(1), target, at(1, 21)).unwrap();
    }
    cache.close().unwrap();
    let (cache, _) = open(&storage, options(1 << 30, 64 << 10, &["a", "b", "c"])).unwrap();
    // It says so again before it was given anything.
    cache.contact(group(1), "c", at(1, 0)).unwrap();
    assert_eq!((cache.cursor(group(1), "c"), cache.applied_by_all(group(1))), (Some(at(1, 20)), at(1, 20)));
    assert_eq!(held_after(&cache, group(1), at(1, 20)).len(), 1);
}

#[test]
fn a_target_of_another_history_is_not_served() {
    let (cache, _) = open(&CrashStorage::new(), options(1 << 30, MIB, &["a", "b"])).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    (1..=3).for_each(|epoch| source.put(epoch, 10));
    assert!(matches!(cache.contact(group(1), "a", at(1, 4)), Err(ReadError::Ahead { .. })));
    assert!(matches!(cache.next_after(group(1), at(1, 4)), Err(ReadError::Ahead { .. })));
    assert!(matches!(cache.contact(group(1), "a", at(1, 2)), Err(ReadError::OtherHistory(_))));
    assert!(matches!(cache.contact(group(9), "a", at(1, 2)), Err(ReadError::Ahead { .. })));
    cache.contact(group(1), "a", at(1, 0)).unwrap();
    cache.contact(group(1), "a", at(1, 2)).unwrap();
    cache.contact(group(1), "a", at(1, 1)).unwrap();
    assert_eq!(
        cache.cursor(group(1), "a"),
        Some(at(1, 1)),
        "a target that went back is served again from there"
    );
    let mut next = Source::open(&cache, group(1), 2).unwrap();
    next.put(1, 10);
    cache.contact(group(1), "a", at(2, 0)).unwrap();
    cache.contact(group(1), "a", at(2, 1)).unwrap();
    assert_eq!(held_after(&cache, group(1), at(1, 3)), [(at(2, 1), 10)]);
}

/// Numbers alone do not tell a history: a target that has begun the same generation otherwise is not served, also after a restart, until a
/// later generation begins.
#[test]
fn a_target_with_another_history_of_the_generation_is_not_served() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(1 << 30, MIB, &["a"])).unwrap();
    let mut source = Source::open(&cache, group(1), 2).unwrap();
    (1..=3).for_each(|epoch| source.put(epoch, 10));
    let (ours, other) = (HistoryId(7), HistoryId(8));
    cache.follow(group(1), at(2, 1), ours).unwrap();
    cache.contact(group(1), "a", at(2, 0)).unwrap();
    // No close: it is durable when it is said.
    drop((source, cache));
    for turn in 0..2 {
        let (cache, _) = open(&storage.crash(turn), options(1 << 30, MIB, &["a"])).unwrap();
        let refused = cache.follow(group(1), at(2, 2), other);
        assert!(matches!(refused, Err(ReadError::OtherHistory(holds)) if holds == at(2, 2)), "{refused:?}");
        cache.follow(group(1), at(2, 2), ours).unwrap();
        cache
            .follow(group(1), at(1, 9), other)
            .expect("what it lacks of an older generation is not in question");
        cache.follow(group(1), at(3, 4), other).expect("a later generation begins anew");
        cache.follow(group(1), at(3, 4), ours).expect_err("and is one history as well");
    }
}

#[test]
fn a_renamed_target_goes_on() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(1 << 30, MIB, &["old"])).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    cache.contact(group(1), "old", at(1, 0)).unwrap();
    (1..=5).for_each(|epoch| source.put(epoch, 10));
    cache.applied(group(1), "old", at(1, 2)).unwrap();
    drop(source);
    cache.close().unwrap();
    let (cache, _) = open(&storage, options(1 << 30, MIB, &["new", "other"])).unwrap();
    cache.contact(group(1), "new", at(1, 4)).unwrap();
    assert_eq!(cache.cursor(group(1), "old"), None);
    assert!(matches!(cache.contact(group(1), "other", at(1, 5)), Err(ReadError::OtherHistory(_))));
}

#[test]
fn a_second_process_is_kept_out() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, big()).unwrap();
    assert!(matches!(open(&storage, big()), Err(CacheError::Locked(_))));
    assert!(matches!(verify(&storage, dir()), Err(CacheError::Locked(_))));
    drop(cache);
    open(&storage, big()).unwrap();
}

fn segments(storage: &dyn Storage) -> Vec<std::path::PathBuf> {
    let names = storage.list(dir()).unwrap();
    names.iter().filter(|name| name.starts_with("segment")).map(|name| dir().join(name)).collect()
}

fn flip(storage: &dyn Storage, path: &std::path::Path, offset: u64) {
    let file = storage.open(path, OpenMode::ReadWrite).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    file.sync_data().unwrap();
}

/// Group 1 and 2 alternate over several segments; then the second segment is damaged at a byte.
fn damaged_at(offset: u64) -> (CrashStorage, std::path::PathBuf) {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(1 << 30, 64 << 10, &["a"])).unwrap();
    let mut one = Source::open(&cache, group(1), 1).unwrap();
    let mut two = Source::open(&cache, group(2), 1).unwrap();
    for epoch in 1..=5 {
        one.put(epoch, 40_000);
        two.put(epoch, 40_000);
    }
    drop((one, two));
    cache.close().unwrap();
    let path = segments(&storage)[1].clone();
    flip(&storage, &path, offset);
    (storage, path)
}

#[test]
fn a_damaged_header_costs_its_group_alone_and_is_reported() {
    // The first record of the second segment is epoch 2 of group 1.
    let (storage, _) = damaged_at(128 + 50);
    for report in [verify(&storage, dir()).unwrap(), open(&storage, big()).unwrap().1] {
        assert!(matches!(report.damages[0], Damage::Segment { segment: 2, ref range } if range.start == 128));
        let Damage::Changesets { group: lost, from, through, .. } = report.damages[1] else {
            panic!("{report:?}")
        };
        assert_eq!((lost, from, through), (group(1), at(1, 2), at(1, 5)));
        assert_eq!(report.damages.len(), 2);
        assert!(report.damages[1].to_string().contains("resync"));
    }
    // The loss is remembered: going on in the same generation would be silently wrong.
    for _ in 0..2 {
        let (cache, _) = open(&storage, big()).unwrap();
        assert_eq!(held_after(&cache, group(1), at(1, 0)), [(at(1, 1), 40_000)]);
        assert_eq!(held_after(&cache, group(2), at(1, 0)).len(), 5);
        let same = Source::open(&cache, group(1), 1).map(|_| ());
        assert!(matches!(same, Err(AppendError::Lost { from, .. }) if from == at(1, 2)));
        Source::open(&cache, group(2), 1).unwrap();
    }
    let (cache, _) = open(&storage, big()).unwrap();
    Source::open(&cache, group(1), 2).unwrap().put(1, 10);
    assert_eq!(held_after(&cache, group(1), at(1, 1)), [(at(2, 1), 10)]);
    cache.close().unwrap();
    let (cache, report) = open(&storage, big()).unwrap();
    assert_eq!(report.damages.len(), 1, "the loss itself is known: {report:?}");
    assert_eq!(held_after(&cache, group(1), at(1, 1)), [(at(2, 1), 10)]);
}

#[test]
fn damaged_data_is_found_when_it_is_read() {
    let (storage, _) = damaged_at(128 + 128 + 20_000);
    let report = verify(&storage, dir()).unwrap();
    assert!(
        matches!(report.damages[..], [Damage::Changesets { from, .. }] if from == at(1, 2)),
        "{report:?}"
    );
    let (cache, report) = open(&storage, big()).unwrap();
    assert!(report.is_sound(), "opening does not read all data");
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    source.put(6, 100);
    let mut second = cache.next_after(group(1), at(1, 1)).unwrap().unwrap();
    assert!(matches!(second.next_chunk(), Err(ReadError::Damaged { segment: 2, .. })));
    assert!(source.events.try_iter().any(|event| matches!(event, Event::Closed(Closed::Lost(_)))));
    assert!(matches!(source.give(7, 10), Err(AppendError::Lost { .. })));
    assert!(matches!(Source::open(&cache, group(1), 1), Err(AppendError::Lost { .. })));
    assert_eq!(cache.held(group(1)), at(1, 1));
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 1);
    assert_eq!(held_after(&cache, group(2), at(1, 0)).len(), 5);
    assert!(cache.status().groups[0].lost.is_some());
    Source::open(&cache, group(1), 2).unwrap().put(1, 10);
    assert_eq!(held_after(&cache, group(1), at(1, 1)), [(at(2, 1), 10)]);
}

#[test]
fn a_damaged_segment_header_is_salvaged() {
    let (storage, path) = damaged_at(3);
    let (cache, report) = open(&storage, big()).unwrap();
    assert!(
        matches!(&report.damages[..], [Damage::Segment { range, .. }] if *range == (0..128)),
        "{report:?}"
    );
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 5);
    drop(cache);
    flip(&storage, &path, 128 + 1);
    let (cache, report) = open(&storage, big()).unwrap();
    assert!(
        report.damages.len() == 3
            && matches!(&report.damages[0], Damage::Segment { range, .. } if range.start == 0),
        "{report:?}"
    );
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 1);
    assert_eq!(held_after(&cache, group(2), at(1, 0)).len(), 1);
}

#[test]
fn a_missing_or_damaged_cursor_file_is_named_and_nothing_is_freed_by_it() {
    for damage in [0, 1] {
        let storage = CrashStorage::new();
        let (cache, _) = open(&storage, options(1 << 30, 64 << 10, &["a", "b"])).unwrap();
        let mut source = Source::open(&cache, group(1), 1).unwrap();
        cache.contact(group(1), "a", at(1, 0)).unwrap();
        cache.contact(group(1), "b", at(1, 0)).unwrap();
        (1..=9).for_each(|epoch| source.put(epoch, 40_000));
        cache.applied(group(1), "a", at(1, 6)).unwrap();
        cache.applied(group(1), "b", at(1, 4)).unwrap();
        drop(source);
        cache.close().unwrap();
        let path = dir().join("cursors");
        if damage == 0 {
            storage.remove(&path).unwrap();
        } else {
            flip(&storage, &path, 70);
        }
        let (cache, report) = open(&storage, options(1 << 30, 64 << 10, &["a", "b"])).unwrap();
        assert!(matches!(&report.damages[..], [Damage::Cursors { .. }]), "{report:?}");
        assert_eq!(cache.held(group(1)), at(1, 9));
        cache.contact(group(1), "a", at(1, 6)).unwrap();
        assert_eq!(held_after(&cache, group(1), at(1, 4)).len(), 5, "b is still served");
        cache.contact(group(1), "b", at(1, 4)).unwrap();
        drop(cache);
        assert!(open(&storage, options(1 << 30, 64 << 10, &["a", "b"])).unwrap().1.is_sound());
    }
}

#[test]
fn a_later_version_is_refused_by_name() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, big()).unwrap();
    Source::open(&cache, group(1), 1).unwrap().put(1, 10);
    cache.close().unwrap();
    for path in [segments(&storage)[0].clone(), dir().join("cursors")] {
        let file = storage.open(&path, OpenMode::ReadWrite).unwrap();
        file.write_all_at(&[9], 8).unwrap();
        let error = open(&storage, big()).unwrap_err().to_string();
        assert!(error.contains("version 9") && error.contains(path.to_str().unwrap()), "{error}");
        file.write_all_at(&[1], 8).unwrap();
    }
    open(&storage, big()).unwrap();
}

/// A sync that failed once and then "succeeded" must not make anything held: the kernel drops the pages it could not
/// write and shows them as clean. What was in doubt is therefore written again when the cache is opened.
#[test]
fn a_failed_sync_poisons_and_nothing_in_doubt_is_offered_unwritten() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, big()).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    source.put(1, 5000);
    // The write goes through, the sync does not. (The keeper's operations may take the number; try until it is ours.)
    storage.fail_from(storage.operations() + 1, Fault::InputOutput);
    let given = source.give(2, 300_000).is_ok();
    assert!(!given || !source.wait_held(2));
    assert!(matches!(source.give(3, 1), Err(AppendError::Cache(CacheError::Poisoned(_)))));
    assert!(matches!(Source::open(&cache, group(1), 1), Err(AppendError::Cache(CacheError::Poisoned(_)))));
    assert!(cache.status().poisoned.is_some());
    assert_eq!(held_after(&cache, group(1), at(1, 0)), [(at(1, 1), 5000)], "what is held stays readable");
    drop(source);
    assert!(matches!(cache.close(), Err(CacheError::Poisoned(_))));
    storage.mend();
    let (cache, report) = open(&storage, big()).unwrap();
    assert!(report.is_sound(), "{report:?}");
    let held = held_after(&cache, group(1), at(1, 0));
    drop(cache);
    // A power cut right now must not take back what was just offered.
    let (cache, report) = open(&storage.crash(0), big()).unwrap();
    assert!(report.is_sound());
    assert_eq!(held_after(&cache, group(1), at(1, 0)), held);
}

#[test]
fn a_full_disk_makes_sources_wait() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(1 << 30, 64 << 10, &["a"])).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    source.put(1, 5000);
    storage.fail_from(storage.operations(), Fault::NoSpace);
    (2..=5).for_each(|epoch| source.give(epoch, 50_000).unwrap());
    while !cache.status().disk_full {
        std::thread::yield_now();
    }
    assert_eq!(cache.held(group(1)), at(1, 1));
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 1, "what is held can be read meanwhile");
    storage.mend();
    assert!(source.wait_held(5));
    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 5);
    assert!(!cache.status().disk_full);
}

#[test]
fn on_a_real_disk_many_sources_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cache");
    let options = options(64 * MIB, 2 * MIB, &["a"]);
    let (cache, _) = Cache::open(Arc::new(RealStorage), &path, options.clone()).unwrap();
    let epochs = 30;
    std::thread::scope(|scope| {
        for number in 1..=8 {
            let cache = &cache;
            scope.spawn(move || {
                let group = group(number);
                let mut source = Source::open(cache, group, 1).unwrap();
                cache.contact(group, "a", at(1, 0)).unwrap();
                for epoch in 1..=epochs {
                    while let Err(error) = source.give(epoch, 400_000 + usize::from(number) * 100_000) {
                        assert!(matches!(error, AppendError::Full { .. }), "{error}");
                        source.wait_room();
                    }
                    assert!(source.wait_held(epoch));
                    if epoch > 3 {
                        assert_eq!(held_after(cache, group, at(1, epoch - 1)).len(), 1);
                        cache.applied(group, "a", at(1, epoch - 3)).unwrap();
                    }
                }
            });
        }
    });
    cache.close().unwrap();
    assert!(verify(&RealStorage, &path).unwrap().is_sound());
    let (cache, report) = Cache::open(Arc::new(RealStorage), &path, options).unwrap();
    assert!(report.is_sound());
    for number in 1..=8 {
        assert_eq!(held_after(&cache, group(number), at(1, epochs - 3)).len(), 3);
    }
}

/// After a failover a generation begins where the target is. What is here of the old one is of no use to anybody; a crash at any step of
/// that leaves either the old history or the new beginning, and never a mixture.
#[test]
fn a_later_generation_begins_where_its_target_is() {
    let mut crashes = 0;
    for stop in 0.. {
        let storage = CrashStorage::new();
        let (cache, _) = open(&storage, big()).unwrap();
        let mut source = Source::open(&cache, group(1), 1).unwrap();
        for epoch in 1..=4 {
            source.give(epoch, 5000).unwrap();
        }
        assert!(source.wait_held(4));
        let holds = |epoch| [("a".to_owned(), at(2, epoch))];
        assert!(!cache.adopt(group(1), &holds(0)).unwrap(), "nothing is held of it: it begins at 1");
        assert!(
            !cache.adopt(group(1), &[("a".to_owned(), at(1, 9))]).unwrap(),
            "of this one something is held"
        );
        let last = storage.operations() + stop;
        storage.stop_at(last);
        let adopted = cache.adopt(group(1), &holds(6)).is_ok();
        let stopped = storage.operations() > last;
        assert!(adopted || stopped);
        drop((source, cache));
        for seed in 0..4 {
            crashes += 1;
            let crashed = storage.crash(seed);
            let (cache, report) = open(&crashed, big()).unwrap();
            assert!(report.is_sound(), "{report:?}");
            match cache.held(group(1)) {
                held if held == at(1, 4) && !adopted => {
                    assert_eq!(held_after(&cache, group(1), at(1, 0)).len(), 4);
                    assert!(cache.adopt(group(1), &holds(6)).unwrap());
                }
                held => assert_eq!(held, at(2, 6)),
            }
            assert!(cache.is_adopted(group(1)) && !cache.adopt(group(1), &holds(8)).unwrap());
            assert!(matches!(Source::open(&cache, group(1), 1), Err(AppendError::OldGeneration { .. })));
            let mut next = Source::open(&cache, group(1), 2).unwrap();
            assert_eq!(next.appender.held(), Epoch(6));
            next.put(7, 300);
            assert_eq!(held_after(&cache, group(1), at(2, 6)), [(at(2, 7), 300)]);
            drop(next);
            cache.close().unwrap();
            let (cache, report) = open(&crashed, big()).unwrap();
            assert!(report.is_sound() && cache.held(group(1)) == at(2, 7), "{report:?}");
        }
        if !stopped {
            break;
        }
    }
    assert!(crashes > 8, "{crashes} crashes");
}
