//! The frame of every page, and the pieces that pages are made of.

use control::fleet::{Problem, Role, UnixMillis};
use maud::{DOCTYPE, Markup, html};

use super::asset::address;
use super::door::Visit;
use super::words;

/// Where people go: address, name, and for whom.
const PLACES: [(&str, &str, Role); 11] = [
    ("/", "Overview", Role::Viewer),
    ("/machines", "Machines", Role::Viewer),
    ("/servers", "Servers", Role::Viewer),
    ("/jobs", "Jobs", Role::Viewer),
    ("/events", "Events", Role::Viewer),
    ("/policies", "Policies", Role::Viewer),
    ("/plans", "Plans", Role::Operator),
    ("/enrol", "Enrol", Role::Operator),
    ("/approvals", "Approvals", Role::Operator),
    ("/users", "Users", Role::Administrator),
    ("/audit", "Audit log", Role::Administrator),
];

/// htmx fetches and puts in place, and does nothing else: no evaluated text, and an answer that is a problem changes nothing.
const HTMX: &str = r#"{"includeIndicatorCSS": false, "history": false, "noSwap": [204, 304, "4xx", "5xx"]}"#;

fn head(title: &str, scripts: bool) -> Markup {
    html! {
        meta charset="utf-8";
        meta name="viewport" content="width=device-width, initial-scale=1";
        meta name="color-scheme" content="light dark";
        title { (title) " · Seawall" }
        link rel="icon" type="image/svg+xml" href=(address("icon.svg"));
        link rel="stylesheet" href=(address("style.css"));
        script src=(address("theme.js")) {}
        @if scripts {
            meta name="htmx-config" content=(HTMX);
            script defer src=(address("htmx.js")) {}
        }
        script defer src=(address("console.js")) {}
    }
}

fn brand() -> Markup {
    html! {
        a.brand href="/" { img src=(address("icon.svg")) alt="" width="22" height="22"; "Seawall" }
    }
}

fn theme() -> Markup {
    html! { button.plain #theme type="button" hidden { "Theme" } }
}

/// A page whose first part is live: the page's script fetches it anew every few seconds, and after events. What people type into is in the
/// rest, which stays as it is.
pub(super) fn page(visit: &Visit, title: &str, live: Markup, rest: Markup) -> Markup {
    page_with(visit, title, html! {}, live, rest)
}

/// The same with something before the live part, which stays as it is too.
pub(super) fn page_with(visit: &Visit, title: &str, before: Markup, live: Markup, rest: Markup) -> Markup {
    let own = visit.path.split('?').next().unwrap_or("/");
    let here = |place: &str| match place {
        "/" => own == "/",
        "/plans" => own.starts_with("/plans") || own.starts_with("/runs"),
        "/machines" => own.starts_with("/machines") || own.starts_with("/groups"),
        place => own.starts_with(place),
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head { (head(title, true)) }
            body data-stream="/api/v1/events/stream" {
                a.skip href="#content" { "Skip to the content" }
                header.top {
                    (brand())
                    nav aria-label="Main" {
                        @for (place, name, role) in PLACES {
                            @if visit.user.role >= role {
                                a href=(place) aria-current=[here(place).then_some("page")] { (name) }
                            }
                        }
                    }
                    div.who {
                        (theme())
                        a href="/settings" title="Password, tokens, settings" aria-current=[here("/settings").then_some("page")] { (visit.user.name) }
                        form method="post" action="/logout" {
                            (csrf(visit))
                            button.plain { "Log out" }
                        }
                    }
                }
                p.unreachable #unreachable role="alert" hidden {
                    "The config server does not answer; what is shown may be old. Replication goes on without it."
                }
                main #content {
                    (before)
                    div #refresh hx-get=(visit.path) hx-trigger="happened" hx-select="#live" hx-target="#live"
                        hx-swap="outerMorph" {
                        div #live data-now=(UnixMillis::now().0) { (live) }
                    }
                    (rest)
                }
            }
        }
    }
}

/// A page that stays as it is.
pub(super) fn still(visit: &Visit, title: &str, content: Markup) -> Markup {
    page(visit, title, html! {}, content)
}

/// A page for somebody who is not logged in.
pub(super) fn outside(title: &str, content: Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head { (head(title, false)) }
            body.outside {
                main #content {
                    div.outside-top { (brand()) (theme()) }
                    (content)
                }
            }
        }
    }
}

/// A problem: what was tried, why not, what to do.
pub(super) fn problem(problem: &Problem) -> Markup {
    outside(
        &problem.title,
        html! {
            div.card {
                h1 { (problem.title) }
                p role="alert" { (problem.detail) "." }
                p { strong { "What to do: " } (problem.mend) }
                p.quiet { "Code: " code { (problem.code) } ", status " (problem.status) }
                p { a href="/" { "Overview" } }
            }
        },
    )
}

/// The session's second secret, in a form.
pub(super) fn csrf(visit: &Visit) -> Markup {
    html! { input type="hidden" name="csrf" value=(visit.csrf); }
}

/// The command that does the same.
pub(super) fn command(line: &str) -> Markup {
    html! {
        details.command {
            summary { "Copy as command" }
            div { code { (line) } button.plain type="button" data-copy=(line) { "Copy" } }
        }
    }
}

/// An act that takes no more than a button.
pub(super) fn button(visit: &Visit, action: &str, label: &str, line: Markup) -> Markup {
    html! {
        form.act method="post" action=(action) {
            (csrf(visit))
            button { (label) }
            (line)
        }
    }
}

/// An act that destroys something: its name must be typed, and the API compares it.
pub(super) fn danger(
    visit: &Visit,
    action: &str,
    label: &str,
    what: &str,
    name: &str,
    line: Markup,
) -> Markup {
    html! {
        details.danger {
            summary { (label) }
            form.act method="post" action=(action) {
                (csrf(visit))
                p { (what) }
                label { "Type " strong { (name) } " to go on"
                    input name="confirm" required autocomplete="off" spellcheck="false" pattern=(literal(name))
                        title=(format!("Type {name}"));
                }
                button.destroys { (label) }
                (line)
            }
        }
    }
}

/// A pattern that only this text fits; names have letters, digits, dots, hyphens and underscores.
pub(super) fn literal(name: &str) -> String {
    name.replace('.', "\\.")
}

/// What is shown instead of an empty table.
pub(super) fn nothing(text: &str) -> Markup {
    html! { p.quiet { (text) } }
}

/// Pairs of a name and what it is.
pub(super) fn facts(facts: &[(&str, Markup)]) -> Markup {
    html! {
        dl.facts {
            @for (name, what) in facts {
                div { dt { (name) } dd { (what) } }
            }
        }
    }
}

/// A choice of several.
pub(super) fn select(name: &str, first: Option<&str>, options: &[(String, String)], chosen: &str) -> Markup {
    html! {
        select name=(name) {
            @if let Some(first) = first { option value="" { (first) } }
            @for (value, shown) in options {
                option value=(value) selected[value == chosen] { (shown) }
            }
        }
    }
}

/// To the next part of a list.
pub(super) fn more(path: &str, next: Option<&str>) -> Markup {
    html! {
        @if let Some(next) = next {
            p { a href=(format!("{path}?after={}", words::in_query(next))) { "More" } }
        }
    }
}
