//! Messages to people: by HTTP and by e-mail. Each waits in the store until it is delivered, or given up.

use std::time::Duration;

use control::fleet::{AlertInfo, AlertSettings, Mail, MailSecurity, RECEIVERS_MAX, UnixMillis};
use lettre::message::Mailbox;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Tls, TlsParameters};
use lettre::{Message, SmtpTransport, Transport};
use serde::{Deserialize, Serialize};
use sqlx::Row;

use crate::app::App;
use crate::fault::{Answer, internal};
use crate::secret::new_id;
use crate::store::Act;

/// After so many tries a message is given up, with a line in the log: about three hours after the first.
pub(super) const TRIES_MAX: i64 = 11;
/// Between the first two tries; doubled each time.
const FIRST_WAIT: Duration = Duration::from_secs(10);
/// How long one delivery may take.
const DELIVERY_TIME_MAX: Duration = Duration::from_secs(20);
/// How long a config server has to deliver a message before another may try. More than a delivery takes.
const LEASE: Duration = Duration::from_secs(60);
/// Messages that wait. Further ones are not kept, and that is logged: alerts are in the store and in the console all the same.
const WAITING_MAX: i64 = 10_000;
/// Messages of one round.
const AT_ONCE: i64 = 64;
/// The receiver's name for e-mail. All others are URLs.
const MAIL: &str = "mail";

/// What is said.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(super) enum Body {
    Raised(AlertInfo),
    Cleared(AlertInfo),
    Test { time: UnixMillis },
}

impl Body {
    fn subject(&self) -> String {
        match self {
            Body::Raised(alert) => format!("[Seawall {}] {}", alert.severity, alert.message),
            Body::Cleared(alert) => format!("[Seawall over] {}", alert.message),
            Body::Test { .. } => "[Seawall] Test message".to_owned(),
        }
    }

    fn text(&self) -> String {
        match self {
            Body::Raised(alert) => {
                format!("{}.\n\nWhat to do: {}\n\n{}\n", alert.message, alert.mend, alert.subject)
            }
            Body::Cleared(alert) => format!("This is over: {}.\n\n{}\n", alert.message, alert.subject),
            Body::Test { .. } => "This is how you will be told of alerts.\n".to_owned(),
        }
    }
}

pub(super) fn check_url(url: &str) -> Result<(), String> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let host = rest.map(|rest| rest.split(['/', '?']).next().unwrap_or_default());
    let printable = url.len() <= 1000 && url.bytes().all(|byte| byte.is_ascii_graphic());
    match host {
        Some(host) if !host.is_empty() && printable => Ok(()),
        _ => Err(format!("{url:?} is no URL: expected https://HOST/... or http://HOST/...")),
    }
}

pub(super) fn check_mail(mail: &Mail) -> Result<(), String> {
    let plain = |text: &str| {
        !text.is_empty() && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if !plain(&mail.server) {
        return Err(format!("{:?} is no name of a mail server", mail.server));
    }
    if mail.to.is_empty() || mail.to.len() > RECEIVERS_MAX {
        return Err(format!("to has {} addresses, expected 1 to {RECEIVERS_MAX}", mail.to.len()));
    }
    for address in mail.to.iter().chain([&mail.from]) {
        address.parse::<Mailbox>().map_err(|error| format!("{address:?} is no address: {error}"))?;
    }
    Ok(())
}

/// Puts a message to everybody in the queue.
pub(super) async fn queue(act: &mut Act, settings: &AlertSettings, body: &Body) -> Answer<()> {
    let waiting: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM notices").fetch_one(&mut **act).await?;
    let urls = settings.webhooks.iter().map(|webhook| webhook.url.as_str());
    let receivers: Vec<&str> = urls.chain(settings.mail.iter().map(|_| MAIL)).collect();
    if waiting + receivers.len() as i64 > WAITING_MAX {
        tracing::error!(waiting, "a message is not sent: too many wait already; is a receiver gone?");
        return Ok(());
    }
    let json = serde_json::to_string(body).map_err(|error| internal("write a message", error))?;
    let now = UnixMillis::now().0;
    for receiver in receivers {
        sqlx::query(
            "INSERT INTO notices (id, receiver, body, tries, next_try, created) VALUES ($1, $2, $3, 0, $4, $4)",
        )
        .bind(new_id().as_str())
        .bind(receiver)
        .bind(&json)
        .bind(now)
        .execute(&mut **act)
        .await?;
    }
    Ok(())
}

/// Tries those whose time has come.
pub(super) async fn round(app: &App) -> Answer<()> {
    let now = UnixMillis::now().0;
    let mut act = app.store.act().await?;
    // Whoever moves a message's time has it; so of several config servers one tries.
    let rows = sqlx::query(
        "UPDATE notices SET tries = tries + 1, next_try = $1 WHERE next_try <= $2 AND id IN
             (SELECT id FROM notices WHERE next_try <= $2 ORDER BY next_try LIMIT $3)
         RETURNING id, receiver, body, tries",
    )
    .bind(now + LEASE.as_millis() as i64)
    .bind(now)
    .bind(AT_ONCE)
    .fetch_all(&mut *act)
    .await?;
    let settings = super::settings(&mut act).await?;
    act.commit().await?;
    let mut trying = tokio::task::JoinSet::new();
    for row in rows {
        let (id, receiver): (String, String) = (row.try_get("id")?, row.try_get("receiver")?);
        let (body, tries): (String, i64) = (row.try_get("body")?, row.try_get("tries")?);
        let mail = settings.mail.clone();
        trying.spawn_blocking(move || {
            let sent = serde_json::from_str(&body)
                .map_err(|error| error.to_string())
                .and_then(|said| deliver(&receiver, &body, &said, mail.as_ref()));
            (id, receiver, tries, sent)
        });
    }
    while let Some(tried) = trying.join_next().await {
        let (id, receiver, tries, sent) = tried.map_err(|error| internal("deliver a message", error))?;
        let mut act = app.store.act().await?;
        match sent {
            Ok(()) => forget(&mut act, &id).await?,
            Err(error) if tries >= TRIES_MAX => {
                tracing::error!(receiver = shown(&receiver), error, tries, "a message is given up");
                forget(&mut act, &id).await?;
            }
            Err(error) => {
                tracing::warn!(
                    receiver = shown(&receiver),
                    error,
                    tries,
                    "a message is not taken; tried again"
                );
                let wait = FIRST_WAIT.as_millis() as i64 * (1 << (tries - 1).clamp(0, 20));
                sqlx::query("UPDATE notices SET next_try = $1 WHERE id = $2")
                    .bind(UnixMillis::now().0 + wait)
                    .bind(&id)
                    .execute(&mut *act)
                    .await?;
            }
        }
        act.commit().await?;
    }
    Ok(())
}

async fn forget(act: &mut Act, id: &str) -> Answer<()> {
    sqlx::query("DELETE FROM notices WHERE id = $1").bind(id).execute(&mut **act).await?;
    Ok(())
}

/// A URL without what may be secret in it.
fn shown(receiver: &str) -> String {
    let end = receiver.match_indices('/').nth(2).map_or(receiver.len(), |(at, _)| at);
    let host = receiver[..end].rsplit_once('@').map_or(&receiver[..end], |(_, host)| host);
    host.to_owned()
}

fn deliver(receiver: &str, json: &str, body: &Body, mail: Option<&Mail>) -> Result<(), String> {
    match (receiver, mail) {
        // Nobody is told by e-mail any more.
        (MAIL, None) => Ok(()),
        (MAIL, Some(mail)) => send_mail(mail, body),
        (url, _) => post(url, json),
    }
}

/// What asks others by HTTP.
pub(crate) fn web_agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(DELIVERY_TIME_MAX))
        // What is told is for the receiver alone.
        .max_redirects(0)
        .tls_config(
            ureq::tls::TlsConfig::builder().root_certs(ureq::tls::RootCerts::PlatformVerifier).build(),
        )
        .build()
        .into()
}

fn post(url: &str, json: &str) -> Result<(), String> {
    let sent = web_agent().post(url).header("Content-Type", "application/json").send(json);
    sent.map(drop).map_err(|error| error.to_string())
}

fn send_mail(mail: &Mail, body: &Body) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let address = |address: &str| address.parse::<Mailbox>().map_err(|error| text(&error));
    let mut message = Message::builder().from(address(&mail.from)?).subject(body.subject());
    for to in &mail.to {
        message = message.to(address(to)?);
    }
    let message = message.body(body.text()).map_err(|error| text(&error))?;
    let parameters = || TlsParameters::new(mail.server.clone()).map_err(|error| text(&error));
    let tls = match mail.security {
        MailSecurity::Tls => Tls::Wrapper(parameters()?),
        MailSecurity::Starttls => Tls::Required(parameters()?),
        MailSecurity::None => Tls::None,
    };
    let mut way = SmtpTransport::builder_dangerous(&mail.server)
        .port(mail.port)
        .tls(tls)
        .timeout(Some(DELIVERY_TIME_MAX));
    if let Some(user) = &mail.user {
        way = way.credentials(Credentials::new(user.clone(), mail.password.clone().unwrap_or_default()));
    }
    way.build().send(&message).map(drop).map_err(|error| text(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_secret_is_not_logged() {
        assert_eq!(shown("https://user:word@x.example/hooks/SECRET?k=1"), "x.example");
        assert_eq!(shown("https://x.example/hooks/SECRET"), "https://x.example");
        assert_eq!(shown("mail"), "mail");
    }
}
