//! Looking: thin, for the pictures are made in `view`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use block::GroupId;
use control::fleet::{
    GroupInfo, JobInfo, MachineInfo, NAME_BYTES_MAX, Overview, Page, PartRole, PointList, ResourceId,
    SampleInfo, ServerInfo, UnixMillis,
};
use serde::Deserialize;
use serde_json::Value;

use crate::api::extract::{Id, Part, Query};
use crate::api::guard::Caller;
use crate::app::Shared;
use crate::fault::{Answer, invalid};
use crate::{job, view};

/// Figures of one answer.
const SAMPLES_MAX: i64 = 2000;

pub(crate) async fn openapi() -> Json<Value> {
    Json(super::openapi())
}

pub(crate) async fn health(State(app): State<Shared>) -> Answer<StatusCode> {
    sqlx::query("SELECT 1").execute(&app.store.read).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn overview(State(app): State<Shared>) -> Answer<Json<Overview>> {
    Ok(Json(view::overview(&app.store).await?))
}

pub(crate) async fn machines(
    State(app): State<Shared>,
    Query(part): Query<Part>,
) -> Answer<Json<Page<MachineInfo>>> {
    Ok(Json(view::machines(&app.store, part.after_text()?, part.limit()?).await?))
}

pub(crate) async fn machine(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<Json<MachineInfo>> {
    Ok(Json(view::machine(&app.store, &id).await?))
}

async fn servers(app: &Shared, role: PartRole, part: &Part) -> Answer<Json<Page<ServerInfo>>> {
    Ok(Json(view::servers(&app.store, role, part.after_text()?, part.limit()?).await?))
}

pub(crate) async fn process_servers(
    State(app): State<Shared>,
    Query(part): Query<Part>,
) -> Answer<Json<Page<ServerInfo>>> {
    servers(&app, PartRole::ProcessServer, &part).await
}

pub(crate) async fn target_servers(
    State(app): State<Shared>,
    Query(part): Query<Part>,
) -> Answer<Json<Page<ServerInfo>>> {
    servers(&app, PartRole::TargetServer, &part).await
}

pub(crate) async fn process_server(
    State(app): State<Shared>,
    Id(id): Id<ResourceId>,
) -> Answer<Json<ServerInfo>> {
    Ok(Json(view::server(&app.store, PartRole::ProcessServer, &id).await?))
}

pub(crate) async fn target_server(
    State(app): State<Shared>,
    Id(id): Id<ResourceId>,
) -> Answer<Json<ServerInfo>> {
    Ok(Json(view::server(&app.store, PartRole::TargetServer, &id).await?))
}

/// Which groups.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WhichGroups {
    #[serde(default)]
    after: Option<String>,
    #[serde(default)]
    limit: Option<i64>,
    #[serde(default)]
    order: Option<String>,
    #[serde(default)]
    name: Option<String>,
}

pub(crate) async fn groups(
    State(app): State<Shared>,
    Query(which): Query<WhichGroups>,
) -> Answer<Json<Page<GroupInfo>>> {
    let WhichGroups { after, limit, order, name } = which;
    let part = Part { after, limit };
    let (after, limit) = (part.after_text()?, part.limit()?);
    match order.as_deref() {
        None | Some("id") if name.is_none() => Ok(Json(view::groups(&app.store, after, limit).await?)),
        None | Some("id") => Err(invalid("name goes with order=attention only")),
        Some("attention") => {
            let name = name.unwrap_or_default();
            if name.len() > NAME_BYTES_MAX {
                return Err(invalid(format!("name has {} bytes, at most {NAME_BYTES_MAX} go", name.len())));
            }
            let from = match after {
                "" => 0,
                text => text.parse().map_err(|_| invalid("after is no `next` of a part before"))?,
            };
            let limit = usize::try_from(limit).unwrap_or_default();
            Ok(Json(view::groups_by_attention(&app.store, &name, from, limit).await?))
        }
        Some(other) => Err(invalid(format!("order is {other:?}, expected id or attention"))),
    }
}

pub(crate) async fn group(State(app): State<Shared>, Id(id): Id<GroupId>) -> Answer<Json<GroupInfo>> {
    Ok(Json(view::group(&app.store, &id).await?))
}

pub(crate) async fn points(State(app): State<Shared>, Id(id): Id<GroupId>) -> Answer<Json<PointList>> {
    view::group(&app.store, &id).await?;
    Ok(Json(view::points(&app.store, &id).await?))
}

/// Which figures.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stretch {
    #[serde(default)]
    step_s: Option<i64>,
    #[serde(default)]
    from: Option<i64>,
    #[serde(default)]
    to: Option<i64>,
}

pub(crate) async fn samples(
    State(app): State<Shared>,
    Id(id): Id<GroupId>,
    Query(asked): Query<Stretch>,
) -> Answer<Json<Vec<SampleInfo>>> {
    let step = asked.step_s.unwrap_or(30);
    if !crate::sample::SAMPLE_STEPS.iter().any(|(kept, _)| *kept == step) {
        return Err(invalid(format!("step_s is {step}, expected 30 or 600")));
    }
    let to = UnixMillis(asked.to.unwrap_or(UnixMillis::now().0));
    let from = UnixMillis(asked.from.unwrap_or(to.0.saturating_sub(3_600_000)));
    view::group(&app.store, &id).await?;
    Ok(Json(view::samples(&app.store, &id, step, from, to, SAMPLES_MAX).await?))
}

pub(crate) async fn jobs(State(app): State<Shared>, Query(part): Query<Part>) -> Answer<Json<Page<JobInfo>>> {
    Ok(Json(view::jobs(&app.store, part.before_number()?, part.limit()?).await?))
}

pub(crate) async fn job(State(app): State<Shared>, Id(id): Id<ResourceId>) -> Answer<Json<JobInfo>> {
    Ok(Json(view::job(&app.store, &id).await?))
}

pub(crate) async fn cancel_job(
    State(app): State<Shared>,
    caller: Caller,
    Id(id): Id<ResourceId>,
) -> Answer<StatusCode> {
    job::cancel(&app, &id, &caller.shown()).await?;
    Ok(StatusCode::NO_CONTENT)
}
