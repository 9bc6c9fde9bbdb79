use std::process::Command;

use anyhow::bail;
use clap::Args;

use crate::{cargo, deny, find, fuzz, programs, step};

/// What the tests use, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 26] = [
    ("clang", "clang"),
    ("llvm-strip", "llvm"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("losetup", "mount"),
    ("sfdisk", "fdisk"),
    ("fio", "fio"),
    ("pgrep", "procps"),
    ("tc", "iproute2"),
    ("mariadbd", "mariadb-server"),
    ("gcc", "build-essential"),
    // Clients of exports.
    ("qemu-img", "qemu-utils"),
    ("nbdcopy", "libnbd-bin"),
    ("fusermount3", "fuse3"),
    // Disks with files, and machines that start.
    ("pvck", "lvm2"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
    ("syslinux", "syslinux"),
    // Hosts of virtual machines, and machines that are reached by SSH.
    ("virsh", "libvirt-clients"),
    ("/usr/sbin/sshd", "openssh-server"),
    ("/usr/bin/systemd-analyze", "systemd"),
    // The console's tests look at it.
    ("chromium", "chromium"),
    ("chromedriver", "chromium-driver"),
];
/// A header or another file that is not found by its name alone, and its package.
const HEADERS: [(&str, &str); 7] = [
    ("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "libfaketime"),
    ("/usr/include/bpf/bpf_helpers.h", "libbpf-dev"),
    ("/usr/lib/postgresql/15/bin/pgbench", "postgresql-15"),
    ("/usr/lib/python3/dist-packages/nbd.py", "python3-libnbd"),
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf"),
    ("/usr/lib/syslinux/mbr/gptmbr.bin", "syslinux-common"),
    ("/usr/sbin/named", "bind9"),
];

#[derive(Args)]
pub(crate) struct Options {
    /// Only run the tests; leave out format, lints and documents.
    #[arg(long)]
    tests_only: bool,
    /// Everything but the tests, which are only built.
    #[arg(long, conflicts_with = "tests_only")]
    without_tests: bool,
    /// Passed on to the test runner, such as a name.
    #[arg(trailing_var_arg = true)]
    filter: Vec<String>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    install()?;
    if !options.tests_only {
        step("format", cargo().args(["fmt", "--all", "--check"]))?;
        let lints = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
        step("lints", cargo().args(lints))?;
        let documents = ["doc", "--workspace", "--no-deps", "--quiet", "--document-private-items"];
        deny::run_if_possible()?;
        fuzz::lock_is_current()?;
        step("documents", cargo().args(documents).env("RUSTDOCFLAGS", "-D warnings"))?;
    }
    // The whole-system tests start the servers as processes.
    programs()?;
    let documented = ["test", "--workspace", "--doc", "--quiet"];
    if !options.tests_only {
        step("examples in documents", cargo().args(documented))?;
    }
    if find("cargo-nextest").is_some() {
        // A failed test's message is what one looks for; a hundred frames of the runtime hide it.
        let quiet = [("RUST_BACKTRACE", "0"), ("RUST_LIB_BACKTRACE", "0")];
        if options.without_tests {
            return step(
                "tests are built",
                cargo().args(["nextest", "run", "--workspace", "--no-run", "--cargo-quiet"]),
            );
        }
        step("tests", cargo().args(["nextest", "run", "--workspace"]).args(&options.filter).envs(quiet))
    } else if options.without_tests {
        step("tests are built", cargo().args(["test", "--workspace", "--all-targets", "--no-run", "--quiet"]))
    } else {
        // Without nextest's groups, tests that use global kernel state must not run beside each other.
        let all = ["test", "--workspace", "--all-targets", "--", "--test-threads=1"];
        step("tests, one by one (cargo-nextest is faster)", cargo().args(all).args(&options.filter))
    }
}

/// Installs missing Debian packages when this is root; otherwise names them.
pub(crate) fn install() -> anyhow::Result<()> {
    let headers = HEADERS.iter().filter(|(file, _)| !std::path::Path::new(file).exists());
    install_missing(&PROGRAMS, headers.map(|(_, package)| *package).collect())
}

/// Installs the packages of programs that are missing, as [`install`] does.
pub(crate) fn install_packages(programs: &[(&str, &'static str)]) -> anyhow::Result<()> {
    install_missing(programs, Vec::new())
}

fn install_missing(programs: &[(&str, &'static str)], mut missing: Vec<&'static str>) -> anyhow::Result<()> {
    let absent = || programs.iter().filter(|(program, _)| find(program).is_none());
    missing.extend(absent().map(|(_, package)| *package));
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() || find("apt-get").is_none() {
        eprintln!("Not installed: {}. Tests that need them will say so.", missing.join(", "));
        return Ok(());
    }
    step("package lists", Command::new("apt-get").args(["update", "-qq"]))?;
    let mut install = Command::new("apt-get");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
    step("packages", install.env("DEBIAN_FRONTEND", "noninteractive"))?;
    if let Some((program, package)) = absent().next() {
        bail!("package {package} was installed, but {program} is still missing");
    }
    Ok(())
}
