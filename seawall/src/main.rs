//! The operator's command.

mod ask;
mod boot;
mod bridge;
mod cli;
mod config;
mod demo;
mod document;
mod drill;
mod exit;
mod export;
mod failover;
mod files;
mod fleet;
mod hand_over;
mod init;
mod libvirt;
mod pin;
mod point;
mod points;
mod prove;
mod restore;
mod run;
mod scrub;
mod server;
mod status;
mod text;
mod verify;

use crate::exit::Exit;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::point::PointCommand;

fn main() -> ExitCode {
    if let Some(code) = seawall_agent::watchdog_instead() {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors. There is nobody left to tell when this fails too.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Done }.into();
        }
    };
    let json = cli.command.json();
    match start(cli) {
        Ok(exit) => exit.into(),
        // Whoever read the output has seen enough.
        Err(error) if is_broken_pipe(&error) => Exit::Done.into(),
        Err(error) => {
            let exit = Exit::of(&error);
            if json {
                let line = serde_json::json!({ "error": format!("{error:#}"), "exit": exit.code() });
                // There is nobody left to tell when this fails too.
                let _ = text::say(&format!("{line}\n"));
            }
            eprintln!("error: {error:#}");
            exit.into()
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

fn start(cli: Cli) -> anyhow::Result<Exit> {
    telemetry::init(cli.log_format.into(), &cli.log_filter())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Init(options) => init::run(&options)?,
            Command::Run(options) => run::run(&options).await?,
            Command::Server(options) => return server::run(&options).await,
            Command::Status(options) => return status::run(&options).await,
            Command::Points(options) => points::run(&options).await?,
            Command::Point(options) => match &options.command {
                PointCommand::Now(options) => return point::now(options).await,
                PointCommand::Delete(options) => pin::delete(options).await?,
            },
            Command::Resync(options) => point::resync(&options).await?,
            Command::HandOver(options) => hand_over::run(&options).await?,
            Command::Pin(options) => pin::pin(&options).await?,
            Command::Unpin(options) => pin::unpin(&options).await?,
            Command::Scrub(options) => return scrub::run(&options).await,
            Command::Verify(options) => return verify::run(&options),
            Command::Restore(options) => restore::run(&options).await?,
            Command::Export(options) => export::run(&options).await?,
            Command::Failover(options) => failover::run(&options).await?,
            Command::Boot(options) => return boot::run(&options).await,
            Command::Drill(options) => drill::run(&options).await?,
            Command::Prove(options) => return prove::run(&options).await,
            Command::Files(options) => files::run(&options).await?,
            Command::FilesInside { task } => {
                return tokio::task::block_in_place(|| files::run_inside(&task));
            }
            Command::Login(options) => fleet::login::login(&options).await?,
            Command::Logout(options) => fleet::login::logout(&options).await?,
            Command::Token(options) => fleet::token::run(&options).await?,
            Command::Machine(options) => return fleet::machine::run(&options).await,
            Command::Protect(options) => return fleet::protect::protect(&options).await,
            Command::Unprotect(options) => return fleet::protect::unprotect(&options).await,
            Command::Discover(options) => return fleet::discover::run(&options).await,
            Command::Group(options) => return fleet::group::run(&options).await,
            Command::Plan(options) => return fleet::plan::run(&options).await,
            Command::Policy(options) => return fleet::policy::run(&options).await,
            Command::Overview(options) => return fleet::look::overview(&options).await,
            Command::Audit(options) => return fleet::look::audit(&options).await,
            Command::User(options) => return fleet::user::run(&options).await,
            Command::ApiToken(options) => fleet::api_token::run(&options).await?,
            Command::Approval(options) => return fleet::approval::run(&options).await,
            Command::Setting(options) => return fleet::setting::run(&options).await,
            Command::Job(options) => return fleet::job::run(&options).await,
            Command::Events(options) => fleet::events::run(&options).await?,
            Command::Alert(options) => fleet::alert::run(&options).await?,
            Command::Api(options) => fleet::api::run(&options).await?,
            Command::Demo(options) => demo::run(options).await?,
            Command::Completions(options) => document::completions(&options)?,
            Command::Man(options) => document::manuals(&options)?,
        }
        Ok(Exit::Done)
    })
}
