use std::time::Duration;

use control::StateCode;
use control::fleet::{Capacity, MachineInfo, Page, PartRole, ResourceId, ServerInfo, UnixMillis};
use serde::de::DeserializeOwned;
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::api::guard::parse;
use crate::fault::{Answer, internal, not_found};
use crate::store::Store;

/// After so long without a report a part counts as silent.
pub(crate) const SILENT_AFTER: Duration = Duration::from_secs(30);

/// A code that this version does not know reads as unknown.
pub(crate) fn state_code(text: &str) -> StateCode {
    serde_json::from_value(serde_json::Value::from(text)).unwrap_or_default()
}

/// What a part is doing, as far as is known now.
fn state_now(row: &AnyRow) -> Answer<(StateCode, Option<UnixMillis>)> {
    let seen: i64 = row.try_get("seen")?;
    if seen == 0 {
        return Ok((StateCode::Unknown, None));
    }
    let silent = UnixMillis::now().0 - seen > SILENT_AFTER.as_millis() as i64;
    let state = if silent { StateCode::Unknown } else { state_code(&row.try_get::<String, _>("state")?) };
    Ok((state, Some(UnixMillis(seen))))
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

const MACHINE: &str = "SELECT p.id, p.name, p.group_id, p.version, p.seen, p.clock_ahead, p.certificate_expires, p.state,
        p.trouble, p.disks, p.guests,
        (SELECT COUNT(*) FROM protection_groups g WHERE g.machine_id = p.id AND g.state = 'protected') AS protected
    FROM parts p WHERE p.role = 'agent' AND p.removed = 0";

fn machine_of_row(row: &AnyRow, whole: bool) -> Answer<MachineInfo> {
    let (state, seen) = state_now(row)?;
    let (disks, guests) = match whole {
        true => (told(row, "disks")?, told(row, "guests")?),
        false => (Vec::new(), Vec::new()),
    };
    Ok(MachineInfo {
        id: parse(row.try_get("id")?)?,
        name: parse(row.try_get("name")?)?,
        group: parse(row.try_get("group_id")?)?,
        protected: row.try_get::<i64, _>("protected")? > 0,
        version: row.try_get("version")?,
        state,
        meaning: state.meaning().to_owned(),
        what_to_do: state.what_to_do().to_owned(),
        trouble: some(row.try_get("trouble")?),
        seen,
        clock_ahead_ms: row.try_get("clock_ahead")?,
        certificate_expires: UnixMillis(row.try_get("certificate_expires")?),
        disks,
        guests,
    })
}

/// What the agent reported last of something.
fn told<T: DeserializeOwned>(row: &AnyRow, column: &str) -> Answer<Vec<T>> {
    serde_json::from_str(&row.try_get::<String, _>(column)?)
        .map_err(|error| internal("read what a machine has reported", error))
}

pub(crate) async fn machines(store: &Store, after: &str, limit: i64) -> Answer<Page<MachineInfo>> {
    let rows = sqlx::query(&format!("{MACHINE} AND p.live_name > $1 ORDER BY p.live_name LIMIT $2"))
        .bind(after)
        .bind(limit)
        .fetch_all(&store.read)
        .await?;
    let items: Vec<MachineInfo> = rows.iter().map(|row| machine_of_row(row, false)).collect::<Answer<_>>()?;
    let next =
        (items.len() as i64 == limit).then(|| items.last().map(|last| last.name.to_string())).flatten();
    Ok(Page { items, next })
}

pub(crate) async fn machine(store: &Store, id: &ResourceId) -> Answer<MachineInfo> {
    let row = sqlx::query(&format!("{MACHINE} AND p.id = $1"))
        .bind(id.as_str())
        .fetch_optional(&store.read)
        .await?;
    row.as_ref().map(|row| machine_of_row(row, true)).transpose()?.ok_or_else(|| not_found("machine", id))
}

const SERVER: &str = "SELECT p.id, p.role, p.name, p.address, p.version, p.seen, p.clock_ahead, p.certificate_expires, p.state,
        p.trouble, p.bytes_total, p.bytes_free,
        (SELECT COUNT(*) FROM protection_groups g WHERE g.process_id = p.id AND g.state <> 'removed')
        + (SELECT COUNT(*) FROM group_targets t JOIN protection_groups g ON g.id = t.group_id
           WHERE t.target_id = p.id AND g.state <> 'removed') AS kept_groups
    FROM parts p WHERE p.removed = 0";

fn server_of_row(row: &AnyRow) -> Answer<ServerInfo> {
    let (state, seen) = state_now(row)?;
    let number =
        |name: &str| -> Answer<u64> { Ok(u64::try_from(row.try_get::<i64, _>(name)?).unwrap_or_default()) };
    let capacity = Capacity { bytes_total: number("bytes_total")?, bytes_free: number("bytes_free")? };
    Ok(ServerInfo {
        id: parse(row.try_get("id")?)?,
        role: parse(row.try_get("role")?)?,
        name: parse(row.try_get("name")?)?,
        address: row.try_get("address")?,
        version: row.try_get("version")?,
        state,
        meaning: state.meaning().to_owned(),
        what_to_do: state.what_to_do().to_owned(),
        trouble: some(row.try_get("trouble")?),
        seen,
        clock_ahead_ms: row.try_get("clock_ahead")?,
        certificate_expires: UnixMillis(row.try_get("certificate_expires")?),
        capacity: (capacity.bytes_total > 0).then_some(capacity),
        groups: row.try_get("kept_groups")?,
    })
}

pub(crate) async fn servers(
    store: &Store,
    role: PartRole,
    after: &str,
    limit: i64,
) -> Answer<Page<ServerInfo>> {
    let rows =
        sqlx::query(&format!("{SERVER} AND p.role = $1 AND p.live_name > $2 ORDER BY p.live_name LIMIT $3"))
            .bind(role.as_str())
            .bind(after)
            .bind(limit)
            .fetch_all(&store.read)
            .await?;
    let items: Vec<ServerInfo> = rows.iter().map(server_of_row).collect::<Answer<_>>()?;
    let next =
        (items.len() as i64 == limit).then(|| items.last().map(|last| last.name.to_string())).flatten();
    Ok(Page { items, next })
}

pub(crate) async fn server(store: &Store, role: PartRole, id: &ResourceId) -> Answer<ServerInfo> {
    let row = sqlx::query(&format!("{SERVER} AND p.role = $1 AND p.id = $2"))
        .bind(role.as_str())
        .bind(id.as_str())
        .fetch_optional(&store.read)
        .await?;
    row.as_ref().map(server_of_row).transpose()?.ok_or_else(|| not_found(role.as_str(), id))
}
