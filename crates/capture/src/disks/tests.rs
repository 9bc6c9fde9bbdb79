use std::collections::HashMap;
use std::os::unix::fs::symlink;

use super::*;

/// A tree that looks like /sys.
struct Tree {
    dir: tempfile::TempDir,
    tags: HashMap<PathBuf, Tags>,
}

impl Tree {
    fn new() -> Tree {
        let tree = Tree { dir: tempfile::tempdir().unwrap(), tags: HashMap::new() };
        for dir in ["block", "class/block", "devices"] {
            fs::create_dir_all(tree.dir.path().join(dir)).unwrap();
        }
        tree
    }

    /// `at` is below devices: "vda", or "vda/vda1" for a partition.
    fn device(&self, at: &str, files: &[(&str, &str)]) {
        let sys = self.dir.path().join("devices").join(at);
        fs::create_dir_all(&sys).unwrap();
        let name = Path::new(at).file_name().unwrap();
        symlink(&sys, self.dir.path().join("class/block").join(name)).unwrap();
        if !at.contains('/') {
            symlink(&sys, self.dir.path().join("block").join(name)).unwrap();
        }
        for (file, text) in [("size", "2048\n")].iter().chain(files) {
            let path = sys.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn disk(&self, name: &str, files: &[(&str, &str)]) {
        self.device(name, files);
        fs::create_dir_all(self.dir.path().join("devices").join(name).join("mq")).unwrap();
    }

    fn tag(&mut self, name: &str, uuid: &str, uuid_sub: &str) {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let tags = Tags { uuid: some(uuid), uuid_sub: some(uuid_sub), pt_uuid: None };
        self.tags.insert(device_path(name), tags);
    }

    fn disks(&self) -> Disks {
        let tags = self.tags.clone();
        let prober = Box::new(move |path: &Path| tags.get(path).cloned().unwrap_or_default());
        Disks { sys: self.dir.path().to_owned(), prober }
    }

    fn resolve(&self, name: &str) -> Result<Resolved, CaptureError> {
        self.disks().resolve(&name.parse().unwrap())
    }
}

fn names(resolved: &Resolved) -> Vec<String> {
    resolved.disks.iter().map(|disk| disk.path.display().to_string()).collect()
}

/// A volume group on a whole disk and on a partition of another, with an array below a third.
fn stacked() -> Tree {
    let mut tree = Tree::new();
    tree.disk("sda", &[("device/wwid", "naa.5000c500a1b2c3d4\n")]);
    tree.disk("sdb", &[]);
    tree.device("sdb/sdb1", &[("partition", "1\n")]);
    tree.disk("sdc", &[]);
    tree.disk("sdd", &[]);
    tree.device("md0", &[("md/level", "raid1\n"), ("slaves/sdc", ""), ("slaves/sdd", "")]);
    tree.device(
        "dm-0",
        &[("dm/uuid", "LVM-abc\n"), ("slaves/sda", ""), ("slaves/sdb1", ""), ("slaves/md0", "")],
    );
    tree.tag("dm-0", "f00d", "");
    tree
}

#[test]
fn a_logical_volume_means_the_disks_below_it() {
    let tree = stacked();
    let resolved = tree.resolve("fsuuid:F00D").unwrap();
    assert_eq!(names(&resolved), ["/dev/sda", "/dev/sdb", "/dev/sdc", "/dev/sdd"]);
    let note = resolved.note.unwrap();
    assert!(
        note.contains("a logical volume") && note.contains("/dev/sda, /dev/sdb, /dev/sdc, /dev/sdd"),
        "{note}"
    );
}

#[test]
fn arrays_and_partitions_mean_their_disks() {
    let tree = stacked();
    let disks = tree.disks();
    let array = disks.below("/dev/md0", "md0").unwrap();
    assert_eq!(names(&array), ["/dev/sdc", "/dev/sdd"]);
    assert!(array.stacked);
    assert!(array.note.unwrap().contains("an array (md)"));
    let partition = disks.below("/dev/sdb1", "sdb1").unwrap();
    assert_eq!(names(&partition), ["/dev/sdb"]);
    assert!(!partition.stacked);
    assert_eq!(
        partition.note.unwrap(),
        "/dev/sdb1 is a partition; protected is the whole disk below it: /dev/sdb"
    );
    assert_eq!(disks.below("/dev/sda", "sda").unwrap().note, None);
}

/// Multipath with requests of its own is one disk; what is below it are ways to it.
#[test]
fn a_multipath_disk_is_itself() {
    let tree = stacked();
    tree.disk("dm-1", &[("dm/uuid", "mpath-1\n"), ("slaves/sda", ""), ("slaves/sdc", "")]);
    assert_eq!(names(&tree.disks().below("x", "dm-1").unwrap()), ["/dev/dm-1"]);
}

#[test]
fn a_loop_in_the_stack_is_refused() {
    let tree = Tree::new();
    tree.device("dm-0", &[("slaves/dm-1", "")]);
    tree.device("dm-1", &[("slaves/dm-0", "")]);
    let error = tree.disks().below("x", "dm-0").unwrap_err().to_string();
    assert!(error.contains("more than 32 devices"), "{error}");
}

#[test]
fn marks_of_every_kind_of_disk_are_found() {
    let tree = Tree::new();
    tree.disk("vda", &[("serial", "VIRTIO-1\n"), ("diskseq", "7\n")]);
    tree.disk("nvme0n1", &[("wwid", "eui.0025388b710116a1\n"), ("device/serial", "S4EV  NX0\n")]);
    tree.disk(
        "sda",
        &[("device/wwid", "naa.5000c500a1b2c3d4\n"), ("device/vpd_pg80", "\0\u{80}\0\u{8}ZA123456")],
    );
    for (name, path) in [
        ("serial:VIRTIO-1", "/dev/vda"),
        ("serial:S4EV NX0", "/dev/nvme0n1"),
        ("wwn:eui.0025388B710116A1", "/dev/nvme0n1"),
        ("wwn:0x5000c500a1b2c3d4", "/dev/sda"),
        ("wwn:naa.5000c500a1b2c3d4", "/dev/sda"),
    ] {
        assert_eq!(names(&tree.resolve(name).unwrap()), [path], "{name}");
    }
    assert_eq!(tree.resolve("serial:VIRTIO-1").unwrap().disks[0].sequence, Some(7));
    let error = tree.resolve("serial:other").unwrap_err().to_string();
    assert!(error.contains("serial:other") && error.contains("no disk"), "{error}");
}

#[test]
fn what_several_disks_have_is_refused() {
    let mut tree = Tree::new();
    tree.disk("sda", &[("serial", "SAME\n")]);
    tree.disk("sdb", &[("serial", "SAME\n")]);
    let error = tree.resolve("serial:SAME").unwrap_err().to_string();
    assert!(error.contains("/dev/sda") && error.contains("/dev/sdb"), "{error}");
    // A restored copy beside its source.
    tree.tag("sda", "f00d", "");
    tree.tag("sdb", "f00d", "");
    let error = tree.resolve("fsuuid:f00d").unwrap_err().to_string();
    assert!(error.contains("copies of each other: /dev/sda, /dev/sdb"), "{error}");
    // One file system on two disks.
    tree.tag("sda", "f00d", "1");
    tree.tag("sdb", "f00d", "2");
    assert_eq!(names(&tree.resolve("fsuuid:f00d").unwrap()), ["/dev/sda", "/dev/sdb"]);
}

#[test]
fn the_first_common_mark_decides() {
    let identity = |wwn: &str, serial: &str, fs_uuid: &str| {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Identity { wwn: some(wwn), serial: some(serial), pt_uuid: None, fs_uuid: some(fs_uuid) }
    };
    let disk = identity("w", "s", "f");
    for (other, expected) in [
        (identity("w", "s", "made anew"), Sameness::Same),
        (identity("", "s", "made anew"), Sameness::Same),
        (identity("x", "s", "f"), Sameness::Different),
        (identity("", "", "f"), Sameness::Same),
        (identity("", "", "made anew"), Sameness::Different),
        (identity("", "", ""), Sameness::Unknown),
    ] {
        assert_eq!(disk.sameness(&other), expected, "{other}");
    }
    assert_eq!(disk.to_string(), "wwn:w, serial:s, fsuuid:f");
    assert!(Identity::default().is_empty());
}

#[test]
fn names_are_read_as_they_are_written() {
    for text in ["/dev/vda", "disk.img", "/dev/disk/by-path/pci-0000:00:05.0", "serial:A:B", "ptuuid:1-2"] {
        assert_eq!(text.parse::<DeviceName>().unwrap().to_string(), text);
    }
    for text in ["", "serial:", "uuid:1-2"] {
        assert!(text.parse::<DeviceName>().is_err(), "{text}");
    }
}
