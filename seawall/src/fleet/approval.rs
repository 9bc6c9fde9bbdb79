//! `seawall approval`: acts that wait for a second person.

use clap::{Args, Subcommand};
use control::fleet::{Approval, ApprovalAnswer, ApprovalState, ResourceId};
use serde::Serialize;

use super::change::{Common, Watched};
use super::{Fleet, moment, say_json};
use crate::exit::Exit;
use crate::text;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  seawall approval list
  seawall approval approve 0123456789abcdef0123456789abcdef
  seawall setting change --second-person true")]
pub(crate) struct ApprovalOptions {
    #[command(subcommand)]
    command: ApprovalCommand,
}

#[derive(Debug, Subcommand)]
enum ApprovalCommand {
    /// Those that wait, and what became of others
    #[command(after_help = "Example:\n  seawall approval list --watch")]
    List(Watched),
    /// Approve an act that somebody else asked for; it is done at once
    #[command(after_help = "Example:\n  seawall approval approve 0123456789abcdef0123456789abcdef")]
    Approve(Answer),
    /// Let it be
    #[command(after_help = "Example:\n  seawall approval reject 0123456789abcdef0123456789abcdef")]
    Reject(Answer),
}

#[derive(Debug, Args)]
struct Answer {
    /// Which, as `seawall approval list` shows it
    id: ResourceId,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Serialize)]
struct Listed {
    approvals: Vec<Approval>,
}

impl ApprovalOptions {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            ApprovalCommand::List(watched) => watched.common.json,
            ApprovalCommand::Approve(answer) | ApprovalCommand::Reject(answer) => answer.common.json,
        }
    }
}

pub(crate) async fn run(options: &ApprovalOptions) -> anyhow::Result<Exit> {
    let (answer, approve) = match &options.command {
        ApprovalCommand::List(watched) => {
            let fleet = Fleet::open(&watched.common.place)?;
            let look = || async { Ok(Listed { approvals: fleet.get("/approvals").await? }) };
            return watched.show(look, |listed| render(&listed.approvals)).await;
        }
        ApprovalCommand::Approve(answer) => (answer, true),
        ApprovalCommand::Reject(answer) => (answer, false),
    };
    let fleet = Fleet::open(&answer.common.place)?;
    let approval: Approval =
        fleet.post(&format!("/approvals/{}", answer.id), &ApprovalAnswer { approve }).await?;
    match answer.common.json {
        true => say_json(&approval)?,
        false => text::say(&format!("{}: {}\n", approval.state.as_str(), approval.what))?,
    }
    Ok(Exit::Done)
}

fn render(approvals: &[Approval]) -> String {
    if approvals.is_empty() {
        return "Nothing has waited for a second person.\n".to_owned();
    }
    let mut table = text::table(&["Approval", "What", "Asked", "By", "State"], &[]);
    for approval in approvals {
        let state = match (approval.state, &approval.answered_by) {
            (ApprovalState::Waiting, _) => format!("waiting until {}", moment(approval.expires)),
            (state, Some(who)) => format!("{} by {who}", state.as_str()),
            (state, None) => state.as_str().to_owned(),
        };
        table.add_row([
            approval.id.to_string(),
            approval.what.clone(),
            moment(approval.asked),
            approval.asked_by.clone(),
            state,
        ]);
    }
    format!("{table}\n")
}
