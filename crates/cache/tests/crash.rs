//! Power cuts at every step: nothing acknowledged is lost, nothing half-received is offered, the order is kept.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{ByteCount, Epoch, Generation, GroupId};
use cache::{Cache, Event, verify};
use durable::{CrashStorage, Fault, Storage};
use support::*;

const SEGMENT: u64 = 16 << 10;
const TARGETS: [&str; 2] = ["a", "b"];

fn small() -> cache::Options {
    options(8 << 20, SEGMENT, &TARGETS)
}

/// What the outside world was told.
#[derive(Default)]
struct Told {
    /// The last held, by group.
    held: BTreeMap<GroupId, Arc<AtomicU64>>,
    /// What the world told the cache that all targets have applied.
    applied: Mutex<BTreeMap<GroupId, u64>>,
}

/// A life of a cache: two groups, changesets of several sizes, some abandoned, targets that apply with a lag. Ends early
/// when the machine stops.
fn live(cache: &Cache, told: &mut Told, rounds: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut sources = Vec::new();
    for number in [1, 2] {
        let id = group(number);
        let held = told.held.entry(id).or_default().clone();
        let appender = cache.appender(
            id,
            Generation(1),
            Arc::new(move |event| {
                if let Event::Held(epoch) = event {
                    held.store(epoch.0, Ordering::SeqCst);
                }
            }),
        )?;
        for target in TARGETS {
            let cursor = cache.cursor(id, target).unwrap_or(at(1, 0));
            cache.contact(id, target, cursor)?;
        }
        told.held[&id].fetch_max(appender.held().0, Ordering::SeqCst);
        sources.push(appender);
    }
    let first = sources[0].held().0.min(sources[1].held().0) + 1;
    for epoch in first..first + rounds {
        for (index, appender) in sources.iter_mut().enumerate() {
            let id = group(index as u8 + 1);
            if epoch <= appender.held().0 {
                continue;
            }
            let size = [10, 3000, 700, 9000, 0, 20_000][(epoch as usize + index) % 6];
            if epoch % 3 == 0 {
                // Begun, and given up half-way.
                appender.begin(Epoch(epoch), ByteCount(50_000))?;
                appender.push(content(id, at(9, epoch), 20_000))?;
            }
            let bytes = content(id, at(1, epoch), size);
            appender.begin(Epoch(epoch), ByteCount(size as u64))?;
            appender.push(bytes)?;
            appender.end()?;
        }
        // Both are in flight together; then all is durable.
        if epoch % 2 == 0 {
            for (id, held) in &told.held {
                while held.load(Ordering::SeqCst) < epoch {
                    if let Some(reason) = cache.status().poisoned {
                        return Err(reason.into());
                    }
                    std::thread::yield_now();
                }
                let applied = epoch.saturating_sub(3);
                if applied > cache.applied_by_all(*id).epoch.0 {
                    for target in TARGETS {
                        cache.applied(*id, target, at(1, applied))?;
                    }
                    told.applied.lock().unwrap().insert(*id, applied);
                }
            }
        }
    }
    Ok(())
}

/// What must hold of any image that a crash leaves.
fn check(after: &CrashStorage, told: &Told, context: &str) {
    let offline = verify(after, dir());
    if let Ok(report) = &offline {
        assert!(report.is_sound(), "{context}: verify: {report:?}");
    }
    let (cache, report) = open(after, small()).unwrap();
    assert!(report.is_sound(), "{context}: {report:?}");
    for (id, held) in &told.held {
        let held = held.load(Ordering::SeqCst);
        let now = cache.held(*id);
        assert!(now.epoch.0 >= held, "{context}: {held} was acknowledged, {now} is held");
        // From what the slowest target can have applied on, everything is there, whole and in order.
        let applied = told.applied.lock().unwrap().get(id).copied().unwrap_or(0);
        let base = cache
            .status()
            .groups
            .iter()
            .find(|found| found.group == *id)
            .map_or(0, |found| found.freed.epoch.0);
        assert!(base <= applied, "{context}: {base} was freed, {applied} applied");
        let all = held_after(&cache, *id, at(1, base));
        let epochs: Vec<u64> = all.iter().map(|(position, _)| position.epoch.0).collect();
        assert_eq!(epochs, (base + 1..=now.epoch.0).collect::<Vec<_>>(), "{context}");
        assert!(all.iter().all(|(position, size)| {
            *size
                == [10, 3000, 700, 9000, 0, 20_000]
                    [(position.epoch.0 as usize + usize::from(id.0[0]) - 1) % 6]
        }));
    }
    // What is offered stays, even when the power goes again at once, and the cache goes on.
    let before: Vec<_> = told.held.keys().map(|id| cache.held(*id)).collect();
    drop(cache);
    let (cache, report) = open(&after.crash(0), small()).unwrap();
    assert!(report.is_sound(), "{context}: second crash: {report:?}");
    for (id, before) in told.held.keys().zip(before) {
        assert_eq!(cache.held(*id), before, "{context}: taken back");
        let mut source = Source::open(&cache, *id, 1).unwrap();
        source.put(before.epoch.0 + 1, 10);
    }
}

#[test]
fn a_crash_at_every_step() {
    let mut finished = false;
    let mut stop = 0;
    while !finished {
        let storage = CrashStorage::new();
        storage.stop_at(stop);
        let mut told = Told::default();
        if let Ok((cache, _)) = open(&storage, small()) {
            finished = live(&cache, &mut told, 14).is_ok() && cache.close().is_ok();
        }
        for seed in 0..6 {
            check(
                &storage.crash(seed * 7919 + stop % 7919 * u64::from(seed > 1)),
                &told,
                &format!("stop {stop} seed {seed}"),
            );
        }
        stop += 1;
    }
    assert!(stop > 60, "{stop} steps only");
}

#[test]
fn crash_upon_crash() {
    for seed in 0..150 {
        let mut storage = CrashStorage::new();
        let mut told = Told::default();
        for life in 0..4 {
            // Each life goes on where the last crash left it.
            storage.stop_at(storage.operations() + 20 + (seed * 37 + life * 11) % 90);
            if let Ok((cache, report)) = open(&storage, small()) {
                assert!(report.is_sound(), "seed {seed} life {life}: {report:?}");
                let _ = live(&cache, &mut told, 12);
            }
            storage = storage.crash(seed * 31 + life);
        }
        check(&storage, &told, &format!("seed {seed}"));
    }
}

#[test]
fn a_failure_at_every_step() {
    [Fault::InputOutput, Fault::NoSpace].into_iter().for_each(failing);
}

/// Each write stops half way: what is there of it is never taken for all of it, and the cache goes on.
#[test]
fn a_short_write_at_every_step() {
    failing(Fault::ShortWrite);
}

fn failing(fault: Fault) {
    for at_operation in 0..130 {
        let storage = CrashStorage::new();
        storage.fail_at(at_operation, fault);
        let mut told = Told::default();
        if let Ok((cache, _)) = open(&storage, small()) {
            let lived = live(&cache, &mut told, 14);
            if fault != Fault::InputOutput {
                lived.unwrap();
            }
        }
        storage.mend();
        for seed in [0, 1, at_operation + 2] {
            check(&storage.crash(seed), &told, &format!("{fault:?} at {at_operation} seed {seed}"));
        }
    }
}

/// The log's end may be torn anywhere: no cut of the last segment makes the cache lose what is before it.
#[test]
fn the_last_segment_cut_anywhere() {
    let storage = CrashStorage::new();
    let (cache, _) = open(&storage, options(8 << 20, 64 << 10, &TARGETS)).unwrap();
    let mut source = Source::open(&cache, group(1), 1).unwrap();
    (1..=8).for_each(|epoch| source.put(epoch, 1000));
    let image = storage.crash(0);
    let path = dir().join("segment-0000000000000001.log");
    let length = image.open(&path, durable::OpenMode::Read).unwrap().len().unwrap();
    for cut in (0..length.min(10_000)).step_by(97) {
        let image = storage.crash(0);
        // Nothing vouches for the records, as when the cursor file was written before them.
        image.remove(&dir().join("cursors")).unwrap();
        image.open(&path, durable::OpenMode::ReadWrite).unwrap().set_len(cut).unwrap();
        let (cache, _) = open(&image, small()).unwrap();
        let whole = cut.saturating_sub(128) / 1152;
        assert_eq!(held_after(&cache, group(1), at(1, 0)).len() as u64, whole.min(8), "cut {cut}");
    }
}
