//! Developer commands: `cargo xtask test`, `cargo xtask kernel-test`, `cargo xtask bench`, `cargo xtask faults`, `cargo xtask bpf`.

mod bench;
mod bpf;
mod deny;
mod faults;
mod fuzz;
mod kernel_test;
mod soak;
mod test;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

/// Developer commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the tests use and is missing (as root, on Debian). `test` does that too.
    Prepare,
    /// Install what is missing (as root, on Debian), then check format, lints, documents, and run every test.
    Test(test::Options),
    /// In virtual machines with Debian's own kernels, let an agent protect the machine's own disks, and verify the replica.
    KernelTest(kernel_test::Options),
    /// Run benches and print a table of figures with their ratio to the limit of the same run.
    Bench(bench::Options),
    /// Run the rows of the table of faults in docs/reliability.md.
    Faults(faults::Options),
    /// Throw arbitrary bytes at every decoder, steered by coverage, for so many seconds each.
    Fuzz(fuzz::Options),
    /// Let faults happen under a database until time is up, and check points all the time.
    Soak(soak::Options),
    /// Look whether the dependencies are what deny.toml allows.
    Deny(deny::Options),
    /// Compile the capture program; its object is committed beside it.
    Bpf(bpf::Options),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Task::Prepare => test::install(),
        Task::Test(options) => test::run(&options),
        Task::KernelTest(options) => kernel_test::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Faults(options) => faults::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Deny(options) => deny::run(&options),
        Task::Bpf(options) => bpf::run(&options),
    }
}

/// The checkout.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the checkout")
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Builds every program, with the features that dependencies have in tests: a build of programs alone has others, and what both use would be
/// built twice. Naming one test does that.
fn programs() -> anyhow::Result<()> {
    step("programs", cargo().args(["build", "--workspace", "--bins", "--test", "structure", "--quiet"]))
}

/// Runs a step and shows what it is and how long it took; its output goes to the terminal.
fn step(what: &str, command: &mut Command) -> anyhow::Result<()> {
    eprintln!("\n== {what}");
    let started = std::time::Instant::now();
    let status = command.status().with_context(|| format!("{what}: start {command:?}"))?;
    eprintln!("== {what}: {status}, after {} s", started.elapsed().as_secs());
    if !status.success() {
        bail!("{what}: {status}");
    }
    Ok(())
}

/// Where a program is, if it is installed. Administration programs are looked for too.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|file| file.is_file())
}
