//! What is said of the command line elsewhere: completions for shells, manual pages, docs/cli.md. All of it is made of the
//! command line itself.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall completions bash | sudo tee /usr/share/bash-completion/completions/seawall
  seawall completions zsh")]
pub(crate) struct CompletionsOptions {
    /// Which
    shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  seawall man /usr/local/share/man/man1

One page for each command: seawall.1, seawall-machine-list.1 and so on.")]
pub(crate) struct ManOptions {
    /// Directory to write to; made when it is not there
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(crate) fn completions(options: &CompletionsOptions) -> anyhow::Result<()> {
    let mut written = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "seawall", &mut written);
    Ok(text::say(&String::from_utf8(written).context("write the completions")?)?)
}

pub(crate) fn manuals(options: &ManOptions) -> anyhow::Result<()> {
    let dir = &options.dir;
    std::fs::create_dir_all(dir).with_context(|| format!("make directory {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("write manual pages to {}", dir.display()))?;
    let pages = count(&Cli::command());
    Ok(text::say(&format!("{pages} manual pages in {}\n", dir.display()))?)
}

/// A command with those within it.
fn count(command: &clap::Command) -> usize {
    1 + shown(command).map(count).sum::<usize>()
}

/// The commands within a command that are for people.
fn shown(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help")
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::exit::Exit;

    fn section(text: &mut String, command: &mut clap::Command, name: &str) {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let _ = write!(text, "\n## {name}\n\n{about}\n");
        command.set_bin_name(name);
        let help = command.clone().term_width(0).max_term_width(0).render_help().to_string();
        // What is about comes first in the help, too.
        let help = help.split_once("\n\n").map_or(help.as_str(), |(_, rest)| rest);
        let help: Vec<&str> = help.lines().map(str::trim_end).collect();
        let _ = write!(text, "\n```\n{}\n```\n", help.join("\n").trim());
        let inner: Vec<String> = shown(command).map(|inner| inner.get_name().to_owned()).collect();
        for inner_name in inner {
            if let Some(inner) = command.find_subcommand_mut(&inner_name) {
                section(text, inner, &format!("{name} {inner_name}"));
            }
        }
    }

    fn document() -> String {
        let mut text = "# The operator's command\n\n\
            Made of the command line itself (`SEAWALL_WRITE_DOCUMENTS=1 cargo nextest run -p seawall document`). The same is in \
            `--help` of each command, in manual pages (`seawall man DIR`) and, as far as it goes, in completions (`seawall \
            completions SHELL`).\n\n## Exit status\n\nThe same over all commands; with `--json` an error is an object with `error` \
            and `exit`.\n\n| status | meaning |\n|---|---|\n"
            .to_owned();
        for exit in Exit::ALL {
            let _ = writeln!(text, "| {} | {} |", exit.code(), exit.meaning());
        }
        let mut command = Cli::command();
        command.build();
        section(&mut text, &mut command, "seawall");
        text
    }

    #[test]
    fn the_document_has_every_command() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
        let made = document();
        if std::env::var_os("SEAWALL_WRITE_DOCUMENTS").is_some() {
            std::fs::write(path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == made, "docs/cli.md is old: set SEAWALL_WRITE_DOCUMENTS=1 and run this again");
    }
}
