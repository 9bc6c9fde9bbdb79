//! Telling from outside whether a filesystem is frozen, and making a freeze last.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use scratch::{LoopDisk, Mount};

/// A write that takes no longer is none that waits for a thaw.
const STILL_AFTER: Duration = Duration::from_secs(1);
/// Past it nothing is waited for any more; a generous bound on any budget used here.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes a block to a file and makes it durable, again and again. Must be dropped when the filesystem is not frozen.
pub struct Beat {
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Beat {
    /// Begins to write to a new file.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn start(path: &Path) -> anyhow::Result<Beat> {
        let file = File::create(path).context("make a file to write to")?;
        Ok(Beat::write(file))
    }

    fn write(file: File) -> Beat {
        let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ends) = (done.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                let number = count.load(Ordering::SeqCst);
                file.write_all_at(&number.to_le_bytes().repeat(64), 0)?;
                file.sync_data()?;
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        Beat { done, stop, thread: Some(thread) }
    }

    /// Waits until no write comes to its end any more.
    ///
    /// # Errors
    /// When writes go on.
    pub fn wait_frozen(&self) -> anyhow::Result<()> {
        let limit = Instant::now() + PATIENCE;
        let mut last = (self.done.load(Ordering::SeqCst), Instant::now());
        while last.1.elapsed() < STILL_AFTER {
            let done = self.done.load(Ordering::SeqCst);
            if done != last.0 {
                last = (done, Instant::now());
            }
            if Instant::now() > limit {
                bail!("writes go on: it is not frozen");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until writes come to their end again; gives how long that took.
    ///
    /// # Errors
    /// When none does for longer than any budget used here.
    pub fn wait_thawed(&self) -> anyhow::Result<Duration> {
        let (began, before) = (Instant::now(), self.done.load(Ordering::SeqCst));
        // The second write began after now.
        while self.done.load(Ordering::SeqCst) < before + 2 {
            if began.elapsed() > PATIENCE {
                bail!("no write ends: it is still frozen");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(began.elapsed())
    }

    /// Ends the writer.
    ///
    /// # Errors
    /// When a write failed.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.end().context("write while it may be frozen")
    }

    fn end(&mut self) -> std::io::Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        match self.thread.take() {
            Some(thread) => thread.join().expect("the writer does not panic"),
            None => Ok(()),
        }
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        // Its result was asked for, or there is another failure to tell.
        let _ = self.end();
    }
}

/// Of the memory under a [`StuckDisk`].
const MEMORY_BYTES: u64 = 1 << 20;

/// A disk of which, from a moment on, a part can neither be read nor written: an agent that follows granules only has one there that
/// stays dirty for ever, and a freeze that waits for it lasts its whole budget.
pub struct StuckDisk {
    disk: LoopDisk,
    file: PathBuf,
    bytes: u64,
    // Last: the others lie upon it.
    memory: Mount,
}

impl StuckDisk {
    /// Makes one that is as any other yet, below `dir`. `bytes` is its size, more than there is memory for.
    ///
    /// # Errors
    /// When there is no loop device to be had.
    pub fn make(dir: &Path, bytes: u64) -> anyhow::Result<StuckDisk> {
        let memory = Mount::memory(&dir.join("memory"), MEMORY_BYTES)?;
        let file = memory.point().join("raw.img");
        let disk = LoopDisk::create(&file, bytes)?;
        Ok(StuckDisk { disk, file, bytes, memory })
    }

    /// Its device.
    pub fn device(&self) -> &Path {
        self.disk.device()
    }

    /// Makes it stuck: there is no memory left, its second half is gone, and somebody tries to write there.
    ///
    /// # Errors
    /// When the write succeeds all the same.
    pub fn stick(&self) -> anyhow::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let filler = File::create(self.memory.point().join("filler"))?;
        let full = filler.write_all_at(&vec![1; 2 * MEMORY_BYTES as usize], 0);
        ensure!(full.is_err(), "there is memory left");
        File::options().write(true).open(&self.file)?.set_len(self.bytes / 2)?;
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        let device = File::options().write(true).custom_flags(flags).open(self.device())?;
        // Memory that O_DIRECT takes: somewhere in twice as much there is a page's beginning.
        let buffer = vec![7_u8; 8192];
        let start = buffer.as_ptr().align_offset(4096);
        let written = device.write_all_at(&buffer[start..start + 4096], self.bytes / 4 * 3);
        ensure!(written.is_err(), "the write succeeds");
        Ok(())
    }

    /// Lets it be read again.
    ///
    /// # Errors
    /// When its file cannot be extended.
    pub fn mend(&self) -> anyhow::Result<()> {
        File::options().write(true).open(&self.file)?.set_len(self.bytes).context("extend the disk's file")
    }
}
