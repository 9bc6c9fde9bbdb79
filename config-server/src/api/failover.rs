//! The steps of a failover, each a job.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use block::GroupId;
use control::fleet::{Confirm, EndDrill, JobInfo, JobKind, StartDrill, StartFailover, StartProof};

use crate::api::approval::confirmed;
use crate::api::extract::{Body, Id};
use crate::api::guard::Caller;
use crate::app::{App, Shared};
use crate::fault::{Answer, invalid};
use crate::protect::failover::{Wish, begin};
use crate::protect::{drill, home, proof};
use crate::view;

type Begun = Answer<(StatusCode, Json<JobInfo>)>;

async fn job(app: &App, caller: &Caller, id: &GroupId, wish: Wish) -> Begun {
    let mut act = app.store.act().await?;
    let job = begin(app, &mut act, id, wish, caller.shown()).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Whoever asks has typed the group's name.
async fn sure(app: &App, id: &GroupId, typed: &str) -> Answer<()> {
    confirmed(typed, view::group(&app.store, id).await?.name.as_str())
}

pub(crate) async fn start(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<StartFailover>,
) -> Begun {
    sure(&app, &id, &asked.confirm).await?;
    let StartFailover { point, planned, promote, target_server: target, .. } = asked;
    job(&app, &caller, &id, Wish { kind: JobKind::Failover, point, planned, promote, target }).await
}

pub(crate) async fn commit(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<Confirm>,
) -> Begun {
    sure(&app, &id, &asked.confirm).await?;
    job(&app, &caller, &id, Wish::of(JobKind::CommitFailover)).await
}

pub(crate) async fn cancel(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<Confirm>,
) -> Begun {
    sure(&app, &id, &asked.confirm).await?;
    job(&app, &caller, &id, Wish::of(JobKind::CancelFailover)).await
}

pub(crate) async fn promote(State(app): State<Shared>, caller: Caller, Id(id): Id<GroupId>) -> Begun {
    job(&app, &caller, &id, Wish::of(JobKind::Promote)).await
}

pub(crate) async fn demote(State(app): State<Shared>, caller: Caller, Id(id): Id<GroupId>) -> Begun {
    job(&app, &caller, &id, Wish::of(JobKind::Demote)).await
}

pub(crate) async fn release(State(app): State<Shared>, caller: Caller, Id(id): Id<GroupId>) -> Begun {
    job(&app, &caller, &id, Wish::of(JobKind::Release)).await
}

/// Starts a machine on a point.
pub(crate) async fn prove(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<StartProof>,
) -> Begun {
    let group = view::group(&app.store, &id).await?;
    let mut proof = proof::policy_of(&app, &group).await?;
    proof.expect = asked.expect.unwrap_or(proof.expect);
    proof.within_s = asked.within_s.unwrap_or(proof.within_s);
    proof.check().map_err(invalid)?;
    let wish = proof::Wish { point: asked.point, proof, target: asked.target_server };
    let mut act = app.store.act().await?;
    let job = proof::begin(&app, &mut act, &id, wish, caller.shown()).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Begins a drill.
pub(crate) async fn drill(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<StartDrill>,
) -> Begun {
    let mut act = app.store.act().await?;
    let job = drill::begin(&app, &mut act, &id, asked, caller.shown()).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Ends one.
pub(crate) async fn end_drill(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<EndDrill>,
) -> Begun {
    let mut act = app.store.act().await?;
    let job = drill::end(&app, &mut act, &id, asked, caller.shown()).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Brings a group home.
pub(crate) async fn fail_back(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<GroupId>,
    Body(asked): Body<Confirm>,
) -> Begun {
    sure(&app, &id, &asked.confirm).await?;
    let mut act = app.store.act().await?;
    let job = home::begin(&app, &mut act, &id, caller.shown()).await?;
    act.commit().await?;
    app.jobs_wake.notify_one();
    Ok((StatusCode::ACCEPTED, Json(job)))
}
