//! `seawall pin`, `seawall unpin`, `seawall point delete`.

use std::io::{IsTerminal, Write};

use anyhow::{bail, ensure};
use block::{Epoch, UnixNanos};
use control::{DeleteReply, OperatorRequest, PinReply};

use crate::ask::Servers;
use crate::cli::{PinOptions, PointDeleteOptions, UnpinOptions};
use crate::text;

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
