/// A rule of capture that is switched off, to prove that the model notices.
///
/// All but one are switched off in the simulated kernel, tap and disk, so the tracker under test is the shipped one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// R1: two neighbouring records change places.
    RecordsSwapped,
    /// R1: every record counts as a whole request.
    RequestCut,
    /// R2: a missed write is marked when it is issued, not when it completes.
    MarkedAtIssue,
    /// R2: a write that was not seen issuing is not marked.
    UnseenIgnored,
    /// R2: a failed write is not marked.
    FailureIgnored,
    /// R2: marked after others can see it complete.
    MarkedTooLate,
    /// R2: a request that is issued twice stays captured.
    RequeueIgnored,
    /// R2, R9: a write that finds the ring full counts as captured.
    OverflowIgnored,
    /// R3: dirty granules are counted when the write has been seen completed, not before their bit is set.
    CountedTooLate,
    /// R3: they are counted again while programs run that have counted theirs and not set the bits.
    RecountedTooEarly,
    /// R3: the bits are looked at before the ring is consumed.
    BitsBeforeRing,
    /// R3: only dirty granules keep an epoch from being offered, not those being drained.
    OfferedWhileDraining,
    /// R4: writes into dirty granules are captured.
    DirtyCaptured,
    /// R4: writes into draining granules are captured.
    DrainingCaptured,
    /// R4: a write looks at the bits before it counts as in flight.
    LookedBeforeClaiming,
    /// R4: a write does not count as in flight any more when it has been issued.
    LeftAtIssue,
    /// R5: reads come from a cache.
    CachedReads,
    /// R6: commands from user space are taken for nothing.
    PassthroughIgnored,
    /// R6: what memory holds of a write with inline encryption is taken for what the disk gets.
    PlaintextTrusted,
    /// R6: discards and write-zeroes are taken for nothing.
    DiscardIgnored,
    /// R7: each disk has a ring, and they are not cut at the same position.
    RingPerDisk,
    /// R8: what was consumed counts as touched only after the ring was told.
    TouchedTooLate,
    /// R8: an agent that starts again does not ask what was touched.
    TouchedIgnored,
    /// R8: nor what was draining.
    DrainingIgnored,
    /// R8: what a drain has read does not count as touched.
    ReadsUntouched,
    /// R8: an acknowledgement clears all that is touched, not only what its epochs have.
    ForgottenTooEarly,
    /// R8: the parts of unfinished requests are forgotten with the epochs that came with them.
    PartsForgotten,
    /// R8: a loss is forgotten before everything is dirty.
    LossForgottenFirst,
    /// R9, R10: records are taken although the memory is full.
    MemoryUnbounded,
    /// Drain, step 1: granules are noted that became dirty after, or not at all.
    NotedTooLate,
    /// Drain, step 2: no wait for what is in flight.
    InFlightIgnored,
    /// Drain, step 3: *dirty* is cleared before *draining* is set.
    ClearedFirst,
    /// Drain, step 4: *dirty* is cleared after the read.
    ClearedAfterRead,
    /// Drain, step 5: the position is noted when the read begins. Looking at missed writes in flight covers most of it,
    /// so that is off as well, and nothing is left out.
    PositionTooEarly,
    /// Drain, step 6: what was read is folded without waiting for the ring.
    FoldedAtOnce,
    /// Drain, step 6: *draining* is cleared before the fold.
    EndedBeforeFold,
    /// Drain: a round begins while reads of the one before have ended but are not folded.
    RoundsOverlap,
    /// What the agent marks itself (failed reads, losses, requests given up) stays clean.
    AgentMarksIgnored,
    /// R11: completions that no copy of the program handles are not counted.
    SkippedUncounted,
    /// An epoch is offered although a missed write is in flight.
    MissedInFlightOffered,
    /// The disks' own counts are not looked at.
    EndsUncompared,
    /// What wrote through a slot that is used again is not marked.
    StaleIgnored,
    /// A slot that is used again while it is looked at counts as the one that was noted.
    Undoubted,
    /// A write whose data has ended unseen counts as in flight while the disk's cache is flushed for it.
    FlushingInFlight,
    /// Resync: the replica answers before it has applied the epoch it was asked to.
    ComparedTooEarly,
    /// Resync: a granule that is different is trusted all the same.
    DifferentTrusted,
    /// Two writes of one sector are in flight at once. Not a mutation but a limit: see
    /// `writes_that_race_on_a_sector_are_a_limit`.
    WritesRace,
}

impl Mutation {
    /// Whether it takes requests that are used again at once to notice: then all schedules are such.
    pub(crate) fn is_about_unseen_ends(self) -> bool {
        matches!(self, Mutation::Undoubted | Mutation::FlushingInFlight)
    }

    /// Where the search begins: for those that one schedule in ten thousand catches, shortly before one that did when it was looked for
    /// last. When the model has changed it only takes longer.
    pub(crate) fn first_seed(self) -> u64 {
        match self {
            Mutation::LossForgottenFirst => 17_760,
            Mutation::PartsForgotten => 16_450,
            Mutation::FlushingInFlight => 26_350,
            _ => 1,
        }
    }

    /// Every rule.
    pub(crate) const RULES: &[Mutation] = {
        use Mutation::*;
        &[
            RecordsSwapped,
            RequestCut,
            MarkedAtIssue,
            UnseenIgnored,
            FailureIgnored,
            MarkedTooLate,
            RequeueIgnored,
            OverflowIgnored,
            CountedTooLate,
            RecountedTooEarly,
            BitsBeforeRing,
            OfferedWhileDraining,
            DirtyCaptured,
            DrainingCaptured,
            LookedBeforeClaiming,
            LeftAtIssue,
            CachedReads,
            PassthroughIgnored,
            PlaintextTrusted,
            DiscardIgnored,
            RingPerDisk,
            TouchedTooLate,
            TouchedIgnored,
            DrainingIgnored,
            ReadsUntouched,
            ForgottenTooEarly,
            PartsForgotten,
            LossForgottenFirst,
            MemoryUnbounded,
            NotedTooLate,
            InFlightIgnored,
            ClearedFirst,
            ClearedAfterRead,
            PositionTooEarly,
            FoldedAtOnce,
            EndedBeforeFold,
            RoundsOverlap,
            AgentMarksIgnored,
            SkippedUncounted,
            MissedInFlightOffered,
            EndsUncompared,
            StaleIgnored,
            Undoubted,
            FlushingInFlight,
            ComparedTooEarly,
            DifferentTrusted,
        ]
    };
}
