//! A disk that applications write, followed by the whole system, and what must hold of its points whatever happens.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use scratch::lanes::{Lane, Writers, check};
use scratch::{LoopDisk, run};

use crate::chance::Chance;
use crate::system::{Part, System};

const MIB: u64 = 1 << 20;
/// Where [`Followed::flood`] writes, in MiB.
const FLOODED: (u64, u64) = (12, 38);

/// A disk with writers on it, followed by the whole system.
pub struct Followed {
    _dir: tempfile::TempDir,
    /// The disk.
    pub disk: LoopDisk,
    /// What follows it.
    pub system: System,
    /// Where the writers write.
    pub lanes: [Lane; 2],
    counts: Vec<u64>,
    /// The newest point that was seen, and what was in it.
    seen: (u64, u64),
}

impl Followed {
    /// Writes so many bytes that cannot be compressed, as fast as the disk takes them, beside the writers' places.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn flood(&self, bytes: u64, chance: &mut Chance) -> anyhow::Result<()> {
        let disk = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(rustix::fs::OFlags::SYNC.bits() as i32)
            .open(self.disk.device())?;
        let mut block = vec![0; MIB as usize];
        for number in 0..bytes.div_ceil(MIB) {
            block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&chance.number().to_le_bytes()));
            disk.write_all_at(&block, (FLOODED.0 + number % (FLOODED.1 - FLOODED.0)) * MIB)?;
        }
        Ok(())
    }

    /// Everything runs, and there is a point.
    ///
    /// # Errors
    /// When a part does not start, or there is no point.
    pub fn start() -> anyhow::Result<Followed> {
        Followed::start_as(|_| Ok(()))
    }

    /// As [`Followed::start`], with a configuration that was changed before.
    ///
    /// # Errors
    /// As there.
    pub fn start_as(change: impl FnOnce(&System) -> anyhow::Result<()>) -> anyhow::Result<Followed> {
        let dir = tempfile::tempdir()?;
        let disk = LoopDisk::create(&dir.path().join("disk.img"), 64 * MIB)?;
        let mut system = System::init(&[disk.device()], 100)?;
        system.edit(Part::Agent, |text| text.replace("source = \"auto\"", "source = \"ebpf\""))?;
        change(&system)?;
        let lane = |index: usize, place: u64| Lane {
            index,
            path: disk.device().to_owned(),
            offset: place * MIB,
            slots: 64,
            record_bytes: [4096, 20 * 1024][index],
            direct: true,
        };
        let lanes = [lane(0, 8), lane(1, 40)];
        system.start_all()?;
        system.wait_for_points("a first point", |points| !points.is_empty())?;
        let counts = vec![0; lanes.len()];
        Ok(Followed { _dir: dir, disk, system, lanes, counts, seen: (0, 0) })
    }

    /// While applications write, something is done to the system.
    ///
    /// # Errors
    /// When writers or deed fail.
    pub fn while_written(
        &mut self,
        deed: impl FnOnce(&mut System) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let writers = match self.counts.iter().sum::<u64>() {
            0 => Writers::start(&self.lanes, 500)?,
            _ => Writers::go_on(&self.lanes, 500, &self.counts)?,
        };
        let done = deed(&mut self.system);
        self.counts = writers.stop()?;
        done
    }

    /// There is a point from now on without anyone's help; it holds all that was written, and every point offered holds.
    ///
    /// # Errors
    /// When it does not.
    pub fn holds(&mut self) -> anyhow::Result<()> {
        let newest = self.system.wait_for_now()?;
        self.holds_at(newest)
    }

    /// As [`Followed::holds`], with a point that is known to be from now on.
    ///
    /// # Errors
    /// As there.
    pub fn holds_at(&mut self, newest: u64) -> anyhow::Result<()> {
        let out = self.system.dir().join("restored");
        let name = self.disk.device().file_name().context("a name")?.to_string_lossy().into_owned();
        self.system.restore(&name, newest, &out)?;
        let device = self.disk.device().to_str().context("UTF-8")?;
        run("blockdev", &["--flushbufs", device])?;
        run("cmp", &[device, out.to_str().context("UTF-8")?]).context("the newest point against the disk")?;
        let points = self.system.points();
        ensure!(points.windows(2).all(|pair| pair[0] < pair[1]), "{points:?}");
        // Some of those in between, always the last that was seen before.
        let between: Vec<u64> = points.iter().copied().filter(|point| *point > self.seen.0).collect();
        let step = (between.len() / 3).max(1);
        let mut records = self.seen.1;
        for point in between.iter().step_by(step) {
            self.system.restore(&name, *point, &out)?;
            let found: u64 = check(&self.lanes, |_| out.clone())?.iter().sum();
            ensure!(found >= records, "point {point} goes back: {found} records after {records}");
            records = found;
        }
        if points.contains(&self.seen.0) {
            self.system.restore(&name, self.seen.0, &out)?;
            let found: u64 = check(&self.lanes, |_| out.clone())?.iter().sum();
            ensure!(found == self.seen.1, "point {} has changed", self.seen.0);
        }
        self.system.restore(&name, newest, &out)?;
        self.seen = (newest, check(&self.lanes, |_| out.clone())?.iter().sum());
        Ok(())
    }
}

/// A path as text.
///
/// # Errors
/// When it is no text.
pub fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("test paths are UTF-8")
}

/// Waits until something holds.
///
/// # Errors
/// When it does not within 90 s; the last error, if there was one.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let limit = std::time::Instant::now() + Duration::from_secs(90);
    let mut last = None;
    while std::time::Instant::now() < limit {
        match holds() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => last = Some(error),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!("it does not happen"))).context(what.to_owned())
}
