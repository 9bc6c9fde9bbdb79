//! Maps of the eBPF program as memory of this process.

#![expect(unsafe_code, reason = "mmap of kernel memory that another party writes")]

use std::ffi::c_void;
use std::io;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// An array map's values, shared with the kernel. `T` must be made of atomics: the kernel writes at any time.
pub(super) struct Shared<T> {
    base: NonNull<T>,
    entries: usize,
    bytes: usize,
}

// SAFETY: T is made of atomics, and the mapping lives until drop.
unsafe impl<T: Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Maps an array map of `entries` values of exactly `T`'s size (a multiple of 8, as the kernel spaces them).
    pub(super) fn map(fd: BorrowedFd<'_>, entries: usize) -> io::Result<Shared<T>> {
        const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() <= 4096) };
        let bytes = entries * size_of::<T>();
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks that the map is this long.
        let base = unsafe {
            mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Shared { base, entries, bytes })
    }
}

impl<T> Deref for Shared<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: mapped for `entries` values until drop; any bit pattern is a valid atomic.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.entries) }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length; a failure would leave it mapped, which harms nobody.
        let _ = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.bytes) };
    }
}
