use control::fleet::{Policy, PolicyInfo, ResourceId, UnixMillis};
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::api::guard::parse;
use crate::fault::{Answer, internal, not_found};
use crate::store::Store;

const POLICY: &str = "SELECT p.id, p.name, p.policy, p.changed,
        (SELECT COUNT(*) FROM protection_groups g WHERE g.policy_id = p.id AND g.state <> 'removed') AS followers
    FROM policies p";

/// A policy as it is kept.
pub(crate) fn policy_of_text(text: &str) -> Answer<Policy> {
    serde_json::from_str(text).map_err(|error| internal("read a policy", error))
}

fn policy_of_row(row: &AnyRow) -> Answer<PolicyInfo> {
    Ok(PolicyInfo {
        id: parse(row.try_get("id")?)?,
        name: parse(row.try_get("name")?)?,
        policy: policy_of_text(&row.try_get::<String, _>("policy")?)?,
        groups: row.try_get("followers")?,
        changed: UnixMillis(row.try_get("changed")?),
    })
}

pub(crate) async fn policies(store: &Store) -> Answer<Vec<PolicyInfo>> {
    let rows = sqlx::query(&format!("{POLICY} ORDER BY p.name")).fetch_all(&store.read).await?;
    rows.iter().map(policy_of_row).collect()
}

pub(crate) async fn policy(store: &Store, id: &ResourceId) -> Answer<PolicyInfo> {
    let row = sqlx::query(&format!("{POLICY} WHERE p.id = $1"))
        .bind(id.as_str())
        .fetch_optional(&store.read)
        .await?;
    row.as_ref().map(policy_of_row).transpose()?.ok_or_else(|| not_found("policy", id))
}
