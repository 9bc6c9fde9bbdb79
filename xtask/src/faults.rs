//! `cargo xtask faults`: the rows of the table in docs/reliability.md, each a test.

use std::collections::BTreeSet;

use anyhow::Context;
use clap::Args;

use crate::{cargo, programs, root, step};

#[derive(Args)]
pub(crate) struct Options {
    /// Decides what chance decides; the seed of a run is printed by it.
    #[arg(long)]
    seed: Option<u64>,
    /// Only say which rows there are.
    #[arg(long)]
    list: bool,
    /// Which rows, by name; all when none is named.
    rows: Vec<String>,
}

/// A row of the table.
pub(crate) struct Row {
    pub(crate) name: String,
    fault: String,
    needs: String,
    pub(crate) package: String,
    pub(crate) test: String,
}

/// The table as it is in the document.
pub(crate) fn table(text: &str) -> anyhow::Result<Vec<Row>> {
    let section =
        text.split("\n## Faults\n").nth(1).context("docs/reliability.md has no section on faults")?;
    let lines = section.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    lines
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [name, fault, needs, test] = cells[..] else {
                anyhow::bail!("a row of the table of faults has {} columns: {line}", cells.len());
            };
            let (package, test) =
                test.split_once(' ').with_context(|| format!("package and test in {line}"))?;
            Ok(Row {
                name: name.to_owned(),
                fault: fault.to_owned(),
                needs: needs.to_owned(),
                package: package.to_owned(),
                test: test.to_owned(),
            })
        })
        .collect()
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let rows = table(&std::fs::read_to_string(root().join("docs/reliability.md"))?)?;
    let known: BTreeSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    if let Some(unknown) = options.rows.iter().find(|name| !known.contains(name.as_str())) {
        anyhow::bail!(
            "no row is called {unknown:?}; there are: {}",
            known.into_iter().collect::<Vec<_>>().join(", ")
        );
    }
    let wanted: Vec<&Row> =
        rows.iter().filter(|row| options.rows.is_empty() || options.rows.contains(&row.name)).collect();
    for row in &wanted {
        println!("{}: {}; needs: {} ({} {})", row.name, row.fault, row.needs, row.package, row.test);
    }
    if options.list {
        return Ok(());
    }
    let tests: Vec<String> = wanted
        .iter()
        .map(|row| format!("(package({}) & test(/(^|::){}$/))", row.package, row.test))
        .collect();
    let seed = options.seed.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |now| now.as_micros() as u64 % 1_000_000)
    });
    println!("seed {seed}; the same again: cargo xtask faults --seed {seed} {}", options.rows.join(" "));
    programs()?;
    let mut command = cargo();
    command.args(["nextest", "run", "--workspace", "-E", &tests.join(" + ")]);
    step("faults", command.env("SEAWALL_SEED", seed.to_string()))
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;

    /// Each row has a name of its own, and a test that there is.
    #[test]
    fn every_row_is_a_test() -> anyhow::Result<()> {
        let rows = table(&std::fs::read_to_string(root().join("docs/reliability.md"))?)?;
        ensure!(rows.len() > 30, "{} rows", rows.len());
        let names: BTreeSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        ensure!(names.len() == rows.len(), "two rows have one name");
        for row in &rows {
            let dir = ["crates/", "", "tests"].into_iter().find_map(|above| {
                let name = row.package.trim_start_matches("seawall-");
                let dir = if above == "tests" { root().join("tests") } else { root().join(above).join(name) };
                dir.join("Cargo.toml").exists().then_some(dir)
            });
            let dir = dir.with_context(|| format!("row {}: no package {}", row.name, row.package))?;
            ensure!(
                has(&dir, &format!("fn {}(", row.test))?,
                "row {}: there is no test {}",
                row.name,
                row.test
            );
        }
        Ok(())
    }

    fn has(dir: &std::path::Path, text: &str) -> anyhow::Result<bool> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let found = match path.is_dir() {
                true => has(&path, text)?,
                false => {
                    path.extension().is_some_and(|extension| extension == "rs")
                        && std::fs::read_to_string(&path)?.contains(text)
                }
            };
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
