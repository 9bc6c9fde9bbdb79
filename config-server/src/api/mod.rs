//! The API: every act in one list, of which the router and the OpenAPI document are made.

pub(crate) mod access;
mod act;
mod alert;
pub(crate) mod approval;
pub(crate) mod declare;
pub(crate) mod enrol;
mod event;
pub(crate) mod extract;
mod failover;
pub(crate) mod guard;
mod look;
mod plan;
pub(crate) mod policy;

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderValue, Request, Uri};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use control::fleet as f;
use control::fleet::ProblemCode;
use serde_json::{Value, json};

use crate::app::Shared;
use crate::fault::{Fault, fault};
pub(crate) use act::API;
use act::{ADMINISTER, Act, ENROL, Need, OPERATE, VIEW};
pub(crate) use event::{STREAMS_MAX, watch_events};

/// Every act of the API.
fn acts() -> Vec<Act> {
    let mut acts = for_everybody();
    acts.extend(access());
    acts.extend(fleet());
    acts.extend(protection());
    acts.extend(recovery());
    acts.extend(happening());
    acts
}

fn for_everybody() -> Vec<Act> {
    vec![
        Act::get("/openapi.json", Need::Nothing, "This document", look::openapi)
            .gives_text("application/json", "The document"),
        Act::get("/health", Need::Nothing, "Whether the config server and its store answer", look::health)
            .gives_nothing("Both answer"),
        Act::post("/login", Need::Nothing, "Begin a session", access::login)
            .takes::<f::Login>()
            .gives::<f::Session>(200, "The session; its secret is in the cookie"),
        Act::post("/enrol", Need::Nothing, "Enrol a part with a token", enrol::enrol)
            .takes::<f::Enrol>()
            .gives::<f::Enrolled>(201, "Its certificate"),
        Act::post("/part/renew", Need::Part, "A new certificate for a part", enrol::renew)
            .takes::<f::Renew>()
            .gives::<f::Renewed>(201, "The certificate"),
        Act::post("/part/check-in", Need::Part, "Report, and hear what to do", event::check_in)
            .unaudited()
            .takes::<f::CheckIn>()
            .gives::<f::CheckInReply>(200, "What to do"),
    ]
}

fn access() -> Vec<Act> {
    vec![
        Act::post("/logout", VIEW, "End the session", access::logout).gives_nothing("It has ended"),
        Act::get("/me", VIEW, "Who asks", access::me).gives::<f::UserInfo>(200, "The user"),
        Act::put(
            "/me/password",
            VIEW,
            "Change the own password; all own sessions end",
            access::change_own_password,
        )
        .takes::<f::ChangePassword>()
        .gives_nothing("It is changed"),
        Act::get("/users", ADMINISTER, "The users", access::users).gives_page::<f::UserInfo>("By name"),
        Act::post("/users", ADMINISTER, "Make a user", access::new_user)
            .takes::<f::NewUser>()
            .gives::<f::UserInfo>(201, "The user"),
        Act::patch("/users/{id}", ADMINISTER, "Change a user", access::change_user)
            .takes::<f::ChangeUser>()
            .gives::<f::UserInfo>(200, "The user"),
        Act::get("/tokens", VIEW, "The own tokens", access::tokens)
            .gives_all::<f::ApiTokenInfo>("Without secrets"),
        Act::post("/tokens", VIEW, "Make a token for a program", access::new_token)
            .takes::<f::NewApiToken>()
            .gives::<f::MadeToken>(201, "The token, whose secret is told this once"),
        Act::delete("/tokens/{id}", VIEW, "Delete an own token", access::delete_token)
            .gives_nothing("It is gone"),
        Act::get("/audit", ADMINISTER, "The audit log, newest first", access::audit)
            .gives_page::<f::AuditEntry>("Newest first"),
        Act::get("/settings", VIEW, "The fleet's settings", declare::settings)
            .gives::<f::Settings>(200, "As they are"),
        Act::put("/settings", ADMINISTER, "Change the fleet's settings", declare::set_settings)
            .takes::<f::Settings>()
            .gives_nothing("They are changed")
            .gives::<f::Approval>(202, "A second person must approve it"),
        Act::get("/settings/alerts", OPERATE, "When somebody is told of what, and who", alert::settings)
            .gives::<f::AlertSettings>(200, "As they are, without the password"),
        Act::put(
            "/settings/alerts",
            ADMINISTER,
            "Change when somebody is told of what, and who",
            alert::set_settings,
        )
        .takes::<f::AlertSettings>()
        .gives_nothing("They are changed"),
        Act::post(
            "/alerts/test",
            ADMINISTER,
            "Send a test message to everybody who is told of alerts",
            alert::test,
        )
        .gives_nothing("It is on its way"),
        Act::get("/alerts", VIEW, "Alerts: those that are raised, then those that were", alert::alerts)
            .gives_all::<f::AlertInfo>("The newest first, at most 1000"),
        Act::get(
            "/approvals",
            OPERATE,
            "Acts that wait for a second person, and what became of them",
            approval::approvals,
        )
        .gives_all::<f::Approval>("Newest first"),
        Act::post("/approvals/{id}", ADMINISTER, "Approve or reject an act", approval::answer_approval)
            .takes::<f::ApprovalAnswer>()
            .gives::<f::Approval>(200, "As it is now"),
        Act::get("/enrol-tokens", ENROL, "Tokens to enrol with", enrol::tokens)
            .gives_all::<f::EnrolTokenInfo>("Without secrets"),
        Act::post("/enrol-tokens", ENROL, "Make a token to enrol with", enrol::new_token)
            .takes::<f::NewEnrolToken>()
            .gives::<f::MadeEnrolToken>(201, "The token, whose secret is told this once"),
        Act::delete("/enrol-tokens/{id}", ENROL, "Delete a token to enrol with", enrol::delete_token)
            .gives_nothing("It is gone"),
    ]
}

fn fleet() -> Vec<Act> {
    vec![
        Act::get("/overview", VIEW, "The fleet at a glance", look::overview).gives::<f::Overview>(200, "Now"),
        Act::get("/machines", VIEW, "The machines", look::machines).gives_page::<f::MachineInfo>("By name"),
        Act::get("/machines/{id}", VIEW, "A machine with its disks", look::machine)
            .gives::<f::MachineInfo>(200, "The machine"),
        Act::delete(
            "/machines/{id}",
            ADMINISTER,
            "Remove a machine, and revoke its certificates",
            declare::delete_machine,
        )
        .takes::<f::Confirm>()
        .gives_nothing("It is removed")
        .gives::<f::Approval>(202, "A second person must approve it"),
        Act::get("/process-servers", VIEW, "The process servers", look::process_servers)
            .gives_page::<f::ServerInfo>("By name"),
        Act::get("/process-servers/{id}", VIEW, "A process server", look::process_server)
            .gives::<f::ServerInfo>(200, "The server"),
        Act::delete(
            "/process-servers/{id}",
            ADMINISTER,
            "Remove a process server",
            declare::delete_process_server,
        )
        .takes::<f::Confirm>()
        .gives_nothing("It is removed")
        .gives::<f::Approval>(202, "A second person must approve it"),
        Act::get("/target-servers", VIEW, "The target servers", look::target_servers)
            .gives_page::<f::ServerInfo>("By name"),
        Act::get("/target-servers/{id}", VIEW, "A target server", look::target_server)
            .gives::<f::ServerInfo>(200, "The server"),
        Act::delete(
            "/target-servers/{id}",
            ADMINISTER,
            "Remove a target server",
            declare::delete_target_server,
        )
        .takes::<f::Confirm>()
        .gives_nothing("It is removed")
        .gives::<f::Approval>(202, "A second person must approve it"),
    ]
}

fn protection() -> Vec<Act> {
    vec![
        Act::get("/policies", VIEW, "The policies", policy::policies).gives_all::<f::PolicyInfo>("By name"),
        Act::post("/policies", OPERATE, "Make a policy", policy::new_policy)
            .takes::<f::NewPolicy>()
            .gives::<f::PolicyInfo>(201, "The policy"),
        Act::get("/policies/{id}", VIEW, "A policy", policy::policy)
            .gives::<f::PolicyInfo>(200, "The policy"),
        Act::put("/policies/{id}", OPERATE, "Change a policy, and with it its groups", policy::set_policy)
            .takes::<f::NewPolicy>()
            .gives_nothing("It is changed")
            .gives::<f::Approval>(202, "It shortens retention: a second person must approve it"),
        Act::delete("/policies/{id}", OPERATE, "Delete a policy without groups", policy::delete_policy)
            .takes::<f::Confirm>()
            .gives_nothing("It is gone")
            .gives::<f::Approval>(202, "A second person must approve it"),
        Act::post(
            "/machines/{id}/protect",
            OPERATE,
            "Protect disks: look whether it can be done, and do it",
            declare::protect,
        )
        .takes::<f::Protect>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::get("/groups", VIEW, "The groups", look::groups)
            .gives_page::<f::GroupInfo>("By id, or those that need a look first")
            .query(
                "order",
                "By id, where nothing is told twice or left out; or those that need a look first, as they are now",
                json!({ "type": "string", "enum": ["id", "attention"], "default": "id" }),
            )
            .query(
                "name",
                "With order=attention: those whose names have this in them",
                json!({ "type": "string", "maxLength": 64 }),
            ),
        Act::get("/groups/{id}", VIEW, "A group over all stages", look::group)
            .gives::<f::GroupInfo>(200, "The group"),
        Act::patch(
            "/groups/{id}",
            OPERATE,
            "Give a group another policy or process server",
            declare::change_group,
        )
        .takes::<f::ChangeGroup>()
        .gives_nothing("It is changed")
        .gives::<f::Approval>(202, "It shortens retention: a second person must approve it"),
        Act::post(
            "/groups/{id}/targets",
            OPERATE,
            "Give a protected group other target servers; those that it is to leave stay until every new one has a point",
            declare::change_targets,
        )
        .takes::<f::ChangeTargets>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::delete(
            "/groups/{id}",
            ADMINISTER,
            "Remove a group that is not protected",
            declare::delete_group,
        )
        .takes::<f::Confirm>()
        .gives_nothing("It is removed")
        .gives::<f::Approval>(202, "A second person must approve it"),
        Act::get(
            "/groups/{id}/points",
            VIEW,
            "Recovery points of a group; looking makes its targets tell them anew within seconds",
            look::points,
        )
        .gives::<f::PointList>(200, "As they were told last"),
        Act::get("/groups/{id}/samples", VIEW, "Figures of a group over time", look::samples)
            .gives_all::<f::SampleInfo>("The oldest first, at most 2000")
            .query(
                "step_s",
                "Distance between two, in seconds: 30 (6 hours are kept) or 600 (90 days)",
                json!({ "type": "integer", "enum": [30, 600], "default": 30 }),
            )
            .query("from", "Milliseconds since 1970; an hour ago when left out", json!({ "type": "integer" }))
            .query("to", "Milliseconds since 1970; now when left out", json!({ "type": "integer" })),
        Act::post(
            "/groups/{id}/unprotect",
            OPERATE,
            "End a group's protection; its points stay",
            declare::unprotect,
        )
        .takes::<f::Unprotect>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post("/groups/{id}/point", OPERATE, "Take a recovery point now", declare::point_now)
            .takes::<f::PointNow>()
            .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/resync",
            OPERATE,
            "Compare with the replica, and send what differs",
            declare::resync,
        )
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/failover",
            OPERATE,
            "Fail over: fence the source, and make the volumes at the target what they were at a point",
            failover::start,
        )
        .takes::<f::StartFailover>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/failover/commit",
            OPERATE,
            "Keep a failover for good; the machine is not protected any more",
            failover::commit,
        )
        .takes::<f::Confirm>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/failover/cancel",
            OPERATE,
            "Take a failover back, and with it what was written since; the source is taken again",
            failover::cancel,
        )
        .takes::<f::Confirm>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/promote",
            OPERATE,
            "Take writes to the volumes of a failed-over group at its target",
            failover::promote,
        )
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/demote",
            OPERATE,
            "End that: what was written is applied, and a recovery point",
            failover::demote,
        )
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/release",
            OPERATE,
            "Let the machine write to disks that it has handed over",
            failover::release,
        )
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/drill",
            OPERATE,
            "Begin a drill: all volumes at a point, writable at the target for a while; replication goes on",
            failover::drill,
        )
        .takes::<f::StartDrill>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/drill/end",
            OPERATE,
            "End a drill: what was written is dropped",
            failover::end_drill,
        )
        .takes::<f::EndDrill>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/prove",
            OPERATE,
            "Start a machine on a point at the target, on overlays and without a network, and look whether it comes up",
            failover::prove,
        )
        .takes::<f::StartProof>()
        .gives::<f::JobInfo>(202, "The job"),
        Act::post(
            "/groups/{id}/failback",
            OPERATE,
            "Bring a group home after a failover: what runs in its place is handed over to the original disks, and its machine is protected again",
            failover::fail_back,
        )
        .takes::<f::Confirm>()
        .gives::<f::JobInfo>(202, "The job"),
    ]
}

fn recovery() -> Vec<Act> {
    vec![
        Act::get("/plans", OPERATE, "The recovery plans", plan::plans)
            .gives_all::<f::PlanInfo>("By name, without their texts"),
        Act::post("/plans", ADMINISTER, "Keep a recovery plan", plan::new_plan)
            .takes::<f::NewPlan>()
            .gives::<f::PlanInfo>(201, "The plan"),
        Act::get("/plans/{id}", OPERATE, "A recovery plan with its text", plan::plan)
            .gives::<f::PlanInfo>(200, "The plan"),
        Act::put(
            "/plans/{id}",
            ADMINISTER,
            "Change a recovery plan; runs go on with what it was",
            plan::set_plan,
        )
        .takes::<f::NewPlan>()
        .gives::<f::PlanInfo>(200, "The plan"),
        Act::delete(
            "/plans/{id}",
            ADMINISTER,
            "Delete a recovery plan that is not being run",
            plan::delete_plan,
        )
        .takes::<f::Confirm>()
        .gives_nothing("It is gone; reports of its runs stay")
        .gives::<f::Approval>(202, "A second person must approve it"),
        Act::post(
            "/plans/{id}/run",
            OPERATE,
            "Run a recovery plan, or look whether it could be run",
            plan::run_plan,
        )
        .takes::<f::plan::RunPlan>()
        .gives::<f::JobInfo>(202, "The run's job"),
        Act::get("/plans/{id}/runs", OPERATE, "The runs of a recovery plan", plan::runs)
            .gives_all::<f::JobInfo>("The newest first, at most 100"),
        Act::get("/runs/{id}", OPERATE, "A run of a recovery plan, which is its report", plan::run)
            .gives::<f::PlanRun>(200, "The run"),
        Act::post(
            "/runs/{id}/answer",
            OPERATE,
            "Confirm or refuse a step that waits for a person",
            plan::answer,
        )
        .takes::<f::plan::AnswerStep>()
        .gives_nothing("It is noted"),
        Act::post(
            "/runs/{id}/resume",
            OPERATE,
            "Have a run that failed go on at the step that failed",
            plan::resume,
        )
        .gives::<f::JobInfo>(202, "The run's job"),
    ]
}

fn happening() -> Vec<Act> {
    vec![
        Act::get("/jobs", VIEW, "The jobs, newest first", look::jobs)
            .gives_page::<f::JobInfo>("Newest first"),
        Act::get("/jobs/{id}", VIEW, "A job with its steps", look::job).gives::<f::JobInfo>(200, "The job"),
        Act::post("/jobs/{id}/cancel", OPERATE, "Cancel a job; what was done before stays", look::cancel_job)
            .gives_nothing("It is cancelled"),
        Act::get("/events", VIEW, "What happened, in order", event::events)
            .gives_page::<f::EventInfo>("The oldest first")
            .query(
                "last",
                "The newest so many, instead of `after` and `limit`",
                json!({ "type": "integer", "minimum": 1, "maximum": 1000 }),
            ),
        Act::get("/events/stream", VIEW, "What happens, as server-sent events", event::stream)
            .gives_text(
                "text/event-stream",
                "Each event's data is an EventInfo; Last-Event-ID goes on after one",
            )
            .query(
                "after",
                "Go on after this event; from now on when left out",
                json!({ "type": "integer" }),
            ),
    ]
}

/// The OpenAPI document.
pub fn openapi() -> Value {
    act::document(&acts())
}

/// Everything that is served.
pub(crate) fn router(app: &Shared) -> Router {
    let api = act::router(acts(), app)
        .fallback(nothing_here)
        .method_not_allowed_fallback(not_with_this)
        .with_state(app.clone());
    crate::console::router(app, api.clone()).fallback_service(api).layer(from_fn(heads))
}

async fn nothing_here(uri: Uri) -> Response {
    if !crate::console::is_api(uri.path()) {
        return crate::console::nothing_here();
    }
    let fault = fault(
        ProblemCode::NotFound,
        "There is nothing at this path",
        "The API is under /api/v1; GET /api/v1/openapi.json lists it.",
    );
    fault.into_response()
}

async fn not_with_this() -> Fault {
    fault(
        ProblemCode::MethodNotAllowed,
        "The path is there, but not with this method",
        "GET /api/v1/openapi.json lists what can be done.",
    )
}

/// Nothing is cached or shown inside other pages, and nobody guesses types.
async fn heads(request: Request<axum::body::Body>, next: Next) -> Response {
    let mut response = next.run(request).await;
    let heads: [(HeaderName, &str); 5] = [
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (STRICT_TRANSPORT_SECURITY, "max-age=31536000"),
        (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (HeaderName::from_static("referrer-policy"), "no-referrer"),
    ];
    for (name, value) in heads {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The document that is checked in is the one that the acts give. To bring it up to date:
    /// `cargo run -p seawall-config-server -- openapi > docs/openapi.json`.
    #[test]
    fn the_document_that_is_checked_in_is_up_to_date() {
        let kept = include_str!("../../../docs/openapi.json");
        let now = serde_json::to_string_pretty(&openapi()).unwrap() + "\n";
        assert!(
            kept == now,
            "docs/openapi.json is old: cargo run -p seawall-config-server -- openapi > docs/openapi.json"
        );
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere_and_names_are_unique() {
        let document = openapi();
        let mut references = Vec::new();
        fn collect(value: &Value, references: &mut Vec<String>) {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(reference)) = map.get("$ref") {
                        references.push(reference.clone());
                    }
                    map.values().for_each(|value| collect(value, references));
                }
                Value::Array(items) => items.iter().for_each(|value| collect(value, references)),
                _ => {}
            }
        }
        collect(&document, &mut references);
        assert!(references.len() > 50);
        for reference in references {
            let pointer = reference.trim_start_matches('#');
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let mut ids = std::collections::HashSet::new();
        for path in document["paths"].as_object().unwrap().values() {
            for operation in path.as_object().unwrap().values() {
                let id = operation["operationId"].as_str().unwrap();
                assert!(ids.insert(id.to_owned()), "{id} twice");
            }
        }
    }
}
