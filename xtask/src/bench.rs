use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use comfy_table::{CellAlignment, Table};
use serde::{Deserialize, Serialize};

use crate::{cargo, root, step};

#[derive(Args)]
pub(crate) struct Options {
    /// Small data and few rounds: to see that all benches work, not for figures.
    #[arg(long)]
    quick: bool,
    /// Also write the figures to this file, as a JSON array of objects with name, value, unit, limit, ratio.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Which benches; all when none is named.
    names: Vec<String>,
}

/// One figure. Ratio is value to limit, both measured in the same run.
#[derive(Debug, Deserialize, Serialize)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
    limit: f64,
    ratio: f64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let file = root().join("target/bench-figures.json");
    if file.exists() {
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    let mut command = cargo();
    command.args(["bench", "--package", "seawall-benches", "--quiet"]).env("SEAWALL_BENCH_JSON", &file);
    if options.quick {
        command.env("SEAWALL_BENCH_QUICK", "1");
    }
    for name in &options.names {
        command.args(["--bench", name]);
    }
    step("benches", &mut command)?;
    let text =
        fs::read_to_string(&file).with_context(|| format!("read the figures in {}", file.display()))?;
    let figures: Vec<Figure> =
        serde_json::from_str(&text).with_context(|| format!("read the figures in {}", file.display()))?;
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["name", "value", "unit", "limit", "ratio"]);
    for figure in &figures {
        table.add_row([
            figure.name.clone(),
            format!("{:.1}", figure.value),
            figure.unit.clone(),
            format!("{:.1}", figure.limit),
            format!("{:.2}", figure.ratio),
        ]);
    }
    for column in [1, 3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(&figures)? + "\n")
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
