//! `seawall run`: one part, or all of them in one process.

use crate::config::Place;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use seawall_agent::{Agent, AgentConfig};
use seawall_process_server::ProcessServer;
use seawall_target_server::TargetServer;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  All parts in one process, as root for the disks:
    seawall run --dir /etc/seawall
  Only the target server:
    seawall run --dir /etc/seawall --role target-server

Ends in order on SIGINT and SIGTERM.")]
pub(crate) struct RunOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Which part
    #[arg(long, value_enum, default_value_t)]
    pub(crate) role: RunRole,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunRole {
    /// Captures the disks of this machine
    Agent,
    /// Keeps changes durably and forwards them
    ProcessServer,
    /// Applies changes and serves recovery points
    TargetServer,
    /// All three
    #[default]
    All,
}

pub(crate) async fn run(options: &RunOptions) -> anyhow::Result<()> {
    // Before anything else, so that a signal during a long start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let parts = Parts::start(&options.place.find()?, options.role).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    parts.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

/// What runs in this process.
struct Parts {
    agent: Option<Agent>,
    process: Option<seawall_process_server::Handle>,
    target: Option<seawall_target_server::Handle>,
}

impl Parts {
    /// Starts what the role asks for, from the end of the way to its beginning, so that each finds the next one there.
    async fn start(dir: &Path, role: RunRole) -> anyhow::Result<Parts> {
        let wanted = |part| role == part || role == RunRole::All;
        let mut parts = Parts { agent: None, process: None, target: None };
        match parts.start_wanted(dir, wanted).await {
            Ok(()) => Ok(parts),
            Err(error) => {
                // What has started ends in order.
                parts.shutdown().await;
                Err(error)
            }
        }
    }

    async fn start_wanted(&mut self, dir: &Path, wanted: impl Fn(RunRole) -> bool) -> anyhow::Result<()> {
        if wanted(RunRole::TargetServer) {
            let config = seawall_target_server::Config::load(&config_file(dir, "target-server")?)?;
            self.target = Some(TargetServer::start(config).await.context("start the target server")?);
        }
        if wanted(RunRole::ProcessServer) {
            let config = seawall_process_server::Config::load(&config_file(dir, "process-server")?)?;
            self.process = Some(ProcessServer::start(config).await.context("start the process server")?);
        }
        if wanted(RunRole::Agent) {
            let config = AgentConfig::load(&config_file(dir, "agent")?)?;
            self.agent = Some(Agent::start(config).context("start the agent")?);
        }
        Ok(())
    }

    /// Ends from the beginning of the way to its end, so that what is under way can still arrive.
    async fn shutdown(self) {
        if let Some(agent) = self.agent
            && let Err(error) = tokio::task::spawn_blocking(move || agent.shutdown()).await
        {
            tracing::error!(%error, "stop the agent");
        }
        if let Some(process) = self.process {
            let closed = process.shutdown().await.context("close the process server's cache");
            if let Err(error) = closed {
                tracing::error!(error = format!("{error:#}"), "stop the process server");
            }
        }
        if let Some(target) = self.target {
            target.shutdown().await;
        }
    }
}

/// DIR/PART/PART.toml.
fn config_file(dir: &Path, part: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(part).join(format!("{part}.toml"));
    ensure!(
        path.is_file(),
        "run the {part}: there is no {}; `seawall init` makes it, and `--role` chooses which parts run here",
        path.display()
    );
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_part_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (role, part) in [(RunRole::Agent, "agent"), (RunRole::All, "target-server")] {
            let error = Parts::start(dir.path(), role).await.err().unwrap();
            assert!(error.to_string().contains(&format!("{part}/{part}.toml")), "{error}");
            assert!(error.to_string().contains("seawall init"), "{error}");
        }
    }
}
