//! The command of the target server.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use control::fleet::{Name, PartRole};
use enrol::{FileEnrolment, ServerUrl, enrol_with_file};
use seawall_target_server::{Config, FleetTargetServer, TargetServer, verify};
use telemetry::{Format, Scraped};
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
  seawall-target-server enroll --server https://seawall.example --token TOKEN --advertise dr.example:7441 --config /etc/seawall/target-server.toml
  seawall-target-server enroll --server https://seawall.example --token TOKEN --advertise web.example:7441 --adoptable /dev/vda --config /etc/seawall/target-server.toml
  seawall-target-server check-config --config /etc/seawall/target-server.toml
  seawall-target-server run --config /etc/seawall/target-server.toml
  seawall-target-server run --config target-server.toml --log info,wire=debug --log-format json
  systemctl stop seawall-target-server && seawall-target-server verify --config /etc/seawall/target-server.toml";

#[derive(Subcommand)]
enum Command {
    /// Enrols this server with a config server, which then says which groups it serves.
    ///
    /// The key is made here and never leaves the machine. A configuration that is there must have [config_server]; one that is
    /// not there is made.
    Enroll {
        /// Where the config server is: https://HOST[:PORT].
        #[arg(long, value_name = "URL")]
        server: ServerUrl,
        /// The token that `seawall token create` made.
        #[arg(long, env = "SEAWALL_ENROL_TOKEN", hide_env_values = true)]
        token: String,
        /// Name of this server in the fleet [default: the machine's name]
        #[arg(long)]
        name: Option<Name>,
        /// Where others reach this server, HOST:PORT; it listens on this port.
        #[arg(long, value_name = "HOST:PORT")]
        advertise: String,
        /// Disk of this machine that the config server may have this server adopt, and overwrite, for a group that comes home; may be given
        /// several times. Only for a new configuration file.
        #[arg(long = "adoptable", value_name = "DISK")]
        adoptable: Vec<String>,
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Runs until told to stop (SIGTERM or SIGINT).
    Run {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
        /// Where Prometheus reads this part's figures, over plain HTTP: at /metrics. Nowhere if left out.
        #[arg(long, value_name = "HOST:PORT", env = "SEAWALL_METRICS")]
        metrics: Option<String>,
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
        Command::Enroll { server, token, name, advertise, adoptable, config } => {
            let port = advertise.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            let port = port.with_context(|| format!("use --advertise {advertise}: expected HOST:PORT"))?;
            let mut rest = format!(
                "listen = \"0.0.0.0:{port}\"\ncredentials = \"state/credentials\"\ndata = \"data\"\n"
            );
            if !adoptable.is_empty() {
                anyhow::ensure!(
                    !config.exists(),
                    "use --adoptable: {} is there already; write adoptable_devices into it",
                    config.display()
                );
                rest += &format!(
                    "# Disks that the config server may have overwritten, for a group that comes home.\nadoptable_devices = {adoptable:?}\n"
                );
            }
            let role = PartRole::TargetServer;
            let advertise = Some(advertise);
            let asked = FileEnrolment { server, token, role, name, config: config.clone(), rest, advertise };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let joined = runtime.context("start the runtime")?.block_on(enrol_with_file(asked))?;
            println!(
                "Enrolled as {}. Now: seawall-target-server run --config {}",
                joined.name,
                config.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Run { config, metrics } => {
            let config = Config::load(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            runtime.context("start the runtime")?.block_on(run(config, metrics))?;
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

async fn run(config: Config, metrics: Option<String>) -> anyhow::Result<()> {
    // Before anything else, so that a signal during a long start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let of_fleet = config.config_server.is_some();
    let (server, fleet) = match of_fleet {
        true => (None, Some(FleetTargetServer::start(config).await?)),
        false => (Some(TargetServer::start(config).await?), None),
    };
    let scraped = match metrics {
        Some(listen) => {
            let server = server.as_ref().map(|server| server.figures());
            let fleet = fleet.as_ref().map(|fleet| fleet.figures());
            let figures = move || {
                let values = server.as_ref().map(|figures| figures());
                let values = values.or_else(|| fleet.as_ref().map(|figures| figures()));
                std::future::ready(values.unwrap_or_default().text())
            };
            let started = Scraped::start(&listen, figures).await;
            Some(started.with_context(|| format!("listen for Prometheus on {listen}"))?)
        }
        None => None,
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    drop(scraped);
    if let Some(server) = server {
        server.shutdown().await;
    }
    if let Some(server) = fleet {
        server.shutdown().await;
    }
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
