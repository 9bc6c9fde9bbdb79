//! The few system calls for which there is no safe wrapper.

#![expect(unsafe_code, reason = "bare system calls; bpf takes a structure of its own for each command")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;

/// The calling thread no longer cuts in on others when it wakes: it works in batches (SCHED_BATCH, sched(7)), and the ring holds
/// what comes meanwhile. For the thread that follows the disks, which shares the processors with who writes.
///
/// # Errors
/// When the kernel refuses; the thread goes on as it was.
pub fn give_way() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: a valid structure; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `struct bpf_prog_info` up to and with `recursion_misses` (include/uapi/linux/bpf.h; since 5.12).
const INFO_BYTES: usize = 216;
const RECURSION_MISSES_AT: usize = 208;

#[repr(C)]
struct InfoRequest {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct TracepointRequest {
    name: u64,
    program: u32,
    reserved: u32,
    cookie: u64,
}

#[repr(C)]
struct ObjectRequest {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RunRequest {
    program: u32,
    result: u32,
    data_in_bytes: u32,
    data_out_bytes: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_in_bytes: u32,
    context_out_bytes: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    reserved: u32,
}

/// Calls bpf with a request that is exactly its structure for that command, or its beginning.
unsafe fn bpf<T>(command: libc::c_long, request: &T) -> io::Result<RawFd> {
    // SAFETY: the caller vouches for the request; the kernel takes what the given size does not cover as zero.
    match unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(request), size_of::<T>()) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result as RawFd),
    }
}

/// How often the kernel has skipped the program because it was already running on the same CPU (R11).
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = [0_u8; INFO_BYTES];
    let request = InfoRequest {
        fd: program.as_raw_fd() as u32,
        length: INFO_BYTES as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`, which lives until the call ends.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &request) }?;
    let misses = &info[RECURSION_MISSES_AT..RECURSION_MISSES_AT + 8];
    Ok(u64::from_ne_bytes(misses.try_into().expect("8 bytes")))
}

/// Attaches a loaded program to the tracepoint it was loaded for, until the link's last handle and pin are gone.
pub(super) fn attach_to_tracepoint(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let request = TracepointRequest { name: 0, program: program.as_raw_fd() as u32, reserved: 0, cookie: 0 };
    // SAFETY: the request has no pointers; the result is a new handle that nobody else owns.
    unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &request).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Runs a raw tracepoint's program once, here and now, without its event.
pub(super) fn run(program: BorrowedFd<'_>) -> io::Result<()> {
    let request = RunRequest { program: program.as_raw_fd() as u32, ..RunRequest::default() };
    // SAFETY: the request has no pointers.
    unsafe { bpf(BPF_PROG_TEST_RUN, &request) }.map(|_| ())
}

/// Gives a program or link a name in the BPF file system, by which it lives on.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let request = ObjectRequest { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path is a string that lives until the call ends.
    unsafe { bpf(BPF_OBJ_PIN, &request) }.map(|_| ())
}

/// Opens a pinned object.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let request = ObjectRequest { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path is a string that lives until the call ends; the result is a new handle that nobody else owns.
    unsafe { bpf(BPF_OBJ_GET, &request).map(|fd| OwnedFd::from_raw_fd(fd)) }
}
