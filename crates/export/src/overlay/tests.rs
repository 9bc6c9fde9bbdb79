use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use durable::RealStorage;
use proptest::prelude::*;

use super::*;

/// A disk of bytes in memory that does not change. Its first 8 KiB of each 64 KiB are data.
#[derive(Debug)]
struct Still(Vec<u8>);

impl Still {
    fn new(bytes: usize) -> Still {
        let byte = |at: usize| if at % 65536 < 8192 { (at / 512) as u8 | 1 } else { 0 };
        Still((0..bytes).map(byte).collect())
    }
}

impl Disk for Still {
    fn size(&self) -> ByteCount {
        ByteCount(self.0.len() as u64)
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: ByteOffset) -> Result<(), DiskError> {
        buffer.copy_from_slice(&self.0[offset.0 as usize..][..buffer.len()]);
        Ok(())
    }

    fn next_data(&self, offset: ByteOffset) -> Result<Option<Extent>, DiskError> {
        let size = self.0.len() as u64;
        let start = if offset.0 % 65536 < 8192 { offset.0 } else { offset.0.next_multiple_of(65536) };
        let end = (start / 65536 * 65536 + 8192).min(size);
        Ok((start < size).then(|| Extent::new(ByteOffset(start), ByteCount(end - start)).unwrap()))
    }
}

const SIZE: usize = (5 << 20) + 1536;

fn overlay(limit: u64) -> (tempfile::TempDir, Overlay) {
    let dir = tempfile::tempdir().unwrap();
    let base = Arc::new(Still::new(SIZE));
    let space = Space { limit: ByteCount(limit), spare: Box::new(|| Ok(ByteCount::gib(1))) };
    let overlay = Overlay::create(&RealStorage, &dir.path().join("overlays"), "1", base, space).unwrap();
    (dir, overlay)
}

#[derive(Clone, Debug)]
enum Step {
    Write(u8),
    Zero(bool),
    Trim,
    Read,
}

fn steps() -> impl Strategy<Value = Vec<(Step, usize, usize)>> {
    let step = prop_oneof![
        4 => any::<u8>().prop_map(Step::Write),
        1 => any::<bool>().prop_map(Step::Zero),
        1 => Just(Step::Trim),
        2 => Just(Step::Read),
    ];
    // Near block edges more often than not.
    let offset = prop_oneof![0..SIZE, (0..SIZE / 4096).prop_map(|block| block * 4096)];
    let length = prop_oneof![1..9000_usize, Just(4096), Just(512), 1..SIZE];
    prop::collection::vec((step, offset, length), 1..30)
}

proptest! {
    /// Against a plain copy of the disk.
    #[test]
    fn an_overlay_is_a_copy(steps in steps()) {
        let (_dir, overlay) = overlay(u64::MAX);
        let mut copy = Still::new(SIZE).0;
        for (step, offset, length) in steps {
            let end = (offset + length).min(SIZE);
            let extent = Extent::new(ByteOffset(offset as u64), ByteCount((end - offset) as u64)).unwrap();
            match step {
                Step::Write(byte) => {
                    copy[offset..end].fill(byte);
                    overlay.write_at(&copy[offset..end], extent.offset()).unwrap();
                }
                Step::Zero(reserve) => {
                    copy[offset..end].fill(0);
                    overlay.zero(extent, reserve).unwrap();
                }
                Step::Trim => {
                    let first = offset.next_multiple_of(4096);
                    let last = if end == SIZE { end } else { end / 4096 * 4096 };
                    if first < last {
                        copy[first..last].fill(0);
                    }
                    overlay.trim(extent).unwrap();
                }
                Step::Read => {
                    let mut found = vec![1; end - offset];
                    overlay.read_at(&mut found, extent.offset()).unwrap();
                    prop_assert!(found == copy[offset..end]);
                }
            }
        }
        let mut found = vec![1; SIZE];
        overlay.read_at(&mut found, ByteOffset(0)).unwrap();
        prop_assert!(found == copy);
        // Outside of what is told as data there are only zeroes.
        let mut at = 0;
        while let Some(extent) = overlay.next_data(ByteOffset(at)).unwrap() {
            prop_assert!(extent.offset().0 >= at && extent.end().0 <= SIZE as u64);
            prop_assert!(copy[at as usize..extent.offset().0 as usize].iter().all(|byte| *byte == 0));
            at = extent.end().0;
        }
        prop_assert!(copy[at as usize..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn the_limit_is_kept_and_what_was_written_stays() {
    let (_dir, overlay) = overlay(64 * 1024);
    overlay.write_at(&[7; 65536], ByteOffset(4096)).unwrap();
    assert_eq!(overlay.held(), ByteCount::kib(64));
    let error = overlay.write_at(&[8; 1], ByteOffset(1 << 20)).unwrap_err();
    assert!(matches!(error, DiskError::NoSpace(_)), "{error}");
    // Held blocks can still be written, and space that is given back is there again.
    overlay.write_at(&[9; 512], ByteOffset(4096)).unwrap();
    overlay.trim(Extent::new(ByteOffset(8192), ByteCount::kib(4)).unwrap()).unwrap();
    overlay.write_at(&[8; 1], ByteOffset(1 << 20)).unwrap();
    let mut found = [0; 8192];
    overlay.read_at(&mut found, ByteOffset(4096)).unwrap();
    assert!(found[..512] == [9; 512] && found[512..4096] == [7; 3584] && found[4096..] == [0; 4096]);
}

/// Replication must not run out of space because a drill writes much.
#[test]
fn the_reserve_is_left_free() {
    let dir = tempfile::tempdir().unwrap();
    let left = Arc::new(AtomicU64::new(SPACE_CHECK_BYTES.0));
    let told = left.clone();
    let space =
        Space { limit: ByteCount(u64::MAX), spare: Box::new(move || Ok(ByteCount(told.load(SeqCst)))) };
    let base = Arc::new(Still::new(16 << 20));
    let overlay = Overlay::create(&RealStorage, dir.path(), "1", base, space).unwrap();
    overlay.write_at(&vec![1; SPACE_CHECK_BYTES.0 as usize], ByteOffset(0)).unwrap();
    left.store(0, SeqCst);
    let error = overlay.write_at(&[1; 4096], ByteOffset(8 << 20)).unwrap_err();
    assert!(error.to_string().contains("replication"), "{error}");
    let mut found = [1; 4096];
    overlay.read_at(&mut found, ByteOffset(8 << 20)).unwrap();
    assert!(found[..] == Still::new(16 << 20).0[8 << 20..][..4096]);
}

/// However the process ends, nothing is left.
#[test]
fn no_file_has_a_name() {
    let (dir, overlay) = overlay(u64::MAX);
    overlay.write_at(&[1; 4096], ByteOffset(0)).unwrap();
    let overlays = dir.path().join("overlays");
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0);
    std::fs::write(overlays.join("7.overlay"), "left by a crash").unwrap();
    std::fs::write(overlays.join("other"), "not ours").unwrap();
    assert_eq!(Overlay::sweep(&RealStorage, &overlays).unwrap(), 1);
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 1);
    assert_eq!(Overlay::sweep(&RealStorage, &dir.path().join("none")).unwrap(), 0);
}

/// Two first writes to different parts of one block, and a write of all of it: nobody's bytes are lost.
#[test]
fn first_writes_to_one_block_do_not_lose_each_other() {
    for round in 0..200 {
        let (_dir, overlay) = overlay(u64::MAX);
        std::thread::scope(|scope| {
            for part in 0..4_u64 {
                let overlay = &overlay;
                scope.spawn(move || {
                    let data = [part as u8 + 100; 1024];
                    overlay.write_at(&data, ByteOffset(4096 + part * 1024)).unwrap();
                });
            }
        });
        let mut found = [0; 4096];
        overlay.read_at(&mut found, ByteOffset(4096)).unwrap();
        for part in 0..4 {
            assert!(found[part * 1024..][..1024] == [part as u8 + 100; 1024], "round {round}, part {part}");
        }
    }
}
