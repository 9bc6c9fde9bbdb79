//! What is declared: protection, groups, parts, settings.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use block::GroupId;
use control::fleet::{
    ChangeGroup, ChangeTargets, Confirm, EventKind, GroupInfo, JobInfo, JobKind, MachineInfo, PartRole,
    PointNow, Protect, ResourceId, Settings, StepInfo, Unprotect,
};

use crate::api::approval::{Destructive, confirmed, destroy};
use crate::api::extract::{Body, Id};
use crate::api::guard::Caller;
use crate::app::{App, Shared};
use crate::fault::{Answer, conflict, internal, invalid, not_found};
use crate::job::{NewJob, insert_job};
use crate::store::{self, Counter, Said, count, say};
use crate::view;

pub(crate) async fn settings(State(app): State<Shared>) -> Answer<Json<Settings>> {
    let mut from = app.store.read.acquire().await?;
    Ok(Json(store::read_settings(&mut from).await?))
}

pub(crate) async fn set_settings(
    State(app): State<Shared>,
    caller: Caller,
    Body(settings): Body<Settings>,
) -> Answer<Response> {
    destroy(&app, &caller, "change the fleet's settings".to_owned(), Destructive::Settings { settings }).await
}

/// Begins to protect disks of a machine: a job, whose first steps look whether it can be done.
pub(crate) async fn protect(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Protect>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    let machine = view::machine(&app.store, &id).await?;
    let body = crate::protect::plan(&app, &machine, asked).await?;
    begin_protection(&app, &caller, &machine, &body, crate::protect::steps()).await
}

/// Begins to give a protected group other target servers: a job.
pub(crate) async fn change_targets(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<ChangeTargets>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    let group = view::group(&app.store, &id).await?;
    let body = crate::protect::retarget(&app, &group, asked).await?;
    let machine = view::machine(&app.store, &group.machine).await?;
    begin_protection(&app, &caller, &machine, &body, crate::protect::target_steps()).await
}

async fn begin_protection(
    app: &App,
    caller: &Caller,
    machine: &MachineInfo,
    body: &crate::protect::Plan,
    steps: Vec<StepInfo>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    let body = serde_json::to_string(body).map_err(|error| internal("keep a job", error))?;
    let new = NewJob {
        kind: JobKind::Protect,
        subject: machine.name.to_string(),
        subject_id: machine.id.to_string(),
        body,
        steps,
        created_by: caller.shown(),
    };
    let mut act = app.store.act().await?;
    let job = insert_job(&mut act, new).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Ends the protection of a group. Its points stay.
pub(crate) async fn unprotect(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<Unprotect>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    let group = view::group(&app.store, &id).await?;
    confirmed(&asked.confirm, group.name.as_str())?;
    let mut act = app.store.act().await?;
    let changed =
        sqlx::query("UPDATE protection_groups SET state = 'kept' WHERE id = $1 AND state = 'protected'")
            .bind(id.to_string())
            .execute(&mut *act)
            .await?;
    if changed.rows_affected() == 0 {
        return Err(conflict(format!("The group {} is not protected", group.name), "Nothing need be done."));
    }
    count(&mut act, Counter::Declared).await?;
    let job = insert_job(
        &mut act,
        NewJob {
            kind: JobKind::Unprotect,
            subject: group.name.to_string(),
            subject_id: id.to_string(),
            body: "{}".to_owned(),
            steps: crate::protect::unprotect_steps(),
            created_by: caller.shown(),
        },
    )
    .await?;
    let message = format!("The protection of {} ends; its recovery points stay", group.name);
    say(&mut act, Said::new(EventKind::Declared, format!("groups/{id}"), message)).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

pub(crate) async fn point_now(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<PointNow>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    if !asked.consistency.is_point() {
        return Err(invalid("consistency is none; a recovery point is application, filesystem or crash"));
    }
    let body = serde_json::to_string(&asked).map_err(|error| internal("keep a job", error))?;
    group_job(&app, &caller, &id, JobKind::Point, body).await
}

pub(crate) async fn resync(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    group_job(&app, &caller, &id, JobKind::Resync, "{}".to_owned()).await
}

async fn group_job(
    app: &App,
    caller: &Caller,
    id: &GroupId,
    kind: JobKind,
    body: String,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    let group = view::group(&app.store, id).await?;
    let mut act = app.store.act().await?;
    let job = insert_group_job(&mut act, &group, kind, body, caller.shown()).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Has something done by the agent of a protected group.
pub(crate) async fn insert_group_job(
    act: &mut store::Act,
    group: &GroupInfo,
    kind: JobKind,
    body: String,
    created_by: String,
) -> Answer<JobInfo> {
    let state: String = sqlx::query_scalar("SELECT state FROM protection_groups WHERE id = $1")
        .bind(group.id.to_string())
        .fetch_one(&mut **act)
        .await?;
    if state != "protected" {
        return Err(conflict(format!("The group {} is not protected", group.name), "Protect it first."));
    }
    let new = NewJob {
        kind,
        subject: group.name.to_string(),
        subject_id: group.id.to_string(),
        body,
        steps: crate::protect::task_steps(kind),
        created_by,
    };
    insert_job(act, new).await
}

pub(crate) async fn change_group(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<ChangeGroup>,
) -> Answer<Response> {
    let group = view::group(&app.store, &id).await?;
    if let Some(server) = &asked.process_server {
        view::server(&app.store, PartRole::ProcessServer, server).await?;
        let mut act = app.store.act().await?;
        sqlx::query("UPDATE protection_groups SET process_id = $1 WHERE id = $2")
            .bind(server.as_str())
            .bind(id.to_string())
            .execute(&mut *act)
            .await?;
        count(&mut act, Counter::Declared).await?;
        let message = format!("The group {} goes through another process server", group.name);
        say(&mut act, Said::new(EventKind::Declared, format!("groups/{id}"), message)).await?;
        act.commit().await?;
    }
    let Some(policy) = asked.policy else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let before = view::policy(&app.store, &group.policy).await?;
    let after = view::policy(&app.store, &policy).await?;
    if before.policy.keeps_more_than(&after.policy) {
        let what = format!(
            "shorten the retention of group {}: policy {} instead of {}",
            group.name, after.name, before.name
        );
        return destroy(&app, &caller, what, Destructive::FollowShorter { group: id, policy }).await;
    }
    let mut act = app.store.act().await?;
    follow(&mut act, &id, &policy).await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn follow(act: &mut store::Act, group: &GroupId, policy: &ResourceId) -> Answer<()> {
    let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM policies WHERE id = $1")
        .bind(policy.as_str())
        .fetch_one(&mut **act)
        .await?;
    if there == 0 {
        return Err(not_found("policy", policy));
    }
    sqlx::query("UPDATE protection_groups SET policy_id = $1 WHERE id = $2")
        .bind(policy.as_str())
        .bind(group.to_string())
        .execute(&mut **act)
        .await?;
    count(act, Counter::Declared).await?;
    let said = Said::new(EventKind::Declared, format!("groups/{group}"), "A group follows another policy");
    Ok(say(act, said).await?)
}

pub(crate) async fn delete_group(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<Confirm>,
) -> Answer<Response> {
    let group = view::group(&app.store, &id).await?;
    confirmed(&asked.confirm, group.name.as_str())?;
    let what = format!("remove group {} with {} recovery points from the fleet", group.name, group.points);
    destroy(&app, &caller, what, Destructive::RemoveGroup { id }).await
}

/// Servers stop serving the group. What they hold of it stays on their disks until a person deletes it there.
pub(super) async fn remove_group(act: &mut store::Act, id: &GroupId) -> Answer<()> {
    let state: Option<String> = sqlx::query_scalar("SELECT state FROM protection_groups WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(&mut **act)
        .await?;
    match state.as_deref() {
        Some("kept") => {}
        Some("protected") => {
            return Err(conflict("The group is protected", "End its protection first."));
        }
        _ => return Err(not_found("group", id)),
    }
    sqlx::query("UPDATE protection_groups SET state = 'removed' WHERE id = $1")
        .bind(id.to_string())
        .execute(&mut **act)
        .await?;
    sqlx::query("UPDATE protection_groups SET reversed_by = '' WHERE reversed_by = $1")
        .bind(id.to_string())
        .execute(&mut **act)
        .await?;
    count(act, Counter::Declared).await?;
    let said =
        Said::new(EventKind::Removed, format!("groups/{id}"), "A group was removed; servers keep its files");
    Ok(say(act, said).await?)
}

async fn delete_part(
    app: &App,
    caller: &Caller,
    role: PartRole,
    id: ResourceId,
    typed: &str,
) -> Answer<Response> {
    let name = match role {
        PartRole::Agent => view::machine(&app.store, &id).await?.name,
        _ => view::server(&app.store, role, &id).await?.name,
    };
    confirmed(typed, name.as_str())?;
    let what = format!("remove {role} {name}, and revoke its certificates");
    destroy(app, caller, what, Destructive::RemovePart { role, id }).await
}

pub(crate) async fn delete_machine(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Confirm>,
) -> Answer<Response> {
    delete_part(&app, &caller, PartRole::Agent, id, &asked.confirm).await
}

pub(crate) async fn delete_process_server(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Confirm>,
) -> Answer<Response> {
    delete_part(&app, &caller, PartRole::ProcessServer, id, &asked.confirm).await
}

pub(crate) async fn delete_target_server(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Confirm>,
) -> Answer<Response> {
    delete_part(&app, &caller, PartRole::TargetServer, id, &asked.confirm).await
}
