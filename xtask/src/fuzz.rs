//! `cargo xtask fuzz`: arbitrary bytes for every decoder, for so many seconds, on the stable toolchain.
//!
//! The property tests do it for a fixed number of cases; here they go on with other ones until time is up. What one finds is kept by
//! proptest beside the test and tried first from then on. fuzz/ has the same for cargo-fuzz, with coverage.

use std::time::{Duration, Instant};

use clap::Args;

use crate::{cargo, step};

/// Decoders, by package and property test.
const DECODERS: [(&str, &str); 9] = [
    ("changeset", "tests::decoder"),
    ("changeset", "compare::tests::no_bytes_panic"),
    ("changeset", "note::tests"),
    ("wire", "frame::tests"),
    ("wire", "handshake::tests"),
    ("wire", "link::tests::no_bytes_panic"),
    ("cache", "format::tests"),
    ("cache", "cursors::tests"),
    ("export", "fuzzing"),
];
/// Cases of one run of a property test.
const CASES: &str = "4096";

#[derive(Args)]
pub(crate) struct Options {
    /// For each decoder.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    for (package, test) in DECODERS {
        let until = Instant::now() + Duration::from_secs(options.seconds);
        let mut runs = 0;
        while runs == 0 || Instant::now() < until {
            let filter = format!("package({package}) & test({test})");
            let mut command = cargo();
            command.args([
                "nextest",
                "run",
                "--workspace",
                "--no-tests=fail",
                "--status-level=none",
                "-E",
                &filter,
            ]);
            step(&format!("{package} {test}, run {runs}"), command.env("PROPTEST_CASES", CASES))?;
            runs += 1;
        }
    }
    Ok(())
}
