//! Whether the disks are still the ones that are followed. A disk that was taken away may come back under its number, changed
//! elsewhere meanwhile; to the kernel side it would look as if nothing had happened. The disk's sequence number tells.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use capture::FoundDisk;

/// The disks of the group, by volume.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    watched: Vec<Option<Watched>>,
}

#[derive(Debug)]
struct Watched {
    /// Its directory in sysfs, by number.
    sys: PathBuf,
    sequence: Option<u64>,
    /// Once gone, a disk stays so: what came back was not watched meanwhile.
    gone: AtomicBool,
}

impl Presence {
    /// Watches these; `None` is a file.
    pub(super) fn of<'a>(disks: impl Iterator<Item = Option<&'a FoundDisk>>) -> Presence {
        let watch = |disk: &FoundDisk| {
            let number = fs::metadata(&disk.path).map_or(0, |metadata| metadata.rdev());
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            let sys = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
            Watched { sys, sequence: disk.sequence, gone: AtomicBool::new(false) }
        };
        Presence { watched: disks.map(|disk| disk.map(watch)).collect() }
    }

    /// Whether the volume's disk has gone, now or at any time before.
    pub(crate) fn gone(&self, volume: usize) -> bool {
        self.watched.get(volume).and_then(Option::as_ref).is_some_and(Watched::is_gone)
    }

    /// Whether any has.
    pub(crate) fn any_gone(&self) -> bool {
        (0..self.watched.len()).any(|volume| self.gone(volume))
    }
}

impl Watched {
    fn is_gone(&self) -> bool {
        if self.gone.load(Ordering::SeqCst) {
            return true;
        }
        let gone = match self.sequence {
            Some(sequence) => fs::read_to_string(self.sys.join("diskseq"))
                .map_or(true, |text| text.trim().parse() != Ok(sequence)),
            None => !self.sys.exists(),
        };
        if gone {
            self.gone.store(true, Ordering::SeqCst);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_came_back_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let sequence = dir.path().join("diskseq");
        fs::write(&sequence, "7\n").unwrap();
        let watched = Watched { sys: dir.path().to_owned(), sequence: Some(7), gone: AtomicBool::new(false) };
        let presence = Presence { watched: vec![None, Some(watched)] };
        assert!(!presence.any_gone());
        fs::write(&sequence, "8\n").unwrap();
        assert!(presence.gone(1) && !presence.gone(0) && presence.any_gone());
        fs::write(&sequence, "7\n").unwrap();
        assert!(presence.gone(1));
    }
}
