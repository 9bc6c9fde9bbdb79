//! When a lost connection is tried again. Everything that connects to a peer waits here, by one policy.
//!
//! Two classes of failure ([`FailureClass`]): what may work again without anyone's help follows the schedule, at once with
//! jitter for a short while and then at the intervals that the field knows; what the peer or our own credentials refuse
//! waits until something has changed.
//!
//! Either wait is cut short by the peer's return: see [`Peers`].

mod peers;
mod policy;

use std::future::Future;
use std::time::Duration;

use block::UnixNanos;
use tokio::time::Instant;

pub use peers::Peers;
pub use policy::{
    LOOK_S, QUICK_S_MAX, QUICK_WAIT, RetryPolicy, RetryPolicyError, SLOW_MINUTES_MAX, SLOW_WAITS_MAX,
};

use crate::WireError;

/// Whether trying again may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// It may, without anyone's help: the network, or a peer that is away or busy.
    Recoverable,
    /// It will not until a person has mended something: authentication, authorisation, histories that do not fit.
    NonRecoverable,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Its time was over.
    Due,
    /// The peer is back.
    Returned,
    /// What the caller had said would mend it has happened.
    Mended,
}

/// What comes after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// How long.
    pub wait: Duration,
    /// Which kind of failure it was.
    pub class: FailureClass,
    until: Instant,
    /// The peer was not there at all, so that its being there is news.
    away: bool,
}

impl Pause {
    /// When the next try is, by this machine's clock.
    pub fn next_try(&self) -> UnixNanos {
        let left = self.until.saturating_duration_since(Instant::now());
        UnixNanos(UnixNanos::now().0.saturating_add(left.as_nanos() as u64))
    }
}

/// The tries to reach one peer for one purpose.
#[derive(Debug)]
pub struct Retry {
    policy: RetryPolicy,
    peers: Peers,
    address: String,
    /// When the first of the failures in a row was.
    since: Option<Instant>,
    slow: usize,
    random: u64,
}

impl Retry {
    /// Nothing has failed yet. `seed` makes the jitter.
    pub fn new(policy: &RetryPolicy, peers: &Peers, address: &str, seed: u64) -> Retry {
        let (policy, peers, address) = (policy.clone(), peers.clone(), address.to_owned());
        Retry { policy, peers, address, since: None, slow: 0, random: seed | 1 }
    }

    /// The peer does what it is for: the next failure begins a quick phase, and whoever else waits for this peer tries now.
    pub fn succeeded(&mut self) {
        self.since = None;
        self.slow = 0;
        self.peers.reached(&self.address);
    }

    /// A conversation took so long until it failed: if that is longer than a quick phase, the failure is a new one.
    pub fn lasted(&mut self, time: Duration) {
        if time >= self.policy.quick() {
            self.since = None;
            self.slow = 0;
        }
    }

    /// Nothing is wrong with the peer; tried again after `wait`.
    pub fn after(&self, wait: Duration) -> Pause {
        Pause { wait, class: FailureClass::Recoverable, until: Instant::now() + wait, away: false }
    }

    /// An attempt failed with this.
    pub fn failed(&mut self, error: &WireError) -> Pause {
        let away = matches!(error, WireError::Connect { .. });
        self.pause_for(error.class(), away)
    }

    /// An attempt failed with something that is no error on the wire.
    pub fn refused(&mut self, class: FailureClass) -> Pause {
        self.pause_for(class, false)
    }

    fn pause_for(&mut self, class: FailureClass, away: bool) -> Pause {
        let now = Instant::now();
        let wait = match class {
            FailureClass::Recoverable => self.next_wait(now),
            // Not a try of the schedule: the quick phase is for when it is mended.
            FailureClass::NonRecoverable => self.policy.last_wait(),
        };
        Pause { wait, class, until: now + wait, away }
    }

    fn next_wait(&mut self, now: Instant) -> Duration {
        let since = *self.since.get_or_insert(now);
        let chance = self.chance();
        if now.saturating_duration_since(since) < self.policy.quick() {
            return QUICK_WAIT.0 + (QUICK_WAIT.1 - QUICK_WAIT.0).mul_f64(chance);
        }
        let wait = self.policy.slow_wait(self.slow);
        self.slow = self.slow.saturating_add(1);
        // Up to a tenth earlier.
        wait.mul_f64(1.0 - chance / 10.0)
    }

    /// From 0 to below 1.
    fn chance(&mut self) -> f64 {
        // xorshift64 (Marsaglia, 2003): jitter needs no better.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 40) as f64 / (1_u64 << 24) as f64
    }

    /// Waits until the next try. It comes earlier when the peer is back, or `mended` ends.
    pub async fn pause(&self, pause: Pause, mended: impl Future<Output = ()>) -> Woken {
        tokio::select! {
            biased;
            () = mended => Woken::Mended,
            () = self.peers.returned(&self.address, &self.policy, pause.away), if pause.wait > QUICK_WAIT.1 => {
                Woken::Returned
            }
            () = tokio::time::sleep_until(pause.until) => Woken::Due,
        }
    }
}

#[cfg(test)]
mod tests;
