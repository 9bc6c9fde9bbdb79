//! What is written to a promoted group stays, in order, whatever crashes; older points stay what they were.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::{ByteCount, ByteOffset, Consistency, Epoch, Extent, Generation};
use durable::{CrashStorage, Fault, Storage};

use super::failover::{NEXT, SECTORS, chosen, fail_over, gone_on, history, is_refused};
use super::model::{GENERATION, Model, Steps, check_view, dir, noise, open, volume_id};
use crate::{GroupReplica, Pace, PromotedVolume, ReplicaError, verify};

/// Longer ones are several records, of which a crash may leave the first.
const WRITE_BYTES_MAX: u64 = 16 << 10;

type Images = Vec<Vec<u8>>;

#[derive(Clone, Debug)]
enum Step {
    /// Volume, offset, length; noise or zeroes.
    Write(usize, u64, u64, Option<u64>),
    Flush,
    Cut,
    /// The first half of a cut: what follows it is written beside what is still to be applied.
    Close,
}

fn step(steps: &mut Steps) -> Step {
    match steps.below(12) {
        0 => Step::Cut,
        1 => Step::Close,
        2 | 3 => Step::Flush,
        _ => {
            let volume = steps.below(2) as usize;
            let size = SECTORS[volume] * 512;
            // Bytes, sectors and blocks: at every place, over every edge.
            let unit = [1, 512, 4096][steps.below(3) as usize];
            let offset = steps.below(size) / unit * unit;
            let length = (1 + steps.below(WRITE_BYTES_MAX)).next_multiple_of(unit).min(WRITE_BYTES_MAX);
            let fill = (steps.below(3) > 0).then(|| steps.below(u64::MAX));
            Step::Write(volume, offset, length.min(size - offset), fill)
        }
    }
}

fn do_to_images(images: &mut Images, step: &Step) {
    if let Step::Write(volume, offset, length, fill) = step {
        let place = &mut images[*volume][*offset as usize..][..*length as usize];
        place.fill(0);
        if let Some(seed) = fill {
            noise(*seed, place);
        }
    }
}

fn do_to_replica(replica: &Arc<GroupReplica>, step: &Step) -> Result<(), ReplicaError> {
    match step {
        Step::Cut => replica.cut_promoted(),
        Step::Close => {
            replica.close_promoted();
            Ok(())
        }
        Step::Flush => replica.promoted_volume(volume_id(0))?.flush(),
        Step::Write(volume, offset, length, fill) => {
            let disk = replica.promoted_volume(volume_id(*volume))?;
            match fill {
                None => disk.zero(Extent::new(ByteOffset(*offset), ByteCount(*length)).unwrap()),
                Some(seed) => {
                    let mut data = vec![0; *length as usize];
                    noise(*seed, &mut data);
                    disk.write_at(&data, ByteOffset(*offset))
                }
            }
        }
    }
}

fn whole(disk: &PromotedVolume) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.size().0 as usize];
    disk.read_at(&mut bytes, ByteOffset(0)).unwrap();
    bytes
}

fn images_of(replica: &Arc<GroupReplica>) -> Images {
    (0..2).map(|index| whole(&replica.promoted_volume(volume_id(index)).unwrap())).collect()
}

/// As a whole, in odd pieces, and by its data alone.
fn check_disk(disk: &PromotedVolume, content: &[u8]) {
    assert_eq!(disk.size().0, content.len() as u64);
    assert!(whole(disk) == content);
    let mut pieces = vec![0xee; content.len()];
    for (index, piece) in pieces.chunks_mut(1234).enumerate() {
        disk.read_at(piece, ByteOffset(index as u64 * 1234)).unwrap();
    }
    assert!(pieces == content);
    let (mut data, mut at) = (vec![0; content.len()], ByteOffset(0));
    while let Some(extent) = disk.next_data(at).unwrap() {
        assert!(extent.offset() >= at && extent.end().0 <= disk.size().0);
        let place = extent.offset().0 as usize..extent.end().0 as usize;
        disk.read_at(&mut data[place], extent.offset()).unwrap();
        at = extent.end();
    }
    assert!(data == content, "by data");
    assert!(matches!(
        disk.read_at(&mut [0; 2], ByteOffset(disk.size().0 - 1)),
        Err(ReplicaError::PastEnd { .. })
    ));
    assert!(matches!(
        disk.write_at(&[0; 2], ByteOffset(disk.size().0 - 1)),
        Err(ReplicaError::PastEnd { .. })
    ));
}

fn reopened(storage: &CrashStorage, replica: Arc<GroupReplica>) -> Arc<GroupReplica> {
    drop(Arc::into_inner(replica).expect("nobody else has it"));
    Arc::new(open(storage, 1000).unwrap().0)
}

/// A group that is failed over to some point, and what it should hold.
fn failed_over(storage: &CrashStorage, seed: u64) -> (Arc<GroupReplica>, Model, Model, Steps) {
    let (replica, model, mut steps) = history(storage, seed, 6);
    let point = chosen(&model, &mut steps);
    fail_over(&replica, point).unwrap();
    let over = gone_on(&model, &replica, point);
    (Arc::new(replica), model, over, steps)
}

#[test]
fn what_is_written_is_read_and_stays() {
    let mut filled = 0;
    for seed in 0..40 {
        let storage = CrashStorage::new();
        let (mut replica, before, mut model, mut steps) = failed_over(&storage, seed);
        let committed = seed % 3 == 0;
        let mut generation = NEXT;
        if committed {
            replica.commit_failover().unwrap();
            generation = Generation(NEXT.0 + 1);
        }
        assert!(matches!(replica.demote(), Err(ReplicaError::NotPromoted { .. })));
        assert!(matches!(replica.promoted_volume(volume_id(0)), Err(ReplicaError::NotPromoted { .. })));
        for _ in 0..2 {
            assert_eq!(replica.promote().unwrap(), generation);
        }
        assert!(matches!(replica.promoted_volume(volume_id(7)), Err(ReplicaError::NoSuchVolume { .. })));
        for _ in 0..60 + 5 * seed {
            let step = step(&mut steps);
            let next = replica.next_promoted().unwrap();
            if matches!(step, Step::Write(..)) && steps.below(8) == 0 {
                for generation in [GENERATION, NEXT, generation] {
                    is_refused(&replica, &model_now(&replica, &model), &mut steps, generation);
                    assert!(matches!(replica.standing(generation), Err(ReplicaError::Promoted { .. })));
                }
                assert!(matches!(replica.cancel_failover(), Err(ReplicaError::Promoted { .. })));
                assert!(matches!(
                    replica.fail_over(
                        *before.points.keys().next().unwrap(),
                        Generation(99),
                        &Pace::unbounded()
                    ),
                    Err(ReplicaError::Promoted { .. })
                ));
            }
            do_to_replica(&replica, &step).unwrap();
            if replica.next_promoted().unwrap() > next {
                // Closed before a write for which there was no room, or by a cut: it is what was written until then.
                filled += usize::from(matches!(step, Step::Write(..)));
                model.epoch = next;
                model.points.insert(next, (Consistency::Crash, model.current.clone()));
            }
            do_to_images(&mut model.current, &step);
            let volume = steps.below(2) as usize;
            let disk = replica.promoted_volume(volume_id(volume)).unwrap();
            assert!(whole(&disk) == model.current[volume], "{step:?}");
            assert!(matches!(replica.demote(), Err(ReplicaError::PromotedInUse { open: 1, .. })));
            drop(disk);
            if steps.below(15) == 0 {
                // What waited in its journal is a point now.
                let next = replica.next_promoted().unwrap();
                replica = reopened(&storage, replica);
                if replica.next_promoted().unwrap() > next {
                    model.epoch = next;
                    model.points.insert(next, (Consistency::Crash, model.current.clone()));
                }
                model.check(&replica, 1000);
            }
            if steps.below(10) == 0 {
                check_disk(&replica.promoted_volume(volume_id(volume)).unwrap(), &model.current[volume]);
            }
            if committed && steps.below(10) == 0 {
                replica.maintain(&Pace::unbounded()).unwrap();
            }
        }
        let next = replica.next_promoted().unwrap();
        replica.cut_promoted().unwrap();
        if replica.applied().1 == next {
            model.epoch = next;
            model.points.insert(next, (Consistency::Crash, model.current.clone()));
        }
        model.check(&replica, 1000);
        if seed % 3 == 1 {
            assert_eq!(replica.commit_failover().unwrap(), NEXT, "also while it is promoted");
        }
        replica.demote().unwrap();
        assert!(replica.promoted().is_none() && !replica.wait_to_cut(std::time::Duration::ZERO));
        replica = reopened(&storage, replica);
        assert!(replica.promoted().is_none());
        model.check(&replica, 1000);
        match seed % 3 {
            2 => {
                assert_eq!(replica.cancel_failover().unwrap(), GENERATION);
                assert!(matches!(replica.promote(), Err(ReplicaError::NotFailedOver { .. })));
                before.check(&replica, 1000);
            }
            _ => {
                // Again, since nobody has sent anything; and then no more.
                let generation = replica.applied().0.unwrap();
                assert_eq!(replica.promote().unwrap(), Generation(generation.0 + 1));
                assert!(images_of(&replica) == model.current);
                replica.demote().unwrap();
                let mut made = model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20));
                made.stamp.generation = Generation(generation.0 + 1);
                made.apply(&replica).unwrap();
                model.check(&replica, 1000);
                assert!(matches!(replica.promote(), Err(ReplicaError::NotFailedOver { .. })));
            }
        }
        drop(replica);
        assert_eq!(verify(&storage, &dir()).unwrap().problems, Vec::<String>::new());
    }
    assert!(filled > 20, "{filled}");
}

fn model_now(replica: &GroupReplica, model: &Model) -> Model {
    Model { epoch: replica.applied().1, ..model.clone() }
}

#[test]
fn only_a_group_that_is_failed_over_is_promoted() {
    let storage = CrashStorage::new();
    let (replica, mut model, mut steps) = history(&storage, 1, 5);
    assert!(matches!(replica.promote(), Err(ReplicaError::NotFailedOver { .. })));
    fail_over(&replica, model.epoch).unwrap();
    replica.commit_failover().unwrap();
    // The new source has begun: it would write as well.
    model.epoch = replica.applied().1;
    let mut made = model.step(&steps.step(Consistency::Crash, &SECTORS, 4, 20));
    made.stamp.generation = NEXT;
    made.apply(&replica).unwrap();
    assert!(matches!(replica.promote(), Err(ReplicaError::NotFailedOver { .. })));
}

/// What a run of steps has come to when it ended, by itself or because the machine stopped.
struct Run {
    /// The state after each write that was begun, the first before any.
    states: Vec<Images>,
    /// How many of them were flushed, or applied.
    flushed: usize,
    demoted: bool,
    cancelled: bool,
}

fn run(replica: &Arc<GroupReplica>, start: &Images, script: &[Step], cancel: bool) -> Result<Run, Run> {
    let mut run = Run { states: vec![start.clone()], flushed: 0, demoted: false, cancelled: false };
    macro_rules! or_stop {
        ($does:expr) => {
            match $does {
                Ok(_) => {}
                Err(_) => return Err(run),
            }
        };
    }
    or_stop!(replica.promote());
    for step in script {
        if matches!(step, Step::Write(..)) {
            let mut images = run.states.last().unwrap().clone();
            do_to_images(&mut images, step);
            run.states.push(images);
        }
        or_stop!(do_to_replica(replica, step));
        if matches!(step, Step::Flush | Step::Cut) {
            run.flushed = run.states.len() - 1;
        }
    }
    or_stop!(replica.demote());
    run.demoted = true;
    run.flushed = run.states.len() - 1;
    if cancel {
        or_stop!(replica.cancel_failover());
        run.cancelled = true;
    }
    Ok(run)
}

/// The machine stops in any step of promoting, writing, flushing, cutting, applying, demoting and cancelling: what was flushed is there, and
/// what is there is what some first writes have made.
#[test]
fn a_crash_at_any_step_leaves_a_prefix_with_all_that_was_flushed() {
    let (mut tried, mut lost, mut kept) = (0, 0, 0);
    for case in 0..6_u64 {
        for stop in 0.. {
            let storage = CrashStorage::new();
            let (replica, before, over, mut steps) = failed_over(&storage, case);
            let script: Vec<Step> = (0..16).map(|_| step(&mut steps)).collect();
            let cancel = case % 2 == 1;
            let at = storage.operations() + stop;
            storage.stop_at(at);
            let outcome = run(&replica, &over.current, &script, cancel);
            let stopped = storage.operations() > at;
            assert!(stopped || outcome.is_ok());
            drop(replica);
            let (Ok(run) | Err(run)) = outcome;
            for seed in 0..6 {
                let mut crashed = storage.crash(seed);
                assert_eq!(verify(&crashed, &dir()).unwrap().problems, Vec::<String>::new());
                // The machine may stop again while it opens: at any step of that.
                if seed > 2 {
                    crashed.stop_at((stop + seed) % 23);
                    let _ = open(&crashed, 1000);
                    crashed = crashed.crash(seed + stop);
                }
                let (replica, report) = open(&crashed, 1000).unwrap();
                assert_eq!(report.damaged, []);
                tried += 1;
                check_after(
                    &crashed,
                    Arc::new(replica),
                    &run,
                    (&before, &over),
                    cancel,
                    (&mut lost, &mut kept),
                );
            }
            if !stopped {
                break;
            }
        }
    }
    assert!(tried > 500 && lost > 50 && kept > 50, "{tried}, {lost}, {kept}");
}

fn check_after(
    storage: &CrashStorage,
    replica: Arc<GroupReplica>,
    run: &Run,
    (before, over): (&Model, &Model),
    cancel: bool,
    (lost, kept): (&mut usize, &mut usize),
) {
    // What was before any of this is what it was.
    for (epoch, (_, images)) in &before.points {
        check_view(&replica.view(volume_id(0), *epoch).unwrap(), &images[0]);
    }
    if replica.failover().is_none() {
        assert!(cancel && run.demoted);
        before.check(&replica, 1000);
        return;
    }
    assert!(!run.cancelled);
    if !replica.failover().unwrap().1 {
        // It was being cancelled.
        assert!(cancel && run.demoted);
        replica.cancel_failover().unwrap();
        before.check(&replica, 1000);
        return;
    }
    let newest = replica.applied().1;
    let images = match replica.promoted() {
        Some(_) => {
            assert!(!run.demoted);
            images_of(&replica)
        }
        None => (0..2).map(|index| read_view(&replica, index, newest)).collect(),
    };
    let found = (run.flushed..run.states.len()).find(|count| run.states[*count] == images);
    // Cancelling takes epochs back one by one.
    let found = found.or_else(|| {
        (cancel && run.demoted).then(|| run.states.iter().position(|state| *state == images)).flatten()
    });
    let found =
        found.unwrap_or_else(|| panic!("{} writes were flushed, and this is none of them", run.flushed));
    *lost += run.states.len() - 1 - found;
    *kept += found - run.flushed.min(found);
    // So is every point on the way, in order.
    let mut least = 0;
    for point in replica.points().iter().filter(|point| point.epoch > over.epoch) {
        let images: Images = (0..2).map(|index| read_view(&replica, index, point.epoch)).collect();
        let count = (least..run.states.len()).find(|count| run.states[*count] == images);
        least = count.expect("a point is what some first writes have made");
    }
    // It goes on.
    let mut images = images;
    let mut replica = replica;
    if !(cancel && run.demoted) {
        replica.promote().unwrap();
        for (seed, offset) in [(1, 3000), (2, 60_000)] {
            let step = Step::Write(0, offset, 9000, Some(seed));
            do_to_replica(&replica, &step).unwrap();
            do_to_images(&mut images, &step);
        }
        replica = reopened(storage, replica);
        assert!(images_of(&replica) == images);
        replica.demote().unwrap();
        let newest = replica.applied().1;
        let found: Images = (0..2).map(|index| read_view(&replica, index, newest)).collect();
        assert!(found == images);
    }
    replica.cancel_failover().unwrap();
    before.check(&replica, 1000);
    drop(replica);
    assert_eq!(verify(storage, &dir()).unwrap().problems, Vec::<String>::new());
}

fn read_view(replica: &GroupReplica, index: usize, epoch: Epoch) -> Vec<u8> {
    let view = replica.view(volume_id(index), epoch).unwrap();
    let mut bytes = vec![0; view.size().0 as usize];
    view.read_at(&mut bytes, ByteOffset(0)).unwrap();
    bytes
}

/// Without space a write is refused and nothing else is; what was acknowledged is there when there is space again.
#[test]
fn a_full_medium_refuses_writes_and_loses_nothing() {
    for fault in [Fault::NoSpace, Fault::ShortWrite] {
        let mut refused = 0;
        'stops: for stop in 0..120 {
            let storage = CrashStorage::new();
            let (replica, _, over, mut steps) = failed_over(&storage, 4);
            replica.promote().unwrap();
            let mut images = over.current.clone();
            storage.fail_from(storage.operations() + stop, fault);
            for _ in 0..40 {
                let step = step(&mut steps);
                match do_to_replica(&replica, &step) {
                    Ok(()) => do_to_images(&mut images, &step),
                    // The state is written over in place, for which a real medium needs no space.
                    Err(error) if error.to_string().contains("/state: ") => continue 'stops,
                    Err(error) => {
                        assert!(error.is_retryable(), "{error}");
                        refused += 1;
                    }
                }
                assert!(images_of(&replica) == images);
            }
            replica.promoted_volume(volume_id(0)).unwrap().flush().unwrap();
            let crashed = storage.crash(stop % 5);
            let (after, _) = open(&crashed, 1000).unwrap();
            assert!(images_of(&Arc::new(after)) == images, "what was flushed, without space");
            let storage = storage.crash(1);
            let replica = Arc::new(open(&storage, 1000).unwrap().0);
            replica.demote().unwrap();
            assert!(read_view(&replica, 0, replica.applied().1) == images[0]);
        }
        assert!(refused > 100);
    }
}

/// The process is killed, not the machine: what was not flushed is still in the system's cache. Opened again without space to apply it, it
/// counts, and so the next flush has to answer for it.
#[test]
fn what_a_killed_process_left_is_durable_once_it_counts() {
    let storage = CrashStorage::new();
    let (replica, _, over, mut steps) = failed_over(&storage, 4);
    replica.promote().unwrap();
    let mut images = over.current.clone();
    for round in 0..2 {
        for _ in 0..8 {
            let step = Step::Write(0, steps.below(70_000), 900, Some(steps.below(u64::MAX)));
            do_to_replica(&replica, &step).unwrap();
            do_to_images(&mut images, &step);
        }
        if round == 0 {
            replica.close_promoted();
        }
    }
    drop(replica);
    storage.fail_from(storage.operations(), Fault::NoSpace);
    let replica = Arc::new(open(&storage, 1000).unwrap().0);
    assert!(images_of(&replica) == images);
    replica.promoted_volume(volume_id(0)).unwrap().flush().unwrap();
    for seed in 0..4 {
        let replica = Arc::new(open(&storage.crash(seed), 1000).unwrap().0);
        assert!(images_of(&replica) == images, "{seed}");
    }
}

/// A flush is of what was closed and not applied as well.
#[test]
fn a_flush_reaches_what_is_still_to_be_applied() {
    let storage = CrashStorage::new();
    let (replica, _, over, _) = failed_over(&storage, 4);
    replica.promote().unwrap();
    let mut images = over.current.clone();
    let writes =
        [Step::Write(0, 1000, 9000, Some(1)), Step::Close, Step::Write(1, 77, 900, Some(2)), Step::Flush];
    for step in &writes {
        do_to_replica(&replica, step).unwrap();
        do_to_images(&mut images, step);
    }
    for seed in 0..4 {
        let replica = Arc::new(open(&storage.crash(seed), 1000).unwrap().0);
        assert!(images_of(&replica) == images, "{seed}");
    }
}

/// A failed sync is not taken for one: nothing more is acknowledged until it is opened again.
#[test]
fn a_failed_sync_poisons() {
    for stop in 0..60 {
        let storage = CrashStorage::new();
        let (replica, _, over, mut steps) = failed_over(&storage, 2);
        replica.promote().unwrap();
        let (mut states, mut flushed) = (vec![over.current.clone()], 0);
        storage.fail_at(storage.operations() + stop, Fault::InputOutput);
        let mut failed = false;
        for _ in 0..60 {
            let step = step(&mut steps);
            let outcome = do_to_replica(&replica, &step);
            assert!(!failed || outcome.is_err() || matches!(step, Step::Cut | Step::Close));
            if matches!(step, Step::Write(..)) && !failed {
                let mut images = states.last().unwrap().clone();
                do_to_images(&mut images, &step);
                states.push(images);
            } else if outcome.is_ok() && !failed && !matches!(step, Step::Close) {
                flushed = states.len() - 1;
            }
            failed |= outcome.is_err();
        }
        assert!(!failed || replica.poisoned().is_some());
        for seed in 0..4 {
            let crashed = storage.crash(seed);
            let replica = Arc::new(open(&crashed, 1000).unwrap().0);
            let images = images_of(&replica);
            assert!(states[flushed..].contains(&images));
        }
    }
}

/// A journal that was written and then changed by somebody does not pass for a torn one where that can be told.
#[test]
fn what_does_not_belong_is_refused_by_name() {
    let storage = CrashStorage::new();
    let (replica, ..) = failed_over(&storage, 1);
    replica.promote().unwrap();
    do_to_replica(&replica, &Step::Write(0, 5, 700, Some(1))).unwrap();
    let epoch = replica.next_promoted().unwrap();
    drop(replica);
    let storage = storage.crash(1);
    let path = crate::promoted::journal::path(&dir().join("journal"), epoch);
    let marker = dir().join("promoted");
    let change = |path: &std::path::Path, at: u64, bytes: &[u8]| {
        let storage = storage.crash(1);
        let file = storage.open(path, durable::OpenMode::ReadWrite).unwrap();
        file.write_all_at(bytes, at).unwrap();
        open(&storage, 1000).map(drop).unwrap_err().to_string()
    };
    assert!(change(&path, 8, &[9]).contains("version 9"));
    assert!(change(&marker, 8, &[9]).contains("version 9"));
    assert!(change(&marker, 30, &[9]).contains("checksum"));
    let gone = storage.crash(1);
    gone.remove(&marker).unwrap();
    assert!(open(&gone, 1000).map(drop).unwrap_err().to_string().contains("is not promoted"));
}

/// Writers, readers, cuts and views of older points at the same time. Each writer has blocks of its own, and knows what it wrote.
#[test]
fn many_write_and_read_while_it_is_cut() {
    let storage = CrashStorage::new();
    let (replica, before, ..) = failed_over(&storage, 3);
    replica.promote().unwrap();
    let done = AtomicBool::new(false);
    let flushes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3_u64)
            .map(|writer| {
                let (replica, flushes) = (&replica, &flushes);
                scope.spawn(move || {
                    let disk = replica.promoted_volume(volume_id(0)).unwrap();
                    for round in 0..400_u64 {
                        let at = ByteOffset(writer * 24576 + round % 6 * 4096 + 100);
                        let mut data = vec![0; 3900];
                        noise(writer << 32 | round, &mut data);
                        disk.write_at(&data, at).unwrap();
                        let mut found = vec![0; 3900];
                        disk.read_at(&mut found, at).unwrap();
                        assert!(found == data);
                        if round % 16 == 0 {
                            disk.flush().unwrap();
                            flushes.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                replica.cut_promoted().unwrap();
            }
        });
        scope.spawn(|| {
            let (epoch, (_, images)) = before.points.iter().next().unwrap();
            let view = replica.view(volume_id(0), *epoch).unwrap();
            while !done.load(Ordering::Relaxed) {
                check_view(&view, &images[0]);
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let images = images_of(&replica);
    let replica = reopened(&storage, replica);
    assert!(images_of(&replica) == images);
    replica.demote().unwrap();
    assert!(read_view(&replica, 0, replica.applied().1) == images[0]);
}
