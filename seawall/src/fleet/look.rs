//! `seawall overview` and `seawall audit`.

use std::time::Duration;

use clap::Args;
use control::fleet::{AuditEntry, Overview, Page};
use serde_json::json;

use super::change::{Common, Watched};
use super::{Fleet, moment, say_json};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall overview
  seawall overview --watch
  seawall overview --json | jq .groups_recoverable")]
pub(crate) struct OverviewOptions {
    #[command(flatten)]
    watched: Watched,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall audit
  seawall audit --last 200 --json | jq -r '.entries[] | [.who, .act, .status] | @tsv'

For administrators: log in with `--scope administer` for it.")]
pub(crate) struct AuditOptions {
    /// The newest so many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    last: u16,
    #[command(flatten)]
    common: Common,
}

impl OverviewOptions {
    pub(crate) fn json(&self) -> bool {
        self.watched.common.json
    }
}

impl AuditOptions {
    pub(crate) fn json(&self) -> bool {
        self.common.json
    }
}

pub(crate) async fn overview(options: &OverviewOptions) -> anyhow::Result<Exit> {
    let fleet = Fleet::open(&options.watched.common.place)?;
    options.watched.show(|| fleet.get::<Overview>("/overview"), render).await
}

pub(crate) async fn audit(options: &AuditOptions) -> anyhow::Result<Exit> {
    let AuditOptions { last, common } = options;
    let entries: Page<AuditEntry> = Fleet::open(&common.place)?.get(&format!("/audit?limit={last}")).await?;
    match common.json {
        true => say_json(&json!({ "entries": entries.items }))?,
        false => text::say(&render_audit(&entries.items))?,
    }
    Ok(Exit::Done)
}

fn render(overview: &Overview) -> String {
    let worst = overview.worst_rpo_ms.map_or("-".to_owned(), |ms| {
        text::span(Duration::from_millis(u64::try_from(ms).unwrap_or_default()))
    });
    let mut table = text::table(&["Now", ""], &[1]);
    for (what, count) in [
        ("machines", overview.machines.to_string()),
        ("protected groups", overview.groups.to_string()),
        ("  that could be recovered", overview.groups_recoverable.to_string()),
        ("  whose state needs a person", overview.groups_in_trouble.to_string()),
        ("oldest newest point", worst),
        ("silent parts", overview.silent_parts.to_string()),
        ("jobs under way", overview.jobs.to_string()),
        ("acts that wait for a second person", overview.approvals.to_string()),
    ] {
        table.add_row([what.to_owned(), count]);
    }
    format!("{table}\n")
}

fn render_audit(entries: &[AuditEntry]) -> String {
    let mut table = text::table(&["When", "Who", "From", "Act", "On what", "Result"], &[]);
    for entry in entries {
        let result = match (entry.status, entry.problem.as_str()) {
            (0, _) => "not known".to_owned(),
            (status, "") => format!("done ({status})"),
            (status, problem) => format!("{problem} ({status})"),
        };
        table.add_row([
            moment(entry.time),
            entry.who.clone(),
            entry.address.clone(),
            entry.act.clone(),
            entry.what.clone(),
            result,
        ]);
    }
    format!("{table}\n")
}
