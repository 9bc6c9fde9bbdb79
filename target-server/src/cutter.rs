//! Applies what is written to a promoted group, every second, on a thread of its own.
//!
//! A failure is told in the group's status, and tried again; what was written stays in its journal. It ends with the promotion, when told
//! to, or when dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use replica::GroupReplica;

/// How often there is a recovery point, while something is written.
pub const CUT_EVERY: Duration = Duration::from_secs(1);
/// How long it waits after a failure.
const PAUSE: Duration = Duration::from_secs(5);

pub(crate) struct Cutter {
    replica: Arc<GroupReplica>,
    stopping: Arc<AtomicBool>,
    trouble: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Cutter {
    pub(crate) fn start(replica: Arc<GroupReplica>) -> Cutter {
        let (stopping, trouble) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Option<String>>>::default());
        let work = {
            let (replica, stopping, trouble) = (replica.clone(), stopping.clone(), trouble.clone());
            move || run(&replica, &stopping, &trouble)
        };
        let thread = match std::thread::Builder::new().name("cut".to_owned()).spawn(work) {
            Ok(thread) => Some(thread),
            Err(error) => {
                // Writers cut themselves when there is no room, so that nothing stands still.
                let said = format!("start cutting what is written: {error}; recovery points come late");
                tracing::error!(group = %replica.group(), said);
                *trouble.lock() = Some(said);
                None
            }
        };
        Cutter { replica, stopping, trouble, thread }
    }

    /// Whether it has ended by itself, since the group was demoted.
    pub(crate) fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// What a person should know.
    pub(crate) fn warning(&self) -> Option<String> {
        self.trouble.lock().clone()
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.replica.want_cut();
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!(group = %self.replica.group(), "cutting what is written ended by a fault");
            }
        }
    }
}

fn run(replica: &GroupReplica, stopping: &AtomicBool, trouble: &Mutex<Option<String>>) {
    while replica.wait_to_cut(CUT_EVERY) {
        match replica.cut_promoted() {
            Ok(()) => *trouble.lock() = None,
            Err(error) => {
                let said =
                    format!("apply what is written: {error}; it waits in its journal, and is tried again");
                if trouble.lock().replace(said.clone()).is_none() {
                    tracing::error!(group = %replica.group(), said);
                }
                if !stopping.load(Ordering::SeqCst) {
                    std::thread::park_timeout(PAUSE);
                }
            }
        }
        if stopping.load(Ordering::SeqCst) {
            return;
        }
    }
}
