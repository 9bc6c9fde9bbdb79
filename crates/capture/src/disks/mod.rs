//! Which disks a name means: a path, or something that stays when the kernel numbers its disks anew. Logical volumes, arrays
//! and partitions mean the whole disks below them.
//!
//! Reads sysfs, and the contents' own marks with blkid(8) of util-linux: it knows every format, and every Debian has it.

mod identity;
mod name;
mod probe;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::CaptureError;
pub use identity::{Identity, Sameness};
pub use name::{DeviceName, DeviceNameError};
use probe::{Prober, Tags, blkid};

/// How deep devices may be stacked; deeper is refused, so that a loop in sysfs ends.
const STACK_MAX: usize = 32;

/// The machine's disks.
pub struct Disks {
    /// /sys, or a tree that looks like it.
    sys: PathBuf,
    prober: Prober,
}

/// A whole disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDisk {
    /// /dev/vda.
    pub path: PathBuf,
    /// What it is known by.
    pub identity: Identity,
    /// Tells it from every disk that had or will have its number since the machine started; `None` before Linux 5.15.
    pub sequence: Option<u64>,
}

/// What a name means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The disks, by kernel name.
    pub disks: Vec<FoundDisk>,
    /// Whether they are below a logical volume or an array, so that there may be other ones tomorrow.
    pub stacked: bool,
    /// How the name became other disks than it says, in words.
    pub note: Option<String>,
}

impl Default for Disks {
    fn default() -> Disks {
        Disks { sys: "/sys".into(), prober: Box::new(blkid) }
    }
}

impl Disks {
    /// What a configured name means now.
    ///
    /// # Errors
    /// When nothing has the name, or several disks that are not one have it; the error names them.
    pub fn resolve(&self, name: &DeviceName) -> Result<Resolved, CaptureError> {
        let refuse = |reason| CaptureError::NotCapturable { path: name.to_string().into(), reason };
        match name {
            DeviceName::Path(path) => {
                let device = self.kernel_name(path)?;
                self.below(&path.display().to_string(), &device)
            }
            DeviceName::FsUuid(uuid) => {
                let devices = self.carriers(uuid).map_err(refuse)?;
                let mut all = Resolved { disks: Vec::new(), stacked: devices.len() > 1, note: None };
                for device in devices {
                    let part = self.below(&name.to_string(), &device)?;
                    all.stacked |= part.stacked;
                    all.note = all.note.or(part.note);
                    all.disks.extend(part.disks);
                }
                all.disks.sort_by(|a, b| a.path.cmp(&b.path));
                all.disks.dedup();
                Ok(all)
            }
            _ => {
                let mut found: Vec<FoundDisk> =
                    self.all()?.into_iter().filter(|disk| name.is_of(&disk.identity)).collect();
                match (found.pop(), found.as_slice()) {
                    (None, _) => Err(refuse("no disk of this machine has it".into())),
                    (Some(disk), []) => Ok(Resolved { disks: vec![disk], stacked: false, note: None }),
                    (Some(disk), others) => Err(refuse(format!(
                        "several disks have it: {}, {}. Name one by path, or by what only it has",
                        paths(others),
                        disk.path.display()
                    ))),
                }
            }
        }
    }

    /// Disks of this machine that are the one recorded.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    pub fn find(&self, recorded: &Identity) -> Result<Vec<FoundDisk>, CaptureError> {
        let same = |disk: &FoundDisk| recorded.sameness(&disk.identity) == Sameness::Same;
        Ok(self.all()?.into_iter().filter(same).collect())
    }

    /// Whole disks that are no stack of others.
    fn all(&self) -> Result<Vec<FoundDisk>, CaptureError> {
        let names = names_in(&self.sys.join("block"))?;
        let has_size = |name: &String| {
            fs::read_to_string(self.sys.join("block").join(name).join("size"))
                .is_ok_and(|size| size.trim() != "0")
        };
        Ok(names
            .into_iter()
            .filter(|name| has_size(name) && self.sys.join("block").join(name).join("mq").exists())
            .map(|name| self.disk(&name))
            .collect())
    }

    fn disk(&self, name: &str) -> FoundDisk {
        let sys = self.sys.join("class/block").join(name);
        let path = device_path(name);
        let identity = Identity::read(&sys, (self.prober)(&path));
        let sequence = fs::read_to_string(sys.join("diskseq")).ok();
        FoundDisk { path, identity, sequence: sequence.and_then(|text| text.trim().parse().ok()) }
    }

    /// The name by which the kernel knows a device node.
    fn kernel_name(&self, path: &Path) -> Result<String, CaptureError> {
        let metadata = fs::metadata(path).map_err(CaptureError::io("look at device", path))?;
        if !metadata.file_type().is_block_device() {
            return Err(CaptureError::NotCapturable {
                path: path.to_owned(),
                reason:
                    "not a block device. Name a disk such as /dev/vda, or use source = \"scan\" for a file"
                        .into(),
            });
        }
        let number = metadata.rdev();
        let link = format!("dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        let sys = self.sys.join(link);
        let sys = fs::canonicalize(&sys).map_err(CaptureError::io("look up", &sys))?;
        Ok(sys.file_name().unwrap_or_default().to_string_lossy().into_owned())
    }

    /// The whole disks below a device, with a note when that is not the device itself.
    fn below(&self, said: &str, device: &str) -> Result<Resolved, CaptureError> {
        let mut names = BTreeSet::new();
        self.descend(device, STACK_MAX, &mut names)?;
        let disks: Vec<FoundDisk> = names.iter().map(|name| self.disk(name)).collect();
        let itself = names.len() == 1 && names.contains(device);
        let stacked = !itself && !self.is_partition_of(device, &names);
        let note = (!itself).then(|| {
            let what = self.kind(device);
            let whole = if names.len() == 1 { "is the whole disk" } else { "are the whole disks" };
            format!("{said} is {what}; protected {whole} below it: {}", paths(&disks))
        });
        Ok(Resolved { disks, stacked, note })
    }

    fn is_partition_of(&self, device: &str, disks: &BTreeSet<String>) -> bool {
        let sys = fs::canonicalize(self.sys.join("class/block").join(device)).unwrap_or_default();
        let disk = sys.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        sys.join("partition").exists() && disks.len() == 1 && disks.contains(&*disk)
    }

    fn descend(&self, device: &str, left: usize, found: &mut BTreeSet<String>) -> Result<(), CaptureError> {
        let link = self.sys.join("class/block").join(device);
        if left == 0 {
            return Err(CaptureError::NotCapturable {
                path: device_path(device),
                reason: format!("more than {STACK_MAX} devices are stacked below it"),
            });
        }
        let sys = fs::canonicalize(&link).map_err(CaptureError::io("look up", &link))?;
        if sys.join("partition").exists() {
            let disk = sys.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
            return self.descend(&disk, left - 1, found);
        }
        let below = names_in(&sys.join("slaves")).unwrap_or_default();
        // A stacked device with requests of its own (multipath) is captured itself: below it are ways, not disks.
        if below.is_empty() || sys.join("mq").exists() {
            found.insert(device.to_owned());
            return Ok(());
        }
        below.iter().try_for_each(|name| self.descend(name, left - 1, found))
    }

    fn kind(&self, device: &str) -> &'static str {
        let sys = self.sys.join("class/block").join(device);
        if sys.join("partition").exists() {
            return "a partition";
        }
        if sys.join("md").exists() {
            return "an array (md)";
        }
        match fs::read_to_string(sys.join("dm/uuid")) {
            Ok(uuid) if uuid.starts_with("LVM-") => "a logical volume",
            Ok(_) => "a mapped device (device mapper)",
            Err(_) => "made of other devices",
        }
    }

    /// The devices that carry a file system, topmost first: an array's members may look like it.
    fn carriers(&self, uuid: &str) -> Result<Vec<String>, String> {
        let names = names_in(&self.sys.join("class/block")).map_err(|error| error.to_string())?;
        let mut found: Vec<(String, Tags)> = names
            .into_iter()
            .map(|name| (name.clone(), (self.prober)(&device_path(&name))))
            .filter(|(_, tags)| tags.uuid.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(uuid)))
            .collect();
        let below: Vec<String> = found
            .iter()
            .flat_map(|(name, _)| {
                names_in(&self.sys.join("class/block").join(name).join("slaves")).unwrap_or_default()
            })
            .collect();
        found.retain(|(name, _)| !below.contains(name));
        // The parts of one file system have marks of their own; copies have not.
        let parts: BTreeSet<&Option<String>> = found.iter().map(|(_, tags)| &tags.uuid_sub).collect();
        if found.is_empty() {
            return Err("no device of this machine has it".into());
        }
        if parts.len() < found.len() {
            let names: Vec<String> = found.iter().map(|(name, _)| format!("/dev/{name}")).collect();
            return Err(format!(
                "several devices have it, as copies of each other: {}. Name one by path, serial or WWN",
                names.join(", ")
            ));
        }
        Ok(found.into_iter().map(|(name, _)| name).collect())
    }
}

fn paths(disks: &[FoundDisk]) -> String {
    disks.iter().map(|disk| disk.path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The kernel writes a slash in a name as an exclamation mark.
fn device_path(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

fn names_in(dir: &Path) -> Result<Vec<String>, CaptureError> {
    let entries = fs::read_dir(dir).map_err(CaptureError::io("look into", dir))?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests;
