//! `seawall server list`, `show` and `remove`: process and target servers of the fleet.

use block::ByteCount;
use clap::{Args, Subcommand};
use control::fleet::{PartRole, ServerInfo};
use serde::Serialize;

use super::change::{Certain, Common, Watched};
use super::{Fleet, ago, moment, not_there};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Process and target servers of the fleet, and how each is
    #[command(after_help = "Examples:\n  seawall server list\n  seawall server list --watch")]
    List(Watched),
    /// One of them
    #[command(after_help = "Example:\n  seawall server show dr")]
    Show {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        watched: Watched,
    },
    /// Take one that serves no group out of the fleet, and revoke its certificates
    #[command(after_help = "Example:\n  seawall server remove dr --yes")]
    Remove {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        certain: Certain,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Server, by name or id
    #[arg(value_name = "SERVER")]
    server: String,
    /// Where a process server and a target server have the same name: process-server or target-server
    #[arg(long, value_name = "PART")]
    role: Option<PartRole>,
}

#[derive(Debug, Serialize)]
struct Listed {
    servers: Vec<ServerInfo>,
}

impl ServerCommand {
    pub(crate) fn json(&self) -> bool {
        match self {
            ServerCommand::List(watched) | ServerCommand::Show { watched, .. } => watched.common.json,
            ServerCommand::Remove { common, .. } => common.json,
        }
    }
}

fn collection(role: PartRole) -> &'static str {
    if role == PartRole::ProcessServer { "/process-servers" } else { "/target-servers" }
}

async fn all(fleet: &Fleet) -> anyhow::Result<Vec<ServerInfo>> {
    let mut servers: Vec<ServerInfo> = fleet.all("/process-servers").await?;
    servers.extend(fleet.all::<ServerInfo>("/target-servers").await?);
    Ok(servers)
}

impl Which {
    /// Its place in the API, and its name.
    async fn find(&self, fleet: &Fleet) -> anyhow::Result<(String, String)> {
        let servers = all(fleet).await?;
        let named: Vec<&ServerInfo> = servers
            .iter()
            .filter(|server| self.role.is_none_or(|role| role == server.role))
            .filter(|server| server.name.as_str() == self.server || server.id.as_str() == self.server)
            .collect();
        match named[..] {
            [server] => Ok((format!("{}/{}", collection(server.role), server.id), server.name.to_string())),
            [] => Err(not_there("server", &self.server, servers.iter().map(|server| server.name.as_str()))),
            _ => anyhow::bail!(
                "find server {}: there is a process server and a target server of that name; say which with --role",
                self.server
            ),
        }
    }
}

pub(crate) async fn run(command: &ServerCommand) -> anyhow::Result<Exit> {
    match command {
        ServerCommand::List(watched) => {
            let fleet = Fleet::open(&watched.common.place)?;
            let look = || async { Ok(Listed { servers: all(&fleet).await? }) };
            watched.show(look, |listed| render(&listed.servers)).await
        }
        ServerCommand::Show { which, watched } => {
            let fleet = Fleet::open(&watched.common.place)?;
            let (path, _) = which.find(&fleet).await?;
            watched.show(|| fleet.get::<ServerInfo>(&path), render_one).await
        }
        ServerCommand::Remove { which, certain, common } => {
            let fleet = Fleet::open(&common.place)?;
            let (path, name) = which.find(&fleet).await?;
            certain.ask("remove server", &name, "Its certificates will be revoked.")?;
            fleet.destroy(&path, &name).await?.say(common, &format!("The server {name} is removed."))
        }
    }
}

fn room(server: &ServerInfo) -> String {
    server.capacity.map_or("-".to_owned(), |capacity| {
        format!("{} of {}", ByteCount(capacity.bytes_free), ByteCount(capacity.bytes_total))
    })
}

fn render(servers: &[ServerInfo]) -> String {
    if servers.is_empty() {
        return "No server has enrolled; `seawall token create --role target-server` says how.\n".to_owned();
    }
    let mut table = text::table(
        &["Server", "What", "Address", "State", "Last report", "Free", "Groups", "What to do"],
        &[5, 6],
    );
    for server in servers {
        table.add_row([
            server.name.to_string(),
            server.role.to_string(),
            server.address.clone(),
            server.state.to_string(),
            server.seen.map_or("never".to_owned(), ago),
            room(server),
            server.groups.to_string(),
            server.trouble.clone().unwrap_or_else(|| server.what_to_do.clone()),
        ]);
    }
    format!("{table}\n")
}

fn render_one(server: &ServerInfo) -> String {
    let mut shown = format!(
        "{} {} ({}) at {}, version {}, last report {}\nState: {}: {}\nFree: {}; groups: {}; certificate good until {}\n",
        server.role,
        server.name,
        server.id,
        server.address,
        server.version,
        server.seen.map_or("never".to_owned(), ago),
        server.state,
        server.meaning,
        room(server),
        server.groups,
        moment(server.certificate_expires)
    );
    if !server.what_to_do.is_empty() {
        shown += &format!("To do: {}\n", server.what_to_do);
    }
    if let Some(trouble) = &server.trouble {
        shown += &format!("Trouble: {trouble}\n");
    }
    shown
}
