//! Jobs: the list, and one with its steps as they go.

use axum::extract::{Path, Query};
use axum::http::Method;
use axum::response::Response;
use control::Severity;
use control::fleet::{JobInfo, JobKind, JobState, Page, Role, StepState};
use maud::{Markup, html};
use serde_json::json;

use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{Shown, go, layout, words};
use crate::api::extract::Part;
use crate::fault::Answer;

fn what(job: &JobInfo) -> String {
    let verb = match job.kind {
        JobKind::Protect => "Protect",
        JobKind::Unprotect => "End the protection of",
        JobKind::Point => "Take a recovery point of",
        JobKind::Resync => "Compare with the replica:",
        JobKind::Failover => "Fail over",
        JobKind::CommitFailover => "Commit the failover of",
        JobKind::CancelFailover => "Cancel the failover of",
        JobKind::Promote => "Promote",
        JobKind::Demote => "Demote",
        JobKind::Release => "Release the disks of",
        JobKind::FailBack => "Bring home",
        JobKind::Drill => "Begin a drill of",
        JobKind::EndDrill => "End a drill of",
        JobKind::Prove => "Prove that it comes up:",
        JobKind::Plan => "Run the plan",
    };
    format!("{verb} {}", job.subject)
}

pub(super) fn state(job: &JobInfo) -> Markup {
    let severity = match job.state {
        JobState::Done | JobState::Running | JobState::Waiting => Severity::Good,
        JobState::Cancelled => Severity::Notice,
        JobState::Failed => Severity::Trouble,
    };
    match job.state {
        JobState::Running | JobState::Waiting => html! {
            span.badge.busy { span aria-hidden="true" { "↻" } " " (job.state.as_str()) }
        },
        _ => words::badge(severity, job.state.as_str()),
    }
}

pub(super) fn progress(job: &JobInfo) -> Markup {
    html! { progress max="100" value=(job.percent) aria-label="Progress" { (job.percent) " %" } }
}

/// The newest jobs.
pub(super) fn table(jobs: &[JobInfo]) -> Markup {
    html! {
        @if jobs.is_empty() { (layout::nothing("There has been none yet.")) }
        @else {
            table.cards {
                thead { tr { th { "Job" } th { "State" } th { "Begun" } } }
                tbody {
                    @for job in jobs {
                        tr {
                            td data-label="Job" { a href=(format!("/jobs/{}", job.id)) { (what(job)) } div.quiet { (job.message) } }
                            td data-label="State" { (state(job)) @if !job.state.ended() { (progress(job)) } }
                            td data-label="Begun" { (words::ago(job.created)) div.quiet { "by " (job.created_by) } }
                        }
                    }
                }
            }
        }
    }
}

pub(super) async fn list(visit: Visit, Query(part): Query<Part>) -> Shown {
    let after = part.after_text()?;
    let query = if after.is_empty() { String::new() } else { format!("?after={}", words::in_query(after)) };
    let jobs: Page<JobInfo> = visit.door.get(&format!("/jobs{query}")).await?;
    let live = html! {
        h1 { "Jobs" }
        p { "What the config server does that takes long. Another config server goes on with it when one dies." }
        (table(&jobs.items))
        (layout::more("/jobs", jobs.next.as_deref()))
    };
    Ok(super::html(layout::page(&visit, "Jobs", live, layout::command("seawall job list"))))
}

pub(super) fn step_sign(state: StepState) -> (&'static str, &'static str) {
    match state {
        StepState::Waiting => ("waiting", "·"),
        StepState::Running => ("busy", "↻"),
        StepState::Passed => ("good", "✓"),
        StepState::Warned => ("notice", "!"),
        StepState::Failed => ("trouble", "✕"),
        StepState::Skipped => ("waiting", "–"),
    }
}

pub(super) async fn page(visit: Visit, Path(id): Path<String>) -> Shown {
    let job: JobInfo = visit.door.get(&format!("/jobs/{}", in_path(&id)?)).await?;
    let is_plan = job.kind == JobKind::Plan;
    let subject = match is_plan {
        true => format!("/runs/{}", job.id),
        false => format!("/machines/named/{}", words::in_query(&job.subject)),
    };
    let live = html! {
        p.crumbs { a href="/jobs" { "Jobs" } }
        h1 { (what(&job)) }
        p #job-state data-state=(job.state.as_str()) { (state(&job)) " " (job.message) }
        @if is_plan && visit.user.role >= Role::Operator {
            p { a href=(format!("/runs/{}", job.id)) { "The run with all that is known of it" } }
        }
        @if !job.state.ended() {
            (progress(&job))
            @if visit.user.role >= Role::Operator {
                (layout::button(&visit, &format!("/jobs/{}/cancel", job.id), "Cancel; what was done stays", html! {}))
            }
        }
        ol.steps {
            @for step in &job.steps {
                @let (class, sign) = step_sign(step.state);
                li.(class) {
                    span.sign aria-hidden="true" { (sign) }
                    div {
                        strong { (step.title) } " " span.quiet { (format!("({})", step.state.as_str())) }
                        @if !step.message.is_empty() { p { (step.message) } }
                        @if !step.mend.is_empty() { p { strong { "What to do: " } (step.mend) } }
                    }
                }
            }
        }
        (layout::facts(&[
            ("Begun", html! { (words::when(job.created)) " by " (job.created_by) }),
            ("Last changed", words::when(job.changed)),
            (if is_plan { "Plan" } else { "Machine" }, html! { a #subject href=(subject) { (job.subject) } }),
        ]))
    };
    let rest = html! {
        (layout::command(&format!("seawall job show {} --watch", job.id)))
        @if !job.state.ended() { (layout::command(&format!("seawall job cancel {}", job.id))) }
    };
    Ok(super::html(layout::page(&visit, &what(&job), live, rest)))
}

pub(super) async fn cancel(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/jobs/{}", in_path(&id)?);
    visit.door.act(Method::POST, &format!("{path}/cancel"), form.csrf(), &json!({})).await?;
    go(&path)
}
