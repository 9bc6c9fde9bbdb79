//! `seawall-agent`: captures this machine's disks.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use capture::DeviceName;
use capture::check::Places;
use clap::{Parser, Subcommand};
use control::fleet::{Name, PartRole};
use enrol::ServerUrl;
use seawall_agent::{Agent, AgentConfig, FleetAgent, FleetConfig, TRACKING_FOLDER, check};
use telemetry::Scraped;
use tokio::signal::unix::{SignalKind, signal};

/// Capture this machine's disks and send every change to a process server.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  seawall-agent check /dev/vdb
  seawall-agent check-config --config /etc/seawall/agent.toml
  seawall-agent enroll --server https://seawall.example --token TOKEN --config /etc/seawall/agent.toml
  seawall-agent run --config /etc/seawall/agent.toml
  seawall-agent run --config agent.toml --log info,capture=debug
  seawall-agent detach --config /etc/seawall/agent.toml"
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
    /// Enrol this machine with a config server, which then says what is protected.
    ///
    /// The key is made here and never leaves the machine.
    #[command(after_help = "Example:
  seawall-agent enroll --server https://seawall.example --token TOKEN --config /etc/seawall/agent.toml

The token is made by `seawall token create`, and good for one machine. A configuration that is there must have [config_server];
one that is not there is made. Its `state` directory gets the credentials.")]
    Enroll {
        /// Where the config server is: https://HOST[:PORT].
        #[arg(long, value_name = "URL")]
        server: ServerUrl,
        /// The token.
        #[arg(long, env = "SEAWALL_ENROL_TOKEN", hide_env_values = true)]
        token: String,
        /// Name of this machine in the fleet [default: its host name]
        #[arg(long)]
        name: Option<Name>,
        /// The configuration file.
        #[arg(long, default_value = "/etc/seawall/agent.toml")]
        config: PathBuf,
    },
    /// Capture and deliver until stopped (SIGTERM or SIGINT).
    #[command(after_help = "Example:\n  seawall-agent run --config /etc/seawall/agent.toml")]
    Run {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
        /// Where Prometheus reads this part's figures, over plain HTTP: at /metrics. Nowhere if left out.
        #[arg(long, value_name = "HOST:PORT", env = "SEAWALL_METRICS")]
        metrics: Option<String>,
    },
    /// End what the kernel keeps of a stopped agent: detach its programs and free their memory.
    ///
    /// The next start reads all disks again.
    #[command(after_help = "Examples:
  seawall-agent detach --config /etc/seawall/agent.toml
  seawall-agent detach --all")]
    Detach {
        /// The configuration file of the agent whose group is meant.
        #[arg(long, required_unless_present = "all")]
        config: Option<PathBuf>,
        /// Of all groups on this machine.
        #[arg(long, conflicts_with = "config")]
        all: bool,
        /// Where the groups' tracking is kept.
        #[arg(long, default_value = TRACKING_FOLDER, conflicts_with = "config")]
        folder: PathBuf,
    },
    /// Say how the writes of disks would be captured on this machine, why, and what to do for a better mode.
    #[command(after_help = "Examples:
  seawall-agent check
  seawall-agent check /dev/vda /dev/vdb
  seawall-agent check --config /etc/seawall/agent.toml --json | jq '.devices[].mode'

Everything is found by trying; nothing stays behind. Without a configuration or a disk all disks are looked at.
Exit status 0: every disk in data mode. 1: a lower mode for some disk. 2: some disk cannot be protected, or the
configuration cannot be read.")]
    Check {
        /// Look at the disks of this configuration, as it says.
        #[arg(long)]
        config: Option<PathBuf>,
        /// One JSON object instead of tables.
        #[arg(long)]
        json: bool,
        /// Disks to look at: paths, or as in the configuration, such as serial:...
        devices: Vec<DeviceName>,
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
    let cli = Cli::parse();
    match cli.command {
        Command::Check { config, json, devices } => {
            let config = match config.map(|path| AgentConfig::load(&path)).transpose() {
                Ok(config) => config,
                Err(error) => {
                    eprintln!("Error: {error}");
                    return Ok(ExitCode::from(2));
                }
            };
            let report = check(&Places::default(), config.as_ref(), &devices);
            let shown = if json { serde_json::to_string(&report)? + "\n" } else { report.render() };
            // A reader that has gone is no error of ours.
            let _ = std::io::stdout().write_all(shown.as_bytes());
            Ok(ExitCode::from(report.exit_status()))
        }
        Command::CheckConfig { config } => {
            if FleetConfig::load(&config)?.is_some() {
                println!("{}: in order; the config server says what is protected", config.display());
                return Ok(ExitCode::SUCCESS);
            }
            let hooks = seawall_agent::check_hooks(&AgentConfig::load(&config)?)?;
            println!("{}: in order", config.display());
            println!("hooks: {}", if hooks.is_empty() { "none".to_owned() } else { hooks.join(", ") });
            Ok(ExitCode::SUCCESS)
        }
        Command::Detach { config, all: _, folder } => {
            let ended = match config {
                Some(config) => match FleetConfig::load(&config)? {
                    Some(fleet) => fleet.detach()?,
                    None => {
                        let agent = AgentConfig::load(&config)?.agent;
                        capture::detach(&agent.tracking_folder, Some(&agent.group.to_string()))? > 0
                    }
                },
                None => capture::detach(&folder, None)? > 0,
            };
            println!(
                "{}",
                if ended { "detached: the next start reads all disks again" } else { "nothing was attached" }
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Enroll { server, token, name, config } => {
            telemetry::init(cli.log_format, &cli.log)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.context("start the asynchronous runtime")?;
            let joined = runtime.block_on(enrol::enrol_with_file(enrol::FileEnrolment {
                server,
                token,
                role: PartRole::Agent,
                name,
                config: config.clone(),
                rest: String::new(),
                advertise: None,
            }))?;
            println!("Enrolled as {}. Now: seawall-agent run --config {}", joined.name, config.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Run { config, metrics } => {
            telemetry::init(cli.log_format, &cli.log)?;
            let fleet = FleetConfig::load(&config)?;
            let config = if fleet.is_none() { Some(AgentConfig::load(&config)?) } else { None };
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .context("start the asynchronous runtime")?;
            runtime.block_on(async {
                let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
                let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
                let agent = config.map(Agent::start).transpose()?;
                let of_fleet = fleet.map(FleetAgent::start).transpose()?;
                let scraped = match metrics {
                    Some(listen) => {
                        let agent = agent.as_ref().map(Agent::figures);
                        let of_fleet = of_fleet.as_ref().map(FleetAgent::figures);
                        let figures = move || {
                            let of_agent = agent.as_ref().map(|figures| figures());
                            let of_fleet = || of_fleet.as_ref().map(|figures| figures());
                            std::future::ready(of_agent.or_else(of_fleet).unwrap_or_default().text())
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
                drop(scraped);
                if let Some(agent) = of_fleet {
                    agent.shutdown().await;
                }
                tokio::task::block_in_place(|| drop(agent));
                Ok(ExitCode::SUCCESS)
            })
        }
    }
}
