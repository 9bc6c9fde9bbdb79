//! Alerts, and who is told of them.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use control::fleet::{AlertInfo, AlertSettings, EventKind};

use crate::api::extract::Body;
use crate::app::Shared;
use crate::fault::Answer;
use crate::store::{Said, say};

/// Alerts of one answer.
const ALERTS_MAX: i64 = 1000;

pub(crate) async fn alerts(State(app): State<Shared>) -> Answer<Json<Vec<AlertInfo>>> {
    Ok(Json(crate::alert::alerts(&app.store, ALERTS_MAX).await?))
}

pub(crate) async fn settings(State(app): State<Shared>) -> Answer<Json<AlertSettings>> {
    let mut settings = crate::alert::settings(&mut *app.store.read.acquire().await?).await?;
    if let Some(mail) = &mut settings.mail {
        mail.password = None;
    }
    Ok(Json(settings))
}

pub(crate) async fn set_settings(
    State(app): State<Shared>,
    Body(settings): Body<AlertSettings>,
) -> Answer<StatusCode> {
    let mut act = app.store.act().await?;
    crate::alert::set_settings(&mut act, settings).await?;
    say(&mut act, Said::new(EventKind::Declared, "settings", "Who is told of alerts has changed")).await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn test(State(app): State<Shared>) -> Answer<StatusCode> {
    let mut act = app.store.act().await?;
    crate::alert::test(&mut act).await?;
    act.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
