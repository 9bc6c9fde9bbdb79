//! Which disks this machine has, what they are known by, and what is on them.

use std::process::Command;

use anyhow::{Context, ensure};
use capture::Disks;
use control::fleet::{DISK_USES_MAX, DISKS_MAX, DiskInfo, DiskUse};
use serde_json::Value;

use crate::check::all_disks;

/// All disks that could be captured.
pub(super) fn disks() -> anyhow::Result<Vec<DiskInfo>> {
    let tree = tree()?;
    let known = Disks::default();
    let mut disks = Vec::new();
    for name in all_disks().into_iter().take(DISKS_MAX) {
        let device = name.to_string();
        let resolved = known.resolve(&name).ok();
        let known_by = resolved.and_then(|resolved| Some(resolved.disks.first()?.identity.to_string()));
        let node = tree.iter().find(|node| node["path"] == device.as_str());
        let mut uses = Vec::new();
        if let Some(node) = node {
            collect(node, &mut uses);
        }
        disks.push(DiskInfo {
            bytes: node.and_then(|node| node["size"].as_u64()).unwrap_or(0),
            known_by: known_by.unwrap_or_default(),
            device,
            // Who looks often fills it in.
            written_bytes_per_s: None,
            uses,
        });
    }
    Ok(disks)
}

/// What lsblk(8) of util-linux says: it knows every format and stack.
fn tree() -> anyhow::Result<Vec<Value>> {
    let output = Command::new("lsblk")
        .args(["--json", "--bytes", "--output", "PATH,SIZE,FSTYPE,MOUNTPOINT"])
        .output()
        .context("run lsblk, of util-linux")?;
    ensure!(output.status.success(), "lsblk: {}", String::from_utf8_lossy(&output.stderr).trim());
    let mut tree: Value = serde_json::from_slice(&output.stdout).context("read what lsblk says")?;
    match tree["blockdevices"].take() {
        Value::Array(devices) => Ok(devices),
        _ => Ok(Vec::new()),
    }
}

/// lsblk asks udev what is on a device, which not every system has.
fn probe(device: &str) -> String {
    let output = Command::new("blkid").args(["-p", "-o", "value", "-s", "TYPE", device]).output();
    // Where there is nothing that it knows, it fails.
    let found = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    found.unwrap_or_default().chars().take(60).collect()
}

fn collect(node: &Value, uses: &mut Vec<DiskUse>) {
    let text = |name: &str, most: usize| {
        node[name].as_str().unwrap_or_default().chars().take(most).collect::<String>()
    };
    let device = text("path", 80);
    let kind = match text("fstype", 60) {
        kind if kind.is_empty() => probe(&device),
        kind => kind,
    };
    let found = DiskUse { device, kind, mounted: text("mountpoint", 240) };
    if uses.len() < DISK_USES_MAX && !(found.kind.is_empty() && found.mounted.is_empty()) {
        uses.push(found);
    }
    for child in node["children"].as_array().into_iter().flatten() {
        collect(child, uses);
    }
}
