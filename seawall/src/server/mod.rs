//! `seawall server`: config server, process server and target server in one process, for a small site.

mod site;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use control::fleet::Name;
use telemetry::Scraped;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::Exit;
use crate::fleet::login::ask_password;
use crate::fleet::server::ServerCommand;
use crate::init::Endpoint;
use crate::text;
pub(crate) use site::{NewSite, Site, SiteDir};

const LISTEN: &str = "0.0.0.0:7443";
const PROCESS_SERVER_PORT: u16 = 7440;
const TARGET_SERVER_PORT: u16 = 7441;
const ADMINISTRATOR: &str = "admin";

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:
  One command for a small site; the first start makes everything, later ones go on:
    seawall server /srv/seawall --name dr.example
  Without a person, with a password from a file:
    seawall server /srv/seawall --name dr.example --password-file /run/secrets/seawall
  To try it on this machine only:
    seawall server /srv/seawall --listen 127.0.0.1:7443
  With figures for Prometheus:
    seawall server /srv/seawall --metrics 127.0.0.1:9464

Everything is below DIR: the authority, the state, the cache and the replicas. `--dir DIR` gives it to the commands that speak to the
target server, as `seawall restore`. Ends in order on SIGINT and SIGTERM.

  Process and target servers of the fleet, also those elsewhere:
    seawall server list --watch
    seawall server remove dr2 --yes"
)]
pub(crate) struct ServerOptions {
    #[command(subcommand)]
    command: Option<ServerCommand>,
    #[command(flatten)]
    site: SiteOptions,
}

#[derive(Debug, Args)]
struct SiteOptions {
    /// Directory of the site; made at the first start
    #[arg(value_name = "DIR", required = true)]
    dir: Option<PathBuf>,
    /// Name or address by which other machines reach this one [default: its host name]
    #[arg(long, value_name = "HOST")]
    name: Option<String>,
    /// Where people and machines reach the config server and its console [default: 0.0.0.0:7443]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where agents reach the process server, on the same address [default: 7440]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    process_server_port: Option<u16>,
    /// Where the process server reaches the target server, on the same address [default: 7441]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    target_server_port: Option<u16>,
    /// Who administers a new site [default: admin]
    #[arg(long, value_name = "NAME")]
    administrator: Option<Name>,
    /// File whose first line is a new site's password; without it a person is asked, or one is made and shown once
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Where Prometheus reads the figures of all three servers, over plain HTTP: at /metrics. Nowhere if left out
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
}

impl ServerOptions {
    /// Whether this process is to be the servers.
    pub(crate) fn serves(&self) -> bool {
        self.command.is_none()
    }

    pub(crate) fn json(&self) -> bool {
        self.command.as_ref().is_some_and(ServerCommand::json)
    }
}

pub(crate) async fn run(options: &ServerOptions) -> anyhow::Result<Exit> {
    match &options.command {
        Some(command) => crate::fleet::server::run(command).await,
        None => serve(&options.site).await.map(|()| Exit::Done),
    }
}

async fn serve(options: &SiteOptions) -> anyhow::Result<()> {
    let dir = options.dir.as_deref().context("run a site: say its directory")?;
    // Before anything else, so that a signal during a long start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let work = async {
        let dir = SiteDir::open(dir)?;
        match dir.is_made() {
            true => agree(options, &dir)?,
            false => make(options, &dir).await?,
        }
        dir.start().await
    };
    let site = tokio::select! {
        site = work => site?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let scraped = match &options.metrics {
        Some(listen) => match Scraped::start(listen, site.figures()).await {
            Ok(scraped) => Some(scraped),
            Err(error) => {
                site.shutdown().await;
                return Err(error).with_context(|| format!("listen for Prometheus on {listen}"));
            }
        },
        None => None,
    };
    text::say(&welcome(&site, options.administrator.as_ref()))?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = site.renew_operator_for_ever() => {}
    }
    tracing::info!("stopping");
    drop(scraped);
    site.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

async fn make(options: &SiteOptions, dir: &SiteDir) -> anyhow::Result<()> {
    let listen = options.listen.clone().unwrap_or_else(|| LISTEN.to_owned());
    let endpoint = Endpoint::parse("--listen", &listen)?;
    let name = match &options.name {
        Some(name) => name.clone(),
        None if endpoint.is_loopback() => endpoint.host,
        None => host_name()?,
    };
    let administrator = match &options.administrator {
        Some(name) => name.clone(),
        None => ADMINISTRATOR.parse()?,
    };
    let password = match &options.password_file {
        Some(file) => first_line(file)?,
        None if std::io::stdin().is_terminal() => {
            eprintln!("A new site in {}.", dir.path().display());
            ask_password(&administrator).await?
        }
        None => {
            let made = seawall_config_server::new_password();
            // Before anything is made: a crash must not leave a site whose password nobody knows.
            text::say(&format!("Made a password for {administrator}, shown this once: {made}\n"))?;
            made
        }
    };
    let new = NewSite {
        name,
        listen,
        process_server_port: options.process_server_port.unwrap_or(PROCESS_SERVER_PORT),
        target_server_port: options.target_server_port.unwrap_or(TARGET_SERVER_PORT),
        administrator,
        password,
    };
    dir.make(&new).await
}

/// What is said at a later start must be what was said at the first one: it is kept in the site's files.
fn agree(options: &SiteOptions, dir: &SiteDir) -> anyhow::Result<()> {
    let config = dir.config()?;
    let path = dir.path().display();
    let made = config.names.first().map_or("", String::as_str);
    for (option, given, kept) in
        [("--name", options.name.as_deref(), made), ("--listen", options.listen.as_deref(), &config.listen)]
    {
        ensure!(
            given.is_none_or(|given| given == kept),
            "start the site {path} with {option} {}: it was made with {kept}; leave the option out, or correct \
             {path}/config-server/config-server.toml first",
            given.unwrap_or_default()
        );
    }
    let set = options.process_server_port.is_some() || options.target_server_port.is_some();
    ensure!(
        !set,
        "start the site {path}: it is made already, and its ports are in process-server/process-server.toml and \
         target-server/target-server.toml below it; leave the options out"
    );
    if options.password_file.is_some() {
        tracing::info!("the site is made already: --password-file is not looked at");
    }
    Ok(())
}

fn first_line(file: &Path) -> anyhow::Result<String> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("read the password in {}", file.display()))?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    ensure!(!line.is_empty(), "read the password in {}: its first line is empty", file.display());
    Ok(line)
}

fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("read this machine's name")?;
    Ok(name.trim().to_owned())
}

fn welcome(site: &Site, administrator: Option<&Name>) -> String {
    let (url, dir) = (site.url(), site.path().display());
    let user = administrator.map_or(ADMINISTRATOR, Name::as_str);
    format!(
        "The site {dir} runs; Ctrl-C ends it.\n\
         Console:      {url}/ (the browser knows it by {dir}/config-server/ca/ca.pem)\n\
         Fingerprint:  {fingerprint}\n\
         Log in:       seawall login --server {url} --user {user} --fingerprint {fingerprint}\n\
         Then, for each machine:\n\
        \x20 seawall machine push root@MACHINE     # by ssh; or, to type it there: seawall token create\n\
        \x20 seawall protect MACHINE DISK --watch\n",
        fingerprint = site.fingerprint()
    )
}
