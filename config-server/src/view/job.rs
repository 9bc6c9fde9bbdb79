use control::fleet::{JobInfo, Page, ResourceId, StepInfo, UnixMillis};
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::api::guard::parse;
use crate::fault::{Answer, internal, not_found};
use crate::store::Store;

pub(crate) fn job_of_row(row: &AnyRow, steps: bool) -> Answer<JobInfo> {
    let steps: Vec<StepInfo> = match steps {
        true => serde_json::from_str(&row.try_get::<String, _>("steps")?)
            .map_err(|error| internal("read a job's steps", error))?,
        false => Vec::new(),
    };
    Ok(JobInfo {
        id: parse(row.try_get("id")?)?,
        kind: parse(row.try_get("kind")?)?,
        subject: row.try_get("subject")?,
        state: parse(row.try_get("state")?)?,
        percent: u8::try_from(row.try_get::<i64, _>("percent")?).unwrap_or(100),
        message: row.try_get("message")?,
        created_by: row.try_get("created_by")?,
        created: UnixMillis(row.try_get("created")?),
        changed: UnixMillis(row.try_get("changed")?),
        steps,
    })
}

/// The newest jobs before number `before`.
pub(crate) async fn jobs(store: &Store, before: i64, limit: i64) -> Answer<Page<JobInfo>> {
    let rows = sqlx::query("SELECT * FROM jobs WHERE number < $1 ORDER BY number DESC LIMIT $2")
        .bind(before)
        .bind(limit)
        .fetch_all(&store.read)
        .await?;
    let items: Vec<JobInfo> = rows.iter().map(|row| job_of_row(row, false)).collect::<Answer<_>>()?;
    let next = match rows.last() {
        Some(last) if rows.len() as i64 == limit => Some(last.try_get::<i64, _>("number")?.to_string()),
        _ => None,
    };
    Ok(Page { items, next })
}

pub(crate) async fn job(store: &Store, id: &ResourceId) -> Answer<JobInfo> {
    let row =
        sqlx::query("SELECT * FROM jobs WHERE id = $1").bind(id.as_str()).fetch_optional(&store.read).await?;
    row.as_ref().map(|row| job_of_row(row, true)).transpose()?.ok_or_else(|| not_found("job", id))
}
