/// What the schedules have met; a sum that is 0 at the end means that the model tests less than it says.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Met {
    pub(crate) writes: u64,
    pub(crate) captured: u64,
    pub(crate) several_records: u64,
    pub(crate) missed_dirty: u64,
    pub(crate) missed_ring: u64,
    pub(crate) missed_ring_inside: u64,
    pub(crate) missed_slot: u64,
    pub(crate) missed_copy: u64,
    pub(crate) requeued: u64,
    pub(crate) changed: u64,
    pub(crate) unseen: u64,
    pub(crate) failed: u64,
    pub(crate) partial: u64,
    pub(crate) lost: u64,
    pub(crate) reads: u64,
    pub(crate) torn_reads: u64,
    pub(crate) read_errors: u64,
    pub(crate) cuts: u64,
    pub(crate) points: u64,
    pub(crate) points_in_flight: u64,
    pub(crate) full: u64,
    pub(crate) handled_twice: u64,
    pub(crate) skipped: u64,
    pub(crate) stale: u64,
    pub(crate) crashes: u64,
    pub(crate) epochs_dropped: u64,
    pub(crate) waited_too_long: u64,
    pub(crate) left_out: u64,
    pub(crate) left_out_twice: u64,
    pub(crate) mended: u64,
    pub(crate) unexplained: u64,
    pub(crate) compared_same: u64,
    pub(crate) compared_different: u64,
}

impl Met {
    fn fields(&mut self) -> [(&'static str, &mut u64); 33] {
        let Met {
            writes,
            captured,
            several_records,
            missed_dirty,
            missed_ring,
            missed_ring_inside,
            missed_slot,
            missed_copy,
            requeued,
            changed,
            unseen,
            failed,
            partial,
            lost,
            reads,
            torn_reads,
            read_errors,
            cuts,
            points,
            points_in_flight,
            full,
            handled_twice,
            skipped,
            stale,
            crashes,
            epochs_dropped,
            waited_too_long,
            left_out,
            left_out_twice,
            mended,
            unexplained,
            compared_same,
            compared_different,
        } = self;
        [
            ("writes", writes),
            ("captured", captured),
            ("several_records", several_records),
            ("missed_dirty", missed_dirty),
            ("missed_ring", missed_ring),
            ("missed_ring_inside", missed_ring_inside),
            ("missed_slot", missed_slot),
            ("missed_copy", missed_copy),
            ("requeued", requeued),
            ("changed", changed),
            ("unseen", unseen),
            ("failed", failed),
            ("partial", partial),
            ("lost", lost),
            ("reads", reads),
            ("torn_reads", torn_reads),
            ("read_errors", read_errors),
            ("cuts", cuts),
            ("points", points),
            ("points_in_flight", points_in_flight),
            ("full", full),
            ("handled_twice", handled_twice),
            ("skipped", skipped),
            ("stale", stale),
            ("crashes", crashes),
            ("epochs_dropped", epochs_dropped),
            ("waited_too_long", waited_too_long),
            ("left_out", left_out),
            ("left_out_twice", left_out_twice),
            ("mended", mended),
            ("unexplained", unexplained),
            ("compared_same", compared_same),
            ("compared_different", compared_different),
        ]
    }

    pub(crate) fn sum(all: &[Met]) -> Met {
        let mut sum = Met::default();
        for mut met in all.iter().copied() {
            for ((_, sum), (_, one)) in sum.fields().into_iter().zip(met.fields()) {
                *sum += *one;
            }
        }
        sum
    }

    /// Nothing that the model is made for stayed untouched.
    pub(crate) fn assert_all(mut self) {
        for (name, count) in self.fields() {
            assert!(*count > 0, "no schedule met {name}");
        }
    }
}
