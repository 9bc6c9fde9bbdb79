//! Reading dirty granules: with O_DIRECT, because the block device's page cache is not the filesystem's (R5).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use block::Extent;

use crate::tap::VolumeIndex;

/// Buffers kept between reads; more are freed.
const SPARE_BUFFERS_MAX: usize = 8;
/// O_DIRECT wants buffers aligned to the logical block; a page suits every disk.
const ALIGNMENT: usize = 4096;

/// Bytes in memory that a disk can read into directly.
pub struct Buffer {
    pointer: *mut u8,
    length: usize,
}

#[expect(unsafe_code, reason = "memory with an alignment that Vec cannot give")]
mod aligned {
    use super::{ALIGNMENT, Buffer, Deref, DerefMut, Layout, alloc_zeroed, dealloc, handle_alloc_error};

    // SAFETY: a Buffer owns its memory alone, as a Box<[u8]> does.
    unsafe impl Send for Buffer {}
    // SAFETY: shared access only reads.
    unsafe impl Sync for Buffer {}

    impl Buffer {
        /// `length` zero bytes.
        ///
        /// # Panics
        /// When `length` is 0 or not a multiple of 512.
        pub fn zeroed(length: usize) -> Buffer {
            assert!(length > 0 && length.is_multiple_of(512), "a direct buffer of {length} bytes");
            let layout = Layout::from_size_align(length, ALIGNMENT).expect("a length below isize::MAX");
            // SAFETY: the layout's size is not zero.
            let pointer = unsafe { alloc_zeroed(layout) };
            if pointer.is_null() {
                handle_alloc_error(layout);
            }
            Buffer { pointer, length }
        }
    }

    impl Deref for Buffer {
        type Target = [u8];
        fn deref(&self) -> &[u8] {
            // SAFETY: the pointer is valid for `length` initialised bytes as long as self lives.
            unsafe { std::slice::from_raw_parts(self.pointer, self.length) }
        }
    }

    impl DerefMut for Buffer {
        fn deref_mut(&mut self) -> &mut [u8] {
            // SAFETY: as above, and &mut self makes it the only access.
            unsafe { std::slice::from_raw_parts_mut(self.pointer, self.length) }
        }
    }

    impl Drop for Buffer {
        fn drop(&mut self) {
            let layout = Layout::from_size_align(self.length, ALIGNMENT).expect("made with this layout");
            // SAFETY: allocated with exactly this layout.
            unsafe { dealloc(self.pointer, layout) };
        }
    }
}

/// A read that the tracker wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// What is read is compared, not sent.
    pub compare: bool,
    /// Which disk.
    pub volume: VolumeIndex,
    /// Where.
    pub extent: Extent,
}

/// A read that has ended.
pub struct ReadDone {
    /// What was asked for.
    pub read: Read,
    /// The bytes, as long as the extent.
    pub data: io::Result<Buffer>,
    /// How long the disk took, in nanoseconds.
    pub took_ns: u64,
}

/// Disks that can be read while the tracker goes on consuming.
pub trait Disk: Send {
    /// Begins a read.
    fn submit(&mut self, read: Read);
    /// A read that has ended, if any. Order is free.
    fn finished(&mut self) -> Option<ReadDone>;
    /// Gives back a buffer that is not needed any more, to be read into again.
    fn recycle(&mut self, _buffer: Buffer) {}
}

/// Disks behind file handles opened with O_DIRECT, read by a few threads.
pub struct DirectDisks {
    jobs: Option<Sender<(Read, Option<Buffer>)>>,
    done: Receiver<ReadDone>,
    /// Fresh memory costs a page fault for each 4 KiB, as much as the read itself.
    spare: Vec<Buffer>,
    threads: Vec<JoinHandle<()>>,
}

impl DirectDisks {
    /// Reads `disks` (by volume index) with `threads` threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn new(disks: Vec<File>, threads: usize) -> io::Result<DirectDisks> {
        let (jobs, receiver) = channel::<(Read, Option<Buffer>)>();
        let (sender, done) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let disks = Arc::new(disks);
        let threads = (0..threads.max(1))
            .map(|_| {
                let (receiver, sender, disks) = (receiver.clone(), sender.clone(), disks.clone());
                std::thread::Builder::new().name("drain".into()).spawn(move || {
                    loop {
                        let job = receiver.lock().map(|receiver| receiver.recv());
                        let Ok(Ok((read, spare))) = job else { return };
                        let began = Instant::now();
                        let data = read_extent(&disks, read, spare);
                        let took_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                        if sender.send(ReadDone { read, data, took_ns }).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(DirectDisks { jobs: Some(jobs), done, spare: Vec::new(), threads })
    }
}

fn read_extent(disks: &[File], read: Read, spare: Option<Buffer>) -> io::Result<Buffer> {
    let disk = disks.get(usize::from(read.volume.0)).ok_or(io::ErrorKind::NotFound)?;
    let length = usize::try_from(read.extent.length().0).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut buffer = spare.filter(|spare| spare.len() == length).unwrap_or_else(|| Buffer::zeroed(length));
    disk.read_exact_at(&mut buffer, read.extent.offset().0)?;
    Ok(buffer)
}

impl Disk for DirectDisks {
    fn submit(&mut self, read: Read) {
        if let Some(jobs) = &self.jobs {
            jobs.send((read, self.spare.pop())).expect("drain threads live as long as this");
        }
    }

    fn finished(&mut self) -> Option<ReadDone> {
        self.done.try_recv().ok()
    }

    fn recycle(&mut self, buffer: Buffer) {
        if self.spare.len() < SPARE_BUFFERS_MAX {
            self.spare.push(buffer);
        }
    }
}

impl Drop for DirectDisks {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panicked reader has already been reported by the panic itself.
            let _ = thread.join();
        }
    }
}
