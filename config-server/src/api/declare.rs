//! What is declared: policies, protection, settings. What destroys asks for the name typed, and if the settings say so for a
//! second person.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use block::GroupId;
use control::fleet::{
    Approval, ApprovalAnswer, ApprovalState, ChangeGroup, Confirm, EventKind, JobInfo, JobKind, Name,
    NewPolicy, PartRole, PointNow, Policy, PolicyInfo, ProblemCode, Protect, ResourceId, Settings,
    UnixMillis, Unprotect,
};
use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::api::enrol::remove_part;
use crate::api::extract::{Body, Id};
use crate::api::guard::{Caller, What, parse};
use crate::app::{App, Shared};
use crate::fault::{Answer, conflict, fault, internal, invalid, not_found};
use crate::job::{NewJob, insert_job};
use crate::secret::new_id;
use crate::store::{self, Counter, Said, count, say};
use crate::view;

/// Policies. More are refused.
pub(crate) const POLICIES_MAX: i64 = 1000;
/// How long an act waits for a second person.
pub(crate) const APPROVAL_TIME: Duration = Duration::from_secs(7 * 86_400);
/// Acts that wait for a second person. More are refused.
pub(crate) const APPROVALS_MAX: i64 = 1000;
/// The name of the policy that is taken when none is said.
pub(crate) const DEFAULT_POLICY: &str = "default";

/// An act that destroys, or that lets something be destroyed. Kept in this form until a second person has answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "kebab-case")]
enum Destructive {
    RemovePart { role: PartRole, id: ResourceId },
    RemoveGroup { id: GroupId },
    ShortenRetention { id: ResourceId, name: Name, policy: Policy },
    FollowShorter { group: GroupId, policy: ResourceId },
    DeletePolicy { id: ResourceId },
    Settings { settings: Settings },
}

impl Destructive {
    async fn perform(&self, act: &mut store::Act) -> Answer<()> {
        match self {
            Destructive::RemovePart { role, id } => remove_part(act, *role, id).await,
            Destructive::RemoveGroup { id } => remove_group(act, id).await,
            Destructive::ShortenRetention { id, name, policy } => write_policy(act, id, name, policy).await,
            Destructive::FollowShorter { group, policy } => follow(act, group, policy).await,
            Destructive::DeletePolicy { id } => drop_policy(act, id).await,
            Destructive::Settings { settings } => {
                store::write_settings(act, settings).await?;
                let said = Said::new(EventKind::Declared, "settings", "The fleet's settings were changed");
                Ok(say(act, said).await?)
            }
        }
    }
}

/// Does it, or puts it before a second person.
async fn destroy(app: &App, caller: &Caller, what: String, destructive: Destructive) -> Answer<Response> {
    let (asker, _) = caller.person()?;
    let mut act = app.store.act().await?;
    if !store::read_settings(&mut act).await?.second_person {
        destructive.perform(&mut act).await?;
        act.commit().await?;
        let mut response = StatusCode::NO_CONTENT.into_response();
        response.extensions_mut().insert(What(what));
        return Ok(response);
    }
    // Whether it can be done at all is found now, and not by the second person.
    destructive.perform(&mut act).await?;
    act.rollback().await?;
    let mut act = app.store.act().await?;
    let waiting: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM approvals WHERE state = 'waiting'")
        .fetch_one(&mut *act)
        .await?;
    if waiting >= APPROVALS_MAX {
        let detail = format!("{waiting} acts wait for a second person");
        return Err(fault(ProblemCode::Limit, detail, "Answer them first."));
    }
    let asked = UnixMillis::now();
    let approval = Approval {
        id: new_id(),
        what: what.clone(),
        asked_by: caller.shown(),
        asked,
        expires: asked.plus(APPROVAL_TIME),
        state: ApprovalState::Waiting,
        answered_by: None,
    };
    let json = serde_json::to_string(&destructive).map_err(|error| internal("keep an act", error))?;
    sqlx::query(
        "INSERT INTO approvals (id, act, what, asker_id, asked_by, asked, expires, state, answered_by)
         VALUES ($1, $2, $3, $4, $5, $6, $7, 'waiting', '')",
    )
    .bind(approval.id.as_str())
    .bind(json)
    .bind(&approval.what)
    .bind(asker.as_str())
    .bind(&approval.asked_by)
    .bind(asked.0)
    .bind(approval.expires.0)
    .execute(&mut *act)
    .await?;
    let message = format!("{} asks a second person: {what}", approval.asked_by);
    say(&mut act, Said::new(EventKind::Access, format!("approvals/{}", approval.id), message)).await?;
    act.commit().await?;
    let mut response = (StatusCode::ACCEPTED, Json(approval)).into_response();
    response.extensions_mut().insert(What(what));
    Ok(response)
}

fn confirmed(typed: &str, name: &str) -> Answer<()> {
    if typed == name {
        return Ok(());
    }
    Err(fault(
        ProblemCode::NotConfirmed,
        format!("{typed:?} is not the name of what would be destroyed"),
        format!("To do it, send its name as `confirm`: {name}"),
    ))
}

fn approval_of_row(row: &AnyRow) -> Answer<Approval> {
    let expires = UnixMillis(row.try_get("expires")?);
    let state = match row.try_get::<String, _>("state")?.as_str() {
        "waiting" if expires < UnixMillis::now() => ApprovalState::Expired,
        "waiting" => ApprovalState::Waiting,
        "approved" => ApprovalState::Approved,
        _ => ApprovalState::Rejected,
    };
    let answered_by: String = row.try_get("answered_by")?;
    Ok(Approval {
        id: parse(row.try_get("id")?)?,
        what: row.try_get("what")?,
        asked_by: row.try_get("asked_by")?,
        asked: UnixMillis(row.try_get("asked")?),
        expires,
        state,
        answered_by: (!answered_by.is_empty()).then_some(answered_by),
    })
}

pub(crate) async fn approvals(State(app): State<Shared>) -> Answer<Json<Vec<Approval>>> {
    let rows = sqlx::query("SELECT * FROM approvals ORDER BY asked DESC LIMIT 1000")
        .fetch_all(&app.store.read)
        .await?;
    Ok(Json(rows.iter().map(approval_of_row).collect::<Answer<_>>()?))
}

pub(crate) async fn answer_approval(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(answer): Body<ApprovalAnswer>,
) -> Answer<Json<Approval>> {
    let (answerer, _) = caller.person()?;
    let mut act = app.store.act().await?;
    let state = if answer.approve { "approved" } else { "rejected" };
    // One statement, so that of two that answer at once only one does it.
    let row = sqlx::query(
        "UPDATE approvals SET state = $1, answered_by = $2
         WHERE id = $3 AND state = 'waiting' AND expires > $4 RETURNING *",
    )
    .bind(state)
    .bind(caller.shown())
    .bind(id.as_str())
    .bind(UnixMillis::now().0)
    .fetch_optional(&mut *act)
    .await?;
    let Some(row) = row else {
        let there: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM approvals WHERE id = $1")
            .bind(id.as_str())
            .fetch_one(&mut *act)
            .await?;
        return Err(match there {
            0 => not_found("approval", id),
            _ => conflict("It was answered already, or has expired", "Ask for the act again."),
        });
    };
    if answer.approve {
        if row.try_get::<String, _>("asker_id")? == answerer.as_str() {
            return Err(fault(
                ProblemCode::Forbidden,
                "Who asked for an act cannot approve it",
                "Ask another administrator; you may reject it.",
            ));
        }
        let json: String = row.try_get("act")?;
        let destructive: Destructive =
            serde_json::from_str(&json).map_err(|error| internal("read an act that waits", error))?;
        destructive.perform(&mut act).await?;
    }
    let approval = approval_of_row(&row)?;
    let message = format!("{} has {state}: {}", caller.shown(), approval.what);
    say(&mut act, Said::new(EventKind::Access, format!("approvals/{id}"), message)).await?;
    act.commit().await?;
    Ok(Json(approval))
}

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
        let destructive = Destructive::ShortenRetention { id, name: asked.name, policy: asked.policy };
        return destroy(&app, &caller, what, destructive).await;
    }
    let mut act = app.store.act().await?;
    write_policy(&mut act, &id, &asked.name, &asked.policy).await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn write_policy(act: &mut store::Act, id: &ResourceId, name: &Name, policy: &Policy) -> Answer<()> {
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

async fn drop_policy(act: &mut store::Act, id: &ResourceId) -> Answer<()> {
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

/// Begins to protect disks of a machine: a job, whose first steps look whether it can be done.
pub(crate) async fn protect(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Protect>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    let machine = view::machine(&app.store, &id).await?;
    let body = crate::protect::plan(&app, &machine, asked).await?;
    let body = serde_json::to_string(&body).map_err(|error| internal("keep a job", error))?;
    let mut act = app.store.act().await?;
    let job = insert_job(
        &mut act,
        NewJob {
            kind: JobKind::Protect,
            subject: machine.name.to_string(),
            subject_id: id.to_string(),
            body,
            steps: crate::protect::steps(),
            created_by: caller.shown(),
        },
    )
    .await?;
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
    let state: String = sqlx::query_scalar("SELECT state FROM protection_groups WHERE id = $1")
        .bind(id.to_string())
        .fetch_one(&mut *act)
        .await?;
    if state != "protected" {
        return Err(conflict(format!("The group {} is not protected", group.name), "Protect it first."));
    }
    let job = insert_job(
        &mut act,
        NewJob {
            kind,
            subject: group.name.to_string(),
            subject_id: id.to_string(),
            body,
            steps: crate::protect::task_steps(kind),
            created_by: caller.shown(),
        },
    )
    .await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
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

async fn follow(act: &mut store::Act, group: &GroupId, policy: &ResourceId) -> Answer<()> {
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
async fn remove_group(act: &mut store::Act, id: &GroupId) -> Answer<()> {
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
