//! `seawall setting`: what holds for the whole fleet.

use clap::{Args, Subcommand};
use control::fleet::Settings;
use hyper::Method;

use super::change::Common;
use super::{Fleet, say_json};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall setting show
  seawall setting change --second-person true

Who is told of what is wrong is in `seawall alert settings`.")]
pub(crate) struct SettingOptions {
    #[command(subcommand)]
    command: SettingCommand,
}

#[derive(Debug, Subcommand)]
enum SettingCommand {
    /// As they are
    #[command(after_help = "Example:\n  seawall setting show --json")]
    Show(Common),
    /// Change them
    #[command(after_help = "Example:\n  seawall setting change --second-person true")]
    Change {
        /// Whether deleting and shortening retention need a second person
        #[arg(long, value_name = "true|false", action = clap::ArgAction::Set)]
        second_person: bool,
        #[command(flatten)]
        common: Common,
    },
}

impl SettingOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            SettingCommand::Show(common) | SettingCommand::Change { common, .. } => common.json,
        }
    }
}

pub(crate) async fn run(options: &SettingOptions) -> anyhow::Result<Exit> {
    match &options.command {
        SettingCommand::Show(common) => {
            let settings: Settings = Fleet::open(&common.place)?.get("/settings").await?;
            match common.json {
                true => say_json(&settings)?,
                false => text::say(match settings.second_person {
                    true => "Deleting and shortening retention need a second person.\n",
                    false => "Deleting and shortening retention need no second person.\n",
                })?,
            }
            Ok(Exit::Done)
        }
        SettingCommand::Change { second_person, common } => {
            let asked = Settings { second_person: *second_person };
            let acted = Fleet::open(&common.place)?.act(Method::PUT, "/settings", &asked).await?;
            acted.say(common, "Changed.")
        }
    }
}
