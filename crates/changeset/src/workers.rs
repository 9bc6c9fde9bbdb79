//! Spreading frames over threads for the length of one call.

use std::sync::{Mutex, PoisonError};

/// Does `work` on every item, one thread for each worker (the calling one for the first), and returns the results in
/// order. Where the system gives fewer threads, fewer do the work.
///
/// # Panics
/// When there is no worker, or `work` panics.
pub(crate) fn spread<W: Send, I: Send, T: Send>(
    workers: &mut [W],
    items: Vec<I>,
    work: impl Fn(&mut W, I) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<Option<T>> = Vec::new();
    results.resize_with(items.len(), || None);
    let (first, helpers) = workers.split_first_mut().expect("there is a worker");
    let helpers = helpers.iter_mut().take(items.len().saturating_sub(1));
    let queue = Mutex::new(items.into_iter().zip(results.iter_mut()));
    // Nothing panics while it holds the lock, so a poisoned one is whole.
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let labour = |worker: &mut W| {
        while let Some((item, result)) = take() {
            *result = Some(work(worker, item));
        }
    };
    let labour = &labour;
    std::thread::scope(|scope| {
        for worker in helpers {
            let thread = std::thread::Builder::new().name("changeset".into());
            if thread.spawn_scoped(scope, move || labour(worker)).is_err() {
                break;
            }
        }
        labour(first);
    });
    drop(queue);
    results
        .into_iter()
        .map(|result| result.expect("every item was worked on, or the scope has panicked"))
        .collect()
}
