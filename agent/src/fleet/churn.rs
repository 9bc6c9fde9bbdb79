//! How much is written to disks, protected or not: by the kernel's own count, over the last minutes.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use control::fleet::DiskInfo;

/// Over what the rate is taken, at most.
const WINDOW: Duration = Duration::from_secs(300);
/// In /sys/block/NAME/stat: sectors of 512 bytes that were written.
const SECTORS_WRITTEN: usize = 6;
const SECTOR_BYTES: u64 = 512;

/// Counts of the last minutes, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Churn {
    counted: HashMap<String, VecDeque<(Instant, u64)>>,
}

impl Churn {
    /// Counts, and tells each disk's rate once there are two counts of it.
    pub(super) fn count(&mut self, disks: &mut [DiskInfo], sys: &Path, now: Instant) {
        self.counted.retain(|device, _| disks.iter().any(|disk| disk.device == *device));
        for disk in disks {
            let Some(written) = written(sys, &disk.device) else {
                self.counted.remove(&disk.device);
                disk.written_bytes_per_s = None;
                continue;
            };
            let counts = self.counted.entry(disk.device.clone()).or_default();
            // Another disk of that name, which counts from the beginning.
            if counts.back().is_some_and(|(_, before)| written < *before) {
                counts.clear();
            }
            counts.push_back((now, written));
            while counts.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW) {
                counts.pop_front();
            }
            disk.written_bytes_per_s = counts.front().and_then(|(at, first)| {
                let time = now.saturating_duration_since(*at);
                (!time.is_zero()).then(|| ((written - first) as f64 / time.as_secs_f64()) as u64)
            });
        }
    }
}

/// Bytes written to a disk since the kernel knows it.
fn written(sys: &Path, device: &str) -> Option<u64> {
    let name = Path::new(device).file_name()?;
    let text = std::fs::read_to_string(sys.join(name).join("stat")).ok()?;
    text.split_whitespace().nth(SECTORS_WRITTEN)?.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As docs/admin-guide/iostats.rst of the kernel says: reads, merged, sectors, ms; writes, merged, sectors, ms; ...
    fn stat(sys: &Path, sectors: u64) {
        std::fs::create_dir_all(sys.join("vda")).unwrap();
        let text = format!("  100 0 800 5 40 2 {sectors} 9 0 12 14 0 0 0 0 3 1\n");
        std::fs::write(sys.join("vda/stat"), text).unwrap();
    }

    #[test]
    fn the_rate_is_of_the_last_minutes_and_begins_anew_with_another_disk() {
        let sys = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut disks = [DiskInfo {
            device: "/dev/vda".into(),
            known_by: String::new(),
            bytes: 1,
            written_bytes_per_s: None,
            uses: Vec::new(),
        }];
        let mut churn = Churn::default();
        let mut rate = |churn: &mut Churn, seconds, sectors| {
            stat(sys.path(), sectors);
            churn.count(&mut disks, sys.path(), at(seconds));
            disks[0].written_bytes_per_s
        };
        assert_eq!(rate(&mut churn, 0, 1000), None);
        assert_eq!(rate(&mut churn, 10, 1200), Some(200 * 512 / 10));
        assert_eq!(rate(&mut churn, 20, 1200), Some(200 * 512 / 20));
        // What was long ago does not count.
        assert_eq!(rate(&mut churn, 320, 1500), Some(300 * 512 / 300));
        assert_eq!(rate(&mut churn, 330, 7), None);
        assert_eq!(rate(&mut churn, 340, 27), Some(20 * 512 / 10));
        std::fs::remove_file(sys.path().join("vda/stat")).unwrap();
        churn.count(&mut disks, sys.path(), at(350));
        assert_eq!(disks[0].written_bytes_per_s, None);
    }
}
