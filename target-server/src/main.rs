//! The command of the target server.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use seawall_target_server::{Config, TargetServer, verify};
use telemetry::Format;
use tokio::signal::unix::{SignalKind, signal};

/// Keeps replicas of protected machines and serves their recovery points.
#[derive(Parser)]
#[command(name = "seawall-target-server", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// What is logged: a level, or levels by module.
    #[arg(long, global = true, default_value = "info")]
    log: String,
    /// How log lines look: human or json.
    #[arg(long, global = true, default_value = "human")]
    log_format: Format,
}

const EXAMPLES: &str = "\
Examples:
  seawall-target-server check-config --config /etc/seawall/target-server.toml
  seawall-target-server run --config /etc/seawall/target-server.toml
  seawall-target-server run --config target-server.toml --log info,wire=debug --log-format json
  systemctl stop seawall-target-server && seawall-target-server verify --config /etc/seawall/target-server.toml";

#[derive(Subcommand)]
enum Command {
    /// Runs until told to stop (SIGTERM or SIGINT).
    Run {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Checks a configuration and everything that it names, and changes nothing.
    CheckConfig {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Checks every checksum of every replica's state and undo layers. The server must not run.
    Verify {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let Arguments { command, log, log_format } = Arguments::parse();
    telemetry::init(log_format, &log)?;
    match command {
        Command::Run { config } => {
            let config = Config::load(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            runtime.context("start the runtime")?.block_on(run(config))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::CheckConfig { config: path } => {
            TargetServer::check(&Config::load(&path)?)?;
            println!("{}: good", path.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Verify { config } => verify_all(&Config::load(&config)?),
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    // Before anything else, so that a signal during a long start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let server = TargetServer::start(config).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    server.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

fn verify_all(config: &Config) -> anyhow::Result<ExitCode> {
    let mut sound = true;
    for group in &config.groups {
        let report = verify(&config.data, group.id)?;
        let points = report.layers.iter().filter(|layer| layer.consistency.is_point()).count();
        println!(
            "group {}: epoch {} applied, {points} recovery points, {} undo layers",
            group.id,
            report.applied,
            report.layers.len()
        );
        for note in &report.notes {
            println!("  note: {note}");
        }
        for problem in &report.problems {
            println!("  PROBLEM: {problem}");
        }
        sound &= report.problems.is_empty();
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
