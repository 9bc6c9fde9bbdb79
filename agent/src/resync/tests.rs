use super::*;

const GIB: ByteCount = ByteCount::gib(1);

fn volumes(dirty: ByteCount) -> Vec<(String, ByteCount, ByteCount)> {
    vec![("data".into(), GIB, dirty)]
}

fn clean() -> Look {
    Look { volumes: volumes(ByteCount::ZERO), has_replica: Some(true), ..Look::default() }
}

fn suspect(bytes: ByteCount) -> Look {
    Look { suspect: bytes, volumes: volumes(bytes), has_replica: Some(true), ..Look::default() }
}

fn noon() -> Timestamp {
    "2026-11-20T12:00:00Z".parse().unwrap() // a Friday
}

fn evening() -> Timestamp {
    "2026-11-20T18:00:00Z".parse().unwrap()
}

fn resyncs() -> Resyncs {
    let section = ResyncSection { time_zone: Some("UTC".into()), ..ResyncSection::default() };
    let resyncs = Resyncs::new(&section);
    resyncs.conditioned(Condition { has_point: true, ..Condition::default() });
    resyncs
}

fn my_turn() -> Turn {
    Turn { ahead: 0, at_once: 4 }
}

fn all() -> Deed {
    Deed::Begin(BTreeMap::from([(0, Part::All)]))
}

fn shown(resyncs: &Resyncs) -> (ResyncReason, ResyncStage) {
    let status = resyncs.status().unwrap();
    (status.reason, status.stage)
}

#[test]
fn what_was_lost_waits_for_its_hours_and_then_for_its_turn() {
    let resyncs = resyncs();
    resyncs.expect(Some(Cause::new(ResyncReason::TrackingEnded, "the machine was started again")), false);
    resyncs.conditioned(Condition { has_point: true, ..Condition::default() });
    assert_eq!(resyncs.look(suspect(GIB), noon()), Deed::Nothing);
    assert_eq!(shown(&resyncs), (ResyncReason::TrackingEnded, ResyncStage::WaitingForWindow));
    assert!(!resyncs.wants_turn() && !resyncs.is_running());
    assert_eq!(resyncs.status().unwrap().bytes, GIB);
    resyncs.look(suspect(GIB), evening());
    assert!(resyncs.wants_turn() && !resyncs.is_running());
    resyncs.turn(Turn { ahead: 2, at_once: 4 });
    assert_eq!(shown(&resyncs).1, ResyncStage::WaitingForTurn);
    assert_eq!(resyncs.status().unwrap().ahead, Some(2));
    assert!(!resyncs.is_running());
    resyncs.turn(my_turn());
    // What is suspect is so already.
    assert_eq!(resyncs.look(suspect(GIB), evening()), Deed::Begin(BTreeMap::new()));
    assert!(resyncs.is_running());
    // It goes on when the hours are over.
    resyncs.look(suspect(ByteCount::mib(1)), noon());
    assert_eq!(shown(&resyncs), (ResyncReason::TrackingEnded, ResyncStage::Comparing));
    resyncs.look(clean(), noon());
    assert!(resyncs.status().is_none() && !resyncs.wants_turn() && !resyncs.is_running());
}

#[test]
fn a_person_a_group_without_a_point_and_what_was_begun_do_not_wait() {
    let commanded = resyncs();
    commanded.look(suspect(GIB), noon());
    assert!(!commanded.wants_turn());
    commanded.ask(&[0], ResyncWhen::Window);
    commanded.look(suspect(GIB), noon());
    assert!(!commanded.wants_turn());
    commanded.ask(&[0], ResyncWhen::Now);
    commanded.look(suspect(GIB), noon());
    assert!(commanded.wants_turn());

    let pointless = resyncs();
    pointless.conditioned(Condition::default());
    pointless.look(suspect(GIB), noon());
    assert!(pointless.wants_turn());

    let begun = resyncs();
    begun.expect(None, true);
    begun.look(suspect(GIB), noon());
    assert!(begun.wants_turn());
    assert_eq!(shown(&begun).0, ResyncReason::Continued);

    // Disks that are protected for the first time, though the target has points: it has adopted what came home.
    let adopted = resyncs();
    adopted.expect(Some(Cause::new(ResyncReason::TrackingEnded, "tracking begins")), false);
    adopted.at_once();
    adopted.conditioned(Condition { has_point: true, ..Condition::default() });
    adopted.look(suspect(GIB), noon());
    assert!(adopted.wants_turn());
    adopted.turn(my_turn());
    adopted.look(suspect(GIB), noon());
    adopted.look(clean(), noon());
    // The next one is nobody's decision; nor is it when there was nothing to compare.
    adopted.at_once();
    adopted.look(clean(), noon());
    adopted.look(Look { losses: 1, ..suspect(GIB) }, noon());
    assert_eq!(shown(&adopted), (ResyncReason::TrackingLost, ResyncStage::WaitingForWindow));
}

/// Nothing to compare with: the first copy is no resync, and asks nobody.
#[test]
fn the_first_copy_is_none() {
    let resyncs = resyncs();
    resyncs.expect(Some(Cause::new(ResyncReason::TrackingEnded, "nobody followed")), false);
    resyncs.look(Look { has_replica: Some(false), ..suspect(GIB) }, evening());
    assert!(resyncs.status().is_none() && !resyncs.wants_turn());
}

/// Points go on until it begins: nothing becomes suspect before.
#[test]
fn a_command_for_the_hours_leaves_tracking_alone_until_then() {
    let resyncs = resyncs();
    resyncs.ask(&[0], ResyncWhen::Window);
    assert_eq!(resyncs.look(clean(), noon()), Deed::Nothing);
    assert_eq!(shown(&resyncs), (ResyncReason::Command, ResyncStage::WaitingForWindow));
    assert!(resyncs.status().unwrap().begins.is_some());
    resyncs.look(clean(), evening());
    resyncs.turn(my_turn());
    assert_eq!(resyncs.look(clean(), evening()), all());
    assert!(resyncs.is_running());
}

#[test]
fn a_scrub_plans_just_what_it_found_and_is_asked_once() {
    let resyncs = resyncs();
    assert!(!resyncs.take_damage_question());
    resyncs.conditioned(Condition { has_point: true, damaged: ByteCount(4096), ..Condition::default() });
    assert!(resyncs.take_damage_question() && !resyncs.take_damage_question());
    resyncs.damage_unanswered();
    assert!(resyncs.take_damage_question());
    resyncs.damaged(0, [Granule(7), Granule(9)]);
    resyncs.look(clean(), evening());
    assert_eq!(shown(&resyncs), (ResyncReason::Scrub, ResyncStage::WaitingForTurn));
    assert_eq!(resyncs.status().unwrap().bytes, ByteCount(2 * GRANULE_BYTES));
    resyncs.turn(my_turn());
    let part = Part::Granules(BTreeSet::from([Granule(7), Granule(9)]));
    assert_eq!(resyncs.look(clean(), evening()), Deed::Begin(BTreeMap::from([(0, part)])));
    // Less is damaged: it is being repaired. More: that is new.
    resyncs.conditioned(Condition { has_point: true, damaged: ByteCount(1024), ..Condition::default() });
    assert!(!resyncs.take_damage_question());
    resyncs.conditioned(Condition { has_point: true, damaged: ByteCount(8192), ..Condition::default() });
    assert!(resyncs.take_damage_question());
    // So much that it is no list any more.
    resyncs.damaged(0, (0..=DAMAGED_MAX as u64).map(Granule));
    resyncs.look(clean(), evening());
    resyncs.look(clean(), evening());
    resyncs.turn(my_turn());
    assert_eq!(resyncs.look(clean(), evening()), all());
}

#[test]
fn a_lost_turn_is_taken_again_whatever_the_hour() {
    let resyncs = resyncs();
    resyncs.look(suspect(GIB), evening());
    resyncs.turn(my_turn());
    resyncs.look(suspect(GIB), evening());
    assert!(resyncs.is_running());
    resyncs.turn_lost();
    assert!(!resyncs.is_running() && resyncs.wants_turn());
    resyncs.look(suspect(GIB), noon());
    assert!(!resyncs.is_running() && resyncs.wants_turn());
    resyncs.turn(my_turn());
    resyncs.look(suspect(GIB), noon());
    assert!(resyncs.is_running());
}

/// What a comparison found different is dirty, and no reason for another; nor is what was dirty before the first point.
#[test]
fn a_volume_mostly_missed_is_compared_as_a_whole_once() {
    let half = ByteCount(GIB.0 / 2 + 1);
    let missed = || Look { volumes: volumes(half), has_replica: Some(true), ..Look::default() };
    let first = resyncs();
    first.look(missed(), evening());
    assert!(first.status().is_none(), "it was never clean");
    first.look(clean(), evening());
    first.look(
        Look { volumes: volumes(ByteCount(GIB.0 / 2)), has_replica: Some(true), ..Look::default() },
        evening(),
    );
    assert!(first.status().is_none(), "half is not more than half");
    first.look(missed(), evening());
    assert_eq!(shown(&first), (ResyncReason::MostlyDirty, ResyncStage::WaitingForTurn));
    first.turn(my_turn());
    assert_eq!(first.look(missed(), evening()), all());
    first.look(suspect(half), evening());
    first.look(missed(), evening()); // all of it was different
    first.look(missed(), evening());
    assert!(first.status().is_none());

    // It waits for its hours, and goes on being read; read before they come, it is forgotten.
    let second = resyncs();
    second.look(clean(), noon());
    second.look(missed(), noon());
    assert_eq!(shown(&second), (ResyncReason::MostlyDirty, ResyncStage::WaitingForWindow));
    second.look(clean(), noon());
    second.look(clean(), noon());
    assert!(second.status().is_none());

    let pointless = resyncs();
    pointless.conditioned(Condition::default());
    pointless.look(clean(), evening());
    pointless.look(missed(), evening());
    assert!(pointless.status().is_none(), "before the first point all is dirty");
}

#[test]
fn a_gap_while_it_runs_has_its_own_reason_and_estimates_follow_what_is_seen() {
    let resyncs = resyncs();
    resyncs.look(clean(), noon());
    let lost = Look { losses: 1, last_error: Some("volume data: raw commands".into()), ..suspect(GIB) };
    resyncs.look(lost.clone(), noon());
    let status = resyncs.status().unwrap();
    assert_eq!(
        (status.reason, status.why.as_str()),
        (ResyncReason::TrackingLost, "volume data: raw commands")
    );
    assert_eq!((status.send_estimate, status.seconds_estimate), (GIB, 6));
    resyncs.look(lost.clone(), evening());
    resyncs.turn(my_turn());
    resyncs.look(lost.clone(), evening());
    let (compared, different) = (ByteCount(GIB.0 / 4), ByteCount(GIB.0 / 400));
    resyncs.look(Look { suspect: ByteCount(GIB.0 / 4 * 3), compared, different, ..lost }, evening());
    let status = resyncs.status().unwrap();
    assert_eq!((status.bytes, status.compared, status.different), (GIB, compared, different));
    assert!(status.send_estimate.0.abs_diff(GIB.0 / 100) < 4096, "{}", status.send_estimate);
}
