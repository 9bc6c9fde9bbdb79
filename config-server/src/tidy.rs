//! Letting old things go: what has ended and nobody looks at any more.

use std::time::Duration;

use control::fleet::UnixMillis;

use crate::app::App;
use crate::audit::AUDIT_KEPT;
use crate::fault::Answer;
use crate::job::JOBS_KEPT;
use crate::sample::prune_samples;
use crate::store::{Counter, prune_events, read_count};

/// Reports that are older are read from the store when somebody asks.
const REPORTS_AT_HAND: Duration = Duration::from_secs(3600);

/// One round.
pub(crate) async fn tidy(app: &App) -> Answer<()> {
    let now = UnixMillis::now();
    app.store.reports.forget_before(UnixMillis(now.0 - REPORTS_AT_HAND.as_millis() as i64));
    let mut act = app.store.act().await?;
    prune_events(&mut act).await?;
    prune_samples(&mut act).await?;
    for table in ["sessions", "api_tokens", "enrol_tokens", "certificates"] {
        sqlx::query(&format!("DELETE FROM {table} WHERE expires < $1"))
            .bind(now.0)
            .execute(&mut *act)
            .await?;
    }
    let newest = read_count(&mut act, Counter::Audit).await?;
    sqlx::query("DELETE FROM audit WHERE id <= $1").bind(newest - AUDIT_KEPT).execute(&mut *act).await?;
    let newest = read_count(&mut act, Counter::Job).await?;
    for sql in [
        "DELETE FROM plan_answers WHERE run_id IN (SELECT id FROM jobs WHERE number <= $1 AND state NOT IN ('waiting', 'running'))",
        "DELETE FROM tasks WHERE job_id IN (SELECT id FROM jobs WHERE number <= $1 AND state NOT IN ('waiting', 'running'))",
        "DELETE FROM jobs WHERE number <= $1 AND state NOT IN ('waiting', 'running')",
    ] {
        sqlx::query(sql).bind(newest - JOBS_KEPT).execute(&mut *act).await?;
    }
    sqlx::query("UPDATE approvals SET state = 'rejected', answered_by = 'nobody, in time' WHERE state = 'waiting' AND expires < $1")
        .bind(now.0)
        .execute(&mut *act)
        .await?;
    Ok(act.commit().await?)
}
