//! What can be said on the command line.

use std::path::PathBuf;

use block::{ByteCount, Consistency, GroupId, Label};
use clap::{Args, Parser, Subcommand, ValueEnum};
use control::PointSelector;

use crate::fleet::alert::AlertOptions;
use crate::fleet::api::ApiOptions;
use crate::fleet::events::EventsOptions;
use crate::fleet::job::JobOptions;
use crate::fleet::login::{LoginOptions, LogoutOptions};
use crate::fleet::machine::MachineOptions;
use crate::fleet::protect::{ProtectOptions, UnprotectOptions};
use crate::fleet::token::TokenOptions;
use crate::server::ServerOptions;

/// Replicates running Linux machines, block by block, to another site, and brings them back there.
#[derive(Debug, Parser)]
#[command(name = "seawall", version, max_term_width = 100)]
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
            let filter = match self.command {
                Command::Run(_) | Command::Server(_) => "info",
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
    /// Run a small site: config server, process server and target server in one process
    Server(ServerOptions),
    /// Show how replication is: positions, lag, capture, and what to do where something is wrong
    Status(StatusOptions),
    /// List the recovery points
    Points(PointsOptions),
    /// Take a recovery point (ask the agent of this machine), or delete one (at the target)
    Point(PointOptions),
    /// Compare disks with their replicas, and send what differs: ask the agent of this machine
    Resync(ResyncOptions),
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
    Failover(crate::failover::FailoverOptions),
    /// Start a machine on a recovery point, in QEMU
    Boot(BootOptions),
    /// Log in at a fleet's config server, for the commands below that speak to it
    Login(LoginOptions),
    /// Log out: delete the token that login made
    Logout(LogoutOptions),
    /// Tokens with which machines and servers come into the fleet
    Token(TokenOptions),
    /// The machines of the fleet
    Machine(MachineOptions),
    /// Protect disks of a machine of the fleet
    Protect(ProtectOptions),
    /// End the protection of a machine of the fleet; its recovery points stay
    Unprotect(UnprotectOptions),
    /// What the config server does that takes long
    Job(JobOptions),
    /// What has happened in the fleet, and what happens
    Events(EventsOptions),
    /// What is wrong in the fleet now, and who is told
    Alert(AlertOptions),
    /// Do any act of the config server's API, also those without a command of their own
    Api(ApiOptions),
    /// Show and prove everything on this machine, and leave nothing behind
    Demo(DemoOptions),
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
            Command::Point(PointOptions { command: PointCommand::Now(options) }) => options.json,
            Command::Resync(options) => options.json,
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
            Command::Alert(options) => options.json(),
            Command::Demo(options) => options.json,
            Command::Init(_)
            | Command::Run(_)
            | Command::Server(_)
            | Command::FilesInside { .. }
            | Command::Boot(_)
            | Command::Api(_)
            | Command::Logout(_) => false,
        }
    }
}

/// Where the operator's configuration is.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Place {
    /// Directory that `seawall init` made [default: $SEAWALL_DIR, else ./seawall]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Everything on this machine, protecting one disk:
    seawall init /etc/seawall --device /dev/vdb
  Two disks of one machine, which always share one instant, with the servers elsewhere:
    seawall init /etc/seawall --device /dev/vdb --device /dev/vdc \\
        --process-server cache.example:7440 --target-server dr.example:7441")]
pub(crate) struct InitOptions {
    /// Directory to make; it must not exist, or be empty
    pub(crate) dir: PathBuf,
    /// Disk to protect, as the source names it: a path, or serial:..., wwn:..., ptuuid:..., fsuuid:...; once for each
    #[arg(long = "device", value_name = "PATH", required = true)]
    pub(crate) devices: Vec<PathBuf>,
    /// Name of the protected machine
    #[arg(long, default_value = "source")]
    pub(crate) name: String,
    /// Where the agent and the operator reach the process server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7440")]
    pub(crate) process_server: String,
    /// Where the process server and the operator reach the target server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7441")]
    pub(crate) target_server: String,
}

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

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall status --dir /etc/seawall
  seawall status --watch
  seawall status --json | jq '.groups[].lag_seconds'

Exit status 0 when every server answered.")]
pub(crate) struct StatusOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Show it again every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) watch: Option<u64>,
    /// One JSON object (with --watch: one a line) instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall points --dir /etc/seawall
  seawall points --json | jq '.groups[0].points[-1].epoch'")]
pub(crate) struct PointsOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Only of this group
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Only the newest so many of each group, 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) last: usize,
    /// One JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall point now --consistency application --label 'before the upgrade'
  seawall point delete 1207")]
pub(crate) struct PointOptions {
    #[command(subcommand)]
    pub(crate) command: PointCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PointCommand {
    /// Take one now
    #[command(after_help = "Examples:
  seawall point now
  seawall point now --consistency application --label before-upgrade --wait
  seawall point now --consistency filesystem --agent-config /etc/seawall/agent.toml --json

To be run as root on the protected machine. An application-consistent point runs the hooks (docs/hooks.md), freezes the mounted
filesystems for an instant, and thaws them; what cannot be had makes the point less, down to crash-consistent, and the reason is
said and kept with it.

Exit status 0 when the point is what was asked for, 3 when it is less, 1 when there is none.")]
    Now(PointNowOptions),
    /// Delete one at the target, for good
    #[command(after_help = "Examples:
  seawall point delete 1207
  seawall point delete 1207 --yes --json

Asks for the point's number to be typed, unless told --yes. The newest point, pinned points and points that are being read stay.
The other points stay what they are; what they need of it becomes a part of the next one's undo layer.")]
    Delete(PointDeleteOptions),
}

#[derive(Debug, Args)]
pub(crate) struct PointDeleteOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Which: the number of an epoch
    #[arg(value_name = "POINT", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) point: u64,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Do not ask
    #[arg(long)]
    pub(crate) yes: bool,
    /// One JSON object instead of text
    #[arg(long, requires = "yes")]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall pin latest --label 'before the upgrade'
  seawall pin 1207 --for 90d

A pinned point does not go until the pin expires or is taken away with `seawall unpin`; `seawall points` shows it. What it
needs takes space, whatever the limit is.")]
pub(crate) struct PinOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Which: `latest`, or the number of an epoch
    #[arg(value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// What to call the pin
    #[arg(long, value_name = "TEXT", value_parser = crate::point::parse_label)]
    pub(crate) label: Option<Label>,
    /// How long it lasts, as in 12h, 30d, 1y [default: for ever]
    #[arg(long = "for", value_name = "SPAN", value_parser = seawall_target_server::parse_span)]
    pub(crate) lasts: Option<std::time::Duration>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  seawall unpin 1207")]
pub(crate) struct UnpinOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Which: `latest`, or the number of an epoch
    #[arg(value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall scrub
  seawall scrub vdb --json | jq .findings

Replication goes on meanwhile. Exit status 0 when all is sound, 3 when something is damaged: it is said which recovery points that
concerns; the others can be used.")]
pub(crate) struct ScrubOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume, by name or identity, whose image is read [default: all]; undo layers are read in any case
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: Option<String>,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// One JSON object at the end, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall verify --dir /etc/seawall
  Whether one volume could be restored as it was at a point:
    seawall verify vdb --point 1200 --dir /etc/seawall
  seawall verify --dir /etc/seawall --group 6d1f0b6c2f0e4b6f9a53c1d3a8e4f702 --json

Reads the process server's cache and the target server's replicas, as DIR's configurations name them, where they are on this machine:
segments, cursors, states, undo layers, images, spans, pins, checksums. Changes nothing. A server that runs has its files open;
`seawall scrub` is for that. With a volume or a point, the end of what is shown is about these, and so is the exit status: 0 when all is
sound, 3 when something is damaged, 1 when it cannot be told.")]
pub(crate) struct VerifyOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume to tell of, by name or identity; everything is read all the same [default: all]
    pub(crate) volume: Option<String>,
    /// Recovery point to tell of: `latest`, or an epoch's number as `seawall points` shows it [default: latest]
    #[arg(long, value_name = "POINT")]
    pub(crate) point: Option<PointSelector>,
    /// Only the replica of this group
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PointNowOptions {
    /// What it should be
    #[arg(long, value_enum, default_value_t)]
    pub(crate) consistency: WantedConsistency,
    /// What to call it
    #[arg(long, value_name = "TEXT", value_parser = crate::point::parse_label)]
    pub(crate) label: Option<Label>,
    /// Wait until the target holds it
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) agent: AgentPlace,
    /// One JSON object, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the agent of this machine is.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct AgentPlace {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Configuration of the agent [default: DIR/agent/agent.toml]
    #[arg(long, value_name = "FILE")]
    pub(crate) agent_config: Option<PathBuf>,
    /// Socket of the agent [default: what its configuration says, else the only one in /run/seawall]
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall resync
  seawall resync --volume data --json
  seawall resync --window

To be run as root on the protected machine. The volume is read once here and once at the target, which exchange checksums; only what
differs is sent. There are no new recovery points until it is done, and `seawall status` shows how far it is. It happens by itself
when tracking was lost, as after a restart of the machine, in the hours that the agent's configuration has for it; `seawall resync`
begins what waits. Ask for it also when you have reason to doubt the replica.")]
pub(crate) struct ResyncOptions {
    #[command(flatten)]
    pub(crate) agent: AgentPlace,
    /// Volume, by name [default: all of the group]
    #[arg(long, value_name = "NAME")]
    pub(crate) volume: Option<String>,
    /// Begin at once, whatever the agent's hours for it are; this is the default
    #[arg(long, conflicts_with = "window")]
    pub(crate) now: bool,
    /// Begin in the hours that the agent's configuration has for it; points go on until then
    #[arg(long)]
    pub(crate) window: bool,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a point should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum WantedConsistency {
    /// Hooks and freeze
    #[default]
    Application,
    /// Freeze
    Filesystem,
    /// Neither
    Crash,
}

impl From<WantedConsistency> for Consistency {
    fn from(wanted: WantedConsistency) -> Consistency {
        match wanted {
            WantedConsistency::Application => Consistency::Application,
            WantedConsistency::Filesystem => Consistency::Filesystem,
            WantedConsistency::Crash => Consistency::Crash,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  The newest state, as a raw image that any tool can boot or mount:
    seawall restore --volume vdb --point latest --out vdb.img
  An older one (`seawall points` lists them):
    seawall restore --volume vdb --point 1207 --out vdb-1207.img

  As qcow2, through qemu-img:
    seawall restore --volume vdb --point latest --out vdb.qcow2 --format qcow2
  Onto a disk that holds much of it already; only what differs is fetched and written:
    seawall restore --volume vdb --point latest --out /dev/vdc --delta --verify

A file appears under its name only when it is whole and durable; until then it is FILE.partial. Interrupted, the same command
goes on: what is there is compared with the point, piece by piece (a device: add --delta). What arrives is compared with the
hash that the server made while sending; --verify reads what was written once more.
A device that is mounted or in use, or not empty, is refused without --force or --delta; one that is too small always.")]
pub(crate) struct RestoreOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume, by name or identity
    #[arg(long, value_name = "NAME|ID")]
    pub(crate) volume: String,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Recovery point: `latest`, or the number of an epoch
    #[arg(long, value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// File or block device to write
    #[arg(long, value_name = "FILE|DEVICE")]
    pub(crate) out: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: RestoreFormat,
    /// Change what is there, in place, where it differs from the point
    #[arg(long, conflicts_with = "force")]
    pub(crate) delta: bool,
    /// Replace FILE; overwrite DEVICE also when it is in use or not empty
    #[arg(long)]
    pub(crate) force: bool,
    /// Read everything once more at the end, and compare it with the point
    #[arg(long)]
    pub(crate) verify: bool,
    /// One JSON object at the end, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a restore writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestoreFormat {
    /// The disk's bytes as they are, sparse
    #[default]
    Raw,
    /// QEMU's format; always compared with the point at the end
    Qcow2,
}

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  For programs on this machine, through a socket that leads to the target server; ends with Ctrl-C:
    seawall export vda --point latest
  To write to without changing anything, at a place of one's choice:
    seawall export vda vdb --point 1207 --writable --local /tmp/drill.sock
  On the target server's machine, until it is stopped:
    seawall export vda --point latest --socket /run/seawall/vda.sock --detach
  For other machines, with TLS and an operator's certificate:
    seawall export vda --point latest --listen 0.0.0.0:10809 --detach
  A machine for libvirt:
    seawall export vda --point latest --writable --socket /run/seawall/vda.sock --detach --libvirt-xml
  What is running, and its end:
    seawall export list
    seawall export stop 3

Clients are qemu-img, qemu-nbd, nbdcopy, nbdfuse, nbd-client and any other that speaks NBD. What is written goes into an overlay
at the target, of at most --limit, and is dropped at the end."
)]
pub(crate) struct ExportOptions {
    #[command(subcommand)]
    pub(crate) command: Option<ExportCommand>,
    #[command(flatten)]
    pub(crate) start: ExportStartOptions,
}

impl ExportOptions {
    fn json(&self) -> bool {
        match &self.command {
            None => self.start.json,
            Some(ExportCommand::List(options)) => options.json,
            Some(ExportCommand::Stop(options)) => options.json,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExportStartOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volumes of one group, by name or identity
    #[arg(value_name = "VOLUME", required = true)]
    pub(crate) volumes: Vec<String>,
    /// Recovery point: `latest`, or the number of an epoch
    #[arg(long, value_name = "POINT", required = true)]
    pub(crate) point: Option<PointSelector>,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// Take writes, and drop them at the end
    #[arg(long)]
    pub(crate) writable: bool,
    /// What may be written to each volume, such as 10GiB [default: 16GiB]
    #[arg(long, value_name = "SIZE", requires = "writable")]
    pub(crate) limit: Option<ByteCount>,
    /// Socket to make on this machine [default: one of its own]
    #[arg(long, value_name = "PATH", conflicts_with_all = ["socket", "listen", "detach"])]
    pub(crate) local: Option<PathBuf>,
    /// Socket to make on the target server's machine, for its user only
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    pub(crate) socket: Option<PathBuf>,
    /// Address and port for the target server to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Without TLS: everybody who reaches the port reads the volumes
    #[arg(long, requires = "listen")]
    pub(crate) plain: bool,
    /// Go on when this command has ended, until `seawall export stop`
    #[arg(long)]
    pub(crate) detach: bool,
    /// Show a libvirt domain with these disks, and nothing else
    #[arg(long, requires = "writable")]
    pub(crate) libvirt_xml: bool,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// Show what is exported
    List(ExportListOptions),
    /// End an export; its clients are disconnected
    Stop(ExportStopOptions),
}

#[derive(Debug, Args)]
pub(crate) struct ExportListOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// One JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExportStopOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Number of the export, as `seawall export list` shows it
    pub(crate) id: u64,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  What file systems there are:
    seawall files ls vda --point latest
  A directory, and a file of it:
    seawall files ls vda --point 1207 /etc
    seawall files get vda --point 1207 /etc/fstab --out fstab.old
  A directory with everything below, of the second partition:
    seawall files get vda --point latest /srv/data --fs p2 --out /tmp/data
  To another program:
    seawall files get vda --point latest /var/lib/app.sql --out - | head

As root; nbdfuse (of libnbd-bin, with fuse3) is needed. File systems are mounted on an overlay where nobody else sees them,
so that their journals are replayed and the replica does not change; nothing stays behind, also when the command is killed.")]
pub(crate) struct FilesOptions {
    #[command(subcommand)]
    pub(crate) action: FilesAction,
}

impl FilesOptions {
    fn common(&self) -> &FilesCommon {
        match &self.action {
            FilesAction::Ls(options) => &options.common,
            FilesAction::Get(options) => &options.common,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum FilesAction {
    /// List file systems, or what is in a directory
    Ls(FilesLsOptions),
    /// Copy a file, or a directory with everything below it
    Get(FilesGetOptions),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct FilesCommon {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volume, by name or identity
    #[arg(value_name = "VOLUME")]
    pub(crate) volume: String,
    /// Recovery point: `latest`, or the number of an epoch
    #[arg(long, value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// File system, where there are several: its name, label or UUID, as `ls` without a path shows them
    #[arg(long, value_name = "NAME")]
    pub(crate) fs: Option<String>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FilesLsOptions {
    #[command(flatten)]
    pub(crate) common: FilesCommon,
    /// What to list; without it the file systems
    pub(crate) path: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct FilesGetOptions {
    #[command(flatten)]
    pub(crate) common: FilesCommon,
    /// What to get
    pub(crate) path: PathBuf,
    /// Where to; `-` for standard output [default: its name, here]
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Does the newest point start?
    seawall boot vda --point latest
  A machine with two disks, as it was, with more memory:
    seawall boot vda vdb --point 1207 --memory 8GiB --cpus 4
  On a disk bus that the system knows, and with a way into a test network:
    seawall boot sda --point latest --bus sata --network br-test

The first volume is the one that the machine starts from. What the machine writes goes into overlays at the target and is dropped
when it ends; the replica does not change, and replication goes on. The serial console is shown here: the system must use it
(console=ttyS0). qemu-system-x86 is needed, for UEFI also ovmf.")]
pub(crate) struct BootOptions {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Volumes of one group, by name or identity
    #[arg(value_name = "VOLUME", required = true)]
    pub(crate) volumes: Vec<String>,
    /// Recovery point: `latest`, or the number of an epoch
    #[arg(long, value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where several have such a volume
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// `none`; `isolated`: a network that leads nowhere; or the name of a bridge of this machine
    #[arg(long, value_name = "none|isolated|NAME", default_value = "none")]
    pub(crate) network: String,
    /// What starts the system
    #[arg(long, value_enum, default_value_t)]
    pub(crate) firmware: BootFirmware,
    /// What the disks are connected by
    #[arg(long, value_enum, default_value_t)]
    pub(crate) bus: BootBus,
    /// What runs the processor
    #[arg(long, value_enum, default_value_t)]
    pub(crate) accel: BootAccelerator,
    /// Memory, such as 2GiB
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    pub(crate) memory: ByteCount,
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=255))]
    pub(crate) cpus: u32,
    /// What the machine may write to each volume, such as 10GiB [default: 16GiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) limit: Option<ByteCount>,
    /// QEMU
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub(crate) qemu: PathBuf,
    /// More arguments for QEMU, after `--`
    #[arg(last = true, value_name = "ARGUMENT")]
    pub(crate) more: Vec<String>,
}

/// What starts a system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootFirmware {
    /// UEFI when there is an EFI system partition, else BIOS
    #[default]
    Auto,
    /// The BIOS that QEMU has
    Bios,
    /// OVMF
    Uefi,
}

/// What disks are connected by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootBus {
    /// virtio-blk; every Linux that ran in a virtual machine knows it
    #[default]
    Virtio,
    /// virtio-scsi
    Scsi,
    /// AHCI; for systems from physical machines
    Sata,
}

/// What runs a machine's processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BootAccelerator {
    /// KVM where it works, else emulation
    #[default]
    Auto,
    /// KVM, or fail
    Kvm,
    /// Emulation, which works everywhere and is slow
    Tcg,
}

/// What the demo is asked to do.
#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  seawall demo
  seawall demo --seconds 60 --json | tail -1 | jq .verified
  To look at the console afterwards; ends with Ctrl-C:
    seawall demo --hold

As root it makes a disk with a filesystem and captures it with eBPF; otherwise it protects an image file by scanning.
Exit status 0 only if everything was proven.")]
pub(crate) struct DemoOptions {
    /// How long the writer writes
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// One JSON object as the last line
    #[arg(long)]
    pub(crate) json: bool,
    /// How changes are found
    #[arg(long, value_enum, default_value_t)]
    pub(crate) source: DemoSource,
    /// At the end, keep the site with its console up until Ctrl-C or SIGTERM
    #[arg(long)]
    pub(crate) hold: bool,
}

/// How the demo's agent finds changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoSource {
    /// eBPF when allowed, else scan
    #[default]
    Auto,
    /// eBPF, or fail
    Ebpf,
    /// Checksums, without privileges
    Scan,
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
        let mut command = Cli::command();
        let mut examples = 0;
        for sub in command.get_subcommands_mut() {
            let help = sub.get_after_help().expect("every command has examples").to_string();
            let help = help.replace("'before the upgrade'", "before");
            let joined = help.replace("\\\n", " ");
            for line in joined.lines().filter_map(|line| line.trim().strip_prefix("seawall ")) {
                let line = line.split('|').next().unwrap_or(line);
                let words = std::iter::once("seawall").chain(line.split_whitespace());
                Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
                examples += 1;
            }
        }
        assert!(examples >= 10);
    }
}
