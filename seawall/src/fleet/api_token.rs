//! `seawall api-token`: with what programs speak to the API in one's name.

use clap::{Args, Subcommand};
use control::fleet::{ApiTokenInfo, MadeToken, Name, NewApiToken, ResourceId, Scope};
use serde_json::json;

use super::change::Common;
use super::{Fleet, moment, say_json};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall api-token create grafana --scope read --days 90
  seawall api-token list
  seawall api-token delete 0123456789abcdef0123456789abcdef

`seawall login` makes one for the command itself. Machines and servers come into the fleet with others: `seawall token`.")]
pub(crate) struct ApiTokenOptions {
    #[command(subcommand)]
    command: ApiTokenCommand,
}

#[derive(Debug, Subcommand)]
enum ApiTokenCommand {
    /// One's own
    #[command(after_help = "Example:\n  seawall api-token list --json")]
    List(Common),
    /// Make one; its secret is shown this once
    #[command(
        after_help = "Example:\n  seawall api-token create grafana --scope read --days 90 --json | jq -r .token"
    )]
    Create {
        /// What it is for
        name: Name,
        /// What it may be used for, within one's role: read, operate, enrol, administer
        #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',', default_value = "read")]
        scopes: Vec<Scope>,
        /// How many days it lasts
        #[arg(long, value_name = "N", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=366))]
        days: u32,
        #[command(flatten)]
        common: Common,
    },
    /// Delete one of one's own
    #[command(after_help = "Example:\n  seawall api-token delete 0123456789abcdef0123456789abcdef")]
    Delete {
        /// Which, as `seawall api-token list` shows it
        id: ResourceId,
        #[command(flatten)]
        common: Common,
    },
}

impl ApiTokenOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            ApiTokenCommand::List(common)
            | ApiTokenCommand::Create { common, .. }
            | ApiTokenCommand::Delete { common, .. } => common.json,
        }
    }
}

pub(crate) async fn run(options: &ApiTokenOptions) -> anyhow::Result<()> {
    match &options.command {
        ApiTokenCommand::List(common) => {
            let tokens: Vec<ApiTokenInfo> = Fleet::open(&common.place)?.get("/tokens").await?;
            match common.json {
                true => say_json(&json!({ "tokens": tokens })),
                false => Ok(text::say(&render(&tokens))?),
            }
        }
        ApiTokenCommand::Create { name, scopes, days, common } => {
            let asked = NewApiToken { name: name.clone(), scopes: scopes.clone(), days: *days };
            let made: MadeToken = Fleet::open(&common.place)?.post("/tokens", &asked).await?;
            match common.json {
                true => say_json(&made),
                false => Ok(text::say(&format!(
                    "{}\nGood until {}. It is to be sent as `Authorization: Bearer ...`.\n",
                    made.token,
                    moment(made.info.expires)
                ))?),
            }
        }
        ApiTokenCommand::Delete { id, common } => {
            Fleet::open(&common.place)?.delete(&format!("/tokens/{id}")).await?;
            match common.json {
                true => say_json(&json!({ "deleted": id })),
                false => Ok(text::say(&format!("Token {id} is gone.\n"))?),
            }
        }
    }
}

fn render(tokens: &[ApiTokenInfo]) -> String {
    if tokens.is_empty() {
        return "You have none.\n".to_owned();
    }
    let mut table = text::table(&["Token", "For", "May", "Made", "Good until"], &[]);
    for token in tokens {
        let scopes: Vec<&str> = token.scopes.iter().map(|scope| scope.as_str()).collect();
        table.add_row([
            token.id.to_string(),
            token.name.to_string(),
            scopes.join(", "),
            moment(token.created),
            moment(token.expires),
        ]);
    }
    format!("{table}\n")
}
