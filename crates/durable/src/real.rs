//! The real file system and block devices.
//!
//! Crash consistency: exactly what the kernel gives, see [`Storage`]. Retries: an interrupted call (EINTR) is repeated,
//! a short write goes on after what was written; nothing else is retried, a failed sync least of all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use crate::{OpenMode, Storage, StorageFile};

/// How many slices one call takes (IOV_MAX of Linux); more are written in several calls.
const SLICES_MAX: usize = 1024;
/// How many zero bytes one call writes where the medium cannot zero a range itself.
const ZEROES: &[u8] = &[0; 64 * 1024];

/// The file system of this machine. Files are made with mode 0600, directories with 0700.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealStorage;

impl Storage for RealStorage {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600);
        match mode {
            OpenMode::Read => &mut options,
            OpenMode::ReadWrite => options.write(true),
            OpenMode::CreateNew => options.write(true).create_new(true),
            OpenMode::CreateOrOpen => options.write(true).create(true).truncate(false),
        };
        let file = options.open(path)?;
        let file_type = file.metadata()?.file_type();
        if file_type.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok(Arc::new(RealFile { file, block_device: file_type.is_block_device() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut missing = Vec::new();
        let mut next = Some(path);
        while let Some(dir) = next.filter(|dir| !dir.as_os_str().is_empty() && !dir.is_dir()) {
            missing.push(dir);
            next = dir.parent();
        }
        for dir in missing.into_iter().rev() {
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !dir.is_dir() => {
                    return Err(error);
                }
                // Another process may have made it and not yet synced: its name is made durable here all the same.
                _ => self.sync_dir(dir.parent().unwrap_or(dir))?,
            }
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            names.push(entry?.file_name().into_string().map_err(|name| {
                io::Error::new(io::ErrorKind::InvalidData, format!("file name {name:?} is not UTF-8"))
            })?);
        }
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        File::open(dir)?.sync_all()
    }
}

/// Writes all slices with calls that may take less than they were given.
fn write_all(
    slices: &[IoSlice<'_>],
    mut offset: u64,
    mut write: impl FnMut(&[IoSlice<'_>], u64) -> Result<usize, Errno>,
) -> io::Result<()> {
    for group in slices.chunks(SLICES_MAX) {
        let mut group = group.to_vec();
        let mut left = group.as_mut_slice();
        // Drops leading empty slices, so that a return of 0 can only mean that nothing more can be written.
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let count = retry_on_intr(|| write(left, offset))?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += count as u64;
            IoSlice::advance_slices(&mut left, count);
        }
    }
    Ok(())
}

#[derive(Debug)]
struct RealFile {
    file: File,
    block_device: bool,
}

impl RealFile {
    fn fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.saturating_add(length).min(self.len()?);
        let mut at = offset;
        while at < end {
            let count = usize::try_from(end - at).map_or(ZEROES.len(), |left| left.min(ZEROES.len()));
            self.file.write_all_at(&ZEROES[..count], at)?;
            at += count as u64;
        }
        Ok(())
    }
}

/// The answers of a medium that lacks an operation, as opposed to one that failed at it. A block device refuses a
/// range that is not of whole logical blocks with EINVAL; writing zeroes serves that too.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NOTTY)
}

impl StorageFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write_all_vectored_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        write_all(slices, offset, |slices, offset| rustix::io::pwritev(&self.file, slices, offset))
    }

    fn len(&self) -> io::Result<u64> {
        if self.block_device {
            // The handle's own position is never used otherwise: every read and write names its offset.
            Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn zero_range(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        // A block device takes a hole only where its hardware makes it read as zeroes; ZERO_RANGE lets the kernel
        // write them. On a file ZERO_RANGE would keep the space, so it is not tried there.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let ways: &[FallocateFlags] = if self.block_device { &[hole, zero] } else { &[hole] };
        for way in ways {
            match self.fallocate(*way, offset, length) {
                Ok(()) => return Ok(()),
                Err(errno) if is_unsupported(errno) => {}
                // The kernel forgets what it has in memory of the range before it zeroes it. While somebody has claimed the device, be it
                // this process with another handle, it will not forget what was written and has not reached the medium yet.
                Err(Errno::BUSY) if self.block_device => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        self.write_zeroes(offset, length)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let length = self.len()?;
        if offset >= length {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(errno) if is_unsupported(errno) => return Ok(Some((offset, length))),
            Err(errno) => return Err(errno.into()),
        };
        let end = match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(length),
            // Cut shorter meanwhile, or holes unknown: the whole rest may be data.
            Err(errno) if errno == Errno::NXIO || is_unsupported(errno) => length,
            Err(errno) => return Err(errno.into()),
        };
        Ok((start < end).then_some((start, end)))
    }

    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 || self.block_device {
            return Ok(());
        }
        match self.fallocate(FallocateFlags::empty(), offset, length) {
            Err(errno) if is_unsupported(errno) => {
                let end = offset.saturating_add(length);
                if end > self.len()? { self.set_len(end) } else { Ok(()) }
            }
            other => Ok(other?),
        }
    }

    fn try_lock(&self) -> io::Result<bool> {
        match retry_on_intr(|| rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive)) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A medium that takes of each call only as much as it likes, and says what it likes.
    #[derive(Clone, Copy, Debug)]
    enum Answer {
        Takes(usize),
        Interrupted,
        Nothing,
        Full,
    }

    fn answer() -> impl Strategy<Value = Answer> {
        prop_oneof![
            20 => (1..4000_usize).prop_map(Answer::Takes),
            4 => Just(Answer::Interrupted),
            1 => Just(Answer::Nothing),
            1 => Just(Answer::Full),
        ]
    }

    proptest! {
        /// A short write goes on after what was taken; so all is written, each byte in its place, or the caller is told.
        #[test]
        fn short_writes_are_finished_or_an_error(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..8),
            answers in prop::collection::vec(answer(), 0..40),
        ) {
            let expected = parts.concat();
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut medium = vec![0; 100 + expected.len()];
            let (mut answers, mut failed) = (answers.into_iter(), None);
            let written = write_all(&slices, 100, |slices, offset| {
                let given: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                match answers.next().unwrap_or(Answer::Takes(usize::MAX)) {
                    Answer::Takes(count) => {
                        let count = count.min(given.len());
                        medium[offset as usize..][..count].copy_from_slice(&given[..count]);
                        Ok(count)
                    }
                    Answer::Interrupted => Err(Errno::INTR),
                    Answer::Nothing => {
                        failed = Some(io::ErrorKind::WriteZero);
                        Ok(0)
                    }
                    Answer::Full => {
                        failed = Some(io::ErrorKind::StorageFull);
                        Err(Errno::NOSPC)
                    }
                }
            });
            prop_assert_eq!(written.map_err(|error| error.kind()), failed.map_or(Ok(()), Err));
            prop_assert!(failed.is_some() || medium[100..] == expected);
        }
    }
}
