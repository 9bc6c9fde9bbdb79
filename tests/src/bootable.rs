//! A small real Debian that starts by itself, with UEFI and with a BIOS, and tells on its serial console what it finds of a
//! workload's files. Made once and kept under target/ by what it is made of.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use scratch::run;

/// The programs that make it, and the Debian packages that have them.
pub const PROGRAMS: [(&str, &str); 6] = [
    ("mmdebstrap", "mmdebstrap"),
    ("sfdisk", "fdisk"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("syslinux", "syslinux"),
];
/// Where the workload's files are, below the root.
pub const WORK_DIR: &str = "srv/work";
/// Where the root file system begins on the disk.
pub const ROOT_OFFSET: u64 = (1 << 20) + BOOT_BYTES;
/// The partition with the boot loaders and the kernel.
const BOOT_BYTES: u64 = 96 << 20;
const BOOT_OFFSET: u64 = 1 << 20;
/// Room in the root file system beside what is in it.
const FREE_BYTES: u64 = 192 << 20;
const SOURCE: &str = "deb http://deb.debian.org/debian bookworm main";
const PACKAGES: &str = "linux-image-cloud-amd64,systemd-sysv,systemd-boot-efi,udev,e2fsprogs";
const LEFT_OUT: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/lib/modules/*/kernel/drivers/net/*",
    "/lib/modules/*/kernel/sound/*",
];
const KERNEL_LINE: &str = "root=LABEL=seawall-root rw console=ttyS0 systemd.journald.forward_to_console=0";
/// What the guest does when it has started: it says what it finds, writes, and turns itself off.
const CHECK: &str = r#"#!/bin/sh
exec >/dev/console 2>&1
cd /srv/work || { echo "SEAWALL-CHECK result=NO-DIRECTORY"; systemctl poweroff; exit 1; }
state=$(cat state)
lines=$(wc -l < manifest)
head -n "$lines" manifest | sha256sum --check --quiet && result=sound || result=DAMAGED
[ -e touched ] && touched=yes || touched=no
touch touched && sync touched || result=NOT-WRITABLE
[ -d /sys/firmware/efi ] && firmware=uefi || firmware=bios
net=$(ls /sys/class/net | tr '\n' ,)
echo
echo "SEAWALL-CHECK state=$state lines=$lines result=$result touched=$touched firmware=$firmware net=$net"
systemctl poweroff
"#;
const UNIT: &str = "[Unit]
Description=Says what the workload left
After=local-fs.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/seawall-check
[Install]
WantedBy=multi-user.target
";
/// Counted into the key: a change makes a new image.
const RECIPE: u32 = 1;

/// The disk, from an earlier run or made now.
///
/// # Errors
/// When something that is needed is missing, or packages cannot be fetched.
pub fn image() -> anyhow::Result<PathBuf> {
    let mut hasher = blake3::Hasher::new();
    for text in [SOURCE, PACKAGES, KERNEL_LINE, CHECK, UNIT].iter().chain(&LEFT_OUT) {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.update(&[BOOT_BYTES, FREE_BYTES, RECIPE.into()].map(u64::to_le_bytes).concat());
    let cache =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the checkout")?.join("target/boot-test");
    let image = cache.join(format!("{}.img", &hasher.finalize().to_hex()[..16]));
    if !image.exists() {
        fs::create_dir_all(&cache)?;
        let dir = tempfile::tempdir_in(&cache)?;
        let partial = dir.path().join("disk.img");
        make(dir.path(), &partial).context("make a Debian that boots")?;
        for entry in fs::read_dir(&cache)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "img") {
                fs::remove_file(path)?;
            }
        }
        fs::rename(&partial, &image)?;
    }
    Ok(image)
}

fn make(dir: &Path, image: &Path) -> anyhow::Result<()> {
    let tree = dir.join("tree");
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap.args(["--variant=minbase", "--quiet", "--aptopt=Acquire::Languages \"none\""]);
    bootstrap.arg(format!("--include={PACKAGES}"));
    bootstrap.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    let output = bootstrap.arg("bookworm").arg(&tree).arg(SOURCE).output().context("run mmdebstrap")?;
    ensure!(output.status.success(), "mmdebstrap: {}", String::from_utf8_lossy(&output.stderr));
    fs::write(tree.join("etc/fstab"), "LABEL=seawall-root / ext4 errors=remount-ro 0 1\n")?;
    fs::write(tree.join("etc/hostname"), "protected\n")?;
    let check = tree.join("usr/local/sbin/seawall-check");
    fs::write(&check, CHECK)?;
    fs::set_permissions(&check, fs::Permissions::from_mode(0o755))?;
    fs::write(tree.join("etc/systemd/system/seawall-check.service"), UNIT)?;
    let wants = tree.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("../seawall-check.service", wants.join("seawall-check.service"))?;
    fs::create_dir_all(tree.join(WORK_DIR))?;

    let tree_text = tree.to_str().context("path")?;
    let used = run("du", &["-s", "--block-size=1", tree_text])?;
    let used: u64 = used.split_whitespace().next().context("du")?.parse()?;
    let root_bytes = (used + FREE_BYTES).next_multiple_of(1 << 20);
    File::create(image)?.set_len(ROOT_OFFSET + root_bytes + (1 << 20))?;
    let table = format!(
        "label: gpt\nstart={}, size={}, type=uefi, attrs=LegacyBIOSBootable\nstart={}, size={}\n",
        BOOT_OFFSET / 512,
        BOOT_BYTES / 512,
        ROOT_OFFSET / 512,
        root_bytes / 512,
    );
    let mut sfdisk = Command::new("sfdisk").arg("--quiet").arg(image).stdin(Stdio::piped()).spawn()?;
    sfdisk.stdin.take().context("sfdisk's input")?.write_all(table.as_bytes())?;
    ensure!(sfdisk.wait()?.success(), "sfdisk failed");
    boot_partition(dir, &tree, image)?;
    let image_text = image.to_str().context("path")?;
    let offset = format!("offset={ROOT_OFFSET}");
    let size = format!("{}k", root_bytes >> 10);
    run("mkfs.ext4", &["-q", "-F", "-L", "seawall-root", "-d", tree_text, "-E", &offset, image_text, &size])?;
    fs::remove_dir_all(&tree)?;
    OpenOptions::new().write(true).open(image)?.sync_all()?;
    Ok(())
}

/// systemd-boot for UEFI and syslinux for a BIOS, which start the same kernel.
fn boot_partition(dir: &Path, tree: &Path, image: &Path) -> anyhow::Result<()> {
    let part = dir.join("boot.img");
    let part_text = part.to_str().context("path")?;
    File::create(&part)?.set_len(BOOT_BYTES)?;
    // A boot loader reads where on the disk it is from the file system's own head.
    run("mkfs.vfat", &["-F", "32", "-n", "BOOT", "-h", &(BOOT_OFFSET / 512).to_string(), part_text])?;
    let find = |prefix: &str| -> anyhow::Result<PathBuf> {
        let entries = fs::read_dir(tree.join("boot"))?.filter_map(Result::ok).map(|entry| entry.path());
        let named =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
        entries.into_iter().find(named).with_context(|| format!("no {prefix} in the tree"))
    };
    let write = |name: &str, text: &str| -> anyhow::Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    for name in ["::/EFI", "::/EFI/BOOT", "::/loader", "::/loader/entries"] {
        run("mmd", &["-i", part_text, name])?;
    }
    let entry = format!("title Debian\nlinux /vmlinuz\ninitrd /initrd.img\noptions {KERNEL_LINE}\n");
    let bios = format!(
        "DEFAULT debian\nPROMPT 0\nTIMEOUT 1\nLABEL debian\n LINUX /vmlinuz\n INITRD /initrd.img\n APPEND {KERNEL_LINE}\n"
    );
    let files = [
        (tree.join("usr/lib/systemd/boot/efi/systemd-bootx64.efi"), "::/EFI/BOOT/BOOTX64.EFI"),
        (write("loader.conf", "timeout 0\ndefault debian.conf\n")?, "::/loader/loader.conf"),
        (write("debian.conf", &entry)?, "::/loader/entries/debian.conf"),
        (write("syslinux.cfg", &bios)?, "::/syslinux.cfg"),
        (find("vmlinuz-")?, "::/vmlinuz"),
        (find("initrd.img-")?, "::/initrd.img"),
    ];
    for (from, to) in &files {
        run("mcopy", &["-i", part_text, from.to_str().context("path")?, to])?;
    }
    run("syslinux", &["--install", part_text])?;
    let code =
        fs::read("/usr/lib/syslinux/mbr/gptmbr.bin").context("read the boot code of syslinux-common")?;
    ensure!(code.len() <= 440, "the boot code is too long");
    let disk = OpenOptions::new().write(true).open(image)?;
    disk.write_all_at(&code, 0)?;
    disk.write_all_at(&fs::read(&part)?, BOOT_OFFSET)?;
    // What lies on the boot partition need not be copied and replicated once more.
    for prefix in ["vmlinuz-", "initrd.img-"] {
        fs::remove_file(find(prefix)?)?;
    }
    Ok(())
}
