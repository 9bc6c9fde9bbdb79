//! The report of a run as a page that needs nothing else, to be kept and printed.

use control::fleet::UnixMillis;
use control::fleet::plan::{PlanRun, RunMode, RunStep};
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// The page's looks; the console lets a page have these and no others.
const STYLE: &str = "\
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.5rem}table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{text-align:left;vertical-align:top;padding:.4rem .6rem;\
border-bottom:1px solid #8886}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#8882;padding:.6rem;margin:.4rem 0}\
.quiet{opacity:.75}.good{color:#187a3c}.bad{color:#b3261e}@media(prefers-color-scheme:dark){.good{color:#6fd08c}.bad{color:#f2938c}}\
@media print{body{margin:0;max-width:none}}";

/// By which a browser knows the page's style: SHA-256, in base64.
pub(crate) fn style_hash() -> String {
    data_encoding::BASE64.encode(ring::digest::digest(&ring::digest::SHA256, STYLE.as_bytes()).as_ref())
}

fn span(ms: i64) -> String {
    let seconds = ms.max(0) / 1000;
    match seconds {
        0..60 => format!("{}.{} s", seconds, ms.max(0) % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

fn when(time: UnixMillis) -> Markup {
    let shown = crate::console::moment_of(time);
    html! { time datetime=(shown) { (shown) } }
}

fn goal(name: &str, reached: Option<bool>, text: String) -> Markup {
    let (class, word) = match reached {
        Some(true) => ("good", "reached"),
        Some(false) => ("bad", "not reached"),
        None => ("quiet", "not judged"),
    };
    html! { tr { th { (name) } td { (text) } td.(class) { (word) } } }
}

fn took(step: &RunStep) -> String {
    match (step.began, step.ended) {
        (Some(began), Some(ended)) => span(ended.since(began)),
        _ => "–".to_owned(),
    }
}

/// The page.
pub fn report(run: &PlanRun) -> String {
    let title = format!("Run of {} ({})", run.name, run.mode.as_str());
    let worst = run.points.iter().filter_map(|age| age.age_ms).max();
    let none = run.points.iter().any(|age| age.age_ms.is_none());
    let rpo = match (worst, none) {
        (_, true) => "a group had no recovery point".to_owned(),
        (Some(worst), _) => format!("the oldest newest point was {} old", span(worst)),
        (None, _) => "no step is about groups".to_owned(),
    };
    let within = |seconds: Option<u64>| {
        seconds.map_or_else(|| "; no goal".to_owned(), |seconds| format!("; the goal is {seconds} s"))
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p { strong { (run.job.state.as_str()) } ": " (run.job.message) }
                table {
                    tr { th { "Asked for" } td colspan="2" { (when(run.began)) " by " (run.job.created_by) } }
                    @if let Some(ended) = run.ended { tr { th { "Ended" } td colspan="2" { (when(ended)) } } }
                    (goal("Time (RTO)", run.rto_reached, format!("{}{}", span(run.took_ms), within(run.goals.rto_s))))
                    (goal("Data (RPO)", run.rpo_reached, format!("{rpo}{}", within(run.goals.rpo_s))))
                    tr { th { "Run" } td colspan="2" { code { (run.id) } } }
                }
                @if run.mode == RunMode::DryRun { p.quiet { "A dry run: nothing was done; it was looked whether it could be." } }
                @if !run.points.is_empty() {
                    h2 { "Recovery points" }
                    table {
                        thead { tr { th { "Group" } th { "When the step began" } th { "Age of its newest point" } } }
                        tbody { @for age in &run.points {
                            tr { td { (age.group) } td { (age.step) } td { (age.age_ms.map_or_else(|| "none".to_owned(), span)) } }
                        } }
                    }
                }
                h2 { "Steps" }
                table {
                    thead { tr { th { "Step" } th { "State" } th { "Took" } th { "Found" } } }
                    tbody { @for step in &run.steps { (row(step)) } }
                }
                p.quiet { "Made by Seawall." }
            }
        }
    }
    .into_string()
}

fn row(step: &RunStep) -> Markup {
    let class = match step.state {
        control::fleet::StepState::Failed => "bad",
        control::fleet::StepState::Passed => "good",
        _ => "quiet",
    };
    html! {
        tr {
            td { strong { (step.title) } div.quiet { (step.id) ", " (step.kind) @if step.attempts > 1 { ", begun " (step.attempts) " times" } } }
            td.(class) { (step.state.as_str()) }
            td { (took(step)) @if let Some(began) = step.began { div.quiet { (when(began)) } } }
            td {
                @if !step.text.is_empty() { pre { (step.text) } }
                @if !step.message.is_empty() { p { (step.message) } }
                @if !step.mend.is_empty() { p { strong { "What to do: " } (step.mend) } }
                @if let Some(answer) = &step.answer {
                    p { (if answer.done { "Confirmed" } else { "Refused" }) " by " (answer.who) ", " (when(answer.time)) }
                }
                @for child in &step.children { p { (child.group) ": " (child.state.as_str()) ". " (child.message) } }
                @if !step.output.is_empty() { pre { (step.output) } }
            }
        }
    }
}
