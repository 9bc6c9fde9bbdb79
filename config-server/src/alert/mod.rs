//! Alerts: what is wrong is found again and again from the store, raised once, and cleared when it is over; people are told of both.
//!
//! Consistency: an alert is raised or cleared in one act with the event and the messages that tell of it; of several config servers
//! the store lets one raise it. Messages wait in the store until they are delivered or given up.
//! Retries: a message that is not taken is tried again after 10 s, then after twice as long each time, [`deliver::TRIES_MAX`] times in all.

mod cause;
mod deliver;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use control::Severity;
use control::fleet::{AlertInfo, AlertKind, AlertSettings, EventKind, Mail, RECEIVERS_MAX, UnixMillis};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row};

use crate::api::guard::parse;
use crate::app::Shared;
use crate::fault::{Answer, invalid};
use crate::secret::new_id;
use crate::store::{Act, Said, Store, say};
use cause::Cause;
use deliver::Body;
pub(crate) use deliver::web_agent;

/// Between two looks at what is wrong.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Between two rounds of delivery.
const DELIVER_EVERY: Duration = Duration::from_secs(2);
/// A cause must be gone for so long before its alert is cleared, so that one that comes and goes is told of once.
const GONE_FOR: Duration = Duration::from_secs(15);
/// Alerts that are kept after they were cleared; the oldest go.
const ALERTS_KEPT: i64 = 10_000;

/// Looks for what is wrong, and delivers, until the config server stops. A receiver that does not answer holds up no look.
pub(crate) async fn run(app: Shared) {
    let looking = async {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Err(fault) = look(&app.store).await {
                tracing::warn!(%fault, "look for what is wrong; tried again");
            }
        }
    };
    let delivering = async {
        loop {
            tokio::time::sleep(DELIVER_EVERY).await;
            if let Err(fault) = deliver::round(&app).await {
                tracing::warn!(%fault, "deliver messages; tried again");
            }
        }
    };
    tokio::join!(looking, delivering);
}

/// One look: raises what is new, clears what is over.
async fn look(store: &Store) -> Answer<()> {
    let began = Instant::now();
    let settings = settings(&mut *store.read.acquire().await?).await?;
    let causes = cause::all(store, &settings).await?;
    tracing::debug!(
        look_ms = began.elapsed().as_secs_f64() * 1000.0,
        causes = causes.len(),
        "looked for what is wrong"
    );
    let wrong: HashMap<String, Cause> = causes.into_iter().map(|cause| (cause.key(), cause)).collect();
    let mut act = store.act().await?;
    let rows = sqlx::query("SELECT * FROM alerts WHERE cleared = 0").fetch_all(&mut *act).await?;
    let now = UnixMillis::now();
    let mut raised = HashMap::new();
    for row in &rows {
        let (key, gone): (String, i64) = (row.try_get("open_key")?, row.try_get("gone")?);
        match (wrong.contains_key(&key), gone) {
            (true, 0) => {}
            (true, _) => set_gone(&mut act, &key, 0).await?,
            (false, 0) => set_gone(&mut act, &key, now.0).await?,
            (false, since) if now.0 - since >= GONE_FOR.as_millis() as i64 => {
                clear(&mut act, row, &settings).await?;
            }
            (false, _) => {}
        }
        raised.insert(key, ());
    }
    for (key, cause) in wrong {
        if !raised.contains_key(&key) {
            raise(&mut act, &key, cause, &settings).await?;
        }
    }
    sqlx::query(
        "DELETE FROM alerts WHERE cleared > 0 AND id NOT IN
             (SELECT id FROM alerts WHERE cleared > 0 ORDER BY cleared DESC LIMIT $1)",
    )
    .bind(ALERTS_KEPT)
    .execute(&mut *act)
    .await?;
    Ok(act.commit().await?)
}

async fn set_gone(act: &mut Act, key: &str, gone: i64) -> Answer<()> {
    sqlx::query("UPDATE alerts SET gone = $1 WHERE open_key = $2")
        .bind(gone)
        .bind(key)
        .execute(&mut **act)
        .await?;
    Ok(())
}

async fn raise(act: &mut Act, key: &str, cause: Cause, settings: &AlertSettings) -> Answer<()> {
    let id = new_id();
    // Of several config servers that see it, one raises it.
    let made = sqlx::query(
        "INSERT INTO alerts (id, open_key, kind, severity, subject, message, mend, raised, gone, cleared)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0, 0) ON CONFLICT (open_key) DO NOTHING RETURNING *",
    )
    .bind(id.as_str())
    .bind(key)
    .bind(cause.kind.as_str())
    .bind(crate::store::severity_name(cause.severity))
    .bind(&cause.subject)
    .bind(&cause.message)
    .bind(&cause.mend)
    .bind(UnixMillis::now().0)
    .fetch_optional(&mut **act)
    .await?;
    let Some(row) = made else { return Ok(()) };
    let alert = alert_of_row(&row)?;
    let said = Said::new(EventKind::Alert, cause.subject, alert.message.clone());
    say(act, said.severity(cause.severity)).await?;
    tracing::warn!(kind = alert.kind.as_str(), subject = alert.subject, "alert: {}", alert.message);
    deliver::queue(act, settings, &Body::Raised(alert)).await
}

async fn clear(act: &mut Act, row: &AnyRow, settings: &AlertSettings) -> Answer<()> {
    let mut alert = alert_of_row(row)?;
    let now = UnixMillis::now();
    let cleared = sqlx::query("UPDATE alerts SET cleared = $1, open_key = id WHERE id = $2 AND cleared = 0")
        .bind(now.0)
        .bind(alert.id.as_str())
        .execute(&mut **act)
        .await?;
    if cleared.rows_affected() == 0 {
        return Ok(());
    }
    alert.cleared = Some(now);
    let said = Said::new(EventKind::Alert, alert.subject.clone(), format!("Over: {}", alert.message));
    say(act, said.severity(Severity::Good)).await?;
    tracing::info!(kind = alert.kind.as_str(), subject = alert.subject, "alert is over: {}", alert.message);
    deliver::queue(act, settings, &Body::Cleared(alert)).await
}

fn alert_of_row(row: &AnyRow) -> Answer<AlertInfo> {
    let cleared: i64 = row.try_get("cleared")?;
    Ok(AlertInfo {
        id: parse(row.try_get("id")?)?,
        kind: parse(row.try_get("kind")?)?,
        severity: row.try_get("severity")?,
        subject: row.try_get("subject")?,
        message: row.try_get("message")?,
        mend: row.try_get("mend")?,
        raised: UnixMillis(row.try_get("raised")?),
        cleared: (cleared > 0).then_some(UnixMillis(cleared)),
    })
}

/// Those that are raised, then those that were, the newest first.
pub(crate) async fn alerts(store: &Store, limit: i64) -> Answer<Vec<AlertInfo>> {
    let rows = sqlx::query(
        "SELECT * FROM alerts ORDER BY CASE WHEN cleared = 0 THEN 0 ELSE 1 END, raised DESC, id LIMIT $1",
    )
    .bind(limit)
    .fetch_all(&store.read)
    .await?;
    rows.iter().map(alert_of_row).collect()
}

/// How many of each kind are raised.
pub(crate) async fn raised_by_kind(store: &Store) -> Answer<Vec<(AlertKind, i64)>> {
    let rows = sqlx::query("SELECT kind, COUNT(*) AS raised FROM alerts WHERE cleared = 0 GROUP BY kind")
        .fetch_all(&store.read)
        .await?;
    let mut counted: HashMap<String, i64> = HashMap::new();
    for row in &rows {
        counted.insert(row.try_get("kind")?, row.try_get("raised")?);
    }
    Ok(AlertKind::ALL.iter().map(|kind| (*kind, counted.get(kind.as_str()).copied().unwrap_or(0))).collect())
}

/// As they are kept, with the password.
pub(crate) async fn settings(from: &mut AnyConnection) -> Answer<AlertSettings> {
    let kept: Option<String> =
        sqlx::query_scalar("SELECT value FROM settings WHERE name = 'alerts'").fetch_optional(from).await?;
    match kept {
        None => Ok(AlertSettings::default()),
        Some(json) => serde_json::from_str(&json)
            .map_err(|error| crate::fault::internal("read the alerts' settings", error)),
    }
}

/// Keeps other ones.
pub(crate) async fn set_settings(act: &mut Act, mut new: AlertSettings) -> Answer<()> {
    check(&new)?;
    let before = settings(act).await?;
    keep_password(&mut new, before);
    let json = serde_json::to_string(&new).map_err(|error| crate::fault::internal("keep settings", error))?;
    sqlx::query(
        "INSERT INTO settings (name, value) VALUES ('alerts', $1) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    .bind(json)
    .execute(&mut **act)
    .await?;
    Ok(())
}

/// The password stays when none is given, but it is given to no other server.
fn keep_password(new: &mut AlertSettings, before: AlertSettings) {
    let same =
        |new: &Mail, old: &Mail| (&new.server, new.port, &new.user) == (&old.server, old.port, &old.user);
    if let (Some(mail), Some(old)) = (&mut new.mail, before.mail)
        && mail.password.is_none()
        && same(mail, &old)
    {
        mail.password = old.password;
    }
}

fn check(settings: &AlertSettings) -> Answer<()> {
    const YEAR_S: u64 = 365 * 86_400;
    for (name, value, most) in [
        ("application_point_age_s", settings.application_point_age_s, YEAR_S),
        ("cache_used_percent", settings.cache_used_percent.into(), 100),
        ("store_free_percent", settings.store_free_percent.into(), 99),
        ("certificate_days", settings.certificate_days.into(), 365),
        ("webhooks", settings.webhooks.len() as u64, RECEIVERS_MAX as u64),
    ] {
        if value > most {
            return Err(invalid(format!("{name} is {value}, at most {most} goes")));
        }
    }
    if settings.cache_used_percent == 0 {
        return Err(invalid("cache_used_percent is 0, at least 1 goes"));
    }
    for webhook in &settings.webhooks {
        deliver::check_url(&webhook.url).map_err(|why| invalid(format!("webhooks: {why}")))?;
    }
    if let Some(mail) = &settings.mail {
        deliver::check_mail(mail).map_err(|why| invalid(format!("mail: {why}")))?;
    }
    Ok(())
}

/// A message to everybody who would be told of an alert.
pub(crate) async fn test(act: &mut Act) -> Answer<usize> {
    let settings = settings(act).await?;
    let receivers = settings.webhooks.len() + usize::from(settings.mail.is_some());
    if receivers == 0 {
        return Err(invalid(
            "Nobody would be told: there is neither a webhook nor a mail server in the settings",
        ));
    }
    deliver::queue(act, &settings, &Body::Test { time: UnixMillis::now() }).await?;
    Ok(receivers)
}

/// Names what an alert is about.
pub(crate) fn subject(collection: &str, id: &str) -> String {
    format!("{collection}/{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_stays_with_its_server() {
        let with = |server: &str, password: Option<&str>| AlertSettings {
            mail: Some(Mail {
                server: server.into(),
                port: 25,
                security: control::fleet::MailSecurity::Starttls,
                user: Some("u".into()),
                password: password.map(str::to_owned),
                from: "a@example.org".into(),
                to: vec!["b@example.org".into()],
            }),
            ..AlertSettings::default()
        };
        for (server, given, kept) in
            [("a", None, Some("word")), ("b", None, None), ("b", Some("other"), Some("other"))]
        {
            let mut new = with(server, given);
            keep_password(&mut new, with("a", Some("word")));
            assert_eq!(new.mail.unwrap().password.as_deref(), kept, "{server}");
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_refused_by_name() {
        let mail = Mail {
            server: "mail.example".into(),
            port: 25,
            security: control::fleet::MailSecurity::None,
            user: None,
            password: None,
            from: "seawall@example.org".into(),
            to: vec!["ops@example.org".into()],
        };
        let hook = |url: &str| control::fleet::Webhook { url: url.into() };
        let good = AlertSettings {
            webhooks: vec![hook("https://x.example/y?z"), hook("http://127.0.0.1:8080/")],
            mail: Some(mail.clone()),
            ..AlertSettings::default()
        };
        check(&good).unwrap();
        for (bad, named) in [
            (AlertSettings { cache_used_percent: 101, ..good.clone() }, "cache_used_percent"),
            (AlertSettings { cache_used_percent: 0, ..good.clone() }, "cache_used_percent"),
            (AlertSettings { webhooks: vec![hook("ftp://x")], ..good.clone() }, "ftp"),
            (AlertSettings { webhooks: vec![hook("https://")], ..good.clone() }, "webhooks"),
            (AlertSettings { webhooks: vec![hook("https://x y")], ..good.clone() }, "webhooks"),
            (AlertSettings { webhooks: vec![hook("http://x/"); 17], ..good.clone() }, "webhooks"),
            (
                AlertSettings { mail: Some(Mail { from: "nobody".into(), ..mail.clone() }), ..good.clone() },
                "nobody",
            ),
            (AlertSettings { mail: Some(Mail { to: vec![], ..mail.clone() }), ..good.clone() }, "mail"),
            (
                AlertSettings { mail: Some(Mail { server: "a b".into(), ..mail.clone() }), ..good.clone() },
                "a b",
            ),
        ] {
            let detail = check(&bad).unwrap_err().problem.detail;
            assert!(detail.contains(named), "{detail}");
        }
    }
}
