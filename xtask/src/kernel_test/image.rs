//! The machine's root disk: Debian with the kernels to test, made once and kept under target/ by what it is made of.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use crate::{root, step};

const SOURCES: [&str; 3] = [
    "deb http://deb.debian.org/debian bookworm main",
    "deb http://deb.debian.org/debian bookworm-updates main",
    "deb http://deb.debian.org/debian-security bookworm-security main",
];
const BACKPORTS: &str = "deb http://deb.debian.org/debian bookworm-backports main";
const PACKAGES: &str = "linux-image-amd64,iproute2,e2fsprogs,udev,kmod,bpftool,mdadm,lvm2";
/// Left out of the image, and what is taken all the same: neither the machine nor the test has a use for most modules, and
/// the first copy of the root disk is what takes longest. The last pattern that fits decides.
const LEFT_OUT: [&str; 6] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/lib/modules/*/kernel/drivers/*",
    "/lib/modules/*/kernel/fs/*",
    "/lib/modules/*/kernel/net/*",
];
const TAKEN: [&str; 11] = [
    "drivers/block/*",
    "drivers/char/hw_random/*",
    "drivers/dax/*",
    "drivers/md/*",
    "drivers/net/virtio_net*",
    "drivers/net/net_failover*",
    "drivers/scsi/*",
    "drivers/virtio/*",
    "fs/*",
    "net/core/*",
    "net/packet/*",
];
/// Taken of `drivers/scsi` and `fs` are single files and not the large drivers below them.
const NOT_TAKEN: [&str; 2] = ["drivers/scsi/*/*", "fs/[!cejm]*/*"];
/// The first program: it finds the disk with the test's programs, which is not part of the image.
const FIRST_PROGRAM: &str = "#!/bin/sh
mkdir -p /tools && mount -o ro LABEL=seawall-tools /tools && exec /tools/kernel-vm-guest
echo 'the disk with the programs was not found'
";
/// Adds the newer kernel beside the stock one. Its absence is said, not an error.
const ADD_BACKPORTS: &str = r#"
echo "$BACKPORTS" > "$1/etc/apt/sources.list.d/backports.list"
chroot "$1" apt-get update -qq && DEBIAN_FRONTEND=noninteractive chroot "$1" apt-get install -y -qq \
    --no-install-recommends -t bookworm-backports linux-image-amd64 || echo "no kernel from backports"
chroot "$1" apt-get clean
"#;
/// Where the root partition begins, in sectors.
const PARTITION_SECTOR: u64 = 2048;
/// Room in the root file system beside what is in it.
const FREE_BYTES: u64 = 128 << 20;
/// Counted into the image's key: a change here or above makes a new image.
const RECIPE: u32 = 1;

/// A root disk and the kernels that fit it.
pub(super) struct Image {
    pub(super) root: PathBuf,
    pub(super) kernels: Vec<Kernel>,
}

#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) release: String,
    pub(super) image: PathBuf,
    pub(super) initrd: PathBuf,
}

impl Image {
    pub(super) fn has_backports(&self) -> bool {
        self.kernels.len() > 1
    }
}

/// The image, from an earlier run or made now.
pub(super) fn get(rebuild: bool) -> anyhow::Result<Image> {
    let cache = root().join("target/kernel-test");
    let dir = cache.join(format!("image-{}", key()));
    if rebuild && dir.exists() {
        fs::remove_dir_all(&dir).context("remove the old image")?;
    }
    if !dir.exists() {
        // Made under another name, so that an image that was cut short is never taken for a whole one.
        let partial = cache.join("image.partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).context("remove what an earlier run left")?;
        }
        fs::create_dir_all(&partial).context("make the image's directory")?;
        make(&partial)?;
        fs::rename(&partial, &dir).context("name the image")?;
        remove_others(&cache, &dir)?;
    }
    find(&dir)
}

/// Images of other recipes are of no use any more.
fn remove_others(cache: &Path, image: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(cache).context("look into the cache")? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("image-") && path != image {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Names what the image is made of.
fn key() -> String {
    let mut hasher = blake3::Hasher::new();
    for text in SOURCES.iter().chain(&LEFT_OUT).chain(&TAKEN).chain(&NOT_TAKEN).chain(&[
        BACKPORTS,
        PACKAGES,
        FIRST_PROGRAM,
        ADD_BACKPORTS,
    ]) {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.update(&[PARTITION_SECTOR, FREE_BYTES, RECIPE.into()].map(u64::to_le_bytes).concat());
    hasher.finalize().to_hex()[..16].to_owned()
}

fn find(dir: &Path) -> anyhow::Result<Image> {
    let mut kernels = Vec::new();
    for entry in fs::read_dir(dir).context("look into the image's directory")? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            let initrd = dir.join(format!("initrd.img-{release}"));
            ensure!(initrd.exists(), "{} is missing: make the image again with --rebuild", initrd.display());
            kernels.push(Kernel { release: release.to_owned(), image: path, initrd });
        }
    }
    ensure!(!kernels.is_empty(), "{} holds no kernel: make it again with --rebuild", dir.display());
    kernels.sort_by_key(|kernel| version(&kernel.release));
    Ok(Image { root: dir.join("root.img"), kernels })
}

/// The release's numbers, to be compared.
fn version(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn make(dir: &Path) -> anyhow::Result<()> {
    let tree = dir.join("tree");
    let hook = dir.join("add-backports");
    fs::write(&hook, format!("#!/bin/sh\nBACKPORTS='{BACKPORTS}'{ADD_BACKPORTS}"))?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap.args(["--variant=minbase", "--quiet"]).arg(format!("--include={PACKAGES}"));
    let modules = "/lib/modules/*/kernel";
    for path in LEFT_OUT {
        bootstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    for path in TAKEN {
        bootstrap.arg(format!("--dpkgopt=path-include={modules}/{path}"));
    }
    for path in NOT_TAKEN {
        bootstrap.arg(format!("--dpkgopt=path-exclude={modules}/{path}"));
    }
    bootstrap.arg("--aptopt=Acquire::Languages \"none\"");
    bootstrap.arg(format!("--customize-hook={}", hook.display()));
    bootstrap.arg("bookworm").arg(&tree).args(SOURCES);
    step("a small Debian", &mut bootstrap)?;
    let first = tree.join("usr/sbin/seawall-guest");
    fs::write(&first, FIRST_PROGRAM)?;
    fs::set_permissions(&first, fs::Permissions::from_mode(0o755))?;
    // QEMU is given the kernels; on the disk they would only be copied along.
    for entry in fs::read_dir(tree.join("boot"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("vmlinuz-") || name.starts_with("initrd.img-") {
            fs::copy(&path, dir.join(&name)).with_context(|| format!("copy {name}"))?;
            fs::remove_file(&path)?;
        }
    }
    disk(&tree, &dir.join("root.img"))?;
    fs::remove_dir_all(&tree).context("remove the tree")?;
    fs::remove_file(&hook).context("remove the hook")
}

/// A partitioned disk with the tree as an ext4 file system.
fn disk(tree: &Path, image: &Path) -> anyhow::Result<()> {
    let used = Command::new("du").args(["-s", "--block-size=1"]).arg(tree).output().context("run du")?;
    let used = String::from_utf8_lossy(&used.stdout);
    let used: u64 = used.split_whitespace().next().context("ask du")?.parse().context("ask du")?;
    let begin = PARTITION_SECTOR * 512;
    let size_mib = (used + FREE_BYTES).div_ceil(1 << 20);
    // One MiB more, for the second partition table at the end.
    File::create(image)?.set_len(begin + ((size_mib + 1) << 20))?;
    let mut table = Command::new("sfdisk");
    let mut table = table.arg("--quiet").arg(image).stdin(Stdio::piped()).spawn().context("run sfdisk")?;
    let script = format!("label: gpt\nstart={PARTITION_SECTOR}, size={}\n", size_mib << 11);
    table.stdin.take().context("sfdisk's input")?.write_all(script.as_bytes())?;
    ensure!(table.wait()?.success(), "sfdisk failed");
    let mut format = Command::new("mkfs.ext4");
    format.args(["-q", "-F", "-d"]).arg(tree).arg("-E").arg(format!("offset={begin}")).arg(image);
    format.arg(format!("{}k", size_mib << 10));
    step("its disk", &mut format)?;
    OpenOptions::new().write(true).open(image)?.sync_all().context("make the image durable")
}
