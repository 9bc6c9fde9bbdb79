//! Any file or device that can be read, without privileges: checksum every granule again and again; what differs is dirty.
//!
//! A pass over all volumes is a drain. It ends in a recovery point only if the sources did not change while it ran
//! (quiescent or snapshotted sources); else the pass gave data but no point, and the next pass follows at once.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use block::{ByteCount, ByteOffset, Consistency, Epoch, Extent, GRANULE_BYTES, UnixNanos};
use changeset::{Fold, VolumeInfo};

use crate::CaptureError;
use crate::source::{Cut, Mode, Position, Progress, Source, SourceStatus, VolumeStatus};

/// How much one step reads at most.
pub const SCAN_BYTES_PER_STEP: ByteCount = ByteCount::mib(4);
/// A file system's clock may stand still this long: a change so shortly before a pass could hide another one in the same
/// tick, so such a pass gives no point.
const TIMESTAMP_MARGIN_NS: u64 = 50_000_000;

type Checksum = [u8; 16];

struct Volume {
    info: VolumeInfo,
    path: PathBuf,
    file: File,
    is_device: bool,
    checksums: Vec<Option<Checksum>>,
}

/// What tells that a source was written: equal marks before and after a pass mean that it was not.
#[derive(Clone, PartialEq, Eq)]
struct Mark {
    size: u64,
    changed: Vec<u64>,
}

/// Scans files and devices.
pub struct ScanSource {
    volumes: Vec<Volume>,
    interval_ns: u64,
    fold: Fold,
    /// The pass that is running: where it is, and the marks from before it.
    pass: Option<(usize, u64, Vec<Mark>, UnixNanos)>,
    /// How many have begun.
    passes: u64,
    /// Marks, beginnings and numbers of ended passes, of which the open epoch holds the end.
    ended: VecDeque<(Consistency, UnixNanos, u64)>,
    next_pass: UnixNanos,
    first_done: bool,
    read: u64,
    changed: u64,
    last_error: Option<String>,
}

impl ScanSource {
    /// Scans `volumes` (name and path), one pass each `interval_ms`.
    ///
    /// # Errors
    /// When one cannot be opened or has no size.
    pub fn open(
        volumes: &[(block::VolumeId, String, PathBuf)],
        interval_ms: u64,
    ) -> Result<ScanSource, CaptureError> {
        let volumes = volumes
            .iter()
            .map(|(id, name, path)| {
                let file = File::open(path).map_err(CaptureError::io("open", path))?;
                let kind = file.metadata().map_err(CaptureError::io("look at", path))?.file_type();
                if !kind.is_file() && !kind.is_block_device() {
                    return Err(CaptureError::NotCapturable {
                        path: path.clone(),
                        reason: "neither a file nor a block device".into(),
                    });
                }
                let size = size_of(&file, path)?;
                if size == 0 {
                    return Err(CaptureError::NotCapturable {
                        path: path.clone(),
                        reason: "it is empty".into(),
                    });
                }
                if size % block::SECTOR_BYTES != 0 {
                    return Err(CaptureError::NotCapturable {
                        path: path.clone(),
                        reason: format!(
                            "its size, {size} bytes, is not a multiple of 512; extend it with `truncate`"
                        ),
                    });
                }
                let info =
                    VolumeInfo { id: *id, name: name.clone(), size: ByteCount(size), logical_block: 512 };
                let granules = info.size.granules() as usize;
                Ok(Volume {
                    info,
                    path: path.clone(),
                    file,
                    is_device: kind.is_block_device(),
                    checksums: vec![None; granules],
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(ScanSource {
            volumes,
            interval_ns: interval_ms.saturating_mul(1_000_000),
            fold: Fold::new(),
            pass: None,
            passes: 0,
            ended: VecDeque::new(),
            next_pass: UnixNanos(0),
            first_done: false,
            read: 0,
            changed: 0,
            last_error: None,
        })
    }

    fn marks(&self) -> Result<Vec<Mark>, CaptureError> {
        self.volumes.iter().map(Volume::mark).collect()
    }

    /// Reads one step of volume `index` from `granule`; the next granule, or `None` at the end.
    fn step(&mut self, index: usize, granule: u64) -> Result<Option<u64>, CaptureError> {
        let volume = &mut self.volumes[index];
        let size = volume.info.size.0;
        let start = granule * GRANULE_BYTES;
        let length = SCAN_BYTES_PER_STEP.0.min(size - start);
        let mut data = vec![0; length as usize];
        volume.file.read_exact_at(&mut data, start).map_err(CaptureError::io("scan", &volume.path))?;
        self.read += length;
        for (slot, bytes) in data.chunks(GRANULE_BYTES as usize).enumerate() {
            let checksum: Checksum = blake3::hash(bytes).as_bytes()[..16].try_into().expect("16 of 32 bytes");
            let known = &mut volume.checksums[granule as usize + slot];
            if *known != Some(checksum) {
                *known = Some(checksum);
                self.changed += bytes.len() as u64;
                let offset = ByteOffset(start + slot as u64 * GRANULE_BYTES);
                if bytes.iter().fold(0, |or, byte| or | byte) == 0 {
                    let extent =
                        Extent::new(offset, ByteCount(bytes.len() as u64)).expect("chunks are not empty");
                    self.fold.zero(index as u16, extent);
                } else {
                    self.fold.write(index as u16, offset, bytes);
                }
            }
        }
        let next = granule + length.div_ceil(GRANULE_BYTES);
        Ok((next * GRANULE_BYTES < size).then_some(next))
    }
}

impl Volume {
    fn mark(&self) -> Result<Mark, CaptureError> {
        let size = size_of(&self.file, &self.path)?;
        if size != self.info.size.0 {
            return Err(CaptureError::NotCapturable {
                path: self.path.clone(),
                reason: format!("its size changed from {} to {size} bytes; start again", self.info.size.0),
            });
        }
        let metadata = self.file.metadata().map_err(CaptureError::io("look at", &self.path))?;
        let changed = if self.is_device {
            // Completed writes, discards and flushes, and what is in flight: Documentation/block/stat.rst.
            let number = metadata.rdev();
            let stat = PathBuf::from(format!(
                "/sys/dev/block/{}:{}/stat",
                rustix::fs::major(number),
                rustix::fs::minor(number)
            ));
            let text = fs::read_to_string(&stat).map_err(CaptureError::io("read", &stat))?;
            let fields: Vec<u64> = text.split_whitespace().filter_map(|field| field.parse().ok()).collect();
            [4, 6, 8, 11, 13].iter().filter_map(|index| fields.get(*index).copied()).collect()
        } else {
            let nanos =
                |seconds: i64, nanos: i64| (seconds as u64).wrapping_mul(1_000_000_000) + nanos as u64;
            vec![
                nanos(metadata.mtime(), metadata.mtime_nsec()),
                nanos(metadata.ctime(), metadata.ctime_nsec()),
            ]
        };
        Ok(Mark { size, changed })
    }

    /// Whether the mark was made safely before `time`, so that no later change can hide in the same clock tick.
    fn settled(&self, mark: &Mark, time: UnixNanos) -> bool {
        self.is_device || mark.changed.iter().all(|changed| changed + TIMESTAMP_MARGIN_NS < time.0)
    }
}

fn size_of(file: &File, path: &Path) -> Result<u64, CaptureError> {
    use std::io::{Seek, SeekFrom};
    // Seeking to the end works for files and devices alike.
    let mut file = file;
    file.seek(SeekFrom::End(0)).map_err(CaptureError::io("find the size of", path))
}

impl Source for ScanSource {
    fn volumes(&self) -> Vec<VolumeInfo> {
        self.volumes.iter().map(|volume| volume.info.clone()).collect()
    }

    fn advance(&mut self, now: UnixNanos, limit: ByteCount) -> Result<Progress, CaptureError> {
        if self.fold.memory_bytes() + SCAN_BYTES_PER_STEP > limit || !self.fold.fits(SCAN_BYTES_PER_STEP) {
            return Ok(Progress::Full);
        }
        let (index, granule, marks, began) = match self.pass.take() {
            Some(pass) => pass,
            // A pass that ended is cut before the next begins: its point must not hold parts of another pass.
            None if now < self.next_pass || !self.ended.is_empty() => return Ok(Progress::Idle),
            None => {
                self.passes += 1;
                (0, 0, self.marks()?, now)
            }
        };
        match self.step(index, granule) {
            Ok(Some(next)) => self.pass = Some((index, next, marks, began)),
            Ok(None) if index + 1 < self.volumes.len() => self.pass = Some((index + 1, 0, marks, began)),
            Ok(None) => {
                let quiet = self.marks()? == marks
                    && self.volumes.iter().zip(&marks).all(|(volume, mark)| volume.settled(mark, began));
                let consistency = if quiet { Consistency::Crash } else { Consistency::None };
                self.last_error = (!quiet)
                    .then(|| "the source changed while it was scanned; no point from this pass".to_owned());
                // Neither a point nor a change: nobody would cut it, and the next pass would wait for that.
                if quiet || self.fold.memory_bytes() > ByteCount::ZERO {
                    self.ended.push_back((consistency, began, self.passes));
                }
                self.first_done = true;
                self.next_pass = if quiet { UnixNanos(began.0 + self.interval_ns) } else { now };
            }
            Err(error) => {
                // The next pass reads it all again; what was read so far is only data without a point.
                self.next_pass = UnixNanos(now.0.saturating_add(self.interval_ns));
                self.last_error = Some(error.to_string());
            }
        }
        Ok(Progress::Busy)
    }

    fn open_bytes(&self) -> ByteCount {
        self.fold.memory_bytes()
    }

    fn consistency(&self) -> Consistency {
        self.ended.front().map_or(Consistency::None, |(consistency, ..)| *consistency)
    }

    fn position(&self) -> Position {
        Position(self.passes)
    }

    fn reached(&self, position: Position) -> bool {
        // A pass holds what was written before it began.
        self.ended.front().is_some_and(|(_, _, pass)| *pass > position.0)
    }

    fn cut(&mut self, reuse: Fold, _epoch: Epoch) -> Cut {
        let fold = std::mem::replace(&mut self.fold, reuse);
        let began = self.pass.as_ref().map(|(_, _, _, began)| *began);
        let (consistency, time, _) =
            self.ended.pop_front().unwrap_or((Consistency::None, began.unwrap_or(self.next_pass), 0));
        Cut { fold, consistency, time }
    }

    fn send_again(&mut self, volume: usize) {
        self.volumes[volume].checksums.fill(None);
    }

    /// Nothing is kept over a restart: the first pass reads everything.
    fn acknowledged(&mut self, _held: Epoch) {}

    fn status(&self) -> SourceStatus {
        let volumes = self
            .volumes
            .iter()
            .map(|volume| VolumeStatus {
                name: volume.info.name.clone(),
                mode: Mode::Scan,
                size: volume.info.size,
                dirty: ByteCount(
                    volume.checksums.iter().filter(|checksum| checksum.is_none()).count() as u64
                        * GRANULE_BYTES,
                ),
            })
            .collect();
        SourceStatus {
            volumes,
            written: ByteCount(self.changed),
            drained: ByteCount(self.read),
            last_error: self.last_error.clone(),
            ..SourceStatus::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Advances until the source is idle, and cuts what an agent would cut; how many of them were points.
    fn drive(source: &mut ScanSource, now: UnixNanos) -> usize {
        let mut points = 0;
        // More steps than a pass has: a source that goes on for ever is as wrong as one that stands still.
        for _ in 0..100 {
            let progress = source.advance(now, ByteCount::mib(64)).unwrap();
            let point = source.consistency() != Consistency::None;
            if point || source.open_bytes() > ByteCount::ZERO {
                let cut = source.cut(Fold::new(), Epoch(1));
                points += usize::from(cut.consistency.is_point());
            } else if progress == Progress::Idle {
                return points;
            }
        }
        panic!("it does not come to rest");
    }

    /// A write behind the place that is being read makes a pass that has neither a point nor a change.
    #[test]
    fn a_change_behind_the_pass_is_found_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let size = SCAN_BYTES_PER_STEP.0 * 3;
        fs::write(&path, vec![1; size as usize]).unwrap();
        let settled = || UnixNanos(UnixNanos::now().0 + 10 * TIMESTAMP_MARGIN_NS);
        let volumes = [(block::VolumeId([1; 16]), "data".to_owned(), path.clone())];
        let mut source = ScanSource::open(&volumes, 1000).unwrap();
        assert_eq!(drive(&mut source, settled()), 1);

        let later = UnixNanos(settled().0 + 10_000_000_000);
        assert_eq!(source.advance(later, ByteCount::mib(64)).unwrap(), Progress::Busy);
        File::options().write(true).open(&path).unwrap().write_all_at(&[2], 0).unwrap();
        let (before, position) = (source.changed, source.position());
        let later = UnixNanos(later.0 + 1_000_000_000);
        assert_eq!(drive(&mut source, later), 1, "the next pass follows at once, and is a point");
        assert_eq!(source.changed - before, GRANULE_BYTES);
        assert!(source.position() > position && source.status().last_error.is_none());
    }
}
