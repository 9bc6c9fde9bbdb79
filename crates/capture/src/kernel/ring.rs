//! Reader of a BPF ring buffer (Documentation/bpf/ringbuf.rst in the kernel): one page that we own with the consumer
//! position, one page with the producer position, then the data, mapped twice in a row so that no record wraps.
//!
//! Our own, because the tracker needs the positions themselves: a cut is a ring position.

#![expect(unsafe_code, reason = "mmap of kernel memory that another party writes")]

use std::ffi::c_void;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
const HEADER_BYTES: u64 = 8;
/// The consumer position is published to the kernel at least this often, so that a long run of records frees
/// the ring while it is being consumed.
const PUBLISH_BYTES: u64 = 256 * 1024;

pub(super) struct Ring {
    consumer: *mut c_void,
    producer: *mut c_void,
    page: usize,
    bytes: u64,
    /// Consumed so far; the kernel may know less.
    position: u64,
}

// SAFETY: the mappings are used through &mut self or atomics only, and live until drop.
unsafe impl Send for Ring {}

impl Ring {
    pub(super) fn map(fd: BorrowedFd<'_>, bytes: u64) -> io::Result<Ring> {
        let page = rustix::param::page_size();
        let length = page + 2 * bytes as usize;
        // SAFETY: new mappings at addresses of the kernel's choice, with the offsets and rights the kernel prescribes.
        let consumer = unsafe {
            mmap(std::ptr::null_mut(), page, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)
        }?;
        // SAFETY: as above.
        let producer =
            unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, fd, page as u64) };
        let producer = match producer {
            Ok(producer) => producer,
            Err(error) => {
                // SAFETY: our own mapping from above.
                let _ = unsafe { munmap(consumer, page) };
                return Err(error.into());
            }
        };
        let mut ring = Ring { consumer, producer, page, bytes, position: 0 };
        ring.position = ring.consumer_position().load(Ordering::Acquire);
        Ok(ring)
    }

    fn consumer_position(&self) -> &AtomicU64 {
        // SAFETY: the first word of a mapped page.
        unsafe { &*self.consumer.cast::<AtomicU64>() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn produced(&self) -> u64 {
        // SAFETY: the first word of a mapped page.
        unsafe { &*self.producer.cast::<AtomicU64>() }.load(Ordering::SeqCst)
    }

    pub(super) fn consumed(&self) -> u64 {
        self.position
    }

    /// Hands out records before `until`. Ends early at a record that is still being written, or when told to.
    pub(super) fn consume(&mut self, until: u64, mut sink: impl FnMut(&[u8]) -> ControlFlow<()>) {
        let until = until.min(self.produced());
        let mut published = self.position;
        while self.position < until {
            let at = (self.position & (self.bytes - 1)) as usize;
            // SAFETY: `at` is below the ring's size, the data begins a page in and is mapped twice in a row, so a record
            // that begins inside the ring lies inside the mapping; the kernel keeps it unchanged until we publish
            // a position past it.
            let header = unsafe { self.producer.byte_add(self.page + at) };
            // SAFETY: headers are 8-byte aligned; the length is written by the kernel with release order.
            let length = unsafe { &*header.cast::<AtomicU32>() }.load(Ordering::Acquire);
            if length & BUSY != 0 {
                break;
            }
            let bytes = length & !(BUSY | DISCARDED);
            self.position += (u64::from(bytes) + HEADER_BYTES).next_multiple_of(8);
            if length & DISCARDED == 0 {
                // SAFETY: as above; a committed record is not written any more.
                let record = unsafe {
                    std::slice::from_raw_parts(
                        header.byte_add(HEADER_BYTES as usize).cast::<u8>(),
                        bytes as usize,
                    )
                };
                if sink(record).is_break() {
                    break;
                }
            }
            if self.position - published >= PUBLISH_BYTES {
                self.consumer_position().store(self.position, Ordering::Release);
                published = self.position;
            }
        }
        self.consumer_position().store(self.position, Ordering::Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: our own mappings, of these lengths; a failure would leave them mapped, which harms nobody.
        unsafe {
            let _ = munmap(self.consumer, self.page);
            let _ = munmap(self.producer, self.page + 2 * self.bytes as usize);
        }
    }
}
