//! The command of the process server.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use control::fleet::{Name, PartRole};
use enrol::{FileEnrolment, ServerUrl, enrol_with_file};
use seawall_process_server::{Config, FleetProcessServer, ProcessServer, verify};
use telemetry::{Format, Scraped};
use tokio::signal::unix::{SignalKind, signal};

/// Keeps protected machines' changes durably and forwards them to target servers.
#[derive(Parser)]
#[command(name = "seawall-process-server", version, after_help = EXAMPLES)]
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
  seawall-process-server enroll --server https://seawall.example --token TOKEN --advertise dr.example:7440 --config /etc/seawall/process-server.toml
  seawall-process-server check-config --config /etc/seawall/process-server.toml
  seawall-process-server run --config /etc/seawall/process-server.toml
  seawall-process-server run --config process-server.toml --log info,wire=debug --log-format json
  systemctl stop seawall-process-server && seawall-process-server verify --config /etc/seawall/process-server.toml";

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
    /// Checks a configuration and the credentials that it names, and changes nothing.
    CheckConfig {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Checks every checksum of the cache's files. The server must not run.
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
        Command::Enroll { server, token, name, advertise, config } => {
            let port = advertise.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            let port = port.with_context(|| format!("use --advertise {advertise}: expected HOST:PORT"))?;
            let rest = format!(
                "[process_server]\nlisten = \"0.0.0.0:{port}\"\ncredentials = \"state/credentials\"\ncache = \"cache\"\n\
                 cache_bytes = \"16GiB\"\n"
            );
            let role = PartRole::ProcessServer;
            let advertise = Some(advertise);
            let asked = FileEnrolment { server, token, role, name, config: config.clone(), rest, advertise };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let joined = runtime.context("start the runtime")?.block_on(enrol_with_file(asked))?;
            println!(
                "Enrolled as {}. Now: seawall-process-server run --config {}",
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
            ProcessServer::check(&Config::load(&path)?)?;
            println!("{}: good", path.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Verify { config } => verify_cache(&Config::load(&config)?),
    }
}

async fn run(config: Config, metrics: Option<String>) -> anyhow::Result<()> {
    // Before anything else, so that a signal during a long start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let of_fleet = config.config_server.is_some();
    let (server, fleet) = match of_fleet {
        true => (None, Some(FleetProcessServer::start(config).await?)),
        false => (Some(ProcessServer::start(config).await?), None),
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
        server.shutdown().await?;
    }
    if let Some(server) = fleet {
        server.shutdown().await?;
    }
    tracing::info!("stopped");
    Ok(())
}

fn verify_cache(config: &Config) -> anyhow::Result<ExitCode> {
    let report = verify(&config.process_server.cache)?;
    println!("{} segments, {}", report.segments, report.bytes);
    for group in &report.groups {
        println!(
            "group {}: {} changesets, {}, up to {}; freed up to {}",
            group.group, group.changesets, group.bytes, group.held, group.freed
        );
        for (target, applied) in &group.targets {
            println!("  {target} has applied up to {applied}");
        }
    }
    if report.half_received > 0 {
        println!("{} half-received changesets, to be discarded", report.half_received);
    }
    if report.torn_tail {
        println!("note: the log ends in a torn write, as a crash leaves it; nothing acknowledged was in it");
    }
    for damage in &report.damages {
        println!("PROBLEM: {damage}");
    }
    Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
