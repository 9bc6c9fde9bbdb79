//! `seawall status`: what both servers say, put together for each group.

mod gather;
mod render;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use block::UnixNanos;
use control::ServerStatus;
use wire::Role;

use crate::ask::Servers;
use crate::cli::StatusOptions;
use crate::status::gather::Overview;
use crate::text;

/// Fails when a server did not answer; the overview says which.
pub(crate) async fn run(options: &StatusOptions) -> anyhow::Result<ExitCode> {
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
            None if overview.errors.is_empty() => return Ok(ExitCode::SUCCESS),
            None => return Ok(ExitCode::FAILURE),
            Some(seconds) => tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
                _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
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
