//! Recovery plans: the list, one with its text, and a run as it goes.

use axum::extract::Path;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderValue, Method};
use axum::response::{IntoResponse, Response};
use control::Severity;
use control::fleet::plan::{AnswerStep, NewPlan, PlanInfo, PlanRun, RunMode, RunPlan, RunStep};
use control::fleet::{JobInfo, JobState, Role, StepState};
use maud::{Markup, html};
use serde_json::json;

use super::door::Visit;
use super::form::Form;
use super::job::{progress, state, step_sign};
use super::machine::in_path;
use super::{Shown, go, layout, words};
use crate::fault::Answer;

/// What the form for a new plan begins with.
const SAMPLE: &str = include_str!("../../../docs/plan-example.yaml");

fn goals(plan: &PlanInfo) -> String {
    let goal = |name: &str, seconds: Option<u64>| {
        let ms = i64::try_from(seconds?.saturating_mul(1000)).unwrap_or(i64::MAX);
        Some(format!("{name} {}", words::span(ms)))
    };
    let both = [goal("data", plan.goals.rpo_s), goal("time", plan.goals.rto_s)];
    let both: Vec<String> = both.into_iter().flatten().collect();
    if both.is_empty() { "none".to_owned() } else { both.join(", ") }
}

pub(super) async fn list(visit: Visit) -> Shown {
    let plans: Vec<PlanInfo> = visit.door.get("/plans").await?;
    let live = html! {
        h1 { "Recovery plans" }
        p { "What is done to recover, in which order. A dry run looks whether it could be done; a drill tries it." }
        @if plans.is_empty() { (layout::nothing("There is none yet.")) }
        @else {
            table.cards {
                thead { tr { th { "Plan" } th.number { "Steps" } th { "Goals" } th { "Last run" } } }
                tbody {
                    @for plan in &plans {
                        tr {
                            td data-label="Plan" { a href=(format!("/plans/{}", plan.id)) { strong { (plan.name) } } div.quiet { (plan.about) } }
                            td.number data-label="Steps" { (plan.steps) }
                            td data-label="Goals" { (goals(plan)) }
                            td data-label="Last run" {
                                @match &plan.last_run {
                                    Some(job) => { a href=(format!("/runs/{}", job.id)) { (state(job)) } " " (words::ago(job.created)) }
                                    None => { "never" }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    let rest = html! {
        @if visit.user.role >= Role::Administrator {
            form.fields.card method="post" action="/plans" {
                h2 { "Keep a plan" }
                (layout::csrf(&visit))
                (text_field(SAMPLE))
                button { "Keep the plan" }
                (layout::command("seawall plan apply plan.yaml"))
            }
        }
        (layout::command("seawall plan list"))
    };
    Ok(super::html(layout::page(&visit, "Recovery plans", live, rest)))
}

fn text_field(text: &str) -> Markup {
    html! {
        label { "The plan, YAML or JSON"
            textarea name="text" rows="24" spellcheck="false" required maxlength="65536" { "\n" (text) }
        }
    }
}

pub(super) async fn make(visit: Visit, form: Form) -> Answer<Response> {
    let asked = NewPlan { text: form.verbatim("text").replace("\r\n", "\n") };
    let plan: PlanInfo = visit.door.act_for(Method::POST, "/plans", form.csrf(), &asked).await?;
    go(&format!("/plans/{}", plan.id))
}

pub(super) async fn page(visit: Visit, Path(id): Path<String>) -> Shown {
    let path = format!("/plans/{}", in_path(&id)?);
    let plan: PlanInfo = visit.door.get(&path).await?;
    let runs: Vec<JobInfo> = visit.door.get(&format!("{path}/runs")).await?;
    let name = plan.name.as_str();
    let live = html! {
        p.crumbs { a href="/plans" { "Recovery plans" } }
        h1 { (name) }
        @if !plan.about.is_empty() { p { (plan.about) } }
        (layout::facts(&[
            ("Steps", html! { (plan.steps) }),
            ("Goals", html! { (goals(&plan)) }),
            ("Changed", html! { (words::when(plan.changed)) " by " (plan.changed_by) }),
        ]))
        h2 { "Runs" }
        @if runs.is_empty() { (layout::nothing("It was never run.")) }
        @else {
            table.cards {
                thead { tr { th { "Run" } th { "State" } th { "By" } } }
                tbody {
                    @for run in &runs {
                        tr {
                            td data-label="Run" { a href=(format!("/runs/{}", run.id)) { (words::moment(run.created)) } div.quiet { (run.message) } }
                            td data-label="State" { (state(run)) }
                            td data-label="By" { (run.created_by) }
                        }
                    }
                }
            }
        }
    };
    let line = |mode: &str, more: &str| {
        layout::command(&format!("seawall plan run {} --mode {mode}{more} --watch", words::shell(name)))
    };
    let rest = html! {
        section {
            h2 { "Run it" }
            div.acts {
                form.act method="post" action=(format!("{path}/run")) {
                    h3 { "Dry run" }
                    (layout::csrf(&visit))
                    input type="hidden" name="mode" value="dry-run";
                    p { "Does nothing, and looks whether everything could be done." }
                    button { "Look" }
                    (line("dry-run", ""))
                }
            }
            details.danger {
                summary { "Run it for good, or as a drill" }
                form.act method="post" action=(format!("{path}/run")) {
                    (layout::csrf(&visit))
                    label { "What for"
                        select name="mode" {
                            option value="drill" { "drill: to try it out" }
                            option value="planned" { "planned: the old site is there, and is left" }
                            option value="failover" { "failover: the old site is lost" }
                        } }
                    label { "Type " strong { (name) } " to go on"
                        input name="confirm" required autocomplete="off" spellcheck="false" title=(format!("Type {name}")); }
                    button.destroys { "Run the plan" }
                    (line("drill", " --yes"))
                }
            }
        }
        @if visit.user.role >= Role::Administrator {
            section {
                h2 { "Change it" }
                form.fields method="post" action=(path) {
                    (layout::csrf(&visit))
                    (text_field(&plan.text))
                    button { "Change the plan" }
                    (layout::command("seawall plan apply plan.yaml"))
                }
                (layout::danger(&visit, &format!("{path}/delete"), "Delete the plan", "Reports of its runs stay.", name,
                    layout::command(&format!("seawall plan remove {} --yes", words::shell(name)))))
            }
        } @else {
            pre { (plan.text) }
        }
    };
    Ok(super::html(layout::page(&visit, name, live, rest)))
}

pub(super) async fn change(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/plans/{}", in_path(&id)?);
    let asked = NewPlan { text: form.verbatim("text").replace("\r\n", "\n") };
    visit.door.act(Method::PUT, &path, form.csrf(), &asked).await?;
    go(&path)
}

pub(super) async fn delete(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    super::access::destroy(&visit, &format!("/plans/{}", in_path(&id)?), &form, "/plans").await
}

pub(super) async fn run(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let asked = RunPlan { mode: form.value("mode")?, confirm: form.get("confirm").to_owned() };
    let path = format!("/plans/{}/run", in_path(&id)?);
    let job: JobInfo = visit.door.act_for(Method::POST, &path, form.csrf(), &asked).await?;
    go(&format!("/runs/{}", job.id))
}

fn goal(reached: Option<bool>) -> Markup {
    match reached {
        Some(true) => words::badge(Severity::Good, "reached"),
        Some(false) => words::badge(Severity::Trouble, "not reached"),
        None => html! {},
    }
}

fn step(run: &PlanRun, step: &RunStep) -> Markup {
    let (class, sign) = step_sign(step.state);
    let took = step.began.zip(step.ended).map(|(began, ended)| words::span(ended.since(began)));
    html! {
        li.(class) {
            span.sign aria-hidden="true" { (sign) }
            div {
                strong { (step.title) } " "
                span.quiet { "(" (step.kind) ", " (step.state.as_str()) @if let Some(took) = took { ", " (took) } @if step.attempts > 1 { ", begun " (step.attempts) " times" } ")" }
                @if !step.text.is_empty() { pre { (step.text) } }
                @if !step.message.is_empty() { p { (step.message) } }
                @if !step.mend.is_empty() { p { strong { "What to do: " } (step.mend) } }
                @for child in &step.children {
                    p { a href=(format!("/jobs/{}", child.job)) { (child.group) } ": " (child.state.as_str()) ". " (child.message) }
                }
                @if let Some(answer) = &step.answer { p.quiet { (answer.who) ", " (words::when(answer.time)) } }
                @if !step.output.is_empty() { details { summary { "Output" } pre { (step.output) } } }
                @if waits(run, step) { p { strong { "Somebody must say below whether this is done." } } }
            }
        }
    }
}

fn waits(run: &PlanRun, step: &RunStep) -> bool {
    run.mode != RunMode::DryRun
        && step.kind == "manual"
        && step.state == StepState::Running
        && step.answer.is_none()
}

pub(super) async fn run_page(visit: Visit, Path(id): Path<String>) -> Shown {
    let run: PlanRun = visit.door.get(&format!("/runs/{}", in_path(&id)?)).await?;
    let title = format!("{} ({})", run.name, run.mode.as_str());
    let oldest = run.points.iter().filter_map(|age| age.age_ms).max();
    let live = html! {
        p.crumbs { a href="/plans" { "Recovery plans" } " / " a href=(format!("/plans/{}", run.plan)) { (run.name) } }
        h1 { (title) }
        p #job-state data-state=(run.job.state.as_str()) { (state(&run.job)) " " (run.job.message) }
        @if !run.job.state.ended() {
            (progress(&run.job))
            (layout::button(&visit, &format!("/jobs/{}/cancel", run.id), "Cancel; what was done stays", html! {}))
        }
        (layout::facts(&[
            ("Begun", html! { (words::when(run.began)) " by " (run.job.created_by) }),
            ("Time (RTO)", html! { (words::span(run.took_ms)) " " (goal(run.rto_reached)) }),
            ("Data (RPO)", html! { @if let Some(age) = oldest { "the oldest newest point was " (words::span(age)) " old " (goal(run.rpo_reached)) } @else { "no step is about groups" } }),
        ]))
        ol.steps { @for one in &run.steps { (step(&run, one)) } }
        @for one in run.steps.iter().filter(|one| waits(&run, one)) {
            form.act.fields method="post" action=(format!("/runs/{}/answer", run.id)) {
                h2 { (one.title) }
                (layout::csrf(&visit))
                input type="hidden" name="step" value=(one.id);
                label { "Note" input name="note" maxlength="1000" autocomplete="off"; }
                button name="done" value="yes" { "It is done" }
                button.destroys name="done" value="" { "It cannot be done" }
                (layout::command(&format!("seawall plan confirm {} --step {}", words::shell(run.name.as_str()), words::shell(one.id.as_str()))))
            }
        }
        @if run.job.state == JobState::Failed && run.mode != RunMode::DryRun {
            (layout::button(&visit, &format!("/runs/{}/resume", run.id), "Go on at the failed step",
                layout::command(&format!("seawall plan resume {} --watch", words::shell(run.name.as_str())))))
        }
    };
    let rest = html! {
        p { a href=(format!("/runs/{}/report", run.id)) { "The report, to be kept or printed" } }
        (layout::command(&format!("seawall plan report {} --run {} --html report.html", words::shell(run.name.as_str()), run.id)))
    };
    Ok(super::html(layout::page(&visit, &title, live, rest)))
}

/// The report brings its own style, and may use that one alone.
pub(super) async fn report(visit: Visit, Path(id): Path<String>) -> Answer<Response> {
    let run: PlanRun = visit.door.get(&format!("/runs/{}", in_path(&id)?)).await?;
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; frame-ancestors 'none'",
        crate::plan::style_hash()
    );
    let policy =
        HeaderValue::from_str(&policy).map_err(|error| crate::fault::internal("show a report", error))?;
    let kind = HeaderValue::from_static("text/html; charset=utf-8");
    Ok(([(CONTENT_SECURITY_POLICY, policy), (CONTENT_TYPE, kind)], crate::plan::report(&run)).into_response())
}

pub(super) async fn answer(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/runs/{}", in_path(&id)?);
    let asked = AnswerStep {
        step: form.value("step")?,
        done: form.ticked("done"),
        note: form.get("note").to_owned(),
    };
    visit.door.act(Method::POST, &format!("{path}/answer"), form.csrf(), &asked).await?;
    go(&path)
}

pub(super) async fn resume(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/runs/{}", in_path(&id)?);
    visit.door.act(Method::POST, &format!("{path}/resume"), form.csrf(), &json!({})).await?;
    go(&path)
}
