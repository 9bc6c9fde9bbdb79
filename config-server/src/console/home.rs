//! A group's way home after a committed failover: what runs in its place is protected onto the original disks, and then handed over.

use axum::extract::Path;
use axum::http::Method;
use axum::response::Response;
use control::fleet::{Confirm, GroupInfo, JobInfo, MachineInfo, Protect, ServerInfo, VolumeChoice};
use maud::{Markup, html};

use super::door::Visit;
use super::failover::{Stage, stage};
use super::form::Form;
use super::machine::in_path;
use super::{go, layout, words};
use crate::fault::{Answer, invalid};

/// What can be done from here; nothing when no failover is committed.
pub(super) async fn acts(visit: &Visit, group: &GroupInfo, targets: &[ServerInfo]) -> Answer<Markup> {
    if !matches!(stage(group), Stage::Committed | Stage::CommittedPromoted) {
        return Ok(html! {});
    }
    let name = words::shell(group.name.as_str());
    if let Some(reverse) = group.reversed_by {
        let line = layout::command(&format!("seawall group failback {name} --yes --watch"));
        let what = "First stop what runs in its place, and unmount its disks there. They are handed over, and the original disks become what they \
                    have; then the machine is protected as before. Nothing is lost.";
        return Ok(html! {
            p { "What runs in its place is protected, onto the original disks: "
                a href=(format!("/groups/{reverse}")) { "its way home" } "." }
            (layout::danger(visit, &format!("/groups/{}/failback", group.id), "Bring it home", what, group.name.as_str(), line))
        });
    }
    let machines: Vec<MachineInfo> = visit.door.all("/machines").await?;
    let free = machines.iter().filter(|machine| !machine.protected && machine.group != group.id);
    let machines: Vec<(String, String)> =
        free.map(|machine| (machine.id.to_string(), machine.name.to_string())).collect();
    let targets: Vec<(String, String)> =
        targets.iter().map(|server| (server.id.to_string(), server.name.to_string())).collect();
    let disks: String =
        group.volumes.iter().map(|volume| format!(" --disk {}=DISK", words::shell(&volume.name))).collect();
    let line = layout::command(&format!(
        "seawall group reverse {name} --machine MACHINE{disks} --target-server SERVER --watch"
    ));
    Ok(html! {
        details {
            summary { "Protect what runs in its place, onto the original disks" }
            form.act.fields method="post" action=(format!("/groups/{}/reverse", group.id)) {
                (layout::csrf(visit))
                p { "The machine on which the volumes are in use now is protected to a target server at the original site. That compares the original disks, \
                     and only what differs is sent; what was on them stays a recovery point until the group is home." }
                @if machines.is_empty() { p.problem { "No machine is enrolled that is not protected: enrol the one on which the volumes are in use." } }
                label { "Machine on which they are in use" (layout::select("machine", None, &machines, "")) }
                label { "Target server at the original site" (layout::select("target_server", None, &targets, "")) }
                @for volume in &group.volumes {
                    fieldset {
                        legend { (volume.name) }
                        label { "In use there as"
                            input name=(format!("disk:{}", volume.name)) required placeholder="/dev/nbd0" autocomplete="off" spellcheck="false"; }
                        label { "Original disk, by its path at that target server"
                            input name=(format!("home:{}", volume.name)) required value=(if volume.device.starts_with('/') { &volume.device } else { "" })
                                placeholder="/dev/vda" autocomplete="off" spellcheck="false"; }
                    }
                }
                label.tick { input type="checkbox" name="despite_warnings" value="yes"; " Go on although checks warn" }
                button { "Look, and protect" }
                (line)
            }
        }
    })
}

pub(super) async fn reverse(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let group: GroupInfo = visit.door.get(&format!("/groups/{}", in_path(&id)?)).await?;
    let mut volumes = Vec::new();
    for volume in &group.volumes {
        let name = volume.name.parse().map_err(|error| invalid(format!("volume: {error}")))?;
        volumes.push(VolumeChoice {
            device: form.get(&format!("disk:{}", volume.name)).to_owned(),
            name: Some(name),
            adopt: Some(form.get(&format!("home:{}", volume.name)).to_owned()),
        });
    }
    let asked = Protect {
        volumes,
        policy: Some(group.policy.clone()),
        process_server: None,
        target_servers: form.optional("target_server")?.into_iter().collect(),
        despite_warnings: form.ticked("despite_warnings"),
        reverses: Some(group.id),
    };
    let path = format!("/machines/{}/protect", in_path(form.get("machine"))?);
    let job: JobInfo = visit.door.act_for(Method::POST, &path, form.csrf(), &asked).await?;
    go(&format!("/jobs/{}", job.id))
}

pub(super) async fn fail_back(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let asked = Confirm { confirm: form.get("confirm").to_owned() };
    let path = format!("/groups/{}/failback", in_path(&id)?);
    let job: JobInfo = visit.door.act_for(Method::POST, &path, form.csrf(), &asked).await?;
    go(&format!("/jobs/{}", job.id))
}
