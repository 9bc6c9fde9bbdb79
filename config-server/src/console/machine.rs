//! Machines: the list, one with its disks, and protecting it.

use axum::extract::{Path, Query};
use axum::http::Method;
use axum::response::Response;
use control::fleet::{
    GroupInfo, JobInfo, MachineInfo, Page, PolicyInfo, Protect, Role, ServerInfo, VolumeChoice,
};
use maud::{Markup, html};

use super::door::Visit;
use super::form::Form;
use super::{Shown, go, layout, no_page, overview, words};
use crate::api::extract::Part;
use crate::fault::{Answer, not_found};

pub(super) async fn list(visit: Visit, Query(part): Query<Part>) -> Shown {
    let after = part.after_text()?;
    let machines: Page<MachineInfo> =
        visit.door.get(&format!("/machines?after={}", words::in_query(after))).await?;
    let live = html! {
        h1 { "Machines" }
        @if machines.items.is_empty() {
            p { "No machine has enrolled yet. " a href="/enrol" { "Make a token" } ", and run the command that it shows on the machine." }
        } @else {
            table.cards {
                thead { tr { th { "Machine" } th { "Protection" } th { "State" } th { "Reported" } th { "Version" } } }
                tbody {
                    @for machine in &machines.items {
                        tr {
                            td data-label="Machine" { a href=(format!("/machines/{}", machine.id)) { strong { (machine.name) } } }
                            td data-label="Protection" {
                                @if machine.protected { a href=(format!("/groups/{}", machine.group)) { "protected" } }
                                @else { span.quiet { "not protected" } }
                            }
                            td data-label="State" {
                                @if machine.protected || machine.seen.is_none() { (words::state(machine.state)) }
                                @else { span.quiet { "nothing to do" } }
                            }
                            td data-label="Reported" { (seen(machine.seen)) }
                            td data-label="Version" { (machine.version) }
                        }
                    }
                }
            }
            (layout::more("/machines", machines.next.as_deref()))
        }
    };
    let rest = html! {
        p { a.button href="/enrol" { "Enrol a machine" } }
        (layout::command("seawall machine list"))
    };
    Ok(super::html(layout::page(&visit, "Machines", live, rest)))
}

/// When a part last reported.
pub(super) fn seen(seen: Option<control::fleet::UnixMillis>) -> Markup {
    match seen {
        Some(seen) => words::ago(seen),
        None => html! { span.quiet { "not yet" } },
    }
}

/// A machine by its name: jobs know no more of theirs.
pub(super) async fn named(visit: Visit, Path(name): Path<String>) -> Answer<Response> {
    let machines: Vec<MachineInfo> = visit.door.all("/machines").await?;
    let found = machines.iter().find(|machine| machine.name.as_str() == name);
    let found = found.ok_or_else(|| not_found("machine", name.chars().take(80).collect::<String>()))?;
    go(&format!("/machines/{}", found.id))
}

async fn group_of(visit: &Visit, machine: &MachineInfo) -> Answer<Option<GroupInfo>> {
    match visit.door.get(&format!("/groups/{}", machine.group)).await {
        Ok(group) => Ok(Some(group)),
        Err(fault) if fault.is(control::fleet::ProblemCode::NotFound) => Ok(None),
        Err(fault) => Err(fault),
    }
}

fn disks(machine: &MachineInfo) -> Markup {
    html! {
        @if machine.disks.is_empty() { (layout::nothing("It has reported no disks yet.")) }
        @else {
            table.cards {
                thead { tr { th { "Disk" } th.number { "Size" } th { "What is on it" } th { "Known by" } } }
                tbody {
                    @for disk in &machine.disks {
                        tr {
                            td data-label="Disk" { code { (disk.device) } }
                            td.number data-label="Size" { (words::bytes(disk.bytes)) }
                            td data-label="What is on it" { (uses(&disk.uses)) }
                            td data-label="Known by" { span.quiet { (disk.known_by) } }
                        }
                    }
                }
            }
        }
    }
}

fn uses(uses: &[control::fleet::DiskUse]) -> String {
    let shown = uses.iter().map(|part| match (part.kind.as_str(), part.mounted.as_str()) {
        ("", "") => part.device.clone(),
        (kind, "") => kind.to_owned(),
        (kind, mounted) => format!("{kind} at {mounted}"),
    });
    shown.collect::<Vec<_>>().join(", ")
}

pub(super) async fn page(visit: Visit, Path(id): Path<String>) -> Shown {
    let machine: MachineInfo = visit.door.get(&format!("/machines/{}", in_path(&id)?)).await?;
    let group = group_of(&visit, &machine).await?;
    let live = html! {
        h1 { (machine.name) }
        @if machine.protected || machine.seen.is_none() || machine.trouble.is_some() {
            p { (words::state(machine.state)) " " (machine.meaning) }
            @if machine.state.severity() > control::Severity::Good { p { strong { "What to do: " } (machine.what_to_do) } }
        }
        @if let Some(trouble) = &machine.trouble { p.problem { (trouble) } }
        @if let Some(group) = &group {
            h2 { "Protection" }
            (overview::table(std::slice::from_ref(group)))
        } @else { p { "It is not protected." } }
        h2 { "Agent" }
        (layout::facts(&[
            ("Reported", seen(machine.seen)),
            ("Version", html! { (machine.version) }),
            ("Clock", clock(machine.clock_ahead_ms)),
            ("Certificate ends", words::until(machine.certificate_expires)),
        ]))
        h2 { "Disks" }
        (disks(&machine))
    };
    let rest = html! {
        @if visit.user.role >= Role::Operator && !machine.protected {
            p { a.button #protect href=(format!("/machines/{}/protect", machine.id)) { "Protect its disks" } }
        }
        (layout::command(&format!("seawall machine show {}", words::shell(machine.name.as_str()))))
        @if visit.user.role >= Role::Administrator && !machine.protected {
            @let path = format!("/machines/{}", machine.id);
            (layout::danger(&visit, &format!("{path}/remove"), "Remove the machine",
                "Its certificates are revoked, and it cannot report any more. Recovery points stay at the target.",
                machine.name.as_str(), layout::command(&format!("seawall machine remove {} --yes", words::shell(machine.name.as_str())))))
        }
    };
    Ok(super::html(layout::page(&visit, machine.name.as_str(), live, rest)))
}

/// How far a clock is off.
pub(super) fn clock(ahead_ms: i64) -> Markup {
    html! {
        @match ahead_ms {
            -1000..=1000 => { "right" }
            ms if ms > 0 => { (words::span(ms)) " ahead" }
            ms => { (words::span(-ms)) " behind" }
        }
    }
}

/// A part of a path that goes on to the API: no way around it.
pub(super) fn in_path(id: &str) -> Answer<&str> {
    let plain = !id.is_empty()
        && id.len() <= 64
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if plain { Ok(id) } else { Err(no_page(id)) }
}

pub(super) async fn protect_page(visit: Visit, Path(id): Path<String>) -> Shown {
    let machine: MachineInfo = visit.door.get(&format!("/machines/{}", in_path(&id)?)).await?;
    let policies: Vec<PolicyInfo> = visit.door.get("/policies").await?;
    let process: Vec<ServerInfo> = visit.door.all("/process-servers").await?;
    let targets: Vec<ServerInfo> = visit.door.all("/target-servers").await?;
    let options = |servers: &[ServerInfo]| -> Vec<(String, String)> {
        servers.iter().map(|server| (server.id.to_string(), server.name.to_string())).collect()
    };
    let policies: Vec<(String, String)> = policies
        .iter()
        .map(|policy| {
            let every = words::span(i64::try_from(policy.policy.epoch_interval_ms).unwrap_or(i64::MAX));
            (policy.id.to_string(), format!("{} (a point every {every})", policy.name))
        })
        .collect();
    let chosen =
        policies.iter().find(|(_, name)| name.starts_with("default ")).map_or("", |(id, _)| id.as_str());
    let first = machine.disks.first().map_or("/dev/vda", |disk| disk.device.as_str());
    let line =
        format!("seawall protect {} {} --watch", words::shell(machine.name.as_str()), words::shell(first));
    let content = html! {
        h1 { "Protect " (machine.name) }
        @if machine.protected { p.problem { "It is protected already." } }
        p { "First it is looked whether it can be done; nothing is changed unless every check passes." }
        form.fields method="post" action=(format!("/machines/{}/protect", machine.id)) {
            (layout::csrf(&visit))
            fieldset {
                legend { "Disks, which share every instant" }
                @for disk in &machine.disks {
                    label.tick {
                        input type="checkbox" name="disk" value=(disk.device);
                        span { code { (disk.device) } ", " (words::bytes(disk.bytes)) " " span.quiet { (uses(&disk.uses)) } }
                    }
                }
                label { "Another: a path, or serial:…, wwn:…, ptuuid:…, fsuuid:…"
                    input name="disk" placeholder="/dev/vdb" autocomplete="off" spellcheck="false"; }
            }
            label { "Policy" (layout::select("policy", None, &policies, chosen)) }
            label { "Process server" (layout::select("process_server", Some("The one with the fewest groups"), &options(&process), "")) }
            label { "Target server" (layout::select("target_server", Some("The one with the most free space"), &options(&targets), "")) }
            label.tick { input type="checkbox" name="despite_warnings"; span { "Go on although checks warn" } }
            button { "Look, and protect" }
            (layout::command(&line))
        }
    };
    Ok(super::html(layout::still(&visit, &format!("Protect {}", machine.name), content)))
}

pub(super) async fn protect(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let asked = Protect {
        volumes: form.all("disk").into_iter().map(VolumeChoice::of).collect(),
        policy: form.optional("policy")?,
        process_server: form.optional("process_server")?,
        target_servers: form.optional("target_server")?.into_iter().collect(),
        despite_warnings: form.ticked("despite_warnings"),
        reverses: None,
    };
    let path = format!("/machines/{}/protect", in_path(&id)?);
    let job: JobInfo = visit.door.act_for(Method::POST, &path, form.csrf(), &asked).await?;
    go(&format!("/jobs/{}", job.id))
}

pub(super) async fn remove(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    super::access::destroy(&visit, &format!("/machines/{}", in_path(&id)?), &form, "/machines").await
}
