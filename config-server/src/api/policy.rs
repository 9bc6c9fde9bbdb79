//! Policies.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use control::fleet::{
    Confirm, EventKind, Name, NewPolicy, Policy, PolicyInfo, ProblemCode, ResourceId, UnixMillis,
};

use crate::api::approval::{Destructive, confirmed, destroy};
use crate::api::extract::{Body, Id};
use crate::api::guard::Caller;
use crate::app::Shared;
use crate::fault::{Answer, conflict, fault, internal, invalid, not_found};
use crate::secret::new_id;
use crate::store::{self, Counter, Said, count, say};
use crate::view;

/// Policies. More are refused.
pub(crate) const POLICIES_MAX: i64 = 1000;
/// The name of the policy that is taken when none is said.
pub(crate) const DEFAULT_POLICY: &str = "default";

pub(crate) async fn policies(State(app): State<Shared>) -> Answer<Json<Vec<PolicyInfo>>> {
    Ok(Json(view::policies(&app.store).await?))
}

pub(crate) async fn policy(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<Json<PolicyInfo>> {
    Ok(Json(view::policy(&app.store, &id).await?))
}

fn sensible(policy: &Policy) -> Answer<()> {
    policy.check().map_err(|error| invalid(format!("The policy makes no sense: {error}")))
}

pub(crate) async fn new_policy(
    State(app): State<Shared>,
    Body(asked): Body<NewPolicy>,
) -> Answer<(StatusCode, Json<PolicyInfo>)> {
    sensible(&asked.policy)?;
    let id = new_id();
    let mut act = app.store.act().await?;
    insert_policy(&mut act, &id, &asked.name, &asked.policy).await?;
    act.commit().await?;
    Ok((StatusCode::CREATED, Json(view::policy(&app.store, &id).await?)))
}

/// Makes a policy.
pub(crate) async fn insert_policy(
    act: &mut store::Act,
    id: &ResourceId,
    name: &Name,
    policy: &Policy,
) -> Answer<()> {
    let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM policies").fetch_one(&mut **act).await?;
    if there >= POLICIES_MAX {
        return Err(fault(
            ProblemCode::Limit,
            format!("There are {there} policies"),
            "Delete those without groups.",
        ));
    }
    free_policy_name(act, id, name).await?;
    sqlx::query("INSERT INTO policies (id, name, policy, changed) VALUES ($1, $2, $3, $4)")
        .bind(id.as_str())
        .bind(name.as_str())
        .bind(policy_json(policy)?)
        .bind(UnixMillis::now().0)
        .execute(&mut **act)
        .await?;
    let said = Said::new(EventKind::Declared, format!("policies/{id}"), format!("Policy {name} was made"));
    Ok(say(act, said).await?)
}

fn policy_json(policy: &Policy) -> Answer<String> {
    serde_json::to_string(policy).map_err(|error| internal("keep a policy", error))
}

async fn free_policy_name(act: &mut store::Act, id: &ResourceId, name: &Name) -> Answer<()> {
    let taken: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM policies WHERE name = $1 AND id <> $2")
        .bind(name.as_str())
        .bind(id.as_str())
        .fetch_one(&mut **act)
        .await?;
    match taken {
        0 => Ok(()),
        _ => Err(conflict(format!("There is a policy {name} already"), "Choose another name.")),
    }
}

pub(crate) async fn set_policy(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<NewPolicy>,
) -> Answer<Response> {
    sensible(&asked.policy)?;
    let before = view::policy(&app.store, &id).await?;
    if before.groups > 0 && before.policy.keeps_more_than(&asked.policy) {
        let what = format!("shorten the retention of policy {} with {} groups", before.name, before.groups);
        let destructive =
            Destructive::ShortenRetention { id, name: asked.name, policy: Box::new(asked.policy) };
        return destroy(&app, &caller, what, destructive).await;
    }
    let mut act = app.store.act().await?;
    write_policy(&mut act, &id, &asked.name, &asked.policy).await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn write_policy(
    act: &mut store::Act,
    id: &ResourceId,
    name: &Name,
    policy: &Policy,
) -> Answer<()> {
    free_policy_name(act, id, name).await?;
    let changed = sqlx::query("UPDATE policies SET name = $1, policy = $2, changed = $3 WHERE id = $4")
        .bind(name.as_str())
        .bind(policy_json(policy)?)
        .bind(UnixMillis::now().0)
        .bind(id.as_str())
        .execute(&mut **act)
        .await?;
    if changed.rows_affected() == 0 {
        return Err(not_found("policy", id));
    }
    count(act, Counter::Declared).await?;
    let said = Said::new(EventKind::Declared, format!("policies/{id}"), format!("Policy {name} was changed"));
    Ok(say(act, said).await?)
}

pub(crate) async fn delete_policy(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Confirm>,
) -> Answer<Response> {
    let there = view::policy(&app.store, &id).await?;
    confirmed(&asked.confirm, there.name.as_str())?;
    destroy(&app, &caller, format!("delete policy {}", there.name), Destructive::DeletePolicy { id }).await
}

pub(super) async fn drop_policy(act: &mut store::Act, id: &ResourceId) -> Answer<()> {
    let used: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM protection_groups WHERE policy_id = $1")
        .bind(id.as_str())
        .fetch_one(&mut **act)
        .await?;
    if used > 0 {
        return Err(conflict(
            format!("{used} groups follow or followed the policy"),
            "Give them another policy first.",
        ));
    }
    let gone =
        sqlx::query("DELETE FROM policies WHERE id = $1").bind(id.as_str()).execute(&mut **act).await?;
    if gone.rows_affected() == 0 {
        return Err(not_found("policy", id));
    }
    Ok(say(act, Said::new(EventKind::Declared, format!("policies/{id}"), "A policy was deleted")).await?)
}
