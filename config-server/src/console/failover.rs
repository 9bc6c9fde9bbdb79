//! A group's way through a failover: where it stands, and the buttons for what can be done next.

use axum::extract::Path;
use axum::http::Method;
use axum::response::Response;
use control::fleet::{
    Confirm, GroupDrill, GroupInfo, JobInfo, Policy, ServerInfo, StartFailover, StartProof,
};
use control::{ExportPlace, PointSelector};
use maud::{Markup, html};
use serde_json::json;

use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{go, layout, words};
use crate::fault::Answer;

/// Where a group stands, in the order of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Protected,
    /// A failover has begun and is not complete.
    FailingOver,
    FailedOver,
    Promoted,
    Committed,
    /// Committed, and written at the target.
    CommittedPromoted,
}

pub(super) fn stage(group: &GroupInfo) -> Stage {
    let Some(standing) = &group.failover else { return Stage::Protected };
    match (standing.failover, standing.promoted) {
        (Some(pending), _) if !pending.complete => Stage::FailingOver,
        (Some(_), None) => Stage::FailedOver,
        (Some(_), Some(_)) => Stage::Promoted,
        (None, None) => Stage::Committed,
        (None, Some(_)) => Stage::CommittedPromoted,
    }
}

impl Stage {
    /// For the page's script, which tells of buttons that are of another stage.
    pub(super) fn code(self) -> &'static str {
        match self {
            Stage::Protected => "protected",
            Stage::FailingOver => "failing-over",
            Stage::FailedOver => "failed-over",
            Stage::Promoted => "promoted",
            Stage::Committed => "committed",
            Stage::CommittedPromoted => "committed-promoted",
        }
    }
}

/// The way, with the place where the group is.
pub(super) fn way(group: &GroupInfo) -> Markup {
    let now = stage(group);
    let promoted = matches!(now, Stage::Promoted | Stage::CommittedPromoted);
    let committed = now >= Stage::Committed;
    let pending = group.failover.as_ref().and_then(|standing| standing.failover);
    let places = [
        ("Protected", now == Stage::Protected, "writes are captured and arrive"),
        (
            "Failed over",
            matches!(now, Stage::FailingOver | Stage::FailedOver),
            "the source is fenced, nothing is decided",
        ),
        ("Promoted", promoted, "the volumes are written at the target"),
        ("Committed", committed, "for good; the machine is not protected"),
    ];
    html! {
        ol.way aria-label="Lifecycle" {
            @for (name, here, what) in places {
                li.here[here] aria-current=[here.then_some("step")] { strong { (name) } span.quiet { (what) } }
            }
        }
        @if now != Stage::Protected {
            p {
                @match pending {
                    Some(pending) if !pending.complete => { "Failing over to point " (words::number(pending.point.0)) " is " strong { "not complete" } ": fail over to it again, or cancel it." }
                    Some(pending) => {
                        "Failed over to point " (words::number(pending.point.0)) ". Commit it, or cancel it."
                        @if pending.written_bytes.get() > 0 { " Written since: " strong { (pending.written_bytes) } "; cancelling gives that up." }
                    }
                    None => { "The failover is committed; the newest state is at the target." }
                }
                @if let Some(promoted) = group.failover.as_ref().and_then(|standing| standing.promoted) {
                    " Promoted " (words::ago(words::millis(promoted.since))) "; " (words::count(promoted.open, "volume is", "volumes are")) " exported for writing."
                }
            }
        }
        @if group.handed_over { p.problem { "The machine's disks are handed over: nothing can write to them there." } }
    }
}

fn line(name: &str, step: &str) -> Markup {
    layout::command(&format!("seawall group failover {step} {} --watch", words::shell(name)))
}

/// The form that begins a failover; to one point where it is of that point's page.
pub(super) fn start_form(
    visit: &Visit,
    group: &GroupInfo,
    targets: &[ServerInfo],
    epoch: Option<u64>,
) -> Markup {
    let name = group.name.as_str();
    let several: Vec<(String, String)> = targets
        .iter()
        .filter(|server| group.target_servers.contains(&server.id))
        .map(|server| (server.id.to_string(), server.name.to_string()))
        .collect();
    let what = "From the start on nothing of the machine is taken. Until it is committed it can be cancelled, and nothing is lost.";
    let point = epoch.map_or("latest".to_owned(), |epoch| epoch.to_string());
    html! {
        details.danger {
            summary { @match epoch { Some(_) => "Fail over to this point", None => "Fail over" } }
            form.act.fields method="post" action=(format!("/groups/{}/failover", group.id)) {
                (layout::csrf(visit))
                p { (what) }
                @match epoch {
                    Some(epoch) => { input type="hidden" name="point" value=(epoch); }
                    None => {
                        label { "To which point"
                            select name="point" {
                                option value="latest" { "the newest" }
                                option value="application" { "the newest that is application-consistent" }
                            } }
                        p.quiet { "Another one: open it in the timeline of recovery points." }
                        label.tick { input type="checkbox" name="planned" value="yes" disabled[!group.protected];
                            " Planned: the machine hands over its unmounted disks first, and nothing is lost" }
                    }
                }
                label.tick { input type="checkbox" name="promote" value="yes"; " Then take writes to the volumes at the target" }
                @if several.len() > 1 { label { "At which target server" (layout::select("target_server", None, &several, "")) } }
                (typed(name))
                button.destroys { "Fail over" }
                (layout::command(&format!("seawall group failover start {} --point {point} --yes --watch", words::shell(name))))
            }
        }
    }
}

fn typed(name: &str) -> Markup {
    html! {
        label { "Type " strong { (name) } " to go on"
            input name="confirm" required autocomplete="off" spellcheck="false" pattern=(layout::literal(name)) title=(format!("Type {name}"));
        }
    }
}

/// What can be done from here.
pub(super) fn acts(visit: &Visit, group: &GroupInfo, targets: &[ServerInfo]) -> Markup {
    let (name, path) = (group.name.as_str(), format!("/groups/{}", group.id));
    let now = stage(group);
    let at = |step: &str| format!("{path}/failover/{step}");
    let open = group
        .failover
        .as_ref()
        .and_then(|standing| standing.promoted)
        .is_some_and(|promoted| promoted.open > 0);
    let cancel = "The volumes become what they were, and the machine is taken again. What was written at the target since is given up.";
    html! {
        div.acts {
            @if matches!(now, Stage::FailedOver | Stage::Committed) {
                form.act method="post" action=(at("promote")) {
                    h3 { "Promote" }
                    (layout::csrf(visit))
                    p { "The volumes can be written to at the target: " code { "seawall export --promoted" } " serves them." }
                    button { "Promote" }
                    (line(name, "promote"))
                }
            }
            @if matches!(now, Stage::Promoted | Stage::CommittedPromoted) {
                form.act method="post" action=(at("demote")) {
                    h3 { "Demote" }
                    (layout::csrf(visit))
                    p { "What was written is applied, and becomes a recovery point. "
                        @if open { strong { "Volumes are exported for writing: end that first." } } }
                    button disabled[open] { "Demote" }
                    (line(name, "demote"))
                }
            }
            @if group.handed_over || now == Stage::Committed {
                form.act method="post" action=(at("release")) {
                    h3 { "Release the machine's disks" }
                    (layout::csrf(visit))
                    p { "Everybody at the machine can write to its disks again. What is written there "
                        @if now == Stage::Protected { "is replicated as before." } @else { "is not taken." } }
                    button { "Release" }
                    (line(name, "release"))
                }
            }
        }
        @if matches!(now, Stage::FailedOver | Stage::Promoted) {
            (layout::danger(visit, &at("commit"), "Commit the failover",
                "It is for good: the machine is not protected any more, and what it has written after the point is given up.", name,
                line(name, "commit")))
        }
        @if matches!(now, Stage::FailedOver | Stage::FailingOver) {
            (layout::danger(visit, &at("cancel"), "Cancel the failover", cancel, name, line(name, "cancel")))
        }
        @if matches!(now, Stage::Protected | Stage::FailingOver | Stage::FailedOver | Stage::Committed) && group.newest_point.is_some() {
            (start_form(visit, group, targets, None))
        }
    }
}

async fn begin(
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

pub(super) async fn start(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let asked = StartFailover {
        confirm: form.get("confirm").to_owned(),
        point: form.optional("point")?.unwrap_or(PointSelector::Latest),
        planned: form.ticked("planned"),
        promote: form.ticked("promote"),
        target_server: form.optional("target_server")?,
    };
    begin(&visit, &id, "failover", &form, &asked).await
}

/// Begins a drill.
pub(super) async fn drill(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let hours: u64 = form.value("hours")?;
    let asked = json!({
        "point": form.optional("point")?.unwrap_or(PointSelector::Latest),
        "lasts_s": hours.saturating_mul(3600),
    });
    begin(&visit, &id, "drill", &form, &asked).await
}

/// Ends one.
pub(super) async fn end_drill(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    begin(&visit, &id, "drill/end", &form, &json!({ "name": form.get("name") })).await
}

/// The drills that are running.
pub(super) fn drills(group: &GroupInfo, targets: &[ServerInfo]) -> Markup {
    let at = |drill: &GroupDrill| {
        let server = targets.iter().find(|server| server.id == drill.target_server);
        let name = server.map_or(drill.target_server.as_str(), |server| server.name.as_str());
        match &drill.export.place {
            ExportPlace::Tls(address) => format!("nbds://{address} ({name})"),
            _ => name.to_owned(),
        }
    };
    html! {
        @for drill in &group.drills {
            @let export = &drill.export;
            p { "Drill " strong { (export.drill.as_ref().map(ToString::to_string).unwrap_or_default()) } ": point " (words::number(export.point.epoch.0))
                " of " (words::moment(words::millis(export.point.cut_time))) " is served for writing at " code { (at(drill)) } "; "
                (words::count(export.connections, "client", "clients")) ", " (export.overlay_bytes) " written."
                @if let Some(until) = export.until { " It ends " (words::when(words::millis(until))) "." } }
        }
    }
}

/// The form for drills: to begin one, or to end the one that is running.
pub(super) fn drill_forms(visit: &Visit, group: &GroupInfo) -> Markup {
    let (path, name) = (format!("/groups/{}/drill", group.id), words::shell(group.name.as_str()));
    html! {
        @for drill in group.drills.iter().filter_map(|drill| drill.export.drill.as_ref()) {
            form.act method="post" action=(format!("{path}/end")) {
                h3 { "End the drill " (drill) }
                (layout::csrf(visit))
                input type="hidden" name="name" value=(drill);
                p { "Its clients are disconnected, and what was written is dropped." }
                button { "End the drill" }
                (layout::command(&format!("seawall group drill stop {name} --name {} --watch", words::shell(drill.as_str()))))
            }
        }
        @if group.drills.is_empty() {
            form.act.fields method="post" action=(path) {
                h3 { "Drill" }
                (layout::csrf(visit))
                p { "The target serves all volumes at a point, writable, to try a recovery out. Replication goes on; what is written is dropped at the end." }
                label { "Which point"
                    select name="point" {
                        option value="latest" { "the newest" }
                        option value="application" { "the newest that is application-consistent" }
                    } }
                label { "For at most so many hours" input name="hours" type="number" min="1" max="720" value="4" required; }
                button { "Begin the drill" }
                (layout::command(&format!("seawall group drill start {name} --point latest --for 4h --watch")))
            }
        }
    }
}

/// Begins a boot proof.
pub(super) async fn prove(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let expect: Vec<String> = form.get("expect").lines().map(|line| line.trim().to_owned()).collect();
    let expect: Vec<String> = expect.into_iter().filter(|line| !line.is_empty()).collect();
    let asked = StartProof {
        point: form.optional("point")?.unwrap_or_default(),
        expect: (!expect.is_empty()).then_some(expect),
        ..StartProof::default()
    };
    begin(&visit, &id, "prove", &form, &asked).await
}

/// The form for that.
pub(super) fn prove_form(visit: &Visit, group: &GroupInfo, policy: &Policy) -> Markup {
    let proof = policy.proof.clone().unwrap_or_default();
    let name = words::shell(group.name.as_str());
    let expect: String =
        proof.expect.iter().map(|text| format!(" --expect {}", words::shell(text))).collect();
    html! {
        form.act.fields method="post" action=(format!("/groups/{}/prove", group.id)) {
            h3 { "Prove that it comes up" }
            (layout::csrf(visit))
            p { "The target server starts a machine on overlays of a point, without a network. Replication goes on. "
                @match (&policy.proof, proof.every_s) {
                    (Some(_), every_s @ 1..) => { "By its policy that is done every " strong { (words::span(i64::try_from(every_s).unwrap_or(i64::MAX / 1000).saturating_mul(1000))) } "." }
                    _ => { "Its policy can ask for it regularly." }
                } }
            label { "Which point"
                select name="point" {
                    option value="latest" { "the newest" }
                    option value="application" { "the newest that is application-consistent" }
                } }
            label { "What its serial console must say, a line each"
                textarea name="expect" rows=(proof.expect.len()) maxlength="1700" spellcheck="false" { (proof.expect.join("\n")) } }
            button { "Start a machine" }
            (layout::command(&format!("seawall group prove {name} --point latest{expect} --watch")))
        }
    }
}

/// The other steps.
pub(super) async fn step(
    visit: Visit,
    Path((id, step)): Path<(String, String)>,
    form: Form,
) -> Answer<Response> {
    let typed = Confirm { confirm: form.get("confirm").to_owned() };
    match step.as_str() {
        "commit" | "cancel" => begin(&visit, &id, &format!("failover/{step}"), &form, &typed).await,
        "promote" | "demote" | "release" => begin(&visit, &id, &step, &form, &json!({})).await,
        other => Err(super::no_page(other)),
    }
}
