//! The audit log: who did or tried what, when, and what came of it. Written before the act begins, completed after it has
//! ended; an entry with status 0 is of an act during which the config server died.

use control::fleet::{AuditEntry, Page, UnixMillis};
use sqlx::Row;

use crate::api::guard::{Caller, Peer};
use crate::fault::Answer;
use crate::store::{Counter, Store, count};

/// Entries that are kept; older ones go.
pub const AUDIT_KEPT: i64 = 1_000_000;

pub(crate) async fn begin_audit(
    store: &Store,
    caller: &Caller,
    peer: &Peer,
    label: &str,
    what: &str,
) -> Answer<i64> {
    let mut act = store.act().await?;
    let id = count(&mut act, Counter::Audit).await?;
    sqlx::query(
        "INSERT INTO audit (id, time, who, address, act, what, status, problem) VALUES ($1, $2, $3, $4, $5, $6, 0, '')",
    )
    .bind(id)
    .bind(UnixMillis::now().0)
    .bind(caller.shown())
    .bind(peer.address.ip().to_string())
    .bind(label)
    .bind(what.replace('\0', "?"))
    .execute(&mut *act)
    .await?;
    act.commit().await?;
    Ok(id)
}

pub(crate) async fn end_audit(
    store: &Store,
    entry: i64,
    what: Option<&str>,
    status: u16,
    problem: &str,
) -> Answer<()> {
    let mut act = store.act().await?;
    sqlx::query("UPDATE audit SET status = $1, problem = $2 WHERE id = $3")
        .bind(i64::from(status))
        .bind(problem)
        .bind(entry)
        .execute(&mut *act)
        .await?;
    if let Some(what) = what {
        sqlx::query("UPDATE audit SET what = $1 WHERE id = $2")
            .bind(what)
            .bind(entry)
            .execute(&mut *act)
            .await?;
    }
    Ok(act.commit().await?)
}

/// The newest entries before number `before`.
pub(crate) async fn audit_before(store: &Store, before: i64, limit: i64) -> Answer<Page<AuditEntry>> {
    let rows = sqlx::query("SELECT * FROM audit WHERE id < $1 ORDER BY id DESC LIMIT $2")
        .bind(before)
        .bind(limit)
        .fetch_all(&store.read)
        .await?;
    let entry = |row: &sqlx::any::AnyRow| -> Answer<AuditEntry> {
        Ok(AuditEntry {
            id: row.try_get("id")?,
            time: UnixMillis(row.try_get("time")?),
            who: row.try_get("who")?,
            address: row.try_get("address")?,
            act: row.try_get("act")?,
            what: row.try_get("what")?,
            status: u16::try_from(row.try_get::<i64, _>("status")?).unwrap_or_default(),
            problem: row.try_get("problem")?,
        })
    };
    let items: Vec<AuditEntry> = rows.iter().map(entry).collect::<Answer<_>>()?;
    let next = (items.len() as i64 == limit).then(|| items.last().map(|last| last.id.to_string())).flatten();
    Ok(Page { items, next })
}
