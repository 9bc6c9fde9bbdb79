//! A machine on disks that are served over NBD, in QEMU, and whether it comes up.
//!
//! What it writes goes wherever its disks put it; it has no network unless it is given one. It is killed when this process is.

mod console;
mod firmware;
mod machine;

use std::io;

pub use console::{CONSOLE_TAIL_BYTES, Console, TEXT_BYTES_MAX, Watch, Why};
pub use firmware::{HEAD_BYTES, Head};
pub use machine::{Accelerator, Disks, Hardware, Machine, end};

/// Why a machine cannot be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The first disk does not say how.
    #[error(
        "boot the first volume: it has neither an EFI system partition nor boot code; name the volume that the machine starts from \
         first, or choose the firmware"
    )]
    NothingToStart,
    /// UEFI is wanted and not there.
    #[error(
        "boot with UEFI: no firmware for virtual machines was found; install ovmf (Debian) or edk2-ovmf, or choose bios as the firmware"
    )]
    NoFirmware,
    /// The network is no name.
    #[error("connect the machine to {0:?}: that is no name of a bridge")]
    Network(String),
    /// The system refuses.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried, on what.
        doing: String,
        /// Its answer.
        source: io::Error,
    },
}

impl BootError {
    fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> BootError {
        let doing = doing.into();
        move |source| BootError::Io { doing, source }
    }
}
