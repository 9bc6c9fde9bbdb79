use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Over how long a rate is reckoned.
pub const METER_WINDOW: Duration = Duration::from_secs(5);

/// The window is kept in so many parts, which leave it one at a time.
const PARTS: u32 = 20;

/// Tells the time since an instant of its own choice; tests give one that stands still.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Adds up bytes (or anything) and gives their rate over the last [`METER_WINDOW`]. Clones share one count.
#[derive(Clone)]
pub struct Meter {
    clock: Clock,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    total: u64,
    started: Duration,
    /// The number of the newest part since the clock's start; older parts follow it backwards, round the ring.
    newest: u128,
    parts: [u64; PARTS as usize],
}

impl Default for Meter {
    fn default() -> Meter {
        Meter::new()
    }
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Meter({} in all)", self.total())
    }
}

impl Meter {
    /// A meter at nothing.
    pub fn new() -> Meter {
        let start = Instant::now();
        Meter::with_clock(Arc::new(move || start.elapsed()))
    }

    /// A meter that goes by another clock.
    pub fn with_clock(clock: Clock) -> Meter {
        let started = clock();
        let newest = part_of(started);
        let state = State { total: 0, started, newest, parts: [0; PARTS as usize] };
        Meter { clock, state: Arc::new(Mutex::new(state)) }
    }

    /// Counts.
    pub fn add(&self, amount: u64) {
        self.with(|state, _| {
            state.total = state.total.saturating_add(amount);
            let part = &mut state.parts[(state.newest % u128::from(PARTS)) as usize];
            *part = part.saturating_add(amount);
        });
    }

    /// All that was counted.
    pub fn total(&self) -> u64 {
        self.with(|state, _| state.total)
    }

    /// How much a second, over the window (or since the start, when that is shorter ago).
    pub fn per_second(&self) -> f64 {
        self.with(|state, now| {
            let within: u64 = state.parts.iter().fold(0, |sum, part| sum.saturating_add(*part));
            // The newest part is not over: the window is as long as what it really covers.
            let part = METER_WINDOW / PARTS;
            let into = Duration::from_nanos((now.as_nanos() % part.as_nanos()) as u64);
            let covered = (METER_WINDOW - part + into).min(now.saturating_sub(state.started)).max(part);
            within as f64 / covered.as_secs_f64()
        })
    }

    fn with<R>(&self, action: impl FnOnce(&mut State, Duration) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)();
        let current = part_of(now);
        let gone = current.saturating_sub(state.newest).min(u128::from(PARTS));
        for step in 1..=gone {
            let index = ((current - gone + step) % u128::from(PARTS)) as usize;
            state.parts[index] = 0;
        }
        state.newest = state.newest.max(current);
        action(&mut state, now)
    }
}

fn part_of(now: Duration) -> u128 {
    now.as_nanos() / (METER_WINDOW / PARTS).as_nanos()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    use super::*;

    fn meter() -> (Meter, impl Fn(u64)) {
        let now = Arc::new(AtomicU64::new(7_777));
        let clock = now.clone();
        let meter = Meter::with_clock(Arc::new(move || Duration::from_millis(clock.load(SeqCst))));
        (meter, move |ms| {
            now.fetch_add(ms, SeqCst);
        })
    }

    #[test]
    fn a_steady_flow_has_its_rate_and_an_ended_one_none() {
        let (meter, pass) = meter();
        for _ in 0..200 {
            meter.add(100);
            pass(100);
        }
        let rate = meter.per_second();
        assert!((950.0..=1_050.0).contains(&rate), "{rate}");
        assert_eq!(meter.total(), 20_000);
        pass(2_500);
        let half = meter.per_second();
        assert!((400.0..=600.0).contains(&half), "{half}");
        pass(5_000);
        assert_eq!(meter.per_second(), 0.0);
        assert_eq!(meter.total(), 20_000);
    }

    #[test]
    fn a_young_meter_reckons_since_its_start() {
        let (meter, pass) = meter();
        meter.add(1_000);
        pass(1_000);
        let rate = meter.per_second();
        assert!((900.0..=1_100.0).contains(&rate), "{rate}");
    }

    #[test]
    fn a_long_pause_leaves_nothing_behind() {
        let (meter, pass) = meter();
        meter.add(1_000);
        pass(1_000_000_000);
        assert_eq!(meter.per_second(), 0.0);
        meter.add(500);
        pass(1_000);
        assert!(meter.per_second() > 90.0);
    }
}
