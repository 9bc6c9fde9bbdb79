//! `seawall point now` and `seawall resync`: ask this machine's agent.

use crate::config::Place;
use crate::pin::PointDeleteOptions;
use block::Consistency;
use clap::{Args, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use block::Label;
use control::{AGENT_SOCKET_DIR, AgentAnswer, AgentRefusal, AgentRequest, ResyncWhen, TakenPoint};
use seawall_agent::AgentConfig;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;

use crate::exit::Exit;
use crate::text;

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

pub(crate) async fn now(options: &PointNowOptions) -> anyhow::Result<Exit> {
    let socket = find_socket(&options.agent)?;
    let request = AgentRequest::Point {
        consistency: options.consistency.into(),
        label: options.label.clone(),
        wait: options.wait,
    };
    let mut answers = ask(&socket, &request).await?;
    let mut taken = None;
    while let Some(line) = answers.next_line().await.context("read the agent's answer")? {
        let answer = serde_json::from_str(&line)
            .with_context(|| format!("read the agent's answer {line:?}; is it of the same version?"))?;
        match answer {
            AgentAnswer::Progress { doing } if !options.json => eprintln!("{doing}"),
            AgentAnswer::Progress { .. } => {}
            AgentAnswer::Refused { code: AgentRefusal::BadRequest, reason } => {
                bail!("{reason}; use the same version of `seawall` and of the agent")
            }
            AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
            AgentAnswer::Point(point) if options.wait => taken = Some(point),
            AgentAnswer::Point(point) => return report(&point, false, options.json),
            AgentAnswer::Applied { .. } => {
                let point = taken.context("the agent spoke of a point that it had not named")?;
                return report(&point, true, options.json);
            }
            _ => bail!("the agent answered what it was not asked"),
        }
    }
    match taken {
        Some(point) => bail!(
            "wait until point {} is applied: the agent has ended; `seawall points` will show it when it is",
            point.epoch
        ),
        None => bail!("ask the agent: it ended without an answer; look at its log"),
    }
}

/// Asks, and gives the lines of the answer.
pub(crate) async fn ask(
    socket: &Path,
    request: &AgentRequest,
) -> anyhow::Result<Lines<BufReader<UnixStream>>> {
    let mut stream = UnixStream::connect(socket).await.with_context(|| {
        format!("ask the agent at {}: does it run here, and are you root?", socket.display())
    })?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).await.context("ask the agent")?;
    Ok(BufReader::new(stream).lines())
}

/// `seawall resync`: has volumes compared with their replicas.
pub(crate) async fn resync(options: &ResyncOptions) -> anyhow::Result<()> {
    let request = AgentRequest::Resync {
        volume: options.volume.clone(),
        when: if options.window && !options.now { ResyncWhen::Window } else { ResyncWhen::Now },
    };
    let mut answers = ask(&find_socket(&options.agent)?, &request).await?;
    let line = answers.next_line().await.context("read the agent's answer")?;
    let line = line.context("ask the agent: it ended without an answer; look at its log")?;
    let answer = serde_json::from_str(&line)
        .with_context(|| format!("read the agent's answer {line:?}; is it of the same version?"))?;
    match answer {
        AgentAnswer::Comparing { .. } if options.json => Ok(text::say(&format!("{line}\n"))?),
        AgentAnswer::Comparing { volumes, bytes, begins } => {
            let volumes = volumes.join(", ");
            Ok(text::say(&match begins {
                None => format!(
                    "Comparing {volumes} ({bytes}) with the replica; `seawall status` shows how far it is.\n"
                ),
                Some(begins) => format!(
                    "{volumes} ({bytes}) will be compared with the replica from {} on; `--now` begins at once.\n",
                    text::instant(begins).0
                ),
            })?)
        }
        AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
        _ => bail!("the agent answered what it was not asked: {line}"),
    }
}

fn report(point: &TakenPoint, applied: bool, json: bool) -> anyhow::Result<Exit> {
    let as_asked = point.consistency >= point.asked;
    let shown = if json {
        let mut value = serde_json::to_value(point)?;
        value["applied"] = applied.into();
        format!("{value}\n")
    } else {
        render(point, applied)
    };
    text::say(&shown)?;
    Ok(if as_asked { Exit::Done } else { Exit::Short })
}

fn render(point: &TakenPoint, applied: bool) -> String {
    let label = point.note.label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
    let (local, _) = text::instant(point.cut_time);
    let held = if applied { "the target holds it" } else { "on its way to the target" };
    let mut shown =
        format!("Point {}{label} of {local}: {}-consistent, {held}.\n", point.epoch, point.consistency);
    if let Some(frozen) = point.note.frozen {
        shown += &format!("Frozen for {}: {}\n", text::short(frozen), point.note.filesystems.join(", "));
    }
    if let Some(reason) = &point.note.reason {
        shown += &format!("Not {}-consistent: {reason}\n", point.asked);
    }
    shown
}

/// The option, the configuration that `seawall init` made, or the one agent that listens on this machine.
pub(crate) fn find_socket(options: &AgentPlace) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &options.socket {
        return Ok(socket.clone());
    }
    if let Some(file) = &options.agent_config {
        return Ok(AgentConfig::load(file)?.control_socket());
    }
    let made = options.place.find();
    if let Ok(dir) = &made {
        let file = dir.join("agent/agent.toml");
        if file.is_file() {
            return Ok(AgentConfig::load(&file)?.control_socket());
        }
    }
    if options.place.dir.is_some() {
        let dir = made?;
        bail!(
            "find the agent: there is no {}; name its socket with --socket",
            dir.join("agent/agent.toml").display()
        );
    }
    only_one(Path::new(AGENT_SOCKET_DIR))
}

fn only_one(dir: &Path) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    // One that was killed leaves its socket behind, which nobody answers at.
    let answers = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "sock")
            && std::os::unix::net::UnixStream::connect(path).is_ok()
    };
    let mut sockets: Vec<PathBuf> = entries.filter(answers).collect();
    match (sockets.pop(), sockets.is_empty()) {
        (Some(socket), true) => Ok(socket),
        (None, _) => bail!(
            "find the agent: none listens in {}; is it running on this machine? --socket names another place",
            dir.display()
        ),
        (Some(_), false) => bail!(
            "find the agent: {} agents listen in {}; choose one with --socket",
            sockets.len() + 1,
            dir.display()
        ),
    }
}

/// A label from the command line.
pub(crate) fn parse_label(text: &str) -> Result<Label, String> {
    text.parse().map_err(|error: block::LabelError| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use block::{Consistency, Epoch, GroupId, PointNote, UnixNanos};

    use super::*;

    #[test]
    fn the_only_agent_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert!(only_one(dir.path()).unwrap_err().to_string().contains("none listens"));
        let listen = |name: &str| std::os::unix::net::UnixListener::bind(dir.path().join(name)).unwrap();
        drop(listen("killed.sock"));
        let _first = listen("a.sock");
        std::fs::create_dir(dir.path().join("a.hooks")).unwrap();
        assert_eq!(only_one(dir.path()).unwrap(), dir.path().join("a.sock"));
        let _second = listen("b.sock");
        assert!(only_one(dir.path()).unwrap_err().to_string().contains("2 agents"));
    }

    #[test]
    fn what_became_of_it_is_said() {
        let note = PointNote {
            label: Some("nightly".parse().unwrap()),
            frozen: Some(Duration::from_micros(12_300)),
            filesystems: vec!["/".into(), "/srv".into()],
            reason: Some("there are no hooks".into()),
        };
        let point = TakenPoint {
            group: GroupId([1; 16]),
            epoch: Epoch(7),
            cut_time: UnixNanos(0),
            asked: Consistency::Application,
            consistency: Consistency::Filesystem,
            note,
        };
        let shown = render(&point, true);
        for expected in [
            "Point 7 \"nightly\"",
            "filesystem-consistent",
            "12 ms: /, /srv",
            "Not application-consistent: there are no hooks",
        ] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
    }
}
