//! Writers whose records prove in which order they reached the disk, and the oracle that checks a restored disk against them.
//!
//! Each lane is a writer that writes record after record, each only after the one before is durable. A record carries, beside
//! its own number, how many records of *every* lane were durable before it was issued. In any state that a power cut could
//! have left, the last record of a lane is therefore preceded by all of its own, and by all of the others that it names.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, bail, ensure};
use rustix::fs::OFlags;

const MAGIC: u64 = 0x5ea1_1a7e_5ea1_1a7e;
/// Lanes of one test at most: their counts must fit into a record's first 512 bytes with magic, lane, number, checksum.
pub const LANES_MAX: usize = 32;
const ALIGNMENT: usize = 4096;
const HEADER_BYTES: usize = 8 * 4 + 8 * LANES_MAX;

/// Where a lane lives.
#[derive(Clone, Debug)]
pub struct Lane {
    /// Its number, below [`LANES_MAX`].
    pub index: usize,
    /// A device, or a file on a mounted file system.
    pub path: PathBuf,
    /// Where its slots begin.
    pub offset: u64,
    /// How many; record n goes to slot n modulo this.
    pub slots: u64,
    /// Bytes of a record: a multiple of 512, at least 512.
    pub record_bytes: usize,
    /// Write with O_DIRECT (a device), or through the page cache with fdatasync (a file).
    pub direct: bool,
}

fn fill(buffer: &mut [u8], lane: usize, number: u64, known: &[u64]) {
    let mut state = (number << 8 | lane as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // Half of each record is random and half is text-like, so that compression has work to do.
    for (index, word) in buffer.chunks_exact_mut(8).enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value =
            if index % 2 == 0 { state } else { state & 0x0707_0707_0707_0707 | 0x6060_6060_6060_6060 };
        word.copy_from_slice(&value.to_le_bytes());
    }
    buffer[..HEADER_BYTES].fill(0);
    buffer[0..8].copy_from_slice(&MAGIC.to_le_bytes());
    buffer[8..16].copy_from_slice(&(lane as u64).to_le_bytes());
    buffer[16..24].copy_from_slice(&number.to_le_bytes());
    for (index, count) in known.iter().enumerate() {
        buffer[32 + index * 8..40 + index * 8].copy_from_slice(&count.to_le_bytes());
    }
    let sum = blake3::hash(buffer);
    buffer[24..32].copy_from_slice(&sum.as_bytes()[..8]);
}

struct Record {
    number: u64,
    known: Vec<u64>,
}

/// The record in these bytes, if they are one of this lane, whole.
fn parse(buffer: &mut [u8], lane: usize) -> Option<Record> {
    let word = |buffer: &[u8], at: usize| u64::from_le_bytes(buffer[at..at + 8].try_into().expect("8 bytes"));
    if word(buffer, 0) != MAGIC || word(buffer, 8) != lane as u64 {
        return None;
    }
    let sum = word(buffer, 24);
    buffer[24..32].fill(0);
    if blake3::hash(buffer).as_bytes()[..8] != sum.to_le_bytes() {
        return None;
    }
    let known = (0..LANES_MAX).map(|index| word(buffer, 32 + index * 8)).collect();
    Some(Record { number: word(buffer, 16), known })
}

/// Running writers.
pub struct Writers {
    stop: Arc<AtomicBool>,
    written: Arc<Vec<AtomicU64>>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Writers {
    /// Starts a thread for each lane. `pause_us` is waited between records.
    ///
    /// # Errors
    /// When a lane's file cannot be opened or made.
    pub fn start(lanes: &[Lane], pause_us: u64) -> anyhow::Result<Writers> {
        Writers::go_on(lanes, pause_us, &[])
    }

    /// As [`Writers::start`], after the records that [`Writers::stop`] counted.
    ///
    /// # Errors
    /// When a lane's file cannot be opened or made.
    pub fn go_on(lanes: &[Lane], pause_us: u64, counts: &[u64]) -> anyhow::Result<Writers> {
        let stop = Arc::new(AtomicBool::new(false));
        let before = |lane: usize| counts.get(lane).copied().unwrap_or(0);
        let written: Arc<Vec<AtomicU64>> =
            Arc::new((0..LANES_MAX).map(|lane| AtomicU64::new(before(lane))).collect());
        let threads = lanes
            .iter()
            .map(|lane| {
                ensure!(lane.index < LANES_MAX && lane.record_bytes >= 512 && lane.record_bytes % 512 == 0);
                let mut options = OpenOptions::new();
                options.write(true).create(!lane.path.starts_with("/dev"));
                if lane.direct {
                    let flags = OFlags::DIRECT | OFlags::DSYNC;
                    options.custom_flags(flags.bits().cast_signed());
                }
                let file =
                    options.open(&lane.path).with_context(|| format!("open {}", lane.path.display()))?;
                let (lane, stop, written) = (lane.clone(), stop.clone(), written.clone());
                Ok(std::thread::spawn(move || write_lane(&lane, &file, &stop, &written, pause_us)))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Writers { stop, written, threads })
    }

    /// Records that are durable, over all lanes.
    pub fn written(&self) -> u64 {
        self.written.iter().map(|count| count.load(Ordering::SeqCst)).sum()
    }

    /// Records of each lane that are durable.
    pub fn counts(&self) -> Vec<u64> {
        self.written.iter().map(|count| count.load(Ordering::SeqCst)).collect()
    }

    /// Stops the writers and gives how many records each lane has.
    ///
    /// # Errors
    /// When a writer failed.
    pub fn stop(mut self) -> anyhow::Result<Vec<u64>> {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??;
        }
        Ok(self.counts())
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn write_lane(
    lane: &Lane,
    file: &File,
    stop: &AtomicBool,
    written: &[AtomicU64],
    pause_us: u64,
) -> anyhow::Result<()> {
    // O_DIRECT wants an aligned buffer: the aligned part of a longer one is.
    let mut memory = vec![0; lane.record_bytes + ALIGNMENT];
    let aligned = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut memory[aligned..aligned + lane.record_bytes];
    let mut number = written[lane.index].load(Ordering::SeqCst);
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let known: Vec<u64> = written.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        fill(buffer, lane.index, number, &known);
        let at = lane.offset + (number % lane.slots) * lane.record_bytes as u64;
        file.write_all_at(buffer, at)
            .with_context(|| format!("write record {number} of lane {}", lane.index))?;
        if !lane.direct {
            file.sync_data().context("sync a lane's file")?;
        }
        written[lane.index].store(number, Ordering::SeqCst);
        if pause_us > 0 {
            std::thread::sleep(std::time::Duration::from_micros(pause_us));
        }
    }
    Ok(())
}

/// Checks a restored state: `place` says where a lane's file or device is now. Gives the last record of each lane.
///
/// # Errors
/// When the state is none that a power cut could have left; the error names the lanes and records.
pub fn check(lanes: &[Lane], place: impl Fn(&Lane) -> PathBuf) -> anyhow::Result<Vec<u64>> {
    let mut last = vec![0; LANES_MAX];
    let mut known = vec![Vec::new(); LANES_MAX];
    for lane in lanes {
        let path = place(lane);
        let (number, names) =
            check_lane(lane, &path).with_context(|| format!("lane {} in {}", lane.index, path.display()))?;
        last[lane.index] = number;
        known[lane.index] = names;
    }
    for lane in lanes {
        for other in lanes {
            let named = known[lane.index].get(other.index).copied().unwrap_or(0);
            if named > last[other.index] {
                bail!(
                    "record {} of lane {} was written after record {named} of lane {}, which has only {}",
                    last[lane.index],
                    lane.index,
                    other.index,
                    last[other.index]
                );
            }
        }
    }
    Ok(last)
}

fn check_lane(lane: &Lane, path: &Path) -> anyhow::Result<(u64, Vec<u64>)> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        // Not made yet at this point in time.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((0, Vec::new())),
        Err(error) => return Err(error).context("open"),
    };
    // A device has no length in its metadata.
    let length = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).context("find the length")?;
    let mut slots = Vec::new();
    let mut buffer = vec![0; lane.record_bytes];
    for slot in 0..lane.slots {
        let at = lane.offset + slot * lane.record_bytes as u64;
        let record = if at + lane.record_bytes as u64 <= length {
            file.read_exact_at(&mut buffer, at).with_context(|| format!("read slot {slot}"))?;
            parse(&mut buffer, lane.index)
        } else {
            None
        };
        slots.push(record);
    }
    let Some(newest) = slots.iter().flatten().max_by_key(|record| record.number) else {
        return Ok((0, Vec::new()));
    };
    let (last, known) = (newest.number, newest.known.clone());
    for (slot, record) in slots.iter().enumerate() {
        let slot = slot as u64;
        let next = last + 1;
        // The record after the last may have been in flight: its slot may hold anything.
        if next % lane.slots == slot {
            continue;
        }
        let back = (last + lane.slots - slot) % lane.slots;
        let Some(expected) = last.checked_sub(back).filter(|expected| *expected > 0) else {
            continue; // nothing was ever written to this slot
        };
        match record {
            Some(record) if record.number == expected => {}
            Some(record) => bail!(
                "slot {slot} holds record {} but the lane goes to {last}, so it must hold {expected}",
                record.number
            ),
            None => {
                bail!("slot {slot} holds no whole record, but the lane goes to {last}: {expected} is missing")
            }
        }
    }
    Ok((last, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(dir: &Path) -> Vec<Lane> {
        (0..2)
            .map(|index| Lane {
                index,
                path: dir.join(format!("lane{index}")),
                offset: 4096,
                slots: 7,
                record_bytes: 1024,
                direct: false,
            })
            .collect()
    }

    fn write(lane: &Lane, number: u64, known: &[u64]) {
        let mut buffer = vec![0; lane.record_bytes];
        fill(&mut buffer, lane.index, number, known);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&lane.path).unwrap();
        file.write_all_at(&buffer, lane.offset + number % lane.slots * lane.record_bytes as u64).unwrap();
    }

    #[test]
    fn the_oracle_takes_prefixes_only() {
        let dir = tempfile::tempdir().unwrap();
        let lanes = lanes(dir.path());
        let check = || check(&lanes, |lane| lane.path.clone());
        assert_eq!(check().unwrap()[..2], [0, 0]);
        for number in 1..=20 {
            write(&lanes[0], number, &[number - 1, number - 1]);
            assert_eq!(check().unwrap()[0], number);
            write(&lanes[1], number, &[number, number - 1]);
            assert_eq!(check().unwrap()[1], number);
        }
        // A record ahead of what it depends on.
        write(&lanes[1], 21, &[21, 20]);
        assert!(check().unwrap_err().to_string().contains("which has only 20"));
        write(&lanes[0], 21, &[20, 20]);
        check().unwrap();
        // A hole: 23 without 22 (which is more than one in flight).
        write(&lanes[0], 23, &[22, 21]);
        assert!(format!("{:#}", check().unwrap_err()).contains("must hold 22"));
        // A record that was in flight may be torn.
        write(&lanes[0], 22, &[21, 21]);
        check().unwrap();
        let file = OpenOptions::new().write(true).open(&lanes[0].path).unwrap();
        file.write_all_at(&[9; 512], lanes[0].offset + 24 % 7 * 1024).unwrap();
        check().unwrap();
        // One that was durable may not.
        let slot_of_22 = lanes[0].offset + (22 % lanes[0].slots) * 1024;
        file.write_all_at(&[9; 512], slot_of_22 + 512).unwrap();
        assert!(format!("{:#}", check().unwrap_err()).contains("22 is missing"));
    }

    #[test]
    fn writers_satisfy_their_own_oracle() {
        let dir = tempfile::tempdir().unwrap();
        let lanes = lanes(dir.path());
        let writers = Writers::start(&lanes, 0).unwrap();
        while writers.written() < 50 {
            std::thread::yield_now();
        }
        let counts = writers.stop().unwrap();
        assert_eq!(check(&lanes, |lane| lane.path.clone()).unwrap(), counts);
    }
}
