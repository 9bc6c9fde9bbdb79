//! The file systems of a disk: on it, on its partitions, on LVM volumes within one of those.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use block::ByteCount;
use scratch::LoopDisk;
use serde::{Deserialize, Serialize};

use super::lvm;

/// What the kernel is asked to mount.
const READABLE: [&str; 8] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "exfat", "ntfs3"];

/// Something that was found.
#[derive(Debug, Serialize)]
pub(super) struct FileSystem {
    /// `disk`, `p2`, or `vg/lv`.
    pub(super) name: String,
    /// As blkid calls it.
    pub(super) kind: String,
    pub(super) label: Option<String>,
    pub(super) uuid: Option<String>,
    pub(super) size: ByteCount,
    /// Why it cannot be looked into, when there is more to say than its kind.
    pub(super) problem: Option<String>,
    /// Where on the disk, in bytes.
    #[serde(skip)]
    pub(super) part: Range<u64>,
}

impl FileSystem {
    pub(super) fn is_readable(&self) -> bool {
        self.problem.is_none() && READABLE.contains(&self.kind.as_str())
    }

    pub(super) fn is_called(&self, wanted: &str) -> bool {
        let names = [Some(&self.name), self.label.as_ref(), self.uuid.as_ref()];
        names.into_iter().flatten().any(|name| name == wanted)
    }

    pub(super) fn described(&self) -> String {
        let label = self.label.as_ref().map_or_else(String::new, |label| format!(" {label:?}"));
        let problem = self.problem.as_ref().map_or_else(String::new, |problem| format!(" ({problem})"));
        format!("{}{label}: {} of {}{problem}", self.name, self.kind, self.size)
    }
}

/// The sector size that the disk was partitioned with.
pub(super) fn sector_bytes(disk: &Path) -> anyhow::Result<u32> {
    let file = File::open(disk).with_context(|| format!("open {}", disk.display()))?;
    let mut magic = [0; 8];
    for sector_bytes in [512, 4096] {
        if file.read_exact_at(&mut magic, sector_bytes).is_ok() && magic == *b"EFI PART" {
            return Ok(sector_bytes as u32);
        }
    }
    Ok(512)
}

/// Everything on a disk that blkid knows. The partition table is read by sfdisk and not by the kernel, which need not know
/// the kind of table.
pub(super) fn file_systems(disk: &Path) -> anyhow::Result<Vec<FileSystem>> {
    let mut found = Vec::new();
    let whole = 0..size_of(disk)?.0;
    let partitions = partitions(disk)?;
    if partitions.is_empty() {
        look_at(&mut found, "disk", disk, whole.clone())?;
    }
    for (number, part) in partitions {
        if part.is_empty() || part.end > whole.end {
            bail!("look at partition {number}: it lies past the end of the volume");
        }
        look_at(&mut found, &format!("p{number}"), disk, part)?;
    }
    Ok(found)
}

#[derive(Deserialize)]
struct Dump {
    partitiontable: Table,
}

#[derive(Deserialize)]
struct Table {
    sectorsize: Option<u64>,
    #[serde(default)]
    partitions: Vec<Partition>,
}

#[derive(Deserialize)]
struct Partition {
    node: String,
    start: u64,
    size: u64,
    #[serde(rename = "type")]
    kind: String,
}

/// What an extended partition of an MBR is called: it only holds others.
const EXTENDED: [&str; 3] = ["5", "f", "85"];

/// The partitions with their numbers and places; none when there is no table.
fn partitions(disk: &Path) -> anyhow::Result<Vec<(u32, Range<u64>)>> {
    let output = Command::new("sfdisk").arg("--json").arg(disk).output().context("run sfdisk (of fdisk)")?;
    let Ok(dump) = serde_json::from_slice::<Dump>(&output.stdout) else {
        // So it says that there is no table; what the disk itself holds is then looked at.
        tracing::debug!(error = %String::from_utf8_lossy(&output.stderr), "no partition table");
        return Ok(Vec::new());
    };
    let sector = dump.partitiontable.sectorsize.unwrap_or(512);
    let mut partitions = Vec::new();
    for Partition { node, start, size, .. } in
        dump.partitiontable.partitions.into_iter().filter(|part| !EXTENDED.contains(&part.kind.as_str()))
    {
        let digits = node.rfind(|char: char| !char.is_ascii_digit()).map_or(0, |at| at + 1);
        let number = node[digits..].parse().with_context(|| format!("read the partition table: {node}"))?;
        let start = start.saturating_mul(sector);
        partitions.push((number, start..start.saturating_add(size.saturating_mul(sector))));
    }
    Ok(partitions)
}

/// Looks at a part of a disk through a device of its own, which goes again at once.
fn look_at(found: &mut Vec<FileSystem>, name: &str, disk: &Path, part: Range<u64>) -> anyhow::Result<()> {
    let device = LoopDisk::attach_part(disk, part.start, part.end - part.start)?;
    let Some(Probed { kind, label, uuid }) = probe(device.device())? else { return Ok(()) };
    let problem = match kind.as_str() {
        "LVM2_member" => match lvm::volumes(device.device()) {
            Ok(volumes) => {
                return volumes.into_iter().try_for_each(|volume| logical(found, volume, disk, &part));
            }
            Err(error) => Some(format!("{error:#}")),
        },
        "crypto_LUKS" => Some("encrypted; open it with cryptsetup on `seawall export --writable`".to_owned()),
        "linux_raid_member" => {
            Some("part of a RAID; assemble it from `seawall export --writable`".to_owned())
        }
        _ => None,
    };
    let size = ByteCount(part.end - part.start);
    found.push(FileSystem { name: name.to_owned(), kind, label, uuid, size, problem, part });
    Ok(())
}

/// A logical volume within a part of a disk.
fn logical(
    found: &mut Vec<FileSystem>,
    volume: lvm::Volume,
    disk: &Path,
    within: &Range<u64>,
) -> anyhow::Result<()> {
    let lvm::Volume { name, size, place } = volume;
    let place = place.and_then(|(offset, bytes)| {
        let start = within.start.saturating_add(offset);
        let part = start..start.saturating_add(bytes);
        if part.end <= within.end { Ok(part) } else { Err("it lies past the end of its disk".to_owned()) }
    });
    match place {
        Ok(part) => look_at(found, &name, disk, part),
        Err(problem) => {
            let (kind, problem, part) = ("unknown".to_owned(), Some(problem), 0..0);
            found.push(FileSystem { name, kind, label: None, uuid: None, size, problem, part });
            Ok(())
        }
    }
}

struct Probed {
    kind: String,
    label: Option<String>,
    uuid: Option<String>,
}

/// What is on a device; `None` when blkid knows nothing of it.
fn probe(device: &Path) -> anyhow::Result<Option<Probed>> {
    // Not the cache, which may tell of another device of that name.
    let output = Command::new("blkid").args(["--probe", "--output", "export"]).arg(device).output();
    let output = output.context("run blkid (of util-linux)")?;
    match output.status.code() {
        Some(0) => {}
        Some(2) => return Ok(None),
        _ => bail!("look at {}: blkid: {}", device.display(), String::from_utf8_lossy(&output.stderr).trim()),
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map(|value| value.replace("\\ ", " "))
    };
    Ok(value("TYPE").map(|kind| Probed { kind, label: value("LABEL"), uuid: value("UUID") }))
}

fn size_of(device: &Path) -> anyhow::Result<ByteCount> {
    let file = File::open(device).with_context(|| format!("open {}", device.display()))?;
    Ok(ByteCount(rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?))
}
