//! The demo's source: a disk with a file system and a real writer, or an image file that rests between writes.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use block::ByteCount;
use scratch::lanes::{Lane, Writers};
use scratch::{FileSystem, LoopDisk, Mount};

/// Below the system's directory for temporary files; the process id tells whose it is.
const DIRECTORY_PREFIX: &str = "seawall-demo-";
const DISK_BYTES: u64 = 1 << 30;
const IMAGE_BYTES: u64 = 64 << 20;
/// Files that are there before replication begins and never change.
const FILES: u64 = 200;
const FILE_BYTES: usize = 1 << 20;
/// The lanes' record sizes: small and large, so that requests of one and of many pages are captured.
const RECORD_BYTES: [usize; 4] = [512, 4096, 16 * 1024, 64 * 1024];

/// What kind of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scenario {
    /// A loop device with ext4, captured by eBPF.
    Ebpf,
    /// An image file, scanned.
    Scan,
}

impl Scenario {
    /// As the agent's configuration says it.
    pub(super) fn source(self) -> &'static str {
        match self {
            Scenario::Ebpf => "ebpf",
            Scenario::Scan => "scan",
        }
    }
}

/// A directory that goes away again. What killed demos left is removed first.
pub(super) fn directory() -> anyhow::Result<tempfile::TempDir> {
    let base = std::env::temp_dir();
    for entry in fs::read_dir(&base).with_context(|| format!("look into {}", base.display()))?.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY_PREFIX)?.split('-').next());
        if let Some(pid) = pid
            && pid.parse::<u32>().is_ok()
            && !Path::new("/proc").join(pid).exists()
        {
            // Somebody else may remove it at the same time, or own it.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new()
        .prefix(&format!("{DIRECTORY_PREFIX}{}-", std::process::id()))
        .tempdir()
        .context("make a temporary directory; set TMPDIR to a place with 3 GiB")
}

/// Whether a disk can be made and captured here; if not, why.
pub(super) fn why_not_ebpf(dir: &Path) -> Option<String> {
    let try_it = || -> anyhow::Result<()> {
        let disk = LoopDisk::create(&dir.join("probe.img"), 1 << 20)?;
        seawall_agent::probe(disk.device())
    };
    try_it().err().map(|error| format!("{error:#}"))
}

/// The source and its writer's plan.
pub(super) struct Source {
    scenario: Scenario,
    image: PathBuf,
    lanes: Vec<Lane>,
    files: Vec<(PathBuf, blake3::Hash)>,
    /// Dropped in this order: unmount, then detach.
    mount: Option<Mount>,
    disk: Option<LoopDisk>,
}

impl Source {
    /// Makes it, with its first content.
    pub(super) fn make(dir: &Path, scenario: Scenario) -> anyhow::Result<Source> {
        let image = dir.join("source.img");
        if scenario == Scenario::Scan {
            File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).context("make the image file")?;
            let lanes = RECORD_BYTES
                .iter()
                .enumerate()
                .map(|(index, record_bytes)| Lane {
                    index,
                    path: image.clone(),
                    offset: index as u64 * (IMAGE_BYTES / 4),
                    slots: 200,
                    record_bytes: *record_bytes,
                    direct: false,
                })
                .collect();
            return Ok(Source { scenario, image, lanes, files: Vec::new(), mount: None, disk: None });
        }
        let disk = LoopDisk::create(&image, DISK_BYTES)?;
        FileSystem::Ext4.make(disk.device())?;
        let mount = Mount::new(disk.device(), &dir.join("mnt"), "discard")?;
        let mut files = Vec::new();
        for number in 0..FILES {
            let path = mount.point().join(format!("file-{number:03}"));
            let content = content(number);
            fs::write(&path, &content).with_context(|| format!("write {}", path.display()))?;
            files.push((PathBuf::from(path.file_name().unwrap_or_default()), blake3::hash(&content)));
        }
        // Replication begins with files that are on the disk.
        File::open(mount.point()).and_then(|dir| dir.sync_all()).context("sync the demo's files")?;
        rustix::fs::syncfs(File::open(mount.point())?).context("sync the demo's files")?;
        let lanes = RECORD_BYTES
            .iter()
            .enumerate()
            .map(|(index, record_bytes)| Lane {
                index,
                path: mount.point().join(format!("lane-{index}")),
                offset: 0,
                slots: 400,
                record_bytes: *record_bytes,
                direct: false,
            })
            .collect();
        Ok(Source { scenario, image, lanes, files, mount: Some(mount), disk: Some(disk) })
    }

    pub(super) fn description(&self) -> String {
        match &self.disk {
            Some(disk) => format!(
                "{}, {}, ext4, mounted, {} files of 1 MiB; captured by eBPF",
                disk.device().display(),
                self.size(),
                self.files.len()
            ),
            None => format!("an image file of {}, followed by checksums", self.size()),
        }
    }

    /// What a proof of this source's restored points says.
    pub(super) fn claims(&self) -> &'static str {
        match self.scenario {
            Scenario::Ebpf => "mounted, fsck clean, 200 files intact",
            Scenario::Scan => "read",
        }
    }

    pub(super) fn device(&self) -> &Path {
        self.disk.as_ref().map_or(&self.image, LoopDisk::device)
    }

    pub(super) fn size(&self) -> ByteCount {
        ByteCount(if self.disk.is_some() { DISK_BYTES } else { IMAGE_BYTES })
    }

    /// As the config server names it.
    pub(super) fn volume_name(&self) -> String {
        self.device().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(super) fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    pub(super) fn files(&self) -> &[(PathBuf, blake3::Hash)] {
        &self.files
    }

    /// Starts the writer. An image file that is scanned rests between bursts, or no pass would find it quiet.
    pub(super) fn write(&self) -> anyhow::Result<Busy> {
        let pause_us = 500;
        if self.scenario == Scenario::Ebpf {
            return Ok(Busy::Steady(Writers::start(&self.lanes, pause_us)?));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(std::sync::Mutex::new(Vec::new()));
        let lanes = self.lanes.clone();
        let thread = std::thread::spawn({
            let (stop, counts) = (stop.clone(), counts.clone());
            move || -> anyhow::Result<()> {
                let mut known = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    let writers = Writers::go_on(&lanes, pause_us, &known)?;
                    std::thread::sleep(Duration::from_millis(300));
                    known = writers.stop()?;
                    counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone_from(&known);
                    std::thread::sleep(Duration::from_millis(1500));
                }
                Ok(())
            }
        });
        Ok(Busy::Bursts { stop, counts, thread })
    }

    /// The disk dies while the writer writes.
    pub(super) fn destroy(&self, writers: Busy) -> anyhow::Result<()> {
        let mut image =
            fs::OpenOptions::new().write(true).open(&self.image).context("open the source's image")?;
        image.set_len(0).context("destroy the source")?;
        let mut noise = File::open("/dev/urandom").context("open /dev/urandom")?;
        let mut garbage = vec![0; 1 << 20];
        std::io::Read::read_exact(&mut noise, &mut garbage).context("read noise")?;
        image.write_all(&garbage).context("overwrite the source")?;
        image.write_all_at(&garbage, DISK_BYTES / 2).context("overwrite the source")?;
        image.flush()?;
        // The writers find their disk gone; that is the point.
        let _ = writers.stop();
        Ok(())
    }

    /// How a restored disk is looked at.
    pub(super) fn has_file_system(&self) -> bool {
        self.mount.is_some()
    }
}

/// Running writers.
pub(super) enum Busy {
    /// All the time.
    Steady(Writers),
    /// With rests.
    Bursts {
        stop: Arc<AtomicBool>,
        counts: Arc<std::sync::Mutex<Vec<u64>>>,
        thread: JoinHandle<anyhow::Result<()>>,
    },
}

impl Busy {
    /// Records of each lane that are durable.
    pub(super) fn counts(&self) -> Vec<u64> {
        match self {
            Busy::Steady(writers) => writers.counts(),
            Busy::Bursts { counts, .. } => {
                counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
            }
        }
    }

    fn stop(self) -> anyhow::Result<()> {
        match self {
            Busy::Steady(writers) => writers.stop().map(drop),
            Busy::Bursts { stop, thread, .. } => {
                stop.store(true, Ordering::SeqCst);
                let ended = thread.join();
                ensure!(ended.is_ok(), "the writer panicked");
                ended.unwrap_or(Ok(()))
            }
        }
    }
}

/// A file's content: text-like and random parts in turn, the same on every run.
fn content(number: u64) -> Vec<u8> {
    let mut state = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(FILE_BYTES);
    while bytes.len() < FILE_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let text = bytes.len() / 65536 % 4 != 3;
        let word = if text { state & 0x0f0f_0f0f_0f0f_0f0f | 0x6060_6060_6060_6060 } else { state };
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}
