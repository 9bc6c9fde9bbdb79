//! Named steps of crash orders at which a test has the process killed: `before-x` and `after-x` for a step `x`.
//!
//! They are in builds with debug assertions only; what is shipped has neither the steps nor the variable. In the others the
//! variable is read once; a step that is not meant costs one load of memory that never changes. All of them are beside
//! something that takes a system call.

/// Names the step at which the process is killed, and after a colon at which time it comes there: `after-cache-sync:3`.
pub const FAULT_VARIABLE: &str = "SEAWALL_FAULT";

/// A step of a crash order. Kills the process, as `kill -9` does, when [`FAULT_VARIABLE`] names it.
#[inline(always)]
pub fn fault_point(name: &'static str) {
    #[cfg(debug_assertions)]
    armed::come_to(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Armed {
        name: String,
        /// Comings that are left.
        left: AtomicU64,
    }

    static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
        let text = std::env::var(super::FAULT_VARIABLE).ok()?;
        let (name, times) = text.split_once(':').unwrap_or((&text, "1"));
        let left = AtomicU64::new(times.parse().ok().filter(|times| *times > 0)?);
        Some(Armed { name: name.to_owned(), left })
    });

    pub(super) fn come_to(name: &str) {
        let Some(armed) = &*ARMED else { return };
        if armed.name == name && armed.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            eprintln!("killed at {name}, as {} says", super::FAULT_VARIABLE);
            // It can fail only where there is no such process, and this is one.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            loop {
                std::thread::park();
            }
        }
    }
}
