//! The kernel's freeze of a mounted filesystem.

#![expect(unsafe_code, reason = "FIFREEZE and FITHAW have no safe wrapper")]

use std::os::fd::AsFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{NoArg, Opcode, ioctl};

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` (include/uapi/linux/fs.h). The argument is not used.
const FIFREEZE: Opcode = 0xC004_5877;
const FITHAW: Opcode = 0xC004_5878;

/// What a thaw found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thawed {
    /// It was frozen until now.
    Now,
    /// It was not frozen, or its freeze is still on the way.
    NotFrozen,
}

/// Stops all writes to the filesystem that `dir` lies on, and writes everything out. Blocks until that is done.
pub(super) fn freeze(dir: impl AsFd) -> Result<()> {
    // SAFETY: the kernel takes no argument and touches no memory of ours.
    unsafe { ioctl(dir, NoArg::<FIFREEZE>::new()) }
}

/// Lets writes go on.
pub(super) fn thaw(dir: impl AsFd) -> Result<Thawed> {
    // SAFETY: as above.
    match unsafe { ioctl(dir, NoArg::<FITHAW>::new()) } {
        Ok(()) => Ok(Thawed::Now),
        Err(Errno::INVAL) => Ok(Thawed::NotFrozen),
        Err(error) => Err(error),
    }
}
