//! `cargo xtask kernel-test`: Debian's own kernels in a virtual machine under software emulation, where an agent protects the
//! machine's root disk and other disks. `image` makes the machine's disk; the programs kernel-vm and kernel-vm-guest in
//! tests/ are the test itself.

mod image;

use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Args;

use crate::test::install_packages;
use crate::{programs, root, step};

/// What is used, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mmdebstrap", "mmdebstrap"),
    ("sfdisk", "fdisk"),
    ("mkfs.ext4", "e2fsprogs"),
];

#[derive(Args)]
pub(crate) struct Options {
    /// Make the machine's disk anew, with the packages of today.
    #[arg(long)]
    rebuild: bool,
    /// Only this kernel, by the beginning of its release, such as 6.1.
    #[arg(long)]
    kernel: Option<String>,
    /// QEMU's processor model; `max` has five-level page tables.
    #[arg(long, default_value = "max,la57=off")]
    cpu: String,
    /// The newest kernel without its root disk, whose first copy is most of a whole run's time; of the others only whether they take the
    /// programs and show every disk's writes.
    #[arg(long)]
    short: bool,
    /// When the machine's disk cannot be made, say so and end well: for where Debian's packages cannot be fetched.
    #[arg(long)]
    if_possible: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "kernel-test needs root, to make and mount disks");
    let began = Instant::now();
    let image = match install_packages(&PROGRAMS).and_then(|()| image::get(options.rebuild)) {
        Err(error) if options.if_possible => {
            eprintln!("\nNOT RUN: kernel-test, because the machine's disk cannot be made here: {error:#}\n");
            return Ok(());
        }
        other => other?,
    };
    programs()?;
    eprintln!("[{:5.1} s] image and programs are there", began.elapsed().as_secs_f64());
    let chosen = |release: &str| {
        let asked = options.kernel.as_deref().unwrap_or_default();
        release.strip_prefix(asked).is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
            || asked.is_empty()
    };
    let kernels: Vec<_> = image.kernels.iter().filter(|kernel| chosen(&kernel.release)).collect();
    ensure!(!kernels.is_empty(), "no kernel matches; there are: {:?}", image.kernels);
    let host = root().join("target/debug/kernel-vm");
    let work = root().join("target/kernel-test/run");
    std::fs::create_dir_all(&work).context("make the directory for the run")?;
    let mut failed = Vec::new();
    for (index, kernel) in kernels.iter().enumerate() {
        let mut command = std::process::Command::new(&host);
        command.arg("--root").arg(&image.root).arg("--kernel").arg(&kernel.image);
        command.arg("--initrd").arg(&kernel.initrd).arg("--work").arg(work.join(&kernel.release));
        command.args(["--cpu", &options.cpu]);
        if options.short {
            command.arg(if index + 1 < kernels.len() { "--check-only" } else { "--without-root" });
        }
        if let Err(error) = step(&format!("Linux {}", kernel.release), &mut command) {
            eprintln!("{error:#}");
            failed.push(kernel.release.as_str());
        }
    }
    if !image.has_backports() {
        eprintln!("\nNOT TESTED: the kernel of bookworm-backports: its package could not be fetched");
    }
    let tested: Vec<&str> = kernels.iter().map(|kernel| kernel.release.as_str()).collect();
    eprintln!("\n{} in {:.0} s", tested.join(", "), began.elapsed().as_secs_f64());
    println!("{} passed, {} failed", tested.len() - failed.len(), failed.len());
    if !failed.is_empty() {
        bail!("failed on {}; logs are below {}", failed.join(", "), work.display());
    }
    Ok(())
}
