//! When somebody is told of what, and who.

use axum::extract::Query;
use axum::http::Method;
use axum::response::Response;
use control::fleet::{AlertSettings, Mail, MailSecurity, RECEIVERS_MAX, Role, Webhook};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::json;

use super::door::Visit;
use super::form::Form;
use super::{Shown, go, layout};
use crate::fault::{Answer, invalid};

const SECURITIES: [(MailSecurity, &str); 3] = [
    (MailSecurity::Starttls, "STARTTLS, which must be offered"),
    (MailSecurity::Tls, "TLS from the beginning"),
    (MailSecurity::None, "none: for a mail server on this machine"),
];

fn thresholds(now: &AlertSettings) -> Markup {
    html! {
        fieldset { legend { "When" }
            p.quiet { "A recovery point older than its policy allows, trouble, a resync that waits and a part that is silent are always told of." }
            label { "No application-consistent point for so many seconds (0: never told)"
                input name="application_point_age_s" type="number" min="0" max="31536000" required value=(now.application_point_age_s); }
            label { "A cache fuller than so many percent"
                input name="cache_used_percent" type="number" min="1" max="100" required value=(now.cache_used_percent); }
            label { "A store with less than so many percent free"
                input name="store_free_percent" type="number" min="0" max="99" required value=(now.store_free_percent); }
            label { "A certificate that ends within so many days"
                input name="certificate_days" type="number" min="0" max="365" required value=(now.certificate_days); }
        }
    }
}

fn receivers(now: &AlertSettings) -> Markup {
    let urls: Vec<&str> = now.webhooks.iter().map(|webhook| webhook.url.as_str()).collect();
    let mail = now.mail.as_ref();
    let text = |of: fn(&Mail) -> &str| mail.map_or("", of);
    let securities = SECURITIES.map(|(security, shown)| (security.as_str().to_owned(), shown.to_owned()));
    let chosen = mail.map_or(MailSecurity::Starttls, |mail| mail.security);
    html! {
        fieldset { legend { "Webhooks" }
            label { "Addresses, one a line; each gets a POST with JSON when an alert is raised, and when it is over"
                textarea name="webhooks" rows="3" spellcheck="false" placeholder="https://chat.example/hooks/..." { (urls.join("\n")) } }
        }
        fieldset { legend { "E-mail" }
            label { "Mail server (empty: no mail is sent)" input name="server" maxlength="255" spellcheck="false" value=(text(|mail| &mail.server)); }
            label { "Port" input name="port" type="number" min="1" max="65535" value=(mail.map_or(587, |mail| mail.port)); }
            label { "How the way there is protected" (layout::select("security", None, &securities, chosen.as_str())) }
            label { "User (empty: nobody logs in)" input name="user" maxlength="255" autocomplete="off" spellcheck="false" value=(text(|mail| mail.user.as_deref().unwrap_or_default())); }
            label { "Password (empty: as it is, while server, port and user are the same)" input name="password" type="password" maxlength="1024" autocomplete="new-password"; }
            label { "Sender" input name="from" type="email" maxlength="255" value=(text(|mail| &mail.from)); }
            label { "Receivers, one a line" textarea name="to" rows="2" spellcheck="false" { (mail.map(|mail| mail.to.join("\n")).unwrap_or_default()) } }
        }
    }
}

/// What was just done.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Done {
    #[serde(default)]
    sent: bool,
}

pub(super) async fn page(visit: Visit, Query(done): Query<Done>) -> Shown {
    let now: AlertSettings = visit.door.get("/settings/alerts").await?;
    let may = visit.user.role >= Role::Administrator;
    let told = now.webhooks.len() + usize::from(now.mail.is_some());
    let content = html! {
        p.crumbs { a href="/settings" { "Settings" } }
        h1 { "Alerts" }
        p { @match told {
            0 => { "Nobody is told but whoever looks at the overview and the log." }
            1 => { "One receiver is told." }
            told => { (told) " receivers are told." }
        } }
        @if done.sent {
            p role="status" { "A test message is on its way to each. If one does not arrive, the config server's log says why." }
        }
        @if may && told > 0 {
            (layout::button(&visit, "/settings/alerts/test", "Send a test message", layout::command("seawall alert test")))
        }
        form.fields.card method="post" action="/settings/alerts" {
            (layout::csrf(&visit))
            fieldset.bare disabled[!may] {
                (thresholds(&now))
                (receivers(&now))
            }
            @if may {
                button { "Change" }
                (layout::command("seawall alert settings --json | tee alerts.json  # change it, then: seawall alert settings --from alerts.json"))
            } @else {
                p.quiet { "An administrator may change them." }
            }
        }
    };
    Ok(super::html(layout::still(&visit, "Alerts", content)))
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

fn asked(form: &Form) -> Answer<AlertSettings> {
    let webhooks: Vec<Webhook> = lines(form.get("webhooks")).into_iter().map(|url| Webhook { url }).collect();
    if webhooks.len() > RECEIVERS_MAX {
        return Err(invalid(format!("webhooks has {} lines, at most {RECEIVERS_MAX} go", webhooks.len())));
    }
    let text = |name: &str| Some(form.verbatim(name).to_owned()).filter(|text| !text.is_empty());
    let mail = match form.get("server") {
        "" => None,
        server => Some(Mail {
            server: server.to_owned(),
            port: form.value("port")?,
            security: form.value("security")?,
            user: text("user"),
            password: text("password"),
            from: form.get("from").to_owned(),
            to: lines(form.get("to")),
        }),
    };
    Ok(AlertSettings {
        application_point_age_s: form.value("application_point_age_s")?,
        cache_used_percent: form.value("cache_used_percent")?,
        store_free_percent: form.value("store_free_percent")?,
        certificate_days: form.value("certificate_days")?,
        webhooks,
        mail,
    })
}

pub(super) async fn change(visit: Visit, form: Form) -> Answer<Response> {
    visit.door.act(Method::PUT, "/settings/alerts", form.csrf(), &asked(&form)?).await?;
    go("/settings/alerts")
}

pub(super) async fn test(visit: Visit, form: Form) -> Answer<Response> {
    visit.door.act(Method::POST, "/alerts/test", form.csrf(), &json!({})).await?;
    go("/settings/alerts?sent=true")
}
