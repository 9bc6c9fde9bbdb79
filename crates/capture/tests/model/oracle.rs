//! What a power cut could have left.
//!
//! Instants are ticks of the simulated kernel. A write is in flight from its submission until its completion is visible.
//! A power cut at an instant leaves every write that completed before it, none that was submitted after it, and of each
//! one in flight any of its sectors. So each sector with its value allows a set of instants, and a state is possible
//! when one instant suits all sectors. `brute_force` below says the same in other words, with sets of writes that are
//! closed under happens-before, and a test compares the two.

/// What a sector holds: 0 is zeroes, anything else names a write and its version.
pub(crate) type Value = u32;
pub(crate) type WriteId = usize;

/// How often the data of one write may change before it is written for good (requeues).
const VERSIONS_MAX: usize = 4;

/// One write of one sector.
#[derive(Clone, Copy)]
struct Event {
    write: WriteId,
    submitted: u64,
    /// `u64::MAX` while in flight.
    completed: u64,
    versions: [Value; VERSIONS_MAX],
    count: usize,
    /// What the disk holds afterwards: the last version, or what was there before if the write failed.
    after: Value,
}

impl Event {
    fn may_be(&self, value: Value) -> bool {
        self.versions[..self.count].contains(&value)
    }
}

/// A write as a whole, for the promise that a captured one is never torn.
struct Write {
    sectors: Vec<usize>,
    /// Wholly in the ring at its first attempt: points hold all of it or nothing of it.
    whole: bool,
    /// Missed or failed: never whole again.
    spoiled: bool,
}

/// Everything that was ever written, by sector of the group.
pub(crate) struct History {
    initial: Vec<Value>,
    events: Vec<Vec<Event>>,
    writes: Vec<Write>,
}

impl History {
    pub(crate) fn new(initial: Vec<Value>) -> History {
        History { events: vec![Vec::new(); initial.len()], initial, writes: Vec::new() }
    }

    pub(crate) fn submit(&mut self, sectors: impl Iterator<Item = usize>, value: Value, now: u64) -> WriteId {
        let write = self.writes.len();
        let sectors: Vec<usize> = sectors.collect();
        for sector in &sectors {
            let mut versions = [0; VERSIONS_MAX];
            versions[0] = value;
            self.events[*sector].push(Event {
                write,
                submitted: now,
                completed: u64::MAX,
                versions,
                count: 1,
                after: 0,
            });
        }
        self.writes.push(Write { sectors, whole: false, spoiled: false });
        write
    }

    fn open(&mut self, write: WriteId, sector: usize) -> &mut Event {
        let event = self.events[sector].iter_mut().rev().find(|event| event.write == write);
        event.expect("a write of this sector")
    }

    /// The write will be tried again, with other data. False when it has changed too often.
    pub(crate) fn change(
        &mut self,
        write: WriteId,
        sectors: impl Iterator<Item = usize>,
        value: Value,
    ) -> bool {
        for sector in sectors {
            let event = self.open(write, sector);
            if event.count == VERSIONS_MAX {
                return false;
            }
            event.versions[event.count] = value;
            event.count += 1;
        }
        true
    }

    /// The write of this sector is seen completed, and the disk holds `after`.
    pub(crate) fn complete(&mut self, write: WriteId, sector: usize, after: Value, now: u64) {
        let event = self.open(write, sector);
        (event.completed, event.after) = (now, after);
    }

    /// All of it is in the ring: from now on a point holds all of it or nothing.
    pub(crate) fn captured(&mut self, write: WriteId) {
        self.writes[write].whole = true;
    }

    /// It was missed or has failed: a point may hold any of its sectors while it is in flight.
    pub(crate) fn missed(&mut self, write: WriteId) {
        self.writes[write].spoiled = true;
    }

    /// The first and the last instant in `from..=to` at which a power cut could have left `state`.
    pub(crate) fn possible(&self, state: &[Value], from: u64, to: u64) -> Result<(u64, u64), String> {
        let mut candidates = vec![(from, to + 1)];
        let (mut spans, mut both) = (Vec::new(), Vec::new());
        for (sector, value) in state.iter().enumerate() {
            let events = &self.events[sector];
            if events.is_empty() {
                if *value != self.initial[sector] {
                    return Err(format!("sector {sector} was never written, but holds {value:#x}"));
                }
                continue;
            }
            spans.clear();
            let mut add = |start: u64, end: u64| match spans.last_mut() {
                Some((_, last)) if *last == start => *last = end,
                _ if start < end => spans.push((start, end)),
                _ => {}
            };
            let (mut before, mut since) = (self.initial[sector], 0);
            for event in events {
                if *value == before {
                    add(since, event.submitted);
                }
                if *value == before || event.may_be(*value) {
                    add(event.submitted, event.completed);
                }
                (before, since) = (event.after, event.completed);
            }
            if *value == before {
                add(since, u64::MAX);
            }
            both.clear();
            for (start, end) in &candidates {
                for (from, to) in &spans {
                    if start.max(from) < end.min(to) {
                        both.push((*start.max(from), *end.min(to)));
                    }
                }
            }
            if both.is_empty() {
                return Err(format!(
                    "sector {sector} holds {value:#x}, possible at {spans:?}; the sectors before it leave {candidates:?}\n\
                     {}",
                    self.tell(sector)
                ));
            }
            std::mem::swap(&mut candidates, &mut both);
        }
        Ok((candidates[0].0, candidates.last().map_or(0, |last| last.1 - 1)))
    }

    /// The story of a sector.
    fn tell(&self, sector: usize) -> String {
        let mut story = format!("sector {sector}: {:#x} at first", self.initial[sector]);
        for Event { write, submitted, completed, versions, count, after } in &self.events[sector] {
            let versions = &versions[..*count];
            story +=
                &format!("\n  write {write} {versions:#x?} from {submitted} to {completed}, then {after:#x}");
        }
        story
    }

    /// No captured write is in `state` with some of its sectors only (R1).
    pub(crate) fn untorn(&self, state: &[Value]) -> Result<(), String> {
        for (id, write) in self.writes.iter().enumerate().filter(|(_, write)| write.whole && !write.spoiled) {
            let (mut inside, mut outside) = (None, None);
            for sector in &write.sectors {
                let events = &self.events[*sector];
                let at = events.iter().position(|event| event.write == id).expect("the write's own event");
                let value = state[*sector];
                let mine = events[at].may_be(value);
                let older =
                    value == self.initial[*sector] || events[..at].iter().any(|event| event.may_be(value));
                let newer = events[at + 1..].iter().any(|event| event.may_be(value));
                match (mine, older, newer) {
                    (true, false, false) => inside = Some(sector),
                    (false, true, false) => outside = Some(sector),
                    _ => {} // newer, or the same value more than once: says nothing
                }
            }
            if let (Some(inside), Some(outside)) = (inside, outside) {
                return Err(format!(
                    "write {id} was captured whole, but is torn: sector {inside} holds it, sector {outside} does not\n{}\n{}",
                    self.tell(*inside),
                    self.tell(*outside)
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::rng::Rng;

    #[derive(Clone, Copy, Debug)]
    struct Small {
        sectors: u32, // a mask
        submitted: u64,
        completed: u64,
    }

    /// All states of `writes` over `sectors` sectors. Write `i` has value `i + 1`; none fails.
    ///
    /// In the words of the promise: some writes are wholly in (`done`), some are in flight (`flying`), and whatever
    /// completed before one of them was submitted is wholly in.
    fn brute_force(writes: &[Small], sectors: usize) -> HashSet<Vec<Value>> {
        let mut states = HashSet::new();
        let n = writes.len();
        for done in 0..1_u32 << n {
            for flying in 0..1_u32 << n {
                let closed = (0..n)
                    .filter(|i| (done | flying) >> i & 1 == 1)
                    .all(|i| (0..n).all(|j| writes[j].completed > writes[i].submitted || done >> j & 1 == 1));
                if done & flying != 0 || !closed {
                    continue;
                }
                let mut base = vec![0; sectors];
                for i in (0..n).filter(|i| done >> i & 1 == 1) {
                    for (sector, value) in base.iter_mut().enumerate() {
                        if writes[i].sectors >> sector & 1 == 1 {
                            *value = i as Value + 1; // writes of one sector come in the order of their numbers
                        }
                    }
                }
                // Each sector of a write in flight, in or out.
                let free: Vec<(usize, usize)> = (0..n)
                    .filter(|i| flying >> i & 1 == 1)
                    .flat_map(|i| (0..sectors).map(move |sector| (i, sector)))
                    .filter(|(i, sector)| writes[*i].sectors >> sector & 1 == 1)
                    .collect();
                for chosen in 0..1_u32 << free.len() {
                    let mut state = base.clone();
                    for (index, (i, sector)) in free.iter().enumerate() {
                        if chosen >> index & 1 == 1 {
                            state[*sector] = *i as Value + 1;
                        }
                    }
                    states.insert(state);
                }
            }
        }
        states
    }

    #[test]
    fn the_oracle_agrees_with_brute_force() {
        let (mut possible, mut impossible) = (0, 0);
        for seed in 0..1500 {
            let mut rng = Rng::new(seed);
            let sectors = rng.between(1, 3);
            let mut writes: Vec<Small> = Vec::new();
            let mut now = 1;
            // Writes of one sector never overlap in time; each begins after a random one of the earlier events.
            for _ in 0..rng.between(1, 4) {
                let mask = 1 + rng.below((1 << sectors) - 1) as u32;
                let earliest = writes.iter().filter(|w| w.sectors & mask != 0).map(|w| w.completed).max();
                let submitted = earliest.unwrap_or(0).max(rng.below(now as usize + 1) as u64) + 1;
                let completed = submitted + rng.between(1, 8) as u64;
                writes.push(Small { sectors: mask, submitted, completed });
                now = now.max(completed);
            }
            let mut history = History::new(vec![0; sectors]);
            for (index, write) in writes.iter().enumerate() {
                let mask = write.sectors;
                let on = move || (0..sectors).filter(move |sector| mask >> sector & 1 == 1);
                let id = history.submit(on(), index as Value + 1, write.submitted);
                for sector in on() {
                    history.complete(id, sector, index as Value + 1, write.completed);
                }
            }
            let states = brute_force(&writes, sectors);
            let values = writes.len() + 1;
            for number in 0..values.pow(sectors as u32) {
                let state: Vec<Value> =
                    (0..sectors).map(|s| (number / values.pow(s as u32) % values) as Value).collect();
                let expected = states.contains(&state);
                let found = history.possible(&state, 0, now + 1);
                assert_eq!(found.is_ok(), expected, "seed {seed}: {writes:?}: {state:?}: {found:?}");
                if expected { possible += 1 } else { impossible += 1 }
            }
        }
        assert!(possible > 1000 && impossible > 1000, "{possible} possible, {impossible} impossible");
    }

    #[test]
    fn a_torn_write_is_seen() {
        let mut history = History::new(vec![0; 3]);
        let write = history.submit([0, 1].into_iter(), 7, 1);
        history.captured(write);
        assert!(history.untorn(&[7, 7, 0]).is_ok() && history.untorn(&[0, 0, 0]).is_ok());
        assert!(history.untorn(&[7, 0, 0]).is_err());
        history.complete(write, 0, 7, 2);
        history.submit([0].into_iter(), 9, 3);
        assert!(
            history.untorn(&[9, 0, 0]).is_ok(),
            "impossible, but not torn: the newer one may have been whole"
        );
    }
}
