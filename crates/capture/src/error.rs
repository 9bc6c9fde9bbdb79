use std::io;
use std::path::PathBuf;

/// Why a disk cannot be captured or read. Each says what was tried, on what, why not, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A system call on a device or file failed.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried, present tense: "open device".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The path is not a disk that can be captured.
    #[error("protect {path}: {reason}", path = path.display())]
    NotCapturable {
        /// The path as given.
        path: PathBuf,
        /// Why not, and what to name instead.
        reason: String,
    },
    /// Tracking cannot outlive its process, because there is no BPF file system and none can be mounted.
    #[error("use the BPF file system at {path}: {source}", path = path.display())]
    NoBpfFileSystem {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused the eBPF program or a part of it.
    #[error("load the capture program: {step}: {detail}")]
    Kernel {
        /// Which part.
        step: &'static str,
        /// The kernel's or the verifier's words.
        detail: String,
    },
}

impl CaptureError {
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> CaptureError {
        let path = path.into();
        move |source| CaptureError::Io { action, path, source }
    }

    pub(crate) fn kernel(step: &'static str, error: &dyn std::error::Error) -> CaptureError {
        // The verifier's log is in the source chain; without it such an error cannot be understood.
        let mut detail = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            detail.push_str(": ");
            detail.push_str(&cause.to_string());
            source = cause.source();
        }
        CaptureError::Kernel { step, detail }
    }
}
