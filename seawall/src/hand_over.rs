//! `seawall hand-over`: the source's side of a planned failover.

use anyhow::{Context, bail};
use clap::Args;
use control::{AgentAnswer, AgentRequest};

use crate::point::{AgentPlace, ask, find_socket};
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  Stop what runs, unmount, then:
    seawall hand-over
  Fail over to the point that it names, where the operator's configuration is:
    seawall failover start --point 1207
    seawall failover commit
  It was not meant:
    seawall hand-over --release

To be run as root on the protected machine. The disks are claimed and set read-only, so that nothing mounts them or writes to
them; all of them is compared with the replica by keyed checksums, what differs is sent and compared again; then a point is made
and waited for. A failover to that point loses nothing. If it fails, or this command is ended before, the disks are released.")]
pub(crate) struct HandOverOptions {
    #[command(flatten)]
    pub(crate) agent: AgentPlace,
    /// Let everybody write to disks that were handed over
    #[arg(long)]
    pub(crate) release: bool,
    /// One JSON object, and no progress
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(options: &HandOverOptions) -> anyhow::Result<()> {
    let request = if options.release { AgentRequest::Release } else { AgentRequest::HandOver };
    let mut answers = ask(&find_socket(&options.agent)?, &request).await?;
    while let Some(line) = answers.next_line().await.context("read the agent's answer")? {
        let answer = serde_json::from_str(&line)
            .with_context(|| format!("read the agent's answer {line:?}; is it of the same version?"))?;
        let shown = match answer {
            AgentAnswer::Progress { doing } if !options.json => {
                eprintln!("{doing}");
                continue;
            }
            AgentAnswer::Progress { .. } => continue,
            AgentAnswer::HandedOver { .. } | AgentAnswer::Released if options.json => format!("{line}\n"),
            AgentAnswer::HandedOver { epoch, equal, different } => format!(
                "Handed over: point {epoch} is what the disks are; {equal} compared with the target's and found the same\
                 {}.\nNothing can write to them until `seawall hand-over --release`.\n",
                if different.0 == 0 {
                    String::new()
                } else {
                    format!(" ({different} had differed, and were sent)")
                }
            ),
            AgentAnswer::Released => "Released: the disks may be written to again.\n".to_owned(),
            AgentAnswer::Refused { reason, .. } => bail!("{reason}"),
            _ => bail!("the agent answered what it was not asked: {line}"),
        };
        return Ok(text::say(&shown)?);
    }
    bail!("ask the agent: it ended without an answer; look at its log")
}
