//! Threads that read for one connection when its disk makes reads wait.
//!
//! While what is read comes from memory, one thread that takes requests in batches and answers them in batches is the
//! fastest there is; a hand-over would cost more than the read. When reads wait for a medium, waiting at the same time is
//! what counts. Which of the two it is, is told by how long reads take.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::channel::Channel;
use crate::protocol::Request;
use crate::reply::Replier;
use crate::{REQUESTS_QUEUED_MAX, WORKERS_MAX};

/// A read from memory takes less than this,
const PROMPT: Duration = Duration::from_micros(60);
/// and this much more for each KiB.
const PROMPT_PER_KIB: Duration = Duration::from_nanos(700);
/// After a read that waited, so many that did not have to follow before the connection's thread reads by itself again.
const PATIENCE: u32 = 64;

/// What all threads of a connection share.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    slow: AtomicU32,
}

#[derive(Default)]
struct Waiting {
    requests: VecDeque<Request>,
    idle: usize,
    ended: bool,
}

/// The workers of one connection. Dropping it waits until all have ended; what is queued is dropped.
pub(crate) struct Workers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    channel: Arc<dyn Channel>,
    make: Box<dyn Fn() -> Replier + Send>,
}

impl Workers {
    pub(crate) fn new(channel: Arc<dyn Channel>, make: Box<dyn Fn() -> Replier + Send>) -> Workers {
        Workers { queue: Arc::default(), threads: Vec::new(), channel, make }
    }

    /// Whether reads wait, so that handing them over pays.
    pub(crate) fn worth_while(&self) -> bool {
        self.queue.slow.load(Relaxed) > 0
    }

    /// Answers a read and notes how long it took.
    pub(crate) fn read(&self, replier: &mut Replier, request: &Request) -> std::io::Result<()> {
        self.queue.read(replier, request)
    }

    /// Hands a read over; `false` when there is no room, or no thread to be had.
    pub(crate) fn take(&mut self, request: Request) -> bool {
        let mut waiting = self.queue.waiting.lock();
        if waiting.requests.len() >= REQUESTS_QUEUED_MAX {
            return false;
        }
        if waiting.idle <= waiting.requests.len() && self.threads.len() < WORKERS_MAX {
            let (queue, channel, mut replier) = (self.queue.clone(), self.channel.clone(), (self.make)());
            let work = move || {
                while let Some(request) = queue.next() {
                    if queue.read(&mut replier, &request).and_then(|()| replier.flush()).is_err() {
                        // The connection's own thread learns of it by this.
                        channel.shut_down();
                    }
                }
            };
            match std::thread::Builder::new().name("nbd-read".to_owned()).spawn(work) {
                Ok(thread) => self.threads.push(thread),
                Err(error) if self.threads.is_empty() => {
                    tracing::warn!(%error, "start a thread that reads for an export");
                    return false;
                }
                Err(_) => {}
            }
        }
        waiting.requests.push_back(request);
        drop(waiting);
        self.queue.changed.notify_one();
        true
    }
}

impl Queue {
    fn next(&self) -> Option<Request> {
        let mut waiting = self.waiting.lock();
        loop {
            if waiting.ended {
                return None;
            }
            if let Some(request) = waiting.requests.pop_front() {
                return Some(request);
            }
            waiting.idle += 1;
            self.changed.wait(&mut waiting);
            waiting.idle -= 1;
        }
    }

    fn read(&self, replier: &mut Replier, request: &Request) -> std::io::Result<()> {
        let start = Instant::now();
        let outcome = replier.read(request);
        if start.elapsed() > PROMPT + PROMPT_PER_KIB * (request.length >> 10) {
            self.slow.store(PATIENCE, Relaxed);
        } else {
            // A count that is a little off does no harm.
            let slow = self.slow.load(Relaxed);
            self.slow.store(slow.saturating_sub(1), Relaxed);
        }
        outcome
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.queue.waiting.lock().ended = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was reported by its thread.
            let _ = thread.join();
        }
    }
}
