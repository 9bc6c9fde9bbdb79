//! A recovery point: what it is, how long it stays, and how to use it.

use axum::extract::Path;
use control::PointInfo;
use control::fleet::{GroupInfo, PointList, ProblemCode, Role, ServerInfo};
use maud::{Markup, html};

use super::door::Visit;
use super::machine::in_path;
use super::{Shown, failover, layout, timeline, words};
use crate::fault::fault;

/// What the consistency means for whoever recovers.
fn meaning(point: &PointInfo) -> &'static str {
    match point.consistency {
        block::Consistency::Application => {
            "Applications were quiesced by their hooks and filesystems frozen; they start without recovery."
        }
        block::Consistency::Filesystem => {
            "Mounted filesystems were frozen, with everything written out; applications recover as after a power cut."
        }
        _ => {
            "A state that a power cut could have left, all disks at one instant; journals are replayed on the first mount."
        }
    }
}

/// Commands that use the point, at the operator's machine.
fn commands(group: &GroupInfo, point: &PointInfo) -> Markup {
    let (id, epoch) = (group.id, point.epoch);
    let volumes: Vec<String> = group.volumes.iter().map(|volume| words::shell(&volume.name)).collect();
    let first = volumes.first().map_or("VOLUME", String::as_str);
    let lines = [
        ("List its files", format!("seawall files ls {first} / --point {epoch} --group {id}")),
        (
            "Serve it to other programs, over NBD",
            format!("seawall export {} --point {epoch} --group {id}", volumes.join(" ")),
        ),
        (
            "Start a machine on it, without network",
            format!("seawall boot {} --point {epoch} --group {id}", volumes.join(" ")),
        ),
        (
            "Write a volume to a file",
            format!("seawall restore --volume {first} --point {epoch} --group {id} --out {first}.raw"),
        ),
        ("Keep it whatever retention says", format!("seawall pin {epoch} --group {id}")),
    ];
    html! {
        ul.commands {
            @for (what, line) in &lines {
                li { span { (what) } div { code { (line) } button.plain type="button" data-copy=(line) { "Copy" } } }
            }
        }
    }
}

pub(super) async fn page(visit: Visit, Path((id, epoch)): Path<(String, u64)>) -> Shown {
    let id = in_path(&id)?;
    let group: GroupInfo = visit.door.get(&format!("/groups/{id}")).await?;
    let list: PointList = visit.door.get(&format!("/groups/{id}/points")).await?;
    // The newest may be younger than the list.
    let newest = group.newest_point.iter().chain(&group.oldest_point);
    let point = list.points.iter().chain(newest).find(|point| point.epoch.0 == epoch).ok_or_else(|| {
        fault(
            ProblemCode::NotFound,
            format!("Epoch {epoch} of {} is no recovery point that the target has told", group.name),
            format!("Retention may have let it go; `seawall points --group {}` lists all.", group.id),
        )
    })?;
    let servers: Vec<ServerInfo> = visit.door.all("/target-servers").await?;
    let live = html! {
        p.crumbs { a href=(format!("/groups/{}", group.id)) { (group.name) } " / recovery point" }
        h1 { "Epoch " (words::number(epoch)) @if let Some(label) = &point.note.label { " " span.label { (label) } } }
        p.big { (words::when(words::millis(point.cut_time))) }
        @if let Some(why) = &point.unusable { p.problem role="alert" { "It cannot be used: " (why) } }
        (layout::facts(&[
            ("Consistency", html! { strong { (point.consistency) } ". " (meaning(point)) }),
            ("Why not more", html! { @match &point.note.reason { Some(reason) => { (reason) } None => { "–" } } }),
            ("Frozen", html! {
                @match point.note.frozen {
                    Some(time) => { (words::span(i64::try_from(time.as_millis()).unwrap_or(i64::MAX))) ": " (point.note.filesystems.join(", ")) }
                    None => { "nothing" }
                }
            }),
            ("Changed since the point before", html! { (words::bytes(point.changed_bytes.get())) }),
            ("Pin", html! {
                @match &point.pin {
                    None => { "none" }
                    Some(pin) => {
                        @if let Some(label) = &pin.label { span.label { (label) } " " }
                        "since " (words::moment(words::millis(pin.pinned)))
                        @if let Some(end) = pin.expires { ", until " (words::until(words::millis(end))) }
                    }
                }
            }),
            ("Kept", timeline::kept(point)),
        ]))
        h2 { "Volumes" }
        ul { @for volume in &group.volumes { li { strong { (volume.name) } ", " (words::bytes(volume.bytes)) } } }
    };
    let rest = html! {
        section { h2 { "Use it" } p { "These commands speak to the target server, as the operator whose credentials are in the directory of " code { "--dir" } ". Replication goes on beside all of them." } (commands(&group, point))
            @if visit.user.role >= Role::Operator && point.unusable.is_none() && matches!(failover::stage(&group), failover::Stage::Protected | failover::Stage::FailedOver | failover::Stage::Committed) {
                (failover::start_form(&visit, &group, &servers, Some(epoch)))
            }
        }
    };
    Ok(super::html(layout::page(&visit, &format!("{} at epoch {epoch}", group.name), live, rest)))
}
