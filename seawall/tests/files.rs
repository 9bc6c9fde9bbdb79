//! Files out of points: of every file system, on partitions and on LVM, with journals that were never replayed.

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use scratch::{FileSystem, LoopDisk, Mount, run};
use serde_json::Value;

use support::{Running, init, json, seawall, status_when, text};

const MIB: u64 = 1 << 20;
/// What the partitions are, and their sizes in MiB.
const PARTITIONS: [(&str, u64); 4] = [("ext4", 48), ("xfs", 320), ("btrfs", 128), ("lvm", 64)];

fn cannot_run(why: &str) {
    eprintln!("NOT RUN: files of points: {why}");
    assert!(std::env::var_os("CI").is_none(), "it must run in CI, but: {why}");
}

fn runnable() -> bool {
    for program in
        ["nbdfuse", "fusermount3", "pvck", "mkfs.xfs", "mkfs.btrfs", "sfdisk", "unshare", "setpriv"]
    {
        let there = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
            .iter()
            .any(|dir| Path::new(dir).join(program).exists());
        if !there {
            cannot_run(&format!("{program} is not installed"));
            return false;
        }
    }
    if !scratch::is_root() || !Path::new("/dev/fuse").exists() {
        cannot_run("it needs root, loop devices and /dev/fuse");
        return false;
    }
    true
}

fn big() -> Vec<u8> {
    (0..3_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Fills a file system, and takes its disk as it is while it is still mounted: what was written last is only in the journal.
fn fill(device: &Path, dir: &Path, kind: &str) {
    let mount = Mount::new(device, &dir.join("mnt"), "rw").unwrap();
    let root = mount.point();
    fs::create_dir_all(root.join("etc/deep")).unwrap();
    fs::write(root.join("etc/kind"), kind).unwrap();
    fs::write(root.join("etc/deep/big"), big()).unwrap();
    std::os::unix::fs::symlink("/etc/kind", root.join("link")).unwrap();
    std::os::unix::fs::symlink("../../../../etc/passwd", root.join("escape")).unwrap();
    rustix::fs::sync();
    // Durable, and for a file system with a journal nowhere but there.
    let mut last = fs::File::create(root.join("etc/last")).unwrap();
    last.write_all(b"written last").unwrap();
    last.sync_all().unwrap();
    fs::File::open(root.join("etc")).unwrap().sync_all().unwrap();
    drop(last);
    let frozen = dir.join("frozen.img");
    // Past the device's own cache, which is not the file system's.
    let (from, to) = (format!("if={}", device.display()), format!("of={}", frozen.display()));
    run("dd", &["bs=1M", "iflag=direct", "conv=sparse", &from, &to]).unwrap();
    mount.unmount().unwrap();
    run(
        "dd",
        &["bs=1M", "conv=fsync", &format!("if={}", frozen.display()), &format!("of={}", device.display())],
    )
    .unwrap();
    fs::remove_file(frozen).unwrap();
}

/// A volume group with one logical volume, whose metadata is written by LVM's own tools without activating it. Its place
/// on the physical volume.
fn lvm(device: &Path, dir: &Path) -> (u64, u64) {
    let device = device.to_str().unwrap();
    let config = format!("devices {{ use_devicesfile=0 filter=[\"a|^{device}$|\",\"r|.*|\"] }}");
    let backup = dir.join("backup");
    let backup_path = backup.to_str().unwrap();
    run("pvcreate", &["-q", "--config", &config, device]).unwrap();
    run("vgcreate", &["-q", "--config", &config, "seawalltest", device]).unwrap();
    run("vgcfgbackup", &["-q", "--config", &config, "-f", backup_path, "seawalltest"]).unwrap();
    let metadata = fs::read_to_string(&backup).unwrap();
    let volume = "logical_volumes { root { id = \"aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa\"
        status = [\"READ\", \"WRITE\", \"VISIBLE\"]
        flags = []
        creation_time = 1700000000
        creation_host = \"test\"
        segment_count = 1
        segment1 { start_extent = 0
        extent_count = 10
        type = \"striped\"
        stripe_count = 1
        stripes = [ \"pv0\", 2 ] } } }\n";
    let end = metadata.rfind('}').unwrap();
    fs::write(&backup, format!("{}{volume}{}", &metadata[..end], &metadata[end..])).unwrap();
    run("vgcfgrestore", &["-q", "--config", &config, "--force", "-f", backup_path, "seawalltest"]).unwrap();
    (MIB + 2 * 4 * MIB, 40 * MIB)
}

fn make_disk(dir: &Path) {
    let image = dir.join("disk.img");
    let size = PARTITIONS.iter().map(|(_, size)| size).sum::<u64>() + 2;
    fs::File::create(&image).unwrap().set_len(size * MIB).unwrap();
    let mut script = "label: gpt\n".to_owned();
    let mut start = MIB;
    let mut places = Vec::new();
    for (kind, size) in PARTITIONS {
        script += &format!("start={}, size={}\n", start / 512, size * MIB / 512);
        places.push((kind, start, size * MIB));
        start += size * MIB;
    }
    let mut sfdisk = Command::new("sfdisk").arg("--quiet").arg(&image).stdin(Stdio::piped()).spawn().unwrap();
    sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    for (kind, start, size) in places {
        let mut part = LoopDisk::attach_part(&image, start, size).unwrap();
        let mut made = kind;
        if kind == "lvm" {
            let (offset, bytes) = lvm(part.device(), dir);
            part = LoopDisk::attach_part(&image, start + offset, bytes).unwrap();
            made = "ext4";
        }
        let file_system = match made {
            "ext4" => FileSystem::Ext4,
            "xfs" => FileSystem::Xfs,
            _ => FileSystem::Btrfs,
        };
        file_system.make(part.device()).unwrap();
        fill(part.device(), dir, kind);
    }
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mounts").unwrap()
}

/// Loop devices whose backing file is in the test's reach: an export that nbdfuse showed.
fn loops() -> String {
    let listed = run("losetup", &["--list", "--noheadings", "--output", "BACK-FILE"]).unwrap();
    listed.lines().filter(|line| line.ends_with("/nbd")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn kernel_files_come_out_of_every_file_system() {
    if !runnable() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path();
    make_disk(dir);
    init(dir);
    let running = Running::start(dir);
    status_when(dir, |status| status["groups"][0]["points"].as_u64() > Some(0));
    let before = fs::read(dir.join("disk.img")).unwrap();

    let listed = json(dir, &["files", "ls", "disk.img", "--point", "latest", "--json"]);
    let found: Vec<String> = listed["file_systems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fs| format!("{} {}", fs["name"].as_str().unwrap(), fs["kind"].as_str().unwrap()))
        .collect();
    assert_eq!(found, ["p1 ext4", "p2 xfs", "p3 btrfs", "seawalltest/root ext4"]);
    let several = seawall(dir, &["files", "ls", "disk.img", "--point", "latest", "/etc"]);
    assert!(!several.status.success() && text(&several).contains("--fs"), "{}", text(&several));

    for (name, kind) in [("p1", "ext4"), ("p2", "xfs"), ("p3", "btrfs"), ("seawalltest/root", "lvm")] {
        let files = |action: &str, more: &[&str]| {
            let args = ["files", action, "disk.img", "--point", "latest", "--fs", name];
            seawall(dir, &[&args[..], more].concat())
        };
        let listed = files("ls", &["/etc", "--json"]);
        let listed: Value =
            serde_json::from_slice(&listed.stdout).unwrap_or_else(|_| panic!("{}", text(&listed)));
        let entries = listed["entries"].as_array().unwrap_or_else(|| panic!("{name}: {listed}"));
        let names: Vec<&str> = entries.iter().map(|e| e["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["deep", "kind", "last"], "{name}");
        // Only in the journal.
        let last = files("get", &["/etc/last", "--out", "-"]);
        assert_eq!(String::from_utf8_lossy(&last.stdout), "written last", "{name}: {}", text(&last));
        // Links lead where they would on the source, and never out of it.
        assert_eq!(String::from_utf8_lossy(&files("get", &["/link", "--out", "-"]).stdout), kind);
        let escape = files("get", &["/escape", "--out", "-"]);
        assert!(!escape.status.success() && escape.stdout.is_empty(), "{}", text(&escape));
        let out = dir.join(format!("{kind}-out"));
        let got = files("get", &["/etc/", "--out", out.to_str().unwrap(), "--json"]);
        let done: Value = serde_json::from_slice(&got.stdout).unwrap_or_else(|_| panic!("{}", text(&got)));
        assert_eq!(done["bytes"], (big().len() + kind.len() + 12) as u64, "{done}");
        assert!(fs::read(out.join("deep/big")).unwrap() == big(), "{name}");
    }
    let file = dir.join("big");
    let args = ["files", "get", "disk.img", "--point", "latest", "--fs", "p2", "/etc/deep/big"];
    let got = seawall(dir, &args);
    assert!(got.status.success() && fs::read(&file).unwrap() == big(), "{}", text(&got));
    let again = seawall(dir, &args);
    assert!(!again.status.success() && text(&again).contains("exists"), "{}", text(&again));
    let none =
        seawall(dir, &["files", "get", "disk.img", "--point", "latest", "--fs", "p1", "/none", "--json"]);
    assert!(!none.status.success() && text(&none).contains("find /none"), "{}", text(&none));
    assert_eq!(
        text(&none).matches("find /none").count(),
        2,
        "once as JSON, once for people: {}",
        text(&none)
    );

    // The source and the replica are what they were.
    assert!(fs::read(dir.join("disk.img")).unwrap() == before);
    let restored =
        seawall(dir, &["restore", "--volume", "disk.img", "--point", "latest", "--out", "after.img"]);
    assert!(
        restored.status.success() && fs::read(dir.join("after.img")).unwrap() == before,
        "{}",
        text(&restored)
    );

    killed_leaves_nothing(dir);
    running.stop();
}

/// kill -9 in the middle of a copy: no mount, no loop device, no helper is left.
fn killed_leaves_nothing(dir: &Path) {
    let before = mounts();
    let mut command = support::command(dir);
    command.args([
        "files",
        "get",
        "disk.img",
        "--point",
        "latest",
        "--fs",
        "p2",
        "/etc/deep/big",
        "--out",
        "-",
    ]);
    // Nobody reads on, so it stands still in the middle.
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut first = [0; 1];
    std::io::Read::read_exact(&mut out, &mut first).unwrap();
    assert!(!loops().is_empty(), "it is at work");
    assert_eq!(mounts(), before, "what it mounts is seen by nobody else");
    child.kill().unwrap();
    child.wait().unwrap();
    support::until(|| loops().is_empty());
    assert_eq!(mounts(), before);
    let left = run("pgrep", &["-f", &format!("nbdfuse.*{}", "/seawall-")]).unwrap_or_default();
    support::until(|| left.lines().all(|pid| !Path::new("/proc").join(pid).exists()));
    support::until(|| json(dir, &["export", "list", "--json"])["exports"].as_array().unwrap().is_empty());
}
