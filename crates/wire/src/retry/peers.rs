//! Whether a peer that somebody waits for is there again.
//!
//! A peer cannot tell us: it does not know where we are. So while somebody waits, one task for each address looks: it makes a
//! TCP connection every `look_s` seconds, half as long or half as long again, and closes it. That costs the peer one packet,
//! however many groups wait for it here. A peer is back when it is there after it was not. One that is there all the time and
//! refuses us is no news, and its refusals follow the policy. When any conversation with the address works, all who found it
//! away hear of it too.
//!
//! Cancellation: a waiter may be dropped at any time; the task ends with the last one.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::policy::RetryPolicy;

/// How long a peer may take to be there.
const LOOK_TIME_MAX: Duration = Duration::from_secs(3);

type Looking = Pin<Box<dyn Future<Output = bool> + Send>>;
type Look = Arc<dyn Fn(String) -> Looking + Send + Sync>;

/// The peers that this process waits for. Clones share what they know.
#[derive(Clone)]
pub struct Peers {
    look: Look,
    watched: Arc<Mutex<HashMap<String, watch::Sender<Seen>>>>,
}

/// What the last look found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Seen {
    #[default]
    NotYet,
    There,
    Away,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers").field("watched", &self.watched().keys()).finish_non_exhaustive()
    }
}

impl Default for Peers {
    fn default() -> Peers {
        Peers::looked_at(Arc::new(|address| {
            Box::pin(async move {
                let connect = tokio::net::TcpStream::connect(address);
                matches!(timeout(LOOK_TIME_MAX, connect).await, Ok(Ok(_)))
            })
        }))
    }
}

impl Peers {
    pub(super) fn looked_at(look: Look) -> Peers {
        Peers { look, watched: Arc::default() }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<Seen>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A conversation with this address works.
    pub(super) fn reached(&self, address: &str) {
        if let Some(seen) = self.watched().get(address) {
            seen.send_replace(Seen::There);
        }
    }

    /// Waits until the peer is there after it was not. `away`: the caller has just found that it is not.
    pub(super) async fn returned(&self, address: &str, policy: &RetryPolicy, mut away: bool) {
        let mut seen = self.watch(address, policy.look());
        loop {
            // The sender is dropped with the runtime only.
            if seen.changed().await.is_err() {
                return std::future::pending().await;
            }
            match *seen.borrow_and_update() {
                Seen::There if away => return,
                Seen::There | Seen::NotYet => {}
                Seen::Away => away = true,
            }
        }
    }

    fn watch(&self, address: &str, every: Duration) -> watch::Receiver<Seen> {
        let mut watched = self.watched();
        if let Some(seen) = watched.get(address) {
            return seen.subscribe();
        }
        let (sender, receiver) = watch::channel(Seen::NotYet);
        watched.insert(address.to_owned(), sender);
        tokio::spawn(self.clone().look_at(address.to_owned(), every));
        receiver
    }

    async fn look_at(self, address: String, every: Duration) {
        let mut random = address.bytes().fold(block::UnixNanos::now().0 | 1, |sum, byte| {
            (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3) // FNV-1a: other addresses, other times
        });
        loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let chance = (random >> 40) as f64 / (1_u64 << 24) as f64;
            sleep(every.mul_f64(0.5 + chance)).await;
            {
                let mut watched = self.watched();
                if watched.get(&address).is_none_or(|seen| seen.receiver_count() == 0) {
                    watched.remove(&address);
                    return;
                }
            }
            let seen = if (self.look)(address.clone()).await { Seen::There } else { Seen::Away };
            if let Some(sender) = self.watched().get(&address) {
                sender.send_replace(seen);
            }
        }
    }
}
