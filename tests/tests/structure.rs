//! What the tree must be: edges between crates as docs/ARCHITECTURE.md allows them, generated files as their source gives them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a directory of the checkout")
}

fn allowed() -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let text = std::fs::read_to_string(checkout().join("docs/ARCHITECTURE.md"))?;
    let section = text.split("## Allowed edges").nth(1).context("a section on allowed edges")?;
    let rows = section.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    Ok(rows
        .take_while(|line| line.starts_with('|'))
        .filter_map(|line| {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let (name, edges) = (cells.next()?, cells.next()?);
            let edges =
                edges.split(',').map(str::trim).filter(|edge| *edge != "-").map(str::to_owned).collect();
            Some((name.to_owned(), edges))
        })
        .collect())
}

#[test]
fn crates_use_only_what_the_table_allows() -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(checkout())
        .output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("packages")?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let allowed = allowed()?;
    // These see everything, and nothing else sees them.
    let free = ["seawall-tests", "seawall-benches", "xtask"];
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a name")?;
        let mut used = BTreeSet::new();
        for dependency in package["dependencies"].as_array().context("dependencies")? {
            let dependency_name = dependency["name"].as_str().context("a name")?;
            if ours.contains(dependency_name) && dependency["kind"].as_str() != Some("dev") {
                used.insert(dependency_name.to_owned());
            }
        }
        if free.contains(&name) {
            continue;
        }
        for outsider in used.iter().filter(|used| free.contains(&used.as_str())) {
            wrong.push(format!("{name} uses {outsider}, which nothing may use"));
        }
        let Some(edges) = allowed.get(name) else {
            wrong.push(format!("{name} is not in the table"));
            continue;
        };
        for edge in used.difference(edges) {
            wrong.push(format!("{name} uses {edge}, which the table does not allow"));
        }
    }
    for name in allowed.keys().filter(|name| !ours.contains(name.as_str())) {
        wrong.push(format!("the table names {name}, which does not exist"));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The committed eBPF object is what its source gives.
#[test]
fn the_committed_object_is_what_its_source_gives() -> anyhow::Result<()> {
    let noted = std::fs::read_to_string(checkout().join("crates/capture/bpf/capture.bpf.compiler"))?;
    let here = Command::new("clang").arg("--version").output().map(|output| {
        String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim().to_owned()
    });
    match here {
        Ok(here) if here == noted.trim() => {}
        other => {
            let why = format!("it needs {}, here is {other:?}", noted.trim());
            seawall_tests::cannot_run("the_committed_object_is_what_its_source_gives", &why);
            return Ok(());
        }
    }
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "xtask", "--", "bpf", "--check"])
        .current_dir(checkout())
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Examples in documents are run where there are any. To look for them elsewhere takes minutes and finds nothing, so libraries without
/// one say `doctest = false`; this sees one that gets its first.
#[test]
fn examples_in_documents_are_run() -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(checkout())
        .output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let (mut run, mut wrong) = (0, Vec::new());
    for package in metadata["packages"].as_array().context("packages")? {
        let targets = package["targets"].as_array().context("targets")?;
        let Some(library) = targets.iter().find(|target| target["kind"][0] == "lib") else { continue };
        let root = Path::new(library["src_path"].as_str().context("a path")?);
        let has = has_examples(root.parent().context("a library is in a directory")?)?;
        let looked_for = library["doctest"] == true;
        run += usize::from(has && looked_for);
        if has != looked_for {
            wrong.push(format!("{}: examples {has}, doctest = {looked_for}", package["name"]));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(run > 0, "there are some");
    Ok(())
}

fn has_examples(dir: &Path) -> anyhow::Result<bool> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let found = match path.is_dir() {
            true => has_examples(&path)?,
            false if path.extension().is_none_or(|extension| extension != "rs") => false,
            false => {
                let text = std::fs::read_to_string(&path)?;
                let marks = text
                    .lines()
                    .map(str::trim)
                    .filter_map(|line| line.strip_prefix("/// ```").or_else(|| line.strip_prefix("//! ```")));
                // Every second one ends a block.
                marks.step_by(2).any(|kind| kind != "text")
            }
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}
