//! Recovery points of a group. Targets keep them, and there may be many; so they are told only while somebody looks.

use std::time::Duration;

use block::GroupId;
use control::GroupPoints;
use control::fleet::{POINT_LISTS_MAX, PointList, UnixMillis};
use sqlx::{AnyConnection, Row};

use crate::api::guard::parse;
use crate::fault::{Answer, internal};
use crate::store::{Act, Store};

/// For so long after somebody has looked at a group its targets tell its points.
const LOOKED_FOR: Duration = Duration::from_secs(30);
/// A look is not written down again for so long.
const LOOKED_AGAIN: Duration = Duration::from_secs(5);
/// A list that is older is wanted soon.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// The points of a group as its furthest target told them last, and that somebody looks at them.
pub(crate) async fn points(store: &Store, id: &GroupId) -> Answer<PointList> {
    let now = UnixMillis::now();
    let looked: i64 = sqlx::query_scalar("SELECT looked FROM protection_groups WHERE id = $1")
        .bind(id.to_string())
        .fetch_one(&store.read)
        .await?;
    if now.0 - looked > LOOKED_AGAIN.as_millis() as i64 {
        let mut act = store.act().await?;
        sqlx::query("UPDATE protection_groups SET looked = $1 WHERE id = $2")
            .bind(now.0)
            .bind(id.to_string())
            .execute(&mut *act)
            .await?;
        act.commit().await?;
    }
    let row = sqlx::query(
        "SELECT l.target_id, l.time, l.list FROM point_lists l
         JOIN group_targets t ON t.group_id = l.group_id AND t.target_id = l.target_id
         WHERE l.group_id = $1 ORDER BY l.newest DESC LIMIT 1",
    )
    .bind(id.to_string())
    .fetch_optional(&store.read)
    .await?;
    let Some(row) = row else { return Ok(PointList::default()) };
    let list: GroupPoints = serde_json::from_str(&row.try_get::<String, _>("list")?)
        .map_err(|error| internal("read a list of points", error))?;
    Ok(PointList {
        time: Some(UnixMillis(row.try_get("time")?)),
        target_server: Some(parse(row.try_get("target_id")?)?),
        points: list.points,
        omitted: list.omitted,
    })
}

/// The groups of a target at which somebody looks, and whether one of them is waited for.
pub(crate) async fn points_wanted(from: &mut AnyConnection, target: &str) -> Answer<(Vec<GroupId>, bool)> {
    let now = UnixMillis::now().0;
    let rows = sqlx::query(
        "SELECT g.id, COALESCE(l.time, 0) AS told FROM protection_groups g
         JOIN group_targets t ON t.group_id = g.id
         LEFT JOIN point_lists l ON l.group_id = g.id AND l.target_id = t.target_id
         WHERE t.target_id = $1 AND g.looked > $2 AND g.state <> 'removed' ORDER BY g.looked DESC LIMIT $3",
    )
    .bind(target)
    .bind(now - LOOKED_FOR.as_millis() as i64)
    .bind(POINT_LISTS_MAX as i64)
    .fetch_all(from)
    .await?;
    let mut soon = false;
    let mut groups = Vec::with_capacity(rows.len());
    for row in &rows {
        soon |= now - row.try_get::<i64, _>("told")? > STALE_AFTER.as_millis() as i64;
        groups.push(parse(row.try_get("id")?)?);
    }
    Ok((groups, soon))
}

/// Keeps what a target told of a group; nothing when the group is not one of its own.
pub(crate) async fn keep_points(act: &mut Act, target: &str, told: &GroupPoints) -> Answer<()> {
    let json = serde_json::to_string(told).map_err(|error| internal("keep a list of points", error))?;
    let newest = told.points.last().map_or(0, |point| i64::try_from(point.epoch.0).unwrap_or(i64::MAX));
    sqlx::query(
        "INSERT INTO point_lists (group_id, target_id, time, newest, list)
         SELECT group_id, target_id, $1, $2, $3 FROM group_targets WHERE group_id = $4 AND target_id = $5
         ON CONFLICT (group_id, target_id) DO UPDATE SET time = excluded.time, newest = excluded.newest,
             list = excluded.list",
    )
    .bind(UnixMillis::now().0)
    .bind(newest)
    .bind(json.replace("\\u0000", "?"))
    .bind(told.group.to_string())
    .bind(target)
    .execute(&mut **act)
    .await?;
    Ok(())
}
