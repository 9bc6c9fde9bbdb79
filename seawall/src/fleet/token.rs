//! `seawall token`: what parts enrol with.

use clap::{Args, Subcommand};
use control::fleet::{EnrolTokenInfo, MadeEnrolToken, Name, NewEnrolToken, PartRole, ResourceId};

use super::{Fleet, ProfilePlace, moment, say_json};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  For one machine:
    seawall token create --name web
  For a target server, within the next ten minutes:
    seawall token create --role target-server --minutes 10
  seawall token list
  seawall token delete 0123456789abcdef0123456789abcdef")]
pub(crate) struct TokenOptions {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make one, with which one machine or server comes into the fleet
    #[command(after_help = "Examples:
  seawall token create
  seawall token create --role process-server --json | jq -r .token

It is shown this once, and good for one part. It says by what the config server is known, so that nobody can answer in its place.")]
    Create(Create),
    /// List those that are good still, and who has used them
    #[command(after_help = "Example:\n  seawall token list --json")]
    List(Common),
    /// Delete one, so that nobody can enrol with it
    #[command(after_help = "Example:\n  seawall token delete 0123456789abcdef0123456789abcdef")]
    Delete {
        /// Which, as `seawall token list` shows it
        id: ResourceId,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// What enrols: agent, process-server or target-server
    #[arg(long, value_name = "PART", default_value = "agent")]
    role: PartRole,
    /// Its name in the fleet [default: it says one itself]
    #[arg(long)]
    name: Option<Name>,
    /// How long it is good, in minutes: at most a week
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=10_080))]
    minutes: u32,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    place: ProfilePlace,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

impl TokenOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            TokenCommand::Create(Create { common, .. })
            | TokenCommand::List(common)
            | TokenCommand::Delete { common, .. } => common.json,
        }
    }
}

pub(crate) async fn run(options: &TokenOptions) -> anyhow::Result<()> {
    match &options.command {
        TokenCommand::Create(create) => {
            let fleet = Fleet::open(&create.common.place)?;
            let asked =
                NewEnrolToken { role: create.role, name: create.name.clone(), minutes: create.minutes };
            let made: MadeEnrolToken = fleet.post("/enrol-tokens", &asked).await?;
            if create.common.json {
                return say_json(&made);
            }
            Ok(text::say(&render_made(&made, &fleet.client().server().to_string()))?)
        }
        TokenCommand::List(common) => {
            let tokens: Vec<EnrolTokenInfo> = Fleet::open(&common.place)?.get("/enrol-tokens").await?;
            if common.json {
                return say_json(&serde_json::json!({ "tokens": tokens }));
            }
            Ok(text::say(&render(&tokens))?)
        }
        TokenCommand::Delete { id, common } => {
            Fleet::open(&common.place)?.delete(&format!("/enrol-tokens/{id}")).await?;
            if common.json {
                return say_json(&serde_json::json!({ "deleted": id }));
            }
            Ok(text::say(&format!("Token {id} is gone.\n"))?)
        }
    }
}

fn render_made(made: &MadeEnrolToken, server: &str) -> String {
    let (role, token) = (made.info.role, &made.token);
    let of = made.info.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let more = match role {
        PartRole::Agent => String::new(),
        PartRole::ProcessServer => {
            " --advertise HOST:7440 --config /etc/seawall/process-server.toml".to_owned()
        }
        PartRole::TargetServer => {
            " --advertise HOST:7441 --config /etc/seawall/target-server.toml".to_owned()
        }
    };
    format!(
        "A token for one {role}{of}, good until {}. There:\n  seawall-{role} enroll --server {server}{more} --token {token}\n",
        moment(made.info.expires)
    )
}

fn render(tokens: &[EnrolTokenInfo]) -> String {
    if tokens.is_empty() {
        return "There is no token; `seawall token create` makes one.\n".to_owned();
    }
    let mut table = text::table(&["Token", "For", "Good until", "Made by", "Used by"], &[]);
    for token in tokens {
        let name = token.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
        table.add_row([
            token.id.to_string(),
            format!("{}{name}", token.role),
            moment(token.expires),
            token.created_by.clone(),
            token.used_by.as_ref().map_or("-".to_owned(), Name::to_string),
        ]);
    }
    format!("{table}\n")
}
