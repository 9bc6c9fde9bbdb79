//! What a step does over the network. It is done beside the runner, which must not hold the store meanwhile; what came of it is at hand until
//! the runner has kept it. When the config server dies before, the one that goes on does it again: each effect may be done twice.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::fleet::ResourceId;
use parking_lot::Mutex;

/// What passes is tried again after so long.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What nobody asks for any more is forgotten after so long.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// Why it was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It may pass.
    Passing(String),
    /// Trying again is of no use.
    Final(String),
}

/// Which run, which step, and which time it was begun.
pub(super) type Key = (ResourceId, String, u32);

#[derive(Clone, Debug)]
enum Standing {
    Begun,
    Ended(Instant, Result<String, Trouble>),
}

/// How an effect stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Went {
    /// It is being done; with why it was not done the last time.
    On(Option<String>),
    Done(String),
    Failed(String),
}

/// Effects of this config server.
#[derive(Debug, Default)]
pub(crate) struct Effects(Arc<Mutex<HashMap<Key, (Instant, Standing)>>>);

impl Effects {
    /// How it stands. It is begun by the first who asks, and again where trouble may pass.
    pub(super) fn poll<F>(&self, key: Key, make: impl FnOnce() -> F) -> Went
    where
        F: Future<Output = Result<String, Trouble>> + Send + 'static,
    {
        let now = Instant::now();
        let mut all = self.0.lock();
        all.retain(|_, (asked, _)| now.duration_since(*asked) < FORGOTTEN_AFTER);
        let told = match all.get_mut(&key) {
            None => None,
            Some((asked, standing)) => {
                *asked = now;
                match standing {
                    Standing::Begun => return Went::On(None),
                    Standing::Ended(_, Ok(message)) => return Went::Done(message.clone()),
                    Standing::Ended(_, Err(Trouble::Final(message))) => return Went::Failed(message.clone()),
                    Standing::Ended(when, Err(Trouble::Passing(message))) => {
                        if now.duration_since(*when) < AGAIN_AFTER {
                            return Went::On(Some(message.clone()));
                        }
                        Some(message.clone())
                    }
                }
            }
        };
        all.insert(key.clone(), (now, Standing::Begun));
        let (shared, doing) = (self.0.clone(), make());
        tokio::spawn(async move {
            let came = doing.await;
            shared.lock().insert(key, (Instant::now(), Standing::Ended(Instant::now(), came)));
        });
        Went::On(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asked for as often as one likes, it is done once; another attempt is another effect.
    #[tokio::test]
    async fn an_effect_is_done_once() {
        let effects = Effects::default();
        let count = Arc::new(Mutex::new(0));
        let key = |attempt| (ResourceId::from_bytes([1; 16]), "dns".to_owned(), attempt);
        let ended = async |attempt| {
            loop {
                let count = count.clone();
                let went = effects.poll(key(attempt), || async move {
                    *count.lock() += 1;
                    if attempt == 1 { Err(Trouble::Final("no".into())) } else { Ok("yes".into()) }
                });
                match went {
                    Went::On(_) => tokio::task::yield_now().await,
                    went => return went,
                }
            }
        };
        assert_eq!(ended(1).await, Went::Failed("no".into()));
        assert_eq!(ended(1).await, Went::Failed("no".into()));
        assert_eq!(ended(2).await, Went::Done("yes".into()));
        assert_eq!(*count.lock(), 2);
    }
}
