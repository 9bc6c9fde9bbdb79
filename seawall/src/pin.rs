//! `seawall pin`, `seawall unpin`, `seawall point delete`.

use crate::config::Place;
use block::{GroupId, Label};
use clap::Args;
use control::PointSelector;
use std::io::{IsTerminal, Write};

use anyhow::{bail, ensure};
use block::{Epoch, UnixNanos};
use control::{DeleteReply, OperatorRequest, PinReply};

use crate::ask::Servers;
use crate::text;

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
    /// Which: `latest`, `application` (the newest application-consistent one), or the number of an epoch
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
    /// Which: `latest`, `application` (the newest application-consistent one), or the number of an epoch
    #[arg(value_name = "POINT")]
    pub(crate) point: PointSelector,
    /// Group, where there are several
    #[arg(long, value_name = "ID")]
    pub(crate) group: Option<GroupId>,
    /// One JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn pin(options: &PinOptions) -> anyhow::Result<()> {
    let servers = Servers::load(&options.place)?;
    let group = servers.one_group(options.group).await?.group;
    let expires = options.lasts.map(|lasts| {
        let nanos = u64::try_from(lasts.as_nanos()).unwrap_or(u64::MAX);
        UnixNanos(UnixNanos::now().0.saturating_add(nanos))
    });
    let request = OperatorRequest::Pin { group, point: options.point, label: options.label.clone(), expires };
    let reply: PinReply = servers.change(&request).await?;
    if options.json {
        return Ok(text::say(&format!("{}\n", serde_json::to_string(&reply)?))?);
    }
    let label = options.label.as_ref().map(|label| format!(" \"{label}\"")).unwrap_or_default();
    let until = match expires {
        None => "until it is unpinned".to_owned(),
        Some(expires) => format!("until {}", text::instant(expires).0),
    };
    let (local, _) = text::instant(reply.point.cut_time);
    Ok(text::say(&format!("Point {} of {local} is pinned{label} {until}.\n", reply.point.epoch))?)
}

pub(crate) async fn unpin(options: &UnpinOptions) -> anyhow::Result<()> {
    let servers = Servers::load(&options.place)?;
    let group = servers.one_group(options.group).await?.group;
    let reply: PinReply = servers.change(&OperatorRequest::Unpin { group, point: options.point }).await?;
    let shown = match options.json {
        true => format!("{}\n", serde_json::to_string(&reply)?),
        false => format!("Point {} is left to retention again.\n", reply.point.epoch),
    };
    Ok(text::say(&shown)?)
}

pub(crate) async fn delete(options: &PointDeleteOptions) -> anyhow::Result<()> {
    let servers = Servers::load(&options.place)?;
    let group = servers.one_group(options.group).await?;
    let epoch = Epoch(options.point);
    if !options.yes {
        let about = format!("Point {epoch} of group {} will be gone for good.", group.group);
        ensure!(
            std::io::stdin().is_terminal(),
            "delete point {epoch}: {about} There is nobody to ask here; say --yes"
        );
        eprint!("{about} Type its number to delete it: ");
        std::io::stderr().flush()?;
        let mut typed = String::new();
        std::io::stdin().read_line(&mut typed)?;
        if typed.trim() != epoch.to_string() {
            bail!("delete point {epoch}: {:?} was typed; nothing was deleted", typed.trim());
        }
    }
    let reply: DeleteReply =
        servers.change(&OperatorRequest::DeletePoint { group: group.group, epoch }).await?;
    let shown = match options.json {
        true => format!("{}\n", serde_json::to_string(&reply)?),
        false => format!("Point {} is gone; {} are left.\n", reply.epoch, reply.points),
    };
    Ok(text::say(&shown)?)
}
