use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// How a file is opened. All modes but `Read` allow writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading only.
    Read,
    /// An existing file.
    ReadWrite,
    /// A new file; fails with `AlreadyExists` when there is one. Mode 0600.
    CreateNew,
    /// An existing file, or a new one. Mode 0600.
    CreateOrOpen,
}

/// A place for files: the real file system, or a simulated one that can crash.
///
/// What is assumed of the medium: a write is durable only after [`StorageFile::sync_data`] on its file returned; a
/// new, renamed or removed name only after [`Storage::sync_dir`] on its directory returned. Until then any subset
/// of the writes since the last sync may be on the medium after a crash, a write may be torn at any 512-byte sector,
/// and a new length without its data reads as zeroes.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Opens a file or block device.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>>;
    /// Gives a file a new name in place of whatever has that name, in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. Open handles go on reading it.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a directory and its parents, durably; no error when it exists.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Whether the name exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// An open file. Positions are explicit, so that a file can be shared between threads.
pub trait StorageFile: Send + Sync + fmt::Debug {
    /// Reads at most `buffer.len()` bytes; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of the slices one after another from `offset`, in as few system calls as the platform allows.
    fn write_all_vectored_at(&self, slices: &[io::IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// The length in bytes; of a block device, its size.
    fn len(&self) -> io::Result<u64>;
    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends (with zeroes, sparse) to `length` bytes.
    fn set_len(&self, length: u64) -> io::Result<()>;
    /// Makes a range read as zeroes, giving its space back where the medium can. Never changes the length.
    fn zero_range(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The first range at or after `offset` that may hold data, as (start, end); `None` when only zeroes follow.
    /// A medium that does not know its holes answers the whole rest.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// Reserves space for a range, extending the length where the range ends past it; what was not written reads
    /// as zeroes. Fails with `StorageFull` now instead of at a later write. A medium that cannot reserve only
    /// extends the length.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Takes the file for this handle alone, until the handle is dropped or the process ends; `false` when another
    /// handle, of this process or another, has it. Advisory: it keeps out only those who ask.
    fn try_lock(&self) -> io::Result<bool>;
    /// Makes everything written through any handle of this file durable, with the length.
    ///
    /// After an error nothing is known about any write since the last success, and a second call may succeed without
    /// having written them (the kernel drops the pages): treat the file as poisoned, never call again to retry.
    fn sync_data(&self) -> io::Result<()>;

    /// Writes all of `data` at `offset`.
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_vectored_at(&[io::IoSlice::new(data)], offset)
    }

    /// Reads exactly `buffer.len()` bytes, or fails with `UnexpectedEof`.
    fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read_at(buffer, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
            }
        }
        Ok(())
    }
}
