//! `seawall status`: what both servers say, put together for each group.

mod gather;
mod render;

use crate::config::Place;
use clap::Args;
use std::io::IsTerminal;
use std::time::Duration;

use block::UnixNanos;
use control::ServerStatus;
use wire::Role;

use crate::ask::Servers;
use crate::exit::Exit;
use crate::status::gather::Overview;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall status --dir /etc/seawall
  seawall status --watch
  seawall status --json | jq '.groups[].lag_seconds'

Exit status 0 when every server answered, 5 when one did not.")]
pub(crate) struct StatusOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Show it again every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) watch: Option<u64>,
    /// One JSON object (with --watch: one a line) instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

/// Fails when a server did not answer; the overview says which.
pub(crate) async fn run(options: &StatusOptions) -> anyhow::Result<Exit> {
    let servers = Servers::load(&options.place)?;
    loop {
        let overview = ask(&servers).await;
        let mut shown = match options.json {
            true => format!("{}\n", serde_json::to_string(&overview)?),
            false => render::overview(&overview),
        };
        if !options.json && options.watch.is_some() && std::io::stdout().is_terminal() {
            // Clear, and go to the corner.
            shown.insert_str(0, "\x1b[2J\x1b[H");
        }
        text::say(&shown)?;
        match options.watch {
            None if overview.errors.is_empty() => return Ok(Exit::Done),
            None => return Ok(Exit::Unreachable),
            Some(seconds) => tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Done),
            },
        }
    }
}

/// Asks the target server first: what it has applied was cached before, so that the positions are in order.
async fn ask(servers: &Servers) -> Overview {
    let mut errors = Vec::new();
    let mut target = None;
    match servers.status(Role::TargetServer).await {
        Ok(ServerStatus::TargetServer(status)) => target = Some(status),
        Ok(ServerStatus::ProcessServer(_)) => {
            errors.push("ask the target server: it is a process server".to_owned())
        }
        Err(error) => errors.push(format!("{error:#}")),
    }
    let mut process = None;
    match servers.status(Role::ProcessServer).await {
        Ok(ServerStatus::ProcessServer(status)) => process = Some(status),
        Ok(ServerStatus::TargetServer(_)) => {
            errors.push("ask the process server: it is a target server".to_owned())
        }
        Err(error) => errors.push(format!("{error:#}")),
    }
    gather::overview(process, target, errors, UnixNanos::now())
}
