//! Recovery plans and their runs.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use control::fleet::plan::AnswerStep;
use control::fleet::plan::{NewPlan, PlanInfo, PlanRun, RunPlan};
use control::fleet::{Confirm, JobInfo, ResourceId};

use crate::api::approval::{Destructive, confirmed, destroy};
use crate::api::extract::{Body, Id};
use crate::api::guard::Caller;
use crate::app::Shared;
use crate::fault::Answer;
use crate::plan;

pub(crate) async fn plans(State(app): State<Shared>) -> Answer<Json<Vec<PlanInfo>>> {
    Ok(Json(plan::plans(&app.store).await?))
}

pub(crate) async fn plan(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<Json<PlanInfo>> {
    Ok(Json(plan::plan(&app.store, &id).await?))
}

pub(crate) async fn new_plan(
    State(app): State<Shared>,
    caller: Caller,
    Body(asked): Body<NewPlan>,
) -> Answer<(StatusCode, Json<PlanInfo>)> {
    let mut act = app.store.act().await?;
    let id = plan::write(&mut act, None, &asked.text, &caller.shown()).await?;
    act.commit().await?;
    Ok((StatusCode::CREATED, Json(plan::plan(&app.store, &id).await?)))
}

pub(crate) async fn set_plan(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<NewPlan>,
) -> Answer<Json<PlanInfo>> {
    let mut act = app.store.act().await?;
    plan::write(&mut act, Some(&id), &asked.text, &caller.shown()).await?;
    act.commit().await?;
    Ok(Json(plan::plan(&app.store, &id).await?))
}

pub(crate) async fn delete_plan(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<Confirm>,
) -> Answer<Response> {
    let there = plan::plan(&app.store, &id).await?;
    confirmed(&asked.confirm, there.name.as_str())?;
    destroy(&app, &caller, format!("delete the plan {}", there.name), Destructive::DeletePlan { id }).await
}

pub(crate) async fn run_plan(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<RunPlan>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    Ok((StatusCode::ACCEPTED, Json(plan::begin(&app, &id, &asked, caller.shown()).await?)))
}

pub(crate) async fn runs(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<Json<Vec<JobInfo>>> {
    Ok(Json(plan::runs(&app.store, &id).await?))
}

pub(crate) async fn run(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<Json<PlanRun>> {
    Ok(Json(plan::run(&app.store, &id).await?))
}

pub(crate) async fn answer(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
    Body(asked): Body<AnswerStep>,
) -> Answer<StatusCode> {
    plan::answer(&app, &id, &asked, caller.shown()).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn resume(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
) -> Answer<(StatusCode, Json<JobInfo>)> {
    Ok((StatusCode::ACCEPTED, Json(plan::resume(&app, &id, &caller.shown()).await?)))
}
