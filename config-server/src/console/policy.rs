//! Policies: how groups are protected.

use axum::extract::Path;
use axum::http::Method;
use axum::response::Response;
use control::fleet::{NewPolicy, Policy, PolicyInfo, ProofPolicy, ResyncWindow, RetentionRule, Role};
use maud::{Markup, html};

use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{Shown, go, layout, words};
use crate::fault::{Answer, invalid};

/// The rules of retention that the form has: every so many seconds, its field, and its words.
const RULES: [(u64, &str, &str); 4] = [
    (0, "all", "All points, for"),
    (3600, "hourly", "One an hour, for"),
    (86_400, "daily", "One a day, for"),
    (604_800, "weekly", "One a week, for"),
];

pub(super) async fn list(visit: Visit) -> Shown {
    let policies: Vec<PolicyInfo> = visit.door.get("/policies").await?;
    let content = html! {
        h1 { "Policies" }
        table.cards {
            thead { tr { th { "Policy" } th { "A point every" } th { "Allowed age" } th { "Application points" } th { "Retention" } th.number { "Groups" } } }
            tbody {
                @for info in &policies {
                    @let policy = &info.policy;
                    tr {
                        td data-label="Policy" { a href=(format!("/policies/{}", info.id)) { strong { (info.name) } } }
                        td data-label="A point every" { (ms(policy.epoch_interval_ms)) }
                        td data-label="Allowed age" { (ms(policy.rpo_s_max * 1000)) }
                        td data-label="Application points" { @if policy.application_every_s == 0 { "none" } @else { "every " (ms(policy.application_every_s * 1000)) } }
                        td data-label="Retention" { (policy.retention_text()) }
                        td.number data-label="Groups" { (info.groups) }
                    }
                }
            }
        }
        @if visit.user.role >= Role::Operator {
            form.fields.card method="post" action="/policies" {
                h2 { "Make a policy" }
                (layout::csrf(&visit))
                (fields("", &Policy::default()))
                button { "Make the policy" }
                (layout::command("seawall policy create NAME --set epoch_interval_ms=1000 --set rpo_s_max=900"))
            }
        }
    };
    Ok(super::html(layout::still(&visit, "Policies", content)))
}

fn ms(ms: u64) -> String {
    words::span(i64::try_from(ms).unwrap_or(i64::MAX))
}

/// No hours in particular.
const ALWAYS: &str = "always";

/// `36h`, in the largest unit that fits.
fn length(seconds: u64) -> String {
    match seconds {
        seconds if seconds.is_multiple_of(86_400) => format!("{}d", seconds / 86_400),
        seconds if seconds.is_multiple_of(3600) => format!("{}h", seconds / 3600),
        seconds => format!("{}m", seconds / 60),
    }
}

/// Seconds of `36h`.
fn read_length(text: &str) -> Answer<u64> {
    let wrong =
        || invalid(format!("{text:?} is no length of time; write minutes, hours or days: 90m, 36h, 30d"));
    let unit = text.chars().last().ok_or_else(wrong)?;
    let factor = match unit {
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].trim().parse().map_err(|_| wrong())?;
    number.checked_mul(factor).ok_or_else(wrong)
}

fn optional(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn fields(name: &str, policy: &Policy) -> Markup {
    let rule = |every: u64| {
        let found = policy.retention.iter().find(|rule| rule.every_s == every);
        found.map_or_else(String::new, |rule| length(rule.for_s))
    };
    let proof = policy.proof.clone().unwrap_or_default();
    html! {
        label { "Name" input name="name" value=(name) required maxlength="64" autocomplete="off" spellcheck="false"; }
        label { "A point every, in milliseconds" input name="epoch_interval_ms" type="number" min="100" max="3600000" value=(policy.epoch_interval_ms) required; }
        label { "Allowed age of the newest point, in seconds" input name="rpo_s_max" type="number" min="1" max="2678400" value=(policy.rpo_s_max) required; }
        label { "An application-consistent point every, in seconds (0 for none)" input name="application_every_s" type="number" min="0" max="2678400" value=(policy.application_every_s) required; }
        label.tick { input type="checkbox" name="application_filesystem_only" checked[policy.application_filesystem_only]; span { "For those, freeze filesystems only, and run no hooks" } }
        fieldset { legend { "Retention; each is longer than the one before, or empty" }
            @for (every, field, text) in RULES {
                label { (text) input name=(field) value=(rule(every)) placeholder="90m, 36h, 30d" pattern="[0-9]+[mhd]" autocomplete="off"; }
            } }
        label { "Space for the history at most, in bytes (empty for no limit)" input name="space_bytes_max" type="number" min="1" value=(optional(policy.space_bytes_max)); }
        label { "Sent at most, in bytes a second (empty for no limit)" input name="bandwidth_bytes_s" type="number" min="16384" value=(optional(policy.bandwidth_bytes_s)); }
        label { "Percent of one processor for the agent (empty for no limit)" input name="cpu_percent" type="number" min="5" max="100000" value=(optional(policy.cpu_percent)); }
        fieldset { legend { "Boot proofs: a machine is started on the newest point" }
            label { "Every, as in 24h (empty: only when somebody asks)" input name="proof_every" value=(if proof.every_s == 0 { String::new() } else { length(proof.every_s) }) placeholder="24h, 7d" pattern="[0-9]+[mhd]" autocomplete="off"; }
            label { "What its serial console must say, a line each" textarea name="proof_expect" rows=(proof.expect.len()) maxlength="1700" spellcheck="false" { (proof.expect.join("\n")) } }
            label { "Within, in seconds" input name="proof_within_s" type="number" min="10" max="7200" value=(proof.within_s); }
        }
        label { "Hours in which comparisons that became necessary may begin, a line each (empty: evenings and weekends, as the agents say)"
            textarea name="resync_windows" rows="2" maxlength="4000" placeholder="mon tue wed thu fri 20:00-06:00, or always" spellcheck="false" { (hours(policy)) } }
        @if !policy.bandwidth_windows.is_empty() {
            p.quiet { (policy.bandwidth_windows.len()) " windows of the bandwidth schedule stay as they are; the API changes them." }
        }
    }
}

/// The form's policy; what the form does not have stays as it is in `base`.
fn read(form: &Form, base: Policy) -> Answer<NewPolicy> {
    let mut retention = Vec::new();
    for (every_s, field, _) in RULES {
        let text = form.get(field);
        if !text.is_empty() {
            retention.push(RetentionRule { every_s, for_s: read_length(text)? });
        }
    }
    let policy = Policy {
        epoch_interval_ms: form.value("epoch_interval_ms")?,
        rpo_s_max: form.value("rpo_s_max")?,
        application_every_s: form.value("application_every_s")?,
        application_filesystem_only: form.ticked("application_filesystem_only"),
        retention,
        space_bytes_max: form.optional("space_bytes_max")?,
        bandwidth_bytes_s: form.optional("bandwidth_bytes_s")?,
        cpu_percent: form.optional("cpu_percent")?,
        resync_windows: read_hours(form.get("resync_windows"))?,
        proof: read_proof(form, base.proof)?,
        ..base
    };
    Ok(NewPolicy { name: form.value("name")?, policy })
}

/// The hours of a policy, a line each.
fn hours(policy: &Policy) -> String {
    match &policy.resync_windows {
        None => String::new(),
        Some(windows) if windows.is_empty() => ALWAYS.to_owned(),
        Some(windows) => windows.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
    }
}

fn read_hours(text: &str) -> Answer<Option<Vec<ResyncWindow>>> {
    match text.trim() {
        "" => Ok(None),
        ALWAYS => Ok(Some(Vec::new())),
        lines => {
            let lines = lines.lines().map(str::trim).filter(|line| !line.is_empty());
            lines.map(|line| line.parse().map_err(invalid)).collect::<Answer<_>>().map(Some)
        }
    }
}

/// What the form says of proofs; what it does not have stays. A form that says nothing of them leaves them as they are.
fn read_proof(form: &Form, base: Option<ProofPolicy>) -> Answer<Option<ProofPolicy>> {
    let lines = form.get("proof_expect").lines().map(str::trim).filter(|line| !line.is_empty());
    let expect: Vec<String> = lines.map(str::to_owned).collect();
    let every = form.get("proof_every");
    if every.is_empty() && expect.is_empty() {
        return Ok(base);
    }
    let before = base.clone().unwrap_or_default();
    let proof = ProofPolicy {
        every_s: if every.is_empty() { 0 } else { read_length(every)? },
        expect: if expect.is_empty() { before.expect.clone() } else { expect },
        within_s: form.optional("proof_within_s")?.unwrap_or(before.within_s),
        ..before
    };
    Ok(if base.is_none() && proof == ProofPolicy::default() { None } else { Some(proof) })
}

pub(super) async fn make(visit: Visit, form: Form) -> Answer<Response> {
    let asked = read(&form, Policy::default())?;
    visit.door.act(Method::POST, "/policies", form.csrf(), &asked).await?;
    go("/policies")
}

/// The command that makes the policy say what it says; one changes what is to change.
fn change_line(info: &PolicyInfo) -> String {
    let says = serde_json::to_value(&info.policy).unwrap_or_default();
    let sets = says.as_object().into_iter().flatten();
    let sets: String =
        sets.map(|(key, value)| format!(" --set {}", words::shell(&format!("{key}={value}")))).collect();
    format!("seawall policy change {}{sets}", words::shell(info.name.as_str()))
}

pub(super) async fn page(visit: Visit, Path(id): Path<String>) -> Shown {
    let path = format!("/policies/{}", in_path(&id)?);
    let info: PolicyInfo = visit.door.get(&path).await?;
    let content = html! {
        p.crumbs { a href="/policies" { "Policies" } }
        h1 { (info.name) }
        p { (words::count(u64::try_from(info.groups).unwrap_or_default(), "group follows", "groups follow")) " it. Changed " (words::ago(info.changed)) "." }
        @if visit.user.role >= Role::Operator {
            form.fields method="post" action=(path) {
                (layout::csrf(&visit))
                (fields(info.name.as_str(), &info.policy))
                button { "Change the policy, and with it its groups" }
                (layout::command(&change_line(&info)))
            }
            @if info.groups == 0 {
                (layout::danger(&visit, &format!("{path}/delete"), "Delete the policy", "No group follows it.",
                    info.name.as_str(), layout::command(&format!("seawall policy delete {} --yes", words::shell(info.name.as_str())))))
            }
        } @else {
            p { (info.policy.retention_text()) }
        }
    };
    Ok(super::html(layout::still(&visit, info.name.as_str(), content)))
}

pub(super) async fn change(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let path = format!("/policies/{}", in_path(&id)?);
    let before: PolicyInfo = visit.door.get(&path).await?;
    let asked = read(&form, before.policy)?;
    let answer = visit.door.act(Method::PUT, &path, form.csrf(), &asked).await?;
    super::access::done_or_waits(&answer, &path)
}

pub(super) async fn delete(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    super::access::destroy(&visit, &format!("/policies/{}", in_path(&id)?), &form, "/policies").await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_read_as_they_are_written() {
        for (seconds, text) in [(5400, "90m"), (129_600, "36h"), (86_400, "1d"), (31_536_000, "365d")] {
            assert_eq!(length(seconds), text);
            assert_eq!(read_length(text).unwrap(), seconds);
        }
        for text in ["", ALWAYS, "18:00-08:00", "sat sun 00:00-00:00\nmon 22:00-06:00"] {
            let policy = Policy { resync_windows: read_hours(text).unwrap(), ..Policy::default() };
            assert_eq!(hours(&policy), text);
        }
        assert!(read_hours("at night").is_err());
        for wrong in ["", "d", "1", "1w", "-1d", "99999999999999999999d", "18446744073709551615d", "1é"] {
            assert!(read_length(wrong).is_err(), "{wrong}");
        }
    }
}
