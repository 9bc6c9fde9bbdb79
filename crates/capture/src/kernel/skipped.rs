//! How often the kernel skipped a program because it was already running on the same CPU (R11).

#![expect(unsafe_code, reason = "the bpf system call has no safe wrapper for this counter")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
/// `struct bpf_prog_info` up to and with `recursion_misses` (include/uapi/linux/bpf.h; since 5.12).
const INFO_BYTES: usize = 216;
const RECURSION_MISSES_AT: usize = 208;

#[repr(C)]
struct InfoRequest {
    fd: u32,
    length: u32,
    info: u64,
}

/// The program's count of skipped runs.
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = [0_u8; INFO_BYTES];
    let request = InfoRequest {
        fd: program.as_raw_fd() as u32,
        length: INFO_BYTES as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel reads the request and writes at most `length` bytes to `info`, which lives until the call ends.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const request, size_of::<InfoRequest>())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let misses = &info[RECURSION_MISSES_AT..RECURSION_MISSES_AT + 8];
    Ok(u64::from_ne_bytes(misses.try_into().expect("8 bytes")))
}
