//! `seawall alert`: what is wrong in the fleet, and who is told of it.

use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use control::fleet::{AlertInfo, AlertSettings};
use hyper::Method;
use serde_json::{Value, json};

use super::{Fleet, ProfilePlace, advise, moment, say_json};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall alert list
  seawall alert settings --json | tee alerts.json
  seawall alert settings --from alerts.json
  seawall alert test")]
pub(crate) struct AlertOptions {
    #[command(subcommand)]
    command: AlertCommand,
}

#[derive(Debug, Subcommand)]
enum AlertCommand {
    /// What is wrong now
    #[command(after_help = "Examples:
  seawall alert list
  seawall alert list --all
  seawall alert list --json | jq -r '.alerts[].message'")]
    List {
        /// Those that are over, too
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        common: Common,
    },
    /// When somebody is told of what, and who; with --from a file with other settings
    #[command(after_help = "Examples:
  seawall alert settings
  seawall alert settings --json | tee alerts.json
  seawall alert settings --from alerts.json

What is left out of the file has its default. A mail password that is left out stays as it is, for the same server and user.")]
    Settings {
        /// File with the settings as --json shows them; - is standard input
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// Send a test message to everybody who is told
    #[command(after_help = "Example:\n  seawall alert test")]
    Test(Common),
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    place: ProfilePlace,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

impl AlertOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            AlertCommand::List { common, .. }
            | AlertCommand::Settings { common, .. }
            | AlertCommand::Test(common) => common.json,
        }
    }
}

pub(crate) async fn run(options: &AlertOptions) -> anyhow::Result<()> {
    match &options.command {
        AlertCommand::List { all, common } => {
            let fleet = Fleet::open(&common.place)?;
            let mut alerts: Vec<AlertInfo> = fleet.get("/alerts").await?;
            alerts.retain(|alert| *all || alert.cleared.is_none());
            match common.json {
                true => say_json(&json!({ "alerts": alerts })),
                false => Ok(text::say(&render(&alerts))?),
            }
        }
        AlertCommand::Settings { from: None, common } => {
            let settings: AlertSettings = Fleet::open(&common.place)?.get("/settings/alerts").await?;
            match common.json {
                true => say_json(&settings),
                false => Ok(text::say(&render_settings(&settings))?),
            }
        }
        AlertCommand::Settings { from: Some(path), common } => {
            let fleet = Fleet::open(&common.place)?;
            let read = || -> anyhow::Result<AlertSettings> {
                let mut text = String::new();
                match path.as_os_str() == "-" {
                    true => std::io::stdin().read_to_string(&mut text)?,
                    false => std::fs::File::open(path)?.read_to_string(&mut text)?,
                };
                Ok(serde_json::from_str(&text)?)
            };
            let settings = read().with_context(|| format!("read settings from {}", path.display()))?;
            let put = fleet.client().call::<_, Value>(Method::PUT, "/settings/alerts", Some(&settings));
            put.await.map_err(advise)?;
            match common.json {
                true => say_json(&json!({ "changed": true })),
                false => Ok(text::say("Changed. Now: seawall alert test\n")?),
            }
        }
        AlertCommand::Test(common) => {
            let fleet = Fleet::open(&common.place)?;
            fleet.client().post::<_, Value>("/alerts/test", &Value::Null).await.map_err(advise)?;
            match common.json {
                true => say_json(&json!({ "sent": true })),
                false => {
                    Ok(text::say("On its way. When it does not arrive, the config server's log says why.\n")?)
                }
            }
        }
    }
}

fn render(alerts: &[AlertInfo]) -> String {
    if alerts.is_empty() {
        return "Nothing is wrong.\n".to_owned();
    }
    let mut table = text::table(&["Since", "How", "What", "What to do"], &[]);
    for alert in alerts {
        let (how, mend) = match alert.cleared {
            Some(cleared) => (format!("over since {}", moment(cleared)), String::new()),
            None => (alert.severity.clone(), alert.mend.clone()),
        };
        table.add_row([moment(alert.raised), how, alert.message.clone(), mend]);
    }
    format!("{table}\n")
}

fn render_settings(settings: &AlertSettings) -> String {
    let mut table = text::table(&["Told of", "When"], &[]);
    let after = |seconds: u64| match seconds {
        0 => "never".to_owned(),
        seconds => format!("older than {seconds} s"),
    };
    table.add_row(["newest recovery point".to_owned(), "older than the group's policy allows".to_owned()]);
    table
        .add_row(["newest application-consistent point".to_owned(), after(settings.application_point_age_s)]);
    table.add_row(["cache".to_owned(), format!("more than {} % full", settings.cache_used_percent)]);
    table.add_row(["store".to_owned(), format!("less than {} % free", settings.store_free_percent)]);
    table.add_row(["certificate".to_owned(), format!("ends within {} days", settings.certificate_days)]);
    let mut told: Vec<String> = settings.webhooks.iter().map(|webhook| webhook.url.clone()).collect();
    told.extend(settings.mail.iter().map(|mail| {
        format!("{} through {}:{} ({})", mail.to.join(", "), mail.server, mail.port, mail.security.as_str())
    }));
    if told.is_empty() {
        told.push("nobody but the log and the events".to_owned());
    }
    format!("{table}\nWho is told: {}\n", told.join("; "))
}
