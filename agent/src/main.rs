//! `seawall-agent`: captures this machine's disks.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use seawall_agent::{Agent, AgentConfig};
use tokio::signal::unix::{SignalKind, signal};

/// Capture this machine's disks and send every change to a process server.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  seawall-agent check-config --config /etc/seawall/agent.toml
  seawall-agent run --config /etc/seawall/agent.toml
  seawall-agent run --config agent.toml --log info,capture=debug"
)]
struct Cli {
    /// What to log, as in RUST_LOG.
    #[arg(long, global = true, default_value = "info")]
    log: String,
    /// How log lines look: human or json.
    #[arg(long, global = true, default_value = "human")]
    log_format: telemetry::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Capture and deliver until stopped (SIGTERM or SIGINT).
    #[command(after_help = "Example:\n  seawall-agent run --config /etc/seawall/agent.toml")]
    Run {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Read the configuration and say what is wrong with it, or nothing.
    #[command(after_help = "Example:\n  seawall-agent check-config --config /etc/seawall/agent.toml")]
    CheckConfig {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    if let Some(code) = seawall_agent::watchdog_instead() {
        return Ok(code);
    }
    run()?;
    Ok(ExitCode::SUCCESS)
}

fn run() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Command::CheckConfig { config } => {
            AgentConfig::load(&config)?;
            println!("{}: in order", config.display());
            Ok(())
        }
        Command::Run { config } => {
            telemetry::init(cli.log_format, &cli.log)?;
            let config = AgentConfig::load(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .context("start the asynchronous runtime")?;
            runtime.block_on(async {
                let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
                let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
                let agent = Agent::start(config)?;
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                tokio::task::block_in_place(|| agent.shutdown());
                Ok(())
            })
        }
    }
}
