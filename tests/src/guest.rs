//! What the host of the kernel test and its guest agree on: the guest's disks, who writes where, and what is asked of it.

use std::path::{Path, PathBuf};

use scratch::lanes::Lane;
use serde::{Deserialize, Serialize};

/// The root disk: virtio-blk, 512-byte blocks, ext4 in a partition.
pub const ROOT_DISK: &str = "/dev/vda";
/// The data disk: virtio-scsi, 4096-byte blocks, ext4 on the whole disk.
pub const DATA_DISK: &str = "/dev/sda";
/// A disk in memory whose requests end in a timer's interrupt; written directly.
pub const NULL_DISK: &str = "/dev/nullb0";
/// Disks that nothing protects, to make an array of.
pub const SPARE_DISKS: [&str; 2] = ["/dev/vdc", "/dev/vdd"];
/// Size of [`NULL_DISK`].
pub const NULL_DISK_MIB: u64 = 64;
/// Where the data disk is mounted.
pub const DATA_MOUNT: &str = "/data";
/// Label of the disk with the programs and the agent's directory; it is not protected.
pub const TOOLS_LABEL: &str = "seawall-tools";
/// Where that is mounted.
pub const TOOLS_MOUNT: &str = "/tools";
/// Kernel parameter with the address where the host waits for the guest.
pub const CONTROL_PARAMETER: &str = "seawall.control=";
/// Where the guest's root has its lanes.
pub const ROOT_LANES: &str = "/var/lanes";

/// What the host asks of the guest: one line of JSON each, answered by one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Release of the kernel that runs, and how wide its page tables are.
    Kernel,
    /// What `seawall-agent check` says of the agent's disks; an error when it ends with another status than 0.
    Check,
    /// Make an array of the spare disks and a logical volume on it. Answers with what the check says of both.
    Stack,
    /// Start the agent.
    StartAgent,
    /// Start the writers of all lanes, and programs that make and remove files.
    StartWriters,
    /// How many records are durable.
    Written,
    /// Stop all writers, and freeze the file systems. Answers with the records of each lane and the time.
    Quiesce,
    /// Read all disks as fast as they go, so that requests end on top of each other.
    Hammer {
        /// For so long.
        seconds: u64,
    },
    /// How often the kernel skipped each of the agent's programs, and how often it ran them.
    SkippedRuns,
    /// The bytes of a device: their BLAKE3 in hexadecimal.
    Hash {
        /// Which.
        device: PathBuf,
    },
    /// Take the data disk away, as a hot unplug does.
    RemoveDataDisk,
    /// Let the kernel find it again. Answers with its name now, which is another one, and the time.
    ReturnDataDisk,
    /// SIGTERM to the agent; answers when it has ended.
    StopAgent,
}

/// The guest's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done(serde_json::Value),
    /// Not done, and why.
    Failed(String),
}

/// Every writer's lane, by the guest's paths.
pub fn lanes() -> Vec<Lane> {
    let mut lanes = Vec::new();
    for (dir, record_bytes) in
        [(ROOT_LANES, 512), (ROOT_LANES, 24 * 1024), (DATA_MOUNT, 4096), (DATA_MOUNT, 40 * 1024)]
    {
        let index = lanes.len();
        let path = Path::new(dir).join(format!("lane{index}"));
        lanes.push(Lane { index, path, offset: 0, slots: 100, record_bytes, direct: false });
    }
    for (place, record_bytes) in [4096, 4096, 64 * 1024].into_iter().enumerate() {
        let index = lanes.len();
        let offset = place as u64 * (NULL_DISK_MIB << 20) / 3 / 4096 * 4096;
        lanes.push(Lane { index, path: NULL_DISK.into(), offset, slots: 200, record_bytes, direct: true });
    }
    lanes
}
