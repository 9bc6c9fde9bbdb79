//! What is proven of a restored point.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use scratch::lanes::check;
use scratch::{FileSystem, LoopDisk, Mount};

use super::source::Source;

/// Mounts a restored image (which replays its journal), checks files and lanes, and runs fsck. Gives the records of each lane.
pub(super) fn prove(source: &Source, image: &Path) -> anyhow::Result<Vec<u64>> {
    if !source.has_file_system() {
        return check(source.lanes(), |_| image.to_owned());
    }
    let disk = LoopDisk::attach(image, 512)?;
    let mount = Mount::new(disk.device(), &image.with_extension("mnt"), "defaults")?;
    for (name, expected) in source.files() {
        let path = mount.point().join(name);
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        ensure!(blake3::hash(&content) == *expected, "{} is not what was written", name.display());
    }
    let counts = check(source.lanes(), |lane| mount.point().join(lane.path.file_name().unwrap_or_default()))?;
    mount.unmount()?;
    FileSystem::Ext4.check(disk.device()).context("fsck")?;
    Ok(counts)
}

/// What was found, for a person.
pub(super) fn sentence(count: u64, written: u64, age: Duration) -> String {
    format!(
        "{count} of {written} records, no record without the ones it depends on ({} ms before the disaster)",
        age.as_millis()
    )
}
