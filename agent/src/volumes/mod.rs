//! Which disks the configured volumes are. A disk that was protected once is known by its marks: when the kernel has numbered
//! the disks anew it is found again, and a disk that has merely its name is refused.

mod lock;
mod presence;
mod record;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use record::fuzzing;

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use block::{ByteCount, VolumeId};
use capture::{DeviceName, Disks, FoundDisk, Resolved, Sameness};

use crate::config::{AgentConfig, SourceChoice, VolumeConfig};
pub(crate) use presence::Presence;
use record::{Record, RecordedDisk};

/// Where agents tell each other which disks they protect.
const RUN_DIR: &str = "/run/seawall";

/// A disk, or a file for `scan`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) id: VolumeId,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl Volume {
    /// How large its disk is now; `None` when that cannot be told.
    pub(crate) fn size(&self) -> Option<ByteCount> {
        let number = fs::metadata(&self.path).ok().filter(|data| data.file_type().is_block_device())?.rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let sectors = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).ok()?;
        Some(ByteCount(sectors.trim().parse::<u64>().ok()? * block::SECTOR_BYTES))
    }
}

/// The volumes of the group.
#[derive(Debug)]
pub(crate) struct Volumes {
    pub(crate) list: Vec<Volume>,
    /// How names became disks, for people.
    pub(crate) notes: Vec<String>,
    /// No disk of this configuration was protected before.
    pub(crate) are_new: bool,
    /// Whether they are still there.
    pub(crate) presence: Arc<Presence>,
    /// Held as long as the disks are protected.
    locks: Vec<File>,
}

impl Volumes {
    /// Another agent may take the disks.
    pub(crate) fn release(&mut self) {
        self.locks.clear();
    }
}

/// Finds the disks, takes them for this agent alone, and remembers them.
pub(crate) fn settle(config: &AgentConfig) -> anyhow::Result<Volumes> {
    settle_in(config, &Disks::default(), Path::new(RUN_DIR))
}

/// Whether every disk of the group is there to be opened.
pub(crate) fn all_there(config: &AgentConfig) -> bool {
    Record::load(&config.agent.disks_file)
        .and_then(|record| find(config, &Disks::default(), &record))
        .is_ok_and(|(list, _)| list.iter().all(|settled| settled.volume.size() != Some(ByteCount::ZERO)))
}

/// Which disks the volumes are, with notes for people.
fn find(config: &AgentConfig, disks: &Disks, record: &Record) -> anyhow::Result<(Vec<Settled>, Vec<String>)> {
    let mut settling = Settling { config, disks, record, list: Vec::new(), notes: Vec::new() };
    for volume in &config.volume {
        settling.add(volume)?;
    }
    refuse_twice(&settling.list)?;
    Ok((settling.list, settling.notes))
}

fn settle_in(config: &AgentConfig, disks: &Disks, run: &Path) -> anyhow::Result<Volumes> {
    let file = &config.agent.disks_file;
    let record = Record::load(file)?;
    let (list, mut notes) = find(config, disks, &record)?;
    let found: Vec<&Settled> = list.iter().filter(|settled| settled.disk.is_some()).collect();
    let mut locks = Vec::new();
    for disk in found.iter().filter_map(|settled| settled.disk.as_ref()) {
        match lock::take(run, disk, &config.agent.group)? {
            Ok(lock) => locks.push(lock),
            Err(why) => notes.push(format!("{} is not kept from other agents: {why}", disk.path.display())),
        }
    }
    let now = Record { disks: found.iter().filter_map(|settled| settled.recorded()).collect() };
    if now != record
        && let Err(error) = now.save(file)
    {
        notes.push(format!("which disks these are is not remembered: {error:#}"));
    }
    let are_new = record.disks.is_empty() && !found.is_empty();
    let presence = Arc::new(Presence::of(list.iter().map(|settled| settled.disk.as_ref())));
    let list = list.into_iter().map(|settled| settled.volume).collect();
    Ok(Volumes { list, notes, are_new, presence, locks })
}

/// A volume, and the disk that it is, unless it is a file.
struct Settled {
    configured: String,
    volume: Volume,
    disk: Option<FoundDisk>,
}

impl Settled {
    fn recorded(&self) -> Option<RecordedDisk> {
        let disk = self.disk.as_ref()?;
        Some(RecordedDisk {
            configured: self.configured.clone(),
            volume: self.volume.name.clone(),
            path: disk.path.display().to_string(),
            identity: disk.identity.clone(),
        })
    }
}

struct Settling<'a> {
    config: &'a AgentConfig,
    disks: &'a Disks,
    record: &'a Record,
    list: Vec<Settled>,
    notes: Vec<String>,
}

impl Settling<'_> {
    fn add(&mut self, volume: &VolumeConfig) -> anyhow::Result<()> {
        let known: Vec<&RecordedDisk> =
            self.record.disks.iter().filter(|disk| disk.configured == volume.name).collect();
        if let DeviceName::Path(path) = &volume.device {
            let kind = fs::metadata(path).map(|metadata| metadata.file_type());
            let disk = kind.as_ref().is_ok_and(FileTypeExt::is_block_device);
            // What is scanned is taken as it is named. A name that is gone may be a disk that has another one now.
            if self.config.agent.source == SourceChoice::Scan || !disk && (kind.is_ok() || known.is_empty()) {
                self.push(volume, volume.name.clone(), path.clone(), None);
                return Ok(());
            }
        }
        let resolved = self.disks.resolve(&volume.device);
        if known.is_empty() {
            return self.take_new(volume, resolved?);
        }
        match (resolved, known.as_slice()) {
            (Ok(resolved), known) if resolved.stacked || known.len() > 1 => {
                self.take_stack(volume, resolved, known);
                Ok(())
            }
            (resolved, known) => self.take_again(volume, resolved, known[0]),
        }
    }

    fn push(&mut self, volume: &VolumeConfig, name: String, path: PathBuf, disk: Option<FoundDisk>) {
        let volume_of = Volume { id: self.config.volume_id(&name), name, path };
        self.list.push(Settled { configured: volume.name.clone(), volume: volume_of, disk });
    }

    fn push_disk(&mut self, volume: &VolumeConfig, name: String, disk: FoundDisk) {
        if disk.identity.is_empty() {
            self.notes.push(format!(
                "{} has no serial number, WWN, or UUID: if the kernel numbers the disks anew, it cannot be told",
                disk.path.display()
            ));
        }
        self.push(volume, name, disk.path.clone(), Some(disk));
    }

    /// Protected for the first time: the first disk has the volume's name, the next are numbered from 2.
    fn take_new(&mut self, volume: &VolumeConfig, resolved: Resolved) -> anyhow::Result<()> {
        self.notes.extend(resolved.note);
        for (index, disk) in resolved.disks.into_iter().enumerate() {
            self.push_disk(volume, numbered(&volume.name, index + 1), disk);
        }
        Ok(())
    }

    /// What a logical volume or an array is made of may change: disks that were there keep their names.
    fn take_stack(&mut self, volume: &VolumeConfig, resolved: Resolved, known: &[&RecordedDisk]) {
        self.notes.extend(resolved.note);
        let mut taken: Vec<String> = known.iter().map(|disk| disk.volume.clone()).collect();
        for disk in resolved.disks {
            let before = known.iter().find(|known| known.is_now(&disk));
            let name = before.map_or_else(
                || {
                    let mut names = (1..).map(|number| numbered(&volume.name, number));
                    names.find(|name| !taken.contains(name)).expect("there are more numbers than disks")
                },
                |before| before.volume.clone(),
            );
            if before.is_none() {
                self.notes.push(format!("{} is new below {}", disk.path.display(), volume.device));
                taken.push(name.clone());
            }
            self.push_disk(volume, name, disk);
        }
    }

    /// A single disk that was protected before: it, and no other.
    fn take_again(
        &mut self,
        volume: &VolumeConfig,
        resolved: anyhow::Result<Resolved, capture::CaptureError>,
        known: &RecordedDisk,
    ) -> anyhow::Result<()> {
        let named = resolved.as_ref().ok().and_then(|resolved| resolved.disks.first().cloned());
        if let Some(disk) = named.clone().filter(|disk| known.is_now(disk)) {
            self.notes.extend(resolved.ok().and_then(|resolved| resolved.note));
            self.push_disk(volume, known.volume.clone(), disk);
            return Ok(());
        }
        let mut again = self.disks.find(&known.identity)?;
        if let (Some(disk), true) = (again.pop(), again.is_empty()) {
            self.notes.push(format!(
                "the disk of volume {:?}, {} before ({}), is now {}",
                volume.name,
                known.path,
                known.identity,
                disk.path.display()
            ));
            self.push_disk(volume, known.volume.clone(), disk);
            return Ok(());
        }
        let file = self.config.agent.disks_file.display();
        let what_to_do = format!(
            "Attach that disk; or, to protect another one from the beginning, remove {file}, which remembers it"
        );
        match named {
            Some(disk) => bail!(
                "protect {}: it is no longer the disk that was protected: that was {} ({}), now it is {} ({}). \
                 {what_to_do}",
                volume.device,
                known.path,
                known.identity,
                disk.path.display(),
                disk.identity
            ),
            None => {
                let error = resolved.err().context("a name that resolves means a disk")?;
                Err(error).with_context(|| {
                    format!("find the disk that was {} ({}). {what_to_do}", known.path, known.identity)
                })
            }
        }
    }
}

impl RecordedDisk {
    /// By its marks; without any, by its path.
    fn is_now(&self, disk: &FoundDisk) -> bool {
        match self.identity.sameness(&disk.identity) {
            Sameness::Same => true,
            Sameness::Different => false,
            Sameness::Unknown => self.identity.is_empty() && Path::new(&self.path) == disk.path,
        }
    }
}

/// data, data.2, data.3
fn numbered(name: &str, number: usize) -> String {
    if number == 1 { name.to_owned() } else { format!("{name}.{number}") }
}

fn refuse_twice(list: &[Settled]) -> anyhow::Result<()> {
    for (index, settled) in list.iter().enumerate() {
        let real = |settled: &Settled| fs::canonicalize(&settled.volume.path).ok();
        let same = |other: &&Settled| {
            other.volume.path == settled.volume.path
                || real(other).is_some_and(|path| Some(path) == real(settled))
        };
        if let Some(other) = list[..index].iter().find(same) {
            bail!(
                "protect volumes {:?} and {:?}: both are on {}. Name it once",
                other.configured,
                settled.configured,
                settled.volume.path.display()
            );
        }
        if let Some(other) = list[..index].iter().find(|other| other.volume.name == settled.volume.name) {
            bail!(
                "protect {}: its name {:?} is already taken by {}",
                settled.volume.path.display(),
                other.volume.name,
                other.volume.path.display()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
