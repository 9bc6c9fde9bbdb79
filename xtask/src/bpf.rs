use std::fs;
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;

use crate::{root, step};

#[derive(Args)]
pub(crate) struct Options {
    /// Change nothing; fail when the committed object is not what the source gives.
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let dir = root().join("crates/capture/bpf");
    let object = dir.join("capture.bpf.o");
    let compiler_file = dir.join("capture.bpf.compiler");
    let compiler = compiler()?;
    let fresh = std::env::temp_dir().join(format!("seawall-capture-{}.bpf.o", std::process::id()));
    let mut clang = Command::new("clang");
    clang.current_dir(&dir).args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"]);
    // The entry macro's context argument and bpf_loop's index are given, not chosen.
    clang.args(["-Wno-unused-parameter", "-D__TARGET_ARCH_x86", "-c", "capture.bpf.c", "-o"]).arg(&fresh);
    // The object's line table names its source; without the folder's own path it is the same bytes
    // wherever the checkout stands.
    clang.arg(format!("-ffile-prefix-map={}=.", dir.display()));
    step("compile the capture program", &mut clang)?;
    // BTF stays; DWARF goes.
    step("strip it", Command::new("llvm-strip").arg("-g").arg(&fresh))?;
    let bytes = fs::read(&fresh).context("read the compiled program")?;
    fs::remove_file(&fresh).context("remove the temporary object")?;
    if !options.check {
        fs::write(&object, bytes).with_context(|| format!("write {}", object.display()))?;
        fs::write(&compiler_file, compiler + "\n").context("note the compiler")?;
        return Ok(());
    }
    let noted =
        fs::read_to_string(&compiler_file).context("read which compiler made the committed object")?;
    if noted.trim() != compiler {
        bail!("the committed object was made by {}, here is {compiler}: cannot compare", noted.trim());
    }
    if fs::read(&object).context("read the committed object")? != bytes {
        bail!("{} is not what its source gives: run `cargo xtask bpf` and commit it", object.display());
    }
    eprintln!("the committed object is what its source gives");
    Ok(())
}

fn compiler() -> anyhow::Result<String> {
    let output = Command::new("clang").arg("--version").output().context("run clang: is it installed?")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}
