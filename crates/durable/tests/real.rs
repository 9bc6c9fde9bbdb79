//! The real file system, and that the simulation behaves as it does.

use std::io::{self, IoSlice};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use durable::{CrashStorage, OpenMode, RealStorage, RecordFile, Storage, StorageFile, replace};
use proptest::prelude::*;

fn whole(file: &dyn StorageFile) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn files_and_directories_are_for_their_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("a/b");
    RealStorage.create_dir_all(&inner).unwrap();
    RealStorage.create_dir_all(&inner).unwrap();
    let path = inner.join("file");
    RealStorage.open(&path, OpenMode::CreateNew).unwrap();
    assert_eq!(inner.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let again = RealStorage.open(&path, OpenMode::CreateNew).unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(RealStorage.list(&inner).unwrap(), ["file"]);
    assert!(RealStorage.open(&inner, OpenMode::Read).is_err(), "a directory is not a file");
    RealStorage.remove(&path).unwrap();
    assert!(!RealStorage.exists(&path).unwrap());
}

#[test]
fn many_slices_are_written_one_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let file = RealStorage.open(&dir.path().join("f"), OpenMode::CreateNew).unwrap();
    let pieces: Vec<Vec<u8>> = (0..5000usize).map(|index| vec![index as u8; index % 7]).collect();
    let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    file.write_all_vectored_at(&slices, 10).unwrap();
    file.sync_data().unwrap();
    assert_eq!(whole(&*file)[10..], pieces.concat());
    file.write_all_vectored_at(&[IoSlice::new(&[])], 0).unwrap();
}

#[test]
fn a_zeroed_range_gives_its_space_back_and_keeps_the_length() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let file = RealStorage.open(&path, OpenMode::CreateNew).unwrap();
    file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
    file.sync_data().unwrap();
    let before = path.metadata().unwrap().blocks();
    file.zero_range(64 * 1024, 10 << 20).unwrap();
    file.zero_range(1000, 24).unwrap();
    assert_eq!(file.len().unwrap(), 1 << 20);
    let bytes = whole(&*file);
    assert!(bytes[1000..1024].iter().chain(&bytes[64 * 1024..]).all(|byte| *byte == 0));
    assert!(bytes[..1000].iter().chain(&bytes[1024..64 * 1024]).all(|byte| *byte == 1));
    assert!(path.metadata().unwrap().blocks() < before);
    assert_eq!(file.next_data(0).unwrap(), Some((0, 64 * 1024)));
    assert_eq!(file.next_data(64 * 1024).unwrap(), None);
    assert_eq!(file.next_data(1 << 30).unwrap(), None);
}

#[test]
fn a_lock_is_for_one_handle() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let first = RealStorage.open(&path, OpenMode::CreateNew).unwrap();
    let second = RealStorage.open(&path, OpenMode::ReadWrite).unwrap();
    assert!(first.try_lock().unwrap());
    assert!(!second.try_lock().unwrap());
    drop(first);
    assert!(second.try_lock().unwrap());
}

#[test]
fn replaced_and_recorded_states_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    for content in [b"first".as_slice(), b"", b"third"] {
        replace(&RealStorage, &path, content).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    assert_eq!(RealStorage.list(dir.path()).unwrap(), ["state"]);
    let mut record = RecordFile::create(&RealStorage, &path, b"0").unwrap();
    for number in 1..=9 {
        record.write(number.to_string().as_bytes()).unwrap();
    }
    assert_eq!(RecordFile::open(&RealStorage, &path).unwrap().1, b"9");
}

#[test]
fn a_file_cannot_be_written_through_a_reading_handle() {
    let dir = tempfile::tempdir().unwrap();
    for storage in [&RealStorage as &dyn Storage, &CrashStorage::new()] {
        storage.create_dir_all(dir.path()).unwrap();
        let path = dir.path().join("f");
        storage.open(&path, OpenMode::CreateOrOpen).unwrap();
        assert!(storage.open(&path, OpenMode::Read).unwrap().write_all_at(b"x", 0).is_err());
        storage.sync_dir(dir.path()).unwrap();
    }
}

/// A loop device, detached when dropped.
struct Loop(String);

impl Loop {
    /// `None`, said aloud, where the machine does not let us make one.
    fn over(image: &Path) -> Option<Loop> {
        let made = std::process::Command::new("losetup").args(["--find", "--show"]).arg(image).output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
            }
            other => {
                eprintln!("skipped: no loop device can be made here ({other:?})");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_has_its_size_and_zeroes_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let Some(device) = Loop::over(&image) else { return };
    let file = RealStorage.open(Path::new(&device.0), OpenMode::ReadWrite).unwrap();
    assert_eq!(file.len().unwrap(), 1 << 20);
    file.allocate(0, 1 << 20).unwrap();
    file.zero_range(4096, 8192).unwrap();
    file.zero_range(100_000, 10).unwrap();
    file.write_all_at(&[2; 512], 8192).unwrap();
    file.sync_data().unwrap();
    let mut expected = vec![1; 1 << 20];
    expected[4096..12288].fill(0);
    expected[100_000..100_010].fill(0);
    expected[8192..8704].fill(2);
    assert!(whole(&*file) == expected);
    assert_eq!(file.next_data(0).unwrap(), Some((0, 1 << 20)), "a device does not know its holes");
    assert!(file.set_len(10).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    SetLen(u64),
    Allocate(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let offset = 0u64..20_000;
    let length = 1u64..9000;
    prop_oneof![
        (offset.clone(), proptest::collection::vec(any::<u8>(), 1..3000))
            .prop_map(|(at, data)| Step::Write(at, data)),
        (offset.clone(), length.clone()).prop_map(|(at, length)| Step::Zero(at, length)),
        offset.clone().prop_map(Step::SetLen),
        (offset, length).prop_map(|(at, length)| Step::Allocate(at, length)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// The simulation is only worth something when it reads as the real thing does.
    #[test]
    fn the_simulation_reads_like_the_file_system(steps in proptest::collection::vec(step(), 1..30)) {
        let dir = tempfile::tempdir().unwrap();
        let simulated = CrashStorage::new();
        let real = RealStorage.open(&dir.path().join("f"), OpenMode::CreateNew).unwrap();
        let model = simulated.open(Path::new("/f"), OpenMode::CreateNew).unwrap();
        for step in steps {
            for file in [&real, &model] {
                match &step {
                    Step::Write(at, data) => file.write_all_at(data, *at).unwrap(),
                    Step::Zero(at, length) => file.zero_range(*at, *length).unwrap(),
                    Step::SetLen(length) => file.set_len(*length).unwrap(),
                    Step::Allocate(at, length) => file.allocate(*at, *length).unwrap(),
                }
            }
            prop_assert_eq!(whole(&*real), whole(&*model));
        }
    }
}
