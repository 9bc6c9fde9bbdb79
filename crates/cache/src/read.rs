use std::fmt;
use std::io;
use std::sync::Arc;

use block::{ByteCount, GroupId};
use bytes::Bytes;
use durable::{OpenMode, StorageFile};

use crate::cache::Shared;
use crate::error::{CacheError, ReadError};
use crate::position::Position;
use crate::recover::{Entry, segment_name};
use crate::state::tell;

/// A held changeset, to be read from its beginning to its end.
///
/// Memory: one chunk at a time ([`CHUNK_BYTES`](crate::CHUNK_BYTES)). May be dropped at any time. It does not keep the
/// changeset from being freed; its own target does, by not having applied it.
pub struct HeldChangeset {
    shared: Arc<Shared>,
    group: GroupId,
    entry: Entry,
    next: usize,
    file: Option<(u64, Arc<dyn StorageFile>)>,
}

impl HeldChangeset {
    pub(crate) fn new(shared: Arc<Shared>, group: GroupId, entry: Entry) -> HeldChangeset {
        HeldChangeset { shared, group, entry, next: 0, file: None }
    }

    /// Which one.
    pub fn position(&self) -> Position {
        self.entry.position
    }

    /// Its size.
    pub fn total(&self) -> ByteCount {
        ByteCount(self.entry.total)
    }

    /// The next part of it, compared with its checksum; `None` at the end. Blocks for the disk.
    ///
    /// # Errors
    /// [`ReadError::Freed`], [`ReadError::Damaged`] (the group's changesets from this one on are then dropped), or
    /// what the storage says.
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>, ReadError> {
        let Some(chunk) = self.entry.chunks.get(self.next).copied() else { return Ok(None) };
        let path = self.shared.dir.join(segment_name(chunk.segment));
        let read = || -> io::Result<Vec<u8>> {
            if self.file.as_ref().is_none_or(|(number, _)| *number != chunk.segment) {
                self.file = Some((chunk.segment, self.shared.storage.open(&path, OpenMode::Read)?));
            }
            let (_, file) = self.file.as_ref().expect("opened above");
            let mut bytes = vec![0; chunk.length as usize];
            file.read_exact_at(&mut bytes, chunk.offset)?;
            Ok(bytes)
        };
        let wrong = match { read }() {
            Ok(bytes) if crc32c::crc32c(&bytes) == chunk.checksum => {
                self.next += 1;
                return Ok(Some(bytes.into()));
            }
            Ok(_) => "its checksum is wrong",
            Err(error) if error.kind() == io::ErrorKind::NotFound => "its segment is missing",
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => "its segment is too short",
            Err(source) => return Err(CacheError::Io { action: "read", path, source }.into()),
        };
        // What all targets have applied may be gone or punched out, and is not missed.
        let position = self.entry.position;
        let reason: Arc<str> =
            format!("{position} in segment {} at byte {}: {wrong}", chunk.segment, chunk.offset).into();
        let Some(news) = self.shared.state.lock().lose(self.group, position, &reason) else {
            return Err(ReadError::Freed(position));
        };
        tracing::error!(group = %self.group, "read a held changeset: {reason}; resync the group with a new generation");
        tell(news);
        Err(ReadError::Damaged { position, segment: chunk.segment, offset: chunk.offset })
    }
}

impl fmt::Debug for HeldChangeset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HeldChangeset {{ {:?}, {}, {} }}", self.group, self.entry.position, self.total())
    }
}
