//! Which mounted filesystems lie on the group's disks: through partitions, device mapper, md, loop devices and Btrfs's own
//! volumes, in every mount namespace of the machine.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{AtFlags, StatxFlags, statx};

/// Layers of devices upon devices that are followed. A deeper stack counts as one that nobody can tell.
const LAYERS_MAX: usize = 16;
/// Filesystems with devices of their own that mountinfo does not name.
const OPAQUE_KINDS: [&str; 1] = ["zfs"];

/// A block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DeviceNumber(pub(crate) u32, pub(crate) u32);

impl DeviceNumber {
    /// Of a block device's node; `None` for anything else.
    pub(crate) fn of(path: &Path) -> Option<DeviceNumber> {
        use std::os::unix::fs::FileTypeExt;
        let metadata = fs::metadata(path).ok()?;
        metadata.file_type().is_block_device().then(|| DeviceNumber::from_raw(metadata.rdev()))
    }

    fn from_raw(raw: u64) -> DeviceNumber {
        DeviceNumber(rustix::fs::major(raw), rustix::fs::minor(raw))
    }

    fn parse(text: &str) -> Option<DeviceNumber> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(DeviceNumber(major.parse().ok()?, minor.parse().ok()?))
    }

    fn sys(self, sys: &Path) -> PathBuf {
        sys.join(format!("dev/block/{}:{}", self.0, self.1))
    }
}

/// A mounted filesystem on the group's disks.
#[derive(Debug)]
pub(crate) struct Filesystem {
    /// Where it is mounted; the first place when there are several.
    pub(crate) mount_point: PathBuf,
    /// ext4, xfs and so on.
    pub(crate) kind: String,
    /// Its number as mountinfo shows it.
    pub(crate) number: DeviceNumber,
    /// The mounted directory.
    pub(crate) dir: File,
}

/// What lies on the group's disks.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// In the order in which they were mounted, as far as the kernel's list tells: what lies upon another comes later.
    pub(crate) filesystems: Vec<Filesystem>,
    /// Left out, as configured.
    pub(crate) left_out: Vec<PathBuf>,
}

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    mount_id: u64,
    /// Of the superblock: the same for every mount of it.
    number: DeviceNumber,
    mount_point: PathBuf,
    kind: String,
    source: String,
    read_only: bool,
    /// What leads from our root to that of the mount's namespace.
    root: PathBuf,
}

/// Finds the filesystems on `disks` (whole disks).
///
/// # Errors
/// When one may lie on them and that cannot be told, or it cannot be reached.
pub(crate) fn find(disks: &HashSet<DeviceNumber>, leave_out: &[PathBuf]) -> anyhow::Result<Found> {
    let entries = all_entries()?;
    let mut found = Found::default();
    // Every superblock once, with all its mounts.
    let mut seen = HashSet::new();
    for first in &entries {
        if !seen.insert(first.number) || first.read_only {
            continue;
        }
        let lies_on = lies_on(first, disks, &entries)
            .with_context(|| format!("tell on which disks {} lies", first.mount_point.display()))?;
        if !lies_on {
            continue;
        }
        let mounts = || entries.iter().filter(|entry| entry.number == first.number);
        if let Some(left) = mounts().find(|entry| leave_out.contains(&entry.mount_point)) {
            found.left_out.push(left.mount_point.clone());
            continue;
        }
        let dir = mounts().find_map(open).with_context(|| {
            format!("open {}: it is covered by another mount, or no directory", first.mount_point.display())
        })?;
        found.filesystems.push(Filesystem {
            mount_point: first.mount_point.clone(),
            kind: first.kind.clone(),
            number: first.number,
            dir,
        });
    }
    Ok(found)
}

/// The mounts of our namespace, then those of others.
fn all_entries() -> anyhow::Result<Vec<Entry>> {
    let own = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mut entries = parse(&own, Path::new("/"))?;
    let mut namespaces = HashSet::new();
    namespaces.extend(fs::read_link("/proc/self/ns/mnt").ok());
    for process in fs::read_dir("/proc").context("list /proc")?.flatten() {
        let dir = process.path();
        if !process.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        // A process may end while it is looked at: its namespace is seen at another one, or has gone with it.
        let Ok(namespace) = fs::read_link(dir.join("ns/mnt")) else { continue };
        if namespaces.insert(namespace)
            && let Ok(text) = fs::read_to_string(dir.join("mountinfo"))
        {
            entries.extend(parse(&text, &dir.join("root"))?);
        }
    }
    Ok(entries)
}

/// The fields that proc(5) lays out: id, parent, major:minor, root, mount point, options, tags, `-`, kind, source, options of
/// the superblock.
fn parse(text: &str, root: &Path) -> anyhow::Result<Vec<Entry>> {
    let entry = |line: &str| -> Option<Entry> {
        let (mount, superblock) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let mut superblock = superblock.split(' ');
        let (kind, source, options) = (superblock.next()?, superblock.next()?, superblock.next()?);
        Some(Entry {
            mount_id: mount.first()?.parse().ok()?,
            number: DeviceNumber::parse(mount.get(2)?)?,
            mount_point: unescape(mount.get(4)?),
            kind: kind.to_owned(),
            source: unescape(source).to_string_lossy().into_owned(),
            read_only: options.split(',').any(|option| option == "ro"),
            root: root.to_owned(),
        })
    };
    let parsed = text.lines().map(|line| entry(line).with_context(|| format!("read mountinfo: {line}")));
    parsed.collect()
}

/// White space and backslashes stand as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes
            .get(at + 1..at + 4)
            .filter(|digits| digits.iter().all(|digit| (b'0'..b'8').contains(digit)));
        match digits {
            Some(digits) if bytes[at] == b'\\' => {
                plain.push(digits.iter().fold(0, |value: u8, digit| value.wrapping_mul(8) + (digit - b'0')));
                at += 4;
            }
            _ => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

/// The mounted directory; `None` when something else is found at its place.
fn open(entry: &Entry) -> Option<File> {
    let below_root = entry.mount_point.strip_prefix("/").ok()?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(entry.root.join(below_root))
        .ok()?;
    let found = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    (found.stx_mnt_id == entry.mount_id).then_some(file)
}

fn lies_on(entry: &Entry, disks: &HashSet<DeviceNumber>, entries: &[Entry]) -> anyhow::Result<bool> {
    Stack { sys: Path::new("/sys"), disks, entries }.entry(entry, 0)
}

/// Goes down from filesystems to disks.
struct Stack<'a> {
    /// Where sysfs is mounted.
    sys: &'a Path,
    disks: &'a HashSet<DeviceNumber>,
    entries: &'a [Entry],
}

impl Stack<'_> {
    fn entry(&self, entry: &Entry, depth: usize) -> anyhow::Result<bool> {
        if OPAQUE_KINDS.contains(&entry.kind.as_str()) {
            bail!(
                "the disks of {} are not known to the kernel's list of mounts; leave it out by configuration",
                entry.kind
            );
        }
        if entry.number.0 != 0 {
            return self.device(entry.number, depth);
        }
        // A filesystem with devices of its own: Btrfs names one of them, others all.
        let mut any = false;
        for path in entry.source.split(':').filter(|path| path.starts_with("/dev/")) {
            let Some(number) = DeviceNumber::of(Path::new(path)) else {
                bail!("its device {path} is not there");
            };
            for member in btrfs_members(self.sys, number) {
                any |= self.device(member, depth)?;
            }
        }
        Ok(any)
    }

    fn device(&self, number: DeviceNumber, depth: usize) -> anyhow::Result<bool> {
        if self.disks.contains(&number) {
            return Ok(true);
        }
        if depth > LAYERS_MAX {
            bail!("more than {LAYERS_MAX} layers of devices");
        }
        let sys = number.sys(self.sys);
        let sys = fs::canonicalize(&sys).with_context(|| format!("look up {}", sys.display()))?;
        if sys.join("partition").exists() {
            let disk = sys.parent().map(|disk| disk.join("dev")).unwrap_or_default();
            return self.device(read_number(&disk)?, depth + 1);
        }
        if let Ok(backing) = fs::read_to_string(sys.join("loop/backing_file")) {
            let file = PathBuf::from(backing.trim_end_matches('\n').trim_end_matches(" (deleted)"));
            let holder = self.entries.iter().rev().filter(|entry| entry.root == Path::new("/"));
            let holder = holder
                .filter(|entry| file.starts_with(&entry.mount_point))
                .max_by_key(|entry| entry.mount_point.components().count());
            return match holder {
                Some(holder) => self.entry(holder, depth + 1),
                None => bail!("{} holds a loop device and lies on no mount that is known", file.display()),
            };
        }
        let mut any = false;
        for below in fs::read_dir(sys.join("slaves")).into_iter().flatten().flatten() {
            any |= self.device(read_number(&below.path().join("dev"))?, depth + 1)?;
        }
        Ok(any)
    }
}

fn read_number(file: &Path) -> anyhow::Result<DeviceNumber> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    DeviceNumber::parse(&text)
        .with_context(|| format!("read {}: {text:?} is no device number", file.display()))
}

/// All devices of the Btrfs filesystem that `number` belongs to; itself when it belongs to none.
fn btrfs_members(sys: &Path, number: DeviceNumber) -> Vec<DeviceNumber> {
    let devices = |filesystem: PathBuf| -> Vec<DeviceNumber> {
        let list = fs::read_dir(filesystem.join("devices")).into_iter().flatten().flatten();
        list.filter_map(|device| read_number(&device.path().join("dev")).ok()).collect()
    };
    let filesystems = fs::read_dir(sys.join("fs/btrfs")).into_iter().flatten().flatten();
    let mut all = filesystems.map(|filesystem| devices(filesystem.path()));
    all.find(|devices| devices.contains(&number)).unwrap_or_else(|| vec![number])
}

/// For messages: the filesystems by mount point.
pub(crate) fn names(filesystems: &[Filesystem]) -> Vec<String> {
    filesystems.iter().map(|filesystem| filesystem.mount_point.to_string_lossy().into_owned()).collect()
}

/// For hooks: one line each, `major:minor mount-point`.
pub(crate) fn lines(filesystems: &[Filesystem]) -> String {
    let line = |filesystem: &Filesystem| {
        let DeviceNumber(major, minor) = filesystem.number;
        format!("{major}:{minor} {}", filesystem.mount_point.display())
    };
    filesystems.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 254:1 /sub /srv/a\\040b\\134c rw,noatime shared:5 master:1 - xfs /dev/vda1 rw,attr2
41 27 254:1 / /srv/again ro,noatime - xfs /dev/vda1 rw
42 27 0:50 /@ /data rw - btrfs /dev/vdb rw,subvol=/@
43 27 7:3 / /snap ro - squashfs /dev/loop3 ro,errors=continue
";

    #[test]
    fn mountinfo_is_read() {
        let entries = parse(TEXT, Path::new("/")).unwrap();
        assert_eq!(entries.len(), 6);
        let xfs = &entries[2];
        assert_eq!((xfs.mount_id, xfs.number, xfs.kind.as_str()), (40, DeviceNumber(254, 1), "xfs"));
        assert_eq!(xfs.mount_point, Path::new("/srv/a b\\c"));
        assert!(!xfs.read_only && !entries[3].read_only && entries[5].read_only);
        assert_eq!((entries[4].source.as_str(), entries[4].number), ("/dev/vdb", DeviceNumber(0, 50)));
        assert!(parse("not a line\n", Path::new("/")).is_err());
    }

    /// A logical volume on an md array of two partitions, as sysfs shows it: two disks, and a third that has nothing to do with it.
    #[test]
    fn stacks_of_devices_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        let place = |path: &str, number: &str| {
            let place = sys.join("devices").join(path);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join("dev"), format!("{number}\n")).unwrap();
            fs::create_dir_all(sys.join("dev/block")).unwrap();
            std::os::unix::fs::symlink(&place, sys.join("dev/block").join(number)).unwrap();
            place
        };
        for disk in ["sda 8:0 8:1", "sdb 8:16 8:17", "sdc 8:32 8:33"] {
            let [name, whole, part] = disk.split(' ').collect::<Vec<_>>()[..] else { panic!("{disk}") };
            place(name, whole);
            fs::write(place(&format!("{name}/{name}1"), part).join("partition"), "1\n").unwrap();
        }
        let below = |upper: &Path, lower: &str| {
            fs::create_dir_all(upper.join("slaves")).unwrap();
            let lower = sys.join("devices").join(lower);
            std::os::unix::fs::symlink(&lower, upper.join("slaves").join(lower.file_name().unwrap()))
                .unwrap();
        };
        let md = place("virtual/block/md0", "9:0");
        below(&md, "sda/sda1");
        below(&md, "sdb/sdb1");
        below(&place("virtual/block/dm-0", "253:0"), "virtual/block/md0");
        let on = |disk: DeviceNumber, device: DeviceNumber| {
            Stack { sys, disks: &HashSet::from([disk]), entries: &[] }.device(device, 0).unwrap()
        };
        let logical = DeviceNumber(253, 0);
        assert!(on(DeviceNumber(8, 0), logical) && on(DeviceNumber(8, 16), logical));
        assert!(!on(DeviceNumber(8, 32), logical));
        assert!(on(DeviceNumber(8, 32), DeviceNumber(8, 33)));
        let missing = Stack { sys, disks: &HashSet::new(), entries: &[] }.device(DeviceNumber(1, 1), 0);
        assert!(missing.unwrap_err().to_string().contains("1:1"));
    }

    /// Whatever this machine is made of: every mount on a real device is told, and the root lies on its own device.
    #[test]
    fn the_mounts_of_this_machine_are_told() {
        let entries = all_entries().unwrap();
        let Some(root) = entries.iter().find(|entry| entry.mount_point == Path::new("/")) else { return };
        if root.number.0 != 0 {
            assert!(lies_on(root, &HashSet::from([root.number]), &entries).unwrap());
        }
        assert!(!lies_on(root, &HashSet::new(), &entries).unwrap());
        let proc = entries.iter().find(|entry| entry.kind == "proc").unwrap();
        assert!(!lies_on(proc, &HashSet::from([root.number]), &entries).unwrap());
        assert!(open(proc).is_some_and(|dir| dir.metadata().unwrap().is_dir()));
        let wrong = Entry { mount_id: u64::MAX, ..proc.clone() };
        assert!(open(&wrong).is_none(), "another mount at the same place is told from it");
    }
}
