//! Users, the second person's approvals, the audit log.

use axum::extract::{Path, Query};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use control::Severity;
use control::fleet::{
    Approval, ApprovalAnswer, ApprovalState, AuditEntry, ChangeUser, Confirm, NewUser, Page, Role, UserInfo,
};
use maud::{Markup, html};

use super::door::Visit;
use super::form::Form;
use super::machine::in_path;
use super::{Shown, go, layout, words};
use crate::api::extract::Part;
use crate::fault::Answer;

/// Destroys what the API has at a path, once its name was typed; then to `after`, or to the approvals when a second person is needed.
pub(super) async fn destroy(visit: &Visit, path: &str, form: &Form, after: &str) -> Answer<Response> {
    let asked = Confirm { confirm: form.get("confirm").to_owned() };
    let answer = visit.door.act(Method::DELETE, path, form.csrf(), &asked).await?;
    done_or_waits(&answer, after)
}

/// To `after`, or to the approvals when the act waits for a second person.
pub(super) fn done_or_waits(answer: &Response, after: &str) -> Answer<Response> {
    go(if answer.status() == StatusCode::ACCEPTED { "/approvals" } else { after })
}

const ROLES: [(&str, &str); 3] = [
    ("viewer", "viewer: sees"),
    ("operator", "operator: protects, takes points, enrols"),
    ("administrator", "administrator: users, removal, settings"),
];

fn roles(chosen: &str) -> Markup {
    let options: Vec<(String, String)> =
        ROLES.iter().map(|(role, text)| ((*role).to_owned(), (*text).to_owned())).collect();
    layout::select("role", None, &options, chosen)
}

pub(super) async fn users(visit: Visit) -> Shown {
    let users: Vec<UserInfo> = visit.door.all("/users").await?;
    let content = html! {
        h1 { "Users" }
        table.cards {
            thead { tr { th { "Name" } th { "Role" } th { "Made" } th { "Change" } } }
            tbody {
                @for user in &users {
                    tr {
                        td data-label="Name" { strong { (user.name) } @if user.disabled { " " (words::badge(Severity::Notice, "disabled")) } }
                        td data-label="Role" { (user.role) }
                        td data-label="Made" { (words::moment(user.created)) }
                        td data-label="Change" {
                            details {
                                summary { "Change " (user.name) }
                                form.fields method="post" action=(format!("/users/{}", user.id)) {
                                    (layout::csrf(&visit))
                                    label { "Role" (roles(user.role.as_str())) }
                                    label { "New password (all sessions end)" input name="password" type="password" minlength="12" maxlength="1024" autocomplete="new-password"; }
                                    label.tick { input type="checkbox" name="disabled" checked[user.disabled]; span { "Disabled: cannot log in" } }
                                    button { "Change" }
                                    (layout::command(&format!("seawall user change {} --role {} --disabled {}", words::shell(user.name.as_str()), user.role, user.disabled)))
                                }
                            }
                        }
                    }
                }
            }
        }
        form.fields.card method="post" action="/users" {
            h2 { "Make a user" }
            (layout::csrf(&visit))
            label { "Name" input name="name" required maxlength="64" autocomplete="off" spellcheck="false"; }
            label { "Role" (roles("viewer")) }
            label { "Password, 12 characters or more" input name="password" type="password" required minlength="12" maxlength="1024" autocomplete="new-password"; }
            button { "Make the user" }
            (layout::command("seawall user create NAME --role viewer"))
        }
    };
    Ok(super::html(layout::still(&visit, "Users", content)))
}

pub(super) async fn make_user(visit: Visit, form: Form) -> Answer<Response> {
    let asked = NewUser {
        name: form.value("name")?,
        role: form.value("role")?,
        password: form.verbatim("password").to_owned(),
    };
    visit.door.act(Method::POST, "/users", form.csrf(), &asked).await?;
    go("/users")
}

pub(super) async fn change_user(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let id = in_path(&id)?;
    let users: Vec<UserInfo> = visit.door.all("/users").await?;
    let before = users.iter().find(|user| user.id.as_str() == id);
    let role: Role = form.value("role")?;
    let disabled = form.ticked("disabled");
    let password = form.verbatim("password");
    // Only what was changed: disabling anew would end sessions.
    let asked = ChangeUser {
        role: (before.map(|user| user.role) != Some(role)).then_some(role),
        disabled: (before.map(|user| user.disabled) != Some(disabled)).then_some(disabled),
        password: (!password.is_empty()).then(|| password.to_owned()),
    };
    visit.door.act(Method::PATCH, &format!("/users/{id}"), form.csrf(), &asked).await?;
    go("/users")
}

fn approval_state(state: ApprovalState) -> Markup {
    match state {
        ApprovalState::Waiting => words::badge(Severity::Notice, "waiting"),
        ApprovalState::Approved => words::badge(Severity::Good, "approved"),
        ApprovalState::Rejected | ApprovalState::Expired => words::badge(Severity::Trouble, state.as_str()),
    }
}

pub(super) async fn approvals(visit: Visit) -> Shown {
    let approvals: Vec<Approval> = visit.door.get("/approvals").await?;
    let content = html! {
        h1 { "Approvals" }
        p { "Acts that destroy wait here for a second person, when the " a href="/settings" { "settings" } " say so." }
        @if approvals.is_empty() { (layout::nothing("None yet.")) }
        @else {
            table.cards {
                thead { tr { th { "What" } th { "Asked" } th { "State" } th { "" } } }
                tbody {
                    @for approval in &approvals {
                        tr {
                            td data-label="What" { (approval.what) }
                            td data-label="Asked" { (words::ago(approval.asked)) div.quiet { "by " (approval.asked_by) } }
                            td data-label="State" {
                                (approval_state(approval.state))
                                @if let Some(who) = &approval.answered_by { div.quiet { "by " (who) } }
                                @else if approval.state == ApprovalState::Waiting { div.quiet { "until " (words::moment(approval.expires)) } }
                            }
                            td {
                                @if approval.state == ApprovalState::Waiting && visit.user.role >= Role::Administrator {
                                    form.act method="post" action=(format!("/approvals/{}", approval.id)) {
                                        (layout::csrf(&visit))
                                        button.destroys name="answer" value="approve" { "Approve, and do it" }
                                        button name="answer" value="reject" { "Reject" }
                                        (layout::command(&format!("seawall approval approve {}", approval.id)))
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    Ok(super::html(layout::still(&visit, "Approvals", content)))
}

pub(super) async fn answer(visit: Visit, Path(id): Path<String>, form: Form) -> Answer<Response> {
    let approve = match form.get("answer") {
        "approve" => true,
        "reject" => false,
        other => {
            return Err(crate::fault::invalid(format!("answer is {other:?}, expected approve or reject")));
        }
    };
    let path = format!("/approvals/{}", in_path(&id)?);
    visit.door.act(Method::POST, &path, form.csrf(), &ApprovalAnswer { approve }).await?;
    go("/approvals")
}

pub(super) async fn audit(visit: Visit, Query(part): Query<Part>) -> Shown {
    let after = part.after_text()?;
    let query = if after.is_empty() { String::new() } else { format!("?after={}", words::in_query(after)) };
    let entries: Page<AuditEntry> = visit.door.get(&format!("/audit{query}")).await?;
    let content = html! {
        h1 { "Audit log" }
        p { "Who did or tried what, when, and what came of it." }
        table.cards {
            thead { tr { th { "When" } th { "Who" } th { "Act" } th { "On what" } th { "Result" } } }
            tbody {
                @for entry in &entries.items {
                    tr {
                        td data-label="When" { (words::moment(entry.time)) }
                        td data-label="Who" { (entry.who) div.quiet { "from " (entry.address) } }
                        td data-label="Act" { code { (entry.act.replace(crate::api::API, "")) } }
                        td data-label="On what" { (entry.what.strip_prefix(crate::api::API).unwrap_or(&entry.what)) }
                        td data-label="Result" {
                            @match (entry.status, entry.problem.as_str()) {
                                (0, _) => { (words::badge(Severity::Notice, "not known")) }
                                (_, "") => { (words::badge(Severity::Good, "done")) }
                                (_, problem) => { (words::badge(Severity::Trouble, &words::readable(problem))) }
                            }
                        }
                    }
                }
            }
        }
        (layout::more("/audit", entries.next.as_deref()))
        (layout::command("seawall audit --last 100"))
    };
    Ok(super::html(layout::still(&visit, "Audit log", content)))
}
