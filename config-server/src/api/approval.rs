//! What destroys, or lets something be destroyed, asks for the name typed, and if the settings say so for a second person.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use block::GroupId;
use control::fleet::{
    Approval, ApprovalAnswer, ApprovalState, EventKind, Name, PartRole, Policy, ProblemCode, ResourceId,
    Settings, UnixMillis,
};
use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::api::declare::{follow, remove_group};
use crate::api::enrol::remove_part;
use crate::api::extract::{Body, Id};
use crate::api::guard::{Caller, What, parse};
use crate::api::policy::{drop_policy, write_policy};
use crate::app::{App, Shared};
use crate::fault::{Answer, conflict, fault, internal, not_found};
use crate::secret::new_id;
use crate::store::{self, Said, say};

/// How long an act waits for a second person.
pub(crate) const APPROVAL_TIME: Duration = Duration::from_secs(7 * 86_400);
/// Acts that wait for a second person. More are refused.
pub(crate) const APPROVALS_MAX: i64 = 1000;

/// An act that destroys, or that lets something be destroyed. Kept in this form until a second person has answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "kebab-case")]
pub(super) enum Destructive {
    RemovePart { role: PartRole, id: ResourceId },
    RemoveGroup { id: GroupId },
    ShortenRetention { id: ResourceId, name: Name, policy: Box<Policy> },
    FollowShorter { group: GroupId, policy: ResourceId },
    DeletePolicy { id: ResourceId },
    DeletePlan { id: ResourceId },
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
            Destructive::DeletePlan { id } => crate::plan::drop_plan(act, id).await,
            Destructive::Settings { settings } => {
                store::write_settings(act, settings).await?;
                let said = Said::new(EventKind::Declared, "settings", "The fleet's settings were changed");
                Ok(say(act, said).await?)
            }
        }
    }
}

/// Does it, or puts it before a second person.
pub(super) async fn destroy(
    app: &App,
    caller: &Caller,
    what: String,
    destructive: Destructive,
) -> Answer<Response> {
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

pub(crate) fn confirmed(typed: &str, name: &str) -> Answer<()> {
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
