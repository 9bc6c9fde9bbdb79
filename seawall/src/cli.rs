//! What can be said on the command line.

use clap::{Parser, Subcommand, ValueEnum};

use crate::boot::BootOptions;
use crate::demo::DemoOptions;
use crate::document::{CompletionsOptions, ManOptions};
use crate::drill::DrillOptions;
use crate::export::ExportOptions;
use crate::failover::FailoverOptions;
use crate::files::FilesOptions;
use crate::fleet::alert::AlertOptions;
use crate::fleet::api::ApiOptions;
use crate::fleet::api_token::ApiTokenOptions;
use crate::fleet::approval::ApprovalOptions;
use crate::fleet::discover::DiscoverOptions;
use crate::fleet::events::EventsOptions;
use crate::fleet::group::GroupOptions;
use crate::fleet::job::JobOptions;
use crate::fleet::login::{LoginOptions, LogoutOptions};
use crate::fleet::look::{AuditOptions, OverviewOptions};
use crate::fleet::machine::MachineOptions;
use crate::fleet::plan::PlanOptions;
use crate::fleet::policy::PolicyOptions;
use crate::fleet::protect::{ProtectOptions, UnprotectOptions};
use crate::fleet::setting::SettingOptions;
use crate::fleet::token::TokenOptions;
use crate::fleet::user::UserOptions;
use crate::hand_over::HandOverOptions;
use crate::init::InitOptions;
use crate::pin::{PinOptions, UnpinOptions};
use crate::point::{PointCommand, PointOptions, ResyncOptions};
use crate::points::PointsOptions;
use crate::prove::ProveOptions;
use crate::restore::RestoreOptions;
use crate::run::RunOptions;
use crate::scrub::ScrubOptions;
use crate::server::ServerOptions;
use crate::status::StatusOptions;
use crate::verify::VerifyOptions;

/// Replicates running Linux machines, block by block, to another site, and brings them back there.
#[derive(Debug, Parser)]
#[command(name = "seawall", version, max_term_width = 100, after_help = crate::exit::help())]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// What to log to standard error, as in `info` or `warn,wire=debug` [default: warn; of `run` and `server`: info; of `demo`: error]
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,
}

impl Cli {
    pub(crate) fn log_filter(&self) -> String {
        let given = self.log.clone().or_else(|| std::env::var("SEAWALL_LOG").ok());
        given.unwrap_or_else(|| {
            let filter = match &self.command {
                Command::Run(_) => "info",
                Command::Server(options) if options.serves() => "info",
                // It tells its own story.
                Command::Demo(_) => "error",
                _ => "warn",
            };
            filter.to_owned()
        })
    }
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    #[default]
    Human,
    /// One JSON object a line
    Json,
}

impl From<LogFormat> for telemetry::Format {
    fn from(format: LogFormat) -> telemetry::Format {
        match format {
            LogFormat::Human => telemetry::Format::Human,
            LogFormat::Json => telemetry::Format::Json,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an authority, a group and credentials, with a configuration for every part
    Init(InitOptions),
    /// Run one part, or all of them in one process
    Run(RunOptions),
    /// Run a small site: config server, process server and target server in one process; or look at the fleet's servers
    Server(ServerOptions),
    /// Show how replication is: positions, lag, capture, and what to do where something is wrong
    Status(StatusOptions),
    /// List the recovery points
    Points(PointsOptions),
    /// Take a recovery point (ask the agent of this machine), or delete one (at the target)
    Point(PointOptions),
    /// Compare disks with their replicas, and send what differs: ask the agent of this machine
    Resync(ResyncOptions),
    /// Keep everybody from this machine's disks and prove that the target has all of them: before a planned failover
    HandOver(HandOverOptions),
    /// Keep a recovery point whatever retention says
    Pin(PinOptions),
    /// Leave a pinned recovery point to retention again
    Unpin(UnpinOptions),
    /// Compare everything that the target holds with its checksums, while it runs
    Scrub(ScrubOptions),
    /// Check every checksum of the servers' files on this machine, while they do not run
    Verify(VerifyOptions),
    /// Write a volume as it was at a recovery point to a file or a device
    Restore(RestoreOptions),
    /// Serve volumes as they were at a recovery point to other programs, over NBD
    Export(ExportOptions),
    /// List and get files of a recovery point
    Files(FilesOptions),
    /// Not to be called by people: the part of `files` that runs in namespaces of its own
    #[command(hide = true, after_help = "It is told what to do by `files`.")]
    FilesInside {
        /// What to do, JSON
        task: String,
    },
    /// Make volumes what they were at a point, for good if it is committed
    Failover(FailoverOptions),
    /// Start a machine on a recovery point, in QEMU
    Boot(BootOptions),
    /// Prove that a machine comes up from a recovery point, and how long that takes
    Prove(ProveOptions),
    /// Try a failover out: serve all volumes of groups at a point, writable, for a while; replication goes on
    Drill(DrillOptions),
    /// Log in at a fleet's config server, for the commands below that speak to it
    Login(LoginOptions),
    /// Log out: delete the token that login made
    Logout(LogoutOptions),
    /// Tokens with which machines and servers come into the fleet
    Token(TokenOptions),
    /// The machines of the fleet
    Machine(MachineOptions),
    /// What could be protected: disks of the fleet's machines, and guests of hosts
    Discover(DiscoverOptions),
    /// Protect disks of a machine of the fleet
    Protect(ProtectOptions),
    /// End the protection of a machine of the fleet; its recovery points stay
    Unprotect(UnprotectOptions),
    /// What is protected: how old the newest point is and why, and what can be done with it
    Group(GroupOptions),
    /// How groups are protected: how often, how long points are kept, how much may be sent
    Policy(PolicyOptions),
    /// Recovery plans: what is done to recover, in which order; running them, and how that went
    Plan(PlanOptions),
    /// The fleet at a glance
    Overview(OverviewOptions),
    /// What the config server does that takes long
    Job(JobOptions),
    /// What has happened in the fleet, and what happens
    Events(EventsOptions),
    /// What is wrong in the fleet now, and who is told
    Alert(AlertOptions),
    /// Who may do what in the fleet; and oneself
    User(UserOptions),
    /// With what programs speak to the config server's API in one's name
    ApiToken(ApiTokenOptions),
    /// Acts that wait for a second person
    Approval(ApprovalOptions),
    /// What holds for the whole fleet
    Setting(SettingOptions),
    /// Who did or tried what, when, and what came of it
    Audit(AuditOptions),
    /// Do any act of the config server's API by its path
    Api(ApiOptions),
    /// Show and prove everything on this machine, and leave nothing behind
    Demo(DemoOptions),
    /// Print completions for a shell
    Completions(CompletionsOptions),
    /// Write manual pages of all commands
    Man(ManOptions),
}

impl Command {
    /// Whether the caller is a program.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Status(options) => options.json,
            Command::Points(options) => options.json,
            Command::Restore(options) => options.json,
            Command::Export(options) => options.json(),
            Command::Files(options) => options.common().json,
            Command::Drill(options) => options.json(),
            Command::Prove(options) => options.json,
            Command::Point(PointOptions { command: PointCommand::Now(options) }) => options.json,
            Command::Resync(options) => options.json,
            Command::HandOver(options) => options.json,
            Command::Point(PointOptions { command: PointCommand::Delete(options) }) => options.json,
            Command::Pin(options) => options.json,
            Command::Unpin(options) => options.json,
            Command::Scrub(options) => options.json,
            Command::Verify(options) => options.json,
            Command::Failover(options) => options.json(),
            Command::Login(options) => options.json,
            Command::Token(options) => options.json(),
            Command::Machine(options) => options.json(),
            Command::Protect(options) => options.json(),
            Command::Unprotect(options) => options.json(),
            Command::Job(options) => options.json(),
            Command::Events(options) => options.json,
            Command::Discover(options) => options.json(),
            Command::Server(options) => options.json(),
            Command::Group(options) => options.json(),
            Command::Plan(options) => options.json(),
            Command::Policy(options) => options.json(),
            Command::Overview(options) => options.json(),
            Command::Audit(options) => options.json(),
            Command::User(options) => options.json(),
            Command::ApiToken(options) => options.json(),
            Command::Approval(options) => options.json(),
            Command::Setting(options) => options.json(),
            Command::Alert(options) => options.json(),
            Command::Demo(options) => options.json,
            Command::Init(_)
            | Command::Run(_)
            | Command::FilesInside { .. }
            | Command::Boot(_)
            | Command::Completions(_)
            | Command::Man(_)
            | Command::Api(_)
            | Command::Logout(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_examples_in_the_help_are_accepted() {
        let mut examples = 0;
        for command in Cli::command().get_subcommands() {
            assert!(command.get_after_help().is_some(), "{} has no examples", command.get_name());
            examples += accepted(command);
        }
        assert!(examples >= 100);
    }

    /// Tries the examples of a command and of those within it; how many there are.
    fn accepted(command: &clap::Command) -> usize {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let help = help.replace("'before the upgrade'", "before");
        let joined = help.replace("\\\n", " ");
        let mut examples = 0;
        for line in joined.lines().filter_map(|line| line.trim().strip_prefix("seawall ")) {
            let line = line.split('|').next().unwrap_or(line);
            let words = std::iter::once("seawall").chain(line.split_whitespace());
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
            examples += 1;
        }
        examples + command.get_subcommands().map(accepted).sum::<usize>()
    }
}
