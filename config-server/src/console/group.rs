//! A group: can it be recovered and to when, the age of its newest point stage by stage, its points, its figures over time.

use axum::extract::Path;
use axum::http::Method;
use axum::response::Response;
use control::fleet::{
    ChangeGroup, ChangeTargets, GroupInfo, JobInfo, PointList, PointNow, PolicyInfo, Role, RpoStage,
    ServerInfo, Unprotect,
};
use maud::{Markup, html};
use serde_json::json;

use super::asset::address;
use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{Shown, failover, go, layout, overview, timeline, words};
use crate::fault::Answer;

/// The steps of the ladder, with the stage that explains each.
fn ladder(group: &GroupInfo) -> Markup {
    let ladder = &group.ladder;
    let steps = [
        ("Captured", ladder.captured, "the open epoch, whose changes are still arriving", Some("capture")),
        ("Sealed", ladder.sealed, "ended by a cut and encrypted, at the machine", None),
        ("Cached", ladder.cached, "held by the process server, durably", Some("send")),
        ("Applied", ladder.applied, "in the replica at the target, durably", Some("apply")),
        ("Oldest kept", ladder.oldest_kept, "how far back one can go", None),
    ];
    html! {
        ol.ladder {
            @for (name, epoch, what, stage) in steps {
                @let stage = stage.and_then(|name| group.rpo_stages.iter().find(|stage| stage.stage == name));
                li {
                    div.step { strong { (name) } span.epoch { @if epoch.0 == 0 { "–" } @else { "epoch " (words::number(epoch.0)) } } }
                    div.quiet { (what) }
                    @if let Some(stage) = stage { (explained(stage)) }
                }
            }
        }
    }
}

fn explained(stage: &RpoStage) -> Markup {
    html! {
        div.explained {
            (words::state(stage.state)) " "
            @if let Some(ms) = stage.ms { strong { (words::span(ms)) } " " }
            (stage.explanation)
            @if let Some(error) = &stage.last_error { p.problem { (error) } }
        }
    }
}

/// What each stage has of the age, as a bar. The parts add up to it as far as they are known.
fn bar(stages: &[RpoStage]) -> Markup {
    const WIDTH: i64 = 1000;
    let known: Vec<(&str, i64)> =
        stages.iter().filter_map(|stage| Some((stage.stage.as_str(), stage.ms?.max(0)))).collect();
    let all: i64 = known.iter().map(|(_, ms)| ms).sum();
    let mut at = 0;
    let mut parts = Vec::new();
    for (name, ms) in &known {
        let width = ms.saturating_mul(WIDTH).checked_div(all).unwrap_or(0);
        parts.push((*name, *ms, at, width));
        at += width;
    }
    html! {
        @if all > 0 {
            svg.bar viewBox=(format!("0 0 {WIDTH} 20")) preserveAspectRatio="none" role="img" aria-label="Parts of the age" {
                @for (name, ms, at, width) in &parts {
                    rect.(name) x=(at) y="0" width=(width) height="20" { title { (name) ": " (words::span(*ms)) } }
                }
            }
            p.legend {
                @for (name, ms, ..) in &parts { span { span.key.(name) aria-hidden="true" {} (name) " " strong { (words::span(*ms)) } } }
            }
        }
    }
}

fn answer(group: &GroupInfo) -> Markup {
    let (severity, text) = overview::standing(group);
    let (class, sign) = words::sign(severity);
    html! {
        section.answer.(class) {
            h1 { (group.name) }
            p.big { span aria-hidden="true" { (sign) } " " (text)
                @if let Some(point) = &group.newest_point {
                    ": to " strong { (words::moment(words::millis(point.cut_time))) } ", " (words::ago(words::millis(point.cut_time)))
                }
            }
            p { (words::state(group.state)) " " (group.meaning) }
            p { "Last proven to come up: "
                @match &group.proof {
                    Some(proof) => { "point " (words::number(proof.epoch.0)) " of " (words::moment(words::millis(proof.cut_time)))
                        ", in " strong { (words::span(i64::try_from(proof.took_ms).unwrap_or(i64::MAX))) } " (" (words::ago(words::millis(proof.proven))) ")" }
                    None => { "never" }
                } }
            @if group.severity > control::Severity::Good { p { strong { "What to do: " } (group.what_to_do) } }
            @for warning in &group.warnings { p.problem { (warning) } }
        }
    }
}

fn volumes(group: &GroupInfo) -> Markup {
    html! {
        table.cards {
            thead { tr { th { "Volume" } th { "Disk" } th.number { "Size" } th { "Capture" } th.number { "To be read" } } }
            tbody {
                @for volume in &group.volumes {
                    tr {
                        td data-label="Volume" { strong { (volume.name) } }
                        td data-label="Disk" { code { (volume.device) } }
                        td.number data-label="Size" { (words::bytes(volume.bytes)) }
                        td data-label="Capture" { @match volume.mode { Some(mode) => { (mode) ": " (mode_meaning(mode)) } None => { "not known yet" } } }
                        td.number data-label="To be read" { (words::bytes(volume.dirty_bytes)) }
                    }
                }
            }
        }
    }
}

fn mode_meaning(mode: control::CaptureMode) -> &'static str {
    match mode {
        control::CaptureMode::Data => "each write's bytes are captured",
        control::CaptureMode::Scan => "the whole volume is read and compared at each interval",
        control::CaptureMode::Bitmap => "where was written is captured, the bytes are read later",
        control::CaptureMode::Lost => "there is a gap; the volume is compared",
    }
}

/// Names of servers, for their ids.
async fn server_names(visit: &Visit) -> Answer<Vec<ServerInfo>> {
    let mut servers: Vec<ServerInfo> = visit.door.all("/process-servers").await?;
    servers.extend(visit.door.all::<ServerInfo>("/target-servers").await?);
    Ok(servers)
}

pub(super) async fn page(visit: Visit, Path(id): Path<String>) -> Shown {
    let id = in_path(&id)?;
    let group: GroupInfo = visit.door.get(&format!("/groups/{id}")).await?;
    let points: PointList = visit.door.get(&format!("/groups/{id}/points")).await?;
    let policy: PolicyInfo = visit.door.get(&format!("/policies/{}", group.policy)).await?;
    let servers = server_names(&visit).await?;
    let name_of = |id: &control::fleet::ResourceId| {
        let found = servers.iter().find(|server| server.id == *id);
        found.map_or_else(|| id.to_string(), |server| server.name.to_string())
    };
    let targets: Vec<String> = group.target_servers.iter().map(&name_of).collect();
    let live = html! {
        (answer(&group))
        div.columns {
            section {
                h2 { "Why the newest point is as old as it is" }
                (bar(&group.rpo_stages))
                (ladder(&group))
            }
            section {
                h2 { "Now" }
                (layout::facts(&[
                    ("Holds it up", html! { (overview::bottleneck(&group)) }),
                    ("Allowed age", html! { (words::span(group.rpo_ms_max)) }),
                    ("Written", html! { (words::rate(group.churn_bytes_per_s)) }),
                    ("Sent", html! { (words::rate(group.sent_bytes_per_s)) }),
                    ("Not applied yet", html! { (words::bytes(group.lag_bytes)) }),
                    ("Recovery points", html! { (words::number(group.points)) }),
                    ("Oldest", html! { @match &group.oldest_point { Some(point) => { (words::when(words::millis(point.cut_time))) } None => { "none" } } }),
                    ("Policy", html! { a href=(format!("/policies/{}", group.policy)) { (group.policy_name) } ": " (policy.policy.retention_text()) }),
                    ("Process server", html! { (name_of(&group.process_server)) }),
                    ("Target server", html! { (targets.join(", ")) }),
                    ("Generation", html! { (group.failover.as_ref().map_or(group.generation, |standing| standing.generation)) }),
                ]))
                h3 { "Volumes" }
                (volumes(&group))
            }
        }
        section data-stage=(failover::stage(&group).code()) { h2 { "Lifecycle" } (failover::way(&group)) (failover::drills(&group, &servers)) }
        section { h2 { "Recovery points" } (timeline::show(&group, &points, &policy.policy)) }
    };
    let rest = html! {
        (charts(&group))
        (acts(&visit, &group, &policy, &servers).await?)
        link rel="stylesheet" href=(address("uPlot.css"));
        script defer src=(address("uPlot.js")) {}
        script defer src=(address("charts.js")) {}
    };
    Ok(super::html(layout::page(&visit, group.name.as_str(), live, rest)))
}

fn charts(group: &GroupInfo) -> Markup {
    let chart = |series: &str, title: &str| {
        html! {
            figure.chart data-series=(series) {
                figcaption { (title) span.latest {} }
                div.plot {}
            }
        }
    };
    html! {
        section #charts data-samples=(format!("/api/v1/groups/{}/samples", group.id)) data-allowed=(group.rpo_ms_max) {
            div.bar-of-buttons {
                h2 { "Over time" }
                div role="group" aria-label="How far back" {
                    @for (hours, label) in [(1, "1 h"), (6, "6 h"), (168, "7 days"), (2160, "90 days")] {
                        button.plain type="button" data-hours=(hours) aria-pressed=(if hours == 1 { "true" } else { "false" }) { (label) }
                    }
                }
            }
            p.quiet #charts-say role="status" { "Figures appear when the agent has reported for a while." }
            div.charts {
                (chart("rpo", "Age of the newest point"))
                (chart("rates", "Written and sent"))
                (chart("waiting", "Waiting: to be read, and to be sent"))
            }
        }
    }
}

async fn acts(
    visit: &Visit,
    group: &GroupInfo,
    policy: &PolicyInfo,
    servers: &[ServerInfo],
) -> Answer<Markup> {
    if visit.user.role < Role::Operator {
        return Ok(html! {});
    }
    let policies: Vec<PolicyInfo> = visit.door.get("/policies").await?;
    let policies: Vec<(String, String)> =
        policies.iter().map(|policy| (policy.id.to_string(), policy.name.to_string())).collect();
    let process: Vec<ServerInfo> = visit.door.all("/process-servers").await?;
    let process: Vec<(String, String)> =
        process.iter().map(|server| (server.id.to_string(), server.name.to_string())).collect();
    let targets: Vec<ServerInfo> = visit.door.all("/target-servers").await?;
    let home = super::home::acts(visit, group, &targets).await?;
    let path = format!("/groups/{}", group.id);
    let name = group.name.as_str();
    Ok(html! {
        section #lifecycle data-stage=(failover::stage(group).code()) {
            h2 { "Fail over, and back" }
            p.problem data-changed hidden { "This has changed meanwhile. " a href=(path) { "Show what can be done now" } }
            (failover::acts(visit, group, servers))
            (home)
        }
        section {
            h2 { "Act" }
            div.acts {
                @if group.protected {
                    form.act.fields method="post" action=(format!("{path}/point")) {
                        h3 { "Take a recovery point now" }
                        (layout::csrf(visit))
                        label { "What it should be"
                            select name="consistency" {
                                option value="application" { "application: quiesced by hooks" }
                                option value="filesystem" { "filesystem: frozen" }
                                option value="crash" { "crash: as after a power cut" }
                            } }
                        label { "Label" input name="label" maxlength="128" autocomplete="off"; }
                        button { "Take a point" }
                        (layout::command(&format!("seawall group point {} --consistency application --watch", words::shell(name))))
                    }
                    form.act.fields method="post" action=(format!("{path}/targets")) {
                        h3 { "Target servers" }
                        (layout::csrf(visit))
                        p { "A new one is compared with the disks before it has a point; those that are left stay until it has." }
                        fieldset {
                            legend { "It goes to" }
                            @for server in &targets {
                                label.check { input type="checkbox" name="target_server" value=(server.id) checked[group.target_servers.contains(&server.id)]; (server.name) }
                            }
                        }
                        label.check { input type="checkbox" name="despite_warnings" value="yes"; "Go on although checks warn" }
                        button { "Change" }
                        (layout::command(&targets_line(group, &targets)))
                    }
                    form.act method="post" action=(format!("{path}/resync")) {
                        h3 { "Resync" }
                        (layout::csrf(visit))
                        p { "Compare the disks with the replica, and send what differs. Points follow when it is done." }
                        button { "Compare now" }
                        (layout::command(&format!("seawall group resync {} --watch", words::shell(name))))
                    }
                }
                @if group.newest_point.is_some() { (failover::drill_forms(visit, group)) (failover::prove_form(visit, group, &policy.policy)) }
                form.act.fields method="post" action=(format!("{path}/change")) {
                    h3 { "Policy and placement" }
                    (layout::csrf(visit))
                    label { "Policy" (layout::select("policy", None, &policies, policy.id.as_str())) }
                    label { "Process server" (layout::select("process_server", None, &process, group.process_server.as_str())) }
                    button { "Change" }
                    (layout::command(&change_line(group, &process)))
                }
            }
            @if group.protected {
                (layout::danger(visit, &format!("{path}/unprotect"), "End the protection",
                    "Its disks are not captured any more. The recovery points stay.", name,
                    layout::command(&format!("seawall unprotect {} --yes", words::shell(name)))))
            } @else if visit.user.role >= Role::Administrator {
                (layout::danger(visit, &format!("{path}/remove"), "Remove the group",
                    "The fleet forgets it, and its servers serve it no more. Their files stay until a person deletes them there.", name,
                    layout::command(&format!("seawall group remove {} --yes", words::shell(name)))))
            }
        }
    })
}

/// The command that gives a group the policy and the process server that it has; one changes what is to change.
fn change_line(group: &GroupInfo, process: &[(String, String)]) -> String {
    let server = process.iter().find(|(id, _)| *id == group.process_server.as_str());
    let server =
        server.map_or_else(String::new, |(_, name)| format!(" --process-server {}", words::shell(name)));
    let policy = words::shell(group.policy_name.as_str());
    format!("seawall group change {} --policy {policy}{server}", words::shell(group.name.as_str()))
}

/// The command that gives a group the target servers that it has.
fn targets_line(group: &GroupInfo, targets: &[ServerInfo]) -> String {
    let has = targets.iter().filter(|server| group.target_servers.contains(&server.id));
    let named: String =
        has.map(|server| format!(" --target-server {}", words::shell(server.name.as_str()))).collect();
    format!("seawall group targets {}{named} --watch", words::shell(group.name.as_str()))
}

pub(super) async fn change_targets(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let named = form.all("target_server");
    let named: Result<_, _> = named.into_iter().map(|id| id.parse()).collect();
    let target_servers = named.map_err(|error| crate::fault::invalid(format!("target_server: {error}")))?;
    let asked = ChangeTargets { target_servers, despite_warnings: form.ticked("despite_warnings") };
    job(&visit, &id, "targets", &form, &asked).await
}

pub(super) async fn take_point(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let consistency = match form.get("consistency") {
        "application" => block::Consistency::Application,
        "filesystem" => block::Consistency::Filesystem,
        "crash" => block::Consistency::Crash,
        other => {
            return Err(crate::fault::invalid(format!(
                "consistency is {other:?}, expected application, filesystem or crash"
            )));
        }
    };
    let asked = PointNow { consistency, label: form.optional("label")? };
    job(&visit, &id, "point", &form, &asked).await
}

pub(super) async fn resync(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    job(&visit, &id, "resync", &form, &json!({})).await
}

pub(super) async fn unprotect(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let asked = Unprotect { confirm: form.get("confirm").to_owned() };
    job(&visit, &id, "unprotect", &form, &asked).await
}

async fn job(
    visit: &Visit,
    id: &str,
    act: &str,
    form: &Form,
    asked: &impl serde::Serialize,
) -> Answer<Response> {
    let path = format!("/groups/{}/{act}", in_path(id)?);
    let job: JobInfo = visit.door.act_for(Method::POST, &path, form.csrf(), asked).await?;
    go(&format!("/jobs/{}", job.id))
}

pub(super) async fn change(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/groups/{}", in_path(&id)?);
    let now: GroupInfo = visit.door.get(&path).await?;
    let (policy, server) = (form.optional("policy")?, form.optional("process_server")?);
    // Only what was changed, so that the log says no more than what was meant.
    let asked = ChangeGroup {
        policy: policy.filter(|policy| *policy != now.policy),
        process_server: server.filter(|server| *server != now.process_server),
    };
    let answer = visit.door.act(Method::PATCH, &path, form.csrf(), &asked).await?;
    super::access::done_or_waits(&answer, &path)
}

pub(super) async fn remove(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    super::access::destroy(&visit, &format!("/groups/{}", in_path(&id)?), &form, "/machines").await
}
