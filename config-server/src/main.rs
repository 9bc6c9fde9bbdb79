//! The command of the config server.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use seawall_config_server::{
    Config, ConfigServer, InitOptions, backup, check, fingerprint, init, openapi, restore,
};
use telemetry::{Format, Scraped};
use tokio::signal::unix::{SignalKind, signal};

/// Says what a fleet protects and how, shows how it is, and serves every button.
#[derive(Parser)]
#[command(name = "seawall-config-server", version, after_help = EXAMPLES)]
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
  seawall-config-server init /etc/seawall/config --name seawall.example --name 192.0.2.7
  seawall-config-server check-config --config /etc/seawall/config/config-server.toml
  seawall-config-server run --config /etc/seawall/config/config-server.toml
  seawall-config-server backup --config /etc/seawall/config/config-server.toml --out fleet.backup
  seawall-config-server restore --config /etc/seawall/config/config-server.toml --from fleet.backup";

#[derive(Subcommand)]
enum Command {
    /// Makes an authority, a configuration and an empty state with its first administrator.
    ///
    /// The password is the first line of standard input.
    Init {
        /// Directory to make.
        dir: PathBuf,
        /// Name or address by which people and parts reach the config server; once for each.
        #[arg(long = "name", value_name = "HOST", required = true)]
        names: Vec<String>,
        /// Where to listen.
        #[arg(long, value_name = "HOST:PORT", default_value = "0.0.0.0:7443")]
        listen: String,
        /// Name of the first administrator.
        #[arg(long, value_name = "NAME", default_value = "admin")]
        administrator: String,
        /// Database instead of a file: postgres://USER:PASSWORD@HOST/DATABASE.
        #[arg(long, value_name = "URL")]
        database: Option<String>,
    },
    /// Runs until told to stop (SIGTERM or SIGINT).
    Run {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
        /// Where Prometheus reads the fleet's figures, over plain HTTP: at /metrics. Nowhere if left out.
        #[arg(long, value_name = "HOST:PORT", env = "SEAWALL_METRICS")]
        metrics: Option<String>,
    },
    /// Checks a configuration and the authority that it names, and changes nothing.
    CheckConfig {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Writes the whole state, with the authority and its key, to a file. The config server may run.
    Backup {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
        /// File to make, readable by its owner only. Whoever has it can let anybody in.
        #[arg(long)]
        out: PathBuf,
    },
    /// Reads the whole state from a file into an empty database. The config server must not run.
    Restore {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
        /// What `backup` made.
        #[arg(long)]
        from: PathBuf,
    },
    /// Prints the OpenAPI document.
    Openapi,
}

fn main() -> anyhow::Result<ExitCode> {
    let Arguments { command, log, log_format } = Arguments::parse();
    telemetry::init(log_format, &log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("start the runtime")?;
    match command {
        Command::Init { dir, names, listen, administrator, database } => {
            let mut password = String::new();
            eprint!("Password of {administrator}: ");
            std::io::stdin().lock().read_line(&mut password).context("read the password")?;
            let password = password.trim_end_matches(['\n', '\r']).to_owned();
            let port = listen.rsplit_once(':').map_or(String::new(), |(_, port)| format!(":{port}"));
            let options = InitOptions { dir, listen, names, administrator, password, database };
            runtime.block_on(init(&options))?;
            let known_by = fingerprint(&Config::load(&options.dir.join("config-server.toml"))?)?;
            let dir = options.dir.display();
            let name = options.names.first().map_or("localhost", String::as_str);
            println!(
                "Made {dir}. Now:\n  seawall-config-server run --config {dir}/config-server.toml\n  \
                 seawall login --server https://{name}{port} --user {} --fingerprint {known_by}\n\n\
                 Keep {dir}/ca to yourself: who has it can let anybody in.",
                options.administrator
            );
        }
        Command::Run { config, metrics } => runtime.block_on(run(Config::load(&config)?, metrics))?,
        Command::CheckConfig { config: path } => {
            let config = Config::load(&path)?;
            check(&config)?;
            println!("{}: good\nfingerprint: {}", path.display(), fingerprint(&config)?);
        }
        Command::Backup { config, out } => {
            let rows = runtime.block_on(backup(&Config::load(&config)?, &out))?;
            println!("{rows} rows in {}. Keep it to yourself: it has the authority's key.", out.display());
        }
        Command::Restore { config, from } => {
            let rows = runtime.block_on(restore(&Config::load(&config)?, &from))?;
            println!("{rows} rows restored from {}", from.display());
        }
        Command::Openapi => {
            let document = serde_json::to_string_pretty(&openapi())?;
            // A reader that has gone is no error of ours.
            let _ = writeln!(std::io::stdout(), "{document}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn run(config: Config, metrics: Option<String>) -> anyhow::Result<()> {
    // Before anything else, so that a signal during a long start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let server = ConfigServer::start(config).await?;
    let scraped = match metrics {
        Some(listen) => {
            let figures = server.figures();
            let text = move || {
                let values = figures();
                async move { values.await.text() }
            };
            let started = Scraped::start(&listen, text).await;
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
    server.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}
