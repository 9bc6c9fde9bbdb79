//! `cargo xtask soak`: faults under a database until time is up.

use std::process::Command;

use clap::Args;

use crate::{programs, root, step, test};

#[derive(Args)]
pub(crate) struct Options {
    /// For so long.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Decides which faults, when, and which points; printed by each run.
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    test::install()?;
    programs()?;
    // Not `cargo run`: of one package alone the dependencies have other features, and would be built again.
    let mut command = Command::new(root().join("target/debug/soak"));
    command.args(["--minutes", &options.minutes.to_string()]);
    if let Some(seed) = options.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    step("soak", &mut command)
}
