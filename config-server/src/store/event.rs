use control::Severity;
use control::fleet::{EventInfo, EventKind, UnixMillis};
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row};

use super::{Counter, count};

/// Events that are kept; older ones go.
const EVENTS_KEPT: i64 = 100_000;

/// What is to be said.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) kind: EventKind,
    pub(crate) severity: Severity,
    pub(crate) subject: String,
    pub(crate) message: String,
}

impl Said {
    pub(crate) fn new(kind: EventKind, subject: impl Into<String>, message: impl Into<String>) -> Said {
        Said { kind, severity: Severity::Good, subject: subject.into(), message: message.into() }
    }

    pub(crate) fn severity(mut self, severity: Severity) -> Said {
        self.severity = severity;
        self
    }
}

pub(crate) const fn severity_name(severity: Severity) -> &'static str {
    match severity {
        Severity::Good => "good",
        Severity::Notice => "notice",
        Severity::Trouble => "trouble",
    }
}

/// Tells what happened, with the act that it tells of.
pub(crate) async fn say(act: &mut AnyConnection, said: Said) -> Result<(), sqlx::Error> {
    let id = count(act, Counter::Event).await?;
    sqlx::query(
        "INSERT INTO events (id, time, kind, severity, subject, message) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(id)
    .bind(UnixMillis::now().0)
    .bind(said.kind.as_str())
    .bind(severity_name(said.severity))
    .bind(said.subject)
    .bind(said.message)
    .execute(act)
    .await?;
    Ok(())
}

fn event(row: &AnyRow) -> Result<EventInfo, sqlx::Error> {
    Ok(EventInfo {
        id: row.try_get("id")?,
        time: UnixMillis(row.try_get("time")?),
        kind: row.try_get("kind")?,
        severity: row.try_get("severity")?,
        subject: row.try_get("subject")?,
        message: row.try_get("message")?,
    })
}

/// What happened after event `after`, in order.
pub(crate) async fn events_after(
    from: &mut AnyConnection,
    after: i64,
    limit: i64,
) -> Result<Vec<EventInfo>, sqlx::Error> {
    let rows = sqlx::query("SELECT * FROM events WHERE id > $1 ORDER BY id LIMIT $2")
        .bind(after)
        .bind(limit)
        .fetch_all(from)
        .await?;
    rows.iter().map(event).collect()
}

/// The number of the newest event.
pub(crate) async fn newest_event(from: &mut AnyConnection) -> Result<i64, sqlx::Error> {
    super::read_count(from, Counter::Event).await
}

/// Lets old events go.
pub(crate) async fn prune_events(act: &mut AnyConnection) -> Result<(), sqlx::Error> {
    let newest = newest_event(act).await?;
    sqlx::query("DELETE FROM events WHERE id <= $1").bind(newest - EVENTS_KEPT).execute(act).await?;
    Ok(())
}
